//! The full load: the [graph](super::graph), the users and the members of groups, each as a stream.

use std::num::NonZero;
use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::PgConnection;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};

use super::actions::Actions;
use super::copy::{Field, Rows};
use super::graph::{self, Graph};
use super::memberships::{Memberships, NodesByUser};
use super::model::{Model, Node};
use super::poll::Mark;
use super::row::{NEVER, Row};
use super::state::{Size, State};
use super::users::{self, Builder, Built, Nodes, Unfit, Users};
use crate::decision::Revision;
use crate::error::Error;
use crate::name::MAX_SUB_BYTES;

/// The users by themselves: a join would have the server hash all of them.
const USERS: &str = "copy (
        select u.user_id, u.status, u.directory_id, u.user_name, null::text from authz.users u where u.status <> 'deleted'
    ) to stdout (format binary)";
/// With the `sub`.
const USERS_AND_SUBS: &str = "copy (
        select u.user_id, u.status, u.directory_id, u.user_name, u.external_id from authz.users u where u.status <> 'deleted'
    ) to stdout (format binary)";
/// The members of the groups that some grant reaches, in the order in which they are named. One row per group, each looked up
/// by the primary key: so nothing is sorted, nothing is hashed, and other groups cost nothing.
const MEMBERSHIPS: &str = "copy (
        select g.group_id, array(select gu.user_id from authz.group_users gu where gu.group_id = g.group_id)
        from unnest(string_to_array(current_setting('authz.snapshot_groups'), ',')::bigint[]) as g (group_id)
    ) to stdout (format binary)";

/// So many rows, or members of groups, are taken in before other tasks have a turn.
const ROWS_PER_TURN: usize = 512;
const MEMBERS_PER_TURN: usize = 8_192;

/// At most so many processors make the entries of the users: the host has other work.
const PROCESSORS: usize = 4;
/// For fewer users it is not worth while to wake a second one.
const USERS_PER_PROCESSOR: usize = 4_096;

/// What a load makes: the refresher's part and the readers' part.
pub(super) struct Loaded {
    pub(super) model: Model,
    pub(super) state: State,
}

/// All that a load reads.
pub(super) struct Read {
    model: Arc<Model>,
    /// The rows of the actions, and that of everything.
    rows: JoinHandle<(Actions, Option<Row>)>,
    people: People,
    memberships: Memberships,
}

/// Reads all, inside a transaction that sees one state throughout, on a connection that is [`Lent`](crate::lent::Lent).
///
/// # Errors
/// [`Error::Database`], or [`Error::Unreadable`] for what this version does not understand.
pub(super) async fn read_all(connection: &mut PgConnection, by_sub: bool) -> Result<Read, Error> {
    // The model is made while the users come in, and the rows of the actions while their memberships do.
    let found = graph::read(connection).await?;
    let graph = spawn_blocking(|| found.into_graph());
    let people = people(connection, by_sub).await?;
    let (people, empty) = spawn_blocking(move || {
        let memberships = Memberships::of(people.rows.iter().map(|row| row.user_id));
        (people, memberships)
    })
    .await
    .map_err(ended)?;
    let Graph { model, names } = graph.await.map_err(ended)?;
    let model = Arc::new(model);
    let rows = spawn_blocking({
        let model = Arc::clone(&model);
        move || {
            let actions = Actions::of(model.rows(names.iter()).into_iter());
            (actions, model.everything())
        }
    });
    let memberships = memberships(connection, &model, empty).await?;
    Ok(Read { model, rows, people, memberships })
}

impl Read {
    /// What readers and the refresher make of it.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if it does not fit together.
    pub(super) async fn into_loaded(self, at: (Revision, Mark)) -> Result<Loaded, Error> {
        let Self { model, rows, people, memberships } = self;
        let users = users(&model, people, memberships).await?;
        let rows = rows.await.map_err(ended)?;
        let model = Arc::into_inner(model).ok_or(Error::SnapshotClosed)?;
        let state = state(at, users, rows, &model);
        Ok(Loaded { model, state })
    }
}

/// Work off the runtime's threads that did not end: the runtime is going down.
pub(super) fn ended(_: JoinError) -> Error {
    Error::Database(sqlx::Error::WorkerCrashed)
}

