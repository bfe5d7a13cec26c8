//! A membership has its group and its user, and a user the directory that it names, whoever writes, deletes or moves which
//! row, and at the same time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use sqlx::postgres::PgPoolCopyExt;
use sqlx::{AssertSqlSafe, Executor, PgConnection, PgPool};
use testdb::Database;
use tokio::time::timeout;

use self::support::database;

const FOREIGN_KEY_VIOLATION: &str = "23503";
const SERIALIZATION_FAILURE: &str = "40001";

/// Users and groups 1 and 2; user 1 is in group 1. Directory 5 has user 3, directory 6 nobody.
async fn world() -> (Database, PgPool) {
    let (database, pool) = database().await;
    pool.execute(
        "insert into authz.directories (directory_id, directory_name) values (5, 'corp'), (6, 'empty');
         insert into authz.users (user_id, user_name) values (1, 'ada'), (2, 'bo');
         insert into authz.users (user_id, user_name, directory_id) values (3, 'cy', 5);
         insert into authz.groups (group_id, group_name) values (1, 'ops'), (2, 'dev');
         insert into authz.group_users (group_id, user_id) values (1, 1);
         -- Groups are held by their closure as well, which is not what is looked at here.
         alter table authz.group_ancestors drop constraint group_ancestors_group_id_fkey,
                                           drop constraint group_ancestors_ancestor_id_fkey;",
    )
    .await
    .unwrap();
    (database, pool)
}

fn code<T>(result: Result<T, sqlx::Error>) -> Option<String> {
    let error = result.err()?;
    Some(
        error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            .map(std::borrow::Cow::into_owned)
            .unwrap_or_default(),
    )
}

async fn run(connection: &mut PgConnection, sql: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.map(|_| ())
}

