//! A listing that is the one of last time is not staged, and nothing is missed by that.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use dir_sync::guard::{Limit, Limits};
use dir_sync::{Options, Report, Status};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sqlx::{AssertSqlSafe, PgPool};

use self::support::*;

fn org() -> Org {
    Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .user("3", "cy")
        .group("a", "a")
        .group("b", "b")
        .group("c", "c")
        .member("a", "1")
        .member("a", "2")
        .member("b", "1")
        .member("c", "3")
        .nested("a", "b")
}

fn everything_may_go(include_external: bool) -> Options {
    let limits = Limits::NONE;
    Options { include_external, limits, ..Options::default() }
}

/// Writes down what is staged from here on, since a run clears up behind itself.
async fn watch_staging(pool: &PgPool) {
    execute(
        pool,
        "create table staged (what text);
         create function note_staged() returns trigger language plpgsql as $$
         begin
             insert into staged values (coalesce(to_jsonb(new) ->> 'group_external_id', 'user') || ' '
                                        || coalesce(to_jsonb(new) ->> 'member_external_id', to_jsonb(new) ->> 'external_id'));
             return null;
         end $$;
         create trigger note after insert on authz.sync_stage_users for each row execute function note_staged();
         create trigger note after insert on authz.sync_stage_members for each row execute function note_staged();",
    )
    .await;
}

async fn staged(pool: &PgPool) -> Vec<String> {
    let staged = sqlx::query_scalar("select what from staged order by what").fetch_all(pool).await.unwrap();
    execute(pool, "truncate staged").await;
    staged
}

/// The directory's ids of the groups that have a digest.
async fn remembered(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "select g.external_id from authz.group_digests d join authz.groups g using (group_id) order by 1",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

/// An external user who was listed once keeps the display name of that time, which no listing of members has.
fn without_names_of_externals(mut mirror: Mirror) -> Mirror {
    for (_, display_name, status) in mirror.users.values_mut() {
        if status == "external" {
            display_name.clear();
        }
    }
    mirror
}

async fn assert_mirrored(pool: &PgPool, org: &Org, options: &Options, told: &str) {
    let mirror = without_names_of_externals(Mirror::read(pool, MAIN).await);
    assert_eq!(mirror, Mirror::wanted(&org.json(), options.include_external), "{told}");
}

async fn mirrored(pool: &PgPool, org: &Org, options: &Options) -> Report {
    let report = sync_with(pool, MAIN, org, options.clone()).await;
    assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{report}");
    assert_mirrored(pool, org, options, "").await;
    report
}

#[tokio::test]
async fn unchanged_directory_is_not_staged() {
    let (_database, pool) = database().await;
    let org = org();
    applied(&pool, &org).await;
    assert_eq!(remembered(&pool).await, ["a", "b", "c"]);
    watch_staging(&pool).await;
    let report = sync(&pool, MAIN, &org).await;
    assert_eq!(report.status, Status::Unchanged, "{report}");
    assert_eq!(staged(&pool).await, [""; 0]);
    let plan = report.plan.unwrap();
    assert_eq!((plan.listed.users, plan.listed.groups, plan.listed.memberships), (3, 3, 5));
    assert_eq!(plan.before, plan.listed);
}

#[tokio::test]
async fn only_what_differs_is_staged() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    watch_staging(&pool).await;
    applied(&pool, &org().member("b", "2").rename_user("3", "cyd")).await;
    // The address of a member stands in its groups' listings as well, here still the old one.
    assert_eq!(staged(&pool).await, ["b 2", "user 3"]);
    assert_eq!(remembered(&pool).await, ["a", "b", "c"]);
}

