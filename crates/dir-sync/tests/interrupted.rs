//! Real processes that are told to end, that are started together, or that sleep and wake up too late.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use directory_emulator::{Effect, Fault, Gate, Target};
use rustix::process::Signal;
use sqlx::PgPool;

use self::support::*;

fn org(new: bool) -> Org {
    let org = (0..6).fold(Org::new("C1"), |org, n| {
        let (user, group) = (format!("u{n}"), format!("g{n}"));
        org.user(&user, &user).group(&group, &group).member(&group, &user)
    });
    if new { org.user("u9", "u9").member("g1", "u9").without_member("g0", "u0") } else { org }
}

async fn newest_run(pool: &PgPool) -> (i64, String, Option<String>) {
    sqlx::query_as("select run_id, status, message from authz.sync_runs order by run_id desc limit 1")
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn is_new(pool: &PgPool) -> bool {
    let mirror = Mirror::read(pool, MAIN).await;
    let is_new = mirror == Mirror::wanted(&org(true).json(), false);
    assert!(is_new || mirror == Mirror::wanted(&org(false).json(), false), "neither old nor new");
    is_new
}

/// The program has ended by itself with exit code 6, and left an ended run, no lease and the old mirror.
async fn assert_ended_in_order(pool: &PgPool, outcome: &Outcome, signal: &str) {
    assert_eq!((outcome.code, outcome.status().as_str()), (6, "failed"), "{outcome:?}");
    assert!(outcome.error().contains(signal), "{outcome:?}");
    let (run_id, status, message) = newest_run(pool).await;
    assert_eq!(status, "failed");
    assert!(message.unwrap().contains(signal));
    assert_cleared(pool, run_id).await;
    assert!(!is_new(pool).await);
}

#[tokio::test]
async fn signal_in_the_crawl_ends_the_run_in_order() {
    for (signal, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT")] {
        let (database, pool) = database().await;
        assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
        let workspace = workspace(org(true).directory()).await;
        let program = Program::job("run", database.url()).google(&workspace);
        let gate = Gate::new();
        workspace.emulator.add_fault(Fault::new(Target::members_of("g3"), Effect::Hold(gate.clone())));
        let running = program.spawn();
        tokio::time::timeout(DEADLINE, gate.arrival(1)).await.unwrap();
        running.signal(signal);
        assert_ended_in_order(&pool, &running.output().await, name).await;
        workspace.emulator.clear_faults();
        assert_eq!(program.output().await.code, 0, "the lease is free at once");
        assert!(is_new(&pool).await);
    }
}

#[tokio::test]
async fn signal_while_the_file_does_not_come_ends_the_run_in_order() {
    let (database, pool) = database().await;
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("directory.json");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let running = Program::job("run", database.url()).file(&pipe).spawn();
    let opened = tokio::task::spawn_blocking(move || std::fs::OpenOptions::new().write(true).open(pipe));
    let silent = tokio::time::timeout(DEADLINE, opened).await.unwrap().unwrap().unwrap();
    running.signal(Signal::TERM);
    let outcome = tokio::time::timeout(DEADLINE, running.output()).await.unwrap();
    assert_eq!(outcome.code, 6, "{outcome:?}");
    assert!(outcome.error().contains("SIGTERM before anything was done"), "{outcome:?}");
    assert_eq!(number(&pool, "select count(*) from authz.sync_runs").await, 0);
    drop(silent);
}

#[tokio::test]
async fn signal_in_the_plan_or_the_apply_ends_the_run_in_order() {
    // The plan needs the one, the apply the other two.
    for (lock, statement) in [
        ("select revision from authz.revision for update", "select authz.hold_revision()"),
        ("lock table authz.group_users in exclusive mode", "authz.group_users"),
        ("lock table authz.audit_log in exclusive mode", "authz.audit_log"),
    ] {
        let (database, pool) = database().await;
        assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
        let (_folder, path) = org(true).write();
        let program = Program::job("run", database.url()).file(&path);
        let mut locker = pool.begin().await.unwrap();
        sqlx::query(lock).execute(&mut *locker).await.unwrap();
        let running = program.spawn();
        until("the run waits for the table", async || waits_for_lock(&pool, statement).await).await;
        running.signal(Signal::TERM);
        // Its own record would wait for the same table, so it is let go once the interrupt has done its work.
        until("the statement was interrupted", async || {
            number(
                &pool,
                "select count(*) from pg_locks l join pg_class c on c.oid = l.relation
                 where c.relname = 'sync_leases' and l.mode = 'RowShareLock' and l.granted",
            )
            .await
                == 0
        })
        .await;
        locker.rollback().await.unwrap();
        assert_ended_in_order(&pool, &running.output().await, "SIGTERM").await;
        assert_eq!(program.output().await.code, 0, "the lease is free at once");
        assert!(is_new(&pool).await);
    }
}

#[tokio::test]
async fn signal_while_another_run_is_at_work_leaves_that_one_alone() {
    let (database, pool) = database().await;
    let dead = authz::mirror::Run::begin(&pool, &name(MAIN), "test").await.unwrap();
    let dead_id = dead.id();
    drop(dead); // its lease goes on for a while, and whoever comes waits for that
    let (_folder, path) = org(true).write();
    let running = Program::job("run", database.url()).file(&path).spawn();
    until("the program waits for the lease", async || {
        number(&pool, "select last_value from authz.sync_runs_run_id_seq").await > dead_id
    })
    .await;
    running.signal(Signal::TERM);
    let outcome = running.output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (6, "failed"), "{outcome:?}");
    assert_eq!(newest_run(&pool).await.0, dead_id, "it was no run yet");
}

