//! The database goes silent, with no word of an end: a run that shall stop ends nonetheless.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use dir_sync::{DirectorySync, Options, Status};
use futures_util::future::join_all;
use rustix::process::Signal;
use sqlx::PgPool;

use self::support::*;

fn org(new: bool) -> Org {
    let org = Org::new("C1").user("1", "ada").group("g", "ops").member("g", "1");
    if new { org.user("2", "bo").member("g", "2") } else { org }
}

/// Statements that make a run wait, what the one that waits then has in it, and whether that is in the apply.
const WAITS: [(&str, &str, bool); 4] = [
    ("lock table authz.sync_stage_groups in exclusive mode", "authz.sync_stage_groups", false),
    ("select revision from authz.revision for update", "select authz.hold_revision()", false),
    ("lock table authz.group_users in exclusive mode", "authz.group_users", true),
    ("lock table authz.audit_log in exclusive mode", "authz.audit_log", true),
];

fn says_what_is_known(error: &str, applying: bool) -> bool {
    error.contains("not known") == applying && error.contains("nothing was changed") != applying
}

async fn ended(running: Running) -> Outcome {
    tokio::time::timeout(DEADLINE, running.output()).await.expect("the program does not end")
}

/// The mirror is the old one, and the next run makes it the new one.
async fn assert_goes_on(pool: &PgPool, applied: bool) {
    assert_eq!(Mirror::read(pool, MAIN).await, Mirror::wanted(&org(applied).json(), false));
    expire_leases(pool).await;
    let report = sync(pool, MAIN, &org(true)).await;
    assert_eq!(report.exit_code(), 0, "{report}");
    assert_eq!(Mirror::read(pool, MAIN).await, Mirror::wanted(&org(true).json(), false));
}

#[tokio::test]
async fn signal_ends_a_run_whose_database_is_silent() {
    // To drop one, PostgreSQL waits for all sessions of the server, and one that copies for a silent client does not answer: none
    // is dropped before all have ended.
    let databases = join_all(WAITS.map(async |(lock, statement, applying)| {
        let (database, pool) = database().await;
        assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
        let proxy = Proxy::start(&database).await;
        let (_folder, path) = org(true).write();
        let mut locker = pool.begin().await.unwrap();
        sqlx::query(lock).execute(&mut *locker).await.unwrap();
        let metrics = tempfile::tempdir().unwrap();
        let running = Program::job("run", proxy.url())
            .file(&path)
            .option("--metrics-file", metrics.path().join("dir_sync.prom"))
            .spawn();
        until("the run waits", async || waits_for_lock(&pool, statement).await).await;
        proxy.go_silent();
        running.signal(Signal::TERM);
        let outcome = ended(running).await;
        assert_eq!((outcome.code, outcome.status().as_str()), (6, "failed"), "{outcome:?}");
        assert!(outcome.error().contains("SIGTERM"), "{outcome:?}");
        assert!(says_what_is_known(&outcome.error(), applying), "{statement}: {outcome:?}");
        // The server hears of the end before the lock is gone, so what waited for it is not done after all.
        drop(proxy);
        locker.rollback().await.unwrap();
        assert_goes_on(&pool, false).await;
        database
    }))
    .await;
    drop(databases);
}

#[tokio::test]
async fn deadline_ends_a_run_whose_database_is_silent() {
    // As above.
    let databases = join_all(WAITS.map(async |(lock, statement, applying)| {
        let (database, pool) = database().await;
        assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
        let mut locker = pool.begin().await.unwrap();
        sqlx::query(lock).execute(&mut *locker).await.unwrap();
        // Long enough to come so far: longer the next time if it was not.
        let mut deadline = Duration::from_secs(2);
        let report = loop {
            let proxy = Proxy::start(&database).await;
            let through = connect(proxy.url()).await;
            let options = Options { deadline: Some(deadline), ..Options::default() };
            let sync = DirectorySync::new(through, name(MAIN), org(true).source()).options(options);
            let running = tokio::spawn(sync.run());
            until("the run waits or has ended", async || {
                running.is_finished() || waits_for_lock(&pool, statement).await
            })
            .await;
            proxy.go_silent();
            let was_at_work = !running.is_finished();
            let report =
                tokio::time::timeout(DEADLINE, running).await.expect("the run does not end").unwrap();
            if was_at_work {
                break report;
            }
            deadline *= 4;
        };
        assert_eq!((report.status, report.exit_code()), (Status::Failed, 1), "{report}");
        let error = report.error.unwrap();
        assert!(error.contains("--deadline") && says_what_is_known(&error, applying), "{statement}: {error}");
        locker.rollback().await.unwrap();
        database
    }))
    .await;
    drop(databases);
}

