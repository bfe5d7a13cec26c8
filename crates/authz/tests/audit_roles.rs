//! The jobs that keep the trail, with no more rights than `deploy/sql/roles.sql` gives: sweeping up, sealing, dropping old
//! months, and noticing that the database was restored into another cluster.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

#[path = "support/roles.rs"]
mod roles;
mod support;
#[path = "support/trail.rs"]
mod trail;

use std::time::Duration;

use authz::audit::retention::{make_partitions, prune};
use authz::audit::{self, Outcome, Query, Record, Trust, Writer, seal, verify};
use authz::grant::{self, Grant};
use authz::{Authz, action, user};
use sqlx::{Connection as _, Executor as _, PgConnection, PgPool};
use testdb::Database;

use self::roles::{ROLES, as_role, refusal};
use self::support::{action as a, admin, pattern as p, user as u};
use self::trail::{fill, old_months, spoil, this_month};

async fn with_roles(pool: &PgPool) {
    sqlx::raw_sql(ROLES).execute(pool).await.unwrap();
}

async fn world() -> (Database, PgPool) {
    let (database, pool) = support::database().await;
    with_roles(&pool).await;
    (database, pool)
}

/// ada may scale workers.
async fn with_ada(pool: &PgPool) {
    action::register(pool, &[(a("workers.scale"), "")], &admin()).await.unwrap();
    user::create(pool, &u("ada"), "Ada", &admin()).await.unwrap();
    grant::to_user(pool, &u("ada"), &Grant::new(p("workers.*"), ""), &admin()).await.unwrap();
}

