//! The mirror is what the directory is, row for row, and a second run writes nothing.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use dir_sync::file::FileSource;
use dir_sync::{DirectorySync, Options, Report, Status};
use directory_emulator::{Directory, Effect, Fault, Gate, Target};
use serde_json::json;
use sqlx::PgPool;

use self::support::*;

async fn sync_organisation(pool: &PgPool, moment: &str, options: Options) -> Report {
    run(pool, MAIN, Arc::new(FileSource::open(organisation(moment)).unwrap()), options).await
}

/// The row of each user and group that is not deleted, by the directory's id.
async fn row_ids(pool: &PgPool) -> BTreeMap<String, i64> {
    sqlx::query_as::<_, (String, i64)>(
        "select 'user ' || external_id, user_id from authz.users where status <> 'deleted'
         union all
         select 'group ' || external_id, group_id from authz.groups where status <> 'deleted'",
    )
    .fetch_all(pool)
    .await
    .unwrap()
    .into_iter()
    .collect()
}

fn assert_rows_stay(before: &BTreeMap<String, i64>, after: &BTreeMap<String, i64>) {
    let moved: Vec<_> =
        before.iter().filter(|(id, row)| after.get(*id).is_some_and(|now| now != *row)).collect();
    assert!(moved.is_empty(), "rows changed for {moved:?}");
    assert!(before.keys().filter(|id| after.contains_key(*id)).count() > 1000, "nothing was compared");
}

#[tokio::test]
async fn real_organisation_is_mirrored_row_for_row_through_its_history() {
    let (_database, pool) = database().await;
    let wanted =
        ["2025-01", "2026-01", "2026-08"].map(|moment| Mirror::wanted_by_file(&organisation(moment)));

    let first = sync_organisation(&pool, "2025-01", Options::default()).await;
    assert_eq!(first.status, Status::Applied, "{first}");
    assert!(Mirror::read(&pool, MAIN).await == wanted[0], "the mirror of 2025-01 differs");
    let rows = row_ids(&pool).await;
    assert_eq!(
        (first.counts.users.added, first.counts.groups.added, first.counts.memberships.added),
        (1478, 714, 3571)
    );

    let before = written_rows(&pool).await;
    let refused = sync_organisation(&pool, "2026-01", Options::default()).await;
    assert_eq!((refused.status, refused.exit_code()), (Status::Refused, 3), "{refused}");
    assert!(written_rows(&pool).await == before, "a refused plan changed something");
    let approved = sync_organisation(&pool, "2026-01", approve(&refused)).await;
    assert_eq!(approved.status, Status::Applied, "{approved}");
    assert_eq!((approved.plan_hash, approved.counts), (refused.plan_hash, refused.counts));
    assert!(Mirror::read(&pool, MAIN).await == wanted[1], "the mirror of 2026-01 differs");
    let later = row_ids(&pool).await;
    assert_rows_stay(&rows, &later);

    let last = sync_organisation(&pool, "2026-08", Options::default()).await;
    assert_eq!(last.status, Status::Applied, "{last}");
    assert!(Mirror::read(&pool, MAIN).await == wanted[2], "the mirror of 2026-08 differs");
    assert_rows_stay(&later, &row_ids(&pool).await);
}

#[tokio::test]
async fn google_gives_the_same_mirror_with_the_fewest_calls() {
    let (_database, pool) = database().await;
    let path = organisation("2025-01");
    let directory = Directory::from_file(&path).unwrap();
    let members: u64 = directory
        .groups()
        .iter()
        .map(|group| directory.members(group["id"].as_str().unwrap()).len().div_ceil(200).max(1) as u64)
        .sum();
    let fewest =
        (directory.users().len().div_ceil(500) + directory.groups().len().div_ceil(200)) as u64 + members;
    let workspace = workspace(directory).await;
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert!(Mirror::read(&pool, MAIN).await == Mirror::wanted_by_file(&path), "the mirror differs");
    assert_eq!((report.api_calls, workspace.emulator.call_count()), (fewest, fewest));
    let recorded: i64 = number(&pool, "select api_calls from authz.sync_runs").await;
    assert_eq!(u64::try_from(recorded).unwrap(), fewest);
}

