//! Members whom the directory does not list, and people who stand in two directories.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use dir_sync::guard::{Limit, Limits, admit};
use dir_sync::{Options, Status};
use sqlx::PgPool;

use self::support::*;

const GUEST: &str = "guest@partner.example";

/// `ada` of ours and the guest `x` in one group.
fn with_guest() -> Org {
    Org::new("C1").user("1", "ada").group("g", "ops").member("g", "1").external("g", "x", GUEST)
}

/// The guest's own company.
fn partner() -> Org {
    Org::new("C2").user("x", GUEST).group("pg", "p@partner.example").member("pg", "x")
}

async fn row_of_guest(pool: &PgPool) -> (i64, String, Option<String>) {
    let rows: Vec<(i64, String, Option<String>)> = sqlx::query_as(
        "select user_id, status, directory_name from authz.users left join authz.directories using (directory_id)
         where external_id = 'x' or user_name = 'guest@partner.example'",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert_eq!(rows.len(), 1, "one person is one row: {rows:?}");
    rows.into_iter().next().unwrap()
}

#[tokio::test]
async fn external_members_are_counted_and_have_no_row_by_default() {
    let (_database, pool) = database().await;
    let org =
        with_guest().group("g2", "web").external("g2", "x", GUEST).external("g2", "y", "y@partner.example");
    let report = applied(&pool, &org).await;
    assert_eq!(report.plan.as_ref().unwrap().external_users, 2);
    assert!(report.to_string().contains("2 users, 0 groups"), "{report}");
    assert_eq!(number(&pool, "select count(*) from authz.users").await, 1);
}

#[tokio::test]
async fn external_members_come_and_go_with_the_option() {
    let (_database, pool) = database().await;
    let org = with_guest();
    applied(&pool, &org).await;
    grant_to_group(&pool, "ops").await;
    assert!(!can(&pool, GUEST).await);

    let on = sync_with(&pool, MAIN, &org, include_external()).await;
    assert_eq!((on.status, on.plan.unwrap().external_users), (Status::Applied, 1));
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), true));
    let (row, status, directory) = row_of_guest(&pool).await;
    assert_eq!((status.as_str(), directory), ("external", None));
    assert!(can(&pool, GUEST).await);
    let before = written_rows(&pool).await;
    assert_eq!(sync_with(&pool, MAIN, &org, include_external()).await.status, Status::Unchanged);
    assert_eq!(written_rows(&pool).await, before);

    let renamed = org.clone().without_member("g", "x").external("g", "x", "new@partner.example");
    assert_eq!(sync_with(&pool, MAIN, &renamed, include_external()).await.status, Status::Applied);
    assert!(can(&pool, "new@partner.example").await && !can(&pool, GUEST).await);

    applied(&pool, &org).await;
    assert_eq!(row_of_guest(&pool).await.1, "deleted");
    assert!(!can(&pool, GUEST).await);
    assert_eq!(sync(&pool, MAIN, &org).await.status, Status::Unchanged);

    assert_eq!(sync_with(&pool, MAIN, &org, include_external()).await.status, Status::Applied);
    assert_eq!(row_of_guest(&pool).await, (row, "external".to_owned(), None));
    assert!(can(&pool, GUEST).await);
}

#[tokio::test]
async fn guest_whose_removal_was_withheld_goes_with_the_next_run_that_removes() {
    let (_database, pool) = database().await;
    let org = with_guest();
    sync_with(&pool, MAIN, &org, include_external()).await;
    grant_to_group(&pool, "ops").await;
    let keep = Options { no_remove: true, ..unlimited() };
    for _ in 0..2 {
        let report = sync_with(&pool, MAIN, &org, keep.clone()).await;
        let withheld = report.plan.as_ref().unwrap().withheld;
        assert_eq!((withheld.users, withheld.memberships), (1, 1), "{report}");
        assert!(can(&pool, GUEST).await);
    }
    assert_eq!(sync_with(&pool, MAIN, &org, unlimited()).await.status, Status::Applied);
    assert!(!can(&pool, GUEST).await);
}

