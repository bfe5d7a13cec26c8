//! What is not known is never taken for absence, and what looks wrong is refused: the mirror stays as it was.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use dir_sync::guard::{Limit, Limits};
use dir_sync::{DirectorySync, Options, Report, Status};
use directory_emulator::{Effect, Fault, Target};
use serde_json::{Value, json};
use sqlx::PgPool;

use self::support::*;

/// Two groups with two members each.
fn org() -> Org {
    Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g1", "ops")
        .member("g1", "1")
        .member("g1", "2")
        .group("g2", "web")
        .member("g2", "1")
        .member("g2", "2")
}

async fn mirrored(pool: &PgPool, org: &Org) -> Workspace {
    let workspace = workspace(org.directory()).await;
    let report = run(pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    workspace
}

async fn run_again(pool: &PgPool, workspace: &Workspace, options: Options) -> Report {
    run(pool, MAIN, workspace.source().await, options).await
}

fn broken() -> Effect {
    Effect::status(500, "backendError")
}

async fn complete_since(pool: &PgPool) -> String {
    text(pool, "select last_complete_sync_at::text from authz.directories where directory_name = 'main'")
        .await
}

/// The newest run: status, plan hash, counts, message.
async fn newest_run(pool: &PgPool) -> (String, Option<String>, Option<Value>, Option<String>) {
    sqlx::query_as(
        "select status, plan_hash, counts, message from authz.sync_runs order by run_id desc limit 1",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

/// The newest record of a sync: outcome, target, detail.
async fn newest_audit(pool: &PgPool) -> (String, String, Value) {
    sqlx::query_as(
        "select outcome, target, detail from authz.audit_log where action = 'directory.sync' order by audit_id desc limit 1",
    )
    .fetch_one(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn broken_group_keeps_its_members_and_the_rest_is_applied() {
    let (_database, pool) = database().await;
    let workspace = mirrored(&pool, &org()).await;
    let since = complete_since(&pool).await;
    let next = org()
        .user("3", "cy")
        .without_member("g1", "1")
        .without_member("g2", "1")
        .member("g1", "3")
        .member("g2", "3");
    workspace.emulator.replace_directory(next.directory());
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), broken()));
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!((report.status, report.exit_code()), (Status::Partial, 4), "{report}");
    assert_eq!(report.incomplete.keys().collect::<Vec<_>>(), ["ops@example.com"]);
    assert_eq!(report.plan.unwrap().incomplete_groups, ["ops@example.com"]);
    let kept = next.clone().without_member("g1", "3").member("g1", "1");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&kept.json(), false));
    assert_eq!(complete_since(&pool).await, since, "a partial run is not a complete one");
    let (status, hash, counts, message) = newest_run(&pool).await;
    assert_eq!((status.as_str(), hash), ("partial", report.plan_hash.clone()));
    assert!(counts.is_some() && message.unwrap().contains("ops@example.com"));
    let (outcome, _, detail) = newest_audit(&pool).await;
    assert_eq!((outcome.as_str(), &detail["status"]), ("succeeded", &json!("partial")));

    workspace.emulator.clear_faults();
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&next.json(), false));
    assert_ne!(complete_since(&pool).await, since);
}

#[tokio::test]
async fn partial_run_with_nothing_to_change_is_still_partial() {
    let (_database, pool) = database().await;
    let workspace = mirrored(&pool, &org()).await;
    let before = (written_rows(&pool).await, complete_since(&pool).await);
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), broken()));
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!((report.status, report.exit_code()), (Status::Partial, 4), "{report}");
    assert_eq!((written_rows(&pool).await, complete_since(&pool).await), before);
}

#[tokio::test]
async fn removed_user_leaves_a_group_that_could_not_be_listed() {
    let (_database, pool) = database().await;
    let workspace = mirrored(&pool, &org()).await;
    workspace.emulator.replace_directory(org().without_user("2").directory());
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), broken()));
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().without_user("2").json(), false));
}

