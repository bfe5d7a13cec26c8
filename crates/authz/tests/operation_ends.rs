//! How operations end that do not end by themselves: processes killed at every point, servers that crash, sweepers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::{BufRead, BufReader, Lines, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use authz::audit::{self, Entry, Outcome, Writer};
use authz::grant::{self, Grant};
use authz::{Authz, action, user};
use futures_util::FutureExt as _;
use rand::Rng as _;
use sqlx::{Connection as _, PgConnection, PgPool};
use support::{admin, pattern as p, user as u};

const ENVIRONMENT: [&str; 3] =
    ["AUTHZ_TEST_CHILD_DOES", "AUTHZ_TEST_CHILD_DATABASE", "AUTHZ_TEST_CHILD_FOLDER"];

authz::actions! {
    const ACTIONS;

    /// Set a role's number of workers.
    WorkersScale = "workers.scale";
}

/// ada may scale workers.
async fn fill(pool: &PgPool) {
    action::register(pool, ACTIONS, &admin()).await.unwrap();
    user::create(pool, &u("ada"), "Ada", &admin()).await.unwrap();
    grant::to_user(pool, &u("ada"), &Grant::new(p("workers.*"), ""), &admin()).await.unwrap();
    sqlx::query("create table roles (role_name text primary key)").execute(pool).await.unwrap();
}

async fn world() -> (testdb::Database, PgPool) {
    let (database, pool) = support::database().await;
    fill(&pool).await;
    (database, pool)
}

fn service(pool: &PgPool) -> Authz {
    Authz::new(pool.clone()).service("ops-dashboard")
}

async fn trail(pool: &PgPool) -> Vec<Entry> {
    let mut entries = audit::latest(pool, 10_000).await.unwrap();
    entries.retain(|entry| entry.service == "ops-dashboard");
    entries.reverse();
    entries
}

async fn outcomes(pool: &PgPool) -> Vec<Outcome> {
    trail(pool).await.iter().map(|entry| entry.outcome).collect()
}

/// As if the owners had not renewed their leases for long.
async fn let_leases_end(pool: &PgPool) {
    sqlx::query("update authz.operation_owners set expires_at = clock_timestamp() - interval '1 second'")
        .execute(pool)
        .await
        .unwrap();
}

async fn sweep(pool: &PgPool) -> u64 {
    audit::sweep(pool, Duration::ZERO).await.unwrap()
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_mins(1), waiting).await.is_ok(), "never: {what}");
}

/// The end of a process is not the end of what the server does for it.
async fn until_alone(pool: &PgPool, name: &str) {
    until("the server has noticed", async || {
        let sessions: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = $1",
        )
        .bind(name)
        .fetch_one(pool)
        .await
        .unwrap();
        sessions == 0
    })
    .await;
}

