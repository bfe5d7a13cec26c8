//! What is known of the runs so far: their history, and how fresh each directory is.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgExecutor, PgPool};

use super::lease::has_code;
use crate::error::Error;
use crate::name::DirectoryName;

/// A run as `authz.sync_runs` records it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RunRecord {
    /// Its number.
    pub run_id: i64,
    /// The directory.
    pub directory: String,
    /// Where it read from, in words.
    pub source: String,
    /// When it took the lease.
    pub started_at: DateTime<Utc>,
    /// When it ended; `None` while it is at work, or if it was killed and no other run came yet.
    pub finished_at: Option<DateTime<Utc>>,
    /// `running`, `applied`, `unchanged`, `planned`, `refused`, `partial`, `failed` or `abandoned`.
    pub status: String,
    /// The plan's hash, if it came to a plan.
    pub plan_hash: Option<String>,
    /// What was or would be changed: [`super::Counts`] as JSON.
    pub counts: Option<serde_json::Value>,
    /// API calls that it made.
    pub api_calls: Option<i64>,
    /// What failed, was refused, or is missing.
    pub message: Option<String>,
}

/// How fresh the mirror of a directory is, by the database's clock.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Freshness {
    /// The directory.
    pub directory: String,
    /// When the newest complete sync began to read; `None` if there was none.
    pub last_complete_sync_at: Option<DateTime<Utc>>,
    /// Seconds since then.
    pub age_seconds: Option<f64>,
    /// The newest run's number.
    pub last_run_id: Option<i64>,
    /// The newest run's status.
    pub last_status: Option<String>,
    /// When the newest run ended.
    pub last_finished_at: Option<DateTime<Utc>>,
    /// The run that holds the lease.
    pub lease_run_id: Option<i64>,
    /// For how many seconds the lease is good without another heartbeat; less than zero, and the run may be at work
    /// nonetheless: while it plans and applies it sends none ([`holder`]).
    pub lease_seconds: Option<f64>,
}

/// The newest runs, newest first, at most `limit`; of one directory or of all.
///
/// # Errors
/// [`Error::Database`] if the database does not answer, [`Error::NotMigrated`].
pub async fn runs(
    executor: impl PgExecutor<'_>,
    directory: Option<&DirectoryName>,
    limit: u32,
) -> Result<Vec<RunRecord>, Error> {
    Ok(sqlx::query_as!(
        RunRecord,
        r#"
        select r.run_id, d.directory_name as directory, r.source, r.started_at, r.finished_at, r.status, r.plan_hash,
               r.counts, r.api_calls, r.message
        from authz.sync_runs r
        join authz.directories d on d.directory_id = r.directory_id
        where $1::text is null or d.directory_name = $1
        order by r.run_id desc
        limit $2
        "#,
        directory.map(DirectoryName::as_str),
        i64::from(limit),
    )
    .fetch_all(executor)
    .await?)
}

/// How fresh the directories are that are synced, or the one that is named, by name.
///
/// # Errors
/// [`Error::UnknownDirectory`] if the named one is not known, [`Error::Database`] if the database does not answer,
/// [`Error::NotMigrated`].
pub async fn freshness(
    executor: impl PgExecutor<'_>,
    directory: Option<&DirectoryName>,
) -> Result<Vec<Freshness>, Error> {
    let found = sqlx::query_as!(
        Freshness,
        r#"
        select d.directory_name as directory, d.last_complete_sync_at,
               -- `greatest` alone makes zero of null: fresh, of what was never complete.
               case when d.last_complete_sync_at is not null
                    then greatest(extract(epoch from clock_timestamp() - d.last_complete_sync_at), 0)
               end::float8 as age_seconds,
               r.run_id as "last_run_id?", r.status as "last_status?", r.finished_at as last_finished_at,
               l.run_id as "lease_run_id?",
               extract(epoch from l.expires_at - clock_timestamp())::float8 as lease_seconds
        from authz.directories d
        left join lateral (
            select r.run_id, r.status, r.finished_at
            from authz.sync_runs r
            where r.directory_id = d.directory_id
            order by r.run_id desc
            limit 1
        ) r on true
        left join authz.sync_leases l on l.directory_id = d.directory_id
        where d.directory_id <> 0 and ($1::text is null or d.directory_name = $1)
        order by d.directory_name
        "#,
        directory.map(DirectoryName::as_str),
    )
    .fetch_all(executor)
    .await?;
    match directory {
        Some(directory) if found.is_empty() => Err(Error::UnknownDirectory(directory.clone())),
        _ => Ok(found),
    }
}

