//! Which rows the changes since a revision name.

use std::collections::HashSet;

use sqlx::PgConnection;

use super::poll::Mark;
use crate::decision::Revision;
use crate::error::Error;

/// More changes than this are a full load.
const MOST: i64 = 200_000;

/// What was touched, each as the key of rows to be read again.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) users: HashSet<i64>,
    pub(super) groups: HashSet<i64>,
    /// By group and user.
    pub(super) memberships: HashSet<(i64, i64)>,
    /// Groups whose parents may be others.
    pub(super) children: HashSet<i64>,
    /// Groups that may have everyone of other directories.
    pub(super) directories: HashSet<i64>,
    pub(super) actions: HashSet<String>,
    pub(super) user_grants: HashSet<(i64, String)>,
    pub(super) group_grants: HashSet<(i64, String)>,
}

/// What has changed after `after` up to `now`; `None` if that cannot be told, or is too much, so that all is to be
/// loaded anew.
///
/// INVARIANT: every revision in between is there, and `after` is the one that was read. Old ones are pruned, a revision
/// set by hand leaves a gap, and a restored database gives numbers again (held by `gap_in_the_changes_is_a_full_load`
/// and `revision_that_is_given_twice_is_a_full_load`).
pub(super) async fn since(
    connection: &mut PgConnection,
    after: (Revision, Mark),
    now: Revision,
) -> Result<Option<Changes>, Error> {
    let (after, mark) = after;
    if mark_of(&mut *connection, after).await? != mark {
        return Ok(None);
    }
    let rows = sqlx::query!(
        "select c.revision, c.kind, c.user_id, c.group_id, c.action_name
         from authz.changes c
         where c.revision > $1 and c.revision <= $2
         order by c.revision
         limit $3",
        after.0,
        now.0,
        MOST + 1,
    )
    .fetch_all(connection)
    .await?;
    let mut changes = Changes::default();
    let mut last = after.0;
    let count = rows.len();
    for row in rows {
        if row.revision > last.saturating_add(1) {
            return Ok(None);
        }
        last = row.revision;
        match (row.kind.as_str(), row.user_id, row.group_id, row.action_name) {
            ("user", Some(user), ..) => changes.users.insert(user),
            ("group", _, Some(group), _) => changes.groups.insert(group),
            ("group_user", Some(user), Some(group), _) => changes.memberships.insert((group, user)),
            ("group_group", _, Some(child), _) => changes.children.insert(child),
            ("group_directory", _, Some(group), _) => changes.directories.insert(group),
            ("action", .., Some(action)) => changes.actions.insert(action),
            ("user_action", Some(user), _, Some(pattern)) => changes.user_grants.insert((user, pattern)),
            ("group_action", _, Some(group), Some(pattern)) => changes.group_grants.insert((group, pattern)),
            // `reload`, or a kind of a later version.
            _ => return Ok(None),
        };
    }
    let complete = last == now.0 && i64::try_from(count).is_ok_and(|count| count <= MOST);
    Ok(complete.then_some(changes))
}

/// Which change made a revision. One that was pruned has no mark, and is taken for another.
async fn mark_of(connection: &mut PgConnection, revision: Revision) -> Result<Mark, Error> {
    let row = sqlx::query!(
        r#"
        select c.change_id, (extract(epoch from c.changed_at) * 1000000)::bigint as "micros!"
        from authz.changes c
        where c.revision = $1
        order by c.change_id desc
        limit 1
        "#,
        revision.0,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row
        .map_or_else(Mark::default, |row| Mark { change_id: Some(row.change_id), micros: Some(row.micros) }))
}
