//! Listings of several pages, each of another moment: who moves from a page that is still to come to one that came already
//! is on neither, and is there all the same.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::sync::Arc;

use dir_sync::{Options, Status};
use directory_emulator::{Directory, Effect, Fault, Target};

use self::support::*;

/// The directory with its listings in the order of addresses, so that a rename moves somebody.
fn by_address(org: &Org) -> Directory {
    let mut json = org.json();
    for (list, key) in [("users", "primaryEmail"), ("groups", "email")] {
        json[list].as_array_mut().unwrap().sort_by_key(|object| object[key].as_str().unwrap().to_owned());
    }
    Directory::from_value(json).unwrap()
}

fn many_users() -> Org {
    let mut org = Org::new("C1").group("g", "ops");
    for n in 0..600 {
        let user = format!("u{n:03}");
        org = org.user(&user, &user).member("g", &user);
    }
    org
}

fn many_groups() -> Org {
    let mut org = Org::new("C1").user("1", "ada");
    for n in 0..250 {
        let group = format!("g{n:03}");
        org = org.group(&group, &group).member(&group, "1");
    }
    org
}

/// Syncs a mirror of `org` while the directory becomes `after`, before the second page of `listing` is read.
async fn changed_between_pages(
    pool: &sqlx::PgPool,
    org: &Org,
    listing: Target,
    after: &Org,
) -> (Workspace, dir_sync::Report) {
    applied(pool, org).await;
    let workspace = workspace(by_address(org)).await;
    let change = Effect::ReplaceDirectory(Arc::new(by_address(after)));
    workspace.emulator.add_fault(Fault::new(listing, change).on_call(2));
    let report = run(pool, MAIN, workspace.source().await, Options::default()).await;
    (workspace, report)
}

#[tokio::test]
async fn user_renamed_between_two_pages_is_not_removed() {
    let (_database, pool) = database().await;
    let org = many_users();
    let after = org.clone().rename_user("u599", "a");
    let (workspace, report) = changed_between_pages(&pool, &org, Target::users(), &after).await;
    assert_eq!((report.counts.users.removed, report.counts.users.changed), (0, 1), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
    assert_eq!(
        workspace.emulator.call_count(),
        2 + 1 + 600 / 200 + 2,
        "the users once more, and nothing else"
    );
}

#[tokio::test]
async fn group_renamed_between_two_pages_is_not_removed() {
    let (_database, pool) = database().await;
    let org = many_groups();
    let after = org.clone().rename_group("g249", "a");
    let (workspace, report) = changed_between_pages(&pool, &org, Target::groups(), &after).await;
    assert_eq!((report.counts.groups.removed, report.counts.groups.changed), (0, 1), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
    let calls = 1 + 2 + 250 + 2;
    assert_eq!(workspace.emulator.call_count(), calls, "the groups once more, and each group's members once");
}

#[tokio::test]
async fn who_is_gone_is_looked_for_once_and_goes() {
    let (_database, pool) = database().await;
    let org =
        Org::new("C1").user("1", "ada").user("2", "bob").user("3", "eve").group("g", "ops").group("h", "old");
    applied(&pool, &org.clone().member("g", "1").member("g", "2")).await;
    let after = Org::new("C1").user("1", "ada").user("3", "eve").group("g", "ops").member("g", "1");
    let workspace = workspace(by_address(&after)).await;
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
    assert_eq!(report.plan.unwrap().listed.users, 2, "whoever is listed twice counts once");
    assert_eq!(workspace.emulator.call_count(), (1 + 1 + 1) + 2);

    // Nobody is missing any more.
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!((report.status, report.api_calls), (Status::Unchanged, 3), "{report}");
}

#[tokio::test]
async fn second_look_that_fails_removes_nobody() {
    let (_database, pool) = database().await;
    let org = many_users();
    applied(&pool, &org).await;
    let before = Mirror::read(&pool, MAIN).await;
    let workspace = workspace(by_address(&org.clone().without_user("u000"))).await;
    let refused = Fault::new(Target::users(), Effect::status(403, "forbidden")).from_call(3);
    workspace.emulator.add_fault(refused);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Failed, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, before);
}

#[tokio::test]
async fn second_look_that_begins_again_forgets_nobody() {
    let (_database, pool) = database().await;
    let org = many_users();
    applied(&pool, &org).await;
    let after = org.clone().without_user("u000");
    let workspace = workspace(by_address(&after)).await;
    // The page token of its second page is not taken.
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::status(400, "invalid")).on_call(4));
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!((report.status, report.counts.users.removed), (Status::Applied, 1), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
    assert_eq!(workspace.emulator.call_count(), 2 + 1 + 3 + (2 + 2));
}

#[tokio::test]
async fn group_that_only_the_second_look_finds_is_mirrored_whole() {
    let (_database, pool) = database().await;
    let org = many_groups();
    // One goes and so makes for the second look, and a new one comes at the front meanwhile.
    let after = org.clone().without_group("g249").group("new", "a").member("new", "1");
    let (_workspace, report) = changed_between_pages(&pool, &org, Target::groups(), &after).await;
    assert_eq!((report.counts.groups.removed, report.counts.groups.added), (1, 1), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}
