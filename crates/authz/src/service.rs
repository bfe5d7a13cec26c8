//! What a service holds on to: the pool, and the questions that it asks on every request.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use serde_json::Value;
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};

use crate::audit::Writer;
use crate::audit::line::Redact;
use crate::audit::operation::Operation;
use crate::decision::Decision;
use crate::directory;
use crate::error::Error;
use crate::explain::Explanation;
use crate::list::Page;
use crate::name::{ActionName, Sub, UserKey, UserName};
use crate::permit::{Action, Named, On, Permit, Question, Refusal};

/// A handle on the permissions in one Postgres; cheap to clone.
///
/// The free functions of this crate take any executor, a transaction of the caller's own for example; the
/// methods here ask on the pool.
#[derive(Clone)]
pub struct Authz {
    pool: PgPool,
    max_directory_age: Option<Duration>,
    service: Option<Arc<str>>,
    redact: Option<Redact>,
    recording: Arc<Mutex<Recording>>,
}

#[derive(Default)]
struct Recording {
    /// Started by the first operation.
    writer: Option<Writer>,
    /// Of the writers before it that a shutdown took.
    ending: Option<Shared<BoxFuture<'static, ()>>>,
}

impl fmt::Debug for Authz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authz")
            .field("pool", &self.pool)
            .field("max_directory_age", &self.max_directory_age)
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}

