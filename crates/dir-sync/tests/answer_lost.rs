//! The last statement of a run is done, and its answer is lost; or the lease goes to another run at that point. What is told
//! of it is what happened.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use dir_sync::{DirectorySync, Options, Report};
use sqlx::{AssertSqlSafe, PgPool};

use self::support::*;

fn org(new: bool) -> Org {
    let org = (0..6).fold(Org::new("C1").group("g", "ops"), |org, n| {
        let user = format!("u{n}");
        org.user(&user, &user).member("g", &user)
    });
    if new { org.user("u9", "u9").member("g", "u9") } else { org }
}

fn nobody() -> Org {
    Org::new("C1")
}

async fn newest_status(pool: &PgPool) -> String {
    text(pool, "select status from authz.sync_runs order by run_id desc limit 1").await
}

/// Where the transaction of a plan or an apply has the lease and wants the revision.
const HOLD: &str = "select authz.hold_revision()";
/// Where it writes how the run ended.
const END: &str = "update authz.sync_runs";

/// A run of the program that loses the answer to its last statement; from then on the way to the database is this.
async fn run_that_loses_its_answer(
    command: &str,
    next: &Org,
    then: Way,
) -> (PgPool, testdb::Database, Outcome) {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let proxy = Proxy::start(&database).await;
    let (_folder, path) = next.write();
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("select revision from authz.revision for update").execute(&mut *locker).await.unwrap();
    let running = Program::job(command, proxy.url()).file(&path).spawn();
    until("the run plans", async || waits_for_lock(&pool, HOLD).await).await;
    // From here to its end there is one transaction.
    proxy.lose_answer_to_commit(then);
    locker.rollback().await.unwrap();
    let outcome = tokio::time::timeout(DEADLINE, running.output()).await.expect("the program does not end");
    (pool, database, outcome)
}

#[tokio::test]
async fn run_whose_last_answer_is_lost_ends_as_the_database_says() {
    for (command, next, code, status) in [
        ("run", org(true), 0, "applied"),
        ("run", org(false), 0, "unchanged"),
        ("run", nobody(), 3, "refused"),
        ("plan", org(true), 0, "planned"),
    ] {
        let (pool, _database, outcome) = run_that_loses_its_answer(command, &next, Way::Open).await;
        assert_eq!((outcome.code, outcome.status().as_str()), (code, status), "{outcome:?}");
        assert_eq!(newest_status(&pool).await, status);
        assert!(outcome.json()["plan_hash"].is_string() && outcome.json()["error"].is_null(), "{outcome:?}");
        let mirror = org(status == "applied");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&mirror.json(), false));
    }
}

#[tokio::test]
async fn apply_that_cannot_be_asked_after_is_not_told_as_no_change() {
    for (command, next, is_known) in
        [("run", org(true), false), ("run", nobody(), true), ("plan", org(true), true)]
    {
        let (_pool, _database, outcome) = run_that_loses_its_answer(command, &next, Way::Closed).await;
        assert_eq!((outcome.code, outcome.status().as_str()), (1, "failed"), "{outcome:?}");
        assert_eq!(outcome.error().contains("not known"), !is_known, "{outcome:?}");
    }
}

/// The report of a run whose end the database does not let be written, that of a failure neither, but answers with this.
async fn refused_at_its_end(answer: &str) -> Report {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let before = written_rows(&pool).await;
    let trigger = format!(
        "create function refuse_the_end() returns trigger language plpgsql as $$ begin {answer}; return new; end $$;
         create trigger refuse before update on authz.sync_runs
             for each row when (new.status <> 'running') execute function refuse_the_end()"
    );
    sqlx::raw_sql(AssertSqlSafe(trigger)).execute(&pool).await.unwrap();
    let report =
        DirectorySync::new(connect(database.url()).await, name(MAIN), org(true).source()).run().await;
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(newest_status(&pool).await, "running");
    report
}

