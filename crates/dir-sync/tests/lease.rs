//! One run per directory at a time, also when runs die, and no plan from what was lost.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use authz::group::Role;
use authz::mirror::{
    Failure, PlanOptions, Planned, Run, StagedGroup, StagedMember, StagedMembers, StagedUser, StagedUsers,
};
use authz::{Error, GroupName, UserName};
use sqlx::PgPool;

use self::support::*;

async fn begin(pool: &PgPool, directory: &str) -> Result<Run, Error> {
    Run::begin(pool, &name(directory), "test").await
}

/// Stages two users and a group that has them.
async fn stage(run: &Run) {
    stage_called(run, "", 0).await;
}

/// The same with this display name, and so many outsiders in the group.
async fn stage_called(run: &Run, display_name: &str, outsiders: usize) {
    let user = |id: &str, address: &str| StagedUser {
        external_id: id.to_owned(),
        name: Some(UserName::parse(address).unwrap()),
        display_name: display_name.to_owned(),
        suspended: false,
    };
    let group = StagedGroup {
        external_id: "g".to_owned(),
        name: Some(GroupName::parse("ops@example.com").unwrap()),
        display_name: String::new(),
        description: String::new(),
    };
    let member = |id: &str| StagedMember::User { external_id: id.to_owned(), name: None, role: Role::Member };
    run.stage_users(StagedUsers::from_iter([user("1", "ada@example.com"), user("2", "bo@example.com")]))
        .await
        .unwrap();
    run.stage_groups(&[group]).await.unwrap();
    run.stage_members("g", StagedMembers::from_iter([member("1"), member("2")])).await.unwrap();
    let outsiders = (0..outsiders).map(|n| member(&format!("x{n}")));
    run.stage_members("g", outsiders.collect()).await.unwrap();
    run.finish_members("g", false).await.unwrap();
}

async fn plan(run: Run) -> Planned {
    run.plan(PlanOptions::default()).await.unwrap()
}

async fn apply(planned: Planned) {
    planned.apply(None, 0, &actor()).await.unwrap();
}

/// Takes the lease away from a holder that lives, as if it had been silent for long.
async fn take_over(pool: &PgPool) -> Run {
    loop {
        expire_leases(pool).await;
        match begin(pool, MAIN).await {
            Ok(run) => return run,
            // A heartbeat came in between.
            Err(error) => assert!(matches!(error, Error::LeaseHeld { .. }), "{error}"),
        }
    }
}

async fn users(pool: &PgPool) -> i64 {
    number(pool, "select count(*) from authz.users").await
}

#[tokio::test]
async fn second_run_is_refused_while_the_first_lives() {
    let (_database, pool) = database().await;
    let first = begin(&pool, MAIN).await.unwrap();
    stage(&first).await;
    match begin(&pool, MAIN).await {
        Err(Error::LeaseHeld { directory, run_id }) => {
            assert_eq!((directory.as_str(), run_id), (MAIN, first.id()));
        }
        other => panic!("{other:?}"),
    }
    let runs = number(&pool, "select count(*) from authz.sync_runs").await;
    assert_eq!(runs, 1, "the second run left a record");
    let run_id = first.id();
    apply(plan(first).await).await;
    assert_eq!(users(&pool).await, 2, "the first run was not disturbed");
    assert_cleared(&pool, run_id).await;
    let failure = begin(&pool, MAIN).await.unwrap().fail("enough", 0, &actor()).await.unwrap();
    assert_eq!(failure, Failure::Recorded);
    let failure = authz::mirror::record_failure(&pool, run_id, "too late", 0, &actor()).await.unwrap();
    assert_eq!(failure, Failure::EndedBefore("applied".to_owned()));
}

#[tokio::test]
async fn lease_without_its_holder_is_lost_before_anybody_says_so_in_the_record() {
    let (_database, pool) = database().await;
    let slow = begin(&pool, MAIN).await.unwrap();
    execute(&pool, "delete from authz.sync_leases").await;
    assert_eq!(slow.fail("no answer", 0, &actor()).await.unwrap(), Failure::LeaseLost);
}

#[tokio::test]
async fn two_directories_are_synced_at_once() {
    let (_database, pool) = database().await;
    let first = begin(&pool, MAIN).await.unwrap();
    let second = begin(&pool, "other").await.unwrap();
    stage(&first).await;
    let other = StagedUser {
        external_id: "9".to_owned(),
        name: Some(UserName::parse("zed@other.example").unwrap()),
        display_name: String::new(),
        suspended: false,
    };
    second.stage_users(StagedUsers::from_iter([other])).await.unwrap();
    apply(plan(second).await).await;
    apply(plan(first).await).await;
    let rows = number(
        &pool,
        "select count(*) from authz.users join authz.directories using (directory_id)
         where (directory_name, external_id) in (('main', '1'), ('main', '2'), ('other', '9'))",
    )
    .await;
    assert_eq!(rows, 3);
}

