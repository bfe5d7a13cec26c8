//! The one connection of a writer: made when it is needed, and made anew when it is lost.

use std::future::Future;
use std::time::Duration;

use sqlx::{Connection, PgConnection, PgPool};
use tokio::time::{Instant, timeout};

use super::{batch, era};

/// The database must answer within this time.
const PATIENCE: Duration = Duration::from_secs(20);
/// A connection that nobody has used for so long is asked first whether it is alive. A busy writer never waits for that.
const IDLE: Duration = Duration::from_secs(1);
/// It must say so within this time, which leaves some of the [`PATIENCE`] for a new one.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

pub(super) struct Link {
    pool: PgPool,
    connection: Option<PgConnection>,
    /// When the connection was last used.
    used: Instant,
}

impl Link {
    /// Of its own, with the options of the pool. Nothing is asked of the database yet.
    pub(super) fn new(pool: PgPool) -> Self {
        Self { pool, connection: None, used: Instant::now() }
    }

    /// Works on the connection, made if need be. One on which anything but a refusal happened is closed.
    pub(super) async fn work<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut connection = match self.connection.take() {
            Some(connection) if self.used.elapsed() < IDLE => connection,
            idle => within(living(&self.pool, idle)).await?,
        };
        let done = within(work(&mut connection)).await;
        match &done {
            Err(error) if !is_refusal(error) => {}
            _ => self.connection = Some(connection),
        }
        self.used = Instant::now();
        done
    }

    pub(super) async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = timeout(PATIENCE, connection.close()).await;
        }
    }
}

/// `idle` if it is alive, or a new one.
///
/// INVARIANT: only here a lost connection is replaced in silence, before anything of the work was sent, so that nothing is
/// written twice (held by the tests `record_is_written_though_the_connection_of_the_writer_fell_silent` and
/// `end_is_recorded_once_although_the_connection_was_lost`).
async fn living(pool: &PgPool, idle: Option<PgConnection>) -> Result<PgConnection, sqlx::Error> {
    if let Some(mut idle) = idle
        && let Ok(Ok(())) = timeout(SIGN_OF_LIFE, idle.ping()).await
    {
        return Ok(idle);
    }
    let mut connection = PgConnection::connect_with(&pool.connect_options()).await?;
    batch::prepare(&mut connection).await?;
    era::note(&mut connection).await?;
    Ok(connection)
}

/// A server that takes no notice must not hold all callers for ever.
async fn within<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_| Err(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())))
}

/// Whether the server has answered that the statement did nothing. Class 57 (a shutdown, a cancelled wait for a
/// standby) leaves that open, 08 is the connection's own.
pub(super) fn is_refusal(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| !code.starts_with("57") && !code.starts_with("08"))
}

/// Whether it is the record that the database does not take: class 22 data, 23 constraints.
pub(super) fn is_unacceptable(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| code.starts_with("22") || code.starts_with("23"))
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(std::borrow::Cow::into_owned)
}
