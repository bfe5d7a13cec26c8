//! The authoritative checks: one statement, one round trip, on a pool or inside the caller's transaction.

use chrono::{DateTime, Utc};
use sqlx::PgExecutor;

use crate::decision::{Allow, Decision, Deny, DenyReason, Holder, MatchedGrant, Revision};
use crate::error::Error;
use crate::name::{ActionName, ActionPattern, GroupName, Sub, UserKey, UserName};
use crate::unregistered;

/// The statement of a check, with the condition that finds the user.
///
/// It is prepared once per connection and must be cheap in its generic plan, since Postgres chooses between that and
/// planning anew each time, and compiles what looks expensive: hence each `limit 1`, where the planner expects many rows
/// as long as it has no statistics, and the patterns behind a `select`, so that a plan for these very patterns never
/// looks cheaper (held by the test `a_check_is_planned_once_and_never_compiled`). It reads nine tables by seven indexes:
/// more than 16 locks in all would no longer be taken on the fast path (PostgreSQL 15, `lock.c`).
/// `group_reach` compares names byte by byte, and a join under that order could not use the index of `group_actions`.
/// Groups are looked up one by one for what was found, in expressions: joined to them, a deny read all groups of a small
/// organisation.
macro_rules! facts {
    ($found:tt, $user:expr, $action:expr, $patterns:expr) => {
        sqlx::query_as!(
            Facts,
            r#"
            select r.revision as "revision!", s.status as "status?", s.user_name as "user_name?",
                   a.action_name is not null as "action_is_known!",
                   m.pattern as "pattern?", m.expires_at as "expires_at?", m.live as "live?", m.depth as "depth?",
                   case when m.holder_id is not null
                       then (select g.group_name from authz.groups g where g.group_id = m.holder_id)
                   end as "holder?",
                   case when m.entry_id is not null
                       then (select g.group_name from authz.groups g where g.group_id = m.entry_id)
                   end as "entry?"
            from (select revision from authz.revision limit 1) r
            left join (
                select u.user_id, u.user_name, u.status, u.directory_id
                from authz.users u
                where u.status <> 'deleted' and "#
                + $found
                + r#"
                limit 1
            ) s on true
            left join authz.actions a on a.action_name = $2
            left join lateral (
                select ua.action_name as pattern, ua.expires_at,
                       (ua.expires_at is null or ua.expires_at > statement_timestamp()) as live,
                       0 as depth, null::bigint as holder_id, null::bigint as entry_id
                from authz.user_actions ua
                where ua.user_id = s.user_id and ua.action_name = any ((select $3::text[])::text[])
                union all
                select ga.action_name, ga.expires_at,
                       (ga.expires_at is null or ga.expires_at > statement_timestamp()),
                       re.depth, re.holder_id, re.group_id
                from (
                    select gu.group_id from authz.group_users gu where gu.user_id = s.user_id
                    union all
                    select gd.group_id from authz.group_directories gd where gd.directory_id = s.directory_id
                ) mine
                join authz.group_reach re on re.group_id = mine.group_id and re.action_name = any ((select $3::text[])::text[])
                join authz.group_actions ga
                    on ga.group_id = re.holder_id and ga.action_name = (re.action_name collate "default")
                where (select h.status from authz.groups h where h.group_id = ga.group_id) = 'active'
                order by live desc, depth, pattern, holder_id nulls first, entry_id
                limit 1
            ) m on true
            "#,
            $user,
            $action,
            $patterns,
        )
    };
}

/// The statement of many checks, with the condition that finds the user of the question `q`.
macro_rules! many_facts {
    ($found:tt, $many:expr) => {
        sqlx::query_as!(
            Facts,
            r#"
            select (select revision from authz.revision) as "revision!",
                   s.status as "status?", null::text as "user_name?",
                   exists (select from authz.actions a where a.action_name = q.action_name) as "action_is_known!",
                   m.pattern as "pattern?", m.expires_at as "expires_at?", m.live as "live?", m.depth as "depth?",
                   case when m.holder_id is not null
                       then (select g.group_name from authz.groups g where g.group_id = m.holder_id)
                   end as "holder?",
                   case when m.entry_id is not null
                       then (select g.group_name from authz.groups g where g.group_id = m.entry_id)
                   end as "entry?"
            from (
                select u.n, u.key, u.action_name, string_to_array(u.patterns, ' ') as patterns
                from unnest($1::text[], $2::text[], $3::text[]) with ordinality u (key, action_name, patterns, n)
                offset 0
            ) q
            left join lateral (
                select u.user_id, u.status, u.directory_id
                from authz.users u
                where u.status <> 'deleted' and "#
                + $found
                + r#"
                limit 1
            ) s on true
            left join lateral (
                select ua.action_name as pattern, ua.expires_at,
                       (ua.expires_at is null or ua.expires_at > statement_timestamp()) as live,
                       0 as depth, null::bigint as holder_id, null::bigint as entry_id
                from authz.user_actions ua
                where ua.user_id = s.user_id and ua.action_name = any (q.patterns)
                union all
                select ga.action_name, ga.expires_at,
                       (ga.expires_at is null or ga.expires_at > statement_timestamp()),
                       re.depth, re.holder_id, re.group_id
                from (
                    select gu.group_id from authz.group_users gu where gu.user_id = s.user_id
                    union all
                    select gd.group_id from authz.group_directories gd where gd.directory_id = s.directory_id
                ) mine
                join authz.group_reach re on re.group_id = mine.group_id and re.action_name = any (q.patterns)
                join authz.group_actions ga
                    on ga.group_id = re.holder_id and ga.action_name = (re.action_name collate "default")
                where (select h.status from authz.groups h where h.group_id = ga.group_id) = 'active'
                order by live desc, depth, pattern, holder_id nulls first, entry_id
                limit 1
            ) m on true
            order by q.n
            "#,
            &$many.users as &[&str],
            &$many.actions as &[&str],
            &$many.patterns,
        )
    };
}

