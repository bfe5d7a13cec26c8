//! Reading the trail, page by page.
//!
//! ```no_run
//! use authz::ActionPattern;
//! use authz::audit::{Outcome, Query};
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), authz::Error> {
//! let denied = Query::new().action(ActionPattern::parse("workers.*")?).outcomes(&[Outcome::Denied]).newest_first();
//! let mut page = denied.page(&pool, None, 100).await?;
//! while !page.entries.is_empty() {
//!     for entry in &page.entries {
//!         println!("{} {} {}", entry.recorded_at, entry.actor, entry.action);
//!     }
//!     page = denied.page(&pool, Some(page.cursor), 100).await?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The order
//! Records come in the order of their transactions, and only once no earlier transaction can still write: what has been
//! read stays as it was, and nothing appears in front of it. So a record is seen when every transaction that was under
//! way as it was written has ended; a transaction that stays open for an hour holds the end of the trail back for an
//! hour. [`latest`](super::latest) shows what is there at once, in no order to rely on.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

use super::{Entry, EntryRow, Outcome};
use crate::begin::Begin;
use crate::error::Error;
use crate::name::ActionPattern;

/// At most so many records are on a page.
pub const PAGE_LIMIT: u32 = 10_000;

/// Which records of the trail, and in which order: the oldest first, unless changed.
#[derive(Debug, Clone, Default)]
#[must_use = "nothing is read before `page`"]
pub struct Query {
    actor: Option<String>,
    service: Option<String>,
    action: Option<ActionPattern>,
    target: Option<String>,
    outcomes: Option<Vec<Outcome>>,
    request_id: Option<String>,
    operation_id: Option<i64>,
    from: Option<DateTime<Utc>>,
    until: Option<DateTime<Utc>>,
    newest_first: bool,
}

/// A place between two records; as text it can be given to a client and taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cursor {
    era: i32,
    transaction_id: u64,
    audit_id: i64,
}

/// Some records, and where the next ones begin.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Page {
    /// In the order of the query, at most as many as asked for. Fewer if there are no more for now; later the same cursor
    /// may bring more, behind these.
    pub entries: Vec<Entry>,
    /// Where the next page begins.
    pub cursor: Cursor,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.era, self.transaction_id, self.audit_id)
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parsed = || {
            let mut parts = text.splitn(3, '-');
            let era = parts.next()?.parse().ok()?;
            let transaction_id = parts.next()?.parse().ok()?;
            Some(Self { era, transaction_id, audit_id: parts.next()?.parse().ok()? })
        };
        parsed().ok_or_else(|| Error::NotACursor { text: text.escape_debug().to_string() })
    }
}

impl TryFrom<String> for Cursor {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Cursor> for String {
    fn from(cursor: Cursor) -> Self {
        cursor.to_string()
    }
}

impl Query {
    /// All records.
    pub fn new() -> Self {
        Self::default()
    }

    /// On whose behalf.
    pub fn actor(mut self, name: impl Into<String>) -> Self {
        self.actor = Some(name.into());
        self
    }

    /// Through which program.
    pub fn service(mut self, name: impl Into<String>) -> Self {
        self.service = Some(name.into());
        self
    }

    /// What was done: an action, or all below a pattern such as `workers.*`.
    pub fn action(mut self, pattern: impl Into<ActionPattern>) -> Self {
        self.action = Some(pattern.into());
        self
    }

    /// To what.
    pub fn target(mut self, target: impl Into<String>) -> Self {
        self.target = Some(target.into());
        self
    }

    /// How it went: one of these.
    pub fn outcomes(mut self, outcomes: &[Outcome]) -> Self {
        self.outcomes = Some(outcomes.to_vec());
        self
    }

    /// As part of which request.
    pub fn request(mut self, id: impl Into<String>) -> Self {
        self.request_id = Some(id.into());
        self
    }

    /// Of which operation: its `started` record, by number, and its end.
    pub const fn operation(mut self, operation_id: i64) -> Self {
        self.operation_id = Some(operation_id);
        self
    }

    /// Written at this moment or later.
    pub const fn from(mut self, moment: DateTime<Utc>) -> Self {
        self.from = Some(moment);
        self
    }

    /// Written before this moment.
    pub const fn until(mut self, moment: DateTime<Utc>) -> Self {
        self.until = Some(moment);
        self
    }

