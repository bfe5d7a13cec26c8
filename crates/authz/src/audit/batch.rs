//! Many records in one statement, so that they share one commit and one round trip.

use sqlx::{Connection, PgConnection};

use super::line::Line;

/// The columns of some records.
#[derive(Default)]
struct Columns<'l> {
    service: Vec<Option<&'l str>>,
    actor: Vec<&'l str>,
    action: Vec<&'l str>,
    outcome: Vec<&'l str>,
    target: Vec<Option<&'l str>>,
    detail: Vec<&'l str>,
    request_id: Vec<Option<&'l str>>,
    decision: Vec<Option<&'l str>>,
    revision: Vec<Option<i64>>,
    operation_id: Vec<Option<i64>>,
}

impl<'l> Columns<'l> {
    fn of(lines: impl Iterator<Item = &'l Line>) -> Self {
        let mut columns = Self::default();
        for line in lines {
            columns.service.push(line.service.as_deref());
            columns.actor.push(&line.actor);
            columns.action.push(&line.action);
            columns.outcome.push(line.outcome.as_str());
            columns.target.push(line.target.as_deref());
            columns.detail.push(&line.detail);
            columns.request_id.push(line.request_id.as_deref());
            columns.decision.push(line.decision.as_deref());
            columns.revision.push(line.revision);
            columns.operation_id.push(line.operation_id);
        }
        columns
    }
}

// Each statement turns `synchronous_commit` on for its own transaction, where it is off: "durable" must not depend on
// how the server, the database or the role is set. In the statement, because a setting of the session does not
// survive a pooler in transaction mode.
// INVARIANT: what was written is there after a crash of the server (held by the test
// `what_was_recorded_survives_a_crash_of_the_server`).

/// Makes Postgres plan each of these statements once per connection: planning one for its arrays costs as much as running
/// it. Behind a pooler in transaction mode this may be lost, which costs time alone.
pub(super) async fn prepare(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("select set_config('plan_cache_mode', 'force_generic_plan', false) as setting")
        .fetch_one(connection)
        .await?;
    Ok(())
}

/// Writes one record that neither begins nor ends an operation. Returns its number.
pub(super) async fn insert_one(connection: &mut PgConnection, line: &Line) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"
        insert into authz.audit_log
            (service, actor, action, outcome, target, detail, request_id, decision, revision, operation_id)
        select coalesce($1, authz.current_service()), $2, $3, $4, $5, ($6::text)::jsonb, $7, ($8::text)::jsonb,
               coalesce($9, (select revision from authz.revision)), $10
        from (select case when current_setting('synchronous_commit') = 'off'
                          then set_config('synchronous_commit', 'on', true) end) durable (setting)
        returning audit_id
        "#,
        line.service,
        line.actor,
        line.action,
        line.outcome.as_str(),
        line.target,
        line.detail,
        line.request_id,
        line.decision,
        line.revision,
        line.operation_id,
    )
    .fetch_one(connection)
    .await
}

/// Writes records that neither begin nor end an operation. Returns their numbers, in their order.
pub(super) async fn insert<'l>(
    connection: &mut PgConnection,
    lines: impl Iterator<Item = &'l Line>,
) -> Result<Vec<i64>, sqlx::Error> {
    let c = Columns::of(lines);
    sqlx::query_scalar!(
        r#"
        insert into authz.audit_log
            (service, actor, action, outcome, target, detail, request_id, decision, revision, operation_id)
        select coalesce(r.service, authz.current_service()), r.actor, r.action, r.outcome, r.target, r.detail::jsonb,
               r.request_id, r.decision::jsonb, coalesce(r.revision, (select revision from authz.revision)),
               r.operation_id
        from (select case when current_setting('synchronous_commit') = 'off'
                          then set_config('synchronous_commit', 'on', true) end) durable (setting)
        cross join unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                          $9::bigint[], $10::bigint[])
            r (service, actor, action, outcome, target, detail, request_id, decision, revision, operation_id)
        returning audit_id
        "#,
        &c.service as &[Option<&str>],
        &c.actor as &[&str],
        &c.action as &[&str],
        &c.outcome as &[&str],
        &c.target as &[Option<&str>],
        &c.detail as &[&str],
        &c.request_id as &[Option<&str>],
        &c.decision as &[Option<&str>],
        &c.revision as &[Option<i64>],
        &c.operation_id as &[Option<i64>],
    )
    .fetch_all(connection)
    .await
}

