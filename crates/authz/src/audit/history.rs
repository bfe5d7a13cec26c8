//! Time travel: who could do what at some moment, by which way, granted by whom and why; from the trail alone.
//!
//! ```no_run
//! use authz::ActionName;
//! use authz::audit::{self, Moment};
//!
//! # async fn example(pool: sqlx::PgPool, incident: chrono::DateTime<chrono::Utc>) -> Result<(), authz::Error> {
//! let scale = ActionName::parse("workers.scale")?;
//! for access in audit::who_could(&pool, &scale, Moment::At(incident)).await? {
//!     for way in &access.ways {
//!         println!("{}: {way}, by {} because {}", access.user, way.granted_by, way.reason);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! It replays what the trail holds of users, groups, memberships, grants and actions, whoever changed them: by hand, through
//! the library, or in a sync (whose changes of memberships are recorded group by group, as lists of numbers). So it costs
//! time and memory in proportion to all changes before the moment: it is for people, not for checks.
//!
//! Where months were removed from the trail, it holds everything from the baseline on that was written then, and a question
//! about an earlier moment is an error.

mod replay;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use serde::Serialize;
use sqlx::PgConnection;

use self::replay::{Given, World};
use super::reading::hold_trail;
use crate::begin::Begin;
use crate::error::Error;
use crate::name::{ActionName, ActionPattern, GroupName, UserName};

/// A moment of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Moment {
    /// By the database's clock. A change counts from when it was recorded, which is before it was committed: for as long as
    /// its transaction took, checks still answered as before.
    At(DateTime<Utc>),
    /// What a record was decided on, by its number: exactly the revision that it names.
    Record(i64),
}

/// A user who could do it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Access {
    /// The name at that moment.
    pub user: UserName,
    /// Every way, the shortest first.
    pub ways: Vec<Way>,
}

/// One way in which a user came by a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Way {
    /// What was granted: the action, or a pattern that covers it.
    pub pattern: ActionPattern,
    /// The groups from the one that had the user up to the one that held the grant, by the shortest way, as they were named
    /// at that moment; empty for a grant to the user.
    pub groups: Vec<GroupName>,
    /// Whether the first group had everyone of the user's directory, rather than this user by name.
    pub everyone: bool,
    /// Who granted it.
    pub granted_by: String,
    /// When; `None` if that was before the trail, which then only knows that it stood.
    pub granted_at: Option<DateTime<Utc>>,
    /// When it was to end; `None` for never.
    pub expires_at: Option<DateTime<Utc>>,
    /// Why it was granted.
    pub reason: String,
    /// The record that tells of the grant.
    pub grant_record: i64,
    /// The record that tells how the user came into the first group (by whom, or by which sync).
    pub membership_record: Option<i64>,
}

impl fmt::Display for Way {
    /// `user → web-team@example.com → developers@example.com: workers.*`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.everyone { "everyone" } else { "user" })?;
        for group in &self.groups {
            write!(f, " → {group}")?;
        }
        write!(f, ": {}", self.pattern)
    }
}

/// Everyone who could do `action` at a moment, by name.
///
/// # Errors
/// [`Error::BeforeTrail`], [`Error::UnknownRecord`], [`Error::Database`] if the database does not answer.
pub async fn who_could<'c>(
    connection: impl Begin<'c>,
    action: &ActionName,
    moment: Moment,
) -> Result<Vec<Access>, Error> {
    let mut tx = connection.begin_whole().await?;
    // From here on no month goes, so all questions find the same ones.
    hold_trail(&mut tx).await?;
    let (world, at) = replay(&mut tx, action, moment).await?;
    tx.rollback().await?;
    let mut all: BTreeMap<&str, Vec<Way>> = BTreeMap::new();
    for (user_id, way) in ways(&world, action, at) {
        if let Some(user) = world.users.get(&user_id) {
            all.entry(&user.name).or_default().push(way);
        }
    }
    let access = all.into_iter().map(|(user, mut ways)| {
        sort(&mut ways);
        Access { user: UserName::stored(user.to_owned()), ways }
    });
    Ok(access.collect())
}

/// Every way in which `user` could do `action` at a moment; none if the user could not. The user is known by the name of
/// that moment.
///
/// # Errors
/// As [`who_could`].
pub async fn could<'c>(
    connection: impl Begin<'c>,
    user: &UserName,
    action: &ActionName,
    moment: Moment,
) -> Result<Vec<Way>, Error> {
    let all = who_could(connection, action, moment).await?;
    Ok(all.into_iter().find(|access| access.user == *user).map(|access| access.ways).unwrap_or_default())
}

fn sort(ways: &mut [Way]) {
    ways.sort_by(|a, b| {
        let key = |way: &Way| (way.groups.len(), way.pattern.clone(), way.groups.clone());
        key(a).cmp(&key(b))
    });
}

