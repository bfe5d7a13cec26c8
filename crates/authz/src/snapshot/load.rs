//! The full load: the graph by queries, then the users with their memberships as one stream.

use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::{Executor, PgConnection};

use super::actions::Actions;
use super::copy::{Field, Rows};
use super::model::{Model, Node, end_of};
use super::state::{Size, State};
use super::users::{self, Builder, Duplicate};
use crate::decision::Revision;
use crate::error::Error;

/// One row per user, for a message each costs more than what is in it. `group_users_by_user` gives the memberships
/// in the order of the users, so nothing is sorted and nothing is hashed.
macro_rules! users {
    ($sub:literal, $relevant:literal) => {
        concat!(
            "copy (select u.user_id, u.status, u.directory_id, u.user_name, ",
            $sub,
            ", m.groups
            from authz.users u
            left join (
                select gu.user_id, array_agg(gu.group_id) as groups
                from authz.group_users gu ",
            $relevant,
            " group by gu.user_id
            ) m on m.user_id = u.user_id
            where u.status <> 'deleted'
            ) to stdout (format binary)"
        )
    };
}
macro_rules! relevant {
    ($sub:literal) => {
        users!(
            $sub,
            "where gu.group_id in (
                select an.group_id from authz.group_ancestors an
                where an.ancestor_id in (select ga.group_id from authz.group_actions ga))"
        )
    };
}

/// So many users are taken in before other tasks have a turn.
const USERS_PER_TURN: usize = 512;

/// What a load makes: the refresher's part and the readers' part.
pub(super) struct Loaded {
    pub(super) model: Model,
    pub(super) state: State,
}

/// Loads all, inside a transaction that sees one state throughout.
///
/// # Errors
/// [`Error::Database`], or [`Error::Unreadable`] for what this version does not understand.
pub(super) async fn load(
    connection: &mut PgConnection,
    revision: Revision,
    by_sub: bool,
) -> Result<Loaded, Error> {
    let (model, names) = graph(connection).await?;
    let model = Arc::new(model);
    // Rows are made while the users come in.
    let rows = tokio::task::spawn_blocking({
        let model = Arc::clone(&model);
        move || {
            let mut actions = Actions::default();
            model.rows(names.iter(), &mut actions);
            actions
        }
    });
    let expected = sqlx::query!(
        r#"select (select count(*) from authz.users u where u.status <> 'deleted') as "users!",
                  (select count(*) from authz.groups g where g.status <> 'deleted') as "groups!""#
    )
    .fetch_one(&mut *connection)
    .await?;
    let builder = Builder::new(usize::try_from(expected.users).unwrap_or(0));
    let most_are_relevant = model.groups() * 2 > usize::try_from(expected.groups).unwrap_or(0);
    let builder = stream(connection, &model, builder, by_sub, most_are_relevant).await?;
    let actions = rows.await.map_err(ended)?;
    let users = tokio::task::spawn_blocking(|| builder.finish())
        .await
        .map_err(ended)?
        .map_err(|Duplicate| Error::Unreadable { what: "one name of two users".to_owned() })?;
    let model = Arc::into_inner(model).ok_or(Error::SnapshotClosed)?;
    let state = state(revision, users, Arc::new(actions), &model);
    Ok(Loaded { model, state })
}

/// Work off the runtime's threads that did not end: the runtime is going down.
pub(super) fn ended(_: tokio::task::JoinError) -> Error {
    Error::Database(sqlx::Error::WorkerCrashed)
}

/// A state with its size.
pub(super) fn state(revision: Revision, users: users::Users, actions: Arc<Actions>, model: &Model) -> State {
    let size = Size {
        users: users.count,
        groups: model.groups(),
        memberships: users.memberships,
        bytes: users.bytes + actions.bytes() + model.bytes(),
    };
    State { revision, users, actions, size }
}

