//! The program, or the database server, is killed at work: the mirror is the old one or the new one, and the next
//! run goes on as if nothing had been.

mod support;

use std::time::Duration;

use directory_emulator::{Effect, Fault, Gate, Target};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;
use testdb::Server;

use self::support::*;

/// A directory of 30 users and 20 groups, in one of two states that differ in all kinds of rows.
fn org(new: bool) -> Org {
    let user = |n: usize| format!("u{n}");
    let mut org = Org::new("C1");
    for n in 0..30 {
        org = org.user(&user(n), &format!("user{n}"));
    }
    for n in 0..20 {
        let group = format!("g{n}");
        org = org.group(&group, &format!("group{n}")).member(&group, &user(n)).member(&group, &user(n + 5));
        if n > 0 {
            org = org.nested(&group, &format!("g{}", n - 1));
        }
    }
    if new {
        org = org
            .without_user("u29")
            .rename_user("u1", "user2")
            .rename_user("u2", "user1")
            .set_user("u3", "suspended", true)
            .user("u30", "user30")
            .without_group("g19")
            .rename_group("g18", "renamed")
            .group("g20", "group20")
            .member("g20", "u30")
            .member("g0", "u30")
            .without_member("g4", "u4")
            .without_member("g5", "g4")
            .everyone("g6", "C1");
    }
    org
}

fn wanted(new: bool) -> Mirror {
    Mirror::wanted(&org(new).json(), false)
}

/// Waits until the server has noticed the end of the program.
async fn sessions_ended(pool: &PgPool) {
    until("the program's sessions have ended", async || {
        number(
            pool,
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'dir-sync'",
        )
        .await
            == 0
    })
    .await;
}

async fn newest_run(pool: &PgPool) -> i64 {
    number(pool, "select max(run_id) from authz.sync_runs").await
}

/// A run right after a killed one: it gives the new mirror, and tells what became of the killed one.
async fn assert_next_run_succeeds(pool: &PgPool, program: &Program, killed: i64) {
    let outcome = program.output().await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(outcome.status(), "applied");
    assert_eq!(Mirror::read(pool, MAIN).await, wanted(true));
    assert_eq!(run_status(pool, killed).await, "abandoned");
    assert_cleared(pool, killed).await;
    assert_cleared(pool, newest_run(pool).await).await;
}

#[tokio::test]
async fn program_killed_in_the_crawl_leaves_the_old_mirror() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let before = written_rows(&pool).await;
    let workspace = workspace(org(true).directory()).await;
    let program = Program::job("run", database.url()).google(&workspace);
    let gate = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::members_of("g10"), Effect::Hold(gate.clone())));
    let running = program.spawn();
    tokio::time::timeout(DEADLINE, gate.arrival(1)).await.unwrap();
    running.kill();
    sessions_ended(&pool).await;
    let killed = newest_run(&pool).await;
    assert_eq!(run_status(&pool, killed).await, "running");
    assert_eq!(written_rows(&pool).await, before);
    workspace.emulator.clear_faults();
    assert_next_run_succeeds(&pool, &program, killed).await;
}

/// Statements that keep every write from a table while they let it be read, from the first that an apply writes to
/// the last, and the trail, which each of them writes to; and what the statement that then waits names.
const LOCKS: [(&str, &str); 4] = [
    ("authz.users", "lock table authz.users in exclusive mode"),
    ("authz.group_users", "lock table authz.group_users in exclusive mode"),
    ("authz.group", "lock table authz.group_directories in exclusive mode"),
    ("authz.users", "lock table authz.audit_log in exclusive mode"),
];

#[tokio::test]
async fn program_killed_in_the_apply_leaves_the_old_mirror() {
    for (table, lock) in LOCKS {
        let (database, pool) = database().await;
        assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
        let before = written_rows(&pool).await;
        let (_folder, path) = org(true).write();
        let program = Program::job("run", database.url()).file(&path);
        let mut locker = pool.begin().await.unwrap();
        sqlx::query(lock).execute(&mut *locker).await.unwrap();
        let running = program.spawn();
        until("the apply waits for the table", async || waits_for_lock(&pool, table).await).await;
        running.kill();
        locker.rollback().await.unwrap();
        let killed = newest_run(&pool).await;
        sessions_ended(&pool).await;
        assert_eq!(written_rows(&pool).await, before, "{table}");
        expire_leases(&pool).await;
        assert_next_run_succeeds(&pool, &program, killed).await;
    }
}