async fn dangling(pool: &PgPool) -> i64 {
    sqlx::query_scalar(
        "select (select count(*) from authz.group_users m
                 where not exists (select from authz.users u where u.user_id = m.user_id)
                    or not exists (select from authz.groups g where g.group_id = m.group_id))
                + (select count(*) from authz.users u
                   where u.directory_id is not null
                     and not exists (select from authz.directories d where d.directory_id = u.directory_id))",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

const REFUSED: [&str; 22] = [
    "insert into authz.group_users (group_id, user_id) values (2, 9)",
    "insert into authz.group_users (group_id, user_id) values (9, 2)",
    "insert into authz.group_users (group_id, user_id) values (2, 1), (2, 2), (2, 9)",
    "insert into authz.group_users (group_id, user_id) values (1, 1), (1, 9) on conflict do nothing",
    "insert into authz.group_users (group_id, user_id) values (1, 1) on conflict (group_id, user_id) do update set user_id = 9",
    "update authz.group_users set user_id = 9",
    "update authz.group_users set group_id = 9",
    "delete from authz.users where user_id = 1",
    "delete from authz.groups where group_id = 1",
    "delete from authz.users",
    "delete from authz.groups",
    "update authz.users set user_id = 9 where user_id = 1",
    "update authz.groups set group_id = 9 where group_id = 1",
    "update authz.users set user_id = user_id + 10",
    "truncate authz.users cascade",
    "truncate authz.groups cascade",
    "insert into authz.users (user_id, user_name, directory_id) values (8, 'di', 9)",
    "update authz.users set directory_id = 9 where user_id = 2",
    "delete from authz.directories where directory_id = 5",
    "update authz.directories set directory_id = 7 where directory_id = 5",
    "truncate authz.directories cascade",
    "with gone as (delete from authz.directories where directory_id = 6)
     insert into authz.users (user_id, user_name, directory_id) values (8, 'di', 6)",
];

const TAKEN: [&str; 13] = [
    "insert into authz.group_users (group_id, user_id) values (1, 2), (2, 1)",
    "update authz.group_users set user_id = 2",
    "delete from authz.users where user_id = 2",
    "delete from authz.groups where group_id = 2",
    "update authz.users set user_id = 9 where user_id = 2",
    // Both ends in one statement, as with a foreign key that is checked when the statement ends.
    "with gone as (delete from authz.group_users) delete from authz.users",
    "with came as (insert into authz.users (user_id, user_name) values (9, 'di') returning user_id)
     insert into authz.group_users (group_id, user_id) select 1, user_id from came",
    "truncate authz.users, authz.groups, authz.group_users cascade",
    "insert into authz.users (user_id, user_name, directory_id, status) values (8, 'di', null, 'external')",
    "update authz.users set directory_id = 6 where user_id = 3",
    "delete from authz.directories where directory_id = 6",
    "with gone as (delete from authz.users where user_id = 3) delete from authz.directories where directory_id = 5",
    "truncate authz.directories, authz.users, authz.group_users cascade",
];

#[tokio::test]
async fn no_statement_leaves_a_membership_without_its_group_or_user() {
    let (_database, pool) = world().await;
    for sql in REFUSED {
        let mut tx = pool.begin().await.unwrap();
        assert_eq!(code(run(&mut tx, sql).await).as_deref(), Some(FOREIGN_KEY_VIOLATION), "{sql}");
    }
    for sql in TAKEN {
        let mut tx = pool.begin().await.unwrap();
        assert_eq!(code(run(&mut tx, sql).await), None, "{sql}");
    }
    let mut copy = pool.copy_in_raw("copy authz.group_users (group_id, user_id) from stdin").await.unwrap();
    copy.send(&b"2\t2\n2\t9\n"[..]).await.unwrap();
    assert_eq!(code(copy.finish().await).as_deref(), Some(FOREIGN_KEY_VIOLATION));
    assert_eq!(dangling(&pool).await, 0);
}

#[tokio::test]
async fn refusal_says_what_is_missing_and_what_to_do() {
    let (_database, pool) = world().await;
    for (sql, message, constraint) in [
        (REFUSED[0], "user 9 does not exist", "group_users_user_id_fkey"),
        (REFUSED[1], "group 9 does not exist", "group_users_group_id_fkey"),
        (REFUSED[7], "user 1 is still in a group", "group_users_user_id_fkey"),
        (REFUSED[8], "group 1 still has members", "group_users_group_id_fkey"),
        (REFUSED[16], "directory 9 does not exist", "users_directory_id_fkey"),
        (REFUSED[18], "directory 5 still has users", "users_directory_id_fkey"),
    ] {
        let error = pool.execute(sql).await.unwrap_err();
        let error = error.as_database_error().unwrap();
        assert_eq!((error.message(), error.constraint()), (message, Some(constraint)), "{sql}");
    }
}

/// The triggers run as the owner: what the writer may read or execute does not matter.
#[tokio::test]
async fn role_that_owns_nothing_is_held_to_it_too() {
    let (_database, pool) = world().await;
    let mut connection = pool.acquire().await.unwrap();
    let role = format!("writer_{}", std::process::id());
    let setup = format!(
        "create role {role};
         grant usage on schema authz to {role};
         grant insert on authz.group_users, authz.users to {role};
         grant delete on authz.users, authz.groups, authz.directories to {role};
         set role {role};"
    );
    run(&mut connection, &setup).await.unwrap();
    for sql in [REFUSED[0], REFUSED[1], REFUSED[9], REFUSED[10], REFUSED[16], "delete from authz.directories"]
    {
        assert_eq!(code(run(&mut connection, sql).await).as_deref(), Some(FOREIGN_KEY_VIOLATION), "{sql}");
    }
    assert_eq!(code(run(&mut connection, "insert into authz.group_users values (2, 2)").await), None);
    run(&mut connection, &format!("reset role; drop owned by {role}; drop role {role}")).await.unwrap();
}

/// Begins `first` and `second` each in a transaction, the second while the first is under way, and commits the first. Says
/// how the second ended.
async fn at_once(pool: &PgPool, isolation: &str, first: &str, second: &str) -> Option<String> {
    let mut one = pool.begin().await.unwrap();
    let mut two = pool.begin().await.unwrap();
    run(&mut two, &format!("set transaction isolation level {isolation}")).await.unwrap();
    run(&mut one, first).await.unwrap();
    let ended = {
        let mut waiting = std::pin::pin!(run(&mut two, second));
        let early = timeout(Duration::from_millis(100), &mut waiting).await;
        assert!(early.is_err(), "`{second}` did not wait for `{first}`");
        one.commit().await.unwrap();
        code(waiting.await)
    };
    if ended.is_none() {
        two.commit().await.unwrap();
    }
    ended
}

#[tokio::test]
async fn what_another_transaction_deletes_or_adds_meanwhile_is_seen() {
    for (first, second) in [
        ("delete from authz.users where user_id = 2", "insert into authz.group_users values (1, 2)"),
        ("insert into authz.group_users values (1, 2)", "delete from authz.users where user_id = 2"),
        ("delete from authz.groups where group_id = 2", "insert into authz.group_users values (2, 1)"),
        ("insert into authz.group_users values (2, 1)", "delete from authz.groups where group_id = 2"),
        (
            "update authz.users set user_id = 9 where user_id = 2",
            "insert into authz.group_users values (1, 2)",
        ),
        (
            "insert into authz.group_users values (1, 2)",
            "update authz.users set user_id = 9 where user_id = 2",
        ),
        ("insert into authz.group_users values (1, 2)", "truncate authz.users cascade"),
        ("delete from authz.users where user_id = 2", "update authz.group_users set user_id = 2"),
        (
            "delete from authz.directories where directory_id = 6",
            "insert into authz.users (user_id, user_name, directory_id) values (8, 'di', 6)",
        ),
        (
            "insert into authz.users (user_id, user_name, directory_id) values (8, 'di', 6)",
            "delete from authz.directories where directory_id = 6",
        ),
        (
            "update authz.users set directory_id = 6 where user_id = 2",
            "update authz.directories set directory_id = 7 where directory_id = 6",
        ),
        (
            "insert into authz.users (user_id, user_name, directory_id) values (8, 'di', 6)",
            "truncate authz.directories cascade",
        ),
    ] {
        for (isolation, expected) in [
            ("read committed", FOREIGN_KEY_VIOLATION),
            ("repeatable read", SERIALIZATION_FAILURE),
            ("serializable", SERIALIZATION_FAILURE),
        ] {
            let (_database, pool) = world().await;
            let ended = at_once(&pool, isolation, first, second).await;
            assert_eq!(ended.as_deref(), Some(expected), "{isolation}: `{second}` beside `{first}`");
            assert_eq!(dangling(&pool).await, 0);
        }
    }
}

/// The snapshot is taken first, the other change committed, and only then written: the check must not look at the past.
#[tokio::test]
async fn transaction_that_sees_the_past_cannot_add_to_it() {
    let (_database, pool) = world().await;
    for (first, second) in [
        ("delete from authz.users where user_id = 2", "insert into authz.group_users values (1, 2)"),
        ("insert into authz.group_users values (2, 1)", "delete from authz.groups where group_id = 2"),
        (
            "delete from authz.directories where directory_id = 6",
            "insert into authz.users (user_id, user_name, directory_id) values (8, 'di', 6)",
        ),
    ] {
        let mut tx = pool.begin().await.unwrap();
        run(&mut tx, "set transaction isolation level repeatable read; select from authz.users")
            .await
            .unwrap();
        pool.execute(AssertSqlSafe(first.to_owned())).await.unwrap();
        assert_eq!(code(run(&mut tx, second).await).as_deref(), Some(SERIALIZATION_FAILURE), "{second}");
    }
    assert_eq!(dangling(&pool).await, 0);
}
