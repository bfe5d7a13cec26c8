use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a directory could not be read or an emulator could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is not there or may not be read.
    #[error("cannot read directory file `{path}`; check the path and its permissions")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file was read, but what is in it is no directory.
    #[error("directory file `{path}` cannot be used")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        #[source]
        source: Box<Error>,
    },
    /// The content starts as gzip does and does not unpack.
    #[error("the gzip data is damaged or cut short; copy the file again")]
    Gunzip(#[source] io::Error),
    /// The content is not the JSON of a directory file.
    #[error(
        "this is not a directory as JSON; it needs `customerId`, `users`, `groups` and `members` by group id"
    )]
    Json(#[from] serde_json::Error),
    /// The JSON is well formed, but its objects do not fit together.
    #[error("{what}; correct the directory file")]
    Inconsistent {
        /// What does not fit, with the object in question.
        what: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on `{address}`; choose a free port, or 0 for any")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The test key that is built in cannot be used, which is a fault of this crate.
    #[error("the built-in test key is not usable ({what}); generate data/worthless-test-key.pem anew")]
    TestKey {
        /// What is wrong with it.
        what: String,
    },
}
