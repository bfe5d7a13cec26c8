//! Several directories in one database, and directories of which a part is mirrored.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use dir_sync::filter::GroupFilter;
use dir_sync::{Options, Status};
use serde_json::json;
use sqlx::PgPool;

use self::support::*;

fn only(include: &[&str], exclude: &[&str]) -> Options {
    let patterns = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    let filter = GroupFilter { include: patterns(include), exclude: patterns(exclude) };
    Options { filter, ..Options::default() }
}

async fn groups(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select group_name from authz.groups where status = 'active' order by 1")
        .fetch_all(pool)
        .await
        .unwrap()
}

fn org() -> Org {
    Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("a", "ops-a")
        .group("b", "ops-b")
        .group("h", "hr")
        .member("a", "1")
        .member("b", "2")
        .member("h", "1")
        .nested("a", "h")
        .nested("a", "b")
}

#[tokio::test]
async fn group_left_out_is_neither_mirrored_nor_asked_for() {
    let (_database, pool) = database().await;
    let workspace = workspace(org().directory()).await;
    let report = run(&pool, MAIN, workspace.source().await, only(&["ops-*@example.com"], &[])).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!((report.left_out_groups, report.api_calls), (1, 2 + 2));
    assert_eq!(report.plan.as_ref().unwrap().external_groups, 1, "a member that is not mirrored");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org_without_hr().json(), false));
    grant_to_group(&pool, "ops-a").await;
    assert!(can(&pool, "ada").await && can(&pool, "bo").await);
    let again = run(&pool, MAIN, workspace.source().await, only(&["ops-*@example.com"], &[])).await;
    assert_eq!(again.status, Status::Unchanged, "{again}");
}

fn org_without_hr() -> Org {
    org().without_group("h")
}

#[tokio::test]
async fn change_of_the_filter_passes_the_guard_and_can_be_taken_back() {
    let (_database, pool) = database().await;
    let mut org = org();
    for n in 0..5 {
        let group = format!("x{n}");
        org = org.group(&group, &group).member(&group, "1").nested("a", &group);
    }
    applied(&pool, &org).await;
    let narrow = only(&[], &["x*", "hr@*"]);
    let refused = sync_with(&pool, MAIN, &org, narrow.clone()).await;
    assert_eq!(refused.status, Status::Refused, "{refused}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
    let approved = Options { approve: refused.plan_hash.clone(), ..narrow };
    assert_eq!(sync_with(&pool, MAIN, &org, approved).await.status, Status::Applied);
    assert_eq!(groups(&pool).await, ["ops-a@example.com", "ops-b@example.com"]);
    // The parent's listing is the same as ever; what was left out comes back all the same.
    applied(&pool, &org).await;
}

#[tokio::test]
async fn filter_that_keeps_nothing_is_an_empty_listing() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    let report = sync_with(&pool, MAIN, &org(), only(&["nothing*"], &[])).await;
    assert_eq!(report.status, Status::Refused, "{report}");
    assert!(report.to_string().contains("lists no groups at all"), "{report}");
}

#[tokio::test]
async fn patterns_are_options_of_the_program() {
    let (database, pool) = database().await;
    let (_folder, path) = org().write();
    let job = || Program::job("run", database.url()).file(&path);
    let outcome = job().option("--exclude-groups", "*-b@example.com,hr@*").output().await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(outcome.json()["left_out_groups"], json!(2));
    assert_eq!(groups(&pool).await, ["ops-a@example.com"]);
    let outcome = job()
        .environment("DIR_SYNC_INCLUDE_GROUPS", "hr@example.com,ops-*")
        .option("--exclude-groups", "ops-b*")
        .output()
        .await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(groups(&pool).await, ["hr@example.com", "ops-a@example.com"]);
    let outcome = job().option("--include-groups", "two words").output().await;
    assert_eq!(outcome.code, 2, "{outcome:?}");
}

#[tokio::test]
async fn two_customers_are_mirrored_side_by_side() {
    let (_database, pool) = database().await;
    let ours = org().everyone("a", "C1");
    let theirs = Org::new("C2")
        .user("8", "zed@other.example")
        .group("a", "ops@other.example") // the same id as one of ours
        .member("a", "8")
        .everyone("a", "C2")
        .everyone("a", "C1");
    for _ in 0..2 {
        for (directory, org) in [("ours", &ours), ("theirs", &theirs)] {
            let report = sync(&pool, directory, org).await;
            assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{report}");
        }
        for (directory, org) in [("ours", &ours), ("theirs", &theirs)] {
            assert_eq!(Mirror::read(&pool, directory).await, Mirror::wanted(&org.json(), false));
        }
    }
    grant_to_group(&pool, "ops-a").await;
    assert!(can(&pool, "bo").await && !can(&pool, "zed@other.example").await);
}

/// A typing error in the name, say: both would be half a mirror, and look whole.
#[tokio::test]
async fn organisation_has_one_directory() {
    let (_database, pool) = database().await;
    assert_eq!(sync(&pool, "ours", &org()).await.status, Status::Applied);
    let before = Mirror::read(&pool, "ours").await;
    let report = sync(&pool, "hours", &org()).await;
    assert_eq!((report.status, report.exit_code()), (Status::Failed, 1), "{report}");
    for said in
        ["`ours` mirrors organisation `C1` already", "--directory ours", "set directory_name = 'hours'"]
    {
        assert!(report.to_string().contains(said), "{report}");
    }
    assert_eq!(Mirror::read(&pool, "ours").await, before);
    // As it says there.
    execute(&pool, "update authz.directories set directory_name = 'typo' where directory_name = 'hours'")
        .await;
    execute(&pool, "update authz.directories set directory_name = 'hours' where directory_name = 'ours'")
        .await;
    assert_eq!(sync(&pool, "hours", &org()).await.status, Status::Unchanged);
    assert_eq!(Mirror::read(&pool, "hours").await, before);
}

#[tokio::test]
async fn person_of_another_directory_comes_and_goes_with_it_though_our_listing_is_the_same() {
    let (_database, pool) = database().await;
    let ours = org().external("a", "8", "zed@other.example");
    let theirs = Org::new("C2").user("8", "zed@other.example").user("9", "yan@other.example");
    let theirs_without = theirs.clone().without_user("8");
    for include_external in [true, false, true] {
        let options = Options { include_external, ..Options::default() };
        for (theirs, listed) in [(&theirs, true), (&theirs_without, false), (&theirs, true)] {
            for _ in 0..2 {
                assert_ne!(
                    sync_with(&pool, "theirs", theirs, Options::default()).await.status,
                    Status::Failed
                );
                let report = sync_with(&pool, "ours", &ours, options.clone()).await;
                assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{report}");
                assert_eq!(report.plan.unwrap().external_users, 1);
                let member = number(
                    &pool,
                    "select count(*) from authz.group_users join authz.users using (user_id) where external_id = '8'",
                )
                .await;
                // A person whom their own directory deleted is nobody here either.
                assert_eq!(member == 1, include_external && listed);
            }
        }
    }
}
