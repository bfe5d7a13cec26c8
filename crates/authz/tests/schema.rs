//! What the database itself holds: constraints, revision, changes, the audit trail, and migrations.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use authz::audit::{self, Outcome, Record};
use authz::grant::{self, Grant};
use authz::{Error, action, revision, user};
use sqlx::{Executor, PgPool};
use support::{action as a, admin, pattern as p, user as u};

/// The constraint that a statement violates.
async fn violates(pool: &PgPool, sql: &'static str) -> String {
    let error = pool.execute(sql).await.expect_err(sql);
    error.as_database_error().and_then(|e| e.constraint()).unwrap_or("another error").to_owned()
}

#[tokio::test]
async fn names_are_canonical_and_unique_among_rows_that_are_not_deleted() {
    let (_database, pool) = support::database().await;
    for (sql, constraint) in [
        ("insert into authz.users (user_name) values ('Ada')", "user_name_is_canonical"),
        ("insert into authz.users (user_name) values (' ada')", "user_name_is_canonical"),
        ("insert into authz.users (user_name) values ('')", "user_name_is_canonical"),
        ("insert into authz.groups (group_name) values ('a b')", "group_name_is_canonical"),
        ("insert into authz.actions values ('Workers')", "action_name_is_canonical"),
        ("insert into authz.actions values ('workers.*')", "action_name_is_canonical"),
        ("insert into authz.directories (directory_name) values ('A B')", "directory_name_is_canonical"),
        ("insert into authz.users (user_name) values ('a'), ('a')", "user_name_is_unique"),
        ("insert into authz.groups (group_name) values ('a'), ('a')", "group_name_is_unique"),
        ("insert into authz.users (user_name, status) values ('a', 'gone')", "user_status_is_known"),
        (
            "insert into authz.users (user_name, status) values ('a', 'external')",
            "external_user_has_no_directory",
        ),
        (
            "insert into authz.users (user_name, directory_id) values ('a', null)",
            "external_user_has_no_directory",
        ),
        (
            "insert into authz.users (user_name, external_id) values ('a', '1'), ('b', '1')",
            "user_external_id_is_unique",
        ),
    ] {
        assert_eq!(violates(&pool, sql).await, constraint, "{sql}");
    }
    pool.execute("insert into authz.users (user_name, status) values ('a', 'deleted'), ('a', 'deleted'), ('a', 'active')")
        .await
        .unwrap();
}

#[tokio::test]
async fn one_statement_may_swap_two_names() {
    let (_database, pool) = support::database().await;
    pool.execute("insert into authz.users (user_name) values ('a'), ('b')").await.unwrap();
    pool.execute("update authz.users set user_name = case user_name when 'a' then 'b' else 'a' end")
        .await
        .unwrap();
}

