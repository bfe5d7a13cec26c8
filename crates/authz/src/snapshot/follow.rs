//! From one state to the next by what has changed, in place of a full load.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sqlx::PgConnection;

use super::actions::Actions;
use super::changes::Changes;
use super::load::{Loaded, ended, state, suspended};
use super::model::{Model, Node, end_of};
use super::poll::Mark;
use super::row::Row;
use super::state::State;
use super::users::{self, Key, NewUser, Unfit};
use crate::decision::Revision;
use crate::error::Error;
use crate::name::{ActionName, ActionPattern, EVERYTHING, MAX_SUB_BYTES};

/// What the rows have to be made anew for.
#[derive(Debug, Default)]
struct Affected {
    /// The graph changed: all rows.
    all: bool,
    patterns: HashSet<Arc<str>>,
    registered: HashSet<Arc<str>>,
    unregistered: HashSet<String>,
    /// Nodes that there were none for.
    new: Vec<Node>,
}

/// The next state, read inside a transaction that sees one state throughout; `None` if a full load is cheaper.
///
/// # Errors
/// [`Error::Database`], or [`Error::Unreadable`] for what this version does not understand. The model is then gone.
pub(super) async fn follow(
    connection: &mut PgConnection,
    mut model: Model,
    old: Arc<State>,
    changes: Changes,
    at: (Revision, Mark),
    by_sub: bool,
) -> Result<Option<Loaded>, Error> {
    let quarter = old.users.count / 4 + 1_000;
    let nodes_before = model.nodes();
    let affected = above(connection, &mut model, &changes).await?;

    // Users to be read again: renamed or suspended ones, members who came or went, whoever is below a new node.
    let mut touched = changes.users.clone();
    touched.extend(
        changes
            .memberships
            .iter()
            .filter(|(group, _)| model.node(Node::Group(*group)).is_some())
            .map(|(_, user)| user),
    );
    if touched.len() <= quarter {
        touched.extend(below(connection, &affected.new, quarter).await?);
    }
    // INVARIANT: numbers of nodes that nothing reaches any more are given back, by a full load, before they are
    // more than those in use (held by `nodes_without_grants_are_given_back`).
    let are_held = old.users.nodes_are().hold(model.nodes());
    if touched.len() > quarter || model.is_wasteful() || !are_held {
        return Ok(None);
    }
    let read = read_users(connection, &model, &touched, by_sub).await?;

    tokio::task::spawn_blocking(move || {
        if affected.all || model.nodes() != nodes_before {
            model.link();
        }
        let rows = (actions(&model, &old.actions, &affected), everything(&model, &old, &affected));
        let users = if touched.is_empty() {
            old.users.clone()
        } else {
            // The old entry is where the new one goes, unless the name (or the `sub`) is another.
            let kept: HashSet<i64> = read
                .iter()
                .filter(|user| {
                    old.users.get(Key::of_bytes(&user.key)).is_some_and(|found| found.id == user.id)
                })
                .map(|user| user.id)
                .collect();
            let moved = |id: &i64| by_sub || !kept.contains(id);
            let everywhere = changes.users.iter().any(moved);
            match old.users.replace(&touched, everywhere, &read) {
                Ok(users) => users,
                Err(Unfit) => return Ok(None),
            }
        };
        let state = state(at, users, rows, &model);
        Ok(Some(Loaded { model, state }))
    })
    .await
    .map_err(ended)?
}

/// Brings the graph and the grants up to date.
async fn above(
    connection: &mut PgConnection,
    model: &mut Model,
    changes: &Changes,
) -> Result<Affected, Error> {
    let mut affected = Affected::default();
    edges(connection, model, changes, &mut affected).await?;
    group_grants(connection, model, changes, &mut affected).await?;
    user_grants(connection, model, changes, &mut affected).await?;

    // After the grants: what became of a group matters once it holds one.
    let mut holders = changes.groups.clone();
    holders.extend(changes.group_grants.iter().map(|(group, _)| group));
    if !holders.is_empty() {
        let ids: Vec<i64> = holders.iter().copied().collect();
        let deleted = sqlx::query_scalar!(
            "select g.group_id from authz.groups g where g.group_id = any ($1) and g.status <> 'active'",
            &ids
        )
        .fetch_all(&mut *connection)
        .await?;
        let deleted: HashSet<i64> = deleted.into_iter().collect();
        for group in ids {
            affected.patterns.extend(model.set_deleted(group, deleted.contains(&group)));
        }
    }

    if !changes.actions.is_empty() {
        let names: Vec<String> = changes.actions.iter().cloned().collect();
        let registered = sqlx::query_scalar!(
            "select a.action_name from authz.actions a where a.action_name = any ($1)",
            &names
        )
        .fetch_all(&mut *connection)
        .await?;
        affected.registered = registered.into_iter().map(Into::into).collect();
        affected.unregistered =
            names.into_iter().filter(|name| !affected.registered.contains(name.as_str())).collect();
    }
    Ok(affected)
}