#[tokio::test]
async fn any_change_by_hand_takes_the_digest_away_and_is_put_right() {
    let (_database, pool) = database().await;
    let org = org();
    applied(&pool, &org).await;
    execute(
        &pool,
        "insert into authz.users (user_name) values ('local@example.com');
         insert into authz.groups (group_name) values ('local@example.com');",
    )
    .await;
    let user =
        |name: &str| format!("(select user_id from authz.users where user_name = '{name}@example.com')");
    let group =
        |name: &str| format!("(select group_id from authz.groups where group_name = '{name}@example.com')");
    for (change, left) in [
        (format!("delete from authz.group_users where user_id = {}", user("cy")), vec!["a", "b"]),
        (
            format!("update authz.group_users set role = 'owner' where user_id = {}", user("cy")),
            vec!["a", "b"],
        ),
        (format!("insert into authz.group_users values ({}, {})", group("b"), user("bo")), vec!["a", "c"]),
        (format!("insert into authz.group_users values ({}, {})", group("b"), user("local")), vec!["a", "c"]),
        (
            format!("update authz.group_users set group_id = {} where user_id = {}", group("b"), user("cy")),
            vec!["a"],
        ),
        ("delete from authz.group_groups".to_owned(), vec!["b", "c"]),
        (format!("insert into authz.group_groups values ({}, {})", group("c"), group("a")), vec!["a", "b"]),
        (
            format!("insert into authz.group_groups values ({}, {})", group("c"), group("local")),
            vec!["a", "b"],
        ),
        (format!("insert into authz.group_directories values ({}, 0)", group("c")), vec!["a", "b"]),
        ("truncate authz.group_users".to_owned(), vec![]),
        (format!("update authz.groups set status = 'deleted' where group_id = {}", group("b")), vec!["c"]),
        (format!("update authz.users set status = 'deleted' where user_id = {}", user("cy")), vec!["a", "b"]),
        (format!("update authz.users set external_id = 'x' where user_id = {}", user("cy")), vec!["a", "b"]),
    ] {
        assert_eq!(remembered(&pool).await, ["a", "b", "c"], "before {change}");
        sqlx::raw_sql(AssertSqlSafe(change.clone())).execute(&pool).await.unwrap();
        assert_eq!(remembered(&pool).await, left, "{change}");
        let mut report = mirrored(&pool, &org, &everything_may_go(false)).await;
        if change.contains("'x'") {
            // The name was held by the row of the other id until this run.
            report = mirrored(&pool, &org, &everything_may_go(false)).await;
        }
        assert_eq!(conflicts(&report), [], "{change}");
        mirrored(&pool, &org, &everything_may_go(false)).await;
    }
}

/// A run remembers what it listed though it changed nothing that decides: nobody else's snapshot of before may change memberships
/// then, since it does not see the digest that it would have to take away.
#[tokio::test]
async fn change_that_does_not_see_a_digest_does_not_leave_it_behind() {
    const FORGET: &str = "delete from authz.group_digests";
    let (_database, pool) = database().await;
    let options = everything_may_go(false);
    mirrored(&pool, &org(), &options).await;
    for (isolation, before, change) in [
        ("repeatable read", FORGET, "delete from authz.group_users"),
        ("repeatable read", FORGET, "update authz.group_users set role = 'owner'"),
        ("repeatable read", FORGET, "delete from authz.group_groups"),
        (
            "repeatable read",
            FORGET,
            "insert into authz.group_directories select group_id, 0 from authz.groups",
        ),
        ("repeatable read", FORGET, "update authz.users set status = 'deleted' where external_id = '3'"),
        ("repeatable read", FORGET, "truncate authz.group_users"),
        // The run changes something that does not decide.
        (
            "repeatable read",
            "update authz.group_users set role = 'manager'",
            "delete from authz.group_groups",
        ),
        ("serializable", FORGET, "delete from authz.group_users"),
    ] {
        let told = format!("{isolation}: `{change}` after `{before}`");
        execute(&pool, before).await;
        let beginning = AssertSqlSafe(format!("begin isolation level {isolation}"));
        let mut somebody = pool.begin_with(beginning).await.unwrap();
        sqlx::query("select from authz.users").execute(&mut *somebody).await.unwrap();
        let written = revision_and_changes(&pool).await;
        mirrored(&pool, &org(), &options).await;
        assert_eq!(remembered(&pool).await, ["a", "b", "c"], "{told}");
        assert_eq!(revision_and_changes(&pool).await, written, "{told}");

        let error = sqlx::query(change).execute(&mut *somebody).await.expect_err(&told);
        let code = error.as_database_error().and_then(|error| error.code().map(String::from));
        assert_eq!(code.as_deref(), Some("40001"), "{told}: {error}");
        somebody.rollback().await.unwrap();
        mirrored(&pool, &org(), &options).await;
    }
}

