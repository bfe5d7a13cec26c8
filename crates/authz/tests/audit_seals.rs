//! Seals: what they show, and that they show nothing where nothing is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;
#[path = "support/trail.rs"]
mod trail;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use authz::audit::{self, Checkpoint, Outcome, Problem, Record, Sealer, SigningKey, Trust, seal, verify};
use sqlx::{Executor, PgPool};
use support::admin;
use trail::{fill, spoil};

async fn clean(pool: &PgPool) -> audit::Report {
    let report = verify(pool, &Trust::new()).await.unwrap();
    assert_eq!(report.finding, None);
    report
}

async fn problem(pool: &PgPool, trust: &Trust) -> (Problem, Option<i64>) {
    let finding = verify(pool, trust).await.unwrap().finding.expect("nothing was found");
    (finding.problem, finding.audit_id)
}

/// Three seals of ten records or so; numbers are 1, 2, 3 …
async fn sealed_thrice(pool: &PgPool) -> Vec<Checkpoint> {
    let mut checkpoints = Vec::new();
    for _ in 0..3 {
        fill(pool, 10).await;
        checkpoints.push(seal(pool, None).await.unwrap().checkpoint.unwrap());
    }
    checkpoints
}

#[tokio::test]
async fn sealed_records_verify_and_later_ones_are_counted() {
    let (_database, pool) = support::database().await;
    assert_eq!(seal(&pool, None).await.unwrap().checkpoint, None);
    let report = clean(&pool).await;
    assert_eq!((report.seals, report.records, report.unsealed), (0, 0, 0));
    let checkpoints = sealed_thrice(&pool).await;
    let again = seal(&pool, None).await.unwrap();
    assert_eq!((again.seals, again.records), (0, 0), "nothing new, no seal");
    fill(&pool, 1).await;
    let report = clean(&pool).await;
    let total: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    assert_eq!((report.seals, report.unsealed), (3, 1));
    assert_eq!(i64::try_from(report.records + report.unsealed).unwrap(), total);
    assert_eq!(report.checkpoint.as_ref(), checkpoints.last());
    assert_eq!(audit::checkpoint(&pool).await.unwrap().as_ref(), checkpoints.last());
    assert_eq!(checkpoints[0].to_string().parse::<Checkpoint>().unwrap(), checkpoints[0]);
}

#[tokio::test]
async fn an_altered_column_is_found_and_its_record_named() {
    let (_database, pool) = support::database().await;
    sealed_thrice(&pool).await;
    for change in [
        "recorded_at = recorded_at - interval '1 microsecond'",
        "recorded_at = recorded_at - interval '400 days'",
        "service = service || ' '",
        "actor = 'somebody else'",
        "action = 'workers.look'",
        "outcome = case outcome when 'denied' then 'failed' else 'denied' end",
        "target = 'other'",
        "target = case when target is null then '' end",
        "detail = detail || '[1]'",
        "request_id = coalesce(request_id, '') || '1'",
        "decision = 'null'",
        "revision = revision + 1",
        "database_user = 'nobody'",
        "operation_id = 1",
        "by_database = true",
        "by_database = null",
    ] {
        let sql: &'static str = format!(
            "create temporary table kept as select * from authz.audit_log where audit_id = 15;
             update authz.audit_log set {change} where audit_id = 15"
        )
        .leak();
        spoil(&pool, &["create table if not exists kept_15 as select * from authz.audit_log where audit_id = 15; select 1"]).await;
        spoil(&pool, &[sql]).await;
        assert_eq!(problem(&pool, &Trust::new()).await, (Problem::RecordAltered, Some(15)), "{change}");
        spoil(
            &pool,
            &[
                "delete from authz.audit_log where audit_id = 15",
                "insert into authz.audit_log overriding system value select * from kept_15",
            ],
        )
        .await;
        clean(&pool).await;
    }
}

