//! The snapshot follows every kind of change, and then answers as the database does and as one that is freshly loaded.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::{Snapshot, Verdict};
use sqlx::PgPool;

use self::support::{action, database, user};

const WORLD: &str = "
    alter table authz.users alter column user_id restart with 1000;
    alter table authz.groups alter column group_id restart with 1000;
    insert into authz.directories (directory_id, directory_name) values (1, 'one'), (2, 'two');
    insert into authz.actions values ('a'), ('a.b'), ('a.b.c'), ('a.bc'), ('b'), ('b.c');
    insert into authz.users (user_id, user_name, directory_id, external_id)
        select n, 'u' || n, n % 3, 'sub-' || n from generate_series(1, 12) n;
    insert into authz.users (user_id, user_name, directory_id, status) values (13, 'u13', null, 'external');
    insert into authz.groups (group_id, group_name) select n, 'g' || n from generate_series(1, 9) n;
    insert into authz.group_groups values (1, 2), (2, 3), (4, 5);
    insert into authz.group_users (group_id, user_id)
        values (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (3, 13), (8, 8), (9, 9), (8, 9);
    insert into authz.group_actions (group_id, action_name) values (1, 'a.b'), (2, 'a.*');
    insert into authz.user_actions (user_id, action_name) values (10, 'b.c');
";
const ACTIONS: [&str; 7] = ["a", "a.b", "a.b.c", "a.bc", "b", "b.c", "unregistered.x"];

/// More nodes than a snapshot holds as a set of bits for each user, which it does where there are few.
const CROWD: &str = "
    insert into authz.groups (group_id, group_name) select n, 'crowd' || n from generate_series(5001, 5300) n;
    insert into authz.group_actions (group_id, action_name) select n, 'c.*' from generate_series(5001, 5300) n;
";

async fn run(pool: &PgPool, sql: &'static str) {
    let done = sqlx::raw_sql(sql).execute(pool).await;
    assert!(done.is_ok(), "{sql}: {done:?}");
}

fn options() -> authz::snapshot::Options {
    // A poll that comes only when the test asks for one would hide nothing, but this is nearer to life.
    Snapshot::options().by_sub(true).poll_interval(Duration::from_millis(200))
}

async fn world() -> (testdb::Database, PgPool, Snapshot) {
    let (database, pool) = database().await;
    run(&pool, WORLD).await;
    let snapshot = options().start(pool.clone()).await.unwrap();
    (database, pool, snapshot)
}

/// Every verdict of the snapshot, once it has come to the present.
async fn verdicts(pool: &PgPool, snapshot: &Snapshot) -> Vec<(String, Verdict)> {
    snapshot.at_least(authz::revision::current(pool).await.unwrap()).await.unwrap();
    let mut verdicts = Vec::new();
    for name in names(pool).await {
        for asked in ACTIONS {
            verdicts.push((format!("{name} {asked}"), snapshot.check(&user(&name), &action(asked)).unwrap()));
        }
    }
    verdicts
}

/// All names that are or were in use, and one that never was.
async fn names(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "select user_name from authz.users where user_name not like 'many%'
         union select 'u' || n from generate_series(1, 15) n order by 1",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

async fn assert_agrees(pool: &PgPool, snapshot: &Snapshot, after: &str) {
    let found = verdicts(pool, snapshot).await;
    let mut wanted = Vec::new();
    for name in names(pool).await {
        for asked in ACTIONS {
            let decision = authz::check(pool, &user(&name), &action(asked)).await.unwrap();
            wanted.push((format!("{name} {asked}"), decision.verdict()));
        }
    }
    assert_eq!(found, wanted, "after {after}");
    let fresh = options().listen(false).start(pool.clone()).await.unwrap();
    assert_eq!(verdicts(pool, &fresh).await, wanted, "freshly loaded after {after}");
    assert_eq!(snapshot.size().users, fresh.size().users, "after {after}");

    let subs: Vec<(String, String)> = sqlx::query_as(
        "select external_id, user_name from authz.users where external_id is not null and status <> 'deleted'",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    for (sub, name) in subs {
        for asked in ACTIONS {
            let by_name = snapshot.check(&user(&name), &action(asked)).unwrap();
            assert_eq!(
                snapshot.check_sub(&authz::Sub::parse(&sub).unwrap(), &action(asked)).unwrap(),
                by_name,
                "{sub} after {after}"
            );
        }
    }
    for gone in ["sub-gone", "sub-none"] {
        assert!(
            !snapshot.check_sub(&authz::Sub::parse(gone).unwrap(), &action("a.b")).unwrap().is_allow(),
            "{gone} after {after}"
        );
    }
}

#[tokio::test]
async fn every_change_is_followed() {
    let (_database, pool, snapshot) = world().await;
    changes_are_followed(&pool, &snapshot).await;
}

#[tokio::test]
async fn every_change_is_followed_in_a_crowd() {
    let (_database, pool) = database().await;
    run(&pool, WORLD).await;
    run(&pool, CROWD).await;
    let snapshot = options().start(pool.clone()).await.unwrap();
    changes_are_followed(&pool, &snapshot).await;
}

#[tokio::test]
async fn crowd_that_comes_later_is_loaded() {
    let (_database, pool, snapshot) = world().await;
    run(&pool, CROWD).await;
    assert_agrees(&pool, &snapshot, "a crowd").await;
    assert_eq!(snapshot.loads(), 2);
    changes_are_followed(&pool, &snapshot).await;
}

async fn changes_are_followed(pool: &PgPool, snapshot: &Snapshot) {
    let loads = snapshot.loads();
    assert_agrees(pool, snapshot, "the load").await;
    for change in [
        // Grants.
        "insert into authz.group_actions (group_id, action_name) values (4, 'b')",
        "insert into authz.user_actions (user_id, action_name) values (11, 'a.b.c'), (12, '*')",
        "insert into authz.group_actions (group_id, action_name) values (6, 'a.b.*')",
        "insert into authz.group_actions (group_id, action_name) values (8, '*')",
        "update authz.group_actions set expires_at = now() - interval '1 hour' where group_id = 8",
        "insert into authz.group_actions (group_id, action_name, expires_at) values (9, '*', now() + interval '1 day')",
        "update authz.group_actions set expires_at = null where group_id in (8, 9)",
        "update authz.group_actions set action_name = 'a.*' where group_id = 8",
        "update authz.group_actions set group_id = 7 where group_id = 8",
        "delete from authz.group_actions where group_id = 7",
        "delete from authz.user_actions where user_id = 12",
        // Memberships.
        "insert into authz.group_users (group_id, user_id) values (1, 11), (2, 11), (3, 12)",
        "delete from authz.group_users where group_id = 3 and user_id = 3",
        "update authz.group_users set group_id = 1 where group_id = 6",
        "insert into authz.group_groups values (3, 6), (6, 7)",
        "insert into authz.group_groups values (7, 1)", // around
        "insert into authz.group_groups values (5, 4)",
        "delete from authz.group_groups where parent_group_id = 2 and child_group_id = 3",
        "update authz.group_groups set parent_group_id = 4 where parent_group_id = 3",
        "delete from authz.group_groups where parent_group_id = 7",
        "insert into authz.group_directories values (1, 1)",
        "insert into authz.group_directories values (9, 2), (5, 2)",
        "update authz.group_directories set directory_id = 2 where group_id = 1",
        "delete from authz.group_directories where group_id = 5",
        // Users.
        "update authz.users set user_name = 'renamed' where user_id = 2",
        "update authz.users set user_name = case user_id when 1 then 'u4' else 'u1' end where user_id in (1, 4)",
        "update authz.users set external_id = 'sub-new' where user_id = 5",
        "update authz.users set external_id = null where user_id = 5",
        "update authz.users set status = 'suspended' where user_id in (1, 11)",
        "update authz.users set status = 'active' where user_id = 1",
        "update authz.users set directory_id = 2 where user_id = 3",
        "update authz.users set status = 'external', directory_id = null where user_id = 6",
        "update authz.users set status = 'deleted' where user_id in (1, 10)",
        "insert into authz.users (user_id, user_name) values (20, 'u10')", // the freed name, not the grants
        "update authz.users set status = 'active' where user_id = 1",
        "insert into authz.users (user_id, user_name, directory_id) values (21, 'u21', 2), (22, 'u22', 1)",
        "insert into authz.group_users (group_id, user_id) values (1, 21)",
        // Groups.
        "update authz.groups set status = 'deleted' where group_id = 2",
        "insert into authz.group_users (group_id, user_id) values (2, 22)", // what the schema does not forbid
        "insert into authz.group_groups values (2, 9)",
        "update authz.groups set status = 'deleted' where group_id = 1",
        "update authz.groups set status = 'active' where group_id in (1, 2)",
        "insert into authz.group_users (group_id, user_id) values (1, 22), (2, 21)",
        "insert into authz.groups (group_id, group_name) values (30, 'g30')",
        "insert into authz.group_users (group_id, user_id) values (30, 7), (30, 8)",
        "update authz.groups set status = 'deleted' where group_id = 30",
        "insert into authz.group_actions (group_id, action_name) values (30, '*')", // to a deleted group
        "update authz.groups set status = 'active' where group_id = 30",
        "insert into authz.group_users (group_id, user_id) values (30, 8)",
        // Actions.
        "insert into authz.actions values ('unregistered.x')",
        "delete from authz.actions where action_name = 'unregistered.x'",
        "delete from authz.actions where action_name = 'a.bc'",
        "insert into authz.actions values ('a.bc')",
        // All at once, in one transaction.
        "begin;
         update authz.users set user_name = 'u1' where user_id = 7;
         insert into authz.groups (group_id, group_name) values (31, 'g31');
         insert into authz.group_groups values (31, 3);
         insert into authz.group_actions (group_id, action_name) values (31, 'b');
         insert into authz.group_users (group_id, user_id) values (31, 9);
         update authz.users set status = 'suspended' where user_id = 9;
         commit",
    ] {
        if change.contains("user_name = 'u1' where user_id = 7") {
            run(pool, "update authz.users set user_name = 'was1' where user_name = 'u1'").await;
        }
        run(pool, change).await;
        assert_agrees(pool, snapshot, change).await;
    }
    assert_eq!(snapshot.loads(), loads, "everything was followed");
}

/// Each needs a full load, and has the right answers after it.
#[tokio::test]
async fn what_cannot_be_followed_is_loaded() {
    let (_database, pool, snapshot) = world().await;
    for (n, change) in [
        "truncate authz.group_actions",
        "insert into authz.group_actions (group_id, action_name) values (1, 'a.b'), (2, 'a.*'), (8, '*');
         insert into authz.users (user_name) select 'many' || n from generate_series(1, 10001) n",
        "update authz.revision set revision = revision + 10",
    ]
    .into_iter()
    .enumerate()
    {
        run(&pool, change).await;
        assert_agrees(&pool, &snapshot, change).await;
        assert_eq!(snapshot.loads(), n as u64 + 2, "after {change}");
    }
}

/// What was loaded with few users has room for so many more and no others.
#[tokio::test]
async fn many_more_users_than_were_loaded_are_loaded_anew() {
    let (_database, pool, snapshot) = world().await;
    let mut rounds = 0;
    while snapshot.loads() == 1 && rounds < 20 {
        rounds += 1;
        let more = "insert into authz.users (user_name)
                    select format('m%s', u.count + n) from (select count(*) from authz.users) u, generate_series(1, 900) n";
        run(&pool, more).await;
        snapshot.at_least(authz::revision::current(&pool).await.unwrap()).await.unwrap();
    }
    assert_eq!(snapshot.loads(), 2, "after {rounds} rounds of 900 users");
    run(
        &pool,
        "insert into authz.user_actions select user_id, 'b.c' from authz.users where user_name like 'm%7'",
    )
    .await;
    snapshot.at_least(authz::revision::current(&pool).await.unwrap()).await.unwrap();
    let names = names(&pool).await;
    assert_eq!(snapshot.size().users, 13 + 900 * rounds);
    for name in names.iter().filter(|name| name.starts_with('m')) {
        let verdict = snapshot.check(&user(name), &action("b.c")).unwrap();
        assert_eq!(verdict.is_allow(), name.ends_with('7'), "{name}");
    }
}

#[tokio::test]
async fn gap_in_the_changes_is_a_full_load() {
    let (_database, pool, snapshot) = world().await;
    run(
        &pool,
        "begin;
         delete from authz.group_actions where group_id = 1;
         delete from authz.changes where revision = (select revision from authz.revision);
         insert into authz.group_users (group_id, user_id) values (2, 12);
         commit",
    )
    .await;
    assert_agrees(&pool, &snapshot, "a pruned change").await;
    assert_eq!(snapshot.loads(), 2);
}

#[tokio::test]
async fn revision_that_goes_backwards_is_a_full_load() {
    let (_database, pool, snapshot) = world().await;
    // What a restored dump looks like.
    run(
        &pool,
        "begin;
         delete from authz.group_actions where group_id = 1;
         delete from authz.changes;
         update authz.revision set revision = 3;
         commit",
    )
    .await;
    tokio::time::timeout(Duration::from_secs(20), async {
        while snapshot.revision().0 != 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    assert_agrees(&pool, &snapshot, "a restore").await;
    assert_eq!(snapshot.loads(), 2);
}

/// A promoted standby that lacks the last commit, or a backup, gives its number to another change.
#[tokio::test]
async fn revision_that_is_given_twice_is_a_full_load() {
    let (_database, pool, snapshot) = world().await;
    for and_one_more in ["", "insert into authz.group_users (group_id, user_id) values (2, 12);"] {
        run(&pool, "delete from authz.group_actions where group_id = 1").await;
        let seen = authz::revision::current(&pool).await.unwrap();
        snapshot.at_least(seen).await.unwrap();
        let loads = snapshot.loads();
        let other_history = format!(
            "begin;
             alter table authz.group_actions disable trigger z_note_insert;
             insert into authz.group_actions (group_id, action_name) values (1, 'a.b');
             alter table authz.group_actions enable trigger z_note_insert;
             delete from authz.changes where revision = (select revision from authz.revision);
             insert into authz.changes (revision, kind, user_id) select revision, 'user', 12 from authz.revision;
             {and_one_more}
             commit"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(other_history)).execute(&pool).await.unwrap();
        tokio::time::timeout(Duration::from_secs(20), async {
            while snapshot.loads() == loads {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .unwrap();
        assert_agrees(&pool, &snapshot, "another history").await;
    }
}

#[tokio::test]
async fn old_changes_go_as_fast_as_new_ones_come() {
    let (_database, pool) = database().await;
    for round in 0..8 {
        let revision = format!(
            "insert into authz.users (user_name) select format('u%s-{round}', n) from generate_series(1, 5000) n;
             update authz.changes set changed_at = changed_at - interval '2 days';"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(revision)).execute(&pool).await.unwrap();
    }
    let left: i64 = sqlx::query_scalar("select count(*) from authz.changes").fetch_one(&pool).await.unwrap();
    assert!(left <= 15_000, "{left} of 40,000 rows are left");
}

#[tokio::test]
async fn new_grant_reaches_members_of_nested_groups() {
    let (_database, pool, snapshot) = world().await;
    run(&pool, "insert into authz.group_groups values (9, 6), (6, 8)").await;
    assert_agrees(&pool, &snapshot, "edges without a grant").await;
    assert_eq!(snapshot.size().groups, 3);
    run(&pool, "insert into authz.group_actions (group_id, action_name) values (9, 'b')").await;
    assert_agrees(&pool, &snapshot, "a grant at the top").await;
    assert_eq!((snapshot.size().groups, snapshot.loads()), (6, 1));
    assert!(snapshot.check(&user("u8"), &action("b")).unwrap().is_allow());
}

#[tokio::test]
async fn groups_that_no_grant_reaches_are_not_loaded() {
    let (_database, pool, snapshot) = world().await;
    // 1, 2, 3 have members 1, 2, 3 and 13; user 10 has a grant of the user's own.
    let size = snapshot.size();
    assert_eq!((size.users, size.groups, size.memberships), (13, 3, 5));
    run(
        &pool,
        "insert into authz.groups (group_id, group_name) select n, 'g' || n from generate_series(100, 200) n;
         insert into authz.group_users (group_id, user_id) select g, u from generate_series(100, 200) g, generate_series(1, 12) u",
    )
    .await;
    assert_agrees(&pool, &snapshot, "more groups without grants").await;
    let (grown, fresh) = (snapshot.size(), options().start(pool.clone()).await.unwrap().size());
    assert_eq!((grown.groups, grown.memberships), (3, 5));
    assert_eq!((fresh.groups, fresh.memberships), (3, 5));
}

#[tokio::test]
async fn nodes_without_grants_are_given_back() {
    let (_database, pool, snapshot) = world().await;
    for _ in 0..6 {
        run(
            &pool,
            "with made as (
                 insert into authz.groups (group_name) select gen_random_uuid()::text from generate_series(1, 600)
                 returning group_id)
             insert into authz.group_actions (group_id, action_name) select group_id, 'b' from made",
        )
        .await;
        assert_agrees(&pool, &snapshot, "grants to many").await;
        run(&pool, "delete from authz.group_actions where action_name = 'b'").await;
        assert_agrees(&pool, &snapshot, "their end").await;
    }
    // 3,600 would have been kept.
    assert!(snapshot.loads() > 1);
    assert!(snapshot.size().groups < 2_300, "{:?}", snapshot.size());
}

/// Also where more is old than one step takes away: a revision is there with all its changes, or not at all.
#[tokio::test]
async fn old_changes_are_pruned_by_whole_revisions() {
    let (_database, pool) = database().await;
    run(
        &pool,
        "delete from authz.changes;
         insert into authz.changes (revision, kind, user_id, changed_at)
             select 2, 'user', n, now() - interval '2 days' from generate_series(1, 299990) n;
         insert into authz.changes (revision, kind, user_id, changed_at)
             select 3, 'user', n, now() - interval '2 days' from generate_series(1, 100) n;
         insert into authz.changes (revision, kind, user_id, changed_at)
             select 4, 'user', 1, now() - interval '23 hours';
         update authz.revision set revision = 254",
    )
    .await;
    let counts = async || {
        let counts: Vec<(i64, i64)> = sqlx::query_as(
            "select revision, count(*) from authz.changes group by revision order by revision",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        counts
    };
    run(&pool, "insert into authz.actions values ('a')").await;
    assert_eq!(counts().await, [(2, 299_990), (3, 100), (4, 1), (255, 1)], "not at every revision");
    run(&pool, "insert into authz.actions values ('b')").await;
    assert_eq!(counts().await, [(3, 100), (4, 1), (255, 1), (256, 1)]);
    run(&pool, "update authz.revision set revision = 511").await;
    run(&pool, "insert into authz.actions values ('c')").await;
    assert_eq!(counts().await, [(4, 1), (255, 1), (256, 1), (512, 1)]);
}