/// As if the owners had not renewed their leases for long.
async fn let_leases_end(pool: &PgPool) {
    sqlx::query("update authz.operation_owners set expires_at = clock_timestamp() - interval '1 second'")
        .execute(pool)
        .await
        .unwrap();
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_mins(1), waiting).await.is_ok(), "never: {what}");
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// As a restored dump is: five records of transactions of another count, which this cluster has not come to yet.
async fn restored_from_elsewhere(pool: &PgPool) {
    sqlx::raw_sql(
        "update authz.audit_eras set cluster_id = 1;
         insert into authz.audit_log (service, actor, action, outcome, target, transaction_id)
         select 'tests', 'ada', 'workers.scale', 'succeeded', 'old', (9000000000 + 10 - n)::text::xid8
         from generate_series(1, 5) n;",
    )
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn service_sweeps_up_what_another_process_left() {
    let (database, pool) = world().await;
    with_ada(&pool).await;
    let gone = Authz::new(as_role(database.url(), "authz_service").await).service("ops-dashboard");
    let started =
        gone.operation_named(&u("ada"), &a("workers.scale")).target("web").request("req-9").start().await;
    let started = started.unwrap();

    // Another program, with a login of its own: who is logged in is not who runs the function.
    let mut other = PgConnection::connect(database.url()).await.unwrap();
    other.execute("set application_name = 'sweeper'").await.unwrap();
    other.execute("set session authorization authz_service").await.unwrap();
    assert_eq!(audit::sweep(&mut other, Duration::ZERO).await.unwrap(), 0, "its owner lives");
    let_leases_end(&pool).await;
    assert_eq!(audit::sweep(&mut other, Duration::from_hours(1)).await.unwrap(), 0, "it is young");
    let_leases_end(&pool).await;
    assert_eq!(audit::sweep(&mut other, Duration::ZERO).await.unwrap(), 1);
    assert_eq!(audit::sweep(&mut other, Duration::ZERO).await.unwrap(), 0);

    let trail = audit::latest(&pool, 2).await.unwrap();
    let [end, start] = &trail[..] else { panic!("{trail:?}") };
    assert_eq!((start.audit_id, start.outcome), (started.audit_id(), Outcome::Started));
    assert_eq!((end.outcome, end.operation_id), (Outcome::Abandoned, Some(start.audit_id)));
    assert_eq!((&end.service, &end.actor, &end.action), (&start.service, &start.actor, &start.action));
    assert_eq!((&end.target, &end.request_id), (&start.target, &start.request_id));
    assert_eq!(end.revision, start.revision);
    assert_eq!(end.detail["swept_by"], "sweeper");
    assert_eq!(end.database_user, "authz_service");
    assert_eq!(number(&pool, "select count(*) from authz.open_operations").await, 0);
}

#[tokio::test]
async fn service_abandons_its_start_whose_confirmation_was_lost() {
    let server = testdb::Server::start().await.unwrap();
    let pool = PgPool::connect(&server.url("postgres")).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    with_roles(&pool).await;
    with_ada(&pool).await;
    let service =
        Authz::new(as_role(&server.url("postgres"), "authz_service").await).service("ops-dashboard");
    let start = async || service.operation_named(&u("ada"), &a("workers.scale")).start().await;
    start().await.unwrap().succeed().await;

    // Commits wait for a standby that there is not; who is cut off then is not told that it has committed.
    for sql in ["alter system set synchronous_standby_names = 'nobody'", "select pg_reload_conf()"] {
        pool.execute(sql).await.unwrap();
    }
    // The server takes up its new settings some time later: by then this one waits.
    let mut other = PgConnection::connect(&server.url("postgres")).await.unwrap();
    let probe = tokio::spawn(async move {
        loop {
            other.execute("update authz.directories set last_complete_sync_at = now()").await.unwrap();
        }
    });
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    until("a commit waits", async || number(&pool, waiting).await == 1).await;
    let cut = async {
        until("the start has committed and waits too", async || number(&pool, waiting).await == 2).await;
        pool.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where wait_event = 'SyncRep' and query not like 'update authz.directories%'",
        )
        .await
        .unwrap();
    };
    let (started, ()) = tokio::join!(start(), cut);
    assert!(started.is_err(), "{started:?}");
    for sql in ["alter system reset synchronous_standby_names", "select pg_reload_conf()"] {
        pool.execute(sql).await.unwrap();
    }
    // What begins now is of the same owner and is not touched.
    start().await.unwrap().succeed().await;
    probe.abort();
    service.shutdown().await;
    let said: Vec<(String, Option<String>)> = sqlx::query_as(
        "select outcome, detail ->> 'reason' from authz.audit_log where service = 'ops-dashboard' order by audit_id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let outcomes: Vec<_> = said.iter().map(|(outcome, _)| outcome.as_str()).collect();
    assert_eq!(outcomes, ["started", "succeeded", "started", "started", "succeeded", "abandoned"]);
    let reason = said[5].1.as_deref().unwrap_or_default();
    assert!(reason.contains("never run"), "{reason}");
    assert_eq!(number(&pool, "select count(*) from authz.open_operations").await, 0);
    assert_eq!(number(&pool, "select count(*) from authz.operation_owners").await, 0);
}

#[tokio::test]
async fn service_cannot_have_anything_abandoned_but_starts_that_are_open() {
    let (database, pool) = world().await;
    fill(&pool, 8).await;
    let service = as_role(database.url(), "authz_service").await;
    // Of each of these records it says that it is an open operation of its own.
    let planted = "insert into authz.open_operations (audit_id, recorded_at, owner_id, number)
                   select audit_id, recorded_at, 7, audit_id from authz.audit_log";
    let starts =
        number(&pool, "select count(*) from authz.audit_log where outcome = 'started'").await.unsigned_abs();
    let all = number(&pool, "select count(*) from authz.audit_log").await.unsigned_abs();
    assert!(starts > 0 && starts < all);
    let abandoned =
        "select count(*) from authz.audit_log e join authz.audit_log s on s.audit_id = e.operation_id
                     where e.outcome = 'abandoned' and s.outcome = 'started'";
    service.execute(planted).await.unwrap();
    assert_eq!(audit::sweep(&service, Duration::from_nanos(0)).await.unwrap(), starts);
    assert_eq!(number(&pool, abandoned).await.unsigned_abs(), starts);

    // Only the owner that it names, only these numbers.
    service.execute(planted).await.unwrap();
    service.execute("update authz.open_operations set owner_id = 8 where audit_id % 2 = 0").await.unwrap();
    let left: Vec<i64> = sqlx::query_scalar("select audit_id from authz.open_operations order by 1")
        .fetch_all(&pool)
        .await
        .unwrap();
    let closed: Vec<i64> = sqlx::query_scalar("select authz.disown_operations(7, $1)")
        .bind(&left[..4])
        .fetch_all(&service)
        .await
        .unwrap();
    let expected: Vec<i64> = left[..4].iter().copied().filter(|id| id % 2 == 1).collect();
    assert_eq!(closed, expected);
    assert_eq!(
        number(&pool, "select count(*) from authz.open_operations").await,
        i64::try_from(left.len() - closed.len()).unwrap()
    );
    assert_eq!(
        number(&pool, "select count(*) from authz.audit_log where outcome = 'abandoned'").await,
        number(&pool, abandoned).await,
    );
}

#[tokio::test]
async fn only_jobs_may_call_what_the_jobs_call() {
    let (database, _pool) = world().await;
    let calls = [
        ("select authz.sweep_operations('0')", &["authz_service", "authz_auditor", "authz_admin"][..]),
        ("select authz.disown_operations(0, '{}')", &["authz_service", "authz_auditor", "authz_admin"]),
        ("select authz.hold_audit_trail(false)", &["authz_auditor"]),
        ("select authz.hold_audit_trail(true)", &["authz_auditor"]),
        ("select authz.drop_audit_months('2020-01-01')", &["authz_auditor"]),
    ];
    for role in roles::ALL {
        let as_role = as_role(database.url(), role).await;
        for (sql, allowed) in calls {
            if allowed.contains(&role) {
                as_role.execute(sql).await.unwrap();
            } else {
                roles::assert_forbidden(&as_role, role, sql).await;
            }
        }
    }
}

#[tokio::test]
async fn auditor_seals_a_trail_that_was_restored() {
    let (database, pool) = world().await;
    fill(&pool, 5).await;
    restored_from_elsewhere(&pool).await;
    let auditor = as_role(database.url(), "authz_auditor").await;
    let sealed = seal(&auditor, None).await.unwrap();
    assert!(sealed.seals >= 2, "an end of the era among them: {sealed:?}");
    fill(&pool, 5).await;
    seal(&auditor, None).await.unwrap();
    let report = verify(&auditor, &Trust::new()).await.unwrap();
    assert_eq!((report.finding, report.unsealed), (None, 0));
}

#[tokio::test]
async fn auditor_exports_and_drops_old_months() {
    let (database, pool) = world().await;
    old_months(&pool).await;
    let auditor = as_role(database.url(), "authz_auditor").await;
    let folder = tempfile::tempdir().unwrap();
    let pruned = prune(&auditor, this_month(&pool).await, folder.path(), None, &admin()).await.unwrap();
    assert_eq!(pruned.dropped.len(), 3, "{pruned:?}");
    let report = verify(&auditor, &Trust::new()).await.unwrap();
    assert_eq!((report.finding, report.pruned > 0), (None, true));
}

/// Fails with the reason that something there is in no seal; gives the hint.
async fn assert_kept(auditor: &PgPool, drop: &str) -> String {
    let months = "select count(*) from pg_inherits where inhparent = 'authz.audit_log'::regclass";
    let before = number(auditor, months).await;
    let (code, error) = refusal(auditor, drop).await;
    assert_eq!(code, "55000", "{error}");
    assert!(error.to_string().contains("in no seal"), "{error}");
    assert_eq!(number(auditor, months).await, before);
    let error = error.as_database_error().unwrap().downcast_ref::<sqlx::postgres::PgDatabaseError>();
    error.hint().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn month_goes_only_once_it_is_sealed() {
    let (database, pool) = world().await;
    old_months(&pool).await;
    make_partitions(&pool, 3).await.unwrap();
    let auditor = as_role(database.url(), "authz_auditor").await;
    let month = this_month(&pool).await;
    let drop: &'static str = format!("select authz.drop_audit_months('{month}')").leak();
    let hint = assert_kept(&auditor, drop).await;
    assert!(hint.contains("authz audit prune"), "{hint}");

    // Something is sealed, and later something more comes into an old month: behind that seal, and in a transaction
    // that seems to be before it.
    seal(&auditor, None).await.unwrap();
    for transaction in [
        "pg_current_xact_id()",
        "(select min(transaction_id::text::bigint) from authz.audit_log)::text::xid8",
    ] {
        let mut tx = pool.begin().await.unwrap();
        let late = format!(
            "insert into authz.audit_log (recorded_at, service, actor, action, outcome, transaction_id)
             select min(recorded_at), '', '', 'late', 'denied', {transaction} from authz.audit_log"
        );
        tx.execute(&*late.leak()).await.unwrap();
        // What is under way is waited for.
        let waiting = tokio::spawn({
            let auditor = auditor.clone();
            async move { assert_kept(&auditor, drop).await }
        });
        let waits = "select count(*) from pg_stat_activity
                     where datname = current_database() and wait_event_type = 'Lock' and query like '%drop_audit_months%'";
        until("the drop waits", async || {
            assert!(!waiting.is_finished());
            number(&pool, waits).await == 1
        })
        .await;
        tx.commit().await.unwrap();
        waiting.await.unwrap();
        spoil(&pool, &["delete from authz.audit_log where action = 'late'"]).await;
    }

    // A transaction that does not see what was written meanwhile cannot tell.
    let mut tx = auditor.begin_with("begin isolation level repeatable read").await.unwrap();
    let error = tx.execute(drop).await.unwrap_err();
    assert!(error.to_string().contains("read committed"), "{error}");
    tx.rollback().await.unwrap();

    let dropped: Vec<String> = sqlx::query_scalar(drop).fetch_one(&auditor).await.unwrap();
    assert_eq!(dropped.len(), 3, "{dropped:?}");
}

#[tokio::test]
async fn month_is_known_to_be_sealed_in_whatever_cluster_that_was() {
    let (database, pool) = world().await;
    old_months(&pool).await;
    make_partitions(&pool, 3).await.unwrap();
    let auditor = as_role(database.url(), "authz_auditor").await;
    let month = this_month(&pool).await;
    let drop: &'static str = format!("select authz.drop_audit_months('{month}')").leak();
    seal(&auditor, None).await.unwrap();
    // As if all that had been in another cluster.
    spoil(&pool, &["update authz.audit_seals set cluster_id = 1"]).await;
    seal(&auditor, None).await.unwrap();
    pool.execute("create table kept as select * from authz.audit_seals").await.unwrap();
    let closing = number(&pool, "select count(*) from authz.audit_seals where closing").await;
    assert!(closing >= 2);

    // The first of the seals that close an era does not say that all of it is sealed.
    spoil(
        &pool,
        &["delete from authz.audit_seals where seal_id > (select min(seal_id) from kept where closing)"],
    )
    .await;
    assert_kept(&auditor, drop).await;
    spoil(&pool, &["insert into authz.audit_seals select * from kept where seal_id not in (select seal_id from authz.audit_seals)"]).await;

    // The last one does.
    let mut tx = auditor.begin().await.unwrap();
    let dropped: Vec<String> = sqlx::query_scalar(drop).fetch_one(&mut *tx).await.unwrap();
    assert_eq!(dropped.len(), 3, "{dropped:?}");
    tx.rollback().await.unwrap();

    // What came since is of the next era, whose transactions may have lower numbers than those before.
    let late = "insert into authz.audit_log (recorded_at, service, actor, action, outcome, transaction_id)
                select min(recorded_at), '', '', 'late', 'denied', '3' from authz.audit_log";
    pool.execute(late).await.unwrap();
    assert_kept(&auditor, drop).await;
    // Sealed, in the new era, as one of the transactions that it has.
    spoil(&pool, &["update authz.audit_log set transaction_id = pg_current_xact_id() where action = 'late'"])
        .await;
    assert_kept(&auditor, drop).await;
    seal(&auditor, None).await.unwrap();
    let dropped: Vec<String> = sqlx::query_scalar(drop).fetch_one(&auditor).await.unwrap();
    assert_eq!(dropped.len(), 3, "{dropped:?}");
}

/// Old records in the order of their transactions, and then the new one.
async fn assert_read_in_order(pool: &PgPool, new: i64) {
    until("all is behind the horizon", async || {
        let page = Query::new().page(pool, None, 100).await.unwrap();
        page.entries.iter().any(|entry| entry.audit_id == new)
    })
    .await;
    let entries = Query::new().page(pool, None, 100).await.unwrap().entries;
    let (newest, old) = entries.split_last().unwrap();
    assert_eq!((newest.audit_id, old.len()), (new, 5));
    assert!(old.is_sorted_by_key(|entry| -entry.audit_id), "{old:?}");
    assert_eq!(number(pool, "select count(*) from authz.audit_eras").await, 2);
}

#[tokio::test]
async fn service_that_writes_first_after_a_restore_begins_an_era() {
    let (database, pool) = world().await;
    restored_from_elsewhere(&pool).await;
    let service = as_role(database.url(), "authz_service").await;
    let writer = Writer::start(service.clone());
    let record = Record::new("workers.scale", Outcome::Succeeded);
    let new = writer.record(&admin(), &record).await.unwrap();
    assert_read_in_order(&pool, new).await;
    writer.record(&admin(), &record).await.unwrap();
    writer.close().await;
    let again = Writer::start(service);
    again.record(&admin(), &record).await.unwrap();
    assert_eq!(number(&pool, "select count(*) from authz.audit_eras").await, 2);
}

#[tokio::test]
async fn sealer_begins_an_era_after_a_restore() {
    let (database, pool) = world().await;
    restored_from_elsewhere(&pool).await;
    seal(&as_role(database.url(), "authz_auditor").await, None).await.unwrap();
    let new = audit::record(&pool, &admin(), &Record::new("x", Outcome::Succeeded)).await.unwrap();
    assert_read_in_order(&pool, new).await;
}

#[tokio::test]
async fn service_that_may_not_or_cannot_begin_an_era_records_all_the_same() {
    let (database, pool) = world().await;
    restored_from_elsewhere(&pool).await;
    let service = as_role(database.url(), "authz_service").await;
    let record = Record::new("workers.scale", Outcome::Succeeded);
    let eras = async || number(&pool, "select count(*) from authz.audit_eras").await;

    // Somebody else writes for long.
    let mut open = pool.begin().await.unwrap();
    audit::record(&mut *open, &admin(), &record).await.unwrap();
    let writer = Writer::start(service.clone());
    writer.record(&admin(), &record).await.unwrap();
    assert_eq!(eras().await, 1);
    open.commit().await.unwrap();

    pool.execute("revoke execute on function authz.note_audit_era() from authz_service").await.unwrap();
    let writer = Writer::start(service);
    writer.record(&admin(), &record).await.unwrap();
    assert_eq!(eras().await, 1);
}