async fn revision_and_changes(pool: &PgPool) -> (i64, i64) {
    sqlx::query_as("select r.revision, (select count(*) from authz.changes) from authz.revision r")
        .fetch_one(pool)
        .await
        .unwrap()
}

/// Where it remembers nothing new, it is in nobody's way.
#[tokio::test]
async fn run_that_remembers_nothing_new_does_not_touch_the_revision() {
    let (_database, pool) = database().await;
    // What a name keeps out is staged each time, and not remembered.
    execute(&pool, "insert into authz.groups (group_name) values ('b@example.com')").await;
    assert_eq!(conflicts(&sync(&pool, MAIN, &org()).await).len(), 1);
    let touched = "select xmin::text || ctid::text from authz.revision";
    let before = text(&pool, touched).await;
    for _ in 0..2 {
        assert_eq!(sync(&pool, MAIN, &org()).await.status, Status::Unchanged);
        assert_eq!(text(&pool, touched).await, before);
    }
}

/// Nor does a run look at the past itself, whatever the database takes for the default.
#[tokio::test]
async fn run_of_a_database_that_shows_the_past_remembers_the_present() {
    let org = org();
    for isolation in ["repeatable read", "serializable"] {
        let (database, pool) = database().await;
        applied(&pool, &org).await;
        let sql = format!(
            "do $$ begin
                 execute format('alter database %I set default_transaction_isolation = %L', current_database(), '{isolation}');
             end $$"
        );
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
        let there = connect(database.url()).await;
        execute(&pool, "delete from authz.group_digests").await;
        let mut somebody = pool.begin().await.unwrap();
        // No change of what decides, so the revision stays what it is.
        sqlx::query("update authz.group_users set role = 'owner'").execute(&mut *somebody).await.unwrap();
        let (report, ()) = tokio::join!(sync_with(&there, MAIN, &org, everything_may_go(false)), async {
            until_somebody_waits_for_the_revision(&pool).await;
            somebody.commit().await.unwrap();
        });
        assert_eq!(report.status, Status::Applied, "{isolation}: {report}");
        assert_mirrored(&pool, &org, &everything_may_go(false), isolation).await;
    }
}

async fn until_somebody_waits_for_the_revision(pool: &PgPool) {
    const WAITS: &str = "select exists (select from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock' and query ilike '%hold_revision%')";
    while !sqlx::query_scalar::<_, bool>(WAITS).fetch_one(pool).await.unwrap() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn user_listed_at_last_becomes_a_member_though_the_listing_of_members_is_the_same() {
    let (_database, pool) = database().await;
    let before = org().external("b", "9", "zed");
    for include_external in [false, true] {
        let options = everything_may_go(include_external);
        let report = mirrored(&pool, &before, &options).await;
        assert_eq!(report.plan.unwrap().external_users, 1);
        let again = mirrored(&pool, &before, &options).await;
        assert_eq!((again.status, again.plan.unwrap().external_users), (Status::Unchanged, 1));
        mirrored(&pool, &before.clone().user("9", "zed"), &options).await;
        // And back: listed no more, but still a member.
        mirrored(&pool, &before, &options).await;
    }
}

#[tokio::test]
async fn what_a_conflict_kept_out_comes_in_when_it_is_solved() {
    let (_database, pool) = database().await;
    execute(
        &pool,
        "insert into authz.users (user_name) values ('ada@example.com');
         insert into authz.groups (group_name) values ('b@example.com');",
    )
    .await;
    for _ in 0..2 {
        let report = sync(&pool, MAIN, &org()).await;
        assert_eq!(conflicts(&report).len(), 2);
        assert_eq!(remembered(&pool).await, ["a", "c"]);
    }
    execute(
        &pool,
        "update authz.users set user_name = 'other@example.com' where directory_id = 0;
         update authz.groups set group_name = 'other@example.com' where directory_id = 0;",
    )
    .await;
    applied(&pool, &org()).await;
}

#[tokio::test]
async fn run_that_was_refused_or_only_planned_remembers_nothing() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    let emptied = org().without_member("a", "1").without_member("a", "2").without_member("a", "b");
    let nothing = Limits { memberships: Limit::new(0, 0), ..Limits::default() };
    let strict = Options { limits: nothing, ..Options::default() };
    assert_eq!(sync_with(&pool, MAIN, &emptied, strict).await.status, Status::Refused);
    applied(&pool, &emptied).await;
}