#[tokio::test]
async fn commit_that_nobody_heard_of_is_not_told_as_no_change() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let proxy = Proxy::start(&database).await;
    let (_folder, path) = org(true).write();
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("select revision from authz.revision for update").execute(&mut *locker).await.unwrap();
    let running = Program::job("run", proxy.url()).file(&path).spawn();
    until("the run waits", async || waits_for_lock(&pool, "select authz.hold_revision()").await).await;
    proxy.lose_answer_to_commit(Way::Silent);
    locker.rollback().await.unwrap();
    until("it is applied", async || {
        text(&pool, "select status from authz.sync_runs order by run_id desc limit 1").await == "applied"
    })
    .await;
    running.signal(Signal::TERM);
    let outcome = ended(running).await;
    assert_eq!((outcome.code, outcome.status().as_str()), (6, "failed"), "{outcome:?}");
    assert!(says_what_is_known(&outcome.error(), true), "{outcome:?}");
    assert_goes_on(&pool, true).await;
}

#[tokio::test]
async fn record_that_cannot_be_written_holds_up_no_end() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let (_folder, path) = org(true).write();
    let (lock, statement, _) = WAITS[0];
    let mut locker = pool.begin().await.unwrap();
    sqlx::query(lock).execute(&mut *locker).await.unwrap();
    let running = Program::job("run", database.url()).file(&path).spawn();
    until("the run waits", async || waits_for_lock(&pool, statement).await).await;
    sqlx::query("lock table authz.sync_runs in share row exclusive mode")
        .execute(&mut *locker)
        .await
        .unwrap();
    running.signal(Signal::TERM);
    let outcome = ended(running).await;
    assert_eq!((outcome.code, outcome.status().as_str()), (6, "failed"), "{outcome:?}");
    assert!(outcome.stderr.contains("could not be recorded"), "{outcome:?}");
    locker.rollback().await.unwrap();
    assert_goes_on(&pool, false).await;
}

#[tokio::test]
async fn question_for_the_metrics_that_is_not_answered_holds_up_no_end() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let (_folder, path) = org(true).write();
    let metrics = tempfile::tempdir().unwrap();
    let file = metrics.path().join("dir_sync.prom");
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("lock table authz.audit_log in exclusive mode").execute(&mut *locker).await.unwrap();
    let running = Program::job("run", database.url()).file(&path).option("--metrics-file", &file).spawn();
    until("the apply waits", async || waits_for_lock(&pool, "authz.audit_log").await).await;
    // It is there the moment that the apply is through, before anybody can ask how fresh the directory is.
    let mut next = pool.begin().await.unwrap();
    let mut taking = tokio::spawn(async move {
        sqlx::query("lock table authz.sync_leases in access exclusive mode")
            .execute(&mut *next)
            .await
            .unwrap();
        next
    });
    until("somebody waits for the leases", async || waits_for_lock(&pool, "authz.sync_leases").await).await;
    assert!(!taking.is_finished());
    locker.rollback().await.unwrap();
    let next = (&mut taking).await.unwrap();
    let outcome = ended(running).await;
    assert_eq!((outcome.code, outcome.status().as_str()), (0, "applied"), "{outcome:?}");
    let text = std::fs::read_to_string(file).unwrap();
    assert!(text.contains("exit_code") && !text.contains("last_complete_sync"), "{text}");
    next.rollback().await.unwrap();
}