/// A state with its size.
pub(super) fn state(
    (revision, mark): (Revision, Mark),
    users: Users,
    (actions, everything): (Actions, Option<Row>),
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

/// The end of a grant as rows hold it.
pub(super) fn end_in(expires_at: Field<'_>) -> Result<i64, Error> {
    Ok(expires_at.micros_or_null()?.unwrap_or(NEVER))
}

async fn people(connection: &mut PgConnection, by_sub: bool) -> Result<People, Error> {
    let mut people = People::default();
    let users = if by_sub { USERS_AND_SUBS } else { USERS };
    rows(connection, users, |row| people.push(row)).await?;
    Ok(people)
}

/// The members of the groups in the order of their nodes, so that each user's nodes come sorted.
async fn memberships(
    connection: &mut PgConnection,
    model: &Model,
    mut memberships: Memberships,
) -> Result<Memberships, Error> {
    let groups = model.groups_by_node();
    let ids: Vec<String> = groups.iter().map(|(_, group)| group.to_string()).collect();
    // `copy` takes no parameters. Where statistics are old, each group could be looked for in all of the table.
    sqlx::query!(
        r#"select set_config('authz.snapshot_groups', $1, true) as "groups!", set_config('enable_seqscan', 'off', true) as "scan!""#,
        ids.join(",")
    )
    .fetch_one(&mut *connection)
    .await?;
    let mut chunks = connection.copy_out_raw(MEMBERSHIPS).await?;
    let (mut rows, mut taken) = (Rows::default(), 0);
    let mut read: Vec<(u32, Vec<i64>)> = Vec::new();
    while let Some(chunk) = chunks.try_next().await? {
        rows.feed(&chunk, |[group_id, users]| {
            if let Some(node) = model.node(Node::Group(group_id.int8()?)) {
                read.push((node, users.int8s()?.collect()));
            }
            Ok(())
        })?;
        for (node, users) in read.drain(..) {
            for users in users.chunks(MEMBERS_PER_TURN) {
                memberships.add(node, users.iter().copied());
                taken += users.len();
                if taken >= MEMBERS_PER_TURN {
                    taken = 0;
                    tokio::task::yield_now().await;
                }
            }
        }
    }
    rows.end()?;
    Ok(memberships)
}

/// Of each user what a check needs, made by several processors.
async fn users(model: &Arc<Model>, people: People, memberships: Memberships) -> Result<Users, Error> {
    let people = Arc::new(people);
    let memberships = spawn_blocking(|| Arc::new(memberships.by_user())).await.map_err(ended)?;
    let processors = if people.rows.len() < USERS_PER_PROCESSOR {
        1
    } else {
        std::thread::available_parallelism().map_or(1, NonZero::get).min(PROCESSORS)
    };
    let parts = Builder::parts(people.rows.len(), Nodes::of(model.nodes()), processors);
    let working: Vec<_> = parts
        .into_iter()
        .map(|part| {
            let (model, people, memberships) =
                (Arc::clone(model), Arc::clone(&people), Arc::clone(&memberships));
            spawn_blocking(move || entries(part, &model, &people, &memberships))
        })
        .collect();
    let mut built = Vec::with_capacity(working.len());
    for part in working {
        built.push(part.await.map_err(ended)??);
    }
    Users::of(built).map_err(unfit)
}

fn entries(
    mut builder: Builder,
    model: &Model,
    people: &People,
    memberships: &NodesByUser,
) -> Result<Built, Error> {
    let mut nodes = Vec::new();
    for (person, groups) in people.iter().zip(memberships.iter()) {
        let Person { user_id, directory_id, suspended, name, sub } = person;
        let sub = sub.map(users::sub_key);
        for key in [Some(name.as_bytes()), sub.as_deref()].into_iter().flatten() {
            if builder.takes(key) {
                model.nodes_of(user_id, directory_id, groups.iter().copied(), &mut nodes);
                builder.push(user_id, suspended, key, name, &nodes)?;
            }
        }
    }
    builder.finish().map_err(unfit)
}

fn unfit(_: Unfit) -> Error {
    Error::Unreadable { what: "one name of two users".to_owned() }
}

/// Calls `each` with every row that a `copy` gives.
pub(super) async fn rows<const N: usize>(
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