const BY_HAND: [&str; 6] = [
    "delete from authz.group_users where group_id % 3 = 0",
    "insert into authz.group_users (group_id, user_id)
     select max(group_id), max(user_id) from authz.groups, authz.users
     where (authz.groups.status, authz.users.status) = ('active', 'active') having max(group_id) is not null on conflict do nothing",
    "delete from authz.group_groups",
    "update authz.users set status = 'suspended' where user_id % 3 = 0 and directory_id is not null and status = 'active'",
    "update authz.group_users set role = 'owner' where user_id % 2 = 0",
    "delete from authz.group_directories",
];

/// What is remembered of each group is what the mirror has of it: how many members, and who is listed besides.
async fn assert_remembered_as_it_is(pool: &PgPool, org: &Org, told: &str) {
    let miscounted = number(
        pool,
        "select count(*) from authz.group_digests d
         where d.members <> (select count(*) from authz.group_users m where m.group_id = d.group_id)
                            + (select count(*) from authz.group_groups m where m.parent_group_id = d.group_id)
                            + (select count(*) from authz.group_directories m where m.group_id = d.group_id)",
    )
    .await;
    assert_eq!(miscounted, 0, "{told}");
    let own: Vec<String> = sqlx::query_scalar(
        "select u.external_id from authz.users u join authz.directories d using (directory_id)
         where d.directory_name = 'main' and u.status <> 'deleted'",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    let nested = Mirror::read(pool, MAIN).await.nested;
    let json = org.json();
    let mut outsiders = vec![];
    for group in remembered(pool).await {
        for member in json["members"][&group].as_array().unwrap() {
            let id = member["id"].as_str().unwrap().to_owned();
            let kind = member["type"].as_str().unwrap().to_lowercase();
            let is_inside = match kind.as_str() {
                "user" => own.contains(&id),
                _ => nested.contains(&(group.clone(), id.clone())),
            };
            if !is_inside {
                outsiders.push((group.clone(), kind, id));
            }
        }
    }
    outsiders.sort();
    let remembered: Vec<(String, String, String)> = sqlx::query_as(
        r#"select g.external_id, o.kind, o.external_id from authz.group_outsiders o join authz.groups g using (group_id)
           order by g.external_id collate "C", o.kind collate "C", o.external_id collate "C""#,
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert_eq!(remembered, outsiders, "{told}");
}

async fn small_changes_are_mirrored(seed: u64) {
    let (_database, pool) = database().await;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut org = with_changing_parts(org());
    for step in 0..40 {
        let options = everything_may_go(random.random_bool(0.3) != seed.is_multiple_of(2));
        if random.random_bool(0.2) {
            execute(&pool, BY_HAND.choose(&mut random).unwrap()).await;
        }
        org = changed(org, &mut random);
        let mut report = sync_with(&pool, MAIN, &org, options.clone()).await;
        if report.status == Status::Refused {
            let approved = Options { approve: report.plan_hash.clone(), ..options.clone() };
            report = sync_with(&pool, MAIN, &org, approved).await;
        }
        let told = format!("seed {seed}, step {step}: {report}");
        assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{told}");
        if conflicts(&report).is_empty() {
            assert_mirrored(&pool, &org, &options, &told).await;
        }
        assert_remembered_as_it_is(&pool, &org, &told).await;
        let again = sync_with(&pool, MAIN, &org, options).await;
        assert_eq!(again.status, Status::Unchanged, "{told}");
        let (before, after) = (report.plan.unwrap(), again.plan.unwrap());
        assert_eq!(
            (after.listed, after.external_users, after.external_groups),
            (before.listed, before.external_users, before.external_groups),
            "{told}"
        );
    }
}

#[tokio::test]
async fn any_sequence_of_small_changes_is_mirrored() {
    for seed in 1..=3 {
        small_changes_are_mirrored(seed).await;
    }
}
