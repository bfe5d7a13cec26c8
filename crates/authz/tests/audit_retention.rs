//! Months: partitions made ahead, old ones exported and dropped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;
#[path = "support/trail.rs"]
mod trail;

use std::fs::File;

use authz::Error;
use authz::audit::retention::{make_partitions, prune};
use authz::audit::{
    Moment, Problem, Trust, checkpoint, export, seal, verify, verify_exports, verify_state, who_could,
};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, Executor, PgPool};
use support::admin;
use trail::{fill, old_months, spoil, this_month};

async fn partitions(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select inhrelid::regclass::text from pg_inherits where inhparent = 'authz.audit_log'::regclass order by 1")
        .fetch_all(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn months_are_made_ahead_and_take_their_records_from_the_default() {
    let (_database, pool) = support::database().await;
    let before = partitions(&pool).await;
    assert_eq!(before.len(), 5, "{before:?}");
    assert_eq!(make_partitions(&pool, 3).await.unwrap(), 0);
    assert_eq!(make_partitions(&pool, 5).await.unwrap(), 2);
    old_months(&pool).await;
    let in_default: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log_default").fetch_one(&pool).await.unwrap();
    assert!(in_default > 24);
    assert_eq!(make_partitions(&pool, 3).await.unwrap(), 3);
    let left: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log_default").fetch_one(&pool).await.unwrap();
    let all: i64 = sqlx::query_scalar("select count(*) from authz.audit_log where action not like 'state.%'")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!((left, all), (0, in_default));
    for partition in partitions(&pool).await {
        for statement in [
            format!("update {partition} set actor = ''"),
            format!("delete from {partition}"),
            format!("truncate {partition}"),
        ] {
            let error = pool.execute(&*statement.leak()).await.unwrap_err().to_string();
            assert!(error.contains("append-only"), "{partition}: {error}");
        }
    }
}

#[tokio::test]
async fn old_months_are_exported_and_dropped_and_all_still_verifies() {
    let (_database, pool) = support::database().await;
    old_months(&pool).await;
    fill(&pool, 8).await;
    seal(&pool, None).await.unwrap();
    let total = verify(&pool, &Trust::new()).await.unwrap().records;
    let this_month = this_month(&pool).await;
    let last_month = this_month.checked_sub_months(chrono::Months::new(1)).unwrap();
    let folder = tempfile::tempdir().unwrap();

    let pruned = prune(&pool, last_month, folder.path(), None, &admin()).await.unwrap();
    assert_eq!(pruned.dropped.len(), 2, "{pruned:?}");
    let report = verify(&pool, &Trust::new()).await.unwrap();
    assert_eq!((report.finding.as_ref(), report.pruned > 0), (None, true));
    assert!(report.records < total);
    assert_eq!(report.pruned_before.unwrap().date_naive(), last_month);
    assert!(verify_state(&pool).await.unwrap().is_empty());
    let again = prune(&pool, last_month, folder.path(), None, &admin()).await.unwrap();
    assert_eq!((again.dropped.len(), again.file), (0, None));

    fill(&pool, 4).await;
    let second = prune(&pool, this_month, folder.path(), None, &admin()).await.unwrap();
    assert_eq!(second.dropped.len(), 1);
    let report = verify(&pool, &Trust::new()).await.unwrap();
    assert_eq!(report.finding, None);
    let trust = Trust::new().checkpoint(checkpoint(&pool).await.unwrap().unwrap());
    let files = [pruned.file.unwrap(), second.file.unwrap()].map(|file| File::open(file).unwrap());
    let offline = verify_exports(files, &trust).unwrap();
    assert_eq!((offline.finding, offline.pruned), (None, 0), "the files are the whole chain");
    assert_eq!(offline.records, report.records + report.pruned);
    // The grants of the months that are gone are still accounted for.
    assert!(verify_state(&pool).await.unwrap().is_empty());
    spoil(&pool, &["delete from authz.user_actions where action_name = 'month3.*'"]).await;
    assert_eq!(verify_state(&pool).await.unwrap().len(), 1);

    // What retention left is guarded as before.
    let id: i64 =
        sqlx::query_scalar("select min(audit_id) from authz.audit_log").fetch_one(&pool).await.unwrap();
    spoil(&pool, &[format!("delete from authz.audit_log where audit_id = {id}").leak()]).await;
    let finding = verify(&pool, &Trust::new()).await.unwrap().finding.unwrap();
    assert_eq!((finding.problem, finding.audit_id), (Problem::RecordRemoved, Some(id)));
}

#[tokio::test]
async fn nothing_is_dropped_while_something_is_wrong() {
    let (_database, pool) = support::database().await;
    old_months(&pool).await;
    make_partitions(&pool, 3).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let this_month = this_month(&pool).await;
    let before = partitions(&pool).await;
    let attempt = async || prune(&pool, this_month, folder.path(), None, &admin()).await.unwrap_err();

    spoil(&pool, &["insert into authz.user_actions (user_id, action_name) values (1, 'slipped.in.*')"]).await;
    assert!(matches!(attempt().await, Error::StateDiffers(1)));
    spoil(&pool, &["delete from authz.user_actions where action_name = 'slipped.in.*'"]).await;

    seal(&pool, None).await.unwrap();
    pool.execute("create table kept as select * from authz.audit_log").await.unwrap();
    spoil(&pool, &["update authz.audit_log set actor = 'x' where audit_id = 2"]).await;
    assert!(matches!(attempt().await, Error::TrailAltered(finding) if finding.audit_id == Some(2)));
    spoil(
        &pool,
        &["update authz.audit_log a set actor = k.actor from kept k where a.audit_id = 2 and k.audit_id = 2"],
    )
    .await;

    // A file that is there is not written over.
    let taken = verify(&pool, &Trust::new()).await.unwrap().seals;
    let name = folder.path().join(format!("audit-{:012}-{taken:012}.ndjson.gz", 1));
    std::fs::write(&name, "kept").unwrap();
    assert!(matches!(attempt().await, Error::Export(_)));
    assert_eq!(std::fs::read(&name).unwrap(), b"kept");
    std::fs::remove_file(name).unwrap();

    // A record of an old month whose transaction has not ended is in no export, so its month stays; and so does nothing
    // of the attempt.
    let mut open = pool.begin().await.unwrap();
    sqlx::query("insert into authz.audit_log (recorded_at, service, actor, action, outcome) select recorded_at, '', '', '', 'denied' from kept limit 1")
        .execute(&mut *open)
        .await
        .unwrap();
    let blocked = tokio::join!(attempt(), async {
        // The last step waits for writers; let this one end when the export is there.
        while std::fs::read_dir(folder.path()).unwrap().next().is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        open.commit().await.unwrap();
    });
    assert!(matches!(blocked.0, Error::MonthNotRemovable { .. }), "{:?}", blocked.0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    assert_eq!(partitions(&pool).await, before);
    let month = this_month.checked_add_months(chrono::Months::new(1)).unwrap();
    assert!(prune(&pool, month, folder.path(), None, &admin()).await.is_err(), "not the month under way");
    assert_eq!(partitions(&pool).await, before);
}

/// Retention takes whole months, so nobody can call something else by its name.
#[tokio::test]
async fn no_record_of_retention_excuses_part_of_a_month() {
    let (_database, pool) = support::database().await;
    old_months(&pool).await;
    make_partitions(&pool, 3).await.unwrap();
    seal(&pool, None).await.unwrap();
    let kept = checkpoint(&pool).await.unwrap().unwrap();
    let trust = Trust::new().checkpoint(kept.clone());
    let first: i64 = sqlx::query_scalar(
        "select min(audit_id) from authz.audit_log where recorded_at < date_trunc('month', now() at time zone 'UTC') at time zone 'UTC'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    spoil(&pool, &[format!("delete from authz.audit_log where audit_id = {first}").leak()]).await;
    // The owner of the schema tells of a retention that there was not; whoever else tells of one is not believed.
    let forged = format!(
        "select authz.note_audit_prune(jsonb_build_object('through_seal', {}, 'before_micros',
             extract(epoch from date_trunc('month', now() at time zone 'UTC') - timestamp '2000-01-01') * 1000000))",
        kept.seal_id
    );
    pool.execute(&*forged.leak()).await.unwrap();
    let report = verify(&pool, &trust).await.unwrap();
    let finding = report.finding.unwrap();
    assert_eq!((finding.problem, finding.audit_id), (Problem::RecordRemoved, Some(first)));
    assert!(report.pruned_before.is_some());
    let exported = authz::audit::export(&pool, 1, None, &mut Vec::new()).await;
    assert!(matches!(exported, Err(Error::TrailAltered(_))), "{exported:?}");
}

#[tokio::test]
async fn the_month_under_way_is_excused_by_nothing() {
    let (_database, pool) = support::database().await;
    fill(&pool, 8).await;
    seal(&pool, None).await.unwrap();
    spoil(&pool, &["delete from authz.audit_log"]).await;
    pool.execute(
        "select authz.note_audit_prune('{\"through_seal\": 1000000, \"before_micros\": 9000000000000000}')",
    )
    .await
    .unwrap();
    let report = verify(&pool, &Trust::new()).await.unwrap();
    assert_eq!(report.finding.unwrap().problem, Problem::RecordRemoved);
    assert_eq!(report.pruned_before, None);
}

/// The last step of `prune`, up to its commit: the months before this one are gone.
async fn drop_old_months(tx: &mut sqlx::PgConnection, through_seal: i64) {
    tx.execute("select authz.hold_audit_trail(exclusive => true)").await.unwrap();
    tx.execute("select authz.write_audit_baseline()").await.unwrap();
    let dropped: i32 = sqlx::query_scalar(
        "select cardinality(authz.drop_audit_months(date_trunc('month', now() at time zone 'UTC')::date))",
    )
    .fetch_one(&mut *tx)
    .await
    .unwrap();
    assert_eq!(dropped, 3);
    sqlx::query(
        "select authz.note_audit_prune(jsonb_build_object('through_seal', $1, 'before_micros',
             extract(epoch from date_trunc('month', now() at time zone 'UTC') - timestamp '2000-01-01') * 1000000))",
    )
    .bind(through_seal)
    .execute(tx)
    .await
    .unwrap();
}

