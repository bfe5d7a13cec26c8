//! Groups of which the mirror has no members: they get all that is listed, and what is not as simple is compared.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use dir_sync::{Options, Status};
use serde_json::json;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

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
        .nested("a", "b")
}

/// Writes down the groups whose members are planned one by one, since a run clears up behind itself.
async fn watch_plan(pool: &PgPool) {
    execute(
        pool,
        "create table planned (group_id text);
         create function note_planned() returns trigger language plpgsql as $$
         begin
             insert into planned values (new.group_external_id);
             return null;
         end $$;
         create trigger note after insert on authz.sync_plan_members for each row execute function note_planned();",
    )
    .await;
}

async fn planned(pool: &PgPool) -> Vec<String> {
    let groups =
        sqlx::query_scalar("select distinct group_id from planned order by 1").fetch_all(pool).await.unwrap();
    execute(pool, "truncate planned").await;
    groups
}

async fn remembered(pool: &PgPool) -> Vec<(String, i64)> {
    sqlx::query_as("select g.external_id, d.members from authz.group_digests d join authz.groups g using (group_id) order by 1")
        .fetch_all(pool)
        .await
        .unwrap()
}

fn digests(of: &[(&str, i64)]) -> Vec<(String, i64)> {
    of.iter().map(|(group, members)| ((*group).to_owned(), *members)).collect()
}

#[tokio::test]
async fn group_without_members_gets_all_that_are_listed() {
    let (_database, pool) = database().await;
    watch_plan(&pool).await;
    let report = applied(&pool, &org()).await;
    assert_eq!(planned(&pool).await, [""; 0]);
    let plan = report.plan.unwrap();
    assert_eq!((plan.counts.memberships.added, plan.external_users), (4, 0));
    let shown: Vec<_> = plan.memberships.iter().map(|group| (&*group.group, group.tally.added)).collect();
    assert_eq!(shown, [("a@example.com", 3), ("b@example.com", 1)]);
    assert_eq!(remembered(&pool).await, digests(&[("a", 3), ("b", 1), ("c", 0)]));
    // Later on too; of one that is remembered as empty the differences are planned.
    let grown = org().group("d", "d").member("d", "3").nested("d", "a").member("c", "2").member("b", "3");
    applied(&pool, &grown).await;
    assert_eq!(planned(&pool).await, ["b", "c"]);
    assert_eq!(remembered(&pool).await, digests(&[("a", 3), ("b", 2), ("c", 1), ("d", 2)]));
    assert_eq!(sync(&pool, MAIN, &grown).await.status, Status::Unchanged);
}

#[tokio::test]
async fn member_who_is_not_the_directorys_own_is_planned_one_by_one() {
    for include_external in [false, true] {
        let (_database, pool) = database().await;
        // A local user has the name of a listed one, and a group lists one that nobody lists.
        execute(&pool, "insert into authz.users (user_name) values ('cy@example.com')").await;
        watch_plan(&pool).await;
        let org = org().member("b", "3").external("c", "9", "zed").member("a", "3");
        let org = org.raw_member(
            "c",
            json!({"id": "8", "email": "far@example.org", "role": "MEMBER", "type": "GROUP"}),
        );
        let options = Options { include_external, ..Options::default() };
        let report = sync_with(&pool, MAIN, &org, options.clone()).await;
        assert_eq!(report.status, Status::Applied, "{report}");
        let mut expected = vec!["a", "b"];
        expected.extend(include_external.then_some("c"));
        assert_eq!(planned(&pool).await, expected);
        let plan = report.plan.unwrap();
        assert_eq!(plan.counts.memberships.added, 4 + u64::from(include_external));
        assert_eq!((plan.external_users, plan.external_groups), (1, 1));
        assert_eq!(
            number(&pool, "select count(*) from authz.group_users").await,
            3 + i64::from(include_external)
        );
        // Each run looks at them again.
        let again = sync_with(&pool, MAIN, &org, options).await;
        let plan = again.plan.unwrap();
        assert_eq!((again.status, plan.external_users), (Status::Unchanged, 1));
    }
}

