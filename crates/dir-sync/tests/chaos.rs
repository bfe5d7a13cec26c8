//! Many syncs of a directory that changes, under random faults and kills: the mirror never has what the directory did not
//! have, never loses what the directory did not lose, and equals it once the faults stop.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;

use dir_sync::guard::Limits;
use dir_sync::{Options, Status};
use directory_emulator::{Effect, Fault, Framing, Gate, Target};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use sqlx::PgPool;

use self::support::*;

const STEPS: usize = 60;

fn everything_may_go() -> Options {
    Options { limits: Limits::NONE, ..Options::default() }
}

/// One moment of the directory.
struct Moment {
    wanted: Mirror,
    /// All members that it lists, whether they are listed themselves or not: group and member.
    members: BTreeSet<(String, String)>,
}

impl Moment {
    fn of(org: &Org) -> Self {
        let json = org.json();
        let id = |value: &Value| value["id"].as_str().unwrap().to_owned();
        let groups = json["members"].as_object().unwrap().iter();
        let members = groups.flat_map(|(group, members)| {
            members.as_array().unwrap().iter().map(move |member| (group.clone(), id(member)))
        });
        Self { wanted: Mirror::wanted(&json, false), members: members.collect() }
    }

    fn knows(&self, id: &str) -> bool {
        self.wanted.users.contains_key(id) || self.wanted.groups.contains_key(id)
    }
}

/// All memberships of a mirror as group and member.
fn members(mirror: &Mirror) -> BTreeSet<(String, String)> {
    let users = mirror.members.iter().map(|(group, user, _)| (group.clone(), user.clone()));
    let everyone = mirror.everyone.iter().map(|group| (group.clone(), "C1".to_owned()));
    users.chain(mirror.nested.iter().cloned()).chain(everyone).collect()
}

/// The moments are all that the run can have seen.
fn assert_no_more_and_no_less(before: &Mirror, after: &Mirror, moments: &[Moment], told: &str) {
    for (id, row) in &after.users {
        let had =
            before.users.get(id) == Some(row) || moments.iter().any(|m| m.wanted.users.get(id) == Some(row));
        assert!(had, "user {id} is {row:?}, which nobody said; {told}");
    }
    for (id, row) in &after.groups {
        let had = before.groups.get(id) == Some(row)
            || moments.iter().any(|m| m.wanted.groups.get(id) == Some(row));
        assert!(had, "group {id} is {row:?}, which nobody said; {told}");
    }
    for id in before.users.keys().chain(before.groups.keys()) {
        let gone = !after.users.contains_key(id) && !after.groups.contains_key(id);
        assert!(!gone || moments.iter().any(|m| !m.knows(id)), "{id} was removed by nobody; {told}");
    }
    let (members_before, members_after) = (members(before), members(after));
    for added in members_after.difference(&members_before) {
        assert!(moments.iter().any(|m| m.members.contains(added)), "{added:?} is no member; {told}");
    }
    for removed in members_before.difference(&members_after) {
        let (group, member) = removed;
        let lost = |m: &Moment| {
            !m.members.contains(removed) || !m.knows(group) || !(m.knows(member) || member == "C1")
        };
        assert!(moments.iter().any(lost), "{removed:?} was removed by nobody; {told}");
    }
}

/// Some call of some kind goes wrong, once, a few times or from then on.
fn random_fault(random: &mut SmallRng) -> Fault {
    let group = format!("g{}", random.random_range(0..8));
    let target = match random.random_range(0..10) {
        0 => Target::users(),
        1 => Target::groups(),
        2..=7 => Target::members_of(group),
        _ => Target::Anything,
    };
    let listing_of_all = target == Target::users() || target == Target::groups();
    let effect = match random.random_range(0..14) {
        0 | 1 => Effect::status(503, "backendError"),
        2 => Effect::status(500, "backendError"),
        3 => Effect::status(403, "quotaExceeded"),
        4 => Effect::status_retry_after(429, "rateLimitExceeded", 0),
        5 => Effect::status(404, "notFound"),
        6 => Effect::status(412, "conditionNotMet"),
        7 => Effect::status(400, "invalid"),
        8 => Effect::status(401, "authError"),
        9 => Effect::CutShort(Framing::ContentLength),
        10 => Effect::CutShort(Framing::Chunked),
        11 => Effect::CloseConnection,
        12 => Effect::RepeatPageToken,
        // Of the members of one group it could not be told from the truth.
        _ if listing_of_all => Effect::EmptyListing,
        _ => Effect::status(403, "forbidden"),
    };
    // One listing of this directory takes a call or, tried again, a few.
    let first = random.random_range(1..if target == Target::Anything { 12 } else { 3 });
    let fault = Fault::new(target, effect);
    match random.random_range(0..3) {
        0 => fault.on_call(first),
        1 => fault.from_call(first).up_to_call(first + random.random_range(1..6)),
        _ => fault.from_call(first),
    }
}

