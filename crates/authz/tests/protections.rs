//! What keeps a reader from believing what is not so: the lock on the revision, polling, the bound on staleness.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::grant::{self, Grant};
use authz::snapshot::Options;
use authz::{Error, Snapshot, action as actions, user as users};
use sqlx::{Connection, PgConnection, PgPool};
use support::{action, admin, pattern, user};

/// What cannot take so long unless it is broken.
const PATIENCE: Duration = Duration::from_mins(1);

/// Comes back when the condition holds, and fails the test if it never does.
async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never: {what}");
}

/// ada may `queue.read`.
async fn small_world(pool: &PgPool) {
    users::create(pool, &user("ada"), "Ada", &admin()).await.unwrap();
    actions::register(pool, &[(action("queue.read"), "")], &admin()).await.unwrap();
    grant::to_user(pool, &user("ada"), &Grant::new(pattern("queue.read"), ""), &admin()).await.unwrap();
}

fn quick() -> Options {
    Snapshot::options().poll_interval(Duration::from_millis(20))
}

fn allows(snapshot: &Snapshot) -> bool {
    snapshot.check(&user("ada"), &action("queue.read")).unwrap().is_allow()
}

async fn revoke(pool: &PgPool) {
    grant::revoke_from_user(pool, &user("ada"), &pattern("queue.read"), &admin()).await.unwrap();
}

#[tokio::test]
async fn polling_alone_brings_a_revoke() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let snapshot = quick().listen(false).start(pool.clone()).await.unwrap();
    assert!(allows(&snapshot));
    revoke(&pool).await;
    until("the revoke", async || !allows(&snapshot)).await;
}

#[tokio::test]
async fn a_notification_brings_a_revoke_before_the_poll() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    // The poll is due in an hour.
    let hour = Duration::from_hours(1);
    let snapshot =
        Snapshot::options().poll_interval(hour).max_staleness(2 * hour).start(pool.clone()).await.unwrap();
    until("a listener", async || {
        let listening: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        listening > 0
    })
    .await;
    assert!(allows(&snapshot));
    revoke(&pool).await;
    until("the revoke", async || !allows(&snapshot)).await;
}

/// As behind a pooler in transaction mode, which gives each transaction any of its server connections.
#[tokio::test]
async fn a_snapshot_keeps_nothing_in_a_session() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let forgetful = sqlx::postgres::PgPoolOptions::new()
        .max_connections(2)
        .after_release(|connection, _| {
            Box::pin(async move {
                sqlx::raw_sql("discard all").execute(connection).await?;
                Ok(true)
            })
        })
        .connect_with((*pool.connect_options()).clone().statement_cache_capacity(0))
        .await
        .unwrap();
    let snapshot = quick().listen(false).start(forgetful).await.unwrap();
    assert!(allows(&snapshot));
    revoke(&pool).await;
    until("the revoke", async || !allows(&snapshot)).await;
    grant::to_user(&pool, &user("ada"), &Grant::new(pattern("queue.*"), ""), &admin()).await.unwrap();
    until("the grant", async || allows(&snapshot)).await;
    assert_eq!(snapshot.loads(), 1, "changes were not followed");
}

#[tokio::test]
async fn a_snapshot_whose_listener_was_cut_off_follows() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let snapshot = quick().start(pool.clone()).await.unwrap();
    sqlx::query(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()",
    )
    .execute(&pool)
    .await
    .unwrap();
    // The host's own connections went as well.
    let host = PgPool::connect_with((*pool.connect_options()).clone()).await.unwrap();
    revoke(&host).await;
    until("the revoke", async || !allows(&snapshot)).await;
}

#[tokio::test]
async fn past_its_bound_a_snapshot_neither_allows_nor_denies() {
    let mut server = testdb::Server::start().await.unwrap();
    let url = server.url("postgres");
    let pool = PgPool::connect(&url).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    small_world(&pool).await;
    let max = Duration::from_millis(500);
    let snapshot = quick().max_staleness(max).start(pool.clone()).await.unwrap();
    server.kill().unwrap();
    until("an error", async || snapshot.check(&user("ada"), &action("queue.read")).is_err()).await;
    let error = snapshot.check(&user("ada"), &action("queue.read")).unwrap_err();
    assert!(matches!(error, Error::SnapshotStale { .. }), "{error}");
    // The bound is kept a tick of the cheap clock early.
    until("an age past the bound", async || snapshot.age() > max).await;
    let behind = snapshot.at_least(authz::Revision(i64::MAX)).await.unwrap_err();
    assert!(matches!(behind, Error::SnapshotBehind { .. }), "{behind}");
    server.restart().await.unwrap();
    until("an answer", async || {
        snapshot.check(&user("ada"), &action("queue.read")).is_ok_and(|verdict| verdict.is_allow())
    })
    .await;
    pool.close().await;
}

#[tokio::test]
async fn a_later_revision_waits_for_the_earlier_one() {
    let (database, pool) = support::database().await;
    small_world(&pool).await;
    let before = authz::revision::current(&pool).await.unwrap();
    let mut first = PgConnection::connect(database.url()).await.unwrap();
    let mut tx = first.begin().await.unwrap();
    sqlx::query("insert into authz.actions values ('first')").execute(&mut *tx).await.unwrap();
    let second = tokio::spawn({
        let pool = pool.clone();
        async move { sqlx::query("insert into authz.actions values ('second')").execute(&pool).await }
    });
    until("the second writer waits for the first", async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query like '%second%'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        waiting == 1 || second.is_finished()
    })
    .await;
    assert!(!second.is_finished(), "the second writer overtook the first");
    assert_eq!(authz::revision::current(&pool).await.unwrap(), before);
    tx.commit().await.unwrap();
    second.await.unwrap().unwrap();
    let order: Vec<(String, i64)> = sqlx::query_as(
        "select action_name, revision from authz.changes where revision > $1 order by revision",
    )
    .bind(before.0)
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(order, [("first".to_owned(), before.0 + 1), ("second".to_owned(), before.0 + 2)]);
}

#[tokio::test]
async fn a_closed_snapshot_says_so_and_gives_back_its_connections() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let snapshot = quick().start(pool.clone()).await.unwrap();
    let clone = snapshot.clone();
    snapshot.shutdown().await;
    let error = clone.check(&user("ada"), &action("queue.read")).unwrap_err();
    assert!(matches!(error, Error::SnapshotClosed), "{error}");
    until("the listener's connection is closed", async || {
        let listening: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        listening == 0
    })
    .await;
}