#[tokio::test]
async fn next_run_may_start_while_the_killed_one_still_waits_in_the_database() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let (_folder, path) = org(true).write();
    let program = Program::job("run", database.url()).file(&path);
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("lock table authz.group_users in exclusive mode").execute(&mut *locker).await.unwrap();
    let running = program.spawn();
    until("the apply waits", async || waits_for_lock(&pool, "authz.group_users").await).await;
    running.kill();
    let killed = newest_run(&pool).await;
    let next = program.spawn();
    until("the next run waits", async || waits_for_lock(&pool, "insert into authz.sync_leases").await).await;
    locker.rollback().await.unwrap();
    let outcome = next.output().await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, wanted(true));
    assert_eq!(run_status(&pool, killed).await, "abandoned");
}

#[tokio::test]
async fn server_crash_in_the_apply_leaves_the_old_mirror() {
    let mut server = Server::start().await.unwrap();
    let url = server.url("postgres");
    let pool = connect(&url).await;
    authz::migrate(&pool).await.unwrap();
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let before = written_rows(&pool).await;
    let (_folder, path) = org(true).write();
    let program = Program::job("run", &url).file(&path);
    let mut locker = pool.begin().await.unwrap();
    sqlx::query("lock table authz.group_users in exclusive mode").execute(&mut *locker).await.unwrap();
    let running = program.spawn();
    until("the apply waits", async || waits_for_lock(&pool, "authz.group_users").await).await;
    let killed = newest_run(&pool).await;
    server.kill().unwrap();
    let outcome = running.output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (1, "failed"), "{outcome:?}");
    assert!(!outcome.error().is_empty());
    drop(locker);
    pool.close().await;

    server.restart().await.unwrap();
    let pool = connect(&url).await;
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(run_status(&pool, killed).await, "running");
    assert_next_run_succeeds(&pool, &program, killed).await;
}

#[tokio::test]
async fn server_crash_in_the_crawl_is_not_absence() {
    let mut server = Server::start().await.unwrap();
    let url = server.url("postgres");
    let pool = connect(&url).await;
    authz::migrate(&pool).await.unwrap();
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let before = written_rows(&pool).await;
    let workspace = workspace(org(true).directory()).await;
    let program = Program::job("run", &url).google(&workspace);
    let gate = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::members_of("g10"), Effect::Hold(gate.clone())));
    let running = program.spawn();
    tokio::time::timeout(DEADLINE, gate.arrival(1)).await.unwrap();
    // Some of what came is staged by now, the rest waits for the mirror's users.
    let crashed = newest_run(&pool).await;
    server.kill().unwrap();
    server.restart().await.unwrap();
    pool.close().await;
    let pool = connect(&url).await;
    assert_eq!(number(&pool, "select count(*) from authz.sync_stage_users").await, 0, "unlogged");
    gate.release();
    let outcome = running.output().await;
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(run_status(&pool, crashed).await, "failed");
    let outcome = program.output().await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, wanted(true));
}

#[tokio::test]
async fn program_killed_at_any_moment_leaves_the_old_mirror_or_the_new_one() {
    let (database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &org(false)).await.exit_code(), 0);
    let workspace = workspace(org(true).directory()).await;
    let program = Program::job("run", database.url()).google(&workspace);
    // Two calls for users and groups, one for each of 20 groups.
    let all_calls = 22;
    let mut random = SmallRng::seed_from_u64(20_260_801);
    let mut is_new = false;
    for _ in 0..16 {
        workspace.emulator.replace_directory(org(!is_new).directory());
        let before = workspace.emulator.call_count();
        let calls = random.random_range(0..=2 * all_calls).min(all_calls);
        let mut running = program.spawn();
        let ended = std::cell::Cell::new(false);
        let watched = std::cell::RefCell::new(&mut running);
        until("the run is so far", async || {
            ended.set(watched.borrow_mut().has_ended());
            ended.get() || workspace.emulator.call_count() - before >= calls
        })
        .await;
        // Not to wait for anything: only so that the moments differ, past the last call too.
        let longest = if calls == all_calls { 500 } else { 10 };
        tokio::time::sleep(Duration::from_millis(random.random_range(0..longest))).await;
        running.kill_if_running();
        sessions_ended(&pool).await;
        let mirror = Mirror::read(&pool, MAIN).await;
        if mirror == wanted(!is_new) {
            is_new = !is_new;
        }
        assert_eq!(mirror, wanted(is_new), "after {calls} calls");
        expire_leases(&pool).await;
    }
    workspace.emulator.replace_directory(org(true).directory());
    let outcome = program.output().await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, wanted(true));
    let open = number(&pool, "select count(*) from authz.sync_runs where status = 'running'").await;
    assert_eq!(open, 0);
}
