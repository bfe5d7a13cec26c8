//! Grants, their rules, and what they do to decisions.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use authz::grant::{self, Grant};
use authz::{Decision, DenyReason, Error, action, group, user};
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgPool;
use support::{action as a, admin, group as g, pattern as p, user as u};

async fn world() -> (testdb::Database, PgPool) {
    let (database, pool) = support::database().await;
    action::register(
        &pool,
        &[(a("workers.scale"), "Set the number of workers"), (a("tasks.run"), "")],
        &admin(),
    )
    .await
    .unwrap();
    user::create(&pool, &u("ada@example.com"), "Ada", &admin()).await.unwrap();
    group::create(&pool, &g("ops@example.com"), "", &admin()).await.unwrap();
    (database, pool)
}

async fn may(pool: &PgPool, action: &str) -> bool {
    authz::check(pool, &u("ada@example.com"), &a(action)).await.unwrap().is_allow()
}

async fn clock(pool: &PgPool) -> DateTime<Utc> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn grant_to_a_user_allows_until_it_is_revoked() {
    let (_database, pool) = world().await;
    let first =
        grant::to_user(&pool, &u("ada@example.com"), &Grant::new(a("tasks.run"), "on call"), &admin()).await;
    assert!(may(&pool, "tasks.run").await);
    assert!(!may(&pool, "workers.scale").await);
    let second =
        grant::revoke_from_user(&pool, &u("ada@example.com"), &p("tasks.run"), &admin()).await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
    assert!(second > first.unwrap(), "each change has a revision of its own");
    let again = grant::revoke_from_user(&pool, &u("ada@example.com"), &p("tasks.run"), &admin()).await;
    assert!(matches!(again, Err(Error::NoSuchGrant { .. })), "{again:?}");
}

#[tokio::test]
async fn grant_ends_at_its_moment_and_says_so() {
    let (_database, pool) = world().await;
    let ended = Grant::new(p("workers.*"), "").until(clock(&pool).await - TimeDelta::milliseconds(1));
    grant::to_user(&pool, &u("ada@example.com"), &ended, &admin()).await.unwrap();
    let decision = authz::check(&pool, &u("ada@example.com"), &a("workers.scale")).await.unwrap();
    assert!(
        matches!(&decision, Decision::Deny(deny) if matches!(deny.reason, DenyReason::Expired(_))),
        "{decision:?}"
    );
    // Granting again replaces the end.
    let open = Grant::new(p("workers.*"), "").until(clock(&pool).await + TimeDelta::hours(1));
    grant::to_user(&pool, &u("ada@example.com"), &open, &admin()).await.unwrap();
    assert!(may(&pool, "workers.scale").await);
    assert_eq!(grant::of_user(&pool, &u("ada@example.com")).await.unwrap().len(), 1);
}

#[tokio::test]
async fn grants_are_judged_at_the_moment_of_the_check_even_in_a_long_transaction() {
    let (_database, pool) = world().await;
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("select 1").execute(&mut *tx).await.unwrap();
    let ends = clock(&pool).await + TimeDelta::milliseconds(50);
    grant::to_user(&mut *tx, &u("ada@example.com"), &Grant::new(p("*"), "").until(ends), &admin())
        .await
        .unwrap();
    sqlx::query("select pg_sleep(0.1)").execute(&mut *tx).await.unwrap(); // the database's own clock moves on
    let decision = authz::check(&mut *tx, &u("ada@example.com"), &a("tasks.run")).await.unwrap();
    assert!(!decision.is_allow(), "{decision}");
}

#[tokio::test]
async fn unknown_names_in_a_grant_are_errors_that_say_what_to_do() {
    let (_database, pool) = world().await;
    let errors = [
        grant::to_group(&pool, &g("nobody@example.com"), &Grant::new(a("tasks.run"), ""), &admin()).await,
        grant::to_user(&pool, &u("nobody@example.com"), &Grant::new(a("tasks.run"), ""), &admin()).await,
        grant::to_group(&pool, &g("ops@example.com"), &Grant::new(a("tasks.walk"), ""), &admin()).await,
        grant::to_user(&pool, &u("ada@example.com"), &Grant::new(a("tasks.walk"), ""), &admin()).await,
    ];
    let messages = errors.map(|e| e.unwrap_err().to_string());
    assert_eq!(
        messages,
        [
            "group `nobody@example.com` is not known; run dir-sync or create the group first (`authz::group::create`)",
            "user `nobody@example.com` is not known; run dir-sync or create the user first (`authz::user::create`)",
            "action `tasks.walk` is not registered; register it first (`authz::action::register`)",
            "action `tasks.walk` is not registered; register it first (`authz::action::register`)",
        ]
    );
    // Patterns may cover what is registered later.
    grant::to_group(&pool, &g("ops@example.com"), &Grant::new(p("later.*"), ""), &admin()).await.unwrap();
}

