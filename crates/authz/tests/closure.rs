//! The closure of the group graph is right after any change, by whomever, however many at once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use authz::Error;
use authz::group;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;
use support::{admin, group as g};

type Closure = BTreeMap<(i64, i64), i32>;

async fn stored(pool: &PgPool) -> Closure {
    sqlx::query_as::<_, (i64, i64, i32)>("select group_id, ancestor_id, depth from authz.group_ancestors")
        .fetch_all(pool)
        .await
        .unwrap()
        .into_iter()
        .map(|(group, ancestor, depth)| ((group, ancestor), depth))
        .collect()
}

/// Floyd–Warshall over the edges: another way than the one under test.
async fn expected(pool: &PgPool) -> Closure {
    let groups: Vec<i64> =
        sqlx::query_scalar("select group_id from authz.groups").fetch_all(pool).await.unwrap();
    let edges: Vec<(i64, i64)> =
        sqlx::query_as("select child_group_id, parent_group_id from authz.group_groups")
            .fetch_all(pool)
            .await
            .unwrap();
    let mut closure: Closure = edges.into_iter().map(|edge| (edge, 1)).collect();
    closure.extend(groups.iter().map(|group| ((*group, *group), 0)));
    for via in &groups {
        for from in &groups {
            for to in &groups {
                if let (Some(a), Some(b)) = (closure.get(&(*from, *via)), closure.get(&(*via, *to))) {
                    let depth = a + b;
                    let best = closure.entry((*from, *to)).or_insert(depth);
                    *best = depth.min(*best);
                }
            }
        }
    }
    closure
}

async fn groups(pool: &PgPool, count: i64) {
    sqlx::query(
        "insert into authz.groups (group_id, group_name) select n, 'g' || n from generate_series(1, $1) n",
    )
    .bind(count)
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn closure_follows_every_random_change_of_edges() {
    let (_database, pool) = support::database().await;
    groups(&pool, 10).await;
    let mut rng = SmallRng::seed_from_u64(7);
    for step in 0..120 {
        let (a, b) = (rng.random_range(1..=10_i64), rng.random_range(1..=10_i64));
        let sql = match rng.random_range(0..8) {
            0..4 => "insert into authz.group_groups select $1, $2 where $1 <> $2 on conflict do nothing",
            4 => "delete from authz.group_groups where parent_group_id = $1 or child_group_id = $2",
            5 => "delete from authz.group_groups where (parent_group_id + child_group_id + $1 + $2) % 5 = 0",
            6 => {
                "update authz.group_groups set child_group_id = $2 where parent_group_id = $1 and $1 <> $2
                   and child_group_id = (select min(child_group_id) from authz.group_groups where parent_group_id = $1)
                   and not exists (select from authz.group_groups where parent_group_id = $1 and child_group_id = $2)"
            }
            _ => {
                "insert into authz.group_groups
                 select p, p % 10 + 1 from generate_series(least($1, $2), greatest($1, $2)) p on conflict do nothing"
            }
        };
        sqlx::query(sql).bind(a).bind(b).execute(&pool).await.unwrap();
        assert_eq!(stored(&pool).await, expected(&pool).await, "after step {step}: {sql}, {a}, {b}");
    }
    sqlx::query("truncate authz.group_groups").execute(&pool).await.unwrap();
    assert_eq!(stored(&pool).await, expected(&pool).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_edges_give_one_right_closure() {
    let (_database, pool) = support::database().await;
    groups(&pool, 8).await;
    let tasks = (0..8_u64).map(|task| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let mut rng = SmallRng::seed_from_u64(task);
            for _ in 0..25 {
                let (a, b) = (rng.random_range(1..=8_i64), rng.random_range(1..=8_i64));
                let sql = if rng.random_bool(0.6) {
                    "insert into authz.group_groups select $1, $2 where $1 <> $2 on conflict do nothing"
                } else {
                    "delete from authz.group_groups where parent_group_id = $1 and child_group_id = $2"
                };
                let mut tx = pool.begin().await.unwrap();
                sqlx::query(sql).bind(a).bind(b).execute(&mut *tx).await.unwrap();
                sqlx::query(sql).bind(b).bind(a).execute(&mut *tx).await.unwrap();
                tx.commit().await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(stored(&pool).await, expected(&pool).await);
}

#[tokio::test]
async fn a_group_cannot_be_put_into_itself_by_the_library() {
    let (_database, pool) = support::database().await;
    for name in ["a", "b", "c"] {
        group::create(&pool, &g(name), "", &admin()).await.unwrap();
    }
    group::add_group(&pool, &g("a"), &g("b"), &admin()).await.unwrap();
    group::add_group(&pool, &g("b"), &g("c"), &admin()).await.unwrap();
    let cycle = group::add_group(&pool, &g("c"), &g("a"), &admin()).await;
    assert!(matches!(cycle, Err(Error::Cycle { .. })), "{cycle:?}");
    let own = group::add_group(&pool, &g("a"), &g("a"), &admin()).await;
    assert!(matches!(own, Err(Error::Cycle { .. })), "{own:?}");
    assert_eq!(stored(&pool).await, expected(&pool).await);
}

#[tokio::test]
async fn a_group_that_comes_with_its_edges_in_one_statement_is_closed() {
    let (_database, pool) = support::database().await;
    groups(&pool, 3).await;
    // The last part runs first: the edges are there before the groups.
    sqlx::query(
        "with new as (insert into authz.groups (group_id, group_name) values (4, 'g4'), (5, 'g5')),
              edge as (insert into authz.group_groups values (1, 2), (2, 4), (4, 5), (5, 3))
         select",
    )
    .execute(&pool)
    .await
    .unwrap();
    assert_eq!(stored(&pool).await, expected(&pool).await);
}

#[tokio::test]
async fn a_group_that_is_deleted_meanwhile_is_not_put_into_another() {
    let (_database, pool) = support::database().await;
    for name in ["parent", "child"] {
        group::create(&pool, &g(name), "", &admin()).await.unwrap();
    }
    let mut deletion = authz::begin(&pool).await.unwrap();
    group::delete(&mut deletion, &g("child"), &admin()).await.unwrap();
    let adding = tokio::spawn({
        let pool = pool.clone();
        async move { group::add_group(&pool, &g("parent"), &g("child"), &admin()).await }
    });
    let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&pool).await.unwrap() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    deletion.commit().await.unwrap();
    let added = adding.await.unwrap();
    assert!(matches!(added, Err(Error::UnknownGroup(_))), "{added:?}");
    assert_eq!(stored(&pool).await, expected(&pool).await);
}