/// The world at a moment, and by which time the ends of grants are judged.
async fn replay(
    connection: &mut PgConnection,
    action: &ActionName,
    moment: Moment,
) -> Result<(World, DateTime<Utc>), Error> {
    let (at, revision, upto) = match moment {
        Moment::At(at) => (at, None, None),
        Moment::Record(audit_id) => {
            let row = sqlx::query!(
                "select recorded_at, revision from authz.audit_log where audit_id = $1",
                audit_id
            )
            .fetch_optional(&mut *connection)
            .await?
            .ok_or(Error::UnknownRecord(audit_id))?;
            (row.recorded_at, row.revision, Some(audit_id))
        }
    };
    let begins = sqlx::query_scalar!(
        r#"
        select recorded_at from authz.audit_log
        where action collate "C" = 'state.baseline' and outcome = 'succeeded' and coalesce(by_database, true)
        order by audit_id limit 1
        "#
    )
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(begins) = begins
        && at < begins
    {
        return Err(Error::BeforeTrail { asked: at, begins });
    }
    let mut world = World::new(action.covering());
    // In the order of their numbers: who changes any of this holds the lock on the revision from before the number is
    // drawn until commit.
    let mut records = sqlx::query!(
        r#"
        select audit_id, recorded_at, action, detail
        from authz.audit_log
        where action collate "C" = any ('{audit.baseline,grant.add,grant.change,grant.remove,membership.add,
                                         membership.change,membership.remove,state.actions,state.groups,state.members,
                                         state.users}')
          and outcome = 'succeeded' and coalesce(by_database, true)
          -- Not every change raises the revision: a new reason for a grant does not.
          and case when $2::bigint is null then recorded_at <= $1 else revision <= $2 and audit_id <= $3 end
        order by audit_id
        "#,
        at,
        revision,
        upto,
    )
    .fetch(connection);
    while let Some(record) = records.try_next().await? {
        world.take(record.audit_id, record.recorded_at, &record.action, &record.detail).ok_or_else(|| {
            Error::Unreadable { what: format!("the audit record {} (`{}`)", record.audit_id, record.action) }
        })?;
    }
    Ok((world, at))
}

/// Every way of every user who counts.
fn ways(world: &World, action: &ActionName, at: DateTime<Utc>) -> Vec<(i64, Way)> {
    let mut found = Vec::new();
    if !world.actions.contains(action.as_str()) {
        return found;
    }
    let live = |given: &&Given| given.expires_at.is_none_or(|end| end > at);
    let counts = |user_id: i64| world.users.get(&user_id).is_some_and(replay::User::counts);
    for ((user_id, pattern), given) in &world.user_grants {
        if live(&given) && counts(*user_id) {
            found.push((*user_id, way(pattern, Vec::new(), false, given, None)));
        }
    }
    let mut children: HashMap<i64, Vec<i64>> = HashMap::new();
    for (parent, child) in world.edges.keys() {
        children.entry(*parent).or_default().push(*child);
    }
    for all in children.values_mut() {
        all.sort_unstable();
    }
    let mut members: HashMap<i64, Vec<(i64, bool, i64)>> = HashMap::new();
    for ((group_id, user_id), record) in &world.members {
        members.entry(*group_id).or_default().push((*user_id, false, *record));
    }
    let mut of_directory: HashMap<i64, Vec<i64>> = HashMap::new();
    for (user_id, user) in &world.users {
        if let Some(directory_id) = user.directory_id {
            of_directory.entry(directory_id).or_default().push(*user_id);
        }
    }
    for ((group_id, directory_id), record) in &world.everyone {
        let all = of_directory.get(directory_id).into_iter().flatten();
        members.entry(*group_id).or_default().extend(all.map(|user_id| (*user_id, true, *record)));
    }
    for ((holder, pattern), given) in &world.group_grants {
        if !live(&given) || !world.groups.get(holder).is_some_and(|group| group.active) {
            continue;
        }
        for (entry, path) in below(*holder, &children) {
            let groups: Vec<_> = path.iter().map(|group_id| world.group_name(*group_id)).collect();
            for (user_id, everyone, record) in members.get(&entry).into_iter().flatten() {
                if counts(*user_id) {
                    let way = way(pattern, groups.clone(), *everyone, given, Some(*record));
                    found.push((*user_id, way));
                }
            }
        }
    }
    found
}

/// The groups inside `holder`, itself included, each with the shortest way up to it.
fn below(holder: i64, children: &HashMap<i64, Vec<i64>>) -> Vec<(i64, Vec<i64>)> {
    let mut up = HashMap::from([(holder, holder)]);
    let (mut queue, mut found) = (VecDeque::from([holder]), Vec::new());
    while let Some(group_id) = queue.pop_front() {
        let mut path = vec![group_id];
        let mut here = group_id;
        while here != holder {
            here = up.get(&here).copied().unwrap_or(holder);
            path.push(here);
        }
        found.push((group_id, path));
        for child in children.get(&group_id).into_iter().flatten() {
            if !up.contains_key(child) {
                up.insert(*child, group_id);
                queue.push_back(*child);
            }
        }
    }
    found
}

fn way(
    pattern: &str,
    groups: Vec<GroupName>,
    everyone: bool,
    given: &Given,
    membership_record: Option<i64>,
) -> Way {
    Way {
        pattern: ActionPattern::stored(pattern.to_owned()),
        groups,
        everyone,
        granted_by: given.granted_by.clone(),
        granted_at: given.granted_at,
        expires_at: given.expires_at,
        reason: given.reason.clone(),
        grant_record: given.record,
        membership_record,
    }
}
