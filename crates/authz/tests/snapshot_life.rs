//! How a snapshot stays fresh, says that it is not, and ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::{Denial, Error, Revision, Snapshot, Verdict};
use chrono::{DateTime, Utc};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use self::support::{action, database, user};

const DEADLINE: Duration = Duration::from_mins(1);
const LONG: Duration = Duration::from_hours(1);
const WORLD: &str = "
    insert into authz.actions values ('a');
    insert into authz.users (user_id, user_name) values (1, 'ada'), (2, 'bob');
    insert into authz.user_actions (user_id, action_name) values (1, 'a')";

async fn run(pool: &PgPool, sql: &'static str) -> Revision {
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
    authz::revision::current(pool).await.unwrap()
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain until {what}");
}

async fn follows(snapshot: &Snapshot, revision: Revision) {
    until("the snapshot has followed", async || snapshot.revision() >= revision).await;
}

fn may(snapshot: &Snapshot, name: &str) -> Result<bool, Error> {
    snapshot.check(&user(name), &action("a")).map(|verdict| verdict.is_allow())
}

const LISTENERS: &str = "select count(*) from pg_stat_activity where datname = current_database()
                         and query ilike 'listen%' and pid <> pg_backend_pid()";

async fn listeners(pool: &PgPool) -> i64 {
    sqlx::query_scalar(LISTENERS).fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn notification_brings_a_change_without_a_poll() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot =
        Snapshot::options().poll_interval(LONG).max_staleness(LONG).start(pool.clone()).await.unwrap();
    until("it listens", async || listeners(&pool).await == 1).await;
    let revision = run(&pool, "delete from authz.user_actions").await;
    follows(&snapshot, revision).await;
    assert!(!may(&snapshot, "ada").unwrap());
}

#[tokio::test]
async fn killed_listener_comes_back_and_misses_nothing() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot =
        Snapshot::options().poll_interval(LONG).max_staleness(LONG).start(pool.clone()).await.unwrap();
    until("it listens", async || listeners(&pool).await == 1).await;
    for round in 0..3 {
        let killed: Vec<i32> = sqlx::query_scalar(
            "select pid from pg_stat_activity where datname = current_database()
             and query ilike 'listen%' and pg_terminate_backend(pid)",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        assert_eq!(killed.len(), 1);
        // While nobody listens.
        let revision = match round % 2 {
            0 => run(&pool, "delete from authz.user_actions").await,
            _ => run(&pool, "insert into authz.user_actions (user_id, action_name) values (1, 'a')").await,
        };
        follows(&snapshot, revision).await;
        assert_eq!(may(&snapshot, "ada").unwrap(), round % 2 == 1);
        until("another one listens", async || {
            let new: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity where datname = current_database()
                 and query ilike 'listen%' and pid <> $1",
            )
            .bind(killed[0])
            .fetch_one(&pool)
            .await
            .unwrap();
            new == 1
        })
        .await;
    }
}

#[tokio::test]
async fn polling_alone_follows() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let options = Snapshot::options().listen(false).poll_interval(Duration::from_millis(30));
    let snapshot = options.start(pool.clone()).await.unwrap();
    let revision = run(&pool, "delete from authz.user_actions").await;
    follows(&snapshot, revision).await;
    assert!(!may(&snapshot, "ada").unwrap());
    assert_eq!(listeners(&pool).await, 0);
}

#[tokio::test]
async fn one_reads_what_one_wrote() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let options = Snapshot::options().listen(false).poll_interval(LONG).max_staleness(LONG);
    let snapshot = options.start(pool.clone()).await.unwrap();
    for _ in 0..5 {
        let revision = run(&pool, "delete from authz.user_actions").await;
        snapshot.at_least(revision).await.unwrap();
        assert!(!may(&snapshot, "ada").unwrap());
        let revision =
            run(&pool, "insert into authz.user_actions (user_id, action_name) values (1, 'a')").await;
        snapshot.at_least(revision).await.unwrap();
        assert!(may(&snapshot, "ada").unwrap());
    }
}

