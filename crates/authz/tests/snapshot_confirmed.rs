//! Answers from memory that the database confirms are those of the database, whatever the snapshot has missed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::{Denial, Error, On, Refusal, Revision, Snapshot, Sub, Verdict};
use sqlx::{Connection, PgConnection, PgPool};

use self::support::{action, database, user};

const LONG: Duration = Duration::from_hours(1);
const WORLD: &str = "
    insert into authz.actions values ('a'), ('a.web'), ('b');
    insert into authz.users (user_id, user_name, external_id, status) values
        (1, 'ada', 'sub-ada', 'active'), (2, 'bob', 'sub-bob', 'active'), (3, 'eve', 'sub-eve', 'suspended');
    insert into authz.user_actions (user_id, action_name, expires_at) values
        (1, 'a', null), (1, 'a.*', null), (2, 'b', now() - interval '1 second'), (3, 'a', null)";

authz::actions! {
    const ACTIONS;

    /// Look.
    pub Look = "a";
}

async fn run(pool: &PgPool, sql: &'static str) -> Revision {
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
    authz::revision::current(pool).await.unwrap()
}

/// One that learns of nothing by itself.
fn asleep() -> authz::snapshot::Options {
    Snapshot::options().poll_interval(LONG).max_staleness(LONG * 3).listen(false)
}

async fn may(snapshot: &Snapshot, connection: &mut PgConnection, name: &str) -> bool {
    snapshot.check_confirmed(connection, &user(name), &action("a")).await.unwrap().is_allow()
}

/// Whether the snapshot answered, which does not know the grant.
async fn answered_here(snapshot: &Snapshot, connection: &mut PgConnection) -> bool {
    let permit = snapshot.authorize_confirmed::<Look>(connection, &user("ada")).await.unwrap();
    permit.grant().is_none()
}

#[tokio::test]
async fn same_revision_is_answered_from_memory_and_another_by_the_database() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    let mut connection = pool.acquire().await.unwrap();
    assert!(answered_here(&snapshot, &mut connection).await);

    let revision = run(&pool, "delete from authz.user_actions where user_id = 1 and action_name = 'a'").await;
    assert!(snapshot.check(&user("ada"), &action("a")).unwrap().is_allow(), "it has not noticed");
    let verdict = snapshot.check_confirmed(&pool, &user("ada"), &action("a")).await.unwrap();
    assert_eq!(verdict, Verdict::Deny { reason: Denial::NoGrant, revision });

    run(&pool, "insert into authz.user_actions (user_id, action_name) values (1, 'a')").await;
    assert!(!answered_here(&snapshot, &mut connection).await);
    snapshot.at_least(authz::revision::current(&pool).await.unwrap()).await.unwrap();
    assert!(answered_here(&snapshot, &mut connection).await, "it has followed");
}

#[tokio::test]
async fn every_verdict_is_that_of_the_check() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().by_sub(true).start(pool.clone()).await.unwrap();
    for late in [false, true] {
        if late {
            run(&pool, "insert into authz.user_actions (user_id, action_name) values (2, 'a')").await;
        }
        let mut questions = Vec::new();
        let mut answers = Vec::new();
        for name in ["ada", "bob", "eve", "nobody"] {
            let sub = Sub::parse(&format!("sub-{name}")).unwrap();
            for asked in ["a", "a.web", "b", "unregistered"] {
                let wanted = authz::check(&pool, &user(name), &action(asked)).await.unwrap().verdict();
                let by_name = snapshot.check_confirmed(&pool, &user(name), &action(asked)).await.unwrap();
                assert_eq!(by_name, wanted, "{name} {asked} {late}");
                let by_sub = snapshot.check_confirmed(&pool, &sub, &action(asked)).await.unwrap();
                assert_eq!(by_sub, wanted, "{name} {asked} {late}");
                questions.push((user(name), action(asked)));
                answers.push(wanted);
            }
        }
        assert_eq!(snapshot.check_many_confirmed(&pool, &questions).await.unwrap(), answers, "{late}");
        assert_eq!(snapshot.check_many_confirmed(&pool, &[]).await.unwrap(), []);
    }
}