impl Authz {
    /// On a pool whose database has the tables (see [`migrate`](crate::migrate())).
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self { pool, max_directory_age: None, service: None, redact: None, recording: Arc::default() }
    }

    /// The name of this program in the audit records of its operations; the connection's application name unless set.
    #[must_use]
    pub fn service(mut self, name: &str) -> Self {
        self.service = Some(name.into());
        self
    }

    /// A hook that takes secrets out of the detail of each operation, and out of the text of its error (key `error`), before
    /// they are recorded: it gets the action's name and the detail. For example [`redact_keys`](crate::audit::redact_keys).
    #[must_use]
    pub fn redact(mut self, hook: impl Fn(&str, &mut Value) + Send + Sync + 'static) -> Self {
        self.redact = Some(Arc::new(hook));
        self
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
        let mut connection = self.fresh_connection().await?;
        crate::check(&mut *connection, user, action).await
    }

    /// Answers many questions in one round trip; see [`check_many`](crate::check_many()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn check_many(&self, questions: &[(UserName, ActionName)]) -> Result<Vec<Decision>, Error> {
        let mut connection = self.fresh_connection().await?;
        crate::check_many(&mut *connection, questions).await
    }

    /// The same by the `sub` of logins; see [`check_many_by_sub`](crate::check_many_by_sub()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn check_many_by_sub(&self, questions: &[(Sub, ActionName)]) -> Result<Vec<Decision>, Error> {
        let mut connection = self.fresh_connection().await?;
        crate::check_many_by_sub(&mut *connection, questions).await
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
        let user = user.into();
        let mut connection = self.fresh_connection().await?;
        crate::explain(&mut *connection, user, action).await
    }

    /// What `user` may do now; see [`actions_of`](crate::actions_of()).
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn actions_of<'u>(&self, user: impl Into<UserKey<'u>>) -> Result<Vec<ActionName>, Error> {
        let user = user.into();
        let mut connection = self.fresh_connection().await?;
        crate::actions_of(&mut *connection, user).await
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
        let mut connection = self.fresh_connection().await?;
        crate::users_who_can(&mut *connection, action, after, limit).await
    }

    /// A permit for `A`, if `user` may do it now; see [`authorize`](crate::authorize()).
    ///
    /// # Errors
    /// [`Refusal::Denied`] if the user may not, [`Refusal::Undecided`] if the database does not answer.
    pub async fn authorize<'u, A: Action>(&self, user: impl Into<UserKey<'u>>) -> Result<Permit<A>, Refusal> {
        self.permit(Question::about(), user.into()).await
    }

    /// A permit for `A` on one resource; see [`authorize_on`](crate::authorize_on()).
    ///
    /// # Errors
    /// As [`authorize`](Self::authorize), and [`Refusal::NotAResource`].
    pub async fn authorize_on<'u, A: Action>(
        &self,
        user: impl Into<UserKey<'u>>,
        resource: &str,
    ) -> Result<Permit<On<A>>, Refusal> {
        self.permit(Question::on(resource)?, user.into()).await
    }

    /// A permit for an action whose name is only known at run time; see [`authorize_named`](crate::authorize_named()).
    ///
    /// # Errors
    /// As [`authorize`](Self::authorize).
    pub async fn authorize_named<'u>(
        &self,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Result<Permit<Named>, Refusal> {
        self.permit(Question::named(action), user.into()).await
    }

    /// Something to be done for `user`: decided, recorded and run; see [`audit::operation`](crate::audit::operation).
    pub fn operation<'u, A: Action>(&self, user: impl Into<UserKey<'u>>) -> Operation<'_, A> {
        Operation::ask(self, user.into(), Ok(Question::about()))
    }

    /// The same on one resource.
    pub fn operation_on<'u, A: Action>(
        &self,
        user: impl Into<UserKey<'u>>,
        resource: &str,
    ) -> Operation<'_, On<A>> {
        Operation::ask(self, user.into(), Question::on(resource))
    }

    /// The same where the action's name is only known at run time.
    pub fn operation_named<'u>(
        &self,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Operation<'_, Named> {
        Operation::ask(self, user.into(), Ok(Question::named(action)))
    }

    /// The same where it was decided already, by a snapshot for example, or by a web layer, whose permit is shared. It says
    /// what was true when it was given, so it is for the work at hand and not to be kept.
    pub fn operation_permitted<A>(&self, permit: impl Into<Arc<Permit<A>>>) -> Operation<'_, A> {
        Operation::permitted(self, permit.into())
    }

    /// Waits until the operations that run have ended and are recorded, and gives back the connection that records them.
    /// Call it when the service ends; operations that begin later start anew. Called again, also after a timeout, it waits for
    /// the same.
    pub async fn shutdown(&self) {
        // INVARIANT: nobody is told that all is recorded before it is (held by the test `each_shutdown_waits_for_what_runs`).
        let ending = {
            let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(writer) = recording.writer.take() {
                let before = recording.ending.take();
                let closing = async move {
                    writer.close().await;
                    if let Some(before) = before {
                        before.await;
                    }
                };
                recording.ending = Some(closing.boxed().shared());
            }
            recording.ending.clone()
        };
        if let Some(ending) = ending {
            ending.await;
        }
    }

    /// The writer of the records of operations, started if need be.
    pub(crate) fn writer(&self) -> Writer {
        let writer = &mut self.recording.lock().unwrap_or_else(PoisonError::into_inner).writer;
        match &*writer {
            Some(writer) if !writer.is_closed() => writer.clone(),
            // None yet, or its runtime has ended.
            _ => writer.insert(Writer::start(self.pool.clone())).clone(),
        }
    }

    pub(crate) fn service_name(&self) -> Option<&str> {
        self.service.as_deref()
    }

    pub(crate) const fn redaction(&self) -> Option<&Redact> {
        self.redact.as_ref()
    }

    /// Asks inside a transaction.
    pub(crate) async fn permit_on<A>(
        &self,
        question: Question<A>,
        connection: &mut PgConnection,
        user: UserKey<'_>,
    ) -> Result<Permit<A>, Refusal> {
        if let Some(max) = self.max_directory_age {
            directory::require_fresh(&mut *connection, max).await?;
        }
        question.ask(connection, user).await
    }

    /// Asks for a permit, as fresh as was demanded.
    pub(crate) async fn permit<A>(
        &self,
        question: Question<A>,
        user: UserKey<'_>,
    ) -> Result<Permit<A>, Refusal> {
        let mut connection = self.fresh_connection().await?;
        question.ask(&mut *connection, user).await
    }

    /// A connection whose database has directories as fresh as was demanded, for the question: another connection of the
    /// pool may lead to another standby.
    async fn fresh_connection(&self) -> Result<PoolConnection<Postgres>, Error> {
        let mut connection = self.pool.acquire().await?;
        if let Some(max) = self.max_directory_age {
            directory::require_fresh(&mut *connection, max).await?;
        }
        Ok(connection)
    }
}
