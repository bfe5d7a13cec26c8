//! Who is looked up by a name must still be there when the change is made: changes that wait for each other.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::group::Role;
use authz::{Error, Revision, grant, group, user};
use futures_util::future::BoxFuture;
use sqlx::PgPool;
use support::{action, admin, pattern};
use tokio::task::JoinHandle;

type Done = Result<Revision, Error>;
type Change = fn(PgPool) -> BoxFuture<'static, Done>;

/// Both wait behind a third one, in this order.
async fn one_after_the_other(pool: &PgPool, first: Change, second: Change) -> (Done, Done) {
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("select authz.hold_revision()").execute(&mut *tx).await.unwrap();
    let mut changes: Vec<JoinHandle<Done>> = Vec::new();
    for (before, change) in [(0_i64, first), (1, second)] {
        changes.push(tokio::spawn(change(pool.clone())));
        tokio::time::timeout(Duration::from_mins(1), async {
            let waiting = "select count(*) from pg_stat_activity
                           where datname = current_database() and wait_event_type = 'Lock'";
            while sqlx::query_scalar::<_, i64>(waiting).fetch_one(pool).await.unwrap() <= before {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
        .unwrap();
    }
    tx.commit().await.unwrap();
    let second = changes.pop().unwrap().await.unwrap();
    (changes.pop().unwrap().await.unwrap(), second)
}

async fn world(pool: &PgPool) {
    authz::action::register(pool, &[(action("rare"), "")], &admin()).await.unwrap();
    user::create(pool, &support::user("joe"), "", &admin()).await.unwrap();
    group::create(pool, &support::group("ops"), "", &admin()).await.unwrap();
}

/// Rows that hold on to somebody who is gone.
async fn left_over(pool: &PgPool) -> i64 {
    sqlx::query_scalar(
        "select (select count(*) from authz.group_users join authz.users using (user_id) where status = 'deleted')
              + (select count(*) from authz.user_actions join authz.users using (user_id) where status = 'deleted')
              + (select count(*) from authz.group_actions join authz.groups using (group_id) where status = 'deleted')",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

fn delete_user(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move { user::delete(&pool, &support::user("joe"), &admin()).await })
}

fn delete_group(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move { group::delete(&pool, &support::group("ops"), &admin()).await })
}

fn suspend(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move { user::set_suspended(&pool, &support::user("joe"), true, &admin()).await })
}

fn resume(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move { user::set_suspended(&pool, &support::user("joe"), false, &admin()).await })
}

fn join(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move {
        group::add_user(&pool, &support::group("ops"), &support::user("joe"), Role::Member, &admin()).await
    })
}

fn grant_user(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move {
        let grant = grant::Grant::new(pattern("rare"), "why");
        grant::to_user(&pool, &support::user("joe"), &grant, &admin()).await
    })
}

fn grant_group(pool: PgPool) -> BoxFuture<'static, Done> {
    Box::pin(async move {
        let grant = grant::Grant::new(pattern("rare"), "why");
        grant::to_group(&pool, &support::group("ops"), &grant, &admin()).await
    })
}

#[tokio::test]
async fn changes_take_turns_whatever_the_database_takes_for_the_default() {
    for level in ["repeatable read", "serializable"] {
        let (database, pool) = support::database().await;
        let stricter = format!(
            "do $$ begin execute format('alter database %I set default_transaction_isolation = ''{level}''', current_database()); end $$"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(stricter)).execute(&pool).await.unwrap();
        pool.close().await;
        let pool = support::pool(&database).await;
        let set: String =
            sqlx::query_scalar("show default_transaction_isolation").fetch_one(&pool).await.unwrap();
        assert_eq!(set, level);
        let starts = (0..8).map(|_| {
            let pool = pool.clone();
            tokio::spawn(
                async move { authz::action::register(&pool, &[(action("rare"), "")], &admin()).await },
            )
        });
        for start in futures_util::future::join_all(starts).await {
            start.unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn nothing_is_given_to_whom_somebody_deletes_meanwhile() {
    let changes: [(&str, Change, Change); 6] = [
        ("suspend", delete_user, suspend),
        ("resume", delete_user, resume),
        ("join", delete_user, join),
        ("join what goes", delete_group, join),
        ("grant", delete_user, grant_user),
        ("grant to a group", delete_group, grant_group),
    ];
    for (name, delete, change) in changes {
        for deleted_first in [true, false] {
            let (_database, pool) = support::database().await;
            world(&pool).await;
            let (deleted, given) = if deleted_first {
                one_after_the_other(&pool, delete, change).await
            } else {
                let (given, deleted) = one_after_the_other(&pool, change, delete).await;
                (deleted, given)
            };
            deleted.unwrap();
            assert_eq!(given.is_err(), deleted_first, "{name}");
            if let Err(error) = given {
                assert!(matches!(error, Error::UnknownUser(_) | Error::UnknownGroup(_)), "{name}: {error}");
            }
            assert_eq!(left_over(&pool).await, 0, "{name}");
            let back: i64 =
                sqlx::query_scalar("select count(*) from authz.users where status <> 'deleted'
                                    and user_id in (select (detail -> 'users' -> 0 ->> 0)::bigint from authz.audit_log
                                                    where detail -> 'users' -> 0 ->> 2 = 'deleted')")
                    .fetch_one(&pool)
                    .await
                    .unwrap();
            assert_eq!(back, 0, "{name}: came back");
            // Nothing holds the action any more.
            authz::action::unregister(&pool, &action("rare"), &admin()).await.unwrap();
        }
    }
}
