//! What a service holds on to: the pool, and the questions that it asks on every request.

use sqlx::PgPool;

use crate::decision::Decision;
use crate::error::Error;
use crate::explain::Explanation;
use crate::name::{ActionName, UserName};
use crate::permit::{Action, Named, On, Permit, Refusal};

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

    /// A permit for `A`, if `user` may do it now; see [`authorize`](crate::authorize()).
    ///
    /// # Errors
    /// [`Refusal::Denied`] if the user may not, [`Refusal::Undecided`] if the database does not answer.
    pub async fn authorize<A: Action>(&self, user: &UserName) -> Result<Permit<A>, Refusal> {
        crate::authorize(&self.pool, user).await
    }

    /// A permit for `A` on one resource; see [`authorize_on`](crate::authorize_on()).
    ///
    /// # Errors
    /// As [`authorize`](Self::authorize), and [`Refusal::NotAResource`].
    pub async fn authorize_on<A: Action>(
        &self,
        user: &UserName,
        resource: &str,
    ) -> Result<Permit<On<A>>, Refusal> {
        crate::authorize_on(&self.pool, user, resource).await
    }

    /// A permit for an action whose name is only known at run time; see [`authorize_named`](crate::authorize_named()).
    ///
    /// # Errors
    /// As [`authorize`](Self::authorize).
    pub async fn authorize_named(
        &self,
        user: &UserName,
        action: &ActionName,
    ) -> Result<Permit<Named>, Refusal> {
        crate::authorize_named(&self.pool, user, action).await
    }
}