#[tokio::test]
async fn refusal_of_the_database_is_told_as_no_change() {
    for answer in [
        "raise exception 'no room left'",
        "raise exception 'no room left' using errcode = '23514'",
        "raise exception 'no room left' using errcode = '57014'",
    ] {
        let report = refused_at_its_end(answer).await;
        let error = report.error.as_ref().unwrap();
        assert_eq!(report.exit_code(), 1, "{report}");
        assert!(error.contains("no room left") && !error.contains("not known"), "{answer}: {error}");
    }
}

/// A server that shuts down answers so, and may do it to a commit that is done.
#[tokio::test]
async fn answer_that_ends_the_session_is_not_told_as_no_change() {
    for answer in [
        "perform pg_terminate_backend(pg_backend_pid())",
        "raise exception 'closing' using errcode = 'admin_shutdown'",
        "raise exception 'closing' using errcode = 'cannot_connect_now'",
        "raise exception 'lost its own' using errcode = '08P01'",
    ] {
        let report = refused_at_its_end(answer).await;
        assert_eq!(report.exit_code(), 1, "{report}");
        assert!(report.error.as_ref().unwrap().contains("it is not known"), "{answer}: {report}");
    }
}

/// What a run that takes the lease over writes into the record of the one before.
const ABANDON: &str = "update authz.sync_runs set status = 'abandoned', finished_at = clock_timestamp() where status = 'running'";

/// Ends the session of this database that waits for a lock in this statement. The run's heartbeat may wait beside it.
async fn end_waiting_session(pool: &PgPool, statement: &str) {
    let ended = sqlx::query_scalar::<_, bool>(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and wait_event_type = 'Lock' and strpos(query, $1) > 0 and pid <> pg_backend_pid()",
    );
    assert_eq!(ended.bind(statement).fetch_all(pool).await.unwrap(), [true]);
}

/// Waits at the last statement of a run, has its record say that another run has taken its lease over, and ends its session.
async fn abandoned_at_its_end(plan_only: bool) -> Report {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let before = written_rows(&pool).await;
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("select revision from authz.revision for update").execute(&mut *locker).await.unwrap();
    let its_own = connect(database.url()).await;
    let sync = DirectorySync::new(its_own, name(MAIN), org(true).source()).options(Options::default());
    let running = tokio::spawn(async move { if plan_only { sync.plan().await } else { sync.run().await } });
    until("the run plans", async || waits_for_lock(&pool, HOLD).await).await;
    let mut successor = pool.begin().await.unwrap();
    sqlx::query("lock table authz.sync_runs in share row exclusive mode")
        .execute(&mut *successor)
        .await
        .unwrap();
    locker.rollback().await.unwrap();
    until("the run wants to write its end", async || waits_for_lock(&pool, END).await).await;
    sqlx::query(ABANDON).execute(&mut *successor).await.unwrap();
    end_waiting_session(&pool, END).await;
    successor.commit().await.unwrap();
    let report = tokio::time::timeout(DEADLINE, running).await.expect("the run does not end").unwrap();
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(newest_status(&pool).await, "abandoned");
    report
}

#[tokio::test]
async fn lease_that_is_taken_over_in_the_plan_is_told_as_lost() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("select revision from authz.revision for update").execute(&mut *locker).await.unwrap();
    let its_own = connect(database.url()).await;
    let running = tokio::spawn(DirectorySync::new(its_own, name(MAIN), org(true).source()).run());
    until("the run plans", async || waits_for_lock(&pool, HOLD).await).await;
    sqlx::query(ABANDON).execute(&pool).await.unwrap();
    end_waiting_session(&pool, HOLD).await;
    locker.rollback().await.unwrap();
    let report = tokio::time::timeout(DEADLINE, running).await.expect("the run does not end").unwrap();
    assert_eq!(report.exit_code(), 5, "{report}");
    assert_eq!(newest_status(&pool).await, "abandoned");
}

#[tokio::test]
async fn lease_that_is_taken_over_at_the_end_is_told_as_lost() {
    for plan_only in [false, true] {
        let report = abandoned_at_its_end(plan_only).await;
        assert_eq!(report.exit_code(), 5, "{report}");
        assert!(report.error.as_ref().unwrap().contains("lost its lease"), "{report}");
    }
}