#[tokio::test]
async fn of_two_started_together_one_works_and_the_other_says_so() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let workspace = workspace(org(true).directory()).await;
    let program = Program::job("run", database.url()).google(&workspace);
    let gate = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::members_of("g3"), Effect::Hold(gate.clone())));
    let both = std::cell::RefCell::new([program.spawn(), program.spawn()]);
    until("one has given up", async || both.borrow_mut().iter_mut().any(Running::has_ended)).await;
    tokio::time::timeout(DEADLINE, gate.arrival(1)).await.unwrap();
    gate.release();
    let [first, second] = both.into_inner();
    let mut outcomes = [first.output().await, second.output().await];
    outcomes.sort_by_key(|outcome| outcome.code);
    assert_eq!((outcomes[0].code, outcomes[0].status().as_str()), (0, "applied"), "{outcomes:?}");
    assert_eq!((outcomes[1].code, outcomes[1].status().as_str()), (5, "failed"), "{outcomes:?}");
    assert!(outcomes[1].error().contains("is still at work"), "{outcomes:?}");
    assert!(is_new(&pool).await);
    assert_eq!(number(&pool, "select count(*) from authz.sync_runs").await, 2, "that of the loser is none");
}

#[tokio::test]
async fn process_paused_in_the_crawl_wakes_up_without_its_lease_and_writes_nothing() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let workspace = workspace(org(false).user("u8", "u8").directory()).await;
    let gate = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::members_of("g3"), Effect::Hold(gate.clone())));
    let paused = Program::job("run", database.url()).google(&workspace).spawn();
    tokio::time::timeout(DEADLINE, gate.arrival(1)).await.unwrap();
    let paused_id = newest_run(&pool).await.0;
    paused.signal(Signal::STOP);
    // The next one waits until the lease is over: nothing here makes that come sooner.
    let (_folder, path) = org(true).write();
    let next = Program::job("run", database.url()).file(&path).output().await;
    assert_eq!(next.code, 0, "{next:?}");
    assert!(is_new(&pool).await);
    let after = written_rows(&pool).await;
    gate.release();
    paused.signal(Signal::CONT);
    let outcome = paused.output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (5, "failed"), "{outcome:?}");
    assert!(outcome.error().contains("lost its lease"), "{outcome:?}");
    assert_eq!(written_rows(&pool).await, after);
    assert_eq!(run_status(&pool, paused_id).await, "abandoned");
    assert_cleared(&pool, paused_id).await;
}

/// One of the next runs is not held up by the paused process, which writes nothing when it goes on.
async fn assert_taken_over(pool: &PgPool, paused: Running, paused_id: i64, program: &Program) {
    let mut next = program.output().await;
    while next.code == 5 {
        next = program.output().await; // as the next ones of a CronJob
    }
    assert_eq!(next.code, 0, "{next:?}");
    let after = written_rows(pool).await;
    paused.signal(Signal::CONT);
    let outcome = paused.output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (5, "failed"), "{outcome:?}");
    assert!(outcome.error().contains("lost its lease"), "{outcome:?}");
    assert_eq!(written_rows(pool).await, after);
    assert_eq!(run_status(pool, paused_id).await, "abandoned");
}

/// There the server waits for its client without end, with all locks.
#[tokio::test]
async fn process_paused_in_a_copy_does_not_hold_up_the_next_run_and_writes_nothing() {
    let (database, pool) = database().await;
    let (_folder, path) = org(false).write();
    // A default is worked out before the server asks for the first row.
    execute(
        &pool,
        "create function wait() returns boolean immutable language plpgsql as $$
         begin
             perform pg_advisory_xact_lock_shared(1);
             return true;
         end $$;
         alter table authz.group_users add waited boolean default wait();",
    )
    .await;
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock(1)").execute(&mut *locker).await.unwrap();
    let paused = Program::job("run", database.url()).file(&path).spawn();
    until("the copy waits", async || waits_for_lock(&pool, "copy authz.group_users").await).await;
    let paused_id = newest_run(&pool).await.0;
    paused.signal(Signal::STOP);
    locker.rollback().await.unwrap();
    assert_taken_over(&pool, paused, paused_id, &Program::job("run", database.url()).file(&path)).await;
}

#[tokio::test]
async fn process_paused_in_the_apply_does_not_hold_up_the_next_run_and_writes_nothing() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let (_other_folder, other) = org(false).user("u8", "u8").write();
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("lock table authz.audit_log in exclusive mode").execute(&mut *locker).await.unwrap();
    let paused = Program::job("run", database.url()).file(&other).spawn();
    until("the apply waits", async || waits_for_lock(&pool, "authz.audit_log").await).await;
    let paused_id = newest_run(&pool).await.0;
    paused.signal(Signal::STOP);
    locker.rollback().await.unwrap();
    let (_folder, path) = org(true).write();
    assert_taken_over(&pool, paused, paused_id, &Program::job("run", database.url()).file(&path)).await;
    assert!(is_new(&pool).await);
}