#[tokio::test]
async fn unchanged_directory_writes_no_row() {
    let (_database, pool) = database().await;
    sync_organisation(&pool, "2026-08", Options::default()).await;
    let before = written_rows(&pool).await;
    let again = sync_organisation(&pool, "2026-08", Options::default()).await;
    assert_eq!((again.status, again.exit_code()), (Status::Unchanged, 0), "{again}");
    assert!(again.plan.unwrap().is_empty());
    assert!(written_rows(&pool).await == before, "an unchanged directory wrote rows");
}

#[tokio::test]
async fn plan_changes_nothing_and_names_what_a_run_would_do() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").group("g", "ops").member("g", "1");
    let before = written_rows(&pool).await;
    let plan = DirectorySync::new(pool.clone(), name(MAIN), org.source()).plan().await;
    assert_eq!((plan.status, plan.exit_code()), (Status::Planned, 0), "{plan}");
    assert_cleared(&pool, plan.run_id.unwrap()).await;
    assert_eq!(written_rows(&pool).await, before);
    let report = applied(&pool, &org).await;
    assert_eq!((report.plan_hash, report.counts), (plan.plan_hash, plan.counts));
}

#[tokio::test]
async fn suspended_and_archived_users_are_denied_until_they_are_back() {
    let (_database, pool) = database().await;
    let org =
        Org::new("C1").user("1", "ada").user("2", "bo").group("g", "ops").member("g", "1").member("g", "2");
    applied(&pool, &org).await;
    grant_to_group(&pool, "ops").await;
    grant_to_user(&pool, "ada").await;
    assert!(can(&pool, "ada").await && can(&pool, "bo").await);

    let away = org.clone().set_user("1", "suspended", true).set_user("2", "archived", true);
    let report = applied_with(&pool, &away, unlimited()).await;
    assert_eq!(report.plan.unwrap().newly_suspended, 2);
    assert!(!can(&pool, "ada").await && !can(&pool, "bo").await);

    applied(&pool, &org).await;
    assert!(can(&pool, "ada").await && can(&pool, "bo").await);
}

#[tokio::test]
async fn everyone_of_the_customer_is_everyone_of_the_directory_and_nobody_else() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "away")
        .set_user("2", "suspended", true)
        .group("all", "all")
        .everyone("all", "C1")
        .group("guests", "guests")
        .external("guests", "x", "guest@elsewhere.example");
    let report = sync_with(&pool, MAIN, &org, include_external()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), true));
    let others = Org::new("C2").user("9", "other@other.example");
    assert_eq!(sync(&pool, "others", &others).await.status, Status::Applied);
    execute(&pool, "insert into authz.users (user_name) values ('local@example.com')").await;

    grant_to_group(&pool, "all").await;
    assert!(can(&pool, "ada").await);
    for denied in ["away", "guest@elsewhere.example", "other@other.example", "local"] {
        assert!(!can(&pool, denied).await, "{denied}");
    }
    // Whoever joins is in it, without a membership of their own.
    sync_with(&pool, MAIN, &org.clone().user("3", "new"), include_external()).await;
    assert!(can(&pool, "new").await);
    let closed = org.without_member("all", "C1");
    assert_eq!(sync_with(&pool, MAIN, &closed, include_external()).await.status, Status::Applied);
    assert!(!can(&pool, "ada").await);
}

#[tokio::test]
async fn everyone_stays_if_the_directory_does_not_say_which_customer_it_is() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g", "ops")
        .everyone("g", "C1")
        .member("g", "1");
    applied(&pool, &org).await;
    let mut json = org.json();
    for user in json["users"].as_array_mut().unwrap() {
        user.as_object_mut().unwrap().remove("customerId");
    }
    let workspace = workspace(Directory::from_value(json).unwrap()).await;
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert!(report.incomplete["ops@example.com"].contains("which customer"), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
}

