//! What a service holds on to: the pool, and the questions that it asks on every request.

use std::time::Duration;

use sqlx::PgPool;

use crate::decision::Decision;
use crate::directory;
use crate::error::Error;
use crate::explain::Explanation;
use crate::list::Page;
use crate::name::{ActionName, UserKey, UserName};
use crate::permit::{Action, Named, On, Permit, Question, Refusal};

/// A handle on the permissions in one Postgres; cheap to clone.
///
/// The free functions of this crate take any executor, a transaction of the caller's own for example; the
/// methods here ask on the pool.
#[derive(Debug, Clone)]
pub struct Authz {
    pool: PgPool,
    max_directory_age: Option<Duration>,
}

impl Authz {
    /// On a pool whose database has the tables (see [`migrate`](crate::migrate())).
    #[must_use]
    pub const fn new(pool: PgPool) -> Self {
        Self { pool, max_directory_age: None }
    }

    /// Demands of each answer that every directory was synced completely within `max` before it: otherwise the
    /// answer is [`Error::DirectoryStale`]. Costs a round trip more; see [`directory::require_fresh`].
    #[must_use]
    pub const fn max_directory_age(mut self, max: Duration) -> Self {
        self.max_directory_age = Some(max);
        self
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
    pub async fn check<'u>(
        &self,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Result<Decision, Error> {
        let user = user.into();
        self.require_fresh_directories().await?;
        crate::check(&self.pool, user, action).await
    }

    /// Answers many questions in one round trip; see [`check_many`](crate::check_many()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn check_many(&self, questions: &[(UserName, ActionName)]) -> Result<Vec<Decision>, Error> {
        self.require_fresh_directories().await?;
        crate::check_many(&self.pool, questions).await
    }

    /// Why `user` may or may not do `action`; see [`explain`](crate::explain()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn explain<'u>(
        &self,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Result<Explanation, Error> {
        crate::explain(&self.pool, user, action).await
    }

    /// What `user` may do now; see [`actions_of`](crate::actions_of()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn actions_of<'u>(&self, user: impl Into<UserKey<'u>>) -> Result<Vec<ActionName>, Error> {
        let user = user.into();
        self.require_fresh_directories().await?;
        crate::actions_of(&self.pool, user).await
    }

    /// Who may do `action` now, page by page; see [`users_who_can`](crate::users_who_can()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn users_who_can(
        &self,
        action: &ActionName,
        after: Option<&UserName>,
        limit: u32,
    ) -> Result<Page, Error> {
        self.require_fresh_directories().await?;
        crate::users_who_can(&self.pool, action, after, limit).await
    }

    /// A permit for `A`, if `user` may do it now; see [`authorize`](crate::authorize()).
    ///
    /// # Errors
    /// [`Refusal::Denied`] if the user may not, [`Refusal::Undecided`] if the database does not answer.
    pub async fn authorize<A: Action>(&self, user: &UserName) -> Result<Permit<A>, Refusal> {
        self.permit(Question::about(), user).await
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
        self.permit(Question::on(resource)?, user).await
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
        self.permit(Question::named(action), user).await
    }

    /// Asks for a permit, as fresh as was demanded.
    pub(crate) async fn permit<A>(
        &self,
        question: Question<A>,
        user: &UserName,
    ) -> Result<Permit<A>, Refusal> {
        self.require_fresh_directories().await?;
        question.ask(&self.pool, user).await
    }

    async fn require_fresh_directories(&self) -> Result<(), Error> {
        match self.max_directory_age {
            Some(max) => directory::require_fresh(&self.pool, max).await,
            None => Ok(()),
        }
    }
}