#[tokio::test]
async fn external_member_stays_while_its_group_cannot_be_listed() {
    let (_database, pool) = database().await;
    let org = org().external("g1", "x", "x@partner.example");
    let workspace = workspace(org.directory()).await;
    run_again(&pool, &workspace, include_external()).await;
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), broken()));
    let before = written_rows(&pool).await;
    let report = run_again(&pool, &workspace, include_external()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert_eq!(written_rows(&pool).await, before);
}

#[tokio::test]
async fn all_groups_broken_changes_no_membership() {
    let (_database, pool) = database().await;
    let workspace = mirrored(&pool, &org()).await;
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), broken()));
    workspace.emulator.add_fault(Fault::new(Target::members_of("g2"), broken()));
    workspace.emulator.replace_directory(org().rename_user("1", "ada2").directory());
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert_eq!(
        Mirror::read(&pool, MAIN).await,
        Mirror::wanted(&org().rename_user("1", "ada2").json(), false)
    );
}

#[tokio::test]
async fn failed_listing_of_users_or_groups_changes_nothing() {
    for (target, what) in [(Target::users(), "users"), (Target::groups(), "groups")] {
        let (_database, pool) = database().await;
        let workspace = mirrored(&pool, &org()).await;
        let before = (written_rows(&pool).await, complete_since(&pool).await);
        workspace.emulator.replace_directory(org().without_user("2").without_group("g2").directory());
        workspace.emulator.add_fault(Fault::new(target, broken()));
        let report = run_again(&pool, &workspace, Options::default()).await;
        assert_eq!((report.status, report.exit_code()), (Status::Failed, 1), "{report}");
        assert!(report.error.unwrap().contains(what));
        assert_eq!((written_rows(&pool).await, complete_since(&pool).await), before);
        let (status, hash, _, message) = newest_run(&pool).await;
        assert_eq!((status.as_str(), hash), ("failed", None));
        assert!(message.unwrap().contains(what));
        let (outcome, target, detail) = newest_audit(&pool).await;
        assert_eq!(
            (outcome.as_str(), target.as_str(), &detail["status"]),
            ("failed", "main", &json!("failed"))
        );
    }
}

#[tokio::test]
async fn empty_listing_over_a_mirror_is_refused_until_it_is_approved() {
    let empty_of_users = Org::new("C1").group("g1", "ops").group("g2", "web");
    let empty_of_groups = Org::new("C1").user("1", "ada").user("2", "bo");
    for (target, left) in [(Target::users(), empty_of_users), (Target::groups(), empty_of_groups)] {
        let (_database, pool) = database().await;
        let workspace = mirrored(&pool, &org()).await;
        let before = (written_rows(&pool).await, complete_since(&pool).await);
        workspace.emulator.add_fault(Fault::new(target, Effect::EmptyListing));
        let refused = run_again(&pool, &workspace, Options::default()).await;
        assert_eq!((refused.status, refused.exit_code()), (Status::Refused, 3), "{refused}");
        assert!(refused.to_string().contains("at all, while the mirror has 2"), "{refused}");
        assert_eq!((written_rows(&pool).await, complete_since(&pool).await), before);
        let (status, hash, counts, message) = newest_run(&pool).await;
        assert_eq!((status.as_str(), &hash), ("refused", &refused.plan_hash));
        assert!(counts.is_some() && message.unwrap().contains("--approve"));
        let (outcome, _, detail) = newest_audit(&pool).await;
        assert_eq!((outcome.as_str(), &detail["status"]), ("denied", &json!("refused")));

        let approved = run_again(&pool, &workspace, approve(&refused)).await;
        assert_eq!(approved.status, Status::Applied, "{approved}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&left.json(), false));
    }
}

#[tokio::test]
async fn empty_listing_of_users_is_refused_though_all_would_stay_as_externals() {
    let (_database, pool) = database().await;
    let workspace = workspace(org().directory()).await;
    run_again(&pool, &workspace, include_external()).await;
    let before = written_rows(&pool).await;
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::EmptyListing));
    let report = run_again(&pool, &workspace, include_external()).await;
    assert_eq!(report.status, Status::Refused, "{report}");
    assert_eq!(written_rows(&pool).await, before);
}