#[tokio::test]
async fn grants_name_registered_actions_or_patterns() {
    let (_database, pool) = support::database().await;
    pool.execute("insert into authz.users (user_id, user_name) values (1, 'a')").await.unwrap();
    for (name, constraint) in [
        ("Workers", "granted_name_is_canonical"),
        ("workers.scale", "granted_action_is_registered"),
        ("*.scale", "granted_name_is_canonical"),
    ] {
        let error = sqlx::query("insert into authz.user_actions (user_id, action_name) values (1, $1)")
            .bind(name)
            .execute(&pool)
            .await
            .unwrap_err();
        assert_eq!(error.as_database_error().and_then(|e| e.constraint()), Some(constraint), "{name}");
    }
    for name in ["*", "workers.*"] {
        sqlx::query("insert into authz.user_actions (user_id, action_name) values (1, $1)")
            .bind(name)
            .execute(&pool)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn every_change_that_can_alter_a_decision_raises_the_revision_and_no_other() {
    let (_database, pool) = support::database().await;
    let mut last = revision::current(&pool).await.unwrap();
    for sql in [
        "insert into authz.users (user_id, user_name) values (1, 'a'), (2, 'b')",
        "insert into authz.groups (group_id, group_name) values (1, 'g'), (2, 'h')",
        "insert into authz.group_users (group_id, user_id) values (1, 1)",
        "insert into authz.group_groups values (2, 1)",
        "insert into authz.group_directories values (2, 0)",
        "insert into authz.actions values ('x')",
        "insert into authz.user_actions (user_id, action_name) values (1, 'x')",
        "insert into authz.group_actions (group_id, action_name) values (1, 'x')",
        "update authz.user_actions set expires_at = now()",
        "update authz.users set status = 'suspended' where user_id = 1",
        "update authz.users set user_name = 'c' where user_id = 1",
        "update authz.groups set group_name = 'k' where group_id = 1",
        "delete from authz.user_actions",
        "delete from authz.group_actions",
        "delete from authz.actions",
        "delete from authz.group_directories",
        "delete from authz.group_groups",
        "update authz.groups set status = 'deleted' where group_id = 1",
        "truncate authz.group_users",
    ] {
        pool.execute(sql).await.unwrap();
        let now = revision::current(&pool).await.unwrap();
        assert!(now > last, "{sql}");
        let noted: i64 =
            sqlx::query_scalar("select count(*) from authz.changes where revision > $1 and revision <= $2")
                .bind(last.0)
                .bind(now.0)
                .fetch_one(&pool)
                .await
                .unwrap();
        assert!(noted > 0, "{sql}");
        last = now;
    }
    for sql in [
        "update authz.users set display_name = 'A'",
        "update authz.groups set description = 'B'",
        "update authz.users set status = status",
        "delete from authz.group_users where group_id = 99",
        "update authz.directories set last_complete_sync_at = now()",
    ] {
        pool.execute(sql).await.unwrap();
        assert_eq!(revision::current(&pool).await.unwrap(), last, "{sql}");
    }
}

#[tokio::test]
async fn a_very_large_change_is_noted_as_one_reload() {
    let (_database, pool) = support::database().await;
    pool.execute("insert into authz.users (user_name) select 'u' || n from generate_series(1, 10001) n")
        .await
        .unwrap();
    let noted: Vec<(String, i64)> = sqlx::query_as("select kind, count(*) from authz.changes group by kind")
        .fetch_all(&pool)
        .await
        .unwrap();
    assert_eq!(noted, [("reload".to_owned(), 1)]);
}

#[tokio::test]
async fn changes_are_announced_with_their_revision() {
    let (_database, pool) = support::database().await;
    let mut listener = sqlx::postgres::PgListener::connect_with(&pool).await.unwrap();
    listener.listen("authz_revision").await.unwrap();
    let made = user::create(&pool, &u("a"), "", &admin()).await.unwrap();
    let heard = listener.recv().await.unwrap();
    assert_eq!(heard.payload(), made.to_string());
}

#[tokio::test]
async fn the_audit_trail_is_append_only() {
    let (_database, pool) = support::database().await;
    audit::record(&pool, &admin(), &Record::new("workers.scale", Outcome::Succeeded)).await.unwrap();
    for sql in [
        "update authz.audit_log set actor = 'somebody else'",
        "delete from authz.audit_log",
        "truncate authz.audit_log",
        "truncate authz.audit_seals",
    ] {
        let error = pool.execute(sql).await.expect_err(sql).to_string();
        assert!(error.contains("append-only"), "{error}");
    }
}

#[tokio::test]
async fn changes_by_hand_are_recorded_with_the_database_user() {
    let (_database, pool) = support::database().await;
    pool.execute(
        "insert into authz.users (user_id, user_name) values (1, 'a');
         insert into authz.groups (group_id, group_name) values (1, 'g');",
    )
    .await
    .unwrap();
    pool.execute(
        "insert into authz.user_actions (user_id, action_name, granted_by) values (1, '*', 'the boss')",
    )
    .await
    .unwrap();
    pool.execute("insert into authz.group_users (group_id, user_id) values (1, 1)").await.unwrap();
    pool.execute("delete from authz.user_actions").await.unwrap();
    let me: String = sqlx::query_scalar("select session_user::text").fetch_one(&pool).await.unwrap();
    let records: Vec<(String, String, String, String)> = sqlx::query_as(
        "select action, actor, target, database_user from authz.audit_log
             where action not like 'state.%' order by audit_id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let record = |action: &str, actor: &str, target: &str| {
        (action.to_owned(), actor.to_owned(), target.to_owned(), me.clone())
    };
    assert_eq!(
        records,
        [
            record("grant.add", "the boss", "user a"),
            record("membership.add", &me, "group g"),
            record("grant.remove", &me, "user a"),
        ]
    );
}

#[tokio::test]
async fn updates_and_truncates_by_hand_are_recorded_for_what_they_are() {
    let (_database, pool) = support::database().await;
    for sql in [
        "insert into authz.users (user_id, user_name) values (1, 'a')",
        "insert into authz.actions values ('x.y'), ('x.z')",
        "insert into authz.user_actions (user_id, action_name, granted_by) values (1, 'x.y', 'the boss')",
        "update authz.user_actions set reason = 'changed'",
        "update authz.user_actions set action_name = 'x.z'",
        "with gone as (delete from authz.user_actions where user_id = 1) delete from authz.users where user_id = 1",
        "truncate authz.user_actions",
    ] {
        pool.execute(sql).await.expect(sql);
    }
    let me: String = sqlx::query_scalar("select session_user::text").fetch_one(&pool).await.unwrap();
    let records: Vec<(String, String, String, Option<String>)> = sqlx::query_as(
        "select action, actor, target, detail ->> 'grant' from authz.audit_log
         where action not like 'state.%' order by audit_id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let record = |action: &str, actor: &str, target: &str, grant: Option<&str>| {
        (action.to_owned(), actor.to_owned(), target.to_owned(), grant.map(str::to_owned))
    };
    assert_eq!(
        records,
        [
            record("grant.add", "the boss", "user a", Some("x.y")),
            record("grant.change", &me, "user a", Some("x.y")),
            record("grant.remove", &me, "user a", Some("x.y")),
            record("grant.add", &me, "user a", Some("x.z")),
            record("grant.remove", &me, "user 1", Some("x.z")),
            record("grant.remove", &me, "all of user_actions", None),
        ]
    );
}

#[tokio::test]
async fn a_grant_ends_at_a_date_or_never() {
    let (_database, pool) = support::database().await;
    pool.execute("insert into authz.users (user_id, user_name) values (1, 'a')").await.unwrap();
    let (ended, granted) = ("expires_at_is_a_date", "granted_at_is_a_date");
    for (end, start, constraint) in [
        ("infinity", "now", ended),
        ("-infinity", "now", ended),
        ("10000-01-01 UTC", "now", ended),
        ("0044-03-15 BC", "now", ended),
        ("1969-12-31 23:59:59 UTC", "now", ended),
        ("now", "0044-03-15 BC", granted),
    ] {
        let error = sqlx::query(
            "insert into authz.user_actions (user_id, action_name, expires_at, granted_at)
             values (1, '*', $1::text::timestamptz, $2::text::timestamptz)",
        )
        .bind(end)
        .bind(start)
        .execute(&pool)
        .await
        .unwrap_err();
        assert_eq!(error.as_database_error().and_then(|e| e.constraint()), Some(constraint), "{end}");
    }
    // Whatever the session makes of it, the explanation and the trail can be read.
    pool.execute(
        "insert into authz.actions values ('x');
         begin;
         set local timezone = 'Asia/Kolkata';
         insert into authz.user_actions (user_id, action_name, expires_at, granted_at) values (1, '*', 'epoch', 'epoch');
         commit",
    )
    .await
    .unwrap();
    assert_eq!(authz::explain(&pool, &u("a"), &a("x")).await.unwrap().expired.len(), 1);
    let now = sqlx::query_scalar("select now()").fetch_one(&pool).await.unwrap();
    assert!(audit::who_could(&pool, &a("x"), audit::Moment::At(now)).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_group_that_comes_back_begins_without_members() {
    let (_database, pool) = support::database().await;
    pool.execute(
        "insert into authz.users (user_id, user_name) values (1, 'a');
         insert into authz.groups (group_id, group_name, status) values (1, 'g', 'deleted');
         insert into authz.group_users (group_id, user_id) values (1, 1);
         update authz.groups set status = 'active';",
    )
    .await
    .unwrap();
    let members: i64 =
        sqlx::query_scalar("select count(*) from authz.group_users").fetch_one(&pool).await.unwrap();
    assert_eq!(members, 0);
}

#[tokio::test]
async fn changes_by_the_library_are_recorded_with_the_actor() {
    let (_database, pool) = support::database().await;
    action::register(&pool, &[(a("tasks.run"), "")], &admin()).await.unwrap();
    user::create(&pool, &u("ada"), "", &admin()).await.unwrap();
    grant::to_user(&pool, &u("ada"), &Grant::new(a("tasks.run"), "on call"), &admin()).await.unwrap();
    let decision = authz::check(&pool, &u("ada"), &a("tasks.run")).await.unwrap();
    let record = Record::new("tasks.run", Outcome::Succeeded).target("nightly").decision(&decision);
    audit::record(&pool, &admin(), &record).await.unwrap();
    grant::revoke_from_user(&pool, &u("ada"), &p("tasks.run"), &admin()).await.unwrap();
    let mut entries = audit::latest(&pool, 10).await.unwrap();
    entries.retain(|entry| !entry.action.starts_with("state."));
    let told: Vec<_> =
        entries.iter().rev().map(|e| (e.action.as_str(), e.actor.as_str(), e.service.as_str())).collect();
    assert_eq!(
        told,
        ["grant.add", "tasks.run", "grant.remove"].map(|action| (action, "admin@example.com", "tests"))
    );
    let run = &entries[1];
    assert_eq!(run.request_id.as_deref(), Some("req-1"));
    assert_eq!(run.target.as_deref(), Some("nightly"));
    assert_eq!(run.revision, Some(decision.revision().0));
    assert_eq!(run.decision.as_ref().unwrap()["allow"]["grant"]["pattern"], "tasks.run");
    assert_eq!(entries[2].detail["reason"], "on call");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_processes_may_migrate_at_once_beside_the_hosts_own_migrations() {
    let database = testdb::Database::empty().await.unwrap();
    let pool = support::pool(&database).await;
    pool.execute("create table _sqlx_migrations (of_the_host text); create table users (of_the_host text);")
        .await
        .unwrap();
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { authz::migrate(&pool).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let host: i64 =
        sqlx::query_scalar("select count(*) from public._sqlx_migrations").fetch_one(&pool).await.unwrap();
    assert_eq!(host, 0);
    let ours: i64 = sqlx::query_scalar("select count(*) from authz._sqlx_migrations where success")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(ours >= 6, "{ours}");
    user::create(&pool, &u("ada"), "", &admin()).await.unwrap();
}

#[tokio::test]
async fn a_database_without_the_tables_says_what_to_run() {
    let database = testdb::Database::empty().await.unwrap();
    let pool = support::pool(&database).await;
    let error = authz::check(&pool, &u("ada"), &a("tasks.run")).await.unwrap_err();
    assert!(matches!(error, Error::NotMigrated(_)), "{error:?}");
    assert!(error.to_string().contains("dir-sync migrate"), "{error}");
}

#[tokio::test]
async fn functions_that_run_as_their_owner_are_for_nobody_else() {
    let (_database, pool) = support::database().await;
    let open: Vec<String> = sqlx::query_scalar(
        "select p.oid::regprocedure::text from pg_proc p
         where p.pronamespace = 'authz'::regnamespace and p.prosecdef
           and exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0)",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(open, [""; 0]);
}
