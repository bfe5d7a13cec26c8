//! The replay of grants and memberships from the trail, held against the tables.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;
#[path = "support/trail.rs"]
mod trail;

use authz::audit::verify_state;
use authz::grant::{self, Grant};
use authz::{group, user};
use sqlx::{Executor, PgPool};
use support::{admin, group as g, pattern, user as u};
use trail::spoil;

/// (table, is live, is in the trail)
async fn found(pool: &PgPool) -> Vec<(String, bool, bool)> {
    let differences = verify_state(pool).await.unwrap();
    differences.iter().map(|d| (d.table.clone(), d.live.is_some(), d.trail.is_some())).collect()
}

async fn world(pool: &PgPool) {
    for name in ["a", "b"] {
        user::create(pool, &u(name), "", &admin()).await.unwrap();
    }
    for name in ["g", "h"] {
        group::create(pool, &g(name), "", &admin()).await.unwrap();
    }
    grant::to_user(pool, &u("a"), &Grant::new(pattern("workers.*"), "why"), &admin()).await.unwrap();
    grant::to_group(pool, &g("g"), &Grant::new(pattern("*"), "why"), &admin()).await.unwrap();
    group::add_user(pool, &g("g"), &u("a"), group::Role::Member, &admin()).await.unwrap();
    group::add_group(pool, &g("g"), &g("h"), &admin()).await.unwrap();
}

#[tokio::test]
async fn what_is_recorded_is_no_difference_whoever_did_it_and_however() {
    let (_database, pool) = support::database().await;
    assert!(found(&pool).await.is_empty());
    world(&pool).await;
    assert!(found(&pool).await.is_empty());
    let expiring = Grant::new(pattern("workers.*"), "again").until("2031-01-01T00:00:00Z".parse().unwrap());
    grant::to_user(&pool, &u("a"), &expiring, &admin()).await.unwrap();
    grant::revoke_from_group(&pool, &g("g"), &pattern("*"), &admin()).await.unwrap();
    for sql in [
        "set timezone = 'Asia/Kathmandu'; update authz.user_actions set expires_at = expires_at + interval '1 hour'",
        "update authz.user_actions set action_name = 'look.*'",
        "update authz.group_users set role = 'owner'",
        // The name goes to another user, the grant stays with its row.
        "update authz.users set status = 'deleted' where user_name = 'a'; insert into authz.users (user_name) values ('a')",
        "insert into authz.group_users select 2, 2; delete from authz.group_users where user_id = 2",
        "update authz.groups set status = 'deleted' where group_name = 'h'",
        "insert into authz.group_directories values (1, 0)",
        "begin; delete from authz.user_actions; insert into authz.user_actions (user_id, action_name) values (2, 'x.*'); commit",
        // Taken and given again by one statement, whose parts do not end in the order of their rows.
        "insert into authz.user_actions (user_id, action_name) values (1, 'x.*')",
        "with taken as (delete from authz.user_actions where action_name = 'x.*' returning user_id)
         insert into authz.user_actions (user_id, action_name, reason) select user_id, 'x.*', 'again' from taken limit 1",
        "with moved as (update authz.user_actions set action_name = 'y.*' where action_name = 'x.*' returning user_id)
         insert into authz.user_actions (user_id, action_name) select user_id, 'x.*' from moved limit 1",
        // Given, and taken again by a trigger of the same statement that ran before the records were made.
        "with given as (insert into authz.group_users values (2, 2) returning 1)
         update authz.groups set status = 'active' where group_id = 2",
        "with given as (insert into authz.group_users values (2, 2) returning 1)
         update authz.groups set status = 'deleted' where group_id = 2",
        "with given as (update authz.group_users set group_id = 2 where group_id = 1 returning 1)
         update authz.groups set status = 'active' where group_id = 2 and exists (select from given)",
    ] {
        pool.execute(sql).await.expect(sql);
        assert_eq!(verify_state(&pool).await.unwrap(), [], "{sql}");
    }
    pool.execute("truncate authz.user_actions").await.unwrap();
    assert!(found(&pool).await.is_empty());
    pool.execute("insert into authz.user_actions (user_id, action_name) values (2, 'x.*')").await.unwrap();
    pool.execute("truncate authz.group_users, authz.group_groups, authz.group_directories").await.unwrap();
    assert!(found(&pool).await.is_empty());
}

