//! Starts without an end: recorded as abandoned once the process that ran them is gone.

use std::time::Duration;

use sqlx::PgExecutor;

use crate::error::Error;

/// Records as `abandoned` each operation that began more than `older_than` ago, has no end, and whose process no longer
/// renews its lease. Returns how many.
///
/// Every process that runs operations does this once a minute, so it need not be called; a job may do it where all
/// processes of a service may be gone. Any number may do it at once. An end that is recorded later (of a process
/// that was only cut off) stands beside the `abandoned`, whose detail says in `swept_by` which program swept.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn sweep(executor: impl PgExecutor<'_>, older_than: Duration) -> Result<u64, Error> {
    // A function of the database, since a service may not read what it copies from the start.
    let swept = sqlx::query_scalar!(
        r#"select authz.sweep_operations(make_interval(secs => $1)) as "swept!""#,
        older_than.as_secs_f64(),
    )
    .fetch_one(executor)
    .await?;
    Ok(swept.unsigned_abs())
}

/// Records as `abandoned` those of an owner's own starts that came into the trail although nobody was told so: what
/// they were to begin was never run. Returns their numbers.
pub(super) async fn disown(
    executor: impl PgExecutor<'_>,
    owner_id: i64,
    numbers: &[i64],
) -> Result<Vec<i64>, Error> {
    let disowned = sqlx::query_scalar!(
        r#"select number as "number!" from authz.disown_operations($1, $2) as disowned (number)"#,
        owner_id,
        numbers,
    )
    .fetch_all(executor)
    .await?;
    Ok(disowned)
}
