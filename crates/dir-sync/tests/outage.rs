//! The directory stops answering, slows us down, or takes too long: what is asked then, and what becomes of the run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use dir_sync::{DirectorySync, Options, Status};
use directory_emulator::{Effect, Fault, Gate, Target};

use self::support::*;

/// So many groups of one member each: the calls are two and one for each group.
fn many_groups(groups: usize) -> Org {
    let mut org = Org::new("C1").user("1", "ada");
    for n in 0..groups {
        let group = format!("g{n}");
        org = org.group(&group, &group).member(&group, "1");
    }
    org
}

#[tokio::test]
async fn dead_directory_is_not_asked_for_each_group() {
    let (_database, pool) = database().await;
    let workspace = workspace(many_groups(150).directory()).await;
    let dies = Fault::new(Target::Anything, Effect::status(503, "backendError")).from_call(20);
    workspace.emulator.add_fault(dies);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    // 17 groups were listed. Until the doubt 16 calls failed, and those under way; then five used up three attempts each.
    let calls = workspace.emulator.call_count();
    assert!(calls <= 19 + 16 + 8 + 5 * 3, "{calls} calls");
    assert_eq!(report.incomplete.len(), 150 - 17);
    assert!(report.incomplete.values().any(|why| why.contains("stopped answering")));
    // Nobody lost anything, and the next run goes on where this one ended.
    workspace.emulator.clear_faults();
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&many_groups(150).json(), false));
}

#[tokio::test]
async fn quota_that_does_not_come_back_is_not_waited_for_by_each_group() {
    let (_database, pool) = database().await;
    let mut workspace = workspace(many_groups(150).directory()).await;
    workspace.config.retry.rate_limited_attempts = 3;
    let used_up = Fault::new(Target::Anything, Effect::status(403, "quotaExceeded")).from_call(20);
    workspace.emulator.add_fault(used_up);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    // Five groups used up three attempts each, and those that were under way with them.
    let calls = workspace.emulator.call_count();
    assert!(calls <= 19 + (5 + 8) * 3, "{calls} calls");
    assert!(report.incomplete.values().any(|why| why.contains("for several in a row")), "{report}");
    workspace.emulator.clear_faults();
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&many_groups(150).json(), false));
}

#[tokio::test]
async fn outage_that_passes_costs_no_group() {
    let (_database, pool) = database().await;
    let mut workspace = workspace(many_groups(60).directory()).await;
    workspace.config.retry.attempts = 20; // more than fail, should they all meet one call
    let away = Fault::new(Target::Anything, Effect::CloseConnection).from_call(20).up_to_call(36);
    workspace.emulator.add_fault(away);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(report.api_calls, 62 + 17, "each failed call was sent once more");
}

#[tokio::test]
async fn used_up_quota_is_waited_for_by_all_calls_together() {
    let (_database, pool) = database().await;
    let mut workspace = workspace(many_groups(60).directory()).await;
    workspace.config.retry.rate_limited_attempts = 20;
    let over =
        Fault::new(Target::Anything, Effect::status(403, "quotaExceeded")).from_call(10).up_to_call(25);
    workspace.emulator.add_fault(over);
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(report.api_calls, 62 + 16);
}

#[tokio::test]
async fn directory_that_wants_to_be_left_alone_for_long_is_not_asked_for_each_group() {
    let (_database, pool) = database().await;
    let workspace = workspace(many_groups(150).directory()).await;
    let hour = Effect::status_retry_after(429, "rateLimitExceeded", 3600);
    workspace.emulator.add_fault(Fault::new(Target::Anything, hour).from_call(20));
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Partial, "{report}");
    let calls = workspace.emulator.call_count();
    assert!(calls <= 19 + 8, "those under way, and no more: {calls} calls");
    assert_eq!(report.incomplete.len(), 150 - 17);
    assert!(report.incomplete.values().any(|why| why.contains("left alone")), "{report}");
}

#[tokio::test]
async fn run_past_its_deadline_changes_nothing_and_gives_the_lease_back() {
    let (_database, pool) = database().await;
    let workspace = workspace(many_groups(3).directory()).await;
    let gate = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::Hold(gate.clone())));
    let options = Options { deadline: Some(Duration::from_millis(300)), ..Options::default() };
    let report = run(&pool, MAIN, workspace.source().await, options).await;
    assert_eq!((report.status, report.exit_code()), (Status::Failed, 1), "{report}");
    assert!(report.error.unwrap().contains("--deadline"));
    assert_eq!(number(&pool, "select count(*) from authz.users").await, 0);
    assert_eq!(text(&pool, "select status from authz.sync_runs").await, "failed");
    gate.release();
    let report = run(&pool, MAIN, workspace.source().await, Options::default()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
}

#[tokio::test]
async fn run_with_jitter_begins_later() {
    let (_database, pool) = database().await;
    let options = Options { start_jitter: Duration::from_hours(24 * 365), ..Options::default() };
    let sync = DirectorySync::new(pool.clone(), name(MAIN), many_groups(1).source()).options(options);
    assert!(tokio::time::timeout(Duration::from_millis(200), sync.run()).await.is_err());
    assert_eq!(number(&pool, "select count(*) from authz.sync_runs").await, 0);
}