#[tokio::test]
async fn member_of_another_directory_whose_removal_was_withheld_goes_with_the_next_run_that_removes() {
    let (_database, pool) = database().await;
    let org = with_guest();
    sync(&pool, "partner", &partner()).await;
    sync_with(&pool, MAIN, &org, include_external()).await;
    grant_to_group(&pool, "ops").await;
    assert!(can(&pool, GUEST).await);
    let keep = Options { no_remove: true, ..unlimited() };
    for _ in 0..2 {
        let withheld = sync_with(&pool, MAIN, &org, keep.clone()).await.plan.unwrap().withheld;
        assert_eq!((withheld.users, withheld.memberships), (0, 1));
    }
    assert_eq!(sync_with(&pool, MAIN, &org, unlimited()).await.status, Status::Applied);
    assert!(!can(&pool, GUEST).await);
}

/// The groups are as they were, and so is what is remembered of them.
#[tokio::test]
async fn user_who_is_listed_no_more_but_still_a_member_becomes_a_guest() {
    let (_database, pool) = database().await;
    let org =
        Org::new("C1").user("1", "ada").user("2", "bo").group("g", "ops").member("g", "1").member("g", "2");
    sync_with(&pool, MAIN, &org, include_external()).await;
    grant_to_group(&pool, "ops").await;
    let left = org.clone().unlisted_user("2");
    let options = Options { limits: unlimited().limits, ..include_external() };
    let report = sync_with(&pool, MAIN, &left, options.clone()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(text(&pool, "select status from authz.users where external_id = '2'").await, "external");
    assert!(can(&pool, "bo@example.com").await, "{report}");
    assert_eq!(sync_with(&pool, MAIN, &left, options).await.status, Status::Unchanged);
}

#[tokio::test]
async fn external_user_goes_with_the_last_membership() {
    let (_database, pool) = database().await;
    let org = with_guest().group("g2", "web").external("g2", "x", GUEST);
    sync_with(&pool, MAIN, &org, include_external()).await;
    let one = org.without_member("g", "x");
    sync_with(&pool, MAIN, &one, include_external()).await;
    assert_eq!(row_of_guest(&pool).await.1, "external");
    let none = one.without_member("g2", "x");
    assert_eq!(sync_with(&pool, MAIN, &none, include_external()).await.status, Status::Applied);
    assert_eq!(row_of_guest(&pool).await.1, "deleted");
    assert_eq!(sync_with(&pool, MAIN, &none, include_external()).await.status, Status::Unchanged);
}

/// Whoever is external and in no group of a directory came there by nobody's listing, but has what was granted directly.
#[tokio::test]
async fn guest_whose_membership_was_deleted_by_hand_goes_when_the_directory_drops_it_too() {
    let (_database, pool) = database().await;
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    grant_to_user(&pool, GUEST).await;
    execute(&pool, "delete from authz.group_users m using authz.users u where u.user_id = m.user_id and u.external_id = 'x'").await;
    let dropped = with_guest().without_member("g", "x");
    assert_eq!(sync_with(&pool, MAIN, &dropped, include_external()).await.status, Status::Applied);
    assert_eq!(row_of_guest(&pool).await.1, "deleted");
    assert!(!can(&pool, GUEST).await);
    let before = written_rows(&pool).await;
    assert_eq!(sync_with(&pool, MAIN, &dropped, include_external()).await.status, Status::Unchanged);
    assert_eq!(written_rows(&pool).await, before);
}

#[tokio::test]
async fn guest_of_a_group_whose_row_was_deleted_by_hand_goes() {
    let (_database, pool) = database().await;
    let org = with_guest().group("h", "web").member("h", "1");
    sync_with(&pool, MAIN, &org, include_external()).await;
    grant_to_user(&pool, GUEST).await;
    execute(&pool, "update authz.groups set status = 'deleted' where external_id = 'g'").await;
    assert_eq!(
        sync_with(&pool, MAIN, &org.without_group("g"), include_external()).await.status,
        Status::Applied
    );
    assert_eq!(row_of_guest(&pool).await.1, "deleted");
    assert!(!can(&pool, GUEST).await);
}

/// A group that is kept by hand is no directory's word for a guest.
#[tokio::test]
async fn guest_who_is_in_no_group_but_a_local_one_goes_and_others_stay() {
    for of_third in [false, true] {
        let (_database, pool) = database().await;
        let third = Org::new("C3").group("t", "t@third.example").external("t", "x", GUEST);
        sync_with(&pool, MAIN, &with_guest(), include_external()).await;
        if of_third {
            sync_with(&pool, "third", &third, include_external()).await;
        }
        execute(
            &pool,
            "insert into authz.groups (group_name) values ('by-hand');
             insert into authz.group_users (group_id, user_id)
                 select g.group_id, u.user_id from authz.groups g, authz.users u
                 where g.group_name = 'by-hand' and u.external_id = 'x';
             delete from authz.group_users m using authz.groups g where g.group_id = m.group_id and g.external_id = 'g'",
        )
        .await;
        let dropped = with_guest().without_member("g", "x").user("2", "bo").member("g", "2");
        sync_with(&pool, MAIN, &dropped, include_external()).await;
        assert_eq!(row_of_guest(&pool).await.1, if of_third { "external" } else { "deleted" });
    }
}

/// Whose run sees it does not matter, and neither does whether it mirrors guests.
#[tokio::test]
async fn guest_in_no_group_goes_with_any_run_of_any_directory_that_removes() {
    for directory in [MAIN, "partner"] {
        let (_database, pool) = database().await;
        sync_with(&pool, MAIN, &with_guest(), include_external()).await;
        let other = Org::new("C2").user("y", "y@partner.example").group("pg", "p@partner.example");
        sync(&pool, "partner", &other).await;
        execute(&pool, "delete from authz.group_users m using authz.users u where u.user_id = m.user_id and u.external_id = 'x'").await;
        let dropped = with_guest().without_member("g", "x");
        let org = if directory == MAIN { &dropped } else { &other };
        let keep = Options { no_remove: true, ..unlimited() };
        let withheld = sync_with(&pool, directory, org, keep).await.plan.unwrap().withheld;
        assert_eq!((withheld.users, row_of_guest(&pool).await.1.as_str()), (1, "external"));
        assert_eq!(sync(&pool, directory, org).await.status, Status::Applied);
        assert_eq!(row_of_guest(&pool).await.1, "deleted");
        assert_eq!(sync(&pool, directory, org).await.status, Status::Unchanged);
    }
}

/// Or one directory would take away, run for run, whom the other one makes.
#[tokio::test]
async fn guest_of_no_group_but_one_that_is_left_out_has_no_row() {
    let (_database, pool) = database().await;
    execute(&pool, "insert into authz.groups (group_name) values ('ops@example.com')").await;
    let org = with_guest().group("h", "web").external("h", "z", "z@partner.example").external(
        "g",
        "z",
        "z@partner.example",
    );
    let first = sync_with(&pool, MAIN, &org, include_external()).await;
    assert_eq!((first.status, conflicts(&first).len()), (Status::Applied, 1), "{first}");
    assert_eq!(
        text(&pool, "select string_agg(external_id, ' ') from authz.users where status = 'external'").await,
        "z"
    );
    sync(&pool, "other", &Org::new("C2").user("y", "y@other.example")).await;
    let before = written_rows(&pool).await;
    for _ in 0..2 {
        assert_eq!(sync_with(&pool, MAIN, &org, include_external()).await.status, Status::Unchanged);
        let other = Org::new("C2").user("y", "y@other.example");
        assert_eq!(sync(&pool, "other", &other).await.status, Status::Unchanged);
    }
    assert_eq!(written_rows(&pool).await, before);
    // The name is free again.
    execute(&pool, "update authz.groups set status = 'deleted' where directory_id = 0").await;
    assert_eq!(sync_with(&pool, MAIN, &org, include_external()).await.status, Status::Applied);
    assert_eq!(row_of_guest(&pool).await.1, "external");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), true));
}

