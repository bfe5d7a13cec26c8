//! Starts without an end: recorded as abandoned once the process that ran them is gone.

use std::time::Duration;

use sqlx::PgExecutor;

use crate::error::Error;

/// Records as `abandoned` each operation that began more than `older_than` ago, has no end, and whose process no longer
/// renews its lease. Returns how many.
///
/// Every process that runs operations does this once a minute, so it need not be called; a job may do it where all
/// processes of a service may be gone. Any number may do it at once. An end that is recorded later (of a process
/// that was only cut off) stands beside the `abandoned`.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
// INVARIANT: one `abandoned` per start, since who takes away the row of the open operation writes it, in one
// statement (held by the test `concurrent_sweepers_record_each_operation_once`).
pub async fn sweep(executor: impl PgExecutor<'_>, older_than: Duration) -> Result<u64, Error> {
    let swept = sqlx::query!(
        r#"
        with gone as (
            select o.audit_id
            from authz.open_operations o
            where o.recorded_at < clock_timestamp() - make_interval(secs => $1)
              and not exists (select from authz.operation_owners w
                              where w.owner_id = o.owner_id and w.expires_at >= clock_timestamp())
            order by o.audit_id
            for update of o skip locked
        ),
        closed as (
            delete from authz.open_operations o using gone g where o.audit_id = g.audit_id
            returning o.audit_id, o.recorded_at
        ),
        forgotten as (
            delete from authz.operation_owners w
            where w.expires_at < clock_timestamp() - interval '1 day'
              and not exists (select from authz.open_operations o where o.owner_id = w.owner_id)
        )
        insert into authz.audit_log
            (service, actor, action, outcome, target, detail, request_id, revision, operation_id)
        select s.service, s.actor, s.action, 'abandoned', s.target,
               jsonb_build_object('reason', 'the process that ran it is gone', 'swept_by', authz.current_service()),
               s.request_id, s.revision, s.audit_id
        from closed c
        join authz.audit_log s on s.audit_id = c.audit_id and s.recorded_at = c.recorded_at
        "#,
        older_than.as_secs_f64(),
    )
    .execute(executor)
    .await?;
    Ok(swept.rows_affected())
}

/// Records as `abandoned` those of an owner's own starts that came into the trail although nobody was told so: what
/// they were to begin was never run. Returns their numbers.
pub(super) async fn disown(
    executor: impl PgExecutor<'_>,
    owner_id: i64,
    numbers: &[i64],
) -> Result<Vec<i64>, Error> {
    let disowned = sqlx::query_scalar!(
        r#"
        with closed as (
            delete from authz.open_operations where owner_id = $1 and number = any ($2)
            returning audit_id, recorded_at, number
        ),
        told as (
            insert into authz.audit_log
                (service, actor, action, outcome, target, detail, request_id, revision, operation_id)
            select s.service, s.actor, s.action, 'abandoned', s.target,
                   jsonb_build_object('reason', 'it was never run, since its start could not be confirmed'),
                   s.request_id, s.revision, s.audit_id
            from closed c
            join authz.audit_log s on s.audit_id = c.audit_id and s.recorded_at = c.recorded_at
        )
        select number from closed
        "#,
        owner_id,
        numbers,
    )
    .fetch_all(executor)
    .await?;
    Ok(disowned)
}