#[tokio::test]
async fn an_action_in_use_cannot_be_unregistered() {
    let (_database, pool) = world().await;
    grant::to_group(&pool, &g("ops@example.com"), &Grant::new(a("tasks.run"), ""), &admin()).await.unwrap();
    let refused = action::unregister(&pool, &a("tasks.run"), &admin()).await;
    assert!(matches!(refused, Err(Error::ActionInUse(_))), "{refused:?}");
    grant::revoke_from_group(&pool, &g("ops@example.com"), &p("tasks.run"), &admin()).await.unwrap();
    action::unregister(&pool, &a("tasks.run"), &admin()).await.unwrap();
    assert!(matches!(
        action::unregister(&pool, &a("tasks.run"), &admin()).await,
        Err(Error::UnknownAction(_))
    ));
}

#[tokio::test]
async fn a_new_user_of_an_old_name_starts_with_nothing() {
    let (_database, pool) = world().await;
    grant::to_user(&pool, &u("ada@example.com"), &Grant::new(p("*"), ""), &admin()).await.unwrap();
    group::add_user(&pool, &g("ops@example.com"), &u("ada@example.com"), group::Role::Member, &admin())
        .await
        .unwrap();
    grant::to_group(&pool, &g("ops@example.com"), &Grant::new(p("*"), ""), &admin()).await.unwrap();
    user::delete(&pool, &u("ada@example.com"), &admin()).await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
    user::create(&pool, &u("ada@example.com"), "Another Ada", &admin()).await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
    let twice = user::create(&pool, &u("ada@example.com"), "", &admin()).await;
    assert!(matches!(twice, Err(Error::UserExists(_))), "{twice:?}");
}

#[tokio::test]
async fn a_deleted_local_group_grants_nothing_and_a_new_one_of_its_name_neither() {
    let (_database, pool) = world().await;
    group::add_user(&pool, &g("ops@example.com"), &u("ada@example.com"), group::Role::Owner, &admin())
        .await
        .unwrap();
    grant::to_group(&pool, &g("ops@example.com"), &Grant::new(p("*"), ""), &admin()).await.unwrap();
    assert!(may(&pool, "tasks.run").await);
    group::delete(&pool, &g("ops@example.com"), &admin()).await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
    group::create(&pool, &g("ops@example.com"), "", &admin()).await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
}

#[tokio::test]
async fn a_suspended_user_may_nothing_until_let_in_again() {
    let (_database, pool) = world().await;
    grant::to_user(&pool, &u("ada@example.com"), &Grant::new(p("*"), ""), &admin()).await.unwrap();
    user::set_suspended(&pool, &u("ada@example.com"), true, &admin()).await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
    user::set_suspended(&pool, &u("ada@example.com"), false, &admin()).await.unwrap();
    assert!(may(&pool, "tasks.run").await);
}

#[tokio::test]
async fn rows_of_a_directory_are_not_changed_by_hand() {
    let (_database, pool) = world().await;
    sqlx::raw_sql(
        "insert into authz.directories (directory_id, directory_name) values (1, 'corp');
         insert into authz.users (user_name, directory_id, external_id) values ('bob@corp.example', 1, '11');
         insert into authz.groups (group_name, directory_id, external_id) values ('all@corp.example', 1, '22');",
    )
    .execute(&pool)
    .await
    .unwrap();
    let refused = [
        group::add_user(&pool, &g("all@corp.example"), &u("ada@example.com"), group::Role::Member, &admin())
            .await,
        group::delete(&pool, &g("all@corp.example"), &admin()).await,
        group::add_group(&pool, &g("all@corp.example"), &g("ops@example.com"), &admin()).await,
        user::delete(&pool, &u("bob@corp.example"), &admin()).await,
        user::set_suspended(&pool, &u("bob@corp.example"), true, &admin()).await,
    ];
    for error in refused {
        assert!(matches!(error, Err(Error::OwnedByDirectory { .. })), "{error:?}");
    }
    // The other way round is what local groups are for.
    group::add_user(&pool, &g("ops@example.com"), &u("bob@corp.example"), group::Role::Member, &admin())
        .await
        .unwrap();
    group::add_group(&pool, &g("ops@example.com"), &g("all@corp.example"), &admin()).await.unwrap();
}

