//! What a service holds on to: the pool, and the questions that it asks on every request.

use sqlx::PgPool;

use crate::decision::Decision;
use crate::error::Error;
use crate::explain::Explanation;
use crate::name::{ActionName, UserName};

/// A handle on the permissions in one Postgres; cheap to clone.
///
/// The free functions of this crate take any executor, a transaction of the caller's own for example; the
/// methods here ask on the pool.
#[derive(Debug, Clone)]
pub struct Authz {
    pool: PgPool,
}

impl Authz {
    /// On a pool whose database has the tables (see [`migrate`](crate::migrate())).
    #[must_use]
    pub const fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// The pool.
    #[must_use]
    pub const fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Whether `user` may do `action` now; see [`check`](crate::check()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer: neither an allow nor a deny.
    pub async fn check(&self, user: &UserName, action: &ActionName) -> Result<Decision, Error> {
        crate::check(&self.pool, user, action).await
    }

    /// Why `user` may or may not do `action`; see [`explain`](crate::explain()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn explain(&self, user: &UserName, action: &ActionName) -> Result<Explanation, Error> {
        crate::explain(&self.pool, user, action).await
    }
}