/// Writes records of any kind. A record with a number begins an operation of the owner, one with an `operation_id` ends
/// that operation.
pub(super) async fn insert_operations<'l>(
    connection: &mut PgConnection,
    lines: impl Iterator<Item = &'l Line>,
    numbers: &[Option<i64>],
    owner_id: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let c = Columns::of(lines);
    // Numbers of records are given in the order of `n`, so the k-th of them belongs to the k-th record.
    sqlx::query_scalar!(
        r#"
        with durable as materialized (
            select case when current_setting('synchronous_commit') = 'off'
                        then set_config('synchronous_commit', 'on', true) end as setting
        ),
        logged as (
            insert into authz.audit_log
                (service, actor, action, outcome, target, detail, request_id, decision, revision, operation_id)
            select coalesce(r.service, authz.current_service()), r.actor, r.action, r.outcome, r.target,
                   r.detail::jsonb, r.request_id, r.decision::jsonb,
                   coalesce(r.revision, (select revision from authz.revision)), r.operation_id
            from durable
            cross join unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
                              $8::text[], $9::bigint[], $10::bigint[]) with ordinality
                r (service, actor, action, outcome, target, detail, request_id, decision, revision, operation_id, n)
            order by r.n
            returning audit_id, recorded_at
        ),
        opened as (
            insert into authz.open_operations (audit_id, recorded_at, owner_id, number)
            select l.audit_id, l.recorded_at, $12, ($11::bigint[])[l.n]
            from (select audit_id, recorded_at, row_number() over (order by audit_id) as n from logged) l
            where ($11::bigint[])[l.n] is not null
        ),
        closed as (
            delete from authz.open_operations where audit_id = any ($10)
        )
        select audit_id as "audit_id!" from logged order by audit_id
        "#,
        &c.service as &[Option<&str>],
        &c.actor as &[&str],
        &c.action as &[&str],
        &c.outcome as &[&str],
        &c.target as &[Option<&str>],
        &c.detail as &[&str],
        &c.request_id as &[Option<&str>],
        &c.decision as &[Option<&str>],
        &c.revision as &[Option<i64>],
        &c.operation_id as &[Option<i64>],
        numbers as &[Option<i64>],
        owner_id,
    )
    .fetch_all(connection)
    .await
}

/// Writes the end of an operation that may have been written already, by a statement whose answer got lost: if it was,
/// nothing is written.
pub(super) async fn insert_end_once(connection: &mut PgConnection, line: &Line) -> Result<i64, sqlx::Error> {
    let mut tx = connection.begin().await?;
    // Waits for a lost statement that is still at work, so that the next one sees what it did.
    sqlx::query!(
        "select audit_id from authz.open_operations where audit_id = $1 for update",
        line.operation_id
    )
    .fetch_optional(&mut *tx)
    .await?;
    let written = sqlx::query_scalar!(
        r#"
        select audit_id from authz.audit_log where operation_id = $1 and outcome = $2 order by audit_id limit 1
        "#,
        line.operation_id,
        line.outcome.as_str(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    let audit_id = match written {
        Some(audit_id) => audit_id,
        None => insert_operations(&mut tx, std::iter::once(line), &[None], 0)
            .await?
            .pop()
            .ok_or(sqlx::Error::RowNotFound)?,
    };
    tx.commit().await?;
    Ok(audit_id)
}

/// Takes a lease as a new owner of operations. Returns its id.
pub(super) async fn new_owner(connection: &mut PgConnection, seconds: f64) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"
        insert into authz.operation_owners (service, expires_at)
        values (authz.current_service(), clock_timestamp() + make_interval(secs => $1))
        returning owner_id
        "#,
        seconds,
    )
    .fetch_one(connection)
    .await
}

/// Renews the lease. False if it is not there any more.
pub(super) async fn renew(
    connection: &mut PgConnection,
    owner_id: i64,
    seconds: f64,
) -> Result<bool, sqlx::Error> {
    let renewed = sqlx::query!(
        r#"
        update authz.operation_owners set expires_at = clock_timestamp() + make_interval(secs => $2)
        where owner_id = $1
        "#,
        owner_id,
        seconds,
    )
    .execute(connection)
    .await?;
    Ok(renewed.rows_affected() == 1)
}

/// Gives the lease back, unless something that it covers is still open.
pub(super) async fn retire(connection: &mut PgConnection, owner_id: i64) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        delete from authz.operation_owners w
        where w.owner_id = $1 and not exists (select from authz.open_operations o where o.owner_id = w.owner_id)
        "#,
        owner_id,
    )
    .execute(connection)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use sqlx::PgPool;

    use super::*;
    use crate::audit::Outcome;

    fn line(outcome: Outcome, operation_id: Option<i64>) -> Line {
        Line {
            service: None,
            actor: "ada".to_owned(),
            action: "workers.scale".to_owned(),
            outcome,
            target: None,
            detail: "{}".to_owned(),
            request_id: None,
            decision: None,
            revision: None,
            operation_id,
        }
    }

    #[tokio::test]
    async fn end_whose_answer_got_lost_is_not_written_twice() {
        let database = testdb::Database::empty().await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        crate::migrate(&pool).await.unwrap();
        let mut connection = pool.acquire().await.unwrap();
        let lines = [line(Outcome::Started, None), line(Outcome::Denied, None), line(Outcome::Started, None)];
        let ids =
            insert_operations(&mut connection, lines.iter(), &[Some(1), None, Some(2)], 7).await.unwrap();
        let open: Vec<(i64, i64)> =
            sqlx::query_as("select audit_id, number from authz.open_operations order by 1")
                .fetch_all(&mut *connection)
                .await
                .unwrap();
        assert_eq!(open, [(ids[0], 1), (ids[2], 2)]);

        // Written, and nobody heard of it.
        let end = line(Outcome::Succeeded, Some(ids[0]));
        let written = insert_operations(&mut connection, std::iter::once(&end), &[None], 0).await.unwrap();
        assert_eq!(insert_end_once(&mut connection, &end).await.unwrap(), written[0]);
        // Not written.
        let end = line(Outcome::Failed, Some(ids[2]));
        let once = insert_end_once(&mut connection, &end).await.unwrap();
        assert_eq!(insert_end_once(&mut connection, &end).await.unwrap(), once);
        let ends: i64 =
            sqlx::query_scalar("select count(*) from authz.audit_log where operation_id is not null")
                .fetch_one(&mut *connection)
                .await
                .unwrap();
        assert_eq!(ends, 2);
    }
}
