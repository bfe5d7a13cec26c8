//! An operation that is a change of the database: permission, change and record in one transaction.

use std::convert::Infallible;
use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, PgPool, Postgres, Transaction};
use tokio::sync::oneshot;

use super::{OperationError, Template};
use crate::audit::line::{self, Line, failure, redacted};
use crate::audit::writer::Answer;
use crate::audit::{self, Actor, Outcome, Writer};
use crate::error::Error;
use crate::lent;
use crate::permit::{Permit, Refusal};
use crate::service::Authz;

/// For so long the database is asked what became of a commit whose answer got lost, and is waited for to roll back.
const PATIENCE: Duration = Duration::from_secs(10);

/// A transaction in which a user's right to change something was decided: made by
/// [`Operation::begin`](super::Operation::begin).
///
/// Dropped without [`commit`](Self::commit), it is rolled back and recorded as `failed`.
#[must_use = "a change that is dropped is rolled back"]
pub struct Change<A> {
    tx: Option<Transaction<'static, Postgres>>,
    /// Of the database's, as text.
    transaction_id: String,
    permit: Arc<Permit<A>>,
    record: Template,
    pool: PgPool,
    writer: Writer,
}

/// From here on triggers know who acts: the user whom the decision found.
pub(super) async fn act_as<A>(
    connection: &mut PgConnection,
    permit: &Permit<A>,
    record: &Template,
) -> Result<(), Refusal> {
    let mut actor = Actor::new(permit.user().as_str(), record.service.as_deref().unwrap_or_default());
    actor.request_id.clone_from(&record.request_id);
    Ok(audit::act_as(connection, &actor).await?)
}

/// A transaction whose commit is durable, and its number.
pub(super) async fn begin(authz: &Authz) -> Result<(Transaction<'static, Postgres>, String), Refusal> {
    let mut tx = crate::begin(authz.pool()).await.map_err(Error::from)?;
    let begun = sqlx::query!(
        r#"
        select case when current_setting('synchronous_commit') = 'off'
                    then set_config('synchronous_commit', 'on', true) end as setting,
               pg_current_xact_id()::text as "transaction_id!"
        "#
    )
    .fetch_one(&mut *tx)
    .await
    .map_err(Error::from)?;
    Ok((tx, begun.transaction_id))
}

impl<A> Change<A> {
    pub(super) fn new(
        tx: Transaction<'static, Postgres>,
        transaction_id: String,
        permit: Arc<Permit<A>>,
        record: Template,
        pool: PgPool,
        writer: Writer,
    ) -> Self {
        Self { tx: Some(tx), transaction_id, permit, record, pool, writer }
    }

    /// Proof that the user may do it, for the functions that demand one.
    pub fn permit(&self) -> &Permit<A> {
        &self.permit
    }

    /// The transaction's connection.
    ///
    /// # Panics
    /// Never.
    pub fn connection(&mut self) -> &mut PgConnection {
        self.parts().1
    }

    #[expect(clippy::expect_used, reason = "only what consumes the change takes its transaction out")]
    pub(super) fn parts(&mut self) -> (&Permit<A>, &mut PgConnection) {
        (&self.permit, self.tx.as_mut().expect("a change has its transaction until its end"))
    }

