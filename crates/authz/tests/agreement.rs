//! The naive model, the check, the explanation and `authz.can` give the same answer on random worlds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use authz::{Decision, DenyReason, Holder};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;

const USERS: usize = 16;
const GROUPS: usize = 12;
const ACTIONS: [&str; 7] = ["a", "a.b", "a.b.c", "a.bc", "b", "b.c", "unregistered.x"];
const PATTERNS: [&str; 9] = ["*", "a.*", "a.b.*", "a", "a.b", "a.b.c", "b", "b.*", "c.*"];

/// The facts, held in the plainest way.
#[derive(Debug, Default)]
struct World {
    users: BTreeMap<usize, (&'static str, Option<i32>)>,
    groups: BTreeMap<usize, &'static str>,
    members: BTreeSet<(usize, usize)>,
    edges: BTreeSet<(usize, usize)>,
    everyone: BTreeSet<(usize, i32)>,
    /// Holder and pattern to: has it ended?
    user_grants: BTreeMap<(usize, &'static str), bool>,
    group_grants: BTreeMap<(usize, &'static str), bool>,
}

fn covers(pattern: &str, action: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    let (wanted, given): (Vec<_>, Vec<_>) = (action.split('.').collect(), pattern.split('.').collect());
    match given.split_last() {
        Some((&"*", stem)) => wanted.len() > stem.len() && wanted[..stem.len()] == *stem,
        _ => wanted == given,
    }
}

impl World {
    fn random(rng: &mut SmallRng) -> Self {
        let mut world = Self::default();
        for user in 0..USERS {
            let status = *["active", "active", "active", "active", "suspended", "external", "deleted"]
                .choose(rng)
                .unwrap();
            let directory = if status == "external" { None } else { Some(rng.random_range(0..3)) };
            world.users.insert(user, (status, directory));
        }
        for group in 0..GROUPS {
            world.groups.insert(group, if rng.random_bool(0.1) { "deleted" } else { "active" });
        }
        for _ in 0..rng.random_range(5..40) {
            world.members.insert((rng.random_range(0..GROUPS), rng.random_range(0..USERS)));
        }
        for _ in 0..rng.random_range(0..22) {
            let edge = (rng.random_range(0..GROUPS), rng.random_range(0..GROUPS));
            if edge.0 != edge.1 {
                world.edges.insert(edge); // cycles happen, on purpose
            }
        }
        for _ in 0..rng.random_range(0..3) {
            world.everyone.insert((rng.random_range(0..GROUPS), rng.random_range(0..3)));
        }
        for _ in 0..rng.random_range(0..6) {
            let grant = (rng.random_range(0..USERS), *PATTERNS.choose(rng).unwrap());
            world.user_grants.insert(grant, rng.random_bool(0.3));
        }
        for _ in 0..rng.random_range(0..8) {
            let grant = (rng.random_range(0..GROUPS), *PATTERNS.choose(rng).unwrap());
            world.group_grants.insert(grant, rng.random_bool(0.3));
        }
        world
    }

    async fn store(&self, pool: &PgPool) {
        sqlx::query(
            "insert into authz.directories (directory_id, directory_name) values (1, 'one'), (2, 'two')",
        )
        .execute(pool)
        .await
        .unwrap();
        for action in &ACTIONS[..6] {
            sqlx::query("insert into authz.actions values ($1)").bind(action).execute(pool).await.unwrap();
        }
        for (user, (status, directory)) in &self.users {
            sqlx::query(
                "insert into authz.users (user_id, user_name, status, directory_id) values ($1, $2, $3, $4)",
            )
            .bind(id(*user))
            .bind(format!("u{user}"))
            .bind(status)
            .bind(directory)
            .execute(pool)
            .await
            .unwrap();
        }
        for (group, status) in &self.groups {
            sqlx::query("insert into authz.groups (group_id, group_name, status) values ($1, $2, $3)")
                .bind(id(*group))
                .bind(format!("g{group}"))
                .bind(status)
                .execute(pool)
                .await
                .unwrap();
        }
        for (group, user) in &self.members {
            insert(
                pool,
                "insert into authz.group_users (group_id, user_id) values ($1, $2)",
                *group,
                id(*user),
            )
            .await;
        }
        for (parent, child) in &self.edges {
            insert(pool, "insert into authz.group_groups values ($1, $2)", *parent, id(*child)).await;
        }
        for (group, directory) in &self.everyone {
            insert(
                pool,
                "insert into authz.group_directories values ($1, $2)",
                *group,
                i64::from(*directory),
            )
            .await;
        }
        for (sql, grants) in [
            (
                "insert into authz.user_actions (user_id, action_name, expires_at) values ($1, $2, now() + $3)",
                &self.user_grants,
            ),
            (
                "insert into authz.group_actions (group_id, action_name, expires_at) values ($1, $2, now() + $3)",
                &self.group_grants,
            ),
        ] {
            for ((holder, pattern), ended) in grants {
                let interval = if *ended { "-1 second" } else { "1 hour" };
                // A pattern that names an unregistered action cannot be stored; the model knows none such.
                sqlx::query(sqlx::AssertSqlSafe(sql.replace("$3", &format!("interval '{interval}'"))))
                    .bind(id(*holder))
                    .bind(pattern)
                    .execute(pool)
                    .await
                    .unwrap();
            }
        }
    }

    fn above(&self, group: usize) -> BTreeSet<usize> {
        let mut seen = BTreeSet::from([group]);
        loop {
            let more: BTreeSet<_> = self
                .edges
                .iter()
                .filter(|(p, c)| seen.contains(c) && !seen.contains(p))
                .map(|e| e.0)
                .collect();
            if more.is_empty() {
                return seen;
            }
            seen.extend(more);
        }
    }

    /// `Some(ended)` for each covering grant that reaches the user.
    fn reaching(&self, user: usize, action: &str) -> Vec<bool> {
        let (_, directory) = self.users[&user];
        let mut holders = BTreeSet::new();
        for (group, _) in self.members.iter().filter(|m| m.1 == user) {
            holders.extend(self.above(*group));
        }
        for (group, _) in self.everyone.iter().filter(|e| Some(e.1) == directory) {
            holders.extend(self.above(*group));
        }
        let of_user = self.user_grants.iter().filter(|((h, p), _)| *h == user && covers(p, action));
        let of_groups = self
            .group_grants
            .iter()
            .filter(|((h, p), _)| holders.contains(h) && self.groups[h] == "active" && covers(p, action));
        of_user.chain(of_groups).map(|(_, ended)| *ended).collect()
    }

    fn answer(&self, user: usize, action: &str) -> &'static str {
        let reaching = self.reaching(user, action);
        match self.users[&user].0 {
            "deleted" => "unknown user",
            "suspended" => "suspended",
            _ if action.starts_with("unregistered") => "unknown action",
            _ if reaching.contains(&false) => "allow",
            _ if reaching.contains(&true) => "expired",
            _ => "no grant",
        }
    }
}

fn id(index: usize) -> i64 {
    i64::try_from(index).unwrap()
}

async fn insert(pool: &PgPool, sql: &'static str, first: usize, second: i64) {
    sqlx::query(sql).bind(id(first)).bind(second).execute(pool).await.unwrap();
}

fn name(decision: &Decision) -> &'static str {
    match decision {
        Decision::Allow(_) => "allow",
        Decision::Deny(deny) => match deny.reason {
            DenyReason::UnknownUser => "unknown user",
            DenyReason::Suspended => "suspended",
            DenyReason::UnknownAction => "unknown action",
            DenyReason::Expired(_) => "expired",
            DenyReason::NoGrant => "no grant",
            _ => "?",
        },
    }
}

async fn agrees_with_the_model(seed: u64) {
    let (_database, pool) = support::database().await;
    let mut rng = SmallRng::seed_from_u64(seed);
    let world = World::random(&mut rng);
    world.store(&pool).await;
    let mut answers = BTreeMap::<_, u32>::new();
    for user in 0..USERS {
        for action in ACTIONS {
            let expected = world.answer(user, action);
            *answers.entry(expected).or_default() += 1;
            let (user_name, action_name) = (support::user(&format!("u{user}")), support::action(action));
            let context = format!("seed {seed}, u{user}, {action}, {world:?}");

            let decision = authz::check(&pool, &user_name, &action_name).await.unwrap();
            assert_eq!(name(&decision), expected, "check: {context}");

            let can: bool = sqlx::query_scalar("select authz.can($1, $2)")
                .bind(user_name.as_str())
                .bind(action)
                .fetch_one(&pool)
                .await
                .unwrap();
            assert_eq!(can, expected == "allow", "authz.can: {context}");

            let explained = authz::explain(&pool, &user_name, &action_name).await.unwrap();
            assert_eq!(explained.decision, decision, "explain: {context}");
            for path in &explained.paths {
                assert_way_exists(&world, user, path, &context);
            }
            if let Decision::Allow(allow) = &decision {
                let nearest = explained.paths.first().unwrap();
                assert_eq!(nearest.pattern, allow.grant.pattern, "{context}");
                match &allow.grant.holder {
                    Holder::User => assert!(nearest.groups.is_empty(), "{context}"),
                    Holder::Group { group, member_of, depth } => {
                        assert_eq!(nearest.groups.last(), Some(group), "{context}");
                        assert_eq!(nearest.groups.first(), Some(member_of), "{context}");
                        assert_eq!(nearest.groups.len(), *depth as usize + 1, "{context}");
                    }
                }
            }
        }
    }
    assert!(answers.len() > 2, "a world without variety proves little: seed {seed}, {answers:?}");
}

fn assert_way_exists(world: &World, user: usize, path: &authz::Path, context: &str) {
    let groups: Vec<usize> = path.groups.iter().map(|g| g.as_str()[1..].parse().unwrap()).collect();
    let Some((first, last)) = groups.first().zip(groups.last()) else {
        assert!(world.user_grants.contains_key(&(user, static_pattern(path))), "{context}");
        return;
    };
    if path.everyone {
        let directory = world.users[&user].1.unwrap();
        assert!(world.everyone.contains(&(*first, directory)), "{context}");
    } else {
        assert!(world.members.contains(&(*first, user)), "{context}");
    }
    for step in groups.windows(2) {
        assert!(world.edges.contains(&(step[1], step[0])), "{context}");
    }
    assert_eq!(world.group_grants.get(&(*last, static_pattern(path))), Some(&false), "{context}");
}

fn static_pattern(path: &authz::Path) -> &'static str {
    PATTERNS.into_iter().find(|p| *p == path.pattern.as_str()).unwrap()
}

macro_rules! worlds {
    ($($name:ident $seeds:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            for seed in $seeds {
                agrees_with_the_model(seed).await;
            }
        }
    )*};
}
// Several tests, so that they run side by side.
worlds! {
    all_opinions_agree_on_worlds_0_to_9 0..10;
    all_opinions_agree_on_worlds_10_to_19 10..20;
    all_opinions_agree_on_worlds_20_to_29 20..30;
    all_opinions_agree_on_worlds_30_to_39 30..40;
}