#[tokio::test]
async fn what_a_sync_keeps_is_not_compared() {
    let (_database, pool) = support::database().await;
    world(&pool).await;
    pool.execute(
        "begin;
         set local authz.sync_run = '1';
         insert into authz.directories (directory_id, directory_name) values (1, 'acme');
         insert into authz.groups (group_id, group_name, directory_id, external_id) values (100, 'staff', 1, 'x');
         insert into authz.group_users values (100, 1), (100, 2);
         insert into authz.group_directories values (100, 1);
         commit",
    )
    .await
    .unwrap();
    assert!(found(&pool).await.is_empty());
    // A local group whose members the trail knows becomes the directory's, which changes them.
    pool.execute("update authz.groups set directory_id = 1, external_id = 'g' where group_name = 'g'")
        .await
        .unwrap();
    pool.execute("begin; set local authz.sync_run = '2'; delete from authz.group_users; commit")
        .await
        .unwrap();
    assert!(found(&pool).await.is_empty());
    // Its grants are ours all the same.
    spoil(&pool, &["delete from authz.group_actions"]).await;
    assert_eq!(found(&pool).await, [("group_actions".to_owned(), false, true)]);
}

#[tokio::test]
async fn what_was_done_with_the_triggers_off_is_a_difference() {
    for (statement, table, live, trail) in [
        (
            "insert into authz.user_actions (user_id, action_name) values (2, 'x.*')",
            "user_actions",
            true,
            false,
        ),
        (
            "insert into authz.group_actions (group_id, action_name) values (2, 'x.*')",
            "group_actions",
            true,
            false,
        ),
        ("insert into authz.group_users values (2, 2)", "group_users", true, false),
        ("insert into authz.group_groups values (2, 1)", "group_groups", true, false),
        ("insert into authz.group_directories values (2, 0)", "group_directories", true, false),
        ("delete from authz.user_actions", "user_actions", false, true),
        ("delete from authz.group_actions", "group_actions", false, true),
        ("delete from authz.group_users", "group_users", false, true),
        ("delete from authz.group_groups", "group_groups", false, true),
        ("update authz.user_actions set expires_at = '2031-01-01'", "user_actions", true, true),
        ("update authz.user_actions set granted_by = 'the boss'", "user_actions", true, true),
        ("update authz.group_actions set reason = ''", "group_actions", true, true),
        ("update authz.group_users set role = 'owner'", "group_users", true, true),
        (
            "delete from authz.audit_log where action = 'grant.add' and detail ? 'user'",
            "user_actions",
            true,
            false,
        ),
    ] {
        let (_database, pool) = support::database().await;
        world(&pool).await;
        spoil(&pool, &[statement]).await;
        assert_eq!(found(&pool).await, [(table.to_owned(), live, trail)], "{statement}");
    }
    // To another user, and back: the one has too little, the other too much.
    let (_database, pool) = support::database().await;
    world(&pool).await;
    spoil(&pool, &["update authz.user_actions set user_id = 2"]).await;
    let all = found(&pool).await;
    assert_eq!(all, [("user_actions".to_owned(), false, true), ("user_actions".to_owned(), true, false)]);
}

#[tokio::test]
async fn a_replay_begins_from_the_last_baseline() {
    let (_database, pool) = support::database().await;
    world(&pool).await;
    // Without its records, as in a database from before they named rows by number.
    spoil(&pool, &["delete from authz.audit_log"]).await;
    assert_eq!(found(&pool).await.len(), 4);
    pool.execute("select authz.write_audit_baseline()").await.unwrap();
    assert!(found(&pool).await.is_empty());
    grant::revoke_from_user(&pool, &u("a"), &pattern("workers.*"), &admin()).await.unwrap();
    pool.execute(
        "insert into authz.users (user_id, user_name) select n, 'user' || n from generate_series(1001, 3500) n;
         insert into authz.user_actions (user_id, action_name) select n, 'x.*' from generate_series(1001, 3500) n",
    )
    .await
    .unwrap();
    assert!(found(&pool).await.is_empty());
    pool.execute("select authz.write_audit_baseline()").await.unwrap();
    let parts: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log where action = 'audit.baseline'")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(parts, 4, "one, and three of a thousand rows each");
    spoil(&pool, &["delete from authz.audit_log where action <> 'audit.baseline'"]).await;
    assert!(found(&pool).await.is_empty());
    spoil(&pool, &["delete from authz.user_actions where user_id = 2001"]).await;
    assert_eq!(found(&pool).await, [("user_actions".to_owned(), false, true)]);
}