/// How often each end was met, so that a test in which nothing happens is seen.
#[derive(Debug, Default)]
struct Ends {
    complete: usize,
    partial: usize,
    failed: usize,
    killed: usize,
}

async fn chaos(seed: u64) {
    let (database, pool) = database().await;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut org = with_changing_parts(Org::new("C1").user("1", "ada").group("a", "a").member("a", "1"));
    let mut workspace = workspace(org.directory()).await;
    workspace.config.retry.attempts = 2;
    workspace.config.retry.rate_limited_attempts = 2;
    let mut ends = Ends::default();
    let mut before = Mirror::default();
    for step in 0..STEPS {
        let told = format!("seed {seed}, step {step}");
        for _ in 0..random.random_range(0..3) {
            org = changed(org, &mut random);
        }
        workspace.emulator.replace_directory(org.directory());
        let mut moments = vec![Moment::of(&org)];
        for _ in 0..random.random_range(0..6) {
            workspace.emulator.add_fault(random_fault(&mut random));
        }
        if random.random_bool(0.3) {
            org = changed(org, &mut random);
            moments.push(Moment::of(&org));
            let change = Effect::ReplaceDirectory(Arc::new(org.directory()));
            let during = random.random_range(1..12);
            workspace.emulator.add_fault(Fault::new(Target::Anything, change).on_call(during));
        }
        if random.random_bool(0.2) {
            kill_during(&workspace, database.url(), &pool, random.random_range(1..10)).await;
            ends.killed += 1;
        } else {
            let report = run(&pool, MAIN, workspace.source().await, everything_may_go()).await;
            match report.status {
                Status::Applied | Status::Unchanged => ends.complete += 1,
                Status::Partial => ends.partial += 1,
                _ => {
                    ends.failed += 1;
                    assert_eq!(Mirror::read(&pool, MAIN).await, before, "{told}: {report}");
                }
            }
        }
        let after = Mirror::read(&pool, MAIN).await;
        assert_no_more_and_no_less(&before, &after, &moments, &told);
        before = after;
        workspace.emulator.clear_faults();
        // The directory as it is now, although the fault that was to bring it may not have come.
        workspace.emulator.replace_directory(org.directory());
        if step % 10 == 9 {
            let report = run(&pool, MAIN, workspace.source().await, everything_may_go()).await;
            assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{told}: {report}");
            before = Mirror::read(&pool, MAIN).await;
            assert_eq!(before, Moment::of(&org).wanted, "{told}");
        }
    }
    let Ends { complete, partial, failed, killed } = ends;
    assert!(complete > 2 && partial > 2 && failed > 2 && killed > 2, "{ends:?}");
}

/// The program, killed while it waits for the answer of its n-th call, or at its end if it makes fewer.
async fn kill_during(workspace: &Workspace, url: &str, pool: &PgPool, call: u64) {
    let gate = Gate::new();
    workspace.emulator.add_fault(Fault::new(Target::Anything, Effect::Hold(gate.clone())).from_call(call));
    let mut running = Program::job("run", url).google(workspace).spawn();
    until("the program is held or has ended", async || running_is_held(&gate).await || running.has_ended())
        .await;
    running.kill_if_running();
    gate.release();
    until("the server has noticed", async || {
        number(pool, "select count(*) from pg_stat_activity where application_name = 'dir-sync' and datname = current_database()")
            .await
            == 0
    })
    .await;
    expire_leases(pool).await;
}

async fn running_is_held(gate: &Gate) -> bool {
    tokio::time::timeout(std::time::Duration::ZERO, gate.arrival(1)).await.is_ok()
}

#[tokio::test]
async fn mirror_is_never_wrong_and_in_the_end_right_under_faults_and_kills() {
    chaos(1).await;
}

#[tokio::test]
async fn mirror_is_never_wrong_and_in_the_end_right_in_another_order() {
    chaos(2).await;
}
