//! Why a decision is what it is: every path on allow, and on deny who would have been allowed.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgExecutor;
use sqlx::types::Json;

use crate::check::Facts;
use crate::decision::Decision;
use crate::error::Error;
use crate::name::{ActionName, ActionPattern, GroupName, UserKey};

/// At most so many groups are named in [`Explanation::would_allow`].
pub const WOULD_ALLOW_LIMIT: i64 = 100;

/// A decision with all that led to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Explanation {
    /// The same answer that [`check`](crate::check()) gives.
    pub decision: Decision,
    /// Every unexpired grant that reaches the user, by the shortest way from each group that has the user.
    /// Filled also where the user is suspended or the action unknown: what would count otherwise.
    pub paths: Vec<Path>,
    /// The grants that would have counted, but have ended.
    pub expired: Vec<Path>,
    /// On deny, the groups whose members may do it, by name, at most [`WOULD_ALLOW_LIMIT`].
    pub would_allow: Vec<GroupName>,
    /// On deny, the fewest facts that would turn it into an allow.
    pub missing: Missing,
}

/// The smallest change of facts that would allow: all of [`required`](Self::required), and, if there are any, one
/// of [`one_of`](Self::one_of). Empty on allow.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Missing {
    /// Facts without which nothing else helps.
    pub required: Vec<Fact>,
    /// Facts of which any single one suffices, once the required ones are there.
    pub one_of: Vec<Fact>,
}

/// Something that is not so, and would have to be for an allow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Fact {
    /// There is a user of that name (or `sub`).
    UserExists,
    /// The user is not suspended.
    UserIsActive,
    /// The action is registered.
    ActionIsRegistered(ActionName),
    /// This grant, which reaches the user, has not ended.
    GrantIsRenewed(Path),
    /// The user is in this group.
    MemberOf(GroupName),
    /// The user has a grant of the action.
    Granted(ActionName),
}

impl std::fmt::Display for Fact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::UserExists => f.write_str("the user exists"),
            Self::UserIsActive => f.write_str("the user is not suspended"),
            Self::ActionIsRegistered(action) => write!(f, "action `{action}` is registered"),
            Self::GrantIsRenewed(path) => write!(f, "the ended grant {path} is renewed"),
            Self::MemberOf(group) => write!(f, "the user is in group `{group}`"),
            Self::Granted(action) => write!(f, "`{action}` is granted to the user"),
        }
    }
}

/// One way in which the user comes by a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Path {
    /// What was granted: the action, or a pattern that covers it.
    pub pattern: ActionPattern,
    /// The groups from the one that has the user up to the one that holds the grant; empty for a grant to
    /// the user.
    pub groups: Vec<GroupName>,
    /// Whether the first group has everyone of the user's directory, rather than this user by name.
    pub everyone: bool,
    /// Who granted it.
    pub granted_by: String,
    /// When it was granted.
    pub granted_at: DateTime<Utc>,
    /// When it ends; `None` for never.
    pub expires_at: Option<DateTime<Utc>>,
    /// Why it was granted.
    pub reason: String,
}

/// A path as the statement gives it. Its names are those of the database, which takes a few that nobody can type here
/// (a group made by hand whose name holds a no-break space); that is no reason not to answer.
#[derive(Debug, Deserialize)]
struct Shown {
    pattern: String,
    groups: Vec<String>,
    everyone: bool,
    granted_by: String,
    granted_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    reason: String,
}

impl From<Shown> for Path {
    fn from(shown: Shown) -> Self {
        let Shown { pattern, groups, everyone, granted_by, granted_at, expires_at, reason } = shown;
        let groups = groups.into_iter().map(GroupName::stored).collect();
        let pattern = ActionPattern::stored(pattern);
        Self { pattern, groups, everyone, granted_by, granted_at, expires_at, reason }
    }
}

impl std::fmt::Display for Path {
    /// `user → web-team@example.com → developers@example.com: workers.*`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.everyone { "everyone" } else { "user" })?;
        for group in &self.groups {
            write!(f, " → {group}")?;
        }
        write!(f, ": {}", self.pattern)
    }
}

