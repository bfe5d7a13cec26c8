//! Groups and who is in them. A directory's groups are kept by its sync; local ones by these functions.

use sqlx::{PgConnection, PgExecutor};

use crate::audit::{self, Actor};
use crate::begin::Begin;
use crate::decision::Revision;
use crate::error::{Error, constraint};
use crate::name::{DirectoryName, GroupName, UserName};
use crate::{revision, user};

/// What a directory says of a member; it never decides whether somebody is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Role {
    /// Owns the group.
    Owner,
    /// Manages its members.
    Manager,
    /// Neither.
    #[default]
    Member,
}

impl Role {
    /// As the database holds it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Manager => "manager",
            Self::Member => "member",
        }
    }
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Group {
    /// The e-mail address, as a rule.
    pub name: GroupName,
    /// The directory that keeps it.
    pub directory: DirectoryName,
    /// The directory's immutable id.
    pub external_id: Option<String>,
    /// For people.
    pub display_name: String,
    /// For people.
    pub description: String,
}

/// The group of that name, unless deleted.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn find(executor: impl PgExecutor<'_>, name: &GroupName) -> Result<Option<Group>, Error> {
    let row = sqlx::query!(
        r#"
        select g.group_name, d.directory_name, g.external_id, g.display_name, g.description
        from authz.groups g
        join authz.directories d on d.directory_id = g.directory_id
        where g.group_name = $1 and g.status <> 'deleted'
        "#,
        name.as_str(),
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| Group {
        name: GroupName::stored(row.group_name),
        directory: DirectoryName::stored(row.directory_name),
        external_id: row.external_id,
        display_name: row.display_name,
        description: row.description,
    }))
}

/// The groups that are not deleted, by name: at most `limit` of those after `after`.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn list(
    executor: impl PgExecutor<'_>,
    after: Option<&GroupName>,
    limit: u32,
) -> Result<Vec<Group>, Error> {
    let rows = sqlx::query!(
        r#"
        select g.group_name, d.directory_name, g.external_id, g.display_name, g.description
        from authz.groups g
        join authz.directories d on d.directory_id = g.directory_id
        where g.group_name > $1 and g.status <> 'deleted'
        order by g.group_name
        limit $2
        "#,
        after.map_or("", GroupName::as_str),
        i64::from(limit),
    )
    .fetch_all(executor)
    .await?;
    let group = rows.into_iter().map(|row| Group {
        name: GroupName::stored(row.group_name),
        directory: DirectoryName::stored(row.directory_name),
        external_id: row.external_id,
        display_name: row.display_name,
        description: row.description,
    });
    Ok(group.collect())
}

/// Creates a local group.
///
/// # Errors
/// [`Error::GroupExists`] if a group of that name is there already.
pub async fn create<'c>(
    connection: impl Begin<'c>,
    name: &GroupName,
    description: &str,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin(connection, actor).await?;
    sqlx::query!(
        "insert into authz.groups (group_name, description) values ($1, $2)",
        name.as_str(),
        description
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| match constraint(&error) {
        Some("group_name_is_unique") => Error::GroupExists(name.clone()),
        _ => error.into(),
    })?;
    revision::commit(tx).await
}

/// Deletes a local group: the row stays as `deleted` for the record, without members, without being a
/// member, and without grants.
///
/// # Errors
/// [`Error::UnknownGroup`] or [`Error::OwnedByDirectory`].
pub async fn delete<'c>(
    connection: impl Begin<'c>,
    name: &GroupName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = local_id(&mut tx, name).await?;
    sqlx::query!("delete from authz.group_actions where group_id = $1", group_id).execute(&mut *tx).await?;
    sqlx::query!("delete from authz.group_groups where child_group_id = $1", group_id)
        .execute(&mut *tx)
        .await?;
    sqlx::query!("update authz.groups set status = 'deleted' where group_id = $1", group_id)
        .execute(&mut *tx)
        .await?;
    revision::commit(tx).await
}

/// Makes a user, of whichever directory, a member of a local group; an existing member gets the role.
///
/// # Errors
/// [`Error::UnknownGroup`], [`Error::UnknownUser`] or [`Error::OwnedByDirectory`].
pub async fn add_user<'c>(
    connection: impl Begin<'c>,
    group: &GroupName,
    member: &UserName,
    role: Role,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = local_id(&mut tx, group).await?;
    let user_id = user::id(&mut tx, member).await?;
    sqlx::query!(
        r#"
        insert into authz.group_users (group_id, user_id, role) values ($1, $2, $3)
        on conflict (group_id, user_id) do update set role = excluded.role where group_users.role <> excluded.role
        "#,
        group_id,
        user_id,
        role.as_str(),
    )
    .execute(&mut *tx)
    .await?;
    revision::commit(tx).await
}

