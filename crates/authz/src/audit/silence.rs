//! What becomes of a job that holds others up when the database, or the job, falls silent.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::{Connection, PgConnection};

use crate::error::Error;

/// The server ends the session of a job that says nothing for so long between two statements.
const CLIENT_SILENCE: Duration = Duration::from_mins(1);
/// What touches no table is answered within this time.
pub(super) const ANSWER: Duration = Duration::from_secs(20);
/// The longest statement of a job, and the longest wait for its next row, take no longer: a hundred times what slow disks need.
pub(super) const WORK: Duration = Duration::from_mins(10);

/// At the head of a transaction that holds locks: they do not outlive us if we are paused, or our machine is gone without a word.
// INVARIANT: a job that is gone holds up neither other jobs nor whoever writes to the trail (held by the test
// `server_is_told_to_end_a_job_that_falls_silent`).
pub(super) async fn end_with_us(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "select set_config('idle_in_transaction_session_timeout', $1, true)",
        format!("{}ms", CLIENT_SILENCE.as_millis())
    )
    .fetch_one(&mut *tx)
    .await?;
    // In the middle of a statement and of its answer too, where the server can: not every system tells it of such a client.
    let mut attempt = tx.begin().await?;
    let noticing = sqlx::query!(
        r#"
        select set_config('client_connection_check_interval', '5s', true) as "check!",
               set_config('tcp_keepalives_idle', '10', true) as "idle!",
               set_config('tcp_keepalives_interval', '5', true) as "interval!",
               set_config('tcp_keepalives_count', '3', true) as "count!",
               set_config('tcp_user_timeout', $1, true) as "user!"
        "#,
        format!("{}ms", CLIENT_SILENCE.as_millis())
    )
    .fetch_one(&mut *attempt)
    .await;
    match noticing {
        Ok(_) => attempt.commit().await,
        Err(error) if error.as_database_error().is_some() => {
            attempt.rollback().await?;
            tracing::debug!(%error, "the server will not notice our end before its statement is done");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Gives up in time. The connection is in doubt then.
pub(super) async fn within<T>(
    patience: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(patience, work).await.unwrap_or_else(|_| Err(silent()))
}

/// The same for work that may take long: it is given up if it counts nothing for so long.
pub(super) async fn while_it_goes_on<T>(
    patience: Duration,
    steps: &AtomicU64,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut work = pin!(work);
    let mut before = steps.load(Ordering::Relaxed);
    loop {
        if let Ok(done) = tokio::time::timeout(patience, &mut work).await {
            return done;
        }
        let now = steps.load(Ordering::Relaxed);
        if now == before {
            return Err(silent());
        }
        before = now;
    }
}

fn silent() -> Error {
    Error::Database(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))
}
