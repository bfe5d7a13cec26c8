//! Grants: a user's or group's right to an action, with who gave it, why, and until when.

use chrono::{DateTime, Utc};
use sqlx::PgExecutor;

use crate::audit::{self, Actor};
use crate::begin::Begin;
use crate::decision::Revision;
use crate::error::{Error, constraint};
use crate::name::{ActionPattern, GroupName, UserName};
use crate::{group, revision, user};

/// What is granted, and why. The actor of the call is who grants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    pattern: ActionPattern,
    reason: String,
    expires_at: Option<DateTime<Utc>>,
}

impl Grant {
    /// Grants an action (or a pattern such as `workers.*`) for a reason, without an end.
    #[must_use]
    pub fn new(pattern: impl Into<ActionPattern>, reason: impl Into<String>) -> Self {
        Self { pattern: pattern.into(), reason: reason.into(), expires_at: None }
    }

    /// Ends the grant at that moment, by the database's clock.
    #[must_use]
    pub fn until(mut self, expires_at: DateTime<Utc>) -> Self {
        self.expires_at = Some(expires_at);
        self
    }

    /// Whether its end has come already, by the database's clock, so that it would give nobody anything.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn has_ended(&self, executor: impl PgExecutor<'_>) -> Result<bool, Error> {
        let Some(expires_at) = self.expires_at else { return Ok(false) };
        let ended =
            sqlx::query_scalar!(r#"select $1::timestamptz <= clock_timestamp() as "ended!""#, expires_at);
        Ok(ended.fetch_one(executor).await?)
    }
}

/// A grant as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StandingGrant {
    /// What is granted.
    pub pattern: ActionPattern,
    /// By whom.
    pub granted_by: String,
    /// When.
    pub granted_at: DateTime<Utc>,
    /// Until when; `None` for ever.
    pub expires_at: Option<DateTime<Utc>>,
    /// Why.
    pub reason: String,
}

/// Grants to a user. A grant of the same pattern is replaced: its end, reason and giver are the new ones.
///
/// # Errors
/// [`Error::UnknownUser`], or [`Error::UnknownAction`] if the pattern is an exact action that is not registered.
pub async fn to_user<'c>(
    connection: impl Begin<'c>,
    holder: &UserName,
    grant: &Grant,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let user_id = user::id(&mut tx, holder).await?;
    sqlx::query!(
        r#"
        insert into authz.user_actions (user_id, action_name, granted_by, granted_at, expires_at, reason)
        values ($1, $2, $3, statement_timestamp(), $4, $5)
        on conflict (user_id, action_name) do update
            set granted_by = excluded.granted_by, granted_at = excluded.granted_at,
                expires_at = excluded.expires_at, reason = excluded.reason
        "#,
        user_id,
        grant.pattern.as_str(),
        actor.name(),
        grant.expires_at,
        grant.reason,
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| unregistered(error, &grant.pattern))?;
    revision::commit(tx).await
}

/// Grants to a group: everyone in it, and in the groups inside it. A grant of the same pattern is replaced.
///
/// # Errors
/// [`Error::UnknownGroup`], or [`Error::UnknownAction`] if the pattern is an exact action that is not registered.
pub async fn to_group<'c>(
    connection: impl Begin<'c>,
    holder: &GroupName,
    grant: &Grant,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = group::id(&mut tx, holder).await?;
    sqlx::query!(
        r#"
        insert into authz.group_actions (group_id, action_name, granted_by, granted_at, expires_at, reason)
        values ($1, $2, $3, statement_timestamp(), $4, $5)
        on conflict (group_id, action_name) do update
            set granted_by = excluded.granted_by, granted_at = excluded.granted_at,
                expires_at = excluded.expires_at, reason = excluded.reason
        "#,
        group_id,
        grant.pattern.as_str(),
        actor.name(),
        grant.expires_at,
        grant.reason,
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| unregistered(error, &grant.pattern))?;
    revision::commit(tx).await
}

/// Revokes what was granted to a user under exactly that pattern.
///
/// # Errors
/// [`Error::UnknownUser`] or [`Error::NoSuchGrant`].
pub async fn revoke_from_user<'c>(
    connection: impl Begin<'c>,
    holder: &UserName,
    pattern: &ActionPattern,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let user_id = user::id(&mut tx, holder).await?;
    let revoked = sqlx::query!(
        "delete from authz.user_actions where user_id = $1 and action_name = $2",
        user_id,
        pattern.as_str()
    )
    .execute(&mut *tx)
    .await?;
    if revoked.rows_affected() == 0 {
        return Err(Error::NoSuchGrant { holder: holder.to_string(), pattern: pattern.clone() });
    }
    revision::commit(tx).await
}

/// Revokes what was granted to a group under exactly that pattern.
///
/// # Errors
/// [`Error::UnknownGroup`] or [`Error::NoSuchGrant`].
pub async fn revoke_from_group<'c>(
    connection: impl Begin<'c>,
    holder: &GroupName,
    pattern: &ActionPattern,
    actor: &Actor,
) -> Result<Revision, Error> {
    let mut tx = audit::begin_in_turn(connection, actor).await?;
    let group_id = group::id(&mut tx, holder).await?;
    let revoked = sqlx::query!(
        "delete from authz.group_actions where group_id = $1 and action_name = $2",
        group_id,
        pattern.as_str()
    )
    .execute(&mut *tx)
    .await?;
    if revoked.rows_affected() == 0 {
        return Err(Error::NoSuchGrant { holder: holder.to_string(), pattern: pattern.clone() });
    }
    revision::commit(tx).await
}

/// The grants to a user, expired ones included, by pattern. What the user has through groups is not here.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn of_user(executor: impl PgExecutor<'_>, holder: &UserName) -> Result<Vec<StandingGrant>, Error> {
    let rows = sqlx::query_as!(
        GrantRow,
        r#"
        select ua.action_name, ua.granted_by, ua.granted_at, ua.expires_at, ua.reason
        from authz.users u
        join authz.user_actions ua on ua.user_id = u.user_id
        where u.user_name = $1 and u.status <> 'deleted'
        order by ua.action_name
        "#,
        holder.as_str(),
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(StandingGrant::from).collect())
}

/// The grants to a group, expired ones included, by pattern. What it has through groups above is not here.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn of_group(
    executor: impl PgExecutor<'_>,
    holder: &GroupName,
) -> Result<Vec<StandingGrant>, Error> {
    let rows = sqlx::query_as!(
        GrantRow,
        r#"
        select ga.action_name, ga.granted_by, ga.granted_at, ga.expires_at, ga.reason
        from authz.groups g
        join authz.group_actions ga on ga.group_id = g.group_id
        where g.group_name = $1 and g.status <> 'deleted'
        order by ga.action_name
        "#,
        holder.as_str(),
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(StandingGrant::from).collect())
}

struct GrantRow {
    action_name: String,
    granted_by: String,
    granted_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    reason: String,
}

impl From<GrantRow> for StandingGrant {
    fn from(row: GrantRow) -> Self {
        Self {
            pattern: ActionPattern::stored(row.action_name),
            granted_by: row.granted_by,
            granted_at: row.granted_at,
            expires_at: row.expires_at,
            reason: row.reason,
        }
    }
}

fn unregistered(error: sqlx::Error, pattern: &ActionPattern) -> Error {
    match constraint(&error) {
        Some("granted_action_is_registered") => Error::UnknownAction(pattern.clone()),
        _ => error.into(),
    }
}