#[tokio::test]
async fn revision_that_does_not_come_is_an_error() {
    let (_database, pool) = database().await;
    let now = run(&pool, WORLD).await;
    let snapshot =
        Snapshot::options().max_staleness(Duration::from_millis(300)).start(pool.clone()).await.unwrap();
    let wanted = Revision(now.0 + 1);
    match snapshot.at_least(wanted).await {
        Err(Error::SnapshotBehind { wanted: w, has }) => assert_eq!((w, has), (wanted, now)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn lost_database_makes_it_stale_until_it_is_back() {
    let mut server = testdb::Server::start().await.unwrap();
    let pool = PgPoolOptions::new()
        .acquire_timeout(Duration::from_secs(2))
        .connect(&server.url("postgres"))
        .await
        .unwrap();
    authz::migrate(&pool).await.unwrap();
    run(&pool, WORLD).await;
    let snapshot = Snapshot::options()
        .max_staleness(Duration::from_secs(3))
        .poll_interval(Duration::from_millis(50))
        .start(pool.clone())
        .await
        .unwrap();
    assert!(may(&snapshot, "ada").unwrap());
    server.kill().unwrap();
    until("it is stale", async || matches!(may(&snapshot, "ada"), Err(Error::SnapshotStale { .. }))).await;
    assert!(snapshot.age() > Duration::from_secs(2));
    assert!(matches!(snapshot.at_least(Revision(i64::MAX)).await, Err(Error::SnapshotBehind { .. })));
    server.restart().await.unwrap();
    until("it answers again", async || may(&snapshot, "ada").is_ok_and(|may| may)).await;
    until("the host's pool answers again", async || authz::revision::current(&pool).await.is_ok()).await;
    let revision = run(&pool, "delete from authz.user_actions").await;
    follows(&snapshot, revision).await;
    until("it is current", async || may(&snapshot, "ada").is_ok_and(|may| !may)).await;
}

#[tokio::test]
async fn pool_that_the_host_has_used_up_makes_it_stale() {
    let (database, _) = database().await;
    let options = PgPoolOptions::new().max_connections(1).acquire_timeout(Duration::from_millis(200));
    let pool = options.connect(database.url()).await.unwrap();
    run(&pool, WORLD).await;
    let snapshot = Snapshot::options()
        .listen(false)
        .max_staleness(Duration::from_secs(2))
        .poll_interval(Duration::from_millis(20))
        .start(pool.clone())
        .await
        .unwrap();
    assert!(may(&snapshot, "ada").unwrap());
    let mut taken = None;
    until("the pool is used up", async || {
        taken = pool.acquire().await.ok();
        taken.is_some()
    })
    .await;
    until("it is stale", async || matches!(may(&snapshot, "ada"), Err(Error::SnapshotStale { .. }))).await;
    drop(taken);
    until("it answers again", async || may(&snapshot, "ada").is_ok()).await;
}

#[tokio::test]
async fn grant_ends_by_the_clock_of_the_database_without_a_change() {
    for pattern in ["a", "*"] {
        grant_ends_by_the_clock_of_the_database(pattern).await;
    }
}

async fn grant_ends_by_the_clock_of_the_database(pattern: &str) {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let ends: DateTime<Utc> = sqlx::query_scalar(
        "update authz.user_actions set action_name = $1, expires_at = clock_timestamp() + interval '700 ms'
         returning expires_at",
    )
    .bind(pattern)
    .fetch_one(&pool)
    .await
    .unwrap();
    let snapshot = Snapshot::options().start(pool.clone()).await.unwrap();
    let revision = snapshot.revision();
    until("the grant has ended", async || {
        let before: DateTime<Utc> =
            sqlx::query_scalar("select clock_timestamp()").fetch_one(&pool).await.unwrap();
        let verdict = snapshot.check(&user("ada"), &action("a")).unwrap();
        assert!(
            verdict == Verdict::Allow { revision }
                || verdict == Verdict::Deny { reason: Denial::Expired, revision }
        );
        assert!(!verdict.is_allow() || before < ends, "not a moment longer");
        !verdict.is_allow()
    })
    .await;
    assert_eq!(authz::revision::current(&pool).await.unwrap(), revision);
}

#[tokio::test]
async fn directory_that_is_not_mirrored_any_more_is_an_error() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let max = Duration::from_hours(1);
    let snapshot = Snapshot::options()
        .poll_interval(Duration::from_millis(30))
        .max_directory_age(max)
        .start(pool.clone())
        .await
        .unwrap();
    assert!(may(&snapshot, "ada").unwrap()); // no directory
    run(&pool, "insert into authz.directories (directory_id, directory_name) values (1, 'one')").await;
    let stale = async |known: bool| {
        until("it says so", async || {
            matches!(may(&snapshot, "ada"), Err(Error::DirectoryStale { age, max: m }) if age.is_some() == known && m == max)
        })
        .await;
    };
    let polled = run(&pool, "insert into authz.actions values ('later')").await;
    snapshot.at_least(polled).await.unwrap();
    assert!(may(&snapshot, "ada").unwrap(), "nothing has come from that directory yet");
    run(&pool, "insert into authz.groups (group_name, directory_id, external_id) values ('theirs', 1, 'g1')")
        .await;
    stale(false).await;
    run(&pool, "update authz.directories set last_complete_sync_at = now() where directory_id = 1").await;
    until("it answers", async || may(&snapshot, "ada").is_ok()).await;
    run(&pool, "update authz.directories set last_complete_sync_at = now() - interval '2 hours' where directory_id = 1")
        .await;
    stale(true).await;
}

#[tokio::test]
async fn two_snapshots_on_one_thread_do_not_mix() {
    let (_one, first_pool) = database().await;
    let (_two, second_pool) = database().await;
    run(&first_pool, WORLD).await;
    run(&second_pool, WORLD).await;
    run(&second_pool, "update authz.user_actions set user_id = 2").await;
    let first = Snapshot::options().start(first_pool.clone()).await.unwrap();
    let second = Snapshot::options().start(second_pool.clone()).await.unwrap();
    for _ in 0..3 {
        assert!(may(&first, "ada").unwrap() && !may(&first, "bob").unwrap());
        assert!(!may(&second, "ada").unwrap() && may(&second, "bob").unwrap());
    }
    let revision = run(&first_pool, "delete from authz.user_actions").await;
    first.at_least(revision).await.unwrap();
    assert!(!may(&first, "ada").unwrap());
    assert!(may(&second, "bob").unwrap());
}

#[tokio::test]
async fn shutdown_gives_back_the_connections() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let own = PgPoolOptions::new()
        .max_connections(2)
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let snapshot =
        Snapshot::options().poll_interval(Duration::from_millis(10)).start(own.clone()).await.unwrap();
    let other = snapshot.clone();
    until("it listens", async || listeners(&pool).await == 1).await;
    tokio::time::timeout(DEADLINE, snapshot.shutdown()).await.unwrap();
    assert!(matches!(may(&snapshot, "ada"), Err(Error::SnapshotClosed)));
    assert!(matches!(may(&other, "ada"), Err(Error::SnapshotClosed)));
    assert!(matches!(other.at_least(Revision(0)).await, Err(Error::SnapshotClosed)));
    tokio::time::timeout(DEADLINE, other.shutdown()).await.unwrap(); // again
    tokio::time::timeout(DEADLINE, own.close()).await.unwrap(); // waits for all that are out
    until("the listener is gone", async || listeners(&pool).await == 0).await;
}

#[tokio::test]
async fn last_handle_that_goes_ends_the_task() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let own = PgPoolOptions::new()
        .max_connections(2)
        .connect_with((*pool.connect_options()).clone())
        .await
        .unwrap();
    let snapshot =
        Snapshot::options().poll_interval(Duration::from_millis(10)).start(own.clone()).await.unwrap();
    until("it listens", async || listeners(&pool).await == 1).await;
    let other = snapshot.clone();
    drop(snapshot);
    assert!(may(&other, "ada").unwrap());
    drop(other);
    until("the listener is gone", async || listeners(&pool).await == 0).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    tokio::time::timeout(DEADLINE, own.close()).await.unwrap();
    pool.close().await;
    until("its task has ended", async || tasks() == 0).await;
}

