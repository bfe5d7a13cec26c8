//! A fresh Postgres database for each test or demo, with nothing to set up.