#[tokio::test]
async fn group_that_somebody_filled_by_hand_is_compared() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    watch_plan(&pool).await;
    execute(
        &pool,
        "delete from authz.group_users where group_id = (select group_id from authz.groups where external_id = 'b');
         insert into authz.group_users
         select g.group_id, u.user_id from authz.groups g, authz.users u where g.external_id = 'b' and u.external_id = '2';",
    )
    .await;
    let report = sync_with(&pool, MAIN, &org(), unlimited()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(planned(&pool).await, ["b"]);
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false));
    let tally = report.plan.unwrap().counts.memberships;
    assert_eq!((tally.added, tally.removed), (1, 1));
}

#[tokio::test]
async fn plan_of_a_fresh_group_has_a_hash_of_its_members() {
    let (_database, pool) = database().await;
    let hash = async |org: &Org| {
        let sync = dir_sync::DirectorySync::new(pool.clone(), name(MAIN), org.source());
        sync.plan().await.plan_hash.unwrap()
    };
    let first = hash(&org()).await;
    assert_eq!(hash(&org()).await, first);
    assert_ne!(hash(&org().member("c", "1")).await, first);
    assert_ne!(hash(&org().without_member("a", "2").member("a", "3")).await, first);
}

#[tokio::test]
async fn plan_tells_what_members_of_a_fresh_group_gain() {
    let (_database, pool) = database().await;
    let empty = Org::new("C1").user("1", "ada").user("2", "bo").user("3", "cy").group("b", "b");
    applied(&pool, &empty).await;
    grant_to_group(&pool, "b").await;
    // Through `a`, which is new, as well.
    let grown = empty.group("a", "a").member("a", "2").nested("b", "a").member("b", "1");
    let report = applied(&pool, &grown).await;
    let gaining: Vec<_> =
        report.plan.unwrap().actions.gaining.into_iter().map(|change| change.user).collect();
    assert_eq!(gaining, ["ada@example.com", "bo@example.com"]);
    assert!(can(&pool, "ada").await && can(&pool, "bo").await && !can(&pool, "cy").await);
}

/// Has the groups noted of which members go to the staging table.
async fn watch_staging(pool: &PgPool) {
    execute(
        pool,
        "create table staged (group_id text);
         create function note_staged() returns trigger language plpgsql as $$
         begin
             insert into staged values (new.group_external_id);
             return null;
         end $$;
         create trigger note after insert on authz.sync_stage_members for each row execute function note_staged();",
    )
    .await;
}

async fn staged(pool: &PgPool) -> Vec<String> {
    let groups = "select distinct group_id from staged order by 1";
    sqlx::query_scalar(groups).fetch_all(pool).await.unwrap()
}

#[tokio::test]
async fn members_of_a_fresh_group_are_staged_only_if_rights_come_through_it() {
    let (_database, pool) = database().await;
    let empty = Org::new("C1").user("1", "ada").user("2", "bo").user("3", "cy").group("b", "b");
    applied(&pool, &empty).await;
    grant_to_group(&pool, "b").await;
    watch_staging(&pool).await;
    // `c` is in `a`, which is in `b`; nobody has a right through `d`.
    let grown = empty.group("a", "a").group("c", "c").group("d", "d").nested("b", "a").nested("a", "c");
    let grown = grown.member("c", "2").member("d", "1").member("d", "3");
    let report = applied(&pool, &grown).await;
    assert_eq!(staged(&pool).await, ["a", "b", "c"]);
    let plan = report.plan.unwrap();
    assert_eq!((plan.counts.memberships.added, plan.actions.gaining.len()), (5, 1));
    assert_eq!(remembered(&pool).await, digests(&[("a", 1), ("b", 1), ("c", 1), ("d", 2)]));
    assert!(can(&pool, "bo").await && !can(&pool, "ada").await && !can(&pool, "cy").await);
}

