//! What can go wrong, in words that say what to do next.

use std::{error::Error as StdError, io, sync::Arc};

/// Why there is no database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A template's name becomes part of a database's name and so is restricted.
    #[error("`{0}` is not a template's name; use 1 to 40 characters of a-z, 0-9 and `_`")]
    TemplateName(String),

    /// The function that fills the template failed; nothing of the template is kept.
    #[error("the template `{template}` could not be prepared")]
    Prepare {
        /// The template's name as the caller gave it.
        template: String,
        /// What the caller's function said.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// `AUTHZ_TEST_DATABASE_URL` is set, so nothing else is tried, but it does not lead to a usable server.
    #[error(
        "the server that AUTHZ_TEST_DATABASE_URL names cannot be used; correct it (the role must be able to \
         create databases) or unset it"
    )]
    Url(#[source] sqlx::Error),

    /// A setting has a value that means nothing.
    #[error("{name} is `{value}`; {advice}")]
    Setting {
        /// The environment variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to set instead.
        advice: String,
    },

    /// Every way to a server was tried; the message names them all and why each failed.
    #[error("{0}")]
    NoServer(String),

    /// Another user's folder, or something that is no folder, is where the run folder should be.
    #[error("`{folder}` is not a private folder of this user; remove it or set TMPDIR to another folder")]
    RunFolder {
        /// The path in question.
        folder: String,
    },

    /// The server's programs were there, but no server came up.
    #[error("PostgreSQL did not start ({reason}); the end of its log: {log}")]
    NotStarted {
        /// What happened.
        reason: String,
        /// The last lines that `initdb` and `postgres` wrote.
        log: String,
    },

    /// A standby starts as a copy that this program makes; some systems have it in a package of its own.
    #[error("there is no `pg_basebackup` in `{bin}`; install PostgreSQL's client programs as well")]
    NoBaseBackup {
        /// The folder of the server's programs.
        bin: String,
    },

    /// A statement of this crate failed.
    #[error("could not {doing}")]
    Sql {
        /// What was being done.
        doing: &'static str,
        /// What the server or the connection said.
        source: sqlx::Error,
    },

    /// A file, a folder or a program of this machine could not be used.
    #[error("could not {doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the operating system said.
        source: io::Error,
    },

    /// The thread that talks to the server is gone, which only happens while the process ends.
    #[error("the process is ending; no more databases are made")]
    Ending,

    /// No server was found earlier in this process, and it is not looked for again.
    #[error(transparent)]
    Earlier(Arc<Error>),
}

/// Adds what was being done to an error that does not say it.
pub(crate) trait Doing<T> {
    fn doing(self, doing: impl Into<String>) -> Result<T, Error>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: impl Into<String>) -> Result<T, Error> {
        self.map_err(|source| Error::Io { doing: doing.into(), source })
    }
}

/// The same for SQL, where a constant says enough.
pub(crate) fn sql(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
    move |source| Error::Sql { doing, source }
}

/// An error and its sources in one line, for a message that quotes it.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
