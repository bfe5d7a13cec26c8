//! Operations: what a service does on a user's behalf, authorised, recorded and run.
//!
//! ```
//! use authz::audit::operation::OperationError;
//! use authz::{Authz, UserName};
//!
//! authz::actions! {
//!     pub const ACTIONS;
//!     /// Set a role's number of workers.
//!     pub WorkersScale = "workers.scale";
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use authz::{ActionPattern, audit::Actor, grant::{self, Grant}};
//! # let database = testdb::Database::empty().await?;
//! # let pool = sqlx::PgPool::connect(database.url()).await?;
//! # authz::migrate(&pool).await?;
//! # let me = Actor::new("ops-dashboard", "ops-dashboard");
//! # let ada = UserName::parse("ada@example.com")?;
//! # authz::action::register(&pool, ACTIONS, &me).await?;
//! # authz::user::create(&pool, &ada, "Ada", &me).await?;
//! # grant::to_user(&pool, &ada, &Grant::new(ActionPattern::parse("workers.*")?, ""), &me).await?;
//! # sqlx::raw_sql("create table roles (role_name text, workers int)").execute(&pool).await?;
//! # async fn call_the_scheduler(workers: u32) -> Result<u32, std::io::Error> { Ok(workers) }
//! let authz = Authz::new(pool).service("ops-dashboard");
//!
//! // An effect outside the database: `started` is durable before it begins, its end is recorded after it.
//! let scaled = authz
//!     .operation::<WorkersScale>(&ada)
//!     .target("role web")
//!     .detail(serde_json::json!({ "workers": 4 }))
//!     .request("req-1")
//!     .run(|_permit| call_the_scheduler(4))
//!     .await;
//! match scaled {
//!     Ok(workers) => println!("{workers} workers"),
//!     Err(OperationError::Refused(refusal)) => println!("not done: {refusal}"),
//!     Err(OperationError::Failed(error)) => println!("tried: {error}"),
//!     Err(error) => return Err(error.into()),
//! }
//!
//! // A change of the database: permission, change and record in one transaction.
//! authz
//!     .operation::<WorkersScale>(&ada)
//!     .target("role web")
//!     .transact(async |_permit, connection| {
//!         sqlx::query("insert into roles values ('web', 4)").execute(connection).await
//!     })
//!     .await?;
//! # authz.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What the trail holds
//! - `denied`, with the reason, if the user may not. It is written on a connection of its own, so no rollback of the
//!   caller's takes it back.
//! - [`run`](Operation::run): `started`, durable before the work begins (if it cannot be written, nothing is run), then
//!   `succeeded`, or `failed` with the error's text. A panic or a dropped future is `abandoned`; so is, when a
//!   [sweep](super::sweep) finds it, an operation whose process was killed. The end names the `started` record in
//!   [`Entry::operation_id`](super::Entry::operation_id).
//! - [`transact`](Operation::transact): `succeeded`, committed with the change; or `failed`, after the rollback. Of a
//!   process that is killed before the commit there is no record, since nothing has happened.
//!
//! The number of commits is the change's own, plus two (`run`) or none (`transact`). Records of other callers that wait
//! at the same time share them.

mod change;
mod running;

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;

use serde_json::{Value, json};
use sqlx::PgConnection;

pub use change::Change;
pub use running::Running;

use super::line::{self, Line, Redact};
use super::{Outcome, Writer};
use crate::decision::{Decision, Verdict};
use crate::error::Error;
use crate::name::{Principal, UserKey};
use crate::permit::{Permit, Question, Refusal};
use crate::service::Authz;

/// Something that a service is to do for a user: made by [`Authz::operation`] and its kin; see the [module](self).
#[must_use = "nothing is done before `run`, `transact`, `start` or `begin`"]
pub struct Operation<'a, A> {
    authz: &'a Authz,
    asked: Asked<A>,
    user: Principal,
    target: Option<String>,
    detail: Value,
    request_id: Option<String>,
}

enum Asked<A> {
    Question(Question<A>),
    Permit(Arc<Permit<A>>),
    Refused(Box<Refusal>),
}

