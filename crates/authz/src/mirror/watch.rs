//! A watch on the session that plans and applies. The server keeps it, so that it goes on where this process does not.

use sqlx::PgPool;

use super::LEASE_TTL;
use super::beside::Beside;
use crate::begin::begin_alone;
use crate::error::Error;

/// Ends a session that waits for us in the middle of a `COPY` or of an answer for as long as a lease lasts. It is over with the
/// transaction that the session is in when it begins.
pub(super) struct Watch {
    _beside: Beside<()>,
}

/// Sessions of a pool that a run needs where one is watched: that one, and one that watches.
const SESSIONS: u32 = 2;

impl Watch {
    /// Whether the pool has room for it.
    pub(super) fn fits(pool: &PgPool) -> bool {
        pool.options().get_max_connections() >= SESSIONS
    }

    /// Begins.
    ///
    /// # Errors
    /// [`Error::Database`] if there is no session for it.
    pub(super) async fn begin(pool: &PgPool, backend: i32) -> Result<Self, Error> {
        // The server notices that nobody waits for it any more only when it is done: nobody else gets this session.
        let mut tx = begin_alone(pool).await?;
        sqlx::query!(r#"select set_config('statement_timeout', '0', true) as "timeout!""#)
            .fetch_one(&mut *tx)
            .await?;
        let watching = async move {
            let watched = sqlx::query_scalar!(
                r#"select authz.watch_session($1, make_interval(secs => $2)) as "ended!""#,
                backend,
                LEASE_TTL.as_secs_f64(),
            )
            .fetch_one(&mut *tx)
            .await;
            match watched {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(backend, "nothing was heard of this process, so its session was ended");
                }
                Err(error) => tracing::warn!(
                    %error,
                    "the session is not watched: should this process be paused in a copy, others wait for it"
                ),
            }
            Ok(())
        };
        Ok(Self { _beside: Beside::begin(watching) })
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
