//! Users: those that a directory lists, and local ones that are kept by hand.

use sqlx::{PgConnection, PgExecutor};

use crate::audit::{self, Actor};
use crate::begin::Begin;
use crate::decision::Revision;
use crate::error::{Error, constraint};
use crate::name::{DirectoryName, UserName};
use crate::revision;

/// Whether a user counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum UserStatus {
    /// Checks are answered by the grants.
    Active,
    /// Suspended or archived: every check is a deny.
    Suspended,
    /// A member of a group whom no directory lists; checks are answered by the grants.
    External,
    /// Gone: every check is a deny, the grants stay in case the directory restores the user.
    Deleted,
}

impl std::str::FromStr for UserStatus {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "active" => Ok(Self::Active),
            "suspended" => Ok(Self::Suspended),
            "external" => Ok(Self::External),
            "deleted" => Ok(Self::Deleted),
            _ => Err(Error::Unreadable { what: format!("the user status `{text}`") }),
        }
    }
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct User {
    /// The e-mail address, as a rule.
    pub name: UserName,
    /// The directory that lists the user; `None` for an external one.
    pub directory: Option<DirectoryName>,
    /// The directory's immutable id, which is the `sub` of an OpenID Connect login.
    pub external_id: Option<String>,
    /// For people.
    pub display_name: String,
    /// Whether the user counts.
    pub status: UserStatus,
}

/// The user of that name, unless deleted.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn find(executor: impl PgExecutor<'_>, name: &UserName) -> Result<Option<User>, Error> {
    let row = sqlx::query!(
        r#"
        select u.user_name, d.directory_name as "directory_name?", u.external_id, u.display_name, u.status
        from authz.users u
        left join authz.directories d on d.directory_id = u.directory_id
        where u.user_name = $1 and u.status <> 'deleted'
        "#,
        name.as_str(),
    )
    .fetch_optional(executor)
    .await?;
    row.map(|row| {
        Ok(User {
            name: UserName::stored(row.user_name),
            directory: row.directory_name.map(DirectoryName::stored),
            external_id: row.external_id,
            display_name: row.display_name,
            status: row.status.parse()?,
        })
    })
    .transpose()
}

/// The users that are not deleted, by name: at most `limit` of those after `after`.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn list(
    executor: impl PgExecutor<'_>,
    after: Option<&UserName>,
    limit: u32,
) -> Result<Vec<User>, Error> {
    let rows = sqlx::query!(
        r#"
        select u.user_name, d.directory_name as "directory_name?", u.external_id, u.display_name, u.status
        from authz.users u
        left join authz.directories d on d.directory_id = u.directory_id
        where u.user_name > $1 and u.status <> 'deleted'
        order by u.user_name
        limit $2
        "#,
        after.map_or("", UserName::as_str),
        i64::from(limit),
    )
    .fetch_all(executor)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(User {
                name: UserName::stored(row.user_name),
                directory: row.directory_name.map(DirectoryName::stored),
                external_id: row.external_id,
                display_name: row.display_name,
                status: row.status.parse()?,
            })
        })
        .collect()
}

/// Creates a local user: one that no directory keeps, for example of a job.
///
/// # Errors
/// [`Error::UserExists`] if a user of that name is there already.
pub async fn create<'c>(
    connection: impl Begin<'c>,
    name: &UserName,
    display_name: &str,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin(connection, actor).await?;
    sqlx::query!(
        "insert into authz.users (user_name, display_name, directory_id) values ($1, $2, 0)",
        name.as_str(),
        display_name,
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| match constraint(&error) {
        Some("user_name_is_unique") => Error::UserExists(name.clone()),
        _ => error.into(),
    })?;
    revision::commit(tx).await
}

/// Suspends a local user, or lets a suspended one act again. A directory's users are suspended there.
///
/// # Errors
/// [`Error::UnknownUser`] or [`Error::OwnedByDirectory`].
pub async fn set_suspended<'c>(
    connection: impl Begin<'c>,
    name: &UserName,
    suspended: bool,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let user_id = local_id(&mut tx, name).await?;
    let status = if suspended { "suspended" } else { "active" };
    sqlx::query!("update authz.users set status = $2 where user_id = $1 and status <> $2", user_id, status)
        .execute(&mut *tx)
        .await?;
    revision::commit(tx).await
}

/// Deletes a local user: the row stays as `deleted` for the record, without memberships and grants, so a
/// later user of the same name starts with nothing.
///
/// # Errors
/// [`Error::UnknownUser`] or [`Error::OwnedByDirectory`].
pub async fn delete<'c>(
    connection: impl Begin<'c>,
    name: &UserName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let user_id = local_id(&mut tx, name).await?;
    sqlx::query!("delete from authz.group_users where user_id = $1", user_id).execute(&mut *tx).await?;
    sqlx::query!("delete from authz.user_actions where user_id = $1", user_id).execute(&mut *tx).await?;
    sqlx::query!("update authz.users set status = 'deleted' where user_id = $1", user_id)
        .execute(&mut *tx)
        .await?;
    revision::commit(tx).await
}

/// The id of a user that is not deleted.
pub(crate) async fn id(connection: &mut PgConnection, name: &UserName) -> Result<i64, Error> {
    sqlx::query_scalar!(
        "select user_id from authz.users where user_name = $1 and status <> 'deleted'",
        name.as_str()
    )
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| Error::UnknownUser(name.clone()))
}

async fn local_id(connection: &mut PgConnection, name: &UserName) -> Result<i64, Error> {
    let row = sqlx::query!(
        r#"
        select u.user_id, u.directory_id, d.directory_name as "directory_name?"
        from authz.users u
        left join authz.directories d on d.directory_id = u.directory_id
        where u.user_name = $1 and u.status <> 'deleted'
        "#,
        name.as_str(),
    )
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| Error::UnknownUser(name.clone()))?;
    match row.directory_id {
        Some(0) => Ok(row.user_id),
        _ => Err(Error::OwnedByDirectory {
            name: name.to_string(),
            directory: row.directory_name.unwrap_or_else(|| "(external members)".to_owned()),
        }),
    }
}