#[tokio::test]
async fn external_user_stays_while_another_directory_has_it_as_a_member() {
    let (_database, pool) = database().await;
    let third = Org::new("C3").group("t", "t@third.example").external("t", "x", GUEST);
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    sync_with(&pool, "third", &third, include_external()).await;
    let row = row_of_guest(&pool).await;
    grant_to_group(&pool, "t@third.example").await;
    let gone = with_guest().without_member("g", "x");
    assert_eq!(sync_with(&pool, MAIN, &gone, include_external()).await.status, Status::Applied);
    assert_eq!(row_of_guest(&pool).await, row);
    assert!(can(&pool, GUEST).await);
    assert_eq!(sync_with(&pool, "third", &third, unlimited()).await.status, Status::Applied);
    assert_eq!(row_of_guest(&pool).await.1, "deleted");
}

#[tokio::test]
async fn person_external_here_and_member_there_is_one_row_whoever_is_first() {
    for partner_first in [false, true] {
        let (_database, pool) = database().await;
        if partner_first {
            assert_eq!(sync(&pool, "partner", &partner()).await.status, Status::Applied);
        }
        sync_with(&pool, MAIN, &with_guest(), include_external()).await;
        grant_to_group(&pool, "ops").await;
        assert!(can(&pool, GUEST).await);
        if !partner_first {
            let row = row_of_guest(&pool).await.0;
            assert_eq!(sync(&pool, "partner", &partner()).await.status, Status::Applied);
            assert_eq!(row_of_guest(&pool).await.0, row);
        }
        let (_, status, directory) = row_of_guest(&pool).await;
        assert_eq!((status.as_str(), directory.as_deref()), ("active", Some("partner")));
        assert!(can(&pool, GUEST).await, "the membership in our group stays");
        assert_eq!(Mirror::read(&pool, "partner").await, Mirror::wanted(&partner().json(), false));
        let before = written_rows(&pool).await;
        assert_eq!(sync_with(&pool, MAIN, &with_guest(), include_external()).await.status, Status::Unchanged);
        assert_eq!(
            sync_with(&pool, "partner", &partner(), include_external()).await.status,
            Status::Unchanged
        );
        assert_eq!(written_rows(&pool).await, before);
    }
}

