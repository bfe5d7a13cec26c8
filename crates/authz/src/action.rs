//! Actions: what can be done. A service registers its own when it starts.

use sqlx::PgExecutor;

use crate::audit::{self, Actor};
use crate::begin::Begin;
use crate::decision::Revision;
use crate::error::{Error, constraint};
use crate::name::ActionName;
use crate::revision;

/// A registered action.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registered {
    /// Its name.
    pub name: ActionName,
    /// What it does, for people who grant it.
    pub description: String,
}

/// Registers actions with their descriptions; those that exist keep their grants and get the new description.
/// Safe to call at every start, by several processes at once.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn register<'c>(
    connection: impl Begin<'c>,
    actions: &[(ActionName, &str)],
    actor: &Actor,
) -> Result<Revision, Error> {
    let (names, descriptions): (Vec<_>, Vec<_>) =
        actions.iter().map(|(name, text)| (name.to_string(), (*text).to_owned())).unzip();
    let mut tx = audit::begin(connection, actor).await?;
    sqlx::query!(
        r#"
        insert into authz.actions (action_name, description)
        select distinct on (name) name, description from unnest($1::text[], $2::text[]) as v (name, description)
        order by name
        on conflict (action_name) do update set description = excluded.description
            where actions.description <> excluded.description
        "#,
        &names,
        &descriptions,
    )
    .execute(&mut *tx)
    .await?;
    revision::commit(tx).await
}

/// Removes an action that nobody holds.
///
/// # Errors
/// [`Error::UnknownAction`], or [`Error::ActionInUse`] while a grant names it (patterns such as `workers.*` do not).
pub async fn unregister<'c>(
    connection: impl Begin<'c>,
    action: &ActionName,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin(connection, actor).await?;
    let removed = sqlx::query!("delete from authz.actions where action_name = $1", action.as_str())
        .execute(&mut *tx)
        .await
        .map_err(|error| match constraint(&error) {
            Some("granted_action_is_registered") => Error::ActionInUse(action.clone()),
            _ => error.into(),
        })?;
    if removed.rows_affected() == 0 {
        return Err(Error::UnknownAction(action.clone().into()));
    }
    revision::commit(tx).await
}

/// All registered actions, by name.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn list(executor: impl PgExecutor<'_>) -> Result<Vec<Registered>, Error> {
    let rows = sqlx::query!("select action_name, description from authz.actions order by action_name")
        .fetch_all(executor)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| Registered { name: ActionName::stored(row.action_name), description: row.description })
        .collect())
}