#[tokio::test]
async fn empty_directory_over_an_empty_mirror_is_no_refusal() {
    let (_database, pool) = database().await;
    assert_eq!(sync(&pool, MAIN, &Org::new("C1")).await.status, Status::Unchanged);
}

#[tokio::test]
async fn approval_of_another_plan_does_not_count() {
    let (_database, pool) = database().await;
    let many = (0..8).fold(org(), |org, n| org.user(&format!("n{n}"), &format!("n{n}")));
    applied(&pool, &many).await;
    let before = written_rows(&pool).await;
    let refused = sync(&pool, MAIN, &org()).await;
    assert_eq!(refused.status, Status::Refused, "{refused}");
    let changed = sync_with(&pool, MAIN, &org().without_user("1"), approve(&refused)).await;
    assert_eq!(changed.status, Status::Refused, "{changed}");
    assert_eq!(changed.refusal.as_ref().unwrap().approved, refused.plan_hash);
    assert!(changed.to_string().contains("another one"), "{changed}");
    assert_eq!(written_rows(&pool).await, before);
    let approved = sync_with(&pool, MAIN, &org(), approve(&refused)).await;
    assert_eq!(approved.status, Status::Applied, "{approved}");
}

#[tokio::test]
async fn endless_listing_removes_nothing() {
    let (_database, pool) = database().await;
    let workspace = mirrored(&pool, &org()).await;
    let before = written_rows(&pool).await;
    workspace.emulator.replace_directory(org().without_user("2").without_group("g2").directory());
    for (target, status) in [(Target::users(), Status::Failed), (Target::groups(), Status::Failed)] {
        workspace.emulator.add_fault(Fault::new(target, Effect::RepeatPageToken));
        let report = run_again(&pool, &workspace, Options::default()).await;
        assert_eq!(report.status, status, "{report}");
        assert_eq!(written_rows(&pool).await, before);
        workspace.emulator.clear_faults();
    }
    workspace.emulator.replace_directory(org().without_member("g1", "2").directory());
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::RepeatPageToken));
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    assert_eq!(written_rows(&pool).await, before);
}

#[tokio::test]
async fn another_organisation_is_refused() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    let before = written_rows(&pool).await;
    let other = Org::new("C2").user("9", "zed");
    let report = sync(&pool, MAIN, &other).await;
    assert_eq!((report.status, report.exit_code()), (Status::Failed, 1), "{report}");
    let error = report.error.unwrap();
    assert!(error.contains("`C1`") && error.contains("`C2`") && error.contains("--directory"), "{error}");
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(sync(&pool, "other", &other).await.status, Status::Applied);
}

#[tokio::test]
async fn each_run_has_its_record() {
    let (_database, pool) = database().await;
    let report = applied(&pool, &org()).await;
    let (status, hash, counts, message) = newest_run(&pool).await;
    assert_eq!((status.as_str(), hash, message), ("applied", report.plan_hash.clone(), None));
    assert_eq!(counts, Some(json!(report.counts)));
    let (outcome, target, detail) = newest_audit(&pool).await;
    assert_eq!((outcome.as_str(), target.as_str()), ("succeeded", "main"));
    assert_eq!(
        (&detail["run_id"], &detail["status"], &detail["plan_hash"], &detail["counts"]),
        (&json!(report.run_id), &json!("applied"), &json!(report.plan_hash), &json!(report.counts))
    );
    let since = complete_since(&pool).await;

    let again = sync(&pool, MAIN, &org()).await;
    assert_eq!(again.status, Status::Unchanged);
    assert_eq!(newest_run(&pool).await.0, "unchanged");
    let (outcome, _, detail) = newest_audit(&pool).await;
    assert_eq!((outcome.as_str(), &detail["status"]), ("succeeded", &json!("unchanged")));
    assert_ne!(complete_since(&pool).await, since, "it is as fresh as its newest complete run");
    // One record stands for all memberships of a run.
    let single = number(&pool, "select count(*) from authz.audit_log where action like 'membership.%'").await;
    assert_eq!(single, 0);
}