#[tokio::test]
async fn sub_needs_to_be_asked_for() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = Snapshot::options().start(pool).await.unwrap();
    assert!(matches!(
        snapshot.check_sub(&authz::Sub::parse("x").unwrap(), &action("a")),
        Err(Error::Unindexed)
    ));
}

#[tokio::test]
async fn id_that_is_too_long_for_a_sub_stops_nobody_else() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let with_id =
        "insert into authz.users (user_id, user_name, external_id) values ($2, $1, repeat('1', $2))";
    let [loaded, followed] = ["first@example.com", "second@example.com"];
    sqlx::query(with_id).bind(loaded).bind(2_500).execute(&pool).await.unwrap();
    let snapshot = Snapshot::options().by_sub(true).start(pool.clone()).await.unwrap();
    sqlx::query(with_id).bind(followed).bind(2_499).execute(&pool).await.unwrap();
    snapshot.at_least(authz::revision::current(&pool).await.unwrap()).await.unwrap();
    assert!(may(&snapshot, "ada").unwrap());
    for name in [loaded, followed] {
        let verdict = snapshot.check(&user(name), &action("nothing")).unwrap();
        assert!(
            matches!(verdict, Verdict::Deny { reason: Denial::UnknownAction, .. }),
            "{name}: {verdict:?}"
        );
    }
}