/// Why an operation did not come to a good end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperationError<E> {
    /// It was not begun.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It was begun and failed, which is recorded.
    #[error("{0}")]
    Failed(E),
    /// The transaction was rolled back when it was to be committed.
    #[error("the change was rolled back, since it could not be recorded or committed")]
    RolledBack(#[source] Error),
    /// The connection was lost during the commit, and the database does not tell what became of it. If the change is
    /// there, so is its record. Or the work ended the transaction by SQL of its own: that is recorded as failed.
    #[error("whether the change was committed is not known; look for its record in the audit trail")]
    Unknown(#[source] Error),
}

impl<'a, A> Operation<'a, A> {
    pub(crate) fn ask(authz: &'a Authz, user: UserKey<'_>, question: Result<Question<A>, Refusal>) -> Self {
        let (asked, target) = match question {
            Ok(question) => {
                let target = question.resource().map(str::to_owned);
                (Asked::Question(question), target)
            }
            Err(refusal) => (Asked::Refused(Box::new(refusal)), None),
        };
        Self { authz, asked, user: user.into(), target, detail: json!({}), request_id: None }
    }

    pub(crate) fn permitted(authz: &'a Authz, permit: Arc<Permit<A>>) -> Self {
        let (user, target) = (permit.user().clone().into(), permit.on().map(str::to_owned));
        Self { authz, asked: Asked::Permit(permit), user, target, detail: json!({}), request_id: None }
    }

    /// What it is done to; the resource, unless set.
    pub fn target(mut self, target: impl Into<String>) -> Self {
        self.target = Some(target.into());
        self
    }

    /// Whatever else a reader of the trail will want to know; at most [`DETAIL_LIMIT`](super::DETAIL_LIMIT) bytes as JSON.
    pub fn detail(mut self, detail: Value) -> Self {
        self.detail = detail;
        self
    }

    /// The request that it is part of, to be found again in other logs.
    pub fn request(mut self, id: impl Into<String>) -> Self {
        self.request_id = Some(id.into());
        self
    }

    /// Decides, records `started`, runs `work`, and records how it ended.
    ///
    /// Once `work` has ended, its result comes back whatever happens: an end that the database does not take within some
    /// seconds is written as soon as it does.
    ///
    /// # Errors
    /// [`OperationError::Refused`] if `work` was not run: the user may not, nobody could tell, or it could not be
    /// recorded. [`OperationError::Failed`] if `work` failed.
    pub async fn run<T, E, F>(self, work: impl FnOnce(Arc<Permit<A>>) -> F) -> Result<T, OperationError<E>>
    where
        E: Display,
        F: Future<Output = Result<T, E>>,
    {
        let (running, permit) = self.start().await?.split();
        match work(permit).await {
            Ok(done) => {
                running.succeed().await;
                Ok(done)
            }
            Err(error) => {
                running.fail(&error).await;
                Err(OperationError::Failed(error))
            }
        }
    }

    /// Decides and records `started`. What follows is up to the caller, who tells how it ended.
    ///
    /// # Errors
    /// A [`Refusal`]: it must not be run.
    pub async fn start(self) -> Result<Running<A>, Refusal> {
        let (authz, writer) = (self.authz, self.authz.writer());
        let record = self.record();
        let permit = match self.asked {
            Asked::Question(question) => authz.permit(question, (&self.user).into()).await.map(Arc::new),
            Asked::Permit(permit) => Ok(permit),
            Asked::Refused(refusal) => Err(*refusal),
        };
        let permit = match permit {
            Ok(permit) => permit,
            Err(refusal) => return Err(record.denied(&writer, refusal).await),
        };
        let line = record.line(Outcome::Started, &permit).map_err(Refusal::Unrecorded)?;
        let open = writer.open(line).await.map_err(Refusal::Unrecorded)?;
        Ok(Running::new(permit, open, record.redact))
    }

    /// Decides inside a new transaction, runs `work` in it, and commits the change together with its record.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`OperationError::RolledBack`] or [`OperationError::Unknown`] if the commit failed.
    pub async fn transact<T, E: Display>(
        self,
        work: impl AsyncFnOnce(&Permit<A>, &mut PgConnection) -> Result<T, E>,
    ) -> Result<T, OperationError<E>> {
        let mut change = self.begin().await?;
        let (permit, connection) = change.parts();
        match work(permit, connection).await {
            Ok(done) => match change.commit().await {
                Ok(_) => Ok(done),
                Err(OperationError::RolledBack(error)) => Err(OperationError::RolledBack(error)),
                Err(OperationError::Unknown(error)) => Err(OperationError::Unknown(error)),
                Err(OperationError::Refused(refusal)) => Err(OperationError::Refused(refusal)),
                Err(OperationError::Failed(never)) => match never {},
            },
            Err(error) => {
                change.fail(&error).await;
                Err(OperationError::Failed(error))
            }
        }
    }

    /// Begins a transaction and decides in it. What follows is up to the caller, who commits.
    ///
    /// # Errors
    /// A [`Refusal`]: there is no transaction.
    pub async fn begin(self) -> Result<Change<A>, Refusal> {
        let (authz, writer) = (self.authz, self.authz.writer());
        let record = self.record();
        let (mut tx, transaction_id) = change::begin(authz).await?;
        let permit = match self.asked {
            Asked::Question(question) => {
                authz.permit_on(question, &mut tx, (&self.user).into()).await.map(Arc::new)
            }
            Asked::Permit(permit) => Ok(permit),
            Asked::Refused(refusal) => Err(*refusal),
        };
        match permit {
            Ok(permit) => {
                // Nothing is begun that could not be recorded.
                record.check().map_err(Refusal::Unrecorded)?;
                change::act_as(&mut tx, &permit, &record).await?;
                Ok(Change::new(tx, transaction_id, permit, record, authz.pool().clone(), writer))
            }
            Err(refusal) => {
                // Given back first: who waits for the record must not hold what others wait for.
                drop(tx);
                Err(record.denied(&writer, refusal).await)
            }
        }
    }

    fn record(&self) -> Template {
        Template {
            service: self.authz.service_name().map(str::to_owned),
            user: self.user.clone(),
            target: self.target.clone(),
            detail: self.detail.clone(),
            request_id: self.request_id.clone(),
            redact: self.authz.redaction().cloned(),
        }
    }
}

/// What the records of one operation have in common.
struct Template {
    service: Option<String>,
    /// Who asked; of what was permitted, the permit says who.
    user: Principal,
    target: Option<String>,
    detail: Value,
    request_id: Option<String>,
    redact: Option<Redact>,
}

impl Template {
    /// A record of what a permit allowed.
    fn line<A>(&self, outcome: Outcome, permit: &Permit<A>) -> Result<Line, Error> {
        let revision = permit.revision();
        let decision = match permit.decision() {
            Some(decision) => line::json_text(&decision)?,
            None => line::json_text(&Verdict::Allow { revision })?,
        };
        let action = permit.action().as_str();
        Ok(Line {
            actor: permit.user().to_string(),
            decision: Some(decision),
            revision: Some(revision.0),
            ..self.undecided(action, outcome, self.detail.clone())?
        })
    }

    fn undecided(&self, action: &str, outcome: Outcome, detail: Value) -> Result<Line, Error> {
        let optional =
            |what, given: &Option<String>| given.as_deref().map(|text| line::text(what, text)).transpose();
        Ok(Line {
            service: optional("service", &self.service)?,
            actor: self.user.to_string(),
            action: line::text("action", action)?,
            outcome,
            target: optional("target", &self.target)?,
            detail: line::detail(&line::redacted(self.redact.as_ref(), action, detail))?,
            request_id: optional("request id", &self.request_id)?,
            decision: None,
            revision: None,
            operation_id: None,
        })
    }

    /// The record of a "no": shortened rather than refused, or whoever sends long texts could try unseen.
    // INVARIANT: a denial is recorded whatever the caller sends (held by the test `denial_is_recorded_however_long_its_texts_are`).
    fn denial(&self, action: &str, mut detail: Value, refusal: Option<String>) -> Result<Line, Error> {
        if let (Value::Object(object), Some(refusal)) = (&mut detail, refusal) {
            object.insert("refusal".to_owned(), json!(refusal));
        }
        let detail = line::redacted(self.redact.as_ref(), action, detail);
        let optional = |given: &Option<String>| given.as_deref().map(line::text_in_any_case);
        Ok(Line {
            service: optional(&self.service),
            actor: self.user.to_string(),
            action: line::text_in_any_case(action),
            outcome: Outcome::Denied,
            target: optional(&self.target),
            detail: line::detail_in_any_case(&detail)?,
            request_id: optional(&self.request_id),
            decision: None,
            revision: None,
            operation_id: None,
        })
    }

    /// Whether it can be recorded.
    fn check(&self) -> Result<(), Error> {
        self.undecided("", Outcome::Started, self.detail.clone()).map(|_| ())
    }

    /// Records a "no". What could not be decided is no "no".
    async fn denied(&self, writer: &Writer, refusal: Refusal) -> Refusal {
        let line = match &refusal {
            Refusal::Denied(denied) => {
                let decision = match &denied.deny {
                    Some(deny) => line::json_text(&Decision::Deny(deny.clone())),
                    None => {
                        line::json_text(&Verdict::Deny { reason: denied.reason, revision: denied.revision })
                    }
                };
                let line = self.denial(denied.action.as_str(), self.detail.clone(), None);
                decision.and_then(|decision| {
                    let actor = denied.user.to_string();
                    Ok(Line { actor, decision: Some(decision), revision: Some(denied.revision.0), ..line? })
                })
            }
            Refusal::NotAResource { action, .. } => {
                let text = line::shorten(&refusal.to_string(), line::TEXT_LIMIT);
                self.denial(action.as_str(), self.detail.clone(), Some(text))
            }
            _ => return refusal,
        };
        let recorded = match line {
            Ok(line) => writer.write(line).await,
            Err(error) => Err(error),
        };
        match recorded {
            Ok(_) => refusal,
            Err(error) => Refusal::Unrecorded(error),
        }
    }
}
