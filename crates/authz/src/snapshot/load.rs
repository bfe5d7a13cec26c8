//! The full load: the graph, the users and their memberships, each as a stream.

use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::{Executor, PgConnection};

use super::actions::Actions;
use super::copy::{Field, Rows};
use super::model::{Model, Node};
use super::poll::Mark;
use super::row::{NEVER, Row};
use super::state::{Size, State};
use super::users::{self, Builder, Nodes, Unfit};
use crate::decision::Revision;
use crate::error::Error;
use crate::name::MAX_SUB_BYTES;

/// Everything but users and memberships, for in a small organisation a load is little more than its round trips.
///
/// Where the server gives it in this order, as it does unless it reads with several processes, holders of one grant get
/// numbers near each other, and few rows are as long as the nodes are many, as users come after groups. What is read does not depend on it.
const GRAPH: &str = "copy (
        select 1 as kind, e.child_group_id as id, array_agg(e.parent_group_id) as ids,
               null::text as action_name, null::timestamptz as expires_at
        from authz.group_groups e group by e.child_group_id
        union all
        select 2, gd.group_id, array_agg(gd.directory_id::bigint), null, null
        from authz.group_directories gd group by gd.group_id
        union all
        (select 3, ga.group_id, null, ga.action_name, ga.expires_at from authz.group_actions ga
         order by ga.action_name collate \"C\")
        union all
        (select 4, ua.user_id, null, ua.action_name, ua.expires_at from authz.user_actions ua order by ua.user_id)
        union all
        select 5, g.group_id, null, null, null from authz.groups g
        where g.status <> 'active' and g.group_id in (select ga.group_id from authz.group_actions ga)
        union all
        select 6, null, null, a.action_name, null from authz.actions a
        union all
        select 7, count(*), null, null, null from authz.groups g where g.status <> 'deleted'
    ) to stdout (format binary)";
/// The users by themselves: a join would have the server hash all of them.
const USERS: &str = "copy (
        select u.user_id, u.status, u.directory_id, u.user_name, null::text from authz.users u where u.status <> 'deleted'
    ) to stdout (format binary)";
/// With the `sub`.
const USERS_AND_SUBS: &str = "copy (
        select u.user_id, u.status, u.directory_id, u.user_name, u.external_id from authz.users u where u.status <> 'deleted'
    ) to stdout (format binary)";
/// One row per user, for a message each costs more than what is in it. Of many users the index `group_users_by_user` gives
/// them in this order, so nothing is sorted and nothing is hashed.
const MEMBERSHIPS: &str = "copy (
        select gu.user_id, array_agg(gu.group_id) from authz.group_users gu group by gu.user_id order by gu.user_id
    ) to stdout (format binary)";
/// Those that some grant reaches.
const RELEVANT_MEMBERSHIPS: &str = "copy (
        select gu.user_id, array_agg(gu.group_id)
        from authz.group_users gu
        where gu.group_id in (
            select an.group_id from authz.group_ancestors an
            where an.ancestor_id in (select ga.group_id from authz.group_actions ga))
        group by gu.user_id
        order by gu.user_id
    ) to stdout (format binary)";

/// The memberships of so many users the server hashes and sorts in memory, which takes less than to follow an index.
const FIT_IN_MEMORY: usize = 5_000;
/// So many rows are taken in before other tasks have a turn.
const ROWS_PER_TURN: usize = 512;

/// What a load makes: the refresher's part and the readers' part.
pub(super) struct Loaded {
    pub(super) model: Model,
    pub(super) state: State,
}

