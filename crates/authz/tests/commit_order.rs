//! Readers see no state that the order of the commits does not explain; and they would, without the lock on the revision.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use authz::{ActionName, Authz, Revision, Snapshot, UserName, action as actions, user as users};
use sqlx::{Executor, PgPool, Postgres, Transaction};
use support::{action, admin, user};

const WRITERS: usize = 4;
const TRANSFERS: usize = 40;

/// The two users between whom a writer moves its own key.
fn holders(writer: usize) -> [UserName; 2] {
    [user(&format!("left{writer}")), user(&format!("right{writer}"))]
}

fn key(writer: usize) -> ActionName {
    action(&format!("key{writer}"))
}

async fn world(pool: &PgPool) {
    for writer in 0..WRITERS {
        for name in holders(writer) {
            users::create(pool, &name, "", &admin()).await.unwrap();
        }
        actions::register(pool, &[(key(writer), "")], &admin()).await.unwrap();
        let mut tx = pool.begin().await.unwrap();
        hand_over(&mut tx, writer, 0).await;
        tx.commit().await.unwrap();
    }
}

/// Takes the writer's key from both of its users, then gives it to one: two changes, of which no reader may see one alone.
async fn hand_over(tx: &mut Transaction<'_, Postgres>, writer: usize, to: usize) {
    sqlx::query("delete from authz.user_actions where action_name = $1")
        .bind(key(writer).as_str())
        .execute(&mut **tx)
        .await
        .unwrap();
    sqlx::query(
        "insert into authz.user_actions (user_id, action_name)
         select u.user_id, $2 from authz.users u where u.user_name = $1",
    )
    .bind(holders(writer)[to].as_str())
    .bind(key(writer).as_str())
    .execute(&mut **tx)
    .await
    .unwrap();
}