/// Everything but users and memberships, and the names of the actions.
async fn graph(connection: &mut PgConnection) -> Result<(Model, Vec<Arc<str>>), Error> {
    let mut model = Model::default();
    let mut new = Vec::new();
    let edges = sqlx::query!(
        r#"select e.child_group_id, array_agg(e.parent_group_id) as "parents!"
           from authz.group_groups e group by e.child_group_id"#
    )
    .fetch_all(&mut *connection)
    .await?;
    for edge in edges {
        model.set_parents(edge.child_group_id, edge.parents, &mut new);
    }
    let everyone = sqlx::query!(
        r#"select gd.group_id, array_agg(gd.directory_id) as "directories!"
           from authz.group_directories gd group by gd.group_id"#
    )
    .fetch_all(&mut *connection)
    .await?;
    for row in everyone {
        model.set_directories(row.group_id, row.directories, &mut new);
    }
    let mut grants = sqlx::query!(
        "select ga.group_id, ga.action_name, ga.expires_at from authz.group_actions ga order by ga.action_name"
    )
    .fetch(&mut *connection);
    while let Some(grant) = grants.try_next().await? {
        model.grant(Node::Group(grant.group_id), &grant.action_name, end_of(grant.expires_at), &mut new);
    }
    drop(grants);
    // Users after groups, so that few rows are as long as the nodes are many.
    let mut grants = sqlx::query!(
        "select ua.user_id, ua.action_name, ua.expires_at from authz.user_actions ua order by ua.user_id"
    )
    .fetch(&mut *connection);
    while let Some(grant) = grants.try_next().await? {
        model.grant(Node::User(grant.user_id), &grant.action_name, end_of(grant.expires_at), &mut new);
    }
    drop(grants);
    let deleted = sqlx::query_scalar!(
        "select g.group_id from authz.groups g
         where g.status <> 'active' and g.group_id in (select ga.group_id from authz.group_actions ga)"
    )
    .fetch_all(&mut *connection)
    .await?;
    for group in deleted {
        model.set_deleted(group, true);
    }
    let names =
        sqlx::query_scalar!("select a.action_name from authz.actions a").fetch_all(connection).await?;
    model.settle();
    model.link();
    Ok((model, names.into_iter().map(Into::into).collect()))
}

async fn stream(
    connection: &mut PgConnection,
    model: &Model,
    mut builder: Builder,
    by_sub: bool,
    most_are_relevant: bool,
) -> Result<Builder, Error> {
    // For this transaction only. Without them the planner prefers to hash and sort all memberships on disk.
    connection
        .execute(if most_are_relevant {
            "set local enable_hashagg = off; set local enable_sort = off; set local jit = off"
        } else {
            "set local jit = off"
        })
        .await?;
    let statement = match (by_sub, most_are_relevant) {
        (false, false) => relevant!("null::text"),
        (false, true) => users!("null::text", ""),
        (true, false) => relevant!("u.external_id"),
        (true, true) => users!("u.external_id", ""),
    };
    let mut chunks = connection.copy_out_raw(statement).await?;
    let mut rows = Rows::default();
    let mut nodes = Vec::new();
    let mut taken = 0_usize;
    while let Some(chunk) = chunks.try_next().await? {
        rows.feed(&chunk, |row: [Field<'_>; 6]| {
            let [user_id, status, directory_id, name, sub, groups] = row;
            let user_id = user_id.int8()?;
            let suspended = suspended(status.text()?)?;
            model.nodes_of(user_id, directory_id.int4_or_null()?, groups.int8s()?, &mut nodes);
            builder.push(user_id, suspended, name.text()?.as_bytes(), &nodes)?;
            if let Some(sub) = sub.text_or_null()? {
                builder.push(user_id, suspended, &users::sub_key(sub), &nodes)?;
            }
            Ok(())
        })?;
        taken += 1;
        if taken.is_multiple_of(USERS_PER_TURN) {
            tokio::task::yield_now().await;
        }
    }
    rows.end()?;
    Ok(builder)
}

/// Whether a user of that status is told so, rather than judged.
///
/// # Errors
/// [`Error::Unreadable`] for a status that this version does not know, as in the check of the database.
pub(super) fn suspended(status: &str) -> Result<bool, Error> {
    match status {
        "active" | "external" => Ok(false),
        "suspended" => Ok(true),
        _ => Err(Error::Unreadable { what: format!("the user status `{status}`") }),
    }
}
