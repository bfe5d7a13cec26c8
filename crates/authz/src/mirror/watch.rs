//! A watch on the session that plans and applies. The server keeps it, so that it goes on where this process does not.

use chrono::{DateTime, Utc};
use sqlx::{PgPool, Postgres, Transaction};

use super::LEASE_TTL;
use super::beside::Beside;
use crate::begin::begin_alone;
use crate::error::Error;

/// A session that is to watch another one.
pub(super) struct Watcher(Transaction<'static, Postgres>);

/// Ends a session that waits for us in the middle of a `COPY`, or of an answer, for as long as a lease lasts. It is over with the
/// transaction that is watched. A run that copies nothing in its plan or apply has none: its answers there are short.
pub(super) struct Watch {
    _beside: Beside<()>,
}

/// The transaction that is watched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Watched {
    pub(super) backend: i32,
    pub(super) began: DateTime<Utc>,
}

/// Sessions of a pool that a run needs where one is watched: that one, one that watches, and one that interrupts.
const SESSIONS: u32 = 3;

impl Watcher {
    /// Whether a session of this pool can be watched from another one.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub(super) async fn is_possible(pool: &PgPool) -> Result<bool, Error> {
        if pool.options().get_max_connections() < SESSIONS {
            return Ok(false);
        }
        let is_possible = sqlx::query_scalar!(
            r#"
            select has_schema_privilege(session_user, 'authz', 'usage')
               and has_function_privilege(session_user, 'authz.watch_session(integer, timestamptz, interval)', 'execute')
               and current_setting('track_activities')::boolean as "is_possible!"
            "#
        )
        .fetch_one(pool)
        .await?;
        if !is_possible {
            tracing::warn!(
                "a session that copies could not be watched, so all members are staged: the role may not execute \
                 `authz.watch_session` (deploy/sql/roles.sql grants it), or `track_activities` is off"
            );
        }
        Ok(is_possible)
    }

    /// Takes a session for it. To be done before the one that will hold locks is.
    ///
    /// # Errors
    /// [`Error::Database`] if there is none.
    pub(super) async fn take(pool: &PgPool) -> Result<Self, Error> {
        // The server notices that nobody waits for it any more only when it is done: nobody else gets this session.
        let mut tx = begin_alone(pool).await?;
        // A role sees sessions by the role that they logged in as.
        sqlx::query!(
            r#"
            select set_config('statement_timeout', '0', true) as "timeout!", set_config('role', 'none', true) as "role!",
                   set_config('idle_in_transaction_session_timeout', '0', true) as "idle!"
            "#
        )
        .fetch_one(&mut *tx)
        .await?;
        Ok(Self(tx))
    }

    /// Begins.
    pub(super) fn watch(self, Watched { backend, began }: Watched) -> Watch {
        let Self(mut tx) = self;
        let watching = async move {
            let watched = sqlx::query_scalar!(
                r#"select authz.watch_session($1, $2, make_interval(secs => $3)) as "ended!""#,
                backend,
                began,
                LEASE_TTL.as_secs_f64(),
            )
            .fetch_one(&mut *tx)
            .await;
            match watched {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(backend, "nothing was heard of this process, so its session was ended");
                }
                Err(error) => {
                    tracing::warn!(%error, "the session that copies is not watched: paused, it would keep its locks");
                }
            }
            Ok(())
        };
        Watch { _beside: Beside::begin(watching) }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