    /// Records that it is done, and commits that with the change. Returns the record's number.
    ///
    /// # Errors
    /// [`OperationError::RolledBack`]; [`OperationError::Unknown`] if the connection was lost and the database does not
    /// tell what became of the commit.
    pub async fn commit(mut self) -> Result<i64, OperationError<Infallible>> {
        // sqlx gives up all of a transaction where a step inside of it cannot begin, or is dropped while it begins.
        // INVARIANT: what was given up is not recorded as done (held by `step_that_was_given_up_takes_its_operation_along`).
        let written = match self.record.line(Outcome::Succeeded, &self.permit) {
            Ok(_) if !self.parts().1.is_in_transaction() => Err(given_up()),
            Ok(line) => {
                // Nor what a `commit` or `rollback` of the caller's ended, which nobody but the server knows of.
                let transaction_id = self.transaction_id.clone();
                match audit::write_within(self.parts().1, &line, &transaction_id).await {
                    Ok(None) => return Err(self.ended_by_itself().await),
                    Ok(Some(written)) => Ok(written),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        let written = match written {
            Ok(written) => written,
            Err(error) => {
                self.end("it could not be recorded as done", &Whole(&error)).await;
                return Err(OperationError::RolledBack(error));
            }
        };
        let Some(tx) = self.tx.take() else { return Err(OperationError::Unknown(gone())) };
        let Err(error) = tx.commit().await else { return Ok(written.audit_id) };
        match fate(&self.pool, &written.transaction_id).await.as_deref() {
            Some("committed") => Ok(written.audit_id),
            Some("aborted") => {
                let error = Error::from(error);
                self.tell("the commit failed", &Whole(&error)).await;
                Err(OperationError::RolledBack(error))
            }
            _ => Err(OperationError::Unknown(error.into())),
        }
    }

    /// The work has ended the transaction, who knows when: it is recorded as failed, whatever was done until then.
    async fn ended_by_itself<E>(&mut self) -> OperationError<E> {
        let (before, error) = (self.transaction_id.clone(), ended());
        self.end("it could not be recorded as done", &Whole(&error)).await;
        match fate(&self.pool, &before).await.as_deref() {
            Some("aborted") => OperationError::RolledBack(error),
            _ => OperationError::Unknown(error),
        }
    }

    /// Rolls back, and records that it was tried and did not work, and why: the error's text, its alternate form (`{:#}`).
    pub async fn fail(mut self, error: &impl Display) {
        self.end("", error).await;
    }

    async fn end(&mut self, what: &str, error: &impl Display) {
        // Handed over first, in case that nobody waits for the rollback.
        let told = self.hand_over(what, error);
        if let Some(tx) = self.tx.take() {
            // Whether or not the server hears of it, nothing is committed any more.
            // INVARIANT: a server that does not answer holds nobody up for ever, here or in its pool (held by the test
            // `change_that_fails_ends_though_the_database_is_silent`).
            let mut rollback = Box::pin(tx.rollback());
            if tokio::time::timeout(PATIENCE, &mut rollback).await.is_err() {
                lent::drop_silent(rollback);
            }
        }
        wait_for(told).await;
    }

    async fn tell(&mut self, what: &str, error: &impl Display) {
        wait_for(self.hand_over(what, error)).await;
    }

    fn hand_over(&self, what: &str, error: &impl Display) -> Option<oneshot::Receiver<Answer>> {
        let text = if what.is_empty() { format!("{error:#}") } else { format!("{what}: {error:#}") };
        Some(self.writer.end(self.failed(failure("error", &text))?))
    }

    /// The record of a failure: the operation's own detail with the error in it.
    fn failed(&self, failure: Value) -> Option<Line> {
        let Self { record, permit, .. } = self;
        let mut line = record.line(Outcome::Failed, permit).ok()?;
        let failure = redacted(record.redact.as_ref(), permit.action().as_str(), failure);
        let mut detail: Value = serde_json::from_str(&line.detail).unwrap_or_default();
        match (&mut detail, &failure) {
            (Value::Object(all), Value::Object(more)) => all.extend(more.clone()),
            _ => detail = failure.clone(),
        }
        // Both together may be too long; the failure by itself is not.
        line.detail = line::detail(&detail).or_else(|_| line::json_text(&failure)).ok()?;
        Some(line)
    }
}

impl<A> Drop for Change<A> {
    fn drop(&mut self) {
        if self.tx.take().is_some() {
            let reason = if std::thread::panicking() {
                "rolled back: the task that ran it panicked"
            } else {
                "rolled back: it was dropped before its commit"
            };
            if let Some(line) = self.failed(json!({ "error": reason })) {
                drop(self.writer.end(line));
            }
        }
    }
}

impl<A> fmt::Debug for Change<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change").field("permit", &self.permit).finish_non_exhaustive()
    }
}

async fn wait_for(told: Option<oneshot::Receiver<Answer>>) {
    if let Some(told) = told {
        let _ = tokio::time::timeout(PATIENCE, told).await;
    }
}

/// An error with all that caused it.
struct Whole<'e>(&'e Error);

impl Display for Whole<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let causes = std::iter::successors(Some(self.0 as &dyn std::error::Error), |error| error.source());
        for (depth, cause) in causes.enumerate() {
            let text = cause.to_string();
            write!(f, "{}{text}", if depth == 0 { "" } else { ": " })?;
        }
        Ok(())
    }
}

/// Why a transaction that somebody else ended is not called done.
fn ended() -> Error {
    let why = "the work ended the transaction by SQL of its own, a `commit` or `rollback`; what it did before that may be done";
    Error::Database(sqlx::Error::Protocol(why.to_owned()))
}

/// Why a transaction that is none any more is not committed.
fn given_up() -> Error {
    let why = "a step inside of the transaction was dropped or could not begin, which rolled all of it back";
    Error::Database(sqlx::Error::Protocol(why.to_owned()))
}

/// What became of a transaction, if the database tells in time.
async fn fate(pool: &PgPool, transaction_id: &str) -> Option<String> {
    let asking = async {
        loop {
            let status = sqlx::query_scalar!("select pg_xact_status(($1::text)::xid8)", transaction_id)
                .fetch_one(pool)
                .await;
            match status {
                Ok(Some(status)) if status != "in progress" => return Some(status),
                Ok(None) => return None,
                // Its connection may not know yet that we have gone, or the server is just coming up.
                Ok(Some(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.ok().flatten()
}

fn gone() -> Error {
    Error::Database(sqlx::Error::WorkerCrashed)
}