/// Loads all, inside a transaction that sees one state throughout, on a connection that is [`Lent`](crate::lent::Lent).
///
/// # Errors
/// [`Error::Database`], or [`Error::Unreadable`] for what this version does not understand.
pub(super) async fn load(
    connection: &mut PgConnection,
    at: (Revision, Mark),
    by_sub: bool,
) -> Result<Loaded, Error> {
    let Graph { model, names, groups } = graph(connection).await?;
    let most_are_relevant = model.groups() * 2 > groups;
    let model = Arc::new(model);
    // Rows are made while the users come in.
    let rows = tokio::task::spawn_blocking({
        let model = Arc::clone(&model);
        move || {
            let mut actions = Actions::default();
            model.rows(names.iter(), &mut actions);
            (Arc::new(actions), model.everything())
        }
    });
    let builder = stream(connection, &model, by_sub, most_are_relevant).await?;
    let rows = rows.await.map_err(ended)?;
    let users = tokio::task::spawn_blocking(|| builder.finish())
        .await
        .map_err(ended)?
        .map_err(|Unfit| Error::Unreadable { what: "one name of two users".to_owned() })?;
    let model = Arc::into_inner(model).ok_or(Error::SnapshotClosed)?;
    let state = state(at, users, rows, &model);
    Ok(Loaded { model, state })
}

/// Work off the runtime's threads that did not end: the runtime is going down.
pub(super) fn ended(_: tokio::task::JoinError) -> Error {
    Error::Database(sqlx::Error::WorkerCrashed)
}

/// A state with its size.
pub(super) fn state(
    (revision, mark): (Revision, Mark),
    users: users::Users,
    (actions, everything): (Arc<Actions>, Option<Row>),
    model: &Model,
) -> State {
    let size = Size {
        users: users.count,
        groups: model.groups(),
        memberships: users.memberships,
        bytes: users.bytes + actions.bytes() + everything.as_ref().map_or(0, Row::bytes) + model.bytes(),
    };
    State { revision, mark, users, actions, everything, size }
}

/// What [`GRAPH`] gives.
#[derive(Default)]
struct Graph {
    model: Model,
    /// Of the actions.
    names: Vec<Arc<str>>,
    /// How many there are, also those that no grant reaches.
    groups: usize,
}

async fn graph(connection: &mut PgConnection) -> Result<Graph, Error> {
    let Graph { mut model, mut names, mut groups } = Graph::default();
    let (mut new, mut deleted) = (Vec::new(), Vec::new());
    rows(connection, GRAPH, |[kind, id, ids, name, end]| {
        match kind.int4_or_null()? {
            Some(1) => {
                model.set_parents(id.int8()?, ids.int8s()?.collect(), &mut new);
            }
            Some(2) => {
                let directories = ids.int8s()?.filter_map(|id| i32::try_from(id).ok());
                model.set_directories(id.int8()?, directories.collect(), &mut new);
            }
            Some(3) => model.grant(Node::Group(id.int8()?), name.text()?, end_in(end)?, &mut new),
            Some(4) => model.grant(Node::User(id.int8()?), name.text()?, end_in(end)?, &mut new),
            Some(5) => deleted.push(id.int8()?),
            Some(6) => names.push(name.text()?.into()),
            _ => groups = usize::try_from(id.int8()?).unwrap_or(0),
        }
        Ok(())
    })
    .await?;
    // After the grants, wherever the server put them: before, the model would not know the groups.
    for group in deleted {
        model.set_deleted(group, true);
    }
    model.settle();
    model.link();
    Ok(Graph { model, names, groups })
}

/// The end of a grant as rows hold it.
fn end_in(expires_at: Field<'_>) -> Result<i64, Error> {
    Ok(expires_at.micros_or_null()?.unwrap_or(NEVER))
}

