//! What a plan says about rights is what its apply does to the answers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use authz::mirror::{ActionChange, SHOWN_ACTIONS};
use dir_sync::{Options, Report, Status};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;

use self::support::*;

/// Who may do what, by the user's row: what `authz.can` says of every user and registered action.
async fn rights(pool: &PgPool) -> BTreeSet<(i64, String)> {
    sqlx::query_as(
        "select u.user_id, a.action_name from authz.users u cross join authz.actions a
         where u.status <> 'deleted' and authz.can(u.user_name, a.action_name)",
    )
    .fetch_all(pool)
    .await
    .unwrap()
    .into_iter()
    .collect()
}

/// The names of rows, those of deleted ones included.
async fn names(pool: &PgPool) -> BTreeMap<i64, String> {
    let rows: Vec<(i64, String)> =
        sqlx::query_as("select user_id, user_name from authz.users").fetch_all(pool).await.unwrap();
    rows.into_iter().collect()
}

/// By user, what is in one set of rights and not in the other.
fn missing(
    from: &BTreeSet<(i64, String)>,
    in_it: &BTreeSet<(i64, String)>,
    names: &BTreeMap<i64, String>,
) -> BTreeMap<String, Vec<String>> {
    let mut by_user: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (user, action) in in_it.difference(from) {
        by_user.entry(names[user].clone()).or_default().push(action.clone());
    }
    by_user
}

fn said(changes: &[ActionChange]) -> BTreeMap<String, Vec<String>> {
    changes
        .iter()
        .map(|change| {
            assert_eq!(change.count, change.actions.len() as u64);
            (change.user.clone(), change.actions.clone())
        })
        .collect()
}

/// Some of a few users and groups, whose names stay with them.
fn random_org(random: &mut SmallRng, externals: bool) -> Org {
    let mut org = Org::new("C1");
    let users: Vec<_> = (0..7).filter(|_| random.random_bool(0.8)).map(|n| format!("u{n}")).collect();
    for id in &users {
        org = org.user(id, id).set_user(id, "suspended", random.random_bool(0.2));
    }
    let groups: Vec<_> = (0..6).filter(|_| random.random_bool(0.8)).map(|n| format!("g{n}")).collect();
    for id in &groups {
        org = org.group(id, id);
    }
    for group in &groups {
        for user in &users {
            if random.random_bool(0.25) {
                org = org.member(group, user);
            }
        }
        for child in &groups {
            if random.random_bool(0.15) {
                org = org.nested(group, child);
            }
        }
        if random.random_bool(0.15) {
            org = org.everyone(group, "C1");
        }
        if externals && random.random_bool(0.4) {
            let n = random.random_range(0..9);
            // Users of the directory among them: those whom it happens not to list become external.
            org = org.external(group, &format!("u{n}"), &format!("u{n}"));
        }
    }
    org
}

