//! A group is compared with the mirror before the plan holds it still: what somebody changes in between is noticed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may stop"
)]

mod support;

use std::time::Duration;

use dir_sync::{Report, Status};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use tokio::time::sleep;

use self::support::*;

/// So many members that a whole listing would be told from its differences.
fn org() -> Org {
    let people = (1..=6).fold(Org::new("C1"), |org, n| org.user(&n.to_string(), &format!("u{n}")));
    (1..=5).fold(people.group("a", "a").group("b", "b").group("c", "c"), |org, n| {
        org.member("a", &n.to_string()).member("b", &n.to_string())
    })
}

/// The group `a` loses a member and gets another one, so does `b`.
fn later() -> Org {
    org().without_member("a", "5").member("a", "6").without_member("b", "5").member("b", "6")
}

/// Waits until some session waits for another one's lock.
async fn until_somebody_waits(watcher: &mut PgConnection) {
    for _ in 0..2_000 {
        let waiting: bool = sqlx::query_scalar(
            "select exists (select from pg_stat_activity
                            where datname = current_database() and wait_event_type = 'Lock' and query ilike '%hold_revision%')",
        )
        .fetch_one(&mut *watcher)
        .await
        .unwrap();
        if waiting {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("the plan does not wait for the revision");
}

/// A sync that meets a change which is under way when it compares, and committed when it plans.
async fn sync_beside(url: &str, pool: &PgPool, change: &str, org: &Org) -> Report {
    let mut somebody = PgConnection::connect(url).await.unwrap();
    let mut watcher = PgConnection::connect(url).await.unwrap();
    let mut tx = somebody.begin().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(change.to_owned())).execute(&mut *tx).await.unwrap();
    let (report, ()) = tokio::join!(sync_with(pool, MAIN, org, unlimited()), async {
        until_somebody_waits(&mut watcher).await;
        tx.commit().await.unwrap();
    });
    report
}

async fn members(pool: &PgPool, group: &str) -> Vec<String> {
    sqlx::query_scalar(
        "select u.user_name || ' ' || gu.role from authz.group_users gu join authz.groups g using (group_id)
         join authz.users u using (user_id) where g.external_id = $1 order by 1",
    )
    .bind(group)
    .fetch_all(pool)
    .await
    .unwrap()
}

async fn remembered(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "select g.external_id from authz.group_digests d join authz.groups g using (group_id) order by 1",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

const A: &str = "(select group_id from authz.groups where external_id = 'a')";

#[tokio::test]
async fn group_that_somebody_changes_after_it_was_compared_keeps_what_it_has() {
    for change in [
        // One whom the listing has and the comparison found: the digest must not say that all is there.
        format!("delete from authz.group_users where group_id = {A} and user_id = (select user_id from authz.users where external_id = '1')"),
        // One whom the listing has not, and for whom another one goes, so that the number is the same.
        format!("update authz.group_users set user_id = (select user_id from authz.users where user_name = 'local@example.com')
                 where group_id = {A} and user_id = (select user_id from authz.users where external_id = '1')"),
        // One who is listed no more went already and came back.
        format!("delete from authz.group_users where group_id = {A} and user_id = (select user_id from authz.users where external_id = '5');
                 insert into authz.group_users (group_id, user_id) select {A}, user_id from authz.users where external_id = '5'"),
        // Another role than the one that was found.
        format!("update authz.group_users set role = 'owner' where group_id = {A}"),
        format!("insert into authz.group_directories (group_id, directory_id) values ({A}, 0)"),
        // A member who is another one by now.
        format!("delete from authz.group_users where group_id <> {A} and user_id = (select user_id from authz.users where external_id = '2');
                 update authz.users set external_id = 'other' where external_id = '2'"),
    ] {
        let (database, pool) = database().await;
        applied(&pool, &org()).await;
        execute(&pool, "insert into authz.users (user_name) values ('local@example.com')").await;
        let report = sync_beside(database.url(), &pool, &change, &later()).await;
        assert_eq!((report.status, report.exit_code()), (Status::Partial, 4), "{change}: {report}");
        assert!(report.incomplete["a@example.com"].contains("somebody else changed"), "{report}");
        assert!(!remembered(&pool).await.contains(&"a".to_owned()), "{change}");
        let left = members(&pool, "a").await;
        assert!(left.iter().any(|member| member.starts_with("u5@")), "{change}: {left:?}");
        assert!(!left.iter().any(|member| member.starts_with("u6@")), "{change}: {left:?}");

        // The next run, and one more where a name was held by the row of the other id, make it right.
        let mut report = sync_with(&pool, MAIN, &later(), unlimited()).await;
        if change.contains("'other'") {
            report = sync_with(&pool, MAIN, &later(), unlimited()).await;
        }
        assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{change}: {report}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&later().json(), false), "{change}");
        assert_eq!(remembered(&pool).await, ["a", "b", "c"], "{change}");
    }
}

#[tokio::test]
async fn groups_that_nobody_changed_are_applied_beside_one_that_is_set_aside() {
    let (database, pool) = database().await;
    applied(&pool, &org()).await;
    let change = format!("delete from authz.group_users where group_id = {A}");
    let report = sync_beside(database.url(), &pool, &change, &later()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert_eq!(report.incomplete.keys().collect::<Vec<_>>(), ["a@example.com"]);
    assert_eq!(members(&pool, "a").await, [""; 0]);
    let listed = ["u1@example.com member", "u2@example.com member", "u3@example.com member"];
    assert_eq!(members(&pool, "b").await[..3], listed);
    assert_eq!(members(&pool, "b").await[4], "u6@example.com member");
    assert_eq!(remembered(&pool).await, ["b", "c"]);
}

/// The reference: what another group's change does to a compared one is nothing.
#[tokio::test]
async fn change_of_another_group_sets_nothing_aside() {
    let (database, pool) = database().await;
    applied(&pool, &org()).await;
    execute(&pool, "insert into authz.groups (group_name) values ('local@example.com')").await;
    let change = "insert into authz.group_users (group_id, user_id)
                  select g.group_id, u.user_id from authz.groups g, authz.users u where g.group_name = 'local@example.com'";
    let report = sync_beside(database.url(), &pool, change, &later()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(report.plan.unwrap().counts.memberships.added, 2);
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&later().json(), false));
    assert_eq!(remembered(&pool).await, ["a", "b", "c"]);
}

/// Who is a user of the directory is not counted again if the revision is still that of the crawl.
#[tokio::test]
async fn users_before_are_those_of_the_plan_and_not_of_the_crawl() {
    for change in [
        "update authz.users set status = 'deleted' where external_id = '4'",
        "delete from authz.group_users where user_id = (select user_id from authz.users where external_id = '4');
         delete from authz.users where external_id = '4'",
        "update authz.users set directory_id = 0 where external_id = '4'",
    ] {
        let (database, pool) = database().await;
        applied(&pool, &org()).await;
        let report = sync_beside(database.url(), &pool, change, &later()).await;
        assert_eq!(report.plan.unwrap().before.users, 5, "{change}");
        let report = sync_with(&pool, MAIN, &org(), unlimited()).await;
        assert!(report.plan.unwrap().before.users < 6, "{change}");
    }
}