/// Whether the run that a lease is of is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Holder {
    /// There is no lease.
    None,
    /// It plans or applies: it has the lease locked.
    Applying,
    /// The lease is not locked: if it is over as well, the run is dead.
    NotApplying,
    /// This database role, or this server, does not let locks be tried.
    NotKnown,
}

/// Whether the holder of a directory's lease plans or applies. It then holds a lock and no heartbeat is heard of it, however
/// long that takes, so that a lease that is over does not say that it is dead. Changes nothing.
///
/// # Errors
/// [`Error::Database`] if the database does not answer, [`Error::NotMigrated`].
pub async fn holder(pool: &PgPool, directory: &DirectoryName) -> Result<Holder, Error> {
    let mut tx = crate::begin(pool).await?;
    let unlocked = sqlx::query_scalar!(
        r#"
        select l.run_id
        from authz.sync_leases l
        join authz.directories d on d.directory_id = l.directory_id
        where d.directory_name = $1
        for update of l skip locked
        "#,
        directory.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await;
    // Let go at once: whoever comes for the lease meanwhile waits for us.
    tx.rollback().await?;
    match unlocked {
        Ok(Some(_)) => return Ok(Holder::NotApplying),
        Ok(None) => {}
        // It may not lock, or nobody may: a hot standby.
        Err(error) if ["42501", "25006"].iter().any(|code| has_code(&error, code)) => {
            return Ok(Holder::NotKnown);
        }
        Err(error) => return Err(error.into()),
    }
    let held = sqlx::query_scalar!(
        r#"
        select exists (select from authz.sync_leases l join authz.directories d on d.directory_id = l.directory_id
                       where d.directory_name = $1) as "held!"
        "#,
        directory.as_str(),
    )
    .fetch_one(pool)
    .await?;
    Ok(if held { Holder::Applying } else { Holder::None })
}

/// What a sync has to be allowed to and this database role is not, as in `insert into authz.users`.
///
/// # Errors
/// [`Error::Database`] if the database does not answer, [`Error::NotMigrated`].
pub async fn missing_privileges(executor: impl PgExecutor<'_>) -> Result<Vec<String>, Error> {
    Ok(sqlx::query_scalar!(
        r#"
        select format('%s authz.%s', privilege, table_name) as "missing!"
        from (values
            ('directories', array['select', 'insert']),
            ('users', array['select', 'insert', 'update']),
            ('groups', array['select', 'insert', 'update']),
            ('group_users', array['select', 'insert', 'update', 'delete']),
            ('group_groups', array['select', 'insert', 'delete']),
            ('group_directories', array['select', 'insert', 'delete']),
            ('user_actions', array['select']),
            ('group_actions', array['select']),
            ('revision', array['select']),
            ('sync_runs', array['select', 'insert', 'update']),
            ('sync_leases', array['select', 'insert', 'update', 'delete']),
            ('sync_stage_users', array['select', 'insert', 'delete']),
            ('sync_stage_groups', array['select', 'insert', 'update', 'delete']),
            ('sync_stage_members', array['select', 'insert', 'delete']),
            ('sync_stage_gone_members', array['select', 'insert', 'delete']),
            ('sync_stage_unseen_users', array['select', 'insert', 'delete']),
            ('sync_plan_users', array['select', 'insert', 'update', 'delete']),
            ('sync_plan_groups', array['select', 'insert', 'update', 'delete']),
            ('sync_plan_members', array['select', 'insert', 'delete']),
            ('sync_plan_conflicts', array['select', 'insert', 'delete']),
            ('group_digests', array['select', 'insert', 'update']),
            ('group_outsiders', array['select', 'insert', 'delete'])
        ) as needed (table_name, privileges), unnest(privileges) as privilege
        where not has_table_privilege(format('authz.%I', table_name), privilege)
        union all
        select format('%s authz.%s', privilege, table_name)
        from (values ('directories', 'update'), ('audit_log', 'insert'), ('audit_log', 'select')) as in_part (table_name, privilege)
        where not has_any_column_privilege(format('authz.%I', table_name), privilege)
        union all
        select distinct format('execute authz.%s', name)
        from (values ('hold_revision()', current_user), ('analyze_staging()', current_user),
                     -- It is executed as who logged in.
                     ('watch_session(integer, timestamptz, interval)', current_user),
                     ('watch_session(integer, timestamptz, interval)', session_user)) as function (name, role)
        where not has_function_privilege(role, 'authz.' || name, 'execute')
        order by 1
        "#
    )
    .fetch_all(executor)
    .await?)
}