#[tokio::test]
async fn apply_that_the_database_rejects_changes_nothing_and_is_recorded() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    let before = written_rows(&pool).await;
    execute(
        &pool,
        "create function public.reject() returns trigger language plpgsql as $$ begin raise exception 'not today'; end $$;
         create trigger reject before insert on authz.group_users for each statement execute function public.reject();",
    )
    .await;
    let next = org().user("3", "cy").member("g1", "3");
    let report = sync(&pool, MAIN, &next).await;
    assert_eq!((report.status, report.exit_code()), (Status::Failed, 1), "{report}");
    assert!(report.error.unwrap().contains("not today"));
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(newest_run(&pool).await.0, "failed");
    assert_eq!(newest_audit(&pool).await.0, "failed");
    execute(&pool, "drop function public.reject() cascade").await;
    applied(&pool, &next).await;
}

/// What takes rights from many by one membership: a nested group, or everyone of the directory.
#[tokio::test]
async fn one_membership_that_many_have_their_rights_by_does_not_go_unseen() {
    let staff = (0..30).fold(Org::new("C1").group("g1", "ops").group("g2", "staff"), |org, n| {
        let user = format!("u{n:02}");
        let org = org.user(&user, &user);
        if n < 20 { org.member("g2", &user) } else { org }
    });
    let by_nesting = (staff.clone().nested("g1", "g2"), 20);
    let by_everyone = (staff.clone().everyone("g1", "C1"), 30);
    for (before, losing) in [by_nesting, by_everyone] {
        let (_database, pool) = database().await;
        let workspace = mirrored(&pool, &before).await;
        grant_to_group(&pool, "ops").await;
        workspace.emulator.replace_directory(staff.directory());
        let refused = run_again(&pool, &workspace, Options::default()).await;
        assert_eq!(refused.exit_code(), 3, "{refused}");
        let expected = format!("{losing} of 30 users would lose an action, at most 10 may at once");
        assert!(refused.to_string().contains(&expected), "{refused}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&before.json(), false));
        let limits = Limits { losing_users: Limit::new(100, 0), ..Limits::default() };
        let report = run_again(&pool, &workspace, Options { limits, ..Options::default() }).await;
        assert_eq!(report.status, Status::Applied, "{report}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&staff.json(), false));
    }
}

/// The directory of a vendor, say: what it has few of are users of its own, and not people in its groups.
#[tokio::test]
async fn who_is_in_the_groups_counts_where_rights_are_lost() {
    let (_database, pool) = database().await;
    let many = (0..40).fold(Org::new("C1").group("o", "other"), |org, n| {
        let user = format!("u{n:02}");
        org.user(&user, &user).member("o", &user)
    });
    assert_eq!(run(&pool, "other", many.source(), Options::default()).await.status, Status::Applied);
    let of_vendor = |guests: std::ops::Range<usize>| {
        let org = Org::new("C2").user("v1", "vi").group("g1", "ops").member("g1", "v1");
        guests.fold(org, |org, n| org.external("g1", &format!("u{n:02}"), &address(&format!("u{n:02}"))))
    };
    run(&pool, MAIN, of_vendor(0..40).source(), include_external()).await;
    grant_to_group(&pool, "ops").await;
    let report = run(&pool, MAIN, of_vendor(0..34).source(), include_external()).await;
    assert_eq!((report.status, report.counts.memberships.removed), (Status::Applied, 4 + 2), "{report}");
    let report = run(&pool, MAIN, of_vendor(0..16).source(), include_external()).await;
    assert!(report.to_string().contains("18 of 35 users would lose an action, at most 10 may"), "{report}");
}

/// What somebody has looked at did not say so.
#[tokio::test]
async fn approval_does_not_hold_for_rights_that_were_granted_after_it() {
    let (_database, pool) = database().await;
    let before = (0..20).fold(Org::new("C1").group("g1", "ops").group("g2", "web"), |org, n| {
        let user = format!("u{n:02}");
        org.user(&user, &user).member("g1", &user).member("g2", &user)
    });
    let workspace = mirrored(&pool, &before).await;
    let after = (0..15).fold(before, |org, n| org.without_member("g1", &format!("u{n:02}")));
    workspace.emulator.replace_directory(after.directory());
    let refused = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!(refused.status, Status::Refused, "{refused}");
    grant_to_group(&pool, "ops").await;
    let again = run_again(&pool, &workspace, approve(&refused)).await;
    assert_eq!(again.status, Status::Refused, "{again}");
    assert!(again.to_string().contains("15 of 20 users would lose an action"), "{again}");
    let report = run_again(&pool, &workspace, approve(&again)).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&after.json(), false));
}

