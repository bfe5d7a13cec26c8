//! On a hot standby: answers follow the primary, and their age says how far behind they may be.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::{Duration, Instant};

use authz::grant::{self, Grant};
use authz::snapshot::Options;
use authz::{Error, Revision, Snapshot, action as actions, audit, user as users};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use support::{action, admin, pattern, user};
use testdb::Server;

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

/// Two servers and a pool on each; on the first, ada may `queue.read`.
struct Pair {
    // Gone in this order.
    reader: PgPool,
    writer: PgPool,
    _standby: Server,
    primary: Server,
}

impl Pair {
    async fn start() -> Self {
        let primary = Server::start().await.unwrap();
        let standby = primary.standby().await.unwrap();
        let pool = async |server: &Server| {
            let options = PgPoolOptions::new().acquire_timeout(Duration::from_secs(10));
            options.connect(&server.url("postgres")).await.unwrap()
        };
        let (writer, reader) = (pool(&primary).await, pool(&standby).await);
        authz::migrate(&writer).await.unwrap();
        users::create(&writer, &user("ada"), "Ada", &admin()).await.unwrap();
        actions::register(&writer, &[(action("queue.read"), "")], &admin()).await.unwrap();
        let pair = Self { reader, writer, _standby: standby, primary };
        pair.arrives(pair.grant().await).await;
        pair
    }

    async fn grant(&self) -> Revision {
        let wanted = Grant::new(pattern("queue.read"), "");
        grant::to_user(&self.writer, &user("ada"), &wanted, &admin()).await.unwrap()
    }

    async fn revoke(&self) -> Revision {
        grant::revoke_from_user(&self.writer, &user("ada"), &pattern("queue.read"), &admin()).await.unwrap()
    }

    /// Waits until the standby has replayed a revision.
    async fn arrives(&self, wanted: Revision) {
        until("the standby has replayed it", async || {
            authz::revision::current(&self.reader).await.is_ok_and(|revision| revision >= wanted)
        })
        .await;
    }

    /// What the standby answers to a question about itself.
    async fn standby_says(&self, question: &'static str) -> bool {
        sqlx::query_scalar(question).fetch_one(&self.reader).await.unwrap()
    }
}

/// The usual way: it tries to listen, which a standby refuses.
fn quick() -> Options {
    Snapshot::options().poll_interval(Duration::from_millis(20))
}

fn may(snapshot: &Snapshot) -> Result<bool, Error> {
    snapshot.check(&user("ada"), &action("queue.read")).map(|verdict| verdict.is_allow())
}

fn is_stale(snapshot: &Snapshot) -> bool {
    matches!(may(snapshot), Err(Error::SnapshotStale { .. }))
}

#[tokio::test]
async fn snapshot_on_a_standby_follows_the_primary() {
    let pair = Pair::start().await;
    let snapshot = quick().start(pair.reader.clone()).await.unwrap();
    assert!(may(&snapshot).unwrap());
    for _ in 0..3 {
        let revision = pair.revoke().await;
        snapshot.at_least(revision).await.unwrap();
        assert!(!may(&snapshot).unwrap());
        let revision = pair.grant().await;
        snapshot.at_least(revision).await.unwrap();
        assert!(may(&snapshot).unwrap());
    }
    assert_eq!(snapshot.loads(), 1, "changes are followed there too");
}

#[tokio::test]
async fn check_on_a_standby_answers_and_changes_nothing() {
    let pair = Pair::start().await;
    let (ada, read) = (user("ada"), action("queue.read"));
    assert!(authz::check(&pair.reader, &ada, &read).await.unwrap().is_allow());
    let explained = authz::explain(&pair.reader, &ada, &read).await.unwrap();
    assert!(explained.decision.is_allow());
    let mut tx = pair.reader.begin().await.unwrap();
    assert!(authz::check(&mut *tx, &ada, &read).await.unwrap().is_allow());
    tx.rollback().await.unwrap();
    let now = sqlx::query_scalar("select now()").fetch_one(&pair.writer).await.unwrap();
    let could = audit::could(&pair.reader, &ada, &read, audit::Moment::At(now)).await.unwrap();
    assert_eq!(could.len(), 1);
    assert_eq!(audit::verify(&pair.reader, &audit::Trust::new()).await.unwrap().finding, None);
    assert_eq!(audit::verify_state(&pair.reader).await.unwrap(), []);
    pair.arrives(pair.revoke().await).await;
    assert!(!authz::check(&pair.reader, &ada, &read).await.unwrap().is_allow());
    let refused = grant::to_user(&pair.reader, &ada, &Grant::new(pattern("*"), ""), &admin()).await;
    assert!(matches!(refused.unwrap_err(), Error::Database(_)));
}

#[tokio::test]
async fn paused_replay_makes_it_stale_until_it_goes_on() {
    let pair = Pair::start().await;
    let snapshot = quick().max_staleness(Duration::from_secs(2)).start(pair.reader.clone()).await.unwrap();
    sqlx::query("select pg_wal_replay_pause()").execute(&pair.reader).await.unwrap();
    until("it pauses", async || pair.standby_says("select pg_get_wal_replay_pause_state() = 'paused'").await)
        .await;
    let revision = pair.revoke().await;
    until("what was written has been received, and not replayed", async || {
        pair.standby_says("select pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()").await
    })
    .await;
    // The standby answers every poll, and still its answers grow old.
    until("it is stale", async || is_stale(&snapshot)).await;
    let older = snapshot.age();
    assert!(older > Duration::from_secs(1), "{older:?}");
    until("its age grows", async || snapshot.age() > older + Duration::from_secs(1)).await;
    assert!(is_stale(&snapshot));
    let behind = snapshot.at_least(revision).await.unwrap_err();
    assert!(matches!(behind, Error::SnapshotBehind { .. }), "{behind}");

    sqlx::query("select pg_wal_replay_resume()").execute(&pair.reader).await.unwrap();
    snapshot.at_least(revision).await.unwrap();
    until("it answers again", async || may(&snapshot).is_ok_and(|may| !may)).await;
}

#[tokio::test]
async fn standby_without_a_primary_serves_until_the_bound_and_not_longer() {
    let mut pair = Pair::start().await;
    // The cheap clock ends it up to a tick early.
    let (nearly, max) = (Duration::from_millis(3_900), Duration::from_secs(4));
    let snapshot = quick().max_staleness(max).start(pair.reader.clone()).await.unwrap();
    until("nothing was written for longer than the bound", async || {
        pair.standby_says("select clock_timestamp() - pg_last_xact_replay_timestamp() > interval '5 s'").await
    })
    .await;
    // An idle primary is not a lost one.
    until("it is known to be young", async || snapshot.age() < Duration::from_secs(1)).await;
    assert!(may(&snapshot).unwrap());

    let (age, then) = (snapshot.age(), Instant::now());
    pair.primary.kill().unwrap();
    until("it is stale", async || is_stale(&snapshot)).await;
    // What was known to be true of a moment is not forgotten: it could be used until that moment was too long ago.
    let served = age + then.elapsed();
    assert!(served > nearly, "{served:?}");
    assert!(snapshot.age() > nearly);

    pair.primary.restart().await.unwrap();
    until("it answers again", async || may(&snapshot).is_ok_and(|may| may)).await;
    until("the primary answers the pool again", async || {
        authz::revision::current(&pair.writer).await.is_ok()
    })
    .await;
    snapshot.at_least(pair.revoke().await).await.unwrap();
    assert!(!may(&snapshot).unwrap());
}
