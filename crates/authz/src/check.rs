//! The authoritative check: one statement, one round trip, on a pool or inside the caller's transaction.

use chrono::{DateTime, Utc};
use sqlx::PgExecutor;

use crate::decision::{Allow, Decision, Deny, DenyReason, Holder, MatchedGrant, Revision};
use crate::error::Error;
use crate::name::{ActionName, ActionPattern, GroupName, UserName};

/// Whether `user` may do `action` now, by the database's clock.
///
/// Pass a pool, or `&mut *transaction` to decide on what the transaction sees, its own changes included.
///
/// # Errors
/// [`Error::Database`] if the database does not answer: the caller cannot tell, and must not go on.
pub async fn check(
    executor: impl PgExecutor<'_>,
    user: &UserName,
    action: &ActionName,
) -> Result<Decision, Error> {
    let facts = sqlx::query_as!(
        Facts,
        r#"
        select (select revision from authz.revision) as "revision!",
               s.status as "status?",
               exists (select from authz.actions a where a.action_name = $2) as "action_is_known!",
               m.pattern as "pattern?", m.expires_at as "expires_at?", m.live as "live?", m.depth as "depth?",
               holder.group_name as "holder?", entry.group_name as "entry?"
        from (values (1)) one (row)
        left join (
            select u.user_id, u.status, u.directory_id
            from authz.users u
            where u.user_name = $1 and u.status <> 'deleted'
        ) s on true
        left join lateral (
            select ua.action_name as pattern, ua.expires_at,
                   (ua.expires_at is null or ua.expires_at > statement_timestamp()) as live,
                   0 as depth, null::bigint as holder_id, null::bigint as entry_id
            from authz.user_actions ua
            where ua.user_id = s.user_id and ua.action_name = any ($3)
            union all
            select ga.action_name, ga.expires_at,
                   (ga.expires_at is null or ga.expires_at > statement_timestamp()),
                   an.depth, an.ancestor_id, an.group_id
            from (
                select gu.group_id from authz.group_users gu where gu.user_id = s.user_id
                union all
                select gd.group_id from authz.group_directories gd where gd.directory_id = s.directory_id
            ) mine
            join authz.group_ancestors an on an.group_id = mine.group_id
            join authz.group_actions ga on ga.group_id = an.ancestor_id and ga.action_name = any ($3)
            join authz.groups g on g.group_id = an.ancestor_id and g.status = 'active'
            order by live desc, depth, pattern, holder_id nulls first, entry_id
            limit 1
        ) m on true
        left join authz.groups holder on holder.group_id = m.holder_id
        left join authz.groups entry on entry.group_id = m.entry_id
        "#,
        user.as_str(),
        action.as_str(),
        &action.covering(),
    )
    .fetch_one(executor)
    .await?;
    let decision = facts.decide()?;
    if let Decision::Deny(Deny { reason: DenyReason::UnknownAction, .. }) = decision {
        tracing::warn!(%action, "a check names an action that is not registered, so nobody may do it");
    }
    Ok(decision)
}

/// What the database knows about a question.
pub(crate) struct Facts {
    pub(crate) revision: i64,
    pub(crate) status: Option<String>,
    pub(crate) action_is_known: bool,
    pub(crate) pattern: Option<String>,
    pub(crate) expires_at: Option<DateTime<Utc>>,
    pub(crate) live: Option<bool>,
    pub(crate) depth: Option<i32>,
    pub(crate) holder: Option<String>,
    pub(crate) entry: Option<String>,
}

impl Facts {
    /// The one place where facts become an answer; whatever is not a reason to allow is a deny.
    pub(crate) fn decide(self) -> Result<Decision, Error> {
        let revision = Revision(self.revision);
        let deny = |reason| Ok(Decision::Deny(Deny { reason, revision }));
        match self.status.as_deref() {
            Some("active" | "external") => {}
            Some("suspended") => return deny(DenyReason::Suspended),
            None => return deny(DenyReason::UnknownUser),
            Some(status) => return Err(Error::Unreadable { what: format!("the user status `{status}`") }),
        }
        if !self.action_is_known {
            return deny(DenyReason::UnknownAction);
        }
        let Some(pattern) = self.pattern else {
            return deny(DenyReason::NoGrant);
        };
        let holder = match (self.holder, self.entry) {
            (Some(group), Some(member_of)) => Holder::Group {
                group: GroupName::stored(group),
                member_of: GroupName::stored(member_of),
                depth: self.depth.and_then(|d| u32::try_from(d).ok()).unwrap_or_default(),
            },
            _ => Holder::User,
        };
        let grant =
            MatchedGrant { pattern: ActionPattern::stored(pattern), holder, expires_at: self.expires_at };
        if self.live == Some(true) {
            Ok(Decision::Allow(Allow { grant, revision }))
        } else {
            deny(DenyReason::Expired(grant))
        }
    }
}