#[tokio::test]
async fn everyone_of_another_customer_is_reported_and_not_mirrored() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").group("all", "all").everyone("all", "C2");
    let report = applied(&pool, &org).await;
    assert_eq!(report.foreign_everyone, 1);
    assert!(report.to_string().contains("everyone of another customer"), "{report}");
    grant_to_group(&pool, "all").await;
    assert!(!can(&pool, "ada").await);
}

#[tokio::test]
async fn everyone_of_another_customer_is_told_apart_before_the_users_are_listed() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .group("all", "all")
        .everyone("all", "C2")
        .member("all", "1")
        .group("ours", "ours")
        .everyone("ours", "C1")
        .member("ours", "1");
    let workspace = workspace(org.directory()).await;
    let users = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::Hold(users.clone())));
    let running = tokio::spawn({
        let (pool, source) = (pool.clone(), workspace.source().await);
        async move { run(&pool, MAIN, source, Options::default()).await }
    });
    until("the members are listed", async || {
        let calls = workspace.emulator.calls();
        calls.iter().filter(|call| call.path.ends_with("/members") && call.status == Some(200)).count() == 2
    })
    .await;
    users.release();
    let report = running.await.unwrap();
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), false));
    assert_eq!(report.foreign_everyone, 1);
}

#[tokio::test]
async fn nested_groups_grant_through_the_closure() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .group("a", "a")
        .group("b", "b")
        .group("c", "c")
        .nested("a", "b")
        .nested("b", "c")
        .member("c", "1");
    applied(&pool, &org).await;
    grant_to_group(&pool, "a").await;
    assert!(can(&pool, "ada").await);
    let cut = org.clone().without_member("a", "b");
    applied(&pool, &cut).await;
    assert!(!can(&pool, "ada").await);
    // A group in the middle goes, and what hung on it.
    applied(&pool, &org).await;
    assert!(can(&pool, "ada").await);
    applied(&pool, &org.without_group("b")).await;
    assert!(!can(&pool, "ada").await);
}

#[tokio::test]
async fn cycle_of_groups_does_not_fail() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .group("a", "a")
        .group("b", "b")
        .group("c", "c")
        .nested("a", "b")
        .nested("b", "c")
        .nested("c", "a")
        .member("c", "1");
    applied(&pool, &org).await;
    grant_to_group(&pool, "b").await;
    assert!(can(&pool, "ada").await);
    assert_eq!(sync(&pool, MAIN, &org).await.status, Status::Unchanged);
    applied(&pool, &org.without_member("b", "c")).await;
    assert!(!can(&pool, "ada").await);
}

#[tokio::test]
async fn group_that_is_its_own_member_is_not_nested() {
    let (_database, pool) = database().await;
    let org = Org::new("C1").user("1", "ada").group("a", "a").nested("a", "a").member("a", "1");
    applied(&pool, &org).await;
    assert_eq!(sync(&pool, MAIN, &org).await.status, Status::Unchanged);
}

#[tokio::test]
async fn external_group_is_counted_and_not_mirrored() {
    let (_database, pool) = database().await;
    let foreign = json!({"id": "gx", "email": "them@elsewhere.example", "role": "MEMBER", "type": "GROUP"});
    let org = Org::new("C1")
        .user("1", "ada")
        .group("a", "a")
        .group("b", "b")
        .raw_member("a", foreign.clone())
        .raw_member("b", foreign)
        .member("a", "1");
    let plan = applied(&pool, &org).await.plan.unwrap();
    assert_eq!((plan.external_groups, plan.external_users), (1, 0));
    let with = sync_with(&pool, MAIN, &org, include_external()).await;
    assert_eq!((with.status, with.plan.unwrap().external_groups), (Status::Unchanged, 1));
}

