//! The naive model, the check, many checks at once, the explanation, the lists, `authz.can` and the snapshot, followed
//! change by change or loaded afresh, give the same answer on random worlds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use authz::{Decision, DenyReason, Holder, Snapshot, Verdict};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;

const USERS: usize = 16;
const GROUPS: usize = 12;
const ACTIONS: [&str; 7] = ["a", "a.b", "a.b.c", "a.bc", "b", "b.c", "unregistered.x"];
const PATTERNS: [&str; 9] = ["*", "a.*", "a.b.*", "a", "a.b", "a.b.c", "b", "b.*", "c.*"];

/// The first and the last group of a path (none for a grant to the user), whether the first has everyone, the pattern.
type Ends = (Option<(usize, usize)>, bool, &'static str);

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

    /// Every way from the user to a covering grant, told by its ends.
    fn paths(&self, user: usize, action: &str, ended: bool) -> Vec<Ends> {
        let (status, directory) = self.users[&user];
        if status == "deleted" {
            return Vec::new();
        }
        let by_name = self.members.iter().filter(|m| m.1 == user).map(|m| (m.0, false));
        let by_directory = self.everyone.iter().filter(|e| Some(e.1) == directory).map(|e| (e.0, true));
        let mut paths = Vec::new();
        for (entry, everyone) in by_name.chain(by_directory) {
            let above = self.above(entry);
            for ((holder, pattern), end) in &self.group_grants {
                if above.contains(holder)
                    && self.groups[holder] == "active"
                    && covers(pattern, action)
                    && *end == ended
                {
                    paths.push((Some((entry, *holder)), everyone, *pattern));
                }
            }
        }
        for ((holder, pattern), end) in &self.user_grants {
            if *holder == user && covers(pattern, action) && *end == ended {
                paths.push((None, false, *pattern));
            }
        }
        paths.sort_unstable();
        paths
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
            for path in explained.paths.iter().chain(&explained.expired) {
                assert_way_exists(&world, user, path, &context);
            }
            for (paths, ended) in [(&explained.paths, false), (&explained.expired, true)] {
                let mut found: Vec<_> = paths.iter().map(ends_of).collect();
                found.sort_unstable();
                assert_eq!(
                    found,
                    world.paths(user, action, ended),
                    "paths of explain, ended {ended}: {context}"
                );
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
    lists_agree(&world, &pool, seed).await;
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
    assert!(world.group_grants.contains_key(&(*last, static_pattern(path))), "{context}");
}

fn ends_of(path: &authz::Path) -> Ends {
    let number = |group: &authz::GroupName| group.as_str()[1..].parse().unwrap();
    let ends = path.groups.first().map(number).zip(path.groups.last().map(number));
    (ends, path.everyone, static_pattern(path))
}

fn static_pattern(path: &authz::Path) -> &'static str {
    PATTERNS.into_iter().find(|p| *p == path.pattern.as_str()).unwrap()
}

async fn lists_agree(world: &World, pool: &PgPool, seed: u64) {
    for user in 0..USERS {
        let expected: Vec<_> = ACTIONS.into_iter().filter(|a| world.answer(user, a) == "allow").collect();
        let listed = authz::actions_of(pool, &support::user(&format!("u{user}"))).await.unwrap();
        assert_eq!(
            listed.iter().map(authz::ActionName::as_str).collect::<Vec<_>>(),
            expected,
            "seed {seed}, u{user}, {world:?}"
        );
    }
    for action in ACTIONS {
        let mut expected: Vec<_> =
            (0..USERS).filter(|u| world.answer(*u, action) == "allow").map(|u| format!("u{u}")).collect();
        expected.sort();
        let mut listed = Vec::new();
        let mut after = None;
        loop {
            let page = authz::users_who_can(pool, &support::action(action), after.as_ref(), 3).await.unwrap();
            listed.extend(page.users.iter().map(ToString::to_string));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(listed, expected, "seed {seed}, {action}, {world:?}");
    }
}

fn word(verdict: Verdict) -> String {
    match verdict {
        Verdict::Allow { .. } => "allow".to_owned(),
        Verdict::Deny { reason, .. } => format!("{reason:?}"),
    }
}

/// What the model says, in the words of [`word`].
fn expected(world: &World, user: usize, action: &str) -> String {
    match world.answer(user, action) {
        "unknown user" => "UnknownUser",
        "suspended" => "Suspended",
        "unknown action" => "UnknownAction",
        "expired" => "Expired",
        "no grant" => "NoGrant",
        other => other,
    }
    .to_owned()
}

/// Groups of nobody, so many that a snapshot holds the groups of a user in another way.
async fn crowd(pool: &PgPool) {
    let groups = "insert into authz.groups (group_id, group_name) select n, 'crowd' || n from generate_series(5001, 5300) n";
    let grants = "insert into authz.group_actions (group_id, action_name) select n, 'c.*' from generate_series(5001, 5300) n";
    sqlx::query(groups).execute(pool).await.unwrap();
    sqlx::query(grants).execute(pool).await.unwrap();
}

/// Changes something, in the model and in the database.
async fn change(world: &mut World, names: &mut [String], pool: &PgPool, rng: &mut SmallRng) -> String {
    let (user, group, other) =
        (rng.random_range(0..USERS), rng.random_range(0..GROUPS), rng.random_range(0..GROUPS));
    let directory = rng.random_range(0..3);
    let pattern = *PATTERNS.choose(rng).unwrap();
    let ended = rng.random_bool(0.3);
    let interval = if ended { "-1 second" } else { "1 hour" };
    let flip = |there: bool, add: &str, remove: &str| if there { remove.to_owned() } else { add.to_owned() };
    let sql = match rng.random_range(0..11) {
        0 | 1 => {
            let there = !world.members.insert((group, user)) && world.members.remove(&(group, user));
            flip(
                there,
                &format!("insert into authz.group_users (group_id, user_id) values ({group}, {user})"),
                &format!("delete from authz.group_users where group_id = {group} and user_id = {user}"),
            )
        }
        2 | 3 if group != other => {
            let there = !world.edges.insert((group, other)) && world.edges.remove(&(group, other));
            flip(
                there,
                &format!("insert into authz.group_groups values ({group}, {other})"),
                &format!(
                    "delete from authz.group_groups where parent_group_id = {group} and child_group_id = {other}"
                ),
            )
        }
        4 => {
            let there =
                !world.everyone.insert((group, directory)) && world.everyone.remove(&(group, directory));
            flip(
                there,
                &format!("insert into authz.group_directories values ({group}, {directory})"),
                &format!(
                    "delete from authz.group_directories where group_id = {group} and directory_id = {directory}"
                ),
            )
        }
        5 => {
            let there = world.user_grants.remove(&(user, pattern)).is_some();
            if !there {
                world.user_grants.insert((user, pattern), ended);
            }
            flip(
                there,
                &format!(
                    "insert into authz.user_actions (user_id, action_name, expires_at) values ({user}, '{pattern}', now() + interval '{interval}')"
                ),
                &format!(
                    "delete from authz.user_actions where user_id = {user} and action_name = '{pattern}'"
                ),
            )
        }
        6 | 7 => {
            let there = world.group_grants.remove(&(group, pattern)).is_some();
            if !there {
                world.group_grants.insert((group, pattern), ended);
            }
            flip(
                there,
                &format!(
                    "insert into authz.group_actions (group_id, action_name, expires_at) values ({group}, '{pattern}', now() + interval '{interval}')"
                ),
                &format!(
                    "delete from authz.group_actions where group_id = {group} and action_name = '{pattern}'"
                ),
            )
        }
        8 => {
            let status = *["active", "active", "suspended", "external", "deleted"].choose(rng).unwrap();
            let directory = if status == "external" { None } else { Some(directory) };
            world.users.insert(user, (status, directory));
            let directory = directory.map_or("null".to_owned(), |d| d.to_string());
            format!(
                "update authz.users set status = '{status}', directory_id = {directory} where user_id = {user}"
            )
        }
        9 => {
            let second = rng.random_range(0..USERS);
            names.swap(user, second);
            format!(
                "update authz.users set user_name = case user_id when {user} then '{}' else '{}' end where user_id in ({user}, {second})",
                names[user], names[second]
            )
        }
        _ => {
            let status = if world.groups[&group] == "active" { "deleted" } else { "active" };
            world.groups.insert(group, status);
            world.members.retain(|m| m.0 != group);
            world.edges.retain(|e| e.0 != group);
            world.everyone.retain(|e| e.0 != group);
            format!("update authz.groups set status = '{status}' where group_id = {group}")
        }
    };
    sqlx::query(sqlx::AssertSqlSafe(sql.clone())).execute(pool).await.unwrap();
    sql
}

async fn snapshot_follows_the_model(seed: u64) {
    let (_database, pool) = support::database().await;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut world = World::random(&mut rng);
    // What a deleted group had when it was made so is gone in the database as well.
    let deleted: BTreeSet<usize> = world.groups.iter().filter(|g| *g.1 == "deleted").map(|g| *g.0).collect();
    world.members.retain(|m| !deleted.contains(&m.0));
    world.edges.retain(|e| !deleted.contains(&e.0));
    world.everyone.retain(|e| !deleted.contains(&e.0));
    world.store(&pool).await;
    // In a third of the worlds from the beginning, in another third from the middle.
    if seed.is_multiple_of(3) {
        crowd(&pool).await;
    }
    let mut names: Vec<String> = (0..USERS).map(|user| format!("u{user}")).collect();
    let followed = Snapshot::options().start(pool.clone()).await.unwrap();
    let actions = ACTIONS.map(support::action);
    for step in 0..40 {
        if seed % 3 == 1 && step == 20 {
            crowd(&pool).await;
        }
        let changed = change(&mut world, &mut names, &pool, &mut rng).await;
        // Whether or not it has followed by now.
        for n in (0..USERS * ACTIONS.len()).skip(step % 16).step_by(16) {
            let (asked, action) = (support::user(&names[n / ACTIONS.len()]), &actions[n % ACTIONS.len()]);
            let verdict = followed.check_confirmed(&pool, &asked, action).await.unwrap();
            let wanted = expected(&world, n / ACTIONS.len(), action.as_str());
            assert_eq!(
                word(verdict),
                wanted,
                "confirmed: seed {seed}, step {step}, {asked} {action}, after {changed}"
            );
        }
        followed.at_least(authz::revision::current(&pool).await.unwrap()).await.unwrap();
        let fresh = if step % 8 == 0 {
            Some(Snapshot::options().listen(false).start(pool.clone()).await.unwrap())
        } else {
            None
        };
        // A deleted user's name may be another's; the names here are unique, so each is asked once.
        let questions: Vec<_> = (0..USERS)
            .flat_map(|user| actions.clone().map(|action| (support::user(&names[user]), action)))
            .collect();
        let many = authz::check_many(&pool, &questions).await.unwrap();
        for (n, (user, action)) in questions.iter().enumerate() {
            let wanted = expected(&world, n / ACTIONS.len(), action.as_str());
            let context = format!("seed {seed}, step {step}, {user} {action}, after {changed}, {world:?}");
            assert_eq!(word(many[n].verdict()), wanted, "check_many: {context}");
            assert_eq!(word(followed.check(user, action).unwrap()), wanted, "followed: {context}");
            if let Some(fresh) = &fresh {
                assert_eq!(word(fresh.check(user, action).unwrap()), wanted, "fresh: {context}");
                let confirmed = fresh.check_confirmed(&pool, user, action).await.unwrap();
                assert_eq!(word(confirmed), wanted, "fresh, confirmed: {context}");
            }
        }
    }
    followed.shutdown().await;
}

macro_rules! worlds {
    ($agrees:ident: $($name:ident $seeds:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            for seed in $seeds {
                $agrees(seed).await;
            }
        }
    )*};
}
// Several tests, so that they run side by side.
worlds! {
    agrees_with_the_model:
    all_opinions_agree_on_worlds_0_to_9 0..10;
    all_opinions_agree_on_worlds_10_to_19 10..20;
    all_opinions_agree_on_worlds_20_to_29 20..30;
    all_opinions_agree_on_worlds_30_to_39 30..40;
}

worlds! {
    snapshot_follows_the_model:
    snapshots_agree_after_any_change_0_to_7 100..108;
    snapshots_agree_after_any_change_8_to_15 108..116;
    snapshots_agree_after_any_change_16_to_23 116..124;
}