#[tokio::test]
async fn a_transaction_is_judged_by_what_it_has_done_itself() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    assert!(may(&snapshot, &mut transaction, "ada").await);
    sqlx::raw_sql("savepoint s; delete from authz.user_actions").execute(&mut *transaction).await.unwrap();
    assert!(!may(&snapshot, &mut transaction, "ada").await);
    assert!(snapshot.check(&user("ada"), &action("a")).unwrap().is_allow(), "nobody else sees it");
    sqlx::raw_sql("rollback to savepoint s").execute(&mut *transaction).await.unwrap();
    assert!(may(&snapshot, &mut transaction, "ada").await);
    sqlx::raw_sql("delete from authz.user_actions").execute(&mut *transaction).await.unwrap();
    transaction.rollback().await.unwrap();

    // The revision that was taken back is given again, to another change.
    run(&pool, "insert into authz.user_actions (user_id, action_name) values (2, 'a')").await;
    let mut connection = pool.acquire().await.unwrap();
    assert!(may(&snapshot, &mut connection, "ada").await);
    assert!(may(&snapshot, &mut connection, "bob").await);
}

#[tokio::test]
async fn a_transaction_that_began_before_is_judged_by_what_it_sees() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    let mut before = pool.begin_with("begin isolation level repeatable read").await.unwrap();
    let seen = authz::revision::current(&mut *before).await.unwrap();
    let revision = run(&pool, "delete from authz.user_actions").await;
    snapshot.at_least(revision).await.unwrap();
    let verdict = snapshot.check_confirmed(&mut *before, &user("ada"), &action("a")).await.unwrap();
    assert_eq!(verdict, Verdict::Allow { revision: seen });
    before.rollback().await.unwrap();
    assert!(!may(&snapshot, &mut pool.acquire().await.unwrap(), "ada").await);
}

#[tokio::test]
async fn another_database_of_the_same_revision_answers_for_itself() {
    let (_database, pool) = database().await;
    let (other_database, other) = database().await;
    run(&pool, WORLD).await;
    run(&other, WORLD).await;
    let revision = run(&pool, "delete from authz.user_actions where user_id = 3").await;
    let same = run(&other, "delete from authz.user_actions where user_id = 1").await;
    assert_eq!(revision, same);
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    let mut connection = PgConnection::connect(other_database.url()).await.unwrap();
    assert!(!may(&snapshot, &mut connection, "ada").await);
    assert!(may(&snapshot, &mut pool.acquire().await.unwrap(), "ada").await);
}

#[tokio::test]
async fn a_revision_without_its_change_is_taken_for_another() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    run(&pool, "delete from authz.changes").await;
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    let mut connection = pool.acquire().await.unwrap();
    assert!(!answered_here(&snapshot, &mut connection).await);
    // The newest change is of an older revision: it says nothing of this one.
    run(&pool, "insert into authz.user_actions (user_id, action_name) values (2, 'a')").await;
    run(&pool, "update authz.revision set revision = revision + 1").await;
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    assert!(!answered_here(&snapshot, &mut connection).await);
}

#[tokio::test]
async fn an_old_snapshot_still_answers_and_a_closed_one_does_not() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().max_staleness(Duration::ZERO).start(pool.clone()).await.unwrap();
    let stale = snapshot.check(&user("ada"), &action("a"));
    assert!(matches!(stale, Err(Error::SnapshotStale { .. })), "{stale:?}");
    assert!(answered_here(&snapshot, &mut pool.acquire().await.unwrap()).await);
    snapshot.shutdown().await;
    let closed = snapshot.check_confirmed(&pool, &user("ada"), &action("a")).await;
    assert!(matches!(closed, Err(Error::SnapshotClosed)), "{closed:?}");
}

#[tokio::test]
async fn a_directory_that_is_too_old_is_an_error_here_too() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().max_directory_age(LONG).start(pool.clone()).await.unwrap();
    let mut connection = pool.acquire().await.unwrap();
    assert!(may(&snapshot, &mut connection, "ada").await);
    run(
        &pool,
        "insert into authz.directories (directory_id, directory_name, last_complete_sync_at)
         values (1, 'one', now() - interval '2 hours')",
    )
    .await;
    let refused = snapshot.check_confirmed(&mut *connection, &user("ada"), &action("a")).await;
    assert!(matches!(refused, Err(Error::DirectoryStale { .. })), "{refused:?}");
}

