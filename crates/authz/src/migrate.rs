//! The tables, brought up to date beside a host application's own migrations.

use futures_util::future::BoxFuture;
use sqlx::migrate::Migrator;
use sqlx::{Acquire, PgPool, Postgres, Transaction};

use crate::audit::era;
use crate::error::Error;
use crate::lent::Lent;

/// Our migrations. They live in schema `authz`, their record in `authz._sqlx_migrations` (see `sqlx.toml`).
static MIGRATOR: Migrator = sqlx::migrate!();

/// Creates the schema `authz` or brings it up to date. Safe when several processes start at once: one
/// works, the others wait. The host's own tables and migrations are not touched.
///
/// Takes a session-level advisory lock, so connect to Postgres itself, not through a pooler in transaction mode.
///
/// # Errors
/// [`Error::NotPermitted`] if the role may not create the schema or is not its owner; [`Error::Migrate`], for instance if the
/// database was migrated by a newer version.
pub async fn migrate(pool: &PgPool) -> Result<(), Error> {
    // The lock is the session's, and an error does not give it back: this connection is closed.
    MIGRATOR.run(ForMigrator(Lent::from(pool).await?)).await?;
    let mut connection = pool.acquire().await?;
    Ok(era::note(&mut connection).await?)
}

/// A connection that the migrator takes for itself.
struct ForMigrator(Lent);

impl<'c> Acquire<'c> for ForMigrator {
    type Database = Postgres;
    type Connection = Lent;

    fn acquire(self) -> BoxFuture<'c, Result<Lent, sqlx::Error>> {
        Box::pin(std::future::ready(Ok(self.0)))
    }

    /// The migrator begins its transactions on the connection.
    fn begin(self) -> BoxFuture<'c, Result<Transaction<'c, Postgres>, sqlx::Error>> {
        Box::pin(std::future::ready(Err(sqlx::Error::BeginFailed)))
    }
}

/// How the tables stand to this version of the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchemaState {
    /// They are of this version.
    Current(i64),
    /// There are none.
    Missing,
    /// They are older: [`migrate`] brings them up to date.
    Behind {
        /// The version that they have.
        found: i64,
        /// The version that this library needs.
        wanted: i64,
    },
    /// A newer library made them.
    Ahead {
        /// The version that they have.
        found: i64,
        /// The newest version that this library knows.
        known: i64,
    },
}

/// Looks at the tables, and changes nothing.
///
/// # Errors
/// [`Error::Database`] if the database does not answer, [`Error::NotPermitted`] if it does not let this role look.
pub async fn schema_state(pool: &PgPool) -> Result<SchemaState, Error> {
    let known = MIGRATOR.iter().last().map_or(0, |m| m.version);
    // Not checked at build time: the migrator makes this table, no migration does.
    let found: Result<Option<i64>, _> =
        sqlx::query_scalar("select max(version) from authz._sqlx_migrations where success")
            .fetch_one(pool)
            .await;
    match found.map_err(Error::from) {
        Err(Error::NotMigrated(_)) | Ok(None) => Ok(SchemaState::Missing),
        Err(error) => Err(error),
        Ok(Some(found)) if found < known => Ok(SchemaState::Behind { found, wanted: known }),
        Ok(Some(found)) if found > known => Ok(SchemaState::Ahead { found, known }),
        Ok(Some(found)) => Ok(SchemaState::Current(found)),
    }
}

/// A text that changes with the migrations: a name for a prepared database of exactly this schema.
#[must_use]
pub fn schema_fingerprint() -> String {
    let last = MIGRATOR.iter().last().map_or(0, |m| m.version);
    // FNV-1a over the checksums: a name, not a security measure.
    let hash =
        MIGRATOR.iter().flat_map(|m| m.checksum.iter()).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("authz_{last}_{hash:016x}")
}