/// A process that does operations and stops at points that it says.
struct Other {
    process: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Other {
    fn start(database: &testdb::Database, does: &str, folder: &Path) -> Self {
        let url = format!("{}{}application_name=other", database.url(), separator(database.url()));
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(ENVIRONMENT[0], does)
            .env(ENVIRONMENT[1], url)
            .env(ENVIRONMENT[2], folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = process.stdin.take().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, stdin, lines }
    }

    /// Lets it go on to a point.
    fn reach(&mut self, point: &str) {
        loop {
            let line = self.lines.next().expect("it ended before that point").unwrap();
            if let Some(here) = line.strip_prefix("point ") {
                if here == point {
                    return;
                }
                self.go_on();
            }
        }
    }

    fn go_on(&mut self) {
        writeln!(self.stdin).unwrap();
    }

    /// SIGKILL; nothing of it runs afterwards.
    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn separator(url: &str) -> char {
    if url.contains('?') { '&' } else { '?' }
}

fn point(name: &str) {
    println!("\npoint {name}");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// What the other process does. Not a test: the tests start it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by other tests as a process of its own"]
async fn child() {
    let [does, url, folder] = ENVIRONMENT.map(|name| std::env::var(name).unwrap_or_default());
    if does.is_empty() {
        return;
    }
    let pool = PgPool::connect(&url).await.unwrap();
    let authz = service(&pool);
    let folder = Path::new(&folder).to_owned();
    match does.as_str() {
        "run" => {
            point("before");
            authz
                .operation::<WorkersScale>(&u("ada"))
                .run(async |_| {
                    point("started");
                    std::fs::write(folder.join("effect"), "").unwrap();
                    point("effect");
                    Ok::<_, Infallible>(())
                })
                .await
                .unwrap();
            point("ended");
        }
        "transact" => {
            authz
                .operation::<WorkersScale>(&u("ada"))
                .transact(async |_, connection| {
                    point("begun");
                    sqlx::query("insert into roles values ('web')").execute(connection).await.unwrap();
                    point("changed");
                    Ok::<_, Infallible>(())
                })
                .await
                .unwrap();
            point("committed");
        }
        _ => {
            let tasks = (0..4).map(|task| {
                let (authz, folder, does) = (authz.clone(), folder.clone(), does.clone());
                tokio::spawn(async move {
                    for n in 0.. {
                        let name = format!("{does}-{task}-{n}");
                        let operation = authz.operation::<WorkersScale>(&u("ada")).target(&name);
                        operation.run(async |_| std::fs::write(folder.join(&name), "")).await.unwrap();
                        println!("\ndone {name}");
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn process_killed_at_any_point_leaves_a_trail_that_tells_what_happened() {
    use Outcome::{Abandoned, Started, Succeeded};
    let expected: [(&str, &[Outcome], bool, &[Outcome]); 4] = [
        ("before", &[], false, &[]),
        ("started", &[Started], false, &[Started, Abandoned]),
        ("effect", &[Started], true, &[Started, Abandoned]),
        ("ended", &[Started, Succeeded], true, &[Started, Succeeded]),
    ];
    for (point, at_once, effect, swept) in expected {
        let (database, pool) = world().await;
        let folder = tempfile();
        let mut other = Other::start(&database, "run", folder.path());
        other.reach(point);
        other.kill();
        assert_eq!(outcomes(&pool).await, at_once, "killed at `{point}`");
        assert_eq!(folder.path().join("effect").exists(), effect, "killed at `{point}`");
        sweep(&pool).await;
        assert_eq!(outcomes(&pool).await, at_once, "swept at `{point}` before its lease has ended");
        let_leases_end(&pool).await;
        sweep(&pool).await;
        assert_eq!(outcomes(&pool).await, swept, "swept after a kill at `{point}`");
        let trail = trail(&pool).await;
        if let [started, end] = &trail[..] {
            assert_eq!(end.operation_id, Some(started.audit_id));
            assert_eq!((&end.actor, &end.action), (&started.actor, &started.action));
        }
    }
}

#[tokio::test]
async fn process_killed_inside_a_transaction_has_changed_and_recorded_nothing_or_both() {
    for (point, outcome) in [("begun", None), ("changed", None), ("committed", Some(Outcome::Succeeded))] {
        let (database, pool) = world().await;
        let folder = tempfile();
        let mut other = Other::start(&database, "transact", folder.path());
        other.reach(point);
        other.kill();
        until_alone(&pool, "other").await;
        assert_eq!(outcomes(&pool).await, outcome.into_iter().collect::<Vec<_>>(), "killed at `{point}`");
        let roles: i64 = sqlx::query_scalar("select count(*) from roles").fetch_one(&pool).await.unwrap();
        assert_eq!(roles == 1, outcome.is_some(), "killed at `{point}`");
    }
}

#[tokio::test]
async fn process_killed_while_a_record_is_being_written_leaves_it_whole_or_not_at_all() {
    for (before, effect) in [("before", false), ("effect", true)] {
        let (database, pool) = world().await;
        let folder = tempfile();
        let mut other = Other::start(&database, "run", folder.path());
        other.reach(before);
        // The record of the start, or of the end, is with the server and cannot be written yet.
        let mut lock = pool.begin().await.unwrap();
        sqlx::query("lock table authz.audit_log in exclusive mode").execute(&mut *lock).await.unwrap();
        other.go_on();
        until("the record waits", async || {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity
                 where datname = current_database() and application_name = 'other' and wait_event_type = 'Lock'",
            )
            .fetch_one(&pool)
            .await
            .unwrap();
            waiting == 1
        })
        .await;
        other.kill();
        lock.rollback().await.unwrap();
        until_alone(&pool, "other").await;
        let_leases_end(&pool).await;
        sweep(&pool).await;
        let said = outcomes(&pool).await;
        assert_eq!(folder.path().join("effect").exists(), effect);
        let told = said.is_empty() && !effect
            || said == [Outcome::Started, Outcome::Abandoned]
            || effect && said == [Outcome::Started, Outcome::Succeeded];
        assert!(told, "killed after `{before}`: {said:?}");
    }
}

#[tokio::test]
async fn processes_killed_at_random_have_no_effect_without_a_start_and_no_start_without_an_end() {
    let (database, pool) = world().await;
    let folder = tempfile();
    let mut done = BTreeSet::new();
    for round in 0..8 {
        let mut other = Other::start(&database, &format!("round{round}"), folder.path());
        // Until it is at work, then some time more.
        let first = other.lines.find_map(|line| line.unwrap().strip_prefix("done ").map(str::to_owned));
        done.insert(first.unwrap());
        std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..30_000)));
        other.process.kill().unwrap();
        other.process.wait().unwrap();
        // A kill may cut a line short.
        let lines: Vec<String> = other.lines.map_while(Result::ok).collect();
        let said = lines.iter().filter_map(|line| line.strip_prefix("done "));
        let whole = said.filter(|name| name.split('-').count() == 3 && folder.path().join(name).exists());
        done.extend(whole.map(str::to_owned));
    }
    until_alone(&pool, "other").await;
    let_leases_end(&pool).await;
    sweep(&pool).await;
    let all = trail(&pool).await;
    let started: BTreeSet<_> =
        all.iter().filter(|e| e.outcome == Outcome::Started).map(|e| e.target.clone().unwrap()).collect();
    let ends: Vec<_> = all.iter().filter(|e| e.outcome != Outcome::Started).collect();
    for effect in std::fs::read_dir(folder.path()).unwrap() {
        let name = effect.unwrap().file_name().into_string().unwrap();
        assert!(started.contains(&name), "{name} was done without a start");
    }
    for name in &done {
        let end = ends.iter().find(|end| end.target.as_ref() == Some(name));
        assert_eq!(end.map(|end| end.outcome), Some(Outcome::Succeeded), "{name} was reported as done");
    }
    let ended: BTreeSet<_> = ends.iter().map(|end| end.operation_id.unwrap()).collect();
    assert_eq!((ends.len(), ended.len()), (started.len(), started.len()), "one end for each start");
}

#[tokio::test]
async fn concurrent_sweepers_record_each_operation_once() {
    let (database, pool) = world().await;
    let authz = service(&pool);
    let mut running = Vec::new();
    for _ in 0..40 {
        running.push(authz.operation::<WorkersScale>(&u("ada")).start().await.unwrap());
    }
    assert_eq!(sweep(&pool).await, 0, "their owner lives");
    let_leases_end(&pool).await;
    assert_eq!(audit::sweep(&pool, Duration::from_hours(1)).await.unwrap(), 0, "they are young");
    // Whoever writes `abandoned` waits here until all the others are done or wait too.
    sqlx::raw_sql(
        "create function wait_at_the_gate() returns trigger language plpgsql as
         $$ begin perform pg_advisory_xact_lock_shared(1); return new; end $$;
         create trigger gate before insert on authz.audit_log for each row when (new.outcome = 'abandoned')
         execute function wait_at_the_gate();",
    )
    .execute(&pool)
    .await
    .unwrap();
    let mut gate = PgConnection::connect(database.url()).await.unwrap();
    sqlx::query("select pg_advisory_lock(1)").execute(&mut gate).await.unwrap();
    let many = sqlx::postgres::PgPoolOptions::new().max_connections(8).connect(database.url()).await.unwrap();
    let sweepers = (0..8).map(|_| {
        let pool = many.clone();
        tokio::spawn(async move { sweep(&pool).await })
    });
    let sweepers: Vec<_> = sweepers.collect();
    until("all have come to the gate or past it", async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event = 'advisory'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        let done = sweepers.iter().filter(|sweeper| sweeper.is_finished()).count();
        waiting > 0 && usize::try_from(waiting).unwrap() + done == 8
    })
    .await;
    sqlx::query("select pg_advisory_unlock(1)").execute(&mut gate).await.unwrap();
    let mut swept = 0;
    for sweeper in sweepers {
        swept += sweeper.await.unwrap();
    }
    assert_eq!(swept, 40);
    assert_eq!(sweep(&pool).await, 0);
    let abandoned = async || outcomes(&pool).await.iter().filter(|o| **o == Outcome::Abandoned).count();
    assert_eq!(abandoned().await, 40);

    // They were only cut off: what they say in the end is recorded all the same.
    for one in running {
        one.succeed().await;
    }
    let ends: i64 = sqlx::query_scalar(
        "select count(distinct a.operation_id)
         from authz.audit_log a join authz.audit_log s using (operation_id)
         where a.outcome = 'abandoned' and s.outcome = 'succeeded'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!((ends, abandoned().await), (40, 40));
}

#[tokio::test]
async fn service_that_shuts_down_waits_for_its_operations_and_leaves_no_owner() {
    let (_database, pool) = world().await;
    let authz = service(&pool);
    let running = authz.operation::<WorkersScale>(&u("ada")).start().await.unwrap();
    let ending = tokio::spawn({
        let authz = authz.clone();
        async move { authz.shutdown().await }
    });
    tokio::task::yield_now().await;
    running.succeed().await;
    ending.await.unwrap();
    assert_eq!(outcomes(&pool).await, [Outcome::Started, Outcome::Succeeded]);
    let owners: i64 =
        sqlx::query_scalar("select count(*) from authz.operation_owners").fetch_one(&pool).await.unwrap();
    assert_eq!(owners, 0);
}

#[tokio::test]
async fn each_shutdown_waits_for_what_runs() {
    let (_database, pool) = world().await;
    let authz = service(&pool);
    let running = authz.operation::<WorkersScale>(&u("ada")).start().await.unwrap();
    // Given up, as by a timeout.
    assert_eq!(authz.shutdown().now_or_never(), None);
    let mut again = Box::pin(authz.shutdown());
    let mut at_once = Box::pin(authz.shutdown());
    assert_eq!((&mut again).now_or_never(), None);
    assert_eq!((&mut at_once).now_or_never(), None);
    running.succeed().await;
    again.await;
    at_once.await;
    assert_eq!(outcomes(&pool).await, [Outcome::Started, Outcome::Succeeded]);
    authz.shutdown().await;
    // And what begins later.
    authz.operation::<WorkersScale>(&u("ada")).start().await.unwrap().succeed().await;
    authz.shutdown().await;
    let owners = "select count(*) from authz.operation_owners";
    assert_eq!(sqlx::query_scalar::<_, i64>(owners).fetch_one(&pool).await.unwrap(), 0);
}

/// Ends every other session of the database, and waits until they are gone.
async fn end_sessions(other: &mut PgConnection) {
    sqlx::query(
        "select pg_terminate_backend(pid, 10000) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()",
    )
    .execute(other)
    .await
    .unwrap();
}

/// On the clock that idle times are taken by.
async fn be_idle() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(2)).await;
    tokio::time::resume();
}

#[tokio::test]
async fn session_that_ended_while_nobody_wrote_costs_no_record() {
    let (database, pool) = world().await;
    user::create(&pool, &u("bob"), "Bob", &admin()).await.unwrap();
    let mut other = PgConnection::connect(database.url()).await.unwrap();
    let authz = service(&pool);
    let run =
        async |name| authz.operation::<WorkersScale>(&u(name)).run(async |_| Ok::<_, Infallible>(())).await;
    assert!(run("bob").await.is_err());
    end_sessions(&mut other).await;
    be_idle().await;
    assert!(run("bob").await.is_err());
    assert_eq!(outcomes(&pool).await, [Outcome::Denied; 2]);
    end_sessions(&mut other).await;
    be_idle().await;
    run("ada").await.unwrap();
}

#[tokio::test]
async fn restart_while_nobody_wrote_costs_no_record() {
    let mut server = testdb::Server::start().await.unwrap();
    let pool = PgPool::connect(&server.url("postgres")).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    let (writer, who) = (Writer::start(pool), admin());
    let record = audit::Record::new("workers.scale", Outcome::Denied);
    writer.record(&who, &record).await.unwrap();
    server.kill().unwrap();
    server.restart().await.unwrap();
    be_idle().await;
    writer.record(&who, &record).await.unwrap();
}

#[tokio::test]
async fn end_is_recorded_once_although_the_connection_was_lost() {
    let (database, pool) = world().await;
    let authz = service(&pool);
    let running = authz.operation::<WorkersScale>(&u("ada")).start().await.unwrap();
    let mut other = PgConnection::connect(database.url()).await.unwrap();
    sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()",
    )
    .execute(&mut other)
    .await
    .unwrap();
    running.succeed().await;
    let ends: Vec<String> = sqlx::query_scalar(
        "select outcome from authz.audit_log where service = 'ops-dashboard' order by audit_id",
    )
    .fetch_all(&mut other)
    .await
    .unwrap();
    assert_eq!(ends, ["started", "succeeded"]);
}

#[tokio::test]
async fn what_was_recorded_survives_a_crash_of_the_server() {
    let mut server = testdb::Server::start().await.unwrap();
    let pool = PgPool::connect(&server.url("postgres")).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    fill(&pool).await;
    // The server would keep commits in memory for as long as it can.
    for careless in [
        "alter database postgres set synchronous_commit = off",
        "alter system set wal_writer_delay = '10s'",
        "select pg_reload_conf()",
    ] {
        sqlx::query(careless).execute(&pool).await.unwrap();
    }
    pool.close().await;
    let pool = PgPool::connect(&server.url("postgres")).await.unwrap();
    let setting: String = sqlx::query_scalar("show synchronous_commit").fetch_one(&pool).await.unwrap();
    assert_eq!(setting, "off");
    let authz = service(&pool);
    let mut expected = Vec::new();
    for round in 0..3 {
        let running = authz.operation::<WorkersScale>(&u("ada")).start().await;
        let running = running.expect("the server runs");
        expected.push(Outcome::Started);
        if round == 1 {
            authz
                .operation::<WorkersScale>(&u("ada"))
                .transact(async |_, c| sqlx::query("insert into roles values ('web')").execute(c).await)
                .await
                .unwrap();
            expected.push(Outcome::Succeeded);
        }
        server.kill().unwrap();
        let (restarted, ()) = tokio::join!(server.restart(), running.succeed());
        restarted.unwrap();
        authz.shutdown().await;
        expected.push(Outcome::Succeeded);
        until("the server answers", async || sqlx::query("select 1").execute(&pool).await.is_ok()).await;
        assert_eq!(outcomes(&pool).await, expected);
    }
    pool.close().await;
}

#[tokio::test]
async fn operation_takes_two_commits_and_waiting_ones_share_them() {
    let server = testdb::Server::start().await.unwrap();
    let pool = PgPool::connect(&server.url("postgres")).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    fill(&pool).await;
    sqlx::query("alter system set autovacuum = off").execute(&pool).await.unwrap();
    sqlx::query("select pg_reload_conf()").execute(&pool).await.unwrap();
    let authz = service(&pool);
    let commits = async || -> i64 {
        let next: String = sqlx::query_scalar("select pg_snapshot_xmax(pg_current_snapshot())::text")
            .fetch_one(&pool)
            .await
            .unwrap();
        next.parse().unwrap()
    };
    let operation = async || {
        authz.operation::<WorkersScale>(&u("ada")).run(async |_| Ok::<_, Infallible>(())).await.unwrap();
    };
    operation().await;
    let before = commits().await;
    for _ in 0..50 {
        operation().await;
    }
    let alone = commits().await - before;
    assert!((100..=110).contains(&alone), "50 operations, one after the other, took {alone} commits");

    // All of them wait, then go in one.
    let writer = Writer::start(pool.clone());
    let record = audit::Record::new("workers.scale", Outcome::Succeeded);
    let who = admin();
    writer.record(&who, &record).await.unwrap();
    let before = commits().await;
    let mut ids =
        futures_util::future::try_join_all((0..256).map(|_| writer.record(&who, &record))).await.unwrap();
    let together = commits().await - before;
    assert!(together <= 4, "256 records at once took {together} commits");
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 256);
    pool.close().await;
}

#[tokio::test]
async fn one_record_that_is_not_accepted_does_not_take_others_with_it() {
    let (_database, pool) = world().await;
    sqlx::query("alter table authz.audit_log add constraint no_bad check (target <> 'bad') not valid")
        .execute(&pool)
        .await
        .unwrap();
    let writer = Writer::start(pool.clone());
    let targets: Vec<_> =
        (0..50).map(|n| if n == 25 { "bad".to_owned() } else { format!("good {n}") }).collect();
    let who = admin();
    let written = futures_util::future::join_all(targets.iter().map(async |target| {
        let record = audit::Record::new("workers.scale", Outcome::Succeeded).target(target);
        writer.record(&who, &record).await
    }))
    .await;
    for (target, written) in targets.iter().zip(&written) {
        assert_eq!(written.is_err(), target == "bad", "{target}: {written:?}");
    }
    for (target, id) in targets.iter().zip(written.into_iter().map(Result::ok)) {
        let stored: Option<String> =
            sqlx::query_scalar("select target from authz.audit_log where audit_id = $1")
                .bind(id)
                .fetch_optional(&pool)
                .await
                .unwrap();
        assert_eq!(stored.as_ref(), id.map(|_| target), "the number is that of the caller's own record");
    }
}

fn tempfile() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}