#[tokio::test]
async fn everyone_of_a_directory_is_in_the_group_and_nobody_else() {
    let (_database, pool) = world().await;
    sqlx::raw_sql(
        "insert into authz.directories (directory_id, directory_name) values (1, 'corp');
         insert into authz.users (user_name, directory_id, external_id) values ('bob@corp.example', 1, '11');
         insert into authz.users (user_name, directory_id, external_id, status) values ('ext@other.example', null, '12', 'external');",
    )
    .execute(&pool)
    .await
    .unwrap();
    grant::to_group(&pool, &g("ops@example.com"), &Grant::new(p("*"), ""), &admin()).await.unwrap();
    let corp = authz::DirectoryName::parse("corp").unwrap();
    group::add_everyone(&pool, &g("ops@example.com"), &corp, &admin()).await.unwrap();
    let allowed = |name: &'static str| {
        let pool = pool.clone();
        async move { authz::check(&pool, &u(name), &a("tasks.run")).await.unwrap().is_allow() }
    };
    assert!(allowed("bob@corp.example").await);
    assert!(!allowed("ext@other.example").await);
    assert!(!allowed("ada@example.com").await);
    group::remove_everyone(&pool, &g("ops@example.com"), &corp, &admin()).await.unwrap();
    assert!(!allowed("bob@corp.example").await);
}

#[tokio::test]
async fn permission_change_and_record_commit_or_roll_back_together() {
    let (_database, pool) = world().await;
    let records = || async {
        sqlx::query_scalar::<_, i64>("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap()
    };
    let before = records().await;
    let mut tx = pool.begin().await.unwrap();
    grant::to_user(&mut *tx, &u("ada@example.com"), &Grant::new(p("*"), "trial"), &admin()).await.unwrap();
    let inside = authz::check(&mut *tx, &u("ada@example.com"), &a("tasks.run")).await.unwrap();
    assert!(inside.is_allow(), "the transaction sees its own change");
    assert!(!may(&pool, "tasks.run").await, "nobody else does");
    tx.rollback().await.unwrap();
    assert!(!may(&pool, "tasks.run").await);
    assert_eq!(records().await, before);
}

#[tokio::test]
async fn a_failed_write_leaves_the_callers_transaction_usable() {
    let (_database, pool) = world().await;
    let mut tx = pool.begin().await.unwrap();
    let failed =
        grant::to_user(&mut *tx, &u("ada@example.com"), &Grant::new(a("tasks.walk"), ""), &admin()).await;
    assert!(matches!(failed, Err(Error::UnknownAction(_))), "{failed:?}");
    grant::to_user(&mut *tx, &u("ada@example.com"), &Grant::new(a("tasks.run"), ""), &admin()).await.unwrap();
    tx.commit().await.unwrap();
    assert!(may(&pool, "tasks.run").await);
}

#[tokio::test]
async fn an_error_is_neither_allow_nor_deny() {
    let (database, pool) = world().await;
    drop(database);
    let answer = authz::check(&pool, &u("ada@example.com"), &a("tasks.run")).await;
    assert!(matches!(answer, Err(Error::Database(_))), "{answer:?}");
}

#[tokio::test]
async fn writes_can_be_spawned_on_a_pool() {
    let (_database, pool) = world().await;
    let task = tokio::spawn(async move {
        let pool = pool;
        grant::to_user(&pool, &u("ada@example.com"), &Grant::new(p("*"), ""), &admin()).await.unwrap();
        may(&pool, "tasks.run").await
    });
    assert!(task.await.unwrap());
}
