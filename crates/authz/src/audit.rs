//! The audit trail: who did what, why they might, and how it ended.
//!
//! Changes of grants and of memberships made by hand record themselves (by triggers, so that a change in
//! psql leaves its record too). What a service does on a user's behalf is an [`operation`], which decides,
//! records and runs. A record in a transaction of the caller's own is written with [`record`], one by itself with a
//! [`Writer`].

mod batch;
pub(crate) mod era;
pub mod history;
pub(crate) mod line;
mod link;
mod open;
pub mod operation;
pub mod query;
mod sweep;
mod writer;

pub(crate) mod canonical;
mod export;
mod reading;
pub mod retention;
mod seal;
mod silence;
mod verify;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, PgExecutor, Postgres};

pub use history::{Moment, could, who_could};
pub use line::{DETAIL_LIMIT, TEXT_LIMIT, redact_keys};
pub use query::Query;
pub use sweep::sweep;
pub use writer::Writer;

use line::Line;

use crate::begin::Begin;
use crate::decision::Decision;
use crate::error::Error;

pub use canonical::Digest;
pub use export::{Exported, export};
pub use seal::{Checkpoint, DEFAULT_INTERVAL, PublicKey, Sealed, Sealer, SigningKey, checkpoint, seal};
pub use verify::{Difference, Finding, Problem, Report, Trust, verify, verify_exports, verify_state};

/// On whose behalf a change is made, and by which service: what the audit trail will say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    name: String,
    service: String,
    request_id: Option<String>,
}

impl Actor {
    /// `name` is the person or job that acts, `service` the program it acts through.
    #[must_use]
    pub fn new(name: impl Into<String>, service: impl Into<String>) -> Self {
        Self { name: name.into(), service: service.into(), request_id: None }
    }

    /// The request that this is part of, to be found again in other logs.
    #[must_use]
    pub fn request(mut self, id: impl Into<String>) -> Self {
        self.request_id = Some(id.into());
        self
    }

    /// Who acts.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// How an operation went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Outcome {
    /// The user might not; nothing was done.
    Denied,
    /// Begun; a record of the end follows.
    Started,
    /// Done.
    Succeeded,
    /// Tried, and it did not work.
    Failed,
    /// Begun, and nobody knows how it ended.
    Abandoned,
}

impl Outcome {
    /// As the database holds it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Started => "started",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Abandoned => "abandoned",
        }
    }
}

impl std::str::FromStr for Outcome {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        [Self::Denied, Self::Started, Self::Succeeded, Self::Failed, Self::Abandoned]
            .into_iter()
            .find(|outcome| outcome.as_str() == text)
            .ok_or_else(|| Error::Unreadable { what: format!("the outcome `{text}`") })
    }
}

/// One record, before it is written.
#[derive(Debug, Clone)]
pub struct Record<'a> {
    action: &'a str,
    outcome: Outcome,
    target: Option<&'a str>,
    detail: serde_json::Value,
    decision: Option<&'a Decision>,
}

impl<'a> Record<'a> {
    /// What was done (an action's name as a rule), and how it went.
    #[must_use]
    pub fn new(action: &'a str, outcome: Outcome) -> Self {
        Self { action, outcome, target: None, detail: serde_json::json!({}), decision: None }
    }

    /// What it was done to.
    #[must_use]
    pub fn target(mut self, target: &'a str) -> Self {
        self.target = Some(target);
        self
    }

    /// Whatever else a reader will want to know; at most [`DETAIL_LIMIT`] bytes as JSON.
    #[must_use]
    pub fn detail(mut self, detail: serde_json::Value) -> Self {
        self.detail = detail;
        self
    }

    /// The decision that let it through or stopped it; its revision is recorded too.
    #[must_use]
    pub fn decision(mut self, decision: &'a Decision) -> Self {
        self.decision = Some(decision);
        self
    }
}

/// A record as it stands in the trail.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Entry {
    /// Its number. Numbers are given before commit, so they may become visible out of order.
    pub audit_id: i64,
    /// When it was written.
    pub recorded_at: DateTime<Utc>,
    /// Through which program.
    pub service: String,
    /// On whose behalf.
    pub actor: String,
    /// What was done.
    pub action: String,
    /// How it went.
    pub outcome: Outcome,
    /// To what.
    pub target: Option<String>,
    /// More about it. What is nested too deep for a [`Value`](serde_json::Value) to be read is here as a text.
    pub detail: serde_json::Value,
    /// The request that it was part of.
    pub request_id: Option<String>,
    /// The decision behind it, as [`Decision`] serialises.
    pub decision: Option<serde_json::Value>,
    /// The revision that it was decided on, or that it made.
    pub revision: Option<i64>,
    /// Of the end of an operation: the number of its `started` record.
    pub operation_id: Option<i64>,
    /// Whom the database saw, whatever the record says of itself.
    pub database_user: String,
}

/// A record as it comes from the database.
struct EntryRow {
    audit_id: i64,
    recorded_at: DateTime<Utc>,
    service: String,
    actor: String,
    action: String,
    outcome: String,
    target: Option<String>,
    detail: String,
    request_id: Option<String>,
    decision: Option<String>,
    revision: Option<i64>,
    operation_id: Option<i64>,
    database_user: String,
    transaction_id: String,
}