async fn edges(
    connection: &mut PgConnection,
    model: &mut Model,
    changes: &Changes,
    affected: &mut Affected,
) -> Result<(), Error> {
    if !changes.children.is_empty() {
        let children: Vec<i64> = changes.children.iter().copied().collect();
        let rows = sqlx::query!(
            "select e.child_group_id, e.parent_group_id from authz.group_groups e where e.child_group_id = any ($1)",
            &children
        )
        .fetch_all(&mut *connection)
        .await?;
        let mut parents: HashMap<i64, Vec<i64>> =
            children.into_iter().map(|child| (child, Vec::new())).collect();
        for row in rows {
            parents.entry(row.child_group_id).or_default().push(row.parent_group_id);
        }
        for (child, parents) in parents {
            affected.all |= model.set_parents(child, parents, &mut affected.new);
        }
    }
    if !changes.directories.is_empty() {
        let groups: Vec<i64> = changes.directories.iter().copied().collect();
        let rows = sqlx::query!(
            "select gd.group_id, gd.directory_id from authz.group_directories gd where gd.group_id = any ($1)",
            &groups
        )
        .fetch_all(&mut *connection)
        .await?;
        let mut directories: HashMap<i64, Vec<i32>> =
            groups.into_iter().map(|group| (group, Vec::new())).collect();
        for row in rows {
            directories.entry(row.group_id).or_default().push(row.directory_id);
        }
        for (group, directories) in directories {
            affected.all |= model.set_directories(group, directories, &mut affected.new);
        }
    }
    Ok(())
}

async fn group_grants(
    connection: &mut PgConnection,
    model: &mut Model,
    changes: &Changes,
    affected: &mut Affected,
) -> Result<(), Error> {
    if changes.group_grants.is_empty() {
        return Ok(());
    }
    let (groups, patterns): (Vec<i64>, Vec<String>) = changes.group_grants.iter().cloned().unzip();
    let found = sqlx::query!(
        "select ga.group_id, ga.action_name, ga.expires_at
         from unnest($1::bigint[], $2::text[]) as k (group_id, action_name)
         join authz.group_actions ga on ga.group_id = k.group_id and ga.action_name = k.action_name",
        &groups,
        &patterns
    )
    .fetch_all(&mut *connection)
    .await?;
    for (group, pattern) in &changes.group_grants {
        model.revoke(Node::Group(*group), pattern);
        affected.patterns.insert(pattern.as_str().into());
    }
    for grant in found {
        model.grant(
            Node::Group(grant.group_id),
            &grant.action_name,
            end_of(grant.expires_at),
            &mut affected.new,
        );
    }
    Ok(())
}

async fn user_grants(
    connection: &mut PgConnection,
    model: &mut Model,
    changes: &Changes,
    affected: &mut Affected,
) -> Result<(), Error> {
    if changes.user_grants.is_empty() {
        return Ok(());
    }
    let (users, patterns): (Vec<i64>, Vec<String>) = changes.user_grants.iter().cloned().unzip();
    let found = sqlx::query!(
        "select ua.user_id, ua.action_name, ua.expires_at
         from unnest($1::bigint[], $2::text[]) as k (user_id, action_name)
         join authz.user_actions ua on ua.user_id = k.user_id and ua.action_name = k.action_name",
        &users,
        &patterns
    )
    .fetch_all(&mut *connection)
    .await?;
    for (user, pattern) in &changes.user_grants {
        model.revoke(Node::User(*user), pattern);
        affected.patterns.insert(pattern.as_str().into());
    }
    for grant in found {
        model.grant(
            Node::User(grant.user_id),
            &grant.action_name,
            end_of(grant.expires_at),
            &mut affected.new,
        );
    }
    Ok(())
}