/// Grants of all kinds to users, the directory's groups and a local group around one of those; some are over.
async fn grant_at_random(pool: &PgPool, random: &mut SmallRng) {
    execute(
        pool,
        "delete from authz.user_actions; delete from authz.group_actions;
         insert into authz.actions (action_name) values ('a'), ('a.b'), ('a.b.c'), ('a.c'), ('d.e') on conflict do nothing;
         insert into authz.groups (group_name) select 'local' where not exists (select from authz.groups where group_name = 'local');
         insert into authz.group_groups (parent_group_id, child_group_id)
         select l.group_id, g.group_id from authz.groups l, authz.groups g
         where l.group_name = 'local' and g.external_id = 'g1' and g.status = 'active' on conflict do nothing;
         insert into authz.group_directories (group_id, directory_id)
         select l.group_id, d.directory_id from authz.groups l, authz.directories d
         where l.group_name = 'local' and d.directory_name = 'main' on conflict do nothing;",
    )
    .await;
    for (table, rows, key) in [("user_actions", "users", "user_id"), ("group_actions", "groups", "group_id")]
    {
        for pattern in ["*", "a.*", "a.b.*", "a.b", "a", "d.e", "a.b.c"] {
            let sql = format!(
                "insert into authz.{table} ({key}, action_name, granted_at, expires_at)
                 select {key}, $1, now() - interval '1 day', case when random_part < 0.2 then now() - interval '1 hour' end
                 from (select r.{key}, ('x' || substr(md5($2 || r.{key}), 1, 6))::bit(24)::int / 16777216.0 as random_part
                       from authz.{rows} r) r
                 where ('x' || substr(md5($1 || $2 || {key}), 1, 6))::bit(24)::int / 16777216.0 < $3"
            );
            sqlx::query(sqlx::AssertSqlSafe(sql))
                .bind(pattern)
                .bind(random.random::<u32>().to_string())
                .bind(if pattern == "*" { 0.03 } else { 0.12 })
                .execute(pool)
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn plan_says_who_gains_and_loses_what_the_apply_gives_and_takes() {
    let (mut lost, mut won) = (0, 0);
    for (seed, externals) in [(1, false), (2, false), (3, true), (4, true)] {
        let (_database, pool) = database().await;
        let mut random = SmallRng::seed_from_u64(seed);
        let options = Options { include_external: externals, ..unlimited() };
        for step in 0..12 {
            let org = random_org(&mut random, externals);
            let before = rights(&pool).await;
            let plan = run(&pool, MAIN, org.source(), Options { no_remove: false, ..options.clone() });
            let mut report = plan.await;
            if report.status == Status::Refused {
                let approved = Options { approve: report.plan_hash.clone(), ..options.clone() };
                let refused = report.plan.unwrap().actions;
                report = sync_with(&pool, MAIN, &org, approved).await;
                assert_eq!(report.plan.as_ref().unwrap().actions, refused);
            }
            assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{report}");
            let (after, names) = (rights(&pool).await, names(&pool).await);
            let actions = report.plan.unwrap().actions;
            let context = format!("seed {seed}, step {step}");
            assert_eq!(said(&actions.losing), missing(&after, &before, &names), "lost, {context}");
            assert_eq!(said(&actions.gaining), missing(&before, &after, &names), "gained, {context}");
            assert_eq!(actions.users_losing, actions.losing.len() as u64);
            assert_eq!(actions.users_gaining, actions.gaining.len() as u64);
            lost += actions.losing.len();
            won += actions.gaining.len();
            grant_at_random(&pool, &mut random).await;
        }
    }
    assert!(lost > 30 && won > 30, "{lost} and {won}: the directories were too much alike");
}

#[tokio::test]
async fn people_are_told_who_loses_what_in_a_few_lines() {
    let (_database, pool) = database().await;
    let many = (0..40).fold(Org::new("C1").group("g", "ops").group("h", "web"), |org, n| {
        let id = format!("{n:02}");
        org.user(&id, &format!("u{n:02}")).member("g", &id).member("h", &id)
    });
    applied(&pool, &many).await;
    execute(
        &pool,
        "insert into authz.actions (action_name) select 'queue.' || n from generate_series(1, 80) n;
         insert into authz.group_actions (group_id, action_name)
         select group_id, 'queue.*' from authz.groups where external_id = 'g';",
    )
    .await;
    let fewer = (0..40).fold(many, |org, n| org.without_member("g", &format!("{n:02}")));
    let refused: Report = sync(&pool, MAIN, &fewer).await;
    assert_eq!(refused.status, Status::Refused, "{refused}");
    let text = refused.to_string();
    assert!(text.contains("u00@example.com: queue.1, queue.10, queue.11 and 77 more"), "{text}");
    assert!(text.contains("and 34 more users"), "{text}");
    assert!(text.contains("group `ops@example.com` would shrink from 40 to 0 members"), "{text}");
    assert!(text.lines().count() < 30, "{text}");
    let actions = refused.plan.unwrap().actions;
    assert_eq!((actions.users_losing, actions.losing.len()), (40, 40));
    assert_eq!((actions.losing[0].count, actions.losing[0].actions.len()), (80, SHOWN_ACTIONS as usize));
}

#[tokio::test]
async fn without_removals_nobody_goes_and_the_run_says_so() {
    let (_database, pool) = database().await;
    let org = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .user("3", "cy")
        .group("g", "ops")
        .group("h", "web")
        .member("g", "1")
        .member("g", "2")
        .nested("h", "g")
        .everyone("h", "C1");
    applied(&pool, &org).await;
    let since = "select coalesce(last_complete_sync_at::text, '') from authz.directories where directory_name = 'main'";
    let complete = text(&pool, since).await;
    // A name that is still held cannot go to somebody else: a conflict, as ever.
    let next = Org::new("C1")
        .user("1", "ada")
        .set_user("1", "suspended", true)
        .user("4", "bo")
        .user("5", "di")
        .group("g", "ops")
        .member("g", "5");
    let options = Options { no_remove: true, ..Options::default() };
    let report = sync_with(&pool, MAIN, &next, options.clone()).await;
    assert_eq!((report.status, report.exit_code()), (Status::Partial, 4), "{report}");
    let withheld = report.plan.as_ref().unwrap().withheld;
    assert_eq!((withheld.users, withheld.groups, withheld.memberships), (2, 1, 4), "{report}");
    assert!(report.to_string().contains("stay because of --no-remove"), "{report}");
    assert_eq!(conflicts(&report).len(), 1, "{report}");
    let kept = org.set_user("1", "suspended", true).user("5", "di").member("g", "5");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&kept.json(), false));
    assert_eq!(text(&pool, since).await, complete, "who left is still in it, so it is not fresh");

    let whole = sync_with(&pool, MAIN, &kept, options).await;
    assert_eq!(whole.status, Status::Unchanged, "nothing to withhold is nothing missing: {whole}");
}

#[tokio::test]
async fn ten_people_are_protected_by_the_defaults() {
    let (_database, pool) = database().await;
    let users = |ids: std::ops::Range<usize>| {
        ids.fold(Org::new("C1").group("g", "ops").group("h", "web"), |org, n| {
            let id = n.to_string();
            org.user(&id, &format!("u{n}")).member("g", &id)
        })
    };
    applied(&pool, &users(0..10)).await;
    let half_gone = sync(&pool, MAIN, &users(0..5)).await;
    assert_eq!(half_gone.status, Status::Refused, "{half_gone}");
    let others = sync(&pool, MAIN, &users(10..20)).await;
    assert_eq!(others.status, Status::Refused, "another ten people in their place: {others}");
    let emptied = (0..9).fold(users(0..10), |org, n| org.without_member("g", &n.to_string()));
    let emptied = sync(&pool, MAIN, &emptied).await;
    assert_eq!(emptied.status, Status::Refused, "{emptied}");
    assert!(emptied.to_string().contains("9 of 10 memberships would be removed"), "{emptied}");
    assert_eq!(sync(&pool, MAIN, &users(0..8)).await.status, Status::Applied, "two people leave");
}