/// Rights that come to a group after its listing ended, and through names that only the plan knows.
#[tokio::test]
async fn rights_that_come_meanwhile_are_told_of_a_fresh_group() {
    let (_database, pool) = database().await;
    execute(&pool, "insert into authz.groups (group_name) values ('b@example.com')").await;
    grant_to_group(&pool, "b").await;
    watch_staging(&pool).await;
    let org =
        Org::new("C1").user("1", "ada").user("2", "bo").group("a", "a").group("b", "b").member("b", "1");
    let org = org.member("a", "2");
    let adopting = Options { adopt_local: true, ..Options::default() };
    let report = sync_with(&pool, MAIN, &org, adopting).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(staged(&pool).await, ["b"]);
    let gaining: Vec<_> =
        report.plan.unwrap().actions.gaining.into_iter().map(|change| change.user).collect();
    assert_eq!(gaining, ["ada@example.com"]);
    assert_eq!(remembered(&pool).await, digests(&[("a", 1), ("b", 1)]));
}

#[tokio::test]
async fn few_members_are_staged() {
    let (_database, pool) = database().await;
    let org = (0..24).fold(Org::new("C1"), |org, n| org.user(&n.to_string(), &format!("u{n}")));
    applied(&pool, &org).await;
    watch_staging(&pool).await;
    let org = org.group("a", "a").member("a", "1").member("a", "2");
    applied(&pool, &org).await;
    assert_eq!(staged(&pool).await, ["a"]);
    let org = ["1", "2", "3"].iter().fold(org.group("b", "b"), |org, user| org.member("b", user));
    applied(&pool, &org).await;
    assert_eq!(staged(&pool).await, ["a"]);
    assert_eq!(remembered(&pool).await, digests(&[("a", 2), ("b", 3)]));
}

/// It could not watch over the session that copies.
#[tokio::test]
async fn pool_of_few_sessions_stages_all() {
    let (database, pool) = database().await;
    watch_staging(&pool).await;
    let few = PgPoolOptions::new().max_connections(2).connect(database.url()).await.unwrap();
    let report = sync(&few, MAIN, &org()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(staged(&pool).await, ["a", "b"]);
    assert_eq!(remembered(&pool).await, digests(&[("a", 3), ("b", 1), ("c", 0)]));
}

#[tokio::test]
async fn group_that_does_not_become_what_was_listed_is_not_remembered() {
    let (_database, pool) = database().await;
    execute(
        &pool,
        "create function keep_out() returns trigger language plpgsql as $$
         begin
             return case when exists (select from authz.users u where u.user_id = new.user_id and u.external_id = '2')
                         then null else new end;
         end $$;
         create trigger keep_out before insert on authz.group_users for each row execute function keep_out();",
    )
    .await;
    // Fresh ones.
    let report = sync(&pool, MAIN, &org()).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(remembered(&pool).await, digests(&[("b", 1), ("c", 0)]));
    // And compared ones: what is remembered is still the listing before.
    sync(&pool, MAIN, &org().member("b", "2")).await;
    assert_eq!(remembered(&pool).await, digests(&[("b", 1), ("c", 0)]));
    execute(&pool, "drop trigger keep_out on authz.group_users").await;
    applied(&pool, &org().member("b", "2")).await;
    assert_eq!(remembered(&pool).await, digests(&[("a", 3), ("b", 2), ("c", 0)]));
}

#[tokio::test]
async fn removal_that_does_not_happen_is_not_remembered() {
    let (_database, pool) = database().await;
    applied(&pool, &org()).await;
    execute(
        &pool,
        "create function keep() returns trigger language plpgsql as $$ begin return null; end $$;
         create trigger keep before delete on authz.group_users for each row execute function keep();",
    )
    .await;
    let org = org().without_member("a", "2");
    sync(&pool, MAIN, &org).await;
    // The listing before, which is what the mirror still has.
    assert_eq!(remembered(&pool).await, digests(&[("a", 3), ("b", 1), ("c", 0)]));
    execute(&pool, "drop trigger keep on authz.group_users").await;
    applied(&pool, &org).await;
    // What was asked to stay is not as listed either.
    let kept = Options { no_remove: true, ..Options::default() };
    sync_with(&pool, MAIN, &org.clone().without_member("b", "1"), kept).await;
    assert_eq!(remembered(&pool).await, digests(&[("a", 2), ("b", 1), ("c", 0)]));
}