/// An empty answer is no error, and no proof either. The guard lets a small group go.
#[tokio::test]
async fn group_that_is_listed_as_empty_is_listed_again() {
    let (_database, pool) = database().await;
    let workspace = mirrored(&pool, &org()).await;
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::EmptyListing).on_call(1));
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!((report.counts.memberships.removed, report.api_calls), (0, 2 + 2 + 1), "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false));
    // Whoever is alone there is asked for.
    let next = org().without_member("g1", "2");
    workspace.emulator.replace_directory(next.directory());
    run_again(&pool, &workspace, Options::default()).await;
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::EmptyListing).on_call(1));
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!((report.counts.memberships.removed, report.api_calls), (0, 2 + 2 + 1), "{report}");
    // What is empty is.
    workspace.emulator.clear_faults();
    let next = next.without_member("g1", "1");
    workspace.emulator.replace_directory(next.directory());
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!((report.status, report.counts.memberships.removed), (Status::Applied, 1), "{report}");
    let report = run_again(&pool, &workspace, Options::default()).await;
    assert_eq!((report.status, report.api_calls), (Status::Unchanged, 2 + 2), "{report}");
}

#[tokio::test]
async fn guests_who_leave_are_not_counted_as_users_of_the_directory() {
    let (_database, pool) = database().await;
    let with_guests = |guests: usize| {
        (0..guests)
            .fold(org(), |org, n| org.external("g1", &format!("x{n}"), &format!("x{n}@partner.example")))
    };
    let report = run(&pool, MAIN, with_guests(60).source(), include_external()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    let report = run(&pool, MAIN, with_guests(55).source(), include_external()).await;
    assert_eq!((report.status, report.counts.users.removed), (Status::Applied, 5), "{report}");
    let report = run(&pool, MAIN, with_guests(40).source(), include_external()).await;
    assert!(report.to_string().contains("15 of 59 memberships would be removed"), "{report}");
}

#[tokio::test]
async fn plan_says_that_a_run_would_be_refused() {
    let (_database, pool) = database().await;
    mirrored(&pool, &org()).await;
    let next = org().without_user("1").without_user("2").user("3", "cy");
    let planned = DirectorySync::new(pool.clone(), name(MAIN), next.source()).plan().await;
    assert_eq!((planned.status, planned.exit_code()), (Status::Planned, 0), "{planned}");
    let refusal = planned.refusal.clone().unwrap();
    assert!(planned.to_string().contains(&format!("a run would be refused: {refusal}")), "{planned}");
    let refused = run(&pool, MAIN, next.source(), Options::default()).await;
    assert_eq!(refused.refusal.as_ref(), Some(&refusal));
    let json = serde_json::to_value(&refused).unwrap();
    assert_eq!(json["refusal"]["message"], json!(refusal.to_string()));
}

/// It takes nobody out of the suspended.
#[tokio::test]
async fn no_remove_is_advised_only_where_it_helps() {
    let (_database, pool) = database().await;
    mirrored(&pool, &org()).await;
    let suspended = org().set_user("1", "suspended", true).set_user("2", "suspended", true);
    let refused = run(&pool, MAIN, suspended.source(), Options::default()).await;
    assert!(refused.status == Status::Refused && !refused.to_string().contains("--no-remove"), "{refused}");
    let gone = org().without_user("1").without_user("2").user("3", "cy");
    let refused = run(&pool, MAIN, gone.source(), Options::default()).await;
    assert!(refused.status == Status::Refused && refused.to_string().contains("--no-remove"), "{refused}");
}