/// Explains the decision about `user` and `action`; one statement, one round trip.
///
/// Costs more than [`check`](crate::check()): it is for people and for the audit trail.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
#[expect(clippy::too_many_lines, reason = "one statement, which reads best in one piece")]
pub async fn explain<'u>(
    executor: impl PgExecutor<'_>,
    user: impl Into<UserKey<'u>>,
    action: &ActionName,
) -> Result<Explanation, Error> {
    let key = user.into();
    let row = sqlx::query!(
        r#"
        with recursive subject as (
            select u.user_id, u.status, u.directory_id
            from authz.users u
            where (u.user_name = $1 or u.external_id = $5) and u.status <> 'deleted'
        ),
        mine as (
            select gu.group_id, false as everyone
            from subject s join authz.group_users gu on gu.user_id = s.user_id
            union all
            select gd.group_id, true
            from subject s join authz.group_directories gd on gd.directory_id = s.directory_id
        ),
        hit as (
            select m.group_id as entry_id, m.everyone, an.ancestor_id as holder_id, an.depth,
                   ga.action_name as pattern, ga.granted_by, ga.granted_at, ga.expires_at, ga.reason
            from mine m
            join authz.group_ancestors an on an.group_id = m.group_id
            join authz.group_actions ga on ga.group_id = an.ancestor_id and ga.action_name = any ($3)
            join authz.groups g on g.group_id = an.ancestor_id and g.status = 'active'
        ),
        -- Up from the entry, each step one nearer to the holder by the closure: a shortest way, never a loop.
        way as (
            select distinct entry_id, holder_id, entry_id as at, depth as steps_left, array[entry_id] as groups
            from hit
            union all
            select w.entry_id, w.holder_id, up.parent_group_id, w.steps_left - 1, w.groups || up.parent_group_id
            from way w
            cross join lateral (
                select e.parent_group_id
                from authz.group_groups e
                join authz.group_ancestors an
                    on an.group_id = e.parent_group_id and an.ancestor_id = w.holder_id and an.depth = w.steps_left - 1
                where e.child_group_id = w.at
                order by e.parent_group_id
                limit 1
            ) up
            where w.steps_left > 0
        ),
        path as (
            select ua.action_name as pattern, '{}'::bigint[] as groups, false as everyone, 0 as depth,
                   null::bigint as holder_id, null::bigint as entry_id,
                   ua.granted_by, ua.granted_at, ua.expires_at, ua.reason
            from subject s
            join authz.user_actions ua on ua.user_id = s.user_id and ua.action_name = any ($3)
            union all
            select h.pattern, w.groups, h.everyone, h.depth, h.holder_id, h.entry_id,
                   h.granted_by, h.granted_at, h.expires_at, h.reason
            from hit h
            join way w on w.entry_id = h.entry_id and w.holder_id = h.holder_id and w.steps_left = 0
        ),
        judged as (
            select p.*, (p.expires_at is null or p.expires_at > statement_timestamp()) as live,
                   jsonb_build_object(
                       'pattern', p.pattern,
                       'groups', (select coalesce(jsonb_agg(g.group_name order by step.n), '[]')
                                  from unnest(p.groups) with ordinality as step (group_id, n)
                                  join authz.groups g on g.group_id = step.group_id),
                       'everyone', p.everyone, 'granted_by', p.granted_by, 'granted_at', p.granted_at,
                       'expires_at', p.expires_at, 'reason', p.reason) as shown
            from path p
        ),
        best as (
            select * from judged
            order by live desc, depth, pattern, holder_id nulls first, entry_id
            limit 1
        ),
        -- Materialized, or the planner walks all groups in the order of their names.
        granting as materialized (
            select distinct ga.group_id
            from authz.group_actions ga
            where ga.action_name = any ($3)
              and (ga.expires_at is null or ga.expires_at > statement_timestamp())
        )
        select (select revision from authz.revision) as "revision!",
               (select status from subject) as status,
               exists (select from authz.actions a where a.action_name = $2) as "action_is_known!",
               (select pattern from best) as pattern,
               (select expires_at from best) as expires_at,
               (select live from best) as live,
               (select depth from best) as depth,
               (select g.group_name from best join authz.groups g on g.group_id = best.holder_id) as holder,
               (select g.group_name from best join authz.groups g on g.group_id = best.entry_id) as entry,
               (select coalesce(jsonb_agg(shown order by depth, pattern, holder_id nulls first, entry_id), '[]')
                from judged where live) as "paths!: Json<Vec<Shown>>",
               (select coalesce(jsonb_agg(shown order by depth, pattern, holder_id nulls first, entry_id), '[]')
                from judged where not live) as "expired!: Json<Vec<Shown>>",
               (select coalesce(jsonb_agg(w.group_name order by w.group_name), '[]')
                from (select g.group_name
                      from granting
                      join authz.groups g on g.group_id = granting.group_id and g.status = 'active'
                      order by g.group_name
                      limit $4) w) as "would_allow!: Json<Vec<String>>"
        "#,
        key.name(),
        action.as_str(),
        &action.covering(),
        WOULD_ALLOW_LIMIT,
        key.sub(),
    )
    .fetch_one(executor)
    .await?;

    let status = row.status.clone();
    let decision = Facts {
        revision: row.revision,
        status: row.status,
        user_name: None,
        action_is_known: row.action_is_known,
        pattern: row.pattern,
        expires_at: row.expires_at,
        live: row.live,
        depth: row.depth,
        holder: row.holder,
        entry: row.entry,
    }
    .decide()?;
    let mut explanation = Explanation {
        decision,
        paths: row.paths.0.into_iter().map(Path::from).collect(),
        expired: row.expired.0.into_iter().map(Path::from).collect(),
        would_allow: Vec::new(),
        missing: Missing::default(),
    };
    if !explanation.decision.is_allow() {
        explanation.would_allow = row.would_allow.0.into_iter().map(GroupName::stored).collect();
        explanation.missing = missing(&explanation, status.as_deref(), row.action_is_known, action);
    }
    Ok(explanation)
}

/// What the denied user lacks. A grant to the user of an action that is not registered is no way out: it could not
/// be stored, so registering comes first.
fn missing(
    denied: &Explanation,
    status: Option<&str>,
    action_is_known: bool,
    action: &ActionName,
) -> Missing {
    let mut required = Vec::new();
    match status {
        None => required.push(Fact::UserExists),
        Some("suspended") => required.push(Fact::UserIsActive),
        Some(_) => {}
    }
    if !action_is_known {
        required.push(Fact::ActionIsRegistered(action.clone()));
    }
    if !denied.paths.is_empty() {
        return Missing { required, one_of: Vec::new() };
    }
    let renewed = denied.expired.iter().cloned().map(Fact::GrantIsRenewed);
    let joined = denied.would_allow.iter().cloned().map(Fact::MemberOf);
    let one_of = renewed.chain(joined).chain([Fact::Granted(action.clone())]).collect();
    Missing { required, one_of }
}