/// The users, then their memberships, both in the order of their ids.
async fn stream(
    connection: &mut PgConnection,
    model: &Model,
    by_sub: bool,
    most_are_relevant: bool,
) -> Result<Builder, Error> {
    let mut people = People::default();
    let users = if by_sub { USERS_AND_SUBS } else { USERS };
    rows(connection, users, |row| people.push(row)).await?;
    people.sort();
    if most_are_relevant && people.rows.len() > FIT_IN_MEMORY {
        // For this transaction only. Without them the planner prefers to hash and sort all memberships on disk.
        connection.execute("set local enable_hashagg = off; set local enable_sort = off").await?;
    }
    let mut builder = Builder::new(people.rows.len(), Nodes::of(model.nodes()));
    let mut waiting = people.iter().peekable();
    let mut nodes = Vec::new();
    let mut take = |person: Person<'_>, groups: &mut dyn Iterator<Item = i64>| {
        model.nodes_of(person.user_id, person.directory_id, groups, &mut nodes);
        let Person { user_id, suspended, name, .. } = person;
        builder.push(user_id, suspended, name.as_bytes(), name, &nodes)?;
        match person.sub {
            Some(sub) => builder.push(user_id, suspended, &users::sub_key(sub), name, &nodes),
            None => Ok(()),
        }
    };
    let memberships = if most_are_relevant { MEMBERSHIPS } else { RELEVANT_MEMBERSHIPS };
    rows(connection, memberships, |[user_id, groups]| {
        let user_id = user_id.int8()?;
        while let Some(person) = waiting.next_if(|person| person.user_id <= user_id) {
            if person.user_id == user_id {
                take(person, &mut groups.int8s()?)?;
            } else {
                take(person, &mut std::iter::empty())?;
            }
        }
        Ok(())
    })
    .await?;
    for person in waiting {
        take(person, &mut std::iter::empty())?;
    }
    Ok(builder)
}

/// Calls `each` with every row that a `copy` gives.
async fn rows<const N: usize>(
    connection: &mut PgConnection,
    statement: &str,
    mut each: impl FnMut([Field<'_>; N]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut chunks = connection.copy_out_raw(statement).await?;
    let mut rows = Rows::default();
    let mut taken = 0_usize;
    while let Some(chunk) = chunks.try_next().await? {
        rows.feed(&chunk, &mut each)?;
        taken += 1;
        if taken.is_multiple_of(ROWS_PER_TURN) {
            tokio::task::yield_now().await;
        }
    }
    rows.end()
}

/// Users without their memberships, packed.
#[derive(Default)]
struct People {
    rows: Vec<Packed>,
    /// The name of each, and the `sub` behind it.
    text: String,
}

struct Packed {
    user_id: i64,
    directory_id: Option<i32>,
    suspended: bool,
    text: usize,
    name: u32,
    sub: Option<u32>,
}

struct Person<'a> {
    user_id: i64,
    directory_id: Option<i32>,
    suspended: bool,
    name: &'a str,
    sub: Option<&'a str>,
}

impl People {
    fn push(&mut self, [user_id, status, directory_id, name, sub]: [Field<'_>; 5]) -> Result<(), Error> {
        // Nobody can ask by a longer one.
        let sub = sub.text_or_null()?.filter(|sub| sub.len() <= MAX_SUB_BYTES);
        let (name, text) = (name.text()?, self.text.len());
        self.text.push_str(name);
        self.text.push_str(sub.unwrap_or_default());
        // Postgres holds no text of 1 GiB.
        let length = |text: &str| u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.rows.push(Packed {
            user_id: user_id.int8()?,
            directory_id: directory_id.int4_or_null()?,
            suspended: suspended(status.text()?)?,
            text,
            name: length(name),
            sub: sub.map(length),
        });
        Ok(())
    }

    fn sort(&mut self) {
        self.rows.sort_unstable_by_key(|row| row.user_id);
    }

    fn iter(&self) -> impl Iterator<Item = Person<'_>> {
        self.rows.iter().map(|row| {
            let text =
                |start: usize, length: u32| self.text.get(start..start + length as usize).unwrap_or_default();
            Person {
                user_id: row.user_id,
                directory_id: row.directory_id,
                suspended: row.suspended,
                name: text(row.text, row.name),
                sub: row.sub.map(|length| text(row.text + row.name as usize, length)),
            }
        })
    }
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