/// Ends a user's membership of a local group; nothing changes if there was none.
///
/// # Errors
/// [`Error::UnknownGroup`], [`Error::UnknownUser`] or [`Error::OwnedByDirectory`].
pub async fn remove_user<'c>(
    connection: impl Begin<'c>,
    group: &GroupName,
    member: &UserName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = local_id(&mut tx, group).await?;
    let user_id = user::id(&mut tx, member).await?;
    sqlx::query!("delete from authz.group_users where group_id = $1 and user_id = $2", group_id, user_id)
        .execute(&mut *tx)
        .await?;
    revision::commit(tx).await
}

/// Makes `child`, of whichever directory, a member of the local group `parent`: whoever is in `child` then
/// has what `parent` is granted.
///
/// # Errors
/// [`Error::UnknownGroup`], [`Error::OwnedByDirectory`], or [`Error::Cycle`] if `child` already contains `parent`.
pub async fn add_group<'c>(
    connection: impl Begin<'c>,
    parent: &GroupName,
    child: &GroupName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let parent_id = local_id(&mut tx, parent).await?;
    let child_id = id(&mut tx, child).await?;
    let cycle = sqlx::query_scalar!(
        r#"select exists (select from authz.group_ancestors where group_id = $1 and ancestor_id = $2) as "cycle!""#,
        parent_id,
        child_id,
    )
    .fetch_one(&mut *tx)
    .await?;
    if cycle {
        return Err(Error::Cycle { parent: parent.clone(), child: child.clone() });
    }
    sqlx::query!(
        "insert into authz.group_groups (parent_group_id, child_group_id) values ($1, $2) on conflict do nothing",
        parent_id,
        child_id,
    )
    .execute(&mut *tx)
    .await?;
    revision::commit(tx).await
}

/// Takes `child` out of the local group `parent`; nothing changes if it was not in it.
///
/// # Errors
/// [`Error::UnknownGroup`] or [`Error::OwnedByDirectory`].
pub async fn remove_group<'c>(
    connection: impl Begin<'c>,
    parent: &GroupName,
    child: &GroupName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let parent_id = local_id(&mut tx, parent).await?;
    let child_id = id(&mut tx, child).await?;
    sqlx::query!(
        "delete from authz.group_groups where parent_group_id = $1 and child_group_id = $2",
        parent_id,
        child_id,
    )
    .execute(&mut *tx)
    .await?;
    revision::commit(tx).await
}

/// Makes everyone of a directory a member of a local group.
///
/// # Errors
/// [`Error::UnknownGroup`], [`Error::UnknownDirectory`] or [`Error::OwnedByDirectory`].
pub async fn add_everyone<'c>(
    connection: impl Begin<'c>,
    group: &GroupName,
    directory: &DirectoryName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = local_id(&mut tx, group).await?;
    let directory_id = directory_id(&mut tx, directory).await?;
    sqlx::query!(
        "insert into authz.group_directories (group_id, directory_id) values ($1, $2) on conflict do nothing",
        group_id,
        directory_id,
    )
    .execute(&mut *tx)
    .await?;
    revision::commit(tx).await
}

/// Ends what [`add_everyone`] began; nothing changes if it had not.
///
/// # Errors
/// [`Error::UnknownGroup`], [`Error::UnknownDirectory`] or [`Error::OwnedByDirectory`].
pub async fn remove_everyone<'c>(
    connection: impl Begin<'c>,
    group: &GroupName,
    directory: &DirectoryName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = local_id(&mut tx, group).await?;
    let directory_id = directory_id(&mut tx, directory).await?;
    sqlx::query!(
        "delete from authz.group_directories where group_id = $1 and directory_id = $2",
        group_id,
        directory_id,
    )
    .execute(&mut *tx)
    .await?;
    revision::commit(tx).await
}

/// The id of a group that is not deleted.
pub(crate) async fn id(connection: &mut PgConnection, name: &GroupName) -> Result<i64, Error> {
    sqlx::query_scalar!(
        "select group_id from authz.groups where group_name = $1 and status <> 'deleted'",
        name.as_str()
    )
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| Error::UnknownGroup(name.clone()))
}

async fn local_id(connection: &mut PgConnection, name: &GroupName) -> Result<i64, Error> {
    let row = sqlx::query!(
        r#"
        select g.group_id, g.directory_id, d.directory_name
        from authz.groups g
        join authz.directories d on d.directory_id = g.directory_id
        where g.group_name = $1 and g.status <> 'deleted'
        "#,
        name.as_str(),
    )
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| Error::UnknownGroup(name.clone()))?;
    if row.directory_id == 0 {
        Ok(row.group_id)
    } else {
        Err(Error::OwnedByDirectory { name: name.to_string(), directory: row.directory_name })
    }
}

async fn directory_id(connection: &mut PgConnection, name: &DirectoryName) -> Result<i32, Error> {
    sqlx::query_scalar!("select directory_id from authz.directories where directory_name = $1", name.as_str())
        .fetch_optional(connection)
        .await?
        .ok_or_else(|| Error::UnknownDirectory(name.clone()))
}
