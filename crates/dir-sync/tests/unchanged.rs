//! What a run over an unchanged directory leaves out, and that it notices whatever else differs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use dir_sync::{Options, Status};
use sqlx::AssertSqlSafe;

use self::support::*;

fn org() -> Org {
    Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("a", "a")
        .group("b", "b")
        .member("a", "1")
        .member("a", "2")
        .nested("b", "a")
}

#[tokio::test]
async fn row_changed_by_hand_is_put_right_though_the_directory_is_unchanged() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    for change in [
        "update authz.users set display_name = 'somebody' where external_id = '1'",
        "update authz.users set status = 'suspended' where external_id = '1'",
        "update authz.users set user_name = 'other@example.com' where external_id = '1'",
        "update authz.users set status = 'deleted' where external_id = '1'",
        "insert into authz.users (user_name, directory_id, external_id) select 'zed@example.com', directory_id, '9'
         from authz.directories where directory_name = 'main'",
        "update authz.groups set display_name = 'another' where external_id = 'a'",
        "update authz.groups set description = 'another' where external_id = 'a'",
        "update authz.groups set group_name = 'other@example.com' where external_id = 'b'",
        "update authz.groups set status = 'deleted' where external_id = 'b'",
        "insert into authz.groups (group_name, directory_id, external_id) select 'zed@example.com', directory_id, 'z'
         from authz.directories where directory_name = 'main'",
        "delete from authz.group_users where user_id in (select user_id from authz.users where external_id = '2')",
        "update authz.group_users set role = 'owner' where user_id in (select user_id from authz.users where external_id = '1')",
        "delete from authz.group_groups",
    ] {
        sqlx::raw_sql(AssertSqlSafe(change)).execute(&pool).await.unwrap();
        let report = sync_with(&pool, MAIN, &org(), unlimited()).await;
        assert_eq!(report.status, Status::Applied, "{change}: {report}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false), "{change}");
        let again = sync(&pool, MAIN, &org()).await;
        assert_eq!(again.status, Status::Unchanged, "{change}: {again}");
        let plan = again.plan.unwrap();
        assert_eq!((plan.before, plan.listed.users, plan.listed.groups, plan.listed.memberships), (plan.listed, 2, 2, 3));
    }
}

#[tokio::test]
async fn short_way_gives_the_plan_of_the_long_one() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    let short = sync(&pool, MAIN, &org()).await;
    // A group that nobody remembers is listed as a whole, to no effect.
    execute(&pool, "delete from authz.group_digests").await;
    let long = sync(&pool, MAIN, &org()).await;
    assert_eq!((short.status, long.status), (Status::Unchanged, Status::Unchanged));
    assert_eq!(short.plan_hash, long.plan_hash);
    assert_eq!(
        serde_json::to_value(short.plan.unwrap()).unwrap(),
        serde_json::to_value(long.plan.unwrap()).unwrap()
    );
}

#[tokio::test]
async fn external_user_of_an_unchanged_directory_is_counted_and_stays() {
    let (_database, pool) = database().await;
    let org = org().external("b", "9", "zed");
    let options = Options { include_external: true, ..Options::default() };
    sync_with(&pool, MAIN, &org, options.clone()).await;
    let report = sync_with(&pool, MAIN, &org, options).await;
    let plan = report.plan.unwrap();
    assert_eq!((report.status, plan.external_users, plan.listed.memberships), (Status::Unchanged, 1, 4));
    // Not let in any more: the group is listed under another setting.
    let report = sync_with(&pool, MAIN, &org, unlimited()).await;
    assert_eq!((report.status, report.plan.unwrap().counts.users.removed), (Status::Applied, 1));
}