/// The users right below new nodes, and one more than `most` if there are more.
async fn below(connection: &mut PgConnection, new: &[Node], most: usize) -> Result<HashSet<i64>, Error> {
    let mut users = HashSet::new();
    let (mut groups, mut directories) = (Vec::new(), Vec::new());
    for node in new {
        match node {
            Node::Group(id) => groups.push(*id),
            Node::Everyone(id) => directories.push(*id),
            Node::User(id) => {
                users.insert(*id);
            }
        }
    }
    if !groups.is_empty() || !directories.is_empty() {
        let most = i64::try_from(most).unwrap_or(i64::MAX).saturating_add(1);
        let found = sqlx::query_scalar!(
            r#"
            select gu.user_id as "user_id!" from authz.group_users gu where gu.group_id = any ($1)
            union
            select u.user_id from authz.users u where u.directory_id = any ($2) and u.status <> 'deleted'
            limit $3
            "#,
            &groups,
            &directories,
            most
        )
        .fetch_all(connection)
        .await?;
        users.extend(found);
    }
    Ok(users)
}

/// These users as they are now, without those that are deleted.
async fn read_users(
    connection: &mut PgConnection,
    model: &Model,
    ids: &HashSet<i64>,
    by_sub: bool,
) -> Result<Vec<NewUser>, Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<i64> = ids.iter().copied().collect();
    let rows = sqlx::query!(
        r#"
        select u.user_id, u.status, u.directory_id, u.user_name, u.external_id,
               array(select gu.group_id from authz.group_users gu where gu.user_id = u.user_id) as "groups!"
        from authz.users u
        where u.user_id = any ($1) and u.status <> 'deleted'
        "#,
        &ids
    )
    .fetch_all(connection)
    .await?;
    let mut read = Vec::with_capacity(rows.len());
    for row in rows {
        let suspended = suspended(&row.status)?;
        let mut nodes = Vec::new();
        let groups = row.groups.into_iter().filter_map(|group| model.node(Node::Group(group)));
        model.nodes_of(row.user_id, row.directory_id, groups, &mut nodes);
        let keys = [
            Some(row.user_name.clone().into_bytes()),
            row.external_id.filter(|id| by_sub && id.len() <= MAX_SUB_BYTES).map(|sub| users::sub_key(&sub)),
        ];
        for key in keys.into_iter().flatten() {
            users::fits(&key, &nodes)?;
            let name = row.user_name.clone();
            read.push(NewUser { id: row.user_id, suspended, key, name, nodes: nodes.clone() });
        }
    }
    Ok(read)
}

/// The row of everything, made anew if it is affected.
fn everything(model: &Model, old: &State, affected: &Affected) -> Option<Row> {
    if affected.all || affected.patterns.contains(EVERYTHING) {
        model.everything()
    } else {
        old.everything.clone()
    }
}

/// The actions with the rows that are affected made anew.
fn actions(model: &Model, old: &Actions, affected: &Affected) -> Actions {
    let nothing = !affected.all
        && affected.patterns.iter().all(|pattern| **pattern == *EVERYTHING)
        && affected.registered.is_empty()
        && affected.unregistered.is_empty();
    if nothing {
        return old.clone();
    }
    let wildcards: Vec<ActionPattern> = affected
        .patterns
        .iter()
        .filter(|pattern| pattern.ends_with(".*"))
        .map(|pattern| ActionPattern::stored(pattern.to_string()))
        .collect();
    let is_affected = |name: &str| {
        affected.all || affected.patterns.contains(name) || {
            !wildcards.is_empty() && {
                let action = ActionName::stored(name.to_string());
                wildcards.iter().any(|wildcard| wildcard.covers(&action))
            }
        }
    };
    let mut names: HashSet<Arc<str>> = old.names().filter(|name| is_affected(name)).map(Into::into).collect();
    names.extend(affected.registered.iter().cloned());
    old.with(model.rows(names.iter()), &affected.unregistered)
}