#[tokio::test]
async fn direct_and_nested_member_is_one_membership_each() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .group("a", "a")
        .group("b", "b")
        .nested("a", "b")
        .member("a", "1")
        .member("b", "1");
    let report = applied(&pool, &org).await;
    assert_eq!(report.counts.memberships.added, 3);
    grant_to_group(&pool, "a").await;
    // One way in is enough, the other may go.
    applied(&pool, &org.clone().without_member("a", "1")).await;
    assert!(can(&pool, "ada").await);
    applied(&pool, &org.without_member("b", "1")).await;
    assert!(can(&pool, "ada").await);
}

#[tokio::test]
async fn owners_and_managers_are_members_and_a_role_may_change() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "owner")
        .user("2", "manager")
        .user("3", "member")
        .group("g", "ops")
        .member_as("g", "1", "OWNER")
        .member_as("g", "2", "MANAGER")
        .member_as("g", "3", "MEMBER");
    applied(&pool, &org).await;
    grant_to_group(&pool, "ops").await;
    for user in ["owner", "manager", "member"] {
        assert!(can(&pool, user).await, "{user}");
    }
    let swapped =
        org.without_member("g", "1").without_member("g", "3").member("g", "1").member_as("g", "3", "OWNER");
    let counts = applied(&pool, &swapped).await.counts;
    assert_eq!((counts.memberships.changed, counts.memberships.added, counts.memberships.removed), (2, 0, 0));
}

#[tokio::test]
async fn unknown_role_is_a_member_and_unknown_type_is_counted() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g", "ops")
        .raw_member("g", json!({"id": "1", "email": "ada@example.com", "role": "DEPUTY", "type": "USER"}))
        .raw_member("g", json!({"id": "2", "email": "bo@example.com", "type": "USER"}))
        .raw_member("g", json!({"id": "r1", "email": "r1@example.com", "role": "MEMBER", "type": "ROBOT"}))
        .raw_member("g", json!({"id": "r2", "role": "MEMBER", "type": "ROBOT"}));
    let report = sync(&pool, MAIN, &org).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(report.unknown_member_types, BTreeMap::from([("ROBOT".to_owned(), 2)]));
    let members = Mirror::read(&pool, MAIN).await.members;
    let plain = |user: &str| ("g".to_owned(), user.to_owned(), "member".to_owned());
    assert_eq!(members, [plain("1"), plain("2")].into());
}

#[tokio::test]
async fn membership_changed_by_hand_is_put_right() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("a", "a")
        .group("b", "b")
        .group("c", "c")
        .member("a", "1")
        .nested("a", "b")
        .everyone("b", "C1");
    applied(&pool, &org).await;
    let right = Mirror::read(&pool, MAIN).await;
    execute(
        &pool,
        "delete from authz.group_users;
         delete from authz.group_groups;
         delete from authz.group_directories;
         insert into authz.users (user_name) values ('local@example.com');
         insert into authz.groups (group_name) values ('local@example.com');
         insert into authz.group_users (group_id, user_id)
             select group_id, user_id from authz.groups, authz.users
             where (group_name, user_name) in (('a@example.com', 'bo@example.com'), ('a@example.com', 'local@example.com'));
         insert into authz.group_groups
             select p.group_id, c.group_id from authz.groups p, authz.groups c
             where (p.group_name, c.group_name) in (('c@example.com', 'a@example.com'), ('c@example.com', 'local@example.com'));
         insert into authz.group_directories select group_id, 0 from authz.groups where group_name = 'c@example.com';
         insert into authz.group_directories
             select group_id, directory_id from authz.groups where group_name = 'c@example.com';",
    )
    .await;
    applied_with(&pool, &org, unlimited()).await;
    assert_eq!(Mirror::read(&pool, MAIN).await, right);
    assert_eq!(sync(&pool, MAIN, &org).await.status, Status::Unchanged);
}