#[tokio::test]
async fn person_deleted_by_their_own_directory_is_denied_everywhere() {
    let (_database, pool) = database().await;
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    sync(&pool, "partner", &partner()).await;
    grant_to_group(&pool, "ops").await;
    grant_to_user(&pool, GUEST).await;
    let ours = Mirror::read(&pool, MAIN).await;
    assert!(can(&pool, GUEST).await);

    let gone = partner().without_user("x").user("z", "z@partner.example").member("pg", "z");
    assert_eq!(sync(&pool, "partner", &gone).await.status, Status::Applied);
    assert!(!can(&pool, GUEST).await);
    assert!(can(&pool, "ada").await);
    let mut without_guest = ours.clone();
    without_guest.members.retain(|(_, user, _)| user != "x");
    assert_eq!(Mirror::read(&pool, MAIN).await, without_guest, "our other rows are not touched");

    // Our directory still has the guest as a member; the guest's own directory knows better.
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    assert_eq!(row_of_guest(&pool).await.1, "deleted");
    assert!(!can(&pool, GUEST).await);

    sync(&pool, "partner", &partner().user("z", "z@partner.example").member("pg", "z")).await;
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    assert!(can(&pool, GUEST).await, "restored");
    assert_eq!(Mirror::read(&pool, MAIN).await, ours);
}

