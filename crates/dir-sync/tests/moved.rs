//! Listings of several pages, each of another moment: who moves from a page that is still to come to one that came already
//! is on neither, and is there all the same.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::sync::Arc;

use dir_sync::filter::GroupFilter;
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

/// A group of as many members as fill three pages, in this order, with a nested one at the end.
fn one_group(members: impl IntoIterator<Item = usize>) -> Org {
    let mut org = Org::new("C1").group("g", "ops").group("h", "staff");
    for n in 0..450 {
        let user = format!("u{n:03}");
        org = org.user(&user, &user);
    }
    members.into_iter().fold(org, |org, n| match n {
        450 => org.nested("g", "h"),
        n => org.member("g", &format!("u{n:03}")),
    })
}

async fn memberships_of(pool: &sqlx::PgPool, user: &str) -> i64 {
    sqlx::query_scalar("select count(*) from authz.group_users m join authz.users u using (user_id) where u.external_id = $1")
        .bind(user)
        .fetch_one(pool)
        .await
        .unwrap()
}

/// With the digest of the listing before, without one since somebody has changed the group by hand, and a nested group.
#[tokio::test]
async fn member_who_moves_between_two_pages_stays() {
    for (moved, by_hand) in [(449, false), (449, true), (450, false), (450, true)] {
        let (_database, pool) = database().await;
        let org = one_group(0..=450);
        applied(&pool, &org).await;
        if by_hand {
            execute(&pool, "delete from authz.group_users where user_id = (select user_id from authz.users where external_id = 'u007')").await;
        }
        let workspace = workspace(org.directory()).await;
        // Before its second page is read, who would be on the third is on the first.
        let after = one_group(std::iter::once(moved).chain((0..=450).filter(|n| *n != moved && *n != 9)));
        let change = Effect::ReplaceDirectory(Arc::new(after.directory()));
        workspace.emulator.add_fault(Fault::new(Target::members_of("g"), change).on_call(2));
        let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
        assert_eq!(report.counts.memberships.removed, 0, "{moved} {by_hand}: {report}");
        let calls = 1 + 1 + (3 + 1) + 1;
        assert_eq!(workspace.emulator.call_count(), calls, "the one who is missing, and nothing else");
        // What was gone in between goes with the next run, and then all is as it was.
        let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
        assert_eq!((report.status, report.counts.memberships.removed), (Status::Applied, 1), "{report}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
        let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
        assert_eq!((report.status, report.api_calls), (Status::Unchanged, 1 + 1 + 3 + 1), "{report}");
    }
}

/// Than to ask for each it takes fewer calls to list all.
#[tokio::test]
async fn members_are_listed_again_where_more_are_missing_than_there_are_pages() {
    let (_database, pool) = database().await;
    let org = one_group(0..450);
    applied(&pool, &org).await;
    let workspace = workspace(org.directory()).await;
    let after = one_group(std::iter::once(449).chain(3..449));
    let change = Effect::ReplaceDirectory(Arc::new(after.directory()));
    workspace.emulator.add_fault(Fault::new(Target::members_of("g"), change).on_call(2));
    run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(memberships_of(&pool, "u449").await, 1);
    // Three who were there on the first page, and who has moved.
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!((report.counts.memberships.removed, report.api_calls), (3, 1 + 1 + (3 + 1) + 3), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}

fn each_member_of(group: &str) -> Target {
    Target::prefix(format!("/admin/directory/v1/groups/{group}/members/"))
}

#[tokio::test]
async fn members_are_listed_again_where_one_cannot_be_asked_for() {
    let (_database, pool) = database().await;
    let org = one_group(0..450);
    applied(&pool, &org).await;
    let workspace = workspace(org.directory()).await;
    let after = one_group(std::iter::once(449).chain((0..449).filter(|n| *n != 9)));
    let change = Effect::ReplaceDirectory(Arc::new(after.directory()));
    workspace.emulator.add_fault(Fault::new(Target::members_of("g"), change).on_call(2));
    workspace
        .emulator
        .add_fault(Fault::new(each_member_of("g"), Effect::status(400, "badRequest")).on_call(1));
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!((report.counts.memberships.removed, report.incomplete.len()), (0, 0), "{report}");
    assert_eq!(report.api_calls, 1 + 1 + (3 + 1) + (1 + 3), "one question, then the listing");
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!((report.status, report.counts.memberships.removed), (Status::Applied, 1), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}

/// It is not known then who was in it; the next run finds that it is gone.
#[tokio::test]
async fn group_that_goes_before_its_members_are_asked_for_keeps_them_for_that_run() {
    let (_database, pool) = database().await;
    let org = one_group(0..450).member("h", "u001");
    applied(&pool, &org).await;
    let workspace = workspace(org.clone().without_member("g", "u449").directory()).await;
    let after = org.without_group("g");
    let change = Effect::ReplaceDirectory(Arc::new(after.directory()));
    workspace.emulator.add_fault(Fault::new(each_member_of("g"), change).on_call(1));
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!((report.status, report.counts.memberships.removed), (Status::Partial, 0), "{report}");
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}

/// As from something in between, or from a server that has not heard of the group yet.
#[tokio::test]
async fn answer_that_does_not_name_the_member_says_nothing_of_the_member() {
    let (_database, pool) = database().await;
    let org = one_group(0..450);
    applied(&pool, &org).await;
    let workspace = workspace(org.directory()).await;
    let after = one_group(std::iter::once(449).chain(0..449));
    let change = Effect::ReplaceDirectory(Arc::new(after.directory()));
    workspace.emulator.add_fault(Fault::new(Target::members_of("g"), change).on_call(2));
    workspace.emulator.add_fault(Fault::new(each_member_of("g"), Effect::status(404, "notFound")));
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(
        (report.counts.memberships.removed, report.api_calls),
        (0, 1 + 1 + (3 + 1) + (1 + 3)),
        "{report}"
    );
}

/// Its digest is that of the listing that missed somebody, and not of what the mirror has.
#[tokio::test]
async fn member_whom_a_listing_missed_goes_when_the_next_one_is_like_it() {
    for changed in [false, true] {
        let (_database, pool) = database().await;
        let org = one_group(0..450);
        applied(&pool, &org).await;
        let workspace = workspace(org.directory()).await;
        // Somebody else may come meanwhile.
        let rest = if changed { 0..=450 } else { 0..=448 };
        let moved = one_group(std::iter::once(449).chain(rest.filter(|n| *n != 449)));
        let change = Effect::ReplaceDirectory(Arc::new(moved.directory()));
        workspace.emulator.add_fault(Fault::new(Target::members_of("g"), change).on_call(2));
        run(&pool, MAIN, workspace.source().await, unlimited()).await;
        assert_eq!(memberships_of(&pool, "u449").await, 1);
        let left = moved.without_member("g", "u449");
        workspace.emulator.replace_directory(left.directory());
        let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
        assert_eq!((report.status, report.counts.memberships.removed), (Status::Applied, 1), "{report}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&left.json(), false));
    }
}

#[tokio::test]
async fn second_look_at_members_that_fails_removes_nobody_from_that_group() {
    let (_database, pool) = database().await;
    let org = one_group(0..450).member("h", "u001").member("h", "u002");
    applied(&pool, &org).await;
    let after = org.clone().without_member("g", "u449").without_member("h", "u001");
    let workspace = workspace(after.directory()).await;
    for fault in [
        Fault::new(Target::members_of("g"), Effect::status(400, "badRequest")).from_call(4),
        Fault::new(each_member_of("g"), Effect::status(400, "badRequest")),
    ] {
        workspace.emulator.add_fault(fault);
    }
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!((report.status, report.incomplete.len()), (Status::Partial, 1), "{report}");
    assert_eq!((memberships_of(&pool, "u449").await, memberships_of(&pool, "u001").await), (1, 1));
    workspace.emulator.clear_faults();
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}

/// Whoever left the directory is in no group of it, and a group of one page is of one moment.
#[tokio::test]
async fn members_are_listed_again_only_where_one_page_may_have_missed_them() {
    let (_database, pool) = database().await;
    let org = one_group(0..450).member("h", "u001").member("h", "u002");
    applied(&pool, &org).await;
    let after = org.clone().without_user("u440").without_member("h", "u001");
    let workspace = workspace(after.directory()).await;
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(report.api_calls, 1 + 1 + (3 + 1) + 1, "the users once more");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}

/// Without the groups of the staff.
fn filtered() -> Options {
    let filter = GroupFilter { include: Vec::new(), exclude: vec!["staff@*".parse().unwrap()] };
    Options { filter, ..unlimited() }
}

/// Syncs what is listed while `u449` moves from the last page to the first, and the directory becomes `meanwhile`; a filter leaves
/// the nested group out. Then without the filter, from what the directory was.
async fn moved_with_an_outsider(listed: Org, meanwhile: Org) {
    let (_database, pool) = database().await;
    let first = run(&pool, MAIN, listed.source(), filtered()).await;
    assert_eq!(first.status, Status::Applied, "{first}");
    let workspace = workspace(listed.directory()).await;
    let change = Effect::ReplaceDirectory(Arc::new(meanwhile.directory()));
    workspace.emulator.add_fault(Fault::new(Target::members_of("g"), change).on_call(2));
    let second = run(&pool, MAIN, workspace.source().await, filtered()).await;
    assert_eq!(second.status, Status::Unchanged, "{second}");
    assert_eq!(memberships_of(&pool, "u449").await, 1);
    workspace.emulator.replace_directory(listed.directory());
    run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&listed.json(), false));
}

/// The digest is that of the listing before, and so are they.
#[tokio::test]
async fn outsiders_of_a_listing_that_missed_somebody_are_not_remembered() {
    let moved = || std::iter::once(449).chain(0..449);
    // It is a member for this moment only, or is missed itself.
    moved_with_an_outsider(one_group(0..450), one_group(moved().chain([450]))).await;
    moved_with_an_outsider(one_group(0..=450), one_group(std::iter::once(450).chain(moved()))).await;
}

/// The mirror of this directory has no user for a guest, who is no more missing for that.
#[tokio::test]
async fn guest_who_is_listed_is_not_missing() {
    let (_database, pool) = database().await;
    let include = || Options { include_external: true, ..unlimited() };
    let before = one_group(0..449).external("g", "x1", "guest@example.org");
    let workspace = workspace(before.directory()).await;
    run(&pool, MAIN, workspace.source().await, include()).await;
    let after = one_group(0..450).external("g", "x1", "guest@example.org");
    workspace.emulator.replace_directory(after.directory());
    for status in [Status::Applied, Status::Unchanged] {
        let report = run(&pool, MAIN, workspace.source().await, include()).await;
        assert_eq!((report.status, report.api_calls), (status, 1 + 1 + 3 + 1), "{report}");
    }
    // Who is missed is kept, a guest too, who is in no other group.
    let back = Effect::ReplaceDirectory(Arc::new(after.directory()));
    workspace.emulator.replace_directory(after.clone().without_member("g", "x1").directory());
    workspace.emulator.add_fault(Fault::new(Target::members_of("g"), back).on_call(4));
    let report = run(&pool, MAIN, workspace.source().await, include()).await;
    assert_eq!((report.counts.users.removed, report.counts.memberships.removed), (0, 0), "{report}");
    assert_eq!(memberships_of(&pool, "x1").await, 1);
    // Who is gone by all looks goes.
    workspace.emulator.replace_directory(before.without_member("g", "x1").directory());
    workspace.emulator.clear_faults();
    run(&pool, MAIN, workspace.source().await, include()).await;
    assert_eq!(memberships_of(&pool, "x1").await, 0);
}

/// In another directory the guest is a member, and so a user of the mirror, though not of this directory.
#[tokio::test]
async fn guest_goes_once_guests_are_not_let_in() {
    let (_database, pool) = database().await;
    let other = Org::new("C2").user("x1", "guest@example.org").group("o", "other").member("o", "x1");
    let report = run(&pool, "other", other.source(), unlimited()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    let org = one_group(0..450).external("g", "x1", "guest@example.org");
    let workspace = workspace(org.directory()).await;
    run(&pool, MAIN, workspace.source().await, Options { include_external: true, ..unlimited() }).await;
    assert_eq!(memberships_of(&pool, "x1").await, 2);
    run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!(memberships_of(&pool, "x1").await, 1);
    let report = run(&pool, MAIN, workspace.source().await, unlimited()).await;
    assert_eq!((report.status, report.api_calls), (Status::Unchanged, 1 + 1 + 3 + 1), "{report}");
}
