//! Directories: how fresh what they mirror is.

use std::time::Duration;

use sqlx::PgExecutor;

use crate::error::Error;

/// Demands that every directory was synced completely within `max`.
///
/// Ask it before the check whose answer depends on it, in the same transaction or not: what is fresh enough now is as
/// fresh when the check runs. It judges all directories, since a right may come from any of them.
///
/// # Errors
/// [`Error::DirectoryStale`] if one was not: then nobody can tell who may do what, and it is neither allow nor
/// deny. [`Error::Database`] if the database does not answer.
pub async fn require_fresh(executor: impl PgExecutor<'_>, max: Duration) -> Result<(), Error> {
    match age(executor).await? {
        Some(age) if age <= max => Ok(()),
        age => Err(Error::DirectoryStale { age, max }),
    }
}

/// How long ago, by the database's clock, the directory that is furthest behind was synced completely. `None` if one
/// never was, zero if there is no directory but what is kept by hand. A directory from which nobody and nothing has come
/// yet, such as one that a first `dir-sync plan` has only looked at, does not count: no right comes from it.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn age(executor: impl PgExecutor<'_>) -> Result<Option<Duration>, Error> {
    let row = sqlx::query!(
        r#"
        select count(*) filter (where d.last_complete_sync_at is null) as "never!",
               extract(epoch from clock_timestamp() - min(d.last_complete_sync_at))::float8 as seconds
        from authz.directories d
        where d.directory_id <> 0
          and (d.last_complete_sync_at is not null
               or exists (select from authz.users u where u.directory_id = d.directory_id)
               or exists (select from authz.groups g where g.directory_id = d.directory_id)
               or exists (select from authz.group_directories gd where gd.directory_id = d.directory_id))
        "#
    )
    .fetch_one(executor)
    .await?;
    if row.never > 0 {
        return Ok(None);
    }
    // A clock that was set back shows as a negative age.
    Ok(Some(Duration::try_from_secs_f64(row.seconds.unwrap_or_default().max(0.0)).unwrap_or(Duration::MAX)))
}