    /// The newest first.
    pub const fn newest_first(mut self) -> Self {
        self.newest_first = true;
        self
    }

    /// The records after that place, from the beginning (or the end) if there is none; at most `limit` of them, and at
    /// most [`PAGE_LIMIT`]. A full page is the same whenever it is read again; only retention takes records away.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    // INVARIANT: what is below the horizon cannot be joined by anything later (held by the test
    // `page_once_read_never_changes_whatever_commits_when`).
    pub async fn page<'c>(
        &self,
        connection: impl Begin<'c>,
        after: Option<Cursor>,
        limit: u32,
    ) -> Result<Page, Error> {
        let mut tx = connection.begin_whole().await?;
        // Planned for these filters: one plan for all of them would go through the whole trail.
        let horizon = sqlx::query!(
            r#"
            select pg_snapshot_xmin(pg_current_snapshot())::text as "transaction_id!",
                   set_config('plan_cache_mode', 'force_custom_plan', true) as setting
            "#
        )
        .fetch_one(&mut *tx)
        .await?
        .transaction_id;
        let mut eras = sqlx::query_as!(
            Era,
            r#"
            select era, base_audit_id, coalesce(lead(base_audit_id) over (order by era), 9223372036854775807) as "top!",
                   lead(era) over (order by era) is null as "current!"
            from authz.audit_eras
            order by era
            "#
        )
        .fetch_all(&mut *tx)
        .await?;
        if self.newest_first {
            eras.reverse();
        }
        let limit = limit.min(PAGE_LIMIT) as usize;
        let mut cursor = after.unwrap_or(if self.newest_first { Cursor::END } else { Cursor::BEGINNING });
        let mut entries = Vec::new();
        for era in eras {
            let passed = if self.newest_first { era.era > cursor.era } else { era.era < cursor.era };
            if passed {
                continue;
            }
            let here = era.era == cursor.era;
            let edge = if self.newest_first { Cursor::END } else { Cursor::BEGINNING };
            let from = if here { cursor } else { Cursor { era: era.era, ..edge } };
            let (found, place) = self.within(&mut tx, &era, &horizon, from, limit - entries.len()).await?;
            // The place moves on to another era only where something follows in it.
            if here || !found.is_empty() {
                cursor = place;
            }
            entries.extend(found);
            if entries.len() >= limit {
                break;
            }
        }
        tx.rollback().await?;
        Ok(Page { entries, cursor })
    }

    /// Records of one era, and the place of the last one.
    async fn within(
        &self,
        connection: &mut PgConnection,
        era: &Era,
        horizon: &str,
        after: Cursor,
        limit: usize,
    ) -> Result<(Vec<Entry>, Cursor), Error> {
        // Whatever was written in another cluster has long ended.
        let horizon = if era.current { horizon } else { NEVER };
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = if self.newest_first {
            self.backward(connection, era, horizon, after, limit).await?
        } else {
            self.forward(connection, era, horizon, after, limit).await?
        };
        let place = rows.last().map_or(Ok(after), |row| {
            let transaction_id = row.transaction_id.parse().map_err(|_| Error::Unreadable {
                what: format!("the transaction `{}`", row.transaction_id),
            })?;
            Ok::<_, Error>(Cursor { era: era.era, transaction_id, audit_id: row.audit_id })
        })?;
        let entries = rows.into_iter().map(Entry::try_from).collect::<Result<_, _>>()?;
        Ok((entries, place))
    }