#[tokio::test]
async fn suspended_in_their_own_directory_is_suspended_everywhere() {
    let (_database, pool) = database().await;
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    grant_to_group(&pool, "ops").await;
    sync_with(&pool, "partner", &partner().set_user("x", "suspended", true), unlimited()).await;
    assert!(!can(&pool, GUEST).await);
    assert_eq!(sync_with(&pool, MAIN, &with_guest(), include_external()).await.status, Status::Unchanged);
    assert!(!can(&pool, GUEST).await);
}

#[tokio::test]
async fn option_off_takes_another_directorys_person_out_of_our_groups_only() {
    let (_database, pool) = database().await;
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    sync(&pool, "partner", &partner()).await;
    let theirs = Mirror::read(&pool, "partner").await;
    grant_to_group(&pool, "ops").await;
    let off = sync(&pool, MAIN, &with_guest()).await;
    assert_eq!(
        (off.status, off.counts.memberships.removed, off.counts.users.removed),
        (Status::Applied, 1, 0)
    );
    assert!(!can(&pool, GUEST).await);
    assert_eq!(row_of_guest(&pool).await.1, "active");
    assert_eq!(Mirror::read(&pool, "partner").await, theirs);
}

#[tokio::test]
async fn sync_of_one_directory_leaves_the_others_rows_alone() {
    let (_database, pool) = database().await;
    sync_with(&pool, MAIN, &with_guest(), include_external()).await;
    sync(&pool, "partner", &partner()).await;
    let main = Mirror::read(&pool, MAIN).await;
    let next = partner().user("q", "q@partner.example").group("pg2", "p2@partner.example").member("pg2", "q");
    assert_eq!(sync(&pool, "partner", &next.without_group("pg")).await.status, Status::Applied);
    assert_eq!(Mirror::read(&pool, MAIN).await, main);
}

#[tokio::test]
async fn user_whom_two_directories_list_stays_with_the_first() {
    let (_database, pool) = database().await;
    sync(&pool, "partner", &partner()).await;
    let also = Org::new("C1").user("x", "other@example.com").user("1", "ada");
    let report = sync(&pool, MAIN, &also).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(conflicts(&report).len(), 1);
    assert!(conflicts(&report)[0].3.contains("`partner`"), "{report}");
    assert_eq!(Mirror::read(&pool, "partner").await, Mirror::wanted(&partner().json(), false));
    assert_eq!(sync(&pool, MAIN, &also).await.status, Status::Unchanged);
}

#[tokio::test]
async fn listed_user_who_leaves_but_stays_a_member_becomes_external_and_the_guard_counts_it() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g", "ops")
        .member("g", "2")
        .group("all", "all")
        .everyone("all", "C1");
    applied(&pool, &org).await;
    grant_to_group(&pool, "all").await;
    assert!(can(&pool, "bo").await);
    let left = org.unlisted_user("2");
    let report = sync_with(&pool, MAIN, &left, include_external()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert!(!can(&pool, "bo").await);
    let plan = report.plan.unwrap();
    assert_eq!((plan.counts.users.changed, plan.newly_external), (1, 1));
    let strict = Limits { users: Limit::new(0, 0), ..Limits::default() };
    assert!(admit(&plan, &strict, None, false).is_err());
    assert_eq!(sync_with(&pool, MAIN, &left, include_external()).await.status, Status::Unchanged);
    applied(&pool, &left).await;
    assert_eq!(sync(&pool, MAIN, &left).await.status, Status::Unchanged);
    // What the mirror says depends on the directory, not on how it came about: gone once, external again.
    assert_eq!(sync_with(&pool, MAIN, &left, include_external()).await.status, Status::Applied);
    assert_eq!(sync_with(&pool, MAIN, &left, include_external()).await.status, Status::Unchanged);
}
