//! Leaving nothing on a server that outlives the run.
//!
//! Every name of a database that this crate makes begins with the number of the database to which it connects
//! for that, since advisory locks count only within it, and says which process made it. That process holds a
//! lock on its number, so whoever gets the lock may drop the database; and it holds a shared lock as long as it
//! has databases, so whoever gets that one exclusively may drop the templates.

use sqlx::PgConnection;
use tokio::sync::Mutex;

use crate::{
    error::{Error, sql},
    join::run,
};

/// The first key of our advisory locks; the second is the owner's number or a template's hash.
pub(crate) const USERS: i32 = 0x6175_7401;
const OWNER: i32 = 0x6175_7402;
pub(crate) const TEMPLATE: i32 = 0x6175_7403;

pub(crate) struct Lease {
    held: Mutex<Held>,
    owner: u32,
}

struct Held {
    session: PgConnection,
    databases: usize,
}

impl Lease {
    /// Takes the session that holds the locks of this process, and drops what killed processes left.
    pub(crate) async fn new(mut session: PgConnection) -> Result<Lease, Error> {
        // Not all versions know the setting.
        let _ = sqlx::query("SET idle_session_timeout = 0").execute(&mut session).await;
        let owner = loop {
            let owner = rand::random::<u32>();
            if try_lock(&mut session, OWNER, owner.cast_signed()).await? {
                break owner;
            }
        };
        sweep(&mut session).await?;
        Ok(Lease { held: Mutex::new(Held { session, databases: 0 }), owner })
    }

    /// The number in the names of this process's databases.
    pub(crate) fn owner(&self) -> u32 {
        self.owner
    }

    /// Before a database is made: templates stay from now on.
    pub(crate) async fn acquire(&self) -> Result<(), Error> {
        let mut held = self.held.lock().await;
        if held.databases == 0 {
            sqlx::query("SELECT pg_advisory_lock_shared($1, 0)")
                .bind(USERS)
                .execute(&mut held.session)
                .await
                .map_err(sql("lock the templates"))?;
        }
        held.databases += 1;
        Ok(())
    }

    /// After a database is dropped: templates go with the last one of the run.
    pub(crate) async fn release(&self) -> Result<(), Error> {
        let mut held = self.held.lock().await;
        held.databases = held.databases.saturating_sub(1);
        if held.databases > 0 {
            return Ok(());
        }
        let session = &mut held.session;
        sqlx::query("SELECT pg_advisory_unlock_shared($1, 0)")
            .bind(USERS)
            .execute(&mut *session)
            .await
            .map_err(sql("free the templates"))?;
        if !try_lock(session, USERS, 0).await? {
            return Ok(());
        }
        let templates = ours(session, "(template|new)_.*").await?;
        let mut dropped = Ok(());
        for (name, _) in templates {
            dropped = dropped.and(drop_database(session, &name).await);
        }
        unlock(session, USERS, 0).await?;
        dropped
    }
}

/// Drops the databases of processes that are gone.
async fn sweep(session: &mut PgConnection) -> Result<(), Error> {
    for (name, owner) in ours(session, "([0-9a-f]{8})_[0-9]+").await? {
        let Ok(owner) = u32::from_str_radix(&owner, 16) else { continue };
        let owner = owner.cast_signed();
        // A session gets its own lock again, but it has no databases yet.
        if try_lock(session, OWNER, owner).await? {
            let dropped = drop_database(session, &name).await;
            unlock(session, OWNER, owner).await?;
            dropped?;
        }
    }
    Ok(())
}

/// Our databases whose names end like this, and what the first group of the pattern matches.
async fn ours(session: &mut PgConnection, end: &str) -> Result<Vec<(String, String)>, Error> {
    sqlx::query_as(
        "SELECT datname::text, substring(datname FROM pattern)
         FROM pg_database,
              (SELECT '^testdb_' || to_hex(oid::bigint) || '_' || $1 || '$' FROM pg_database
               WHERE datname = current_database()) AS here (pattern)
         WHERE datname ~ pattern",
    )
    .bind(end)
    .fetch_all(session)
    .await
    .map_err(sql("list the databases of tests"))
}

pub(crate) async fn drop_database(session: &mut PgConnection, name: &str) -> Result<(), Error> {
    let dropped = run(session, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
    dropped.map_err(sql("drop a database"))
}

async fn try_lock(session: &mut PgConnection, kind: i32, key: i32) -> Result<bool, Error> {
    sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)")
        .bind(kind)
        .bind(key)
        .fetch_one(session)
        .await
        .map_err(sql("try a lock"))
}

async fn unlock(session: &mut PgConnection, kind: i32, key: i32) -> Result<(), Error> {
    let freed = sqlx::query("SELECT pg_advisory_unlock($1, $2)").bind(kind).bind(key).execute(session).await;
    freed.map(drop).map_err(sql("free a lock"))
}