    async fn forward(
        &self,
        connection: &mut PgConnection,
        era: &Era,
        horizon: &str,
        after: Cursor,
        limit: i64,
    ) -> Result<Vec<EntryRow>, Error> {
        let (exact, below) = self.action_range();
        let rows = sqlx::query_as!(
            EntryRow,
            r#"
            select audit_id, recorded_at, service, actor, action, outcome, target, detail::text as "detail!", request_id,
                   decision::text, revision, operation_id, database_user, transaction_id::text as "transaction_id!"
            from authz.audit_log
            where audit_id > $1 and audit_id <= $2 and transaction_id < ($3::text)::xid8
              and (transaction_id, audit_id) > (($4::text)::xid8, $5::bigint)
              and ($6::text is null or actor = $6) and ($7::text is null or service = $7)
              and ($8::text is null or action collate "C" = $8)
              and ($9::text is null or action collate "C" >= $9 || '.' and action collate "C" < $9 || '/')
              and ($10::text is null or target = $10) and ($11::text[] is null or outcome = any ($11))
              and ($12::text is null or request_id = $12)
              and ($13::bigint is null or audit_id = $13 or operation_id = $13)
              and ($14::timestamptz is null or recorded_at >= $14) and ($15::timestamptz is null or recorded_at < $15)
            order by transaction_id, audit_id
            limit $16
            "#,
            era.base_audit_id,
            era.top,
            horizon,
            after.transaction_id.to_string(),
            after.audit_id,
            self.actor,
            self.service,
            exact,
            below,
            self.target,
            self.outcome_names() as Option<Vec<String>>,
            self.request_id,
            self.operation_id,
            self.from,
            self.until,
            limit,
        )
        .fetch_all(connection)
        .await?;
        Ok(rows)
    }

    async fn backward(
        &self,
        connection: &mut PgConnection,
        era: &Era,
        horizon: &str,
        before: Cursor,
        limit: i64,
    ) -> Result<Vec<EntryRow>, Error> {
        let (exact, below) = self.action_range();
        let rows = sqlx::query_as!(
            EntryRow,
            r#"
            select audit_id, recorded_at, service, actor, action, outcome, target, detail::text as "detail!", request_id,
                   decision::text, revision, operation_id, database_user, transaction_id::text as "transaction_id!"
            from authz.audit_log
            where audit_id > $1 and audit_id <= $2 and transaction_id < ($3::text)::xid8
              and (transaction_id, audit_id) < (($4::text)::xid8, $5::bigint)
              and ($6::text is null or actor = $6) and ($7::text is null or service = $7)
              and ($8::text is null or action collate "C" = $8)
              and ($9::text is null or action collate "C" >= $9 || '.' and action collate "C" < $9 || '/')
              and ($10::text is null or target = $10) and ($11::text[] is null or outcome = any ($11))
              and ($12::text is null or request_id = $12)
              and ($13::bigint is null or audit_id = $13 or operation_id = $13)
              and ($14::timestamptz is null or recorded_at >= $14) and ($15::timestamptz is null or recorded_at < $15)
            order by transaction_id desc, audit_id desc
            limit $16
            "#,
            era.base_audit_id,
            era.top,
            horizon,
            before.transaction_id.to_string(),
            before.audit_id,
            self.actor,
            self.service,
            exact,
            below,
            self.target,
            self.outcome_names() as Option<Vec<String>>,
            self.request_id,
            self.operation_id,
            self.from,
            self.until,
            limit,
        )
        .fetch_all(connection)
        .await?;
        Ok(rows)
    }

    /// The exact action that is asked for, or the stem of a pattern; neither for all.
    fn action_range(&self) -> (Option<&str>, Option<&str>) {
        match self.action.as_ref().map(ActionPattern::as_str) {
            None | Some("*") => (None, None),
            Some(pattern) => match pattern.strip_suffix(".*") {
                Some(stem) => (None, Some(stem)),
                None => (Some(pattern), None),
            },
        }
    }

    fn outcome_names(&self) -> Option<Vec<String>> {
        let outcomes = self.outcomes.as_ref()?;
        Some(outcomes.iter().map(|outcome| outcome.as_str().to_owned()).collect())
    }
}

/// Above every transaction.
const NEVER: &str = "18446744073709551615";

impl Cursor {
    const BEGINNING: Self = Self { era: 0, transaction_id: 0, audit_id: i64::MIN };
    const END: Self = Self { era: i32::MAX, transaction_id: u64::MAX, audit_id: i64::MAX };
}

/// The records that were written in one cluster.
#[expect(clippy::struct_field_names, reason = "as the table has it")]
struct Era {
    era: i32,
    base_audit_id: i64,
    top: i64,
    current: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_comes_back_from_its_text() {
        for cursor in [Cursor::BEGINNING, Cursor::END, Cursor { era: 1, transaction_id: 7, audit_id: 42 }] {
            assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        }
        for text in ["", "1", "1-2", "1-2-3-4", "1-2-x", "-1--2-3", "1-18446744073709551616-1"] {
            assert!(text.parse::<Cursor>().is_err(), "{text}");
        }
    }
}