#[tokio::test]
async fn lease_of_a_dead_run_is_taken_when_it_expires() {
    let (_database, pool) = database().await;
    let dead = begin(&pool, MAIN).await.unwrap();
    stage(&dead).await;
    let dead_id = dead.id();
    drop(dead);
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { begin(&pool, MAIN).await }
    });
    // It looks at the lease and does not find it free: each look takes a number for a run.
    until("the next run has looked at the lease", async || {
        number(&pool, "select last_value from authz.sync_runs_run_id_seq").await > dead_id
    })
    .await;
    assert_eq!(run_status(&pool, dead_id).await, "running");
    expire_leases(&pool).await;
    let next = waiting.await.unwrap().unwrap();
    assert_eq!(run_status(&pool, dead_id).await, "abandoned");
    assert_cleared(&pool, dead_id).await;
    stage(&next).await;
    apply(plan(next).await).await;
    assert_eq!(users(&pool).await, 2);
}

#[tokio::test]
async fn lost_lease_writes_nothing() {
    let (_database, pool) = database().await;
    let slow = begin(&pool, MAIN).await.unwrap();
    stage(&slow).await;
    let slow_id = slow.id();
    let before = written_rows(&pool).await;
    let next = take_over(&pool).await;
    let (slow, error) = slow.plan(PlanOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::LeaseLost { run_id } if run_id == slow_id), "{error}");
    assert_eq!(slow.fail("lost", 0, &actor()).await.unwrap(), Failure::LeaseLost);
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(run_status(&pool, slow_id).await, "abandoned", "its end was recorded by its successor");
    // The successor still has the lease.
    stage(&next).await;
    apply(plan(next).await).await;
    assert_eq!(users(&pool).await, 2);
}

#[tokio::test]
async fn apply_holds_the_lease() {
    let (database, pool) = database().await;
    let first = begin(&pool, MAIN).await.unwrap();
    stage(&first).await;
    let first_id = first.id();
    // As if the plan took longer than a lease lasts.
    let planned = loop {
        expire_leases(&pool).await;
        let expired = "select count(*) from authz.sync_leases where expires_at < clock_timestamp()";
        if number(&pool, expired).await == 1 {
            break plan(first).await;
        }
    };
    let elsewhere = connect(database.url()).await;
    let second = tokio::spawn(async move { begin(&elsewhere, MAIN).await });
    until("the second run waits", async || waits_for_lock(&pool, "insert into authz.sync_leases").await)
        .await;
    assert_eq!(users(&pool).await, 0);
    apply(planned).await;
    let second = second.await.unwrap().unwrap();
    assert_eq!(run_status(&pool, first_id).await, "applied");
    stage(&second).await;
    let planned = plan(second).await;
    assert!(planned.plan().is_empty(), "the second run sees what the first has done");
    apply(planned).await;
}

#[tokio::test]
async fn a_plan_is_made_of_what_it_will_change() {
    let (_database, pool) = database().await;
    let run = begin(&pool, MAIN).await.unwrap();
    stage(&run).await;
    let planned = plan(run).await;
    let mut other = pool.acquire().await.unwrap();
    sqlx::raw_sql("set lock_timeout = '50ms'").execute(&mut *other).await.unwrap();
    let error = sqlx::raw_sql("insert into authz.users (user_name) values ('in-between')")
        .execute(&mut *other)
        .await
        .unwrap_err();
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code).unwrap().into_owned();
    assert_eq!(code, "55P03", "who would change the mirror has to wait: {error}");
    apply(planned).await;
    sqlx::raw_sql("insert into authz.users (user_name) values ('afterwards')")
        .execute(&mut *other)
        .await
        .unwrap();
}

#[tokio::test]
async fn staging_lost_in_a_crash_is_not_absence() {
    let (_database, pool) = database().await;
    let first = begin(&pool, MAIN).await.unwrap();
    stage(&first).await;
    apply(plan(first).await).await;
    let before = written_rows(&pool).await;
    for lost in [
        "delete from authz.sync_stage_users where external_id = '2'",
        "delete from authz.sync_stage_groups",
        "delete from authz.sync_stage_members
         where member_external_id = (select max(member_external_id) from authz.sync_stage_members)",
        "insert into authz.sync_stage_gone_members (run_id, group_external_id, user_id)
         select run_id, external_id, 1 from authz.sync_stage_groups limit 1",
        "truncate authz.sync_stage_users, authz.sync_stage_groups, authz.sync_stage_members",
    ] {
        let run = begin(&pool, MAIN).await.unwrap();
        // Other users than before, or they would not be staged; so many members that they do not wait for the plan.
        stage_called(&run, "changed", 40_000).await;
        let run_id = run.id();
        // Users wait for those of the mirror to be read; whatever comes then takes them along.
        until("the users are staged", async || {
            run.stage_users(StagedUsers::default()).await.unwrap();
            number(&pool, "select count(*) from authz.sync_stage_users").await == 2
        })
        .await;
        run.staged().await.unwrap();
        execute(&pool, lost).await;
        let (run, error) = run.plan(PlanOptions::default()).await.unwrap_err();
        assert!(matches!(error, Error::StagingLost { run_id: id } if id == run_id), "{lost}: {error}");
        assert_eq!(run.fail(&error.to_string(), 0, &actor()).await.unwrap(), Failure::Recorded);
        assert_eq!(run_status(&pool, run_id).await, "failed");
        assert_cleared(&pool, run_id).await;
        assert_eq!(written_rows(&pool).await, before);
    }
}

#[tokio::test]
async fn local_is_no_directory_to_sync() {
    let (_database, pool) = database().await;
    assert!(matches!(begin(&pool, "local").await, Err(Error::LocalDirectory)));
    assert_eq!(number(&pool, "select count(*) from authz.sync_runs").await, 0);
}