#[tokio::test]
async fn permits_are_of_the_question_and_name_the_user() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    assert_eq!(ACTIONS.len(), 1);
    let here = asleep().by_sub(true).start(pool.clone()).await.unwrap();
    let there = asleep().start(pool.clone()).await.unwrap();
    let ada = Sub::parse("sub-ada").unwrap();
    for (snapshot, in_memory) in [(&here, true), (&there, false)] {
        let permit = snapshot.authorize_confirmed::<Look>(&pool, &ada).await.unwrap();
        assert_eq!((permit.user(), permit.grant().is_none()), (&user("ada"), in_memory));
        let permit = snapshot.authorize_on_confirmed::<Look>(&pool, &ada, "web").await.unwrap();
        assert_eq!((permit.user(), permit.resource()), (&user("ada"), "web"));
        assert!(permit.for_resource("db").is_err());
        let permit = snapshot.authorize_named_confirmed(&pool, &ada, &action("a.web")).await.unwrap();
        assert_eq!(permit.action(), &action("a.web"));
    }
    let denied = here.authorize_confirmed::<Look>(&pool, &user("eve")).await;
    assert!(matches!(denied, Err(Refusal::Denied(denied)) if denied.reason == Denial::Suspended));
    let no_resource = here.authorize_on_confirmed::<Look>(&pool, &ada, "Web Site").await;
    assert!(matches!(no_resource, Err(Refusal::NotAResource { .. })));
    let _: Result<authz::Permit<On<Look>>, _> = no_resource;
}

/// As inside a handler of axum, whose futures go from thread to thread: that this compiles is half of the test.
#[tokio::test]
async fn everything_can_be_asked_in_a_task_on_whatever_the_caller_has() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = asleep().start(pool.clone()).await.unwrap();
    let (shared, transactions) = (snapshot.clone(), pool.clone());
    let in_transaction = tokio::spawn(async move {
        let (pool, snapshot, ada, a) = (transactions, shared, user("ada"), action("a"));
        let mut tx = authz::begin(&pool).await?;
        // Nobody else sees it, and what the snapshot has would allow.
        sqlx::query("delete from authz.user_actions where user_id = 1").execute(&mut *tx).await?;
        let mut verdicts = vec![
            snapshot.check_confirmed(&mut *tx, &ada, &a).await?,
            snapshot.check_confirmed(&mut tx, &ada, &a).await?,
        ];
        let questions = [(ada.clone(), a.clone())];
        verdicts.extend(snapshot.check_many_confirmed(&mut *tx, &questions).await?);
        verdicts.extend(snapshot.check_many_confirmed(&mut tx, &questions).await?);
        let refused = [
            snapshot.authorize_confirmed::<Look>(&mut *tx, &ada).await.is_err(),
            snapshot.authorize_confirmed::<Look>(&mut tx, &ada).await.is_err(),
            snapshot.authorize_on_confirmed::<Look>(&mut *tx, &ada, "web").await.is_err(),
            snapshot.authorize_on_confirmed::<Look>(&mut tx, &ada, "web").await.is_err(),
            snapshot.authorize_named_confirmed(&mut *tx, &ada, &a).await.is_err(),
            snapshot.authorize_named_confirmed(&mut tx, &ada, &a).await.is_err(),
        ];
        tx.rollback().await?;
        Ok::<_, Error>((verdicts, refused))
    });
    let (verdicts, refused) = in_transaction.await.unwrap().unwrap();
    assert_eq!((verdicts.len(), refused), (4, [true; 6]));
    assert!(!verdicts.iter().any(Verdict::is_allow), "{verdicts:?}");

    let on_connection = tokio::spawn(async move {
        let (ada, a) = (user("ada"), action("a"));
        let mut lent = pool.acquire().await?;
        let mut verdicts = vec![
            snapshot.check_confirmed(&pool, &ada, &a).await?,
            snapshot.check_confirmed(&mut lent, &ada, &a).await?,
            snapshot.check_confirmed(&mut *lent, &ada, &a).await?,
        ];
        let questions = [(ada.clone(), a.clone())];
        verdicts.extend(snapshot.check_many_confirmed(&pool, &questions).await?);
        verdicts.extend(snapshot.check_many_confirmed(&mut lent, &questions).await?);
        let permitted = [
            snapshot.authorize_confirmed::<Look>(&pool, &ada).await.is_ok(),
            snapshot.authorize_confirmed::<Look>(&mut lent, &ada).await.is_ok(),
            snapshot.authorize_on_confirmed::<Look>(&pool, &ada, "web").await.is_ok(),
            snapshot.authorize_on_confirmed::<Look>(&mut lent, &ada, "web").await.is_ok(),
            snapshot.authorize_named_confirmed(&pool, &ada, &a).await.is_ok(),
            snapshot.authorize_named_confirmed(&mut lent, &ada, &a).await.is_ok(),
        ];
        Ok::<_, Error>((verdicts, permitted))
    });
    let (verdicts, permitted) = on_connection.await.unwrap().unwrap();
    assert_eq!((verdicts.len(), permitted), (5, [true; 6]));
    assert!(verdicts.iter().all(Verdict::is_allow), "{verdicts:?}");
}
