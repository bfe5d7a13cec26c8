//! A local Admin SDK Directory API that serves a directory file.