/// Whether `user` may do `action` now, by the database's clock.
///
/// The user is a [`UserName`](crate::UserName) or the [`Sub`](crate::Sub) of a login. Pass a pool, or `&mut *transaction`
/// to decide on what the transaction sees, its own changes included.
///
/// # Errors
/// [`Error::Database`] if the database does not answer: the caller cannot tell, and must not go on.
pub async fn check<'u>(
    executor: impl PgExecutor<'_>,
    user: impl Into<UserKey<'u>>,
    action: &ActionName,
) -> Result<Decision, Error> {
    ask(executor, user.into(), action).await.map(|(decision, _)| decision)
}

/// The decision, and the user's name if there is such a user.
pub(crate) async fn ask(
    executor: impl PgExecutor<'_>,
    user: UserKey<'_>,
    action: &ActionName,
) -> Result<(Decision, Option<UserName>), Error> {
    let patterns = action.covering();
    let mut facts = match user {
        UserKey::Name(name) => {
            facts!("u.user_name = $1", name.as_str(), action.as_str(), &patterns).fetch_one(executor).await?
        }
        UserKey::Sub(sub) => {
            facts!("u.external_id = $1", sub.as_str(), action.as_str(), &patterns).fetch_one(executor).await?
        }
    };
    let name = facts.user_name.take().map(UserName::stored);
    let decision = facts.decide()?;
    warn_of_unknown(action.as_str(), &decision);
    Ok((decision, name))
}

/// Answers many questions in one statement and one round trip: one decision per question, in their order, all of
/// the same revision. Questions may repeat, and may name what is not known.
///
/// # Errors
/// [`Error::Database`] if the database does not answer: none of the questions is answered then.
pub async fn check_many(
    executor: impl PgExecutor<'_>,
    questions: &[(UserName, ActionName)],
) -> Result<Vec<Decision>, Error> {
    if questions.is_empty() {
        return Ok(Vec::new());
    }
    let many = Many::of(questions);
    many.decide(many_facts!("u.user_name = q.key", many).fetch_all(executor).await?)
}

/// The same for users who are known by the `sub` of a login.
///
/// # Errors
/// As [`check_many`].
pub async fn check_many_by_sub(
    executor: impl PgExecutor<'_>,
    questions: &[(Sub, ActionName)],
) -> Result<Vec<Decision>, Error> {
    if questions.is_empty() {
        return Ok(Vec::new());
    }
    let many = Many::of(questions);
    many.decide(many_facts!("u.external_id = q.key", many).fetch_all(executor).await?)
}

/// Questions, column by column.
struct Many<'q> {
    users: Vec<&'q str>,
    actions: Vec<&'q str>,
    /// Those that cover each action, between spaces: an array of arrays would have to be rectangular, and a space is in
    /// no pattern.
    patterns: Vec<String>,
}

impl<'q> Many<'q> {
    fn of<K: AsRef<str>>(questions: &'q [(K, ActionName)]) -> Self {
        Self {
            users: questions.iter().map(|(user, _)| user.as_ref()).collect(),
            actions: questions.iter().map(|(_, action)| action.as_str()).collect(),
            patterns: questions.iter().map(|(_, action)| action.covering().join(" ")).collect(),
        }
    }

    fn decide(&self, facts: Vec<Facts>) -> Result<Vec<Decision>, Error> {
        if facts.len() != self.users.len() {
            let what = format!("{} answers to {} questions", facts.len(), self.users.len());
            return Err(Error::Unreadable { what });
        }
        let decisions = facts.into_iter().map(Facts::decide).collect::<Result<Vec<_>, _>>()?;
        for (action, decision) in self.actions.iter().zip(&decisions) {
            warn_of_unknown(action, decision);
        }
        Ok(decisions)
    }
}

fn warn_of_unknown(action: &str, decision: &Decision) {
    if let Decision::Deny(Deny { reason: DenyReason::UnknownAction, .. }) = decision {
        unregistered::warn(action);
    }
}

/// What the database knows about a question.
pub(crate) struct Facts {
    pub(crate) revision: i64,
    pub(crate) status: Option<String>,
    /// Of a single question only.
    pub(crate) user_name: Option<String>,
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
