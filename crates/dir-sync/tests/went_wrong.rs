//! What went wrong for the users of other syncers, and the test here that it cannot.
//!
//! | what | tests |
//! |---|---|
//! | 1. An empty list, or one 503, deleted everybody | `guarded`: `empty_listing_over_a_mirror_is_refused_until_it_is_approved`, `failed_listing_of_users_or_groups_changes_nothing`; `google`: `passing_failure_is_tried_again`, `answer_of_something_else_is_no_empty_listing` |
//! | 2. Members removed when a page failed | `guarded`: `broken_group_keeps_its_members_and_the_rest_is_applied`, `all_groups_broken_changes_no_membership`; here: `page_that_fails_costs_no_member` |
//! | 3. A changed address aborted every run unnoticed; a renamed group lost its grants | `names`: `renamed_user_and_group_keep_their_grants`; `guarded`: `each_run_has_its_record` (the time of the last complete sync) |
//! | 4. Swapped addresses hit a unique index | `names`: `two_users_swap_their_addresses`, `three_groups_pass_their_addresses_on_in_a_circle` |
//! | 5. A direct and nested member counted twice | `mirror`: `direct_and_nested_member_is_one_membership_each` |
//! | 6. Owners dropped by a filter of roles | `mirror`: `owners_and_managers_are_members_and_a_role_may_change`; here: `only_listings_are_asked_for` |
//! | 7. A nested group or external member looked up as a user aborted | here: `only_listings_are_asked_for`; `external`: `external_members_are_counted_and_have_no_row_by_default`; `mirror`: `external_group_is_counted_and_not_mirrored` |
//! | 8. "Everyone" members crashed or vanished | `mirror`: `everyone_of_the_customer_is_everyone_of_the_directory_and_nobody_else` |
//! | 9. Exactly 200 members, only the first 200 groups, an endless token | here: `listings_of_exactly_full_pages_are_whole`; `google`: `circling_page_tokens_are_incomplete`; `guarded`: `endless_listing_removes_nothing` |
//! | 10. Silent truncation at a cap | here: `what_is_shown_is_cut_and_what_is_done_is_not` |
//! | 11. `quotaExceeded` not tried again; jobs in lock-step | `outage`: `used_up_quota_is_waited_for_by_all_calls_together`, `run_with_jitter_begins_later` |
//! | 12. 404 just after a write | `crawl`: `group_that_is_still_listed_gets_a_second_chance`; here: `group_not_found_just_after_it_was_made_is_listed_after_all` |
//! | 13. Keyless sign-in failed without a reason | the tests of `dir-sync doctor` |

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::BTreeSet;

use authz::mirror::SHOWN;
use dir_sync::{Options, Status};
use directory_emulator::{Effect, Fault, Target};

use self::support::*;

#[tokio::test]
async fn page_that_fails_costs_no_member() {
    let (_database, pool) = database().await;
    let mut org = Org::new("C1").group("g", "ops");
    for n in 0..450 {
        let user = format!("u{n:03}");
        org = org.user(&user, &user).member("g", &user);
    }
    applied(&pool, &org).await;
    // Half of them leave, the directory's list says; but its last page does not come.
    let mut fewer = org.clone();
    for n in 0..200 {
        fewer = fewer.without_member("g", &format!("u{n:03}"));
    }
    let workspace = workspace(fewer.directory()).await;
    let broken = Fault::new(Target::members_of("g"), Effect::status(503, "backendError")).from_call(2);
    workspace.emulator.add_fault(broken);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
}

#[tokio::test]
async fn only_listings_are_asked_for() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .group("a", "a")
        .group("b", "b")
        .nested("a", "b")
        .member_as("b", "1", "OWNER")
        .external("b", "9", "guest@partner.example")
        .everyone("a", "C1");
    let workspace = workspace(org.directory()).await;
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    let calls = workspace.emulator.calls();
    let paths: BTreeSet<&str> = calls.iter().map(|call| call.path.as_str()).collect();
    let base = "/admin/directory/v1";
    let listings =
        ["users", "groups", "groups/a/members", "groups/b/members"].map(|path| format!("{base}/{path}"));
    assert_eq!(paths, listings.iter().map(String::as_str).collect());
    for call in calls {
        assert!(
            !call.query.contains("roles=") && !call.query.contains("includeDerivedMembership"),
            "{call:?}"
        );
    }
}

#[tokio::test]
async fn listings_of_exactly_full_pages_are_whole() {
    // Users by 500, groups and members by 200: exactly full, and one more.
    for more in [0_u16, 1] {
        let (_database, pool) = database().await;
        let mut org = Org::new("C1");
        for n in 0..500 + more {
            let user = format!("u{n:03}");
            org = org.user(&user, &user);
        }
        for n in 0..200 + more {
            let group = format!("g{n:03}");
            org = org.group(&group, &group);
        }
        for n in 0..200 + more {
            org = org.member("g000", &format!("u{n:03}"));
        }
        let workspace = workspace(org.directory()).await;
        let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
        assert_eq!(report.status, Status::Applied, "{report}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
        assert_eq!(report.api_calls, (1 + 1 + 200) + 4 * u64::from(more), "a page more of each, and a group");
    }
}

#[tokio::test]
async fn what_is_shown_is_cut_and_what_is_done_is_not() {
    let (_database, pool) = database().await;
    let mut org = Org::new("C1").group("g", "ops");
    let all = usize::try_from(SHOWN).unwrap() + 7;
    for n in 0..all {
        let user = format!("u{n:04}");
        org = org.user(&user, &user).member("g", &user);
    }
    let report = applied(&pool, &org).await;
    assert_eq!((report.counts.users.added, report.counts.memberships.added), (all as u64, all as u64));
    assert_eq!(report.plan.unwrap().users.len() + 7, all);
}

#[tokio::test]
async fn group_not_found_just_after_it_was_made_is_listed_after_all() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").group("new", "new").member("new", "1");
    let workspace = workspace(org.directory()).await;
    let not_yet = Fault::new(Target::members_of("new"), Effect::status(404, "notFound")).on_call(1);
    workspace.emulator.add_fault(not_yet);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
}
