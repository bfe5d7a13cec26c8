//! Whatever comes after whatever: random directories, one after another, with names that move around.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod support;

use std::collections::BTreeMap;

use dir_sync::guard::Limits;
use dir_sync::{Options, Status};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;

use self::support::*;

const USERS: usize = 8;
const GROUPS: usize = 6;

/// Some of a few users and groups; each has any of a few names, and no two have the same.
fn random_org(random: &mut SmallRng, externals: bool) -> Org {
    let mut org = Org::new("C1");
    let mut names: Vec<usize> = (0..USERS + 2).collect();
    names.shuffle(random);
    let users: Vec<_> = (0..USERS).filter(|_| random.random_bool(0.8)).map(|n| format!("u{n}")).collect();
    for (id, name) in users.iter().zip(&names) {
        org = org.user(id, &format!("name{name}"));
        org = org.set_user(id, "suspended", random.random_bool(0.15));
        org = org.set_user(id, "archived", random.random_bool(0.1));
    }
    names.shuffle(random);
    let groups: Vec<_> = (0..GROUPS).filter(|_| random.random_bool(0.8)).map(|n| format!("g{n}")).collect();
    for (id, name) in groups.iter().zip(&names) {
        org = org.group(id, &format!("group{name}"));
    }
    for group in &groups {
        for user in &users {
            if random.random_bool(0.3) {
                let role = ["OWNER", "MANAGER", "MEMBER"][random.random_range(0..3)];
                org = org.member_as(group, user, role);
            }
        }
        for child in &groups {
            if random.random_bool(0.15) {
                org = org.nested(group, child);
            }
        }
        if random.random_bool(0.2) {
            org = org.everyone(group, "C1");
        }
        if externals && random.random_bool(0.3) {
            let n = random.random_range(0..3);
            org = org.external(group, &format!("x{n}"), &format!("x{n}@partner.example"));
        }
    }
    org
}

/// Which row each id has, deleted ones too, and what is granted to it.
async fn rows_and_grants(pool: &PgPool) -> BTreeMap<String, (i64, i64)> {
    sqlx::query_as::<_, (String, i64, i64)>(
        "select external_id, user_id, (select count(*) from authz.user_actions a where a.user_id = u.user_id)
         from authz.users u
         union all
         select external_id, group_id, (select count(*) from authz.group_actions a where a.group_id = g.group_id)
         from authz.groups g",
    )
    .fetch_all(pool)
    .await
    .unwrap()
    .into_iter()
    .map(|(id, row, grants)| (id, (row, grants)))
    .collect()
}

async fn any_sequence_is_mirrored(seed: u64, externals: bool) {
    let (_database, pool) = database().await;
    let mut random = SmallRng::seed_from_u64(seed);
    let options = Options { include_external: externals, limits: Limits::NONE, ..Options::default() };
    let mut rows = BTreeMap::new();
    for step in 0..12 {
        let org = random_org(&mut random, externals);
        let mut report = sync_with(&pool, MAIN, &org, options.clone()).await;
        if report.status == Status::Refused {
            // By chance nobody is in any group.
            let approved = Options { approve: report.plan_hash.clone(), ..options.clone() };
            report = sync_with(&pool, MAIN, &org, approved).await;
        }
        assert_eq!(report.status, Status::Applied, "step {step}: {report}");
        assert_eq!(conflicts(&report), [], "step {step}");
        assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org.json(), externals), "step {step}");
        let now = rows_and_grants(&pool).await;
        for (id, row) in &rows {
            assert_eq!(now.get(id), Some(row), "step {step}: row and grants of {id}");
        }
        if step == 0 {
            execute(
                &pool,
                "insert into authz.user_actions (user_id, action_name) select user_id, '*' from authz.users;
                 insert into authz.group_actions (group_id, action_name) select group_id, '*' from authz.groups;",
            )
            .await;
        }
        rows = rows_and_grants(&pool).await;
        let before = written_rows(&pool).await;
        let again = sync_with(&pool, MAIN, &org, options.clone()).await;
        assert_eq!(again.status, Status::Unchanged, "step {step}: {again}");
        assert_eq!(written_rows(&pool).await, before, "step {step}");
    }
}

#[tokio::test]
async fn any_sequence_of_directories_is_mirrored() {
    for seed in 1..=3 {
        any_sequence_is_mirrored(seed, false).await;
    }
}

#[tokio::test]
async fn any_sequence_of_directories_with_externals_is_mirrored() {
    for seed in 4..=6 {
        any_sequence_is_mirrored(seed, true).await;
    }
}
