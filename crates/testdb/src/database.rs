//! A database of one's own.

use std::{
    collections::HashMap,
    error::Error as StdError,
    future::Future,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use crate::{
    attendant::{self, Attendant},
    error::Error,
};

/// A database for one test. Dropping it drops the database, whoever is still connected.
pub struct Database {
    attendant: &'static Attendant,
    name: String,
    url: String,
}

impl Database {
    /// A new database, copied from the template `template`.
    ///
    /// The first caller in the run makes the template: it calls `prepare` with the URL of an empty database.
    /// All callers that say the same name get the same template, in all processes of the run, so the name
    /// should tell what is in it, for instance with a hash of the migrations. It has 1 to 40 characters of
    /// `a-z`, `0-9` and `_`.
    ///
    /// # Errors
    /// When there is no server, when `prepare` fails (the template is then not kept) or when the name is not
    /// allowed.
    pub async fn create<F, Fut, E>(template: &str, prepare: F) -> Result<Database, Error>
    where
        F: FnOnce(String) -> Fut,
        Fut: Future<Output = Result<(), E>>,
        E: Into<Box<dyn StdError + Send + Sync>>,
    {
        let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        if !(1..=40).contains(&template.len()) || !template.bytes().all(allowed) {
            return Err(Error::TemplateName(template.to_owned()));
        }
        let database = Database::reserve().await?;
        let attendant = database.attendant;
        if attendant.create_from(template, &database.name).await? {
            return Ok(database);
        }
        {
            // In this process one task waits for the lock that is between the processes.
            let turn = turn_of(template);
            let _turn = turn.lock().await;
            if let Some(draft) = attendant.draft(template).await? {
                prepare(attendant.draft_url(&draft)).await.map_err(|error| Error::Prepare {
                    template: template.to_owned(),
                    source: error.into(),
                })?;
                attendant.publish(draft).await?;
            }
        }
        if attendant.create_from(template, &database.name).await? {
            return Ok(database);
        }
        Err(Error::Sql { doing: "copy the template", source: sqlx::Error::RowNotFound })
    }

    /// A new database with nothing in it.
    ///
    /// # Errors
    /// When there is no server.
    pub async fn empty() -> Result<Database, Error> {
        let database = Database::reserve().await?;
        database.attendant.create_empty(&database.name).await?;
        Ok(database)
    }

    /// A `postgres://` URL that sqlx, psql and other clients take. It may hold a password.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The database's name on its server.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name and all that its drop takes back, so that a failure on the way leaves nothing.
    async fn reserve() -> Result<Database, Error> {
        let attendant = Attendant::get().await?;
        let name = attendant.reserve().await?;
        Ok(Database { url: attendant.url(&name), attendant, name })
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.attendant.drop_database(&self.name);
    }
}

/// Which server this process uses, in one line, such as
/// `PostgreSQL 15.18 from /usr/lib/postgresql/15/bin, started for this run`; `None` before its first database.
#[must_use]
pub fn describe() -> Option<&'static str> {
    attendant::description()
}

fn turn_of(template: &str) -> Arc<tokio::sync::Mutex<()>> {
    static TURNS: LazyLock<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>> =
        LazyLock::new(Mutex::default);
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(turns.entry(template.to_owned()).or_default())
}