/// What somebody saw: at this revision, this user of this writer had the key, or not.
type Seen = BTreeSet<(Revision, usize, usize, bool)>;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_see_only_states_that_the_commit_order_explains() {
    let (database, pool) = support::database().await;
    world(&pool).await;
    let start = authz::revision::current(&pool).await.unwrap();
    let snapshot = Snapshot::options()
        .poll_interval(Duration::from_millis(1))
        .start(support::pool(&database).await)
        .await
        .unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(Mutex::new(Seen::new()));
    let committed = Arc::new(AtomicI64::new(start.0));

    let readers: Vec<_> = (0..4)
        .map(|reader| {
            let (snapshot, done, seen) = (snapshot.clone(), Arc::clone(&done), Arc::clone(&seen));
            let (authz, committed) = (Authz::new(pool.clone()), Arc::clone(&committed));
            tokio::spawn(async move {
                let mut round = reader;
                while !done.load(Ordering::Acquire) {
                    round += 1;
                    let writer = round % WRITERS;
                    for (side, name) in holders(writer).iter().enumerate() {
                        let least = committed.load(Ordering::SeqCst);
                        let verdict = match reader {
                            0 => authz.check(name, &key(writer)).await.unwrap().verdict(),
                            1 => snapshot.check_confirmed(authz.pool(), name, &key(writer)).await.unwrap(),
                            _ => snapshot.check(name, &key(writer)).unwrap(),
                        };
                        let (revision, holds) = (verdict.revision(), verdict.is_allow());
                        assert!(reader > 1 || revision.0 >= least, "{revision} is older than the question");
                        seen.lock().unwrap().insert((revision, writer, side, holds));
                    }
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (pool, committed) = (pool.clone(), Arc::clone(&committed));
            tokio::spawn(async move {
                let mut commits = Vec::new();
                for transfer in 1..=TRANSFERS {
                    let mut tx = pool.begin().await.unwrap();
                    hand_over(&mut tx, writer, transfer % 2).await;
                    let revision = authz::revision::current(&mut *tx).await.unwrap();
                    tx.commit().await.unwrap();
                    committed.fetch_max(revision.0, Ordering::SeqCst);
                    commits.push((revision, writer, transfer % 2));
                }
                commits
            })
        })
        .collect();
    // By revision, who holds which key from then on.
    let mut history = BTreeMap::from([(start, [0; WRITERS])]);
    let mut commits = Vec::new();
    for writer in writers {
        commits.extend(writer.await.unwrap());
    }
    commits.sort();
    for (revision, writer, to) in commits {
        let mut state = *history.last_key_value().unwrap().1;
        state[writer] = to;
        assert!(history.insert(revision, state).is_none(), "two commits made revision {revision}");
    }
    let last = *history.last_key_value().unwrap().0;
    snapshot.at_least(last).await.unwrap();
    done.store(true, Ordering::Release);
    for reader in readers {
        reader.await.unwrap();
    }

    let seen = seen.lock().unwrap();
    let revisions: BTreeSet<Revision> = seen.iter().map(|(revision, ..)| *revision).collect();
    assert!(revisions.len() > TRANSFERS / 4, "the readers saw {} states, too few to tell", revisions.len());
    for &(revision, writer, side, holds) in &*seen {
        let state = history.get(&revision);
        assert!(state.is_some(), "a state in the middle of a transaction: revision {revision}");
        assert_eq!(
            holds,
            state.unwrap()[writer] == side,
            "writer {writer}, side {side}, revision {revision}"
        );
    }
}

/// Two writers, of whom the first takes its number first and commits last if it can; then whether a snapshot that saw
/// both numbers knows both changes.
async fn snapshot_knows_both(pool: &PgPool) -> bool {
    let snapshot = Snapshot::options()
        .poll_interval(Duration::from_millis(1))
        .listen(false)
        .start(pool.clone())
        .await
        .unwrap();
    let mut first = pool.begin().await.unwrap();
    hand_over(&mut first, 0, 1).await;
    let second = tokio::spawn({
        let pool = pool.clone();
        async move {
            let mut tx = pool.begin().await.unwrap();
            hand_over(&mut tx, 1, 1).await;
            tx.commit().await.unwrap();
        }
    });
    let overtaken = tokio::time::timeout(Duration::from_mins(1), async {
        loop {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'",
            )
            .fetch_one(pool)
            .await
            .unwrap();
            if waiting > 0 || second.is_finished() {
                return second.is_finished();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap();
    if overtaken {
        let now = authz::revision::current(pool).await.unwrap();
        snapshot.at_least(now).await.unwrap();
    }
    first.commit().await.unwrap();
    second.await.unwrap();
    snapshot.at_least(authz::revision::current(pool).await.unwrap()).await.unwrap();
    let knows = |writer: usize| snapshot.check(&holders(writer)[1], &key(writer)).unwrap().is_allow();
    knows(0) && knows(1)
}

#[tokio::test]
async fn snapshot_knows_the_changes_of_both_of_two_writers() {
    let (_database, pool) = support::database().await;
    world(&pool).await;
    assert!(snapshot_knows_both(&pool).await);
}

/// What the test above protects from: numbers that are given without the lock.
#[tokio::test]
async fn without_the_lock_a_snapshot_misses_a_change_for_good() {
    let (database, pool) = support::database().await;
    world(&pool).await;
    let source: String = sqlx::query_scalar(
        "select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where n.nspname = 'authz' and p.proname = 'note_changes'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    let locked = "update authz.revision set revision = revision + 1 returning revision into current;";
    assert!(source.contains(locked), "the function has changed; so must this test");
    let script = format!(
        "create sequence authz.unlocked;
         select setval('authz.unlocked', (select revision from authz.revision));
         alter table authz.revision rename to locked_revision;
         create view authz.revision as select last_value as revision from authz.unlocked;
         create or replace function authz.lock_revision() returns trigger language plpgsql as
             $$ begin return null; end $$;
         {};",
        source.replace(locked, "current := nextval('authz.unlocked');")
    );
    pool.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(script))).await.unwrap();
    // Connections that have planned nothing yet.
    pool.close().await;
    let pool = support::pool(&database).await;
    assert!(!snapshot_knows_both(&pool).await, "the lock makes no difference, or the test does not see it");
}

#[tokio::test]
async fn readers_never_see_a_table_that_was_emptied_and_filled_again() {
    let (_database, pool) = support::database().await;
    world(&pool).await;
    let mut tx = pool.begin().await.unwrap();
    tx.execute("create temporary table kept on commit drop as select * from authz.user_actions")
        .await
        .unwrap();
    tx.execute("truncate authz.user_actions").await.unwrap();
    tx.execute("insert into authz.user_actions (user_id, action_name) select user_id, action_name from kept")
        .await
        .unwrap();
    let starting = tokio::spawn(Snapshot::options().start(pool.clone()));
    let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&pool).await.unwrap() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    tx.commit().await.unwrap();
    let snapshot = starting.await.unwrap().unwrap();
    // The next poll comes later: this is what the load saw.
    for writer in 0..WRITERS {
        assert!(snapshot.check(&holders(writer)[0], &key(writer)).unwrap().is_allow(), "{writer}");
    }
}