#[tokio::test]
async fn removed_inserted_and_moved_records_are_found_and_named() {
    let cases: [(&[&str], Problem, i64); 7] = [
        (&["delete from authz.audit_log where audit_id = 15"], Problem::RecordRemoved, 15),
        (&["delete from authz.audit_log where audit_id in (1, 2, 15)"], Problem::RecordRemoved, 1),
        (&["delete from authz.audit_log where audit_id >= 15"], Problem::RecordRemoved, 15),
        // A copy under a number of its own, among sealed records.
        (
            &["insert into authz.audit_log (audit_id, service, actor, action, outcome, transaction_id)
               overriding system value select -5, service, actor, action, outcome, transaction_id
               from authz.audit_log where audit_id = 15"],
            Problem::RecordInserted,
            -5,
        ),
        // The same number twice.
        (
            &["insert into authz.audit_log (audit_id, recorded_at, service, actor, action, outcome, transaction_id)
               overriding system value select audit_id, '2020-01-01', service, actor, action, outcome, transaction_id
               from authz.audit_log where audit_id = 15"],
            Problem::RecordInserted,
            15,
        ),
        // A new record that claims an old transaction.
        (
            &["insert into authz.audit_log (service, actor, action, outcome, transaction_id)
               select service, actor, action, outcome, transaction_id from authz.audit_log where audit_id = 15"],
            Problem::RecordInserted,
            1_000,
        ),
        // And one that claims a transaction that has not been.
        (
            &["insert into authz.audit_log (service, actor, action, outcome, transaction_id)
               values ('', '', '', 'denied', '9000000000')"],
            Problem::RecordInserted,
            1_000,
        ),
    ];
    for (statements, expected, audit_id) in cases {
        let (_database, pool) = support::database().await;
        sealed_thrice(&pool).await;
        pool.execute("alter table authz.audit_log alter column audit_id restart with 1000").await.unwrap();
        clean(&pool).await;
        spoil(&pool, statements).await;
        assert_eq!(problem(&pool, &Trust::new()).await, (expected, Some(audit_id)), "{statements:?}");
    }

    let (_database, pool) = support::database().await;
    sealed_thrice(&pool).await;
    spoil(&pool, &["update authz.audit_log set transaction_id = (select transaction_id from authz.audit_log where audit_id = 25) where audit_id = 15"]).await;
    let finding = verify(&pool, &Trust::new()).await.unwrap().finding.unwrap();
    assert_eq!((finding.problem, finding.audit_id, finding.seal_id), (Problem::RecordRemoved, Some(15), 2));
}

#[tokio::test]
async fn a_record_of_another_time_than_its_transaction_s_is_found() {
    for (time, expected) in [
        ("clock_timestamp() - interval '1 hour'", Problem::RecordBackDated),
        ("'2020-01-01'", Problem::RecordBackDated),
        ("clock_timestamp() + interval '1 hour'", Problem::RecordPostDated),
    ] {
        let (_database, pool) = support::database().await;
        sealed_thrice(&pool).await;
        fill(&pool, 5).await;
        let statement: &'static str = format!(
            "insert into authz.audit_log (recorded_at, service, actor, action, outcome) values ({time}, '', '', '', 'denied') returning audit_id"
        )
        .leak();
        let audit_id: i64 = sqlx::query_scalar(statement).fetch_one(&pool).await.unwrap();
        seal(&pool, None).await.unwrap();
        assert_eq!(problem(&pool, &Trust::new()).await, (expected, Some(audit_id)), "{time}");
    }
}

#[tokio::test]
async fn altered_seals_are_found() {
    for (change, expected, seal_id) in [
        ("update authz.audit_seals set sealed_at = sealed_at - interval '1 day' where seal_id = 2", Problem::SealAltered, 2),
        ("update authz.audit_seals set until_audit_id = until_audit_id + 1 where seal_id = 2", Problem::SealAltered, 2),
        ("update authz.audit_seals set previous_digest = digest where seal_id = 2", Problem::SealAltered, 2),
        ("update authz.audit_seals set horizon = '1' where seal_id = 3", Problem::SealAltered, 3),
        ("update authz.audit_seals set base_audit_id = 3 where seal_id = 1", Problem::SealAltered, 1),
        ("delete from authz.audit_seals where seal_id = 2", Problem::SealRemoved, 2),
        ("delete from authz.audit_seals where seal_id = 1", Problem::SealRemoved, 1),
        // A record is altered, and the seal's entries too: it cannot be said which, but where.
        (
            "update authz.audit_seals set entries = overlay(entries placing '\\x00' from 30) where seal_id = 2;
             update authz.audit_log set actor = '' where audit_id = 15",
            Problem::RecordsAltered,
            2,
        ),
    ] {
        let (_database, pool) = support::database().await;
        sealed_thrice(&pool).await;
        spoil(&pool, &[change]).await;
        let finding = verify(&pool, &Trust::new()).await.unwrap().finding.expect(change);
        assert_eq!((finding.problem, finding.seal_id), (expected, seal_id), "{change}");
    }
}

#[tokio::test]
async fn a_checkpoint_shows_a_chain_that_was_cut_or_rewritten() {
    let (_database, pool) = support::database().await;
    let checkpoints = sealed_thrice(&pool).await;
    let trust = checkpoints.iter().cloned().fold(Trust::new(), Trust::checkpoint);
    assert_eq!(verify(&pool, &trust).await.unwrap().finding, None);
    // Without records and seals of the end, the rest is in itself a chain.
    spoil(
        &pool,
        &[
            "delete from authz.audit_log where audit_id > 20",
            "delete from authz.audit_seals where seal_id > 1",
        ],
    )
    .await;
    spoil(&pool, &["delete from authz.audit_log where transaction_id > (select until_transaction_id from authz.audit_seals)"]).await;
    clean(&pool).await;
    let finding = verify(&pool, &trust).await.unwrap().finding.unwrap();
    assert_eq!((finding.problem, finding.seal_id), (Problem::ChainTruncated, 2));
    // Nor does a chain written anew show by itself that it was.
    fill(&pool, 3).await;
    seal(&pool, None).await.unwrap();
    fill(&pool, 3).await;
    seal(&pool, None).await.unwrap();
    clean(&pool).await;
    let finding = verify(&pool, &trust).await.unwrap().finding.unwrap();
    assert_eq!((finding.problem, finding.seal_id), (Problem::ChainRewritten, 2));
}

#[tokio::test]
async fn signatures_are_held_against_the_trusted_keys() {
    let (_database, pool) = support::database().await;
    fill(&pool, 3).await;
    seal(&pool, None).await.unwrap();
    let (first, second) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
    let first = SigningKey::parse(&first.to_secret_text()).unwrap();
    for key in [&first, &first, &second] {
        fill(&pool, 3).await;
        seal(&pool, Some(key)).await.unwrap();
    }
    let found = async |trust: &Trust| {
        verify(&pool, trust).await.unwrap().finding.map(|finding| (finding.problem, finding.seal_id))
    };
    let both = Trust::new().key(first.public()).key(second.public());
    assert_eq!(found(&Trust::new()).await, None);
    assert_eq!(found(&both).await, Some((Problem::SealUnsigned, 1)));
    let both = both.signed_from(2);
    assert_eq!(found(&both).await, None);
    let one = Trust::new().key(first.public().to_string().parse().unwrap()).signed_from(2);
    assert_eq!(found(&one).await, Some((Problem::SignatureWrong, 4)), "rotated to a key that is not trusted");
    spoil(&pool, &["update authz.audit_seals set signature = overlay(signature placing '\\x0000' from 3) where seal_id = 3"]).await;
    assert_eq!(found(&both).await, Some((Problem::SignatureWrong, 3)));
    spoil(&pool, &["update authz.audit_seals set signature = null, key_id = null where seal_id = 3"]).await;
    assert_eq!(found(&both).await, Some((Problem::SealUnsigned, 3)));
}

#[tokio::test]
async fn an_open_transaction_holds_back_those_after_it_and_nothing_is_lost() {
    let (_database, pool) = support::database().await;
    let mut open = pool.begin().await.unwrap();
    audit::record(&mut *open, &admin(), &Record::new("slow", Outcome::Succeeded)).await.unwrap();
    fill(&pool, 5).await;
    assert_eq!(seal(&pool, None).await.unwrap().records, 0);
    let visible = clean(&pool).await.unsealed;
    // Written after others that began later, in a savepoint.
    let mut inner = sqlx::Connection::begin(&mut *open).await.unwrap();
    audit::record(&mut *inner, &admin(), &Record::new("slow", Outcome::Failed)).await.unwrap();
    inner.commit().await.unwrap();
    open.commit().await.unwrap();
    fill(&pool, 5).await;
    let total: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    assert!(i64::try_from(visible).unwrap() < total);
    assert_eq!(seal(&pool, None).await.unwrap().records, u64::try_from(total).unwrap());
    assert_eq!(clean(&pool).await.unsealed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_false_alarm_and_no_loss_under_32_writers() {
    let (database, _) = support::database().await;
    let pool =
        sqlx::postgres::PgPoolOptions::new().max_connections(36).connect(database.url()).await.unwrap();
    let writing = Arc::new(AtomicBool::new(true));
    let sealers: Vec<_> =
        (0..2).map(|_| Sealer::start(pool.clone(), Duration::from_millis(10), None)).collect();
    let verifier = tokio::spawn({
        let (pool, writing) = (pool.clone(), Arc::clone(&writing));
        async move {
            let mut runs = 0;
            while writing.load(Ordering::Relaxed) {
                clean(&pool).await;
                runs += 1;
            }
            runs
        }
    });
    let writers: Vec<_> = (0..32)
        .map(|writer| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for round in 0..15 {
                    let mut tx = pool.begin().await.unwrap();
                    for part in 0..(writer + round) % 4 {
                        let mut inner = sqlx::Connection::begin(&mut *tx).await.unwrap();
                        audit::record(&mut *inner, &admin(), &Record::new("x", Outcome::Succeeded))
                            .await
                            .unwrap();
                        if part == 2 {
                            inner.rollback().await.unwrap();
                        } else {
                            inner.commit().await.unwrap();
                        }
                    }
                    if (writer + round) % 7 == 0 {
                        tx.rollback().await.unwrap();
                    } else {
                        tx.commit().await.unwrap();
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    writing.store(false, Ordering::Relaxed);
    assert!(verifier.await.unwrap() > 0);
    for sealer in sealers {
        sealer.shutdown().await;
    }
    // Both sealers may have been at the last records at once; then one left them to the other, which had begun before.
    seal(&pool, None).await.unwrap();
    let report = clean(&pool).await;
    let total: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    assert_eq!((i64::try_from(report.records).unwrap(), report.unsealed), (total, 0));
}

#[tokio::test]
async fn sealer_seals_what_is_there_at_shutdown() {
    let (_database, pool) = support::database().await;
    let sealer = Sealer::start(pool.clone(), Duration::from_hours(1), None);
    fill(&pool, 7).await;
    sealer.shutdown().await;
    let report = clean(&pool).await;
    assert_eq!((report.unsealed, report.records > 0), (0, true));
}

#[tokio::test]
async fn more_records_than_a_seal_holds_make_several_seals() {
    let (_database, pool) = support::database().await;
    pool.execute(
        "insert into authz.audit_log (service, actor, action, outcome) select 's', 'a', 'x', 'denied' from generate_series(1, 25000);
         insert into authz.audit_log (service, actor, action, outcome) select 's', 'a', 'x', 'denied' from generate_series(1, 100001)",
    )
    .await
    .unwrap();
    let sealed = seal(&pool, None).await.unwrap();
    assert_eq!(sealed.records, 125_001);
    let report = clean(&pool).await;
    assert_eq!((report.records, report.seals, report.unsealed), (125_001, sealed.seals, 0));
    assert!(sealed.seals >= 13, "{}", sealed.seals);
    spoil(&pool, &["delete from authz.audit_log where audit_id = 110000"]).await;
    assert_eq!(problem(&pool, &Trust::new()).await, (Problem::RecordRemoved, Some(110_000)));
}