/// JSON that the trail holds. Postgres takes some that is not read here, such as what is nested very deep: one such record
/// must not stand in the way of all others.
// INVARIANT: whatever a record holds, the trail can be read (held by the test `record_that_is_nested_deep_is_read_with_the_others`).
fn json(text: String) -> serde_json::Value {
    serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text))
}

impl TryFrom<EntryRow> for Entry {
    type Error = Error;

    fn try_from(row: EntryRow) -> Result<Self, Error> {
        Ok(Self {
            audit_id: row.audit_id,
            recorded_at: row.recorded_at,
            service: row.service,
            actor: row.actor,
            action: row.action,
            outcome: row.outcome.parse()?,
            target: row.target,
            detail: json(row.detail),
            request_id: row.request_id,
            decision: row.decision.map(json),
            revision: row.revision,
            operation_id: row.operation_id,
            database_user: row.database_user,
        })
    }
}

/// Writes a record; with `&mut *transaction` it commits or rolls back with the change that it tells of.
/// Returns its number.
///
/// # Errors
/// [`Error::Database`] if it could not be written, [`Error::RecordTooLarge`]: then the operation must not go on.
pub async fn record(executor: impl PgExecutor<'_>, actor: &Actor, record: &Record<'_>) -> Result<i64, Error> {
    Ok(write(executor, &Line::of(actor, record)?).await?.audit_id)
}

/// What the database gave a record.
pub(crate) struct Written {
    pub(crate) audit_id: i64,
    /// The transaction, as text.
    pub(crate) transaction_id: String,
}

/// Writes one record on the caller's connection.
pub(crate) async fn write(executor: impl PgExecutor<'_>, line: &Line) -> Result<Written, Error> {
    insert(executor, line, None).await?.ok_or(Error::Database(sqlx::Error::RowNotFound))
}

/// The same if the connection's transaction is this one, as text; else nothing is written.
pub(crate) async fn write_within(
    connection: &mut PgConnection,
    line: &Line,
    transaction_id: &str,
) -> Result<Option<Written>, Error> {
    insert(connection, line, Some(transaction_id)).await
}

async fn insert(
    executor: impl PgExecutor<'_>,
    line: &Line,
    transaction_id: Option<&str>,
) -> Result<Option<Written>, Error> {
    let written = sqlx::query_as!(
        Written,
        r#"
        insert into authz.audit_log
            (service, actor, action, outcome, target, detail, request_id, decision, revision, operation_id)
        select coalesce($1, authz.current_service()), $2, $3, $4, $5, ($6::text)::jsonb, $7, ($8::text)::jsonb,
               coalesce($9, (select revision from authz.revision)), $10
        where $11::text is null or pg_current_xact_id() = ($11::text)::xid8
        returning audit_id, transaction_id::text as "transaction_id!"
        "#,
        line.service,
        line.actor,
        line.action,
        line.outcome.as_str(),
        line.target,
        line.detail,
        line.request_id,
        line.decision,
        line.revision,
        line.operation_id,
        transaction_id,
    )
    .fetch_optional(executor)
    .await?;
    Ok(written)
}

/// The newest records, newest first, at most `limit`: what is there at this moment, in no order to rely on (see
/// [`Query`]).
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn latest(executor: impl PgExecutor<'_>, limit: u32) -> Result<Vec<Entry>, Error> {
    let rows = sqlx::query_as!(
        EntryRow,
        r#"
        select audit_id, recorded_at, service, actor, action, outcome, target, detail::text as "detail!", request_id,
               decision::text, revision, operation_id, database_user, transaction_id::text as "transaction_id!"
        from authz.audit_log
        order by audit_id desc
        limit $1
        "#,
        i64::from(limit),
    )
    .fetch_all(executor)
    .await?;
    rows.into_iter().map(Entry::try_from).collect()
}

/// Says for the rest of the transaction who acts, for the records that triggers write.
pub(crate) async fn act_as(connection: &mut PgConnection, actor: &Actor) -> Result<(), Error> {
    sqlx::query!(
        r#"
        select set_config('authz.actor', $1, true) as "actor!", set_config('authz.service', $2, true) as "service!",
               set_config('authz.request_id', $3, true) as "request_id!"
        "#,
        actor.name,
        actor.service,
        actor.request_id.as_deref().unwrap_or_default(),
    )
    .fetch_one(connection)
    .await?;
    Ok(())
}

/// A transaction (or a savepoint in the caller's) in which `actor` makes changes.
pub(crate) async fn begin<'c>(
    connection: impl Begin<'c>,
    actor: &Actor,
) -> Result<sqlx::Transaction<'c, Postgres>, Error> {
    let mut tx = connection.begin_whole().await?;
    act_as(&mut tx, actor).await?;
    Ok(tx)
}

/// The same for a change of what is looked up by a name: nobody else's comes between the look and the change.
// INVARIANT: who is found by a name is still there when the change is made (held by the tests in `tests/named.rs`).
pub(crate) async fn begin_in_turn<'c>(
    connection: impl Begin<'c>,
    actor: &Actor,
) -> Result<sqlx::Transaction<'c, Postgres>, Error> {
    let mut tx = begin(connection, actor).await?;
    sqlx::query!("select authz.hold_revision()").fetch_one(&mut *tx).await?;
    Ok(tx)
}