#[tokio::test]
async fn readers_that_wait_for_a_prune_see_what_it_left() {
    let (_database, pool) = support::database().await;
    old_months(&pool).await;
    let action = support::action("month3.run");
    authz::action::register(&pool, &[(action.clone(), "")], &admin()).await.unwrap();
    make_partitions(&pool, 3).await.unwrap();
    let last = seal(&pool, None).await.unwrap().checkpoint.unwrap();
    let trust = Trust::new().checkpoint(last.clone());
    let now = sqlx::query_scalar("select now() + interval '1 hour'").fetch_one(&pool).await.unwrap();

    let mut retention = pool.begin().await.unwrap();
    drop_old_months(&mut retention, last.seal_id).await;
    let ((verified, exported, state, access), ()) = tokio::join!(
        async {
            let mut reader = pool.acquire().await.unwrap();
            let mut tx = reader.begin_with("begin isolation level repeatable read read only").await.unwrap();
            let mut file = Vec::new();
            tokio::join!(
                verify(&pool, &trust),
                async { export(&pool, last.seal_id, None, &mut file).await },
                verify_state(&pool),
                who_could(&mut tx, &action, Moment::At(now)),
            )
        },
        async {
            loop {
                let waiting: i64 = sqlx::query_scalar(
                    "select count(*) from pg_locks where not granted and relation = 'authz.audit_log'::regclass",
                )
                .fetch_one(&pool)
                .await
                .unwrap();
                if waiting == 4 {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            retention.commit().await.unwrap();
        },
    );
    let report = verified.unwrap();
    assert_eq!((report.finding, report.pruned > 0), (None, true));
    assert!(exported.is_ok(), "{exported:?}");
    assert_eq!(state.unwrap(), []);
    let users: Vec<_> = access.unwrap().into_iter().map(|access| access.user.to_string()).collect();
    assert_eq!(users, ["a"]);
}

#[tokio::test]
async fn one_connection_is_enough_to_prune() {
    let (database, pool) = support::database().await;
    old_months(&pool).await;
    let one = PgPoolOptions::new().max_connections(1).connect(database.url()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let month = this_month(&pool).await;
    let pruned = prune(&one, month, folder.path(), None, &admin()).await.unwrap();
    assert_eq!(pruned.dropped.len(), 3);
    let again = prune(&one, month, folder.path(), None, &admin()).await.unwrap();
    assert!(again.dropped.is_empty());
}
