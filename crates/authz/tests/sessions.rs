//! Whatever sessions do at once by hand, all that keeps or gives an answer agrees when they have ended: the closure and the
//! reach with their tables, and with each other the checks by name and by `sub`, `authz.can`, the explanation, the
//! snapshots (followed and fresh) and the replay of the trail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

#[path = "sessions/statements.rs"]
mod statements;
mod support;

use std::fmt::Write as _;
use std::time::Instant;

use authz::audit::{self, Moment};
use authz::{ActionName, Snapshot, Sub, UserName};
use futures_util::future::join_all;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sqlx::error::DatabaseError;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use statements::{ACTIONS, USERS, random_statement};

/// The first twice as often as the others together, which refuse to change what another session has changed meanwhile.
const ISOLATIONS: [&str; 6] = [
    "read committed",
    "read committed",
    "read committed",
    "read committed",
    "repeatable read",
    "serializable",
];

const SESSIONS: u64 = 3;
const ROUNDS: usize = 30;

/// The users and groups that the statements are about; those that the sessions make are numbered further on.
const WORLD: &str = "
    insert into authz.directories (directory_id, directory_name) values (1, 'one'), (2, 'two');
    insert into authz.users (user_id, user_name, external_id, directory_id)
    select n, 'u' || n, 'sub' || n, n % 3 from generate_series(1, 10) n;
    insert into authz.groups (group_id, group_name) select n, 'g' || n from generate_series(1, 8) n;
    insert into authz.actions (action_name) values ('a'), ('a.b'), ('a.b.c'), ('a.bc'), ('b'), ('b.c');
    alter table authz.users alter column user_id restart with 1000;
    alter table authz.groups alter column group_id restart with 1000";

/// One that a person has open in `psql`.
struct Session {
    connection: PgConnection,
    rng: SmallRng,
}

impl Session {
    async fn open(url: &str, seed: u64) -> Self {
        let mut connection = PgConnection::connect(url).await.unwrap();
        // A truncation locks its table before the revision, so it may end in a deadlock, which is then found sooner.
        sqlx::raw_sql("set deadlock_timeout = '20ms'").execute(&mut connection).await.unwrap();
        Self { connection, rng: SmallRng::seed_from_u64(seed) }
    }

    async fn run(&mut self, sql: &str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.connection).await.map(drop)
    }

    /// When it ended, and what it was. Nothing that is drawn depends on how a statement ended, hence a seed gives the
    /// same statements every time.
    async fn transaction(&mut self) -> (Instant, String) {
        let mut told = format!("begin isolation level {};", ISOLATIONS.choose(&mut self.rng).unwrap());
        self.run(&told).await.unwrap();
        for _ in 0..self.rng.random_range(1..5) {
            let statement = random_statement(&mut self.rng);
            let undone = self.rng.random_bool(0.15);
            self.run("savepoint before").await.unwrap();
            let (end, outcome) = match self.run(&statement).await {
                Ok(()) if !undone => ("release before", "done".to_owned()),
                Ok(()) => ("rollback to before", "undone".to_owned()),
                Err(error) => ("rollback to before", refusal(&error, &statement)),
            };
            self.run(end).await.unwrap();
            write!(told, "\n  {statement}; -- {outcome}").unwrap();
        }
        let end = if self.rng.random_bool(0.1) { "rollback" } else { "commit" };
        let outcome = self.run(end).await.map_or_else(|error| refusal(&error, end), |()| "done".to_owned());
        write!(told, "\n{end}; -- {outcome}").unwrap();
        (Instant::now(), told)
    }
}

/// A constraint, a row given twice to one statement, or the other sessions may be in the way, and nothing else.
fn refusal(error: &sqlx::Error, statement: &str) -> String {
    let code = error.as_database_error().and_then(DatabaseError::code).unwrap_or_default();
    assert!(["21000", "23", "40"].iter().any(|class| code.starts_with(class)), "{error}: {statement}");
    format!("refused: {error}")
}

async fn closure_is_that_of_the_edges(pool: &PgPool, context: &str) {
    let differing: Vec<String> = sqlx::query_scalar(
        "with recursive up (group_id, ancestor_id, depth) as (
             select group_id, group_id, 0 from authz.groups
             union
             select up.group_id, e.parent_group_id, up.depth + 1
             from up join authz.group_groups e on e.child_group_id = up.ancestor_id
             where up.depth < 9 -- no way is longer: a new group, the first ones, another new one
         ), shortest as (select group_id, ancestor_id, min(depth) as depth from up group by group_id, ancestor_id)
         select d::text from (
             (table shortest except select group_id, ancestor_id, depth from authz.group_ancestors)
             union all
             (select group_id, ancestor_id, depth from authz.group_ancestors except table shortest)) d",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(differing.is_empty(), "closure {differing:?}: {context}");
}

async fn reach_is_the_closure_joined_with_the_grants(pool: &PgPool, context: &str) {
    let differing: Vec<String> = sqlx::query_scalar(
        "with kept as (select group_id, action_name, holder_id, depth from authz.group_reach), joined as (
             select an.group_id, ga.action_name collate \"C\", an.ancestor_id, an.depth
             from authz.group_ancestors an join authz.group_actions ga on ga.group_id = an.ancestor_id
         )
         select d::text from (
             (table kept except table joined) union all (table joined except table kept)) d",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(differing.is_empty(), "reach {differing:?}: {context}");
}

/// How many of all questions are allowed.
async fn checks_agree(pool: &PgPool, followed: &Snapshot, round: usize, context: &str) -> usize {
    followed.at_least(authz::revision::current(pool).await.unwrap()).await.unwrap();
    let fresh = Snapshot::options().by_sub(true).listen(false).start(pool.clone()).await.unwrap();
    let ask = |user| ACTIONS.map(|action| (user, support::action(action)));
    let by_name: Vec<(UserName, ActionName)> = (1..=USERS)
        .flat_map(ask)
        .map(|(user, action)| (support::user(&format!("u{user}")), action))
        .collect();
    let by_sub: Vec<(Sub, ActionName)> = (1..=USERS)
        .flat_map(ask)
        .map(|(user, action)| (Sub::parse(&format!("sub{user}")).unwrap(), action))
        .collect();

    let decisions = authz::check_many(pool, &by_name).await.unwrap();
    let can: Vec<bool> = sqlx::query_scalar(
        "select authz.can(q.user_name, q.action_name)
         from unnest($1::text[], $2::text[]) with ordinality q (user_name, action_name, n) order by n",
    )
    .bind(by_name.iter().map(|question| question.0.as_str()).collect::<Vec<_>>())
    .bind(by_name.iter().map(|question| question.1.as_str()).collect::<Vec<_>>())
    .fetch_all(pool)
    .await
    .unwrap();
    for (n, ((user, action), decision)) in by_name.iter().zip(&decisions).enumerate() {
        let context = format!("{user} {action}: {context}");
        assert_eq!(can[n], decision.is_allow(), "authz.can: {context}");
        assert_eq!(followed.check(user, action).unwrap(), decision.verdict(), "followed: {context}");
        assert_eq!(fresh.check(user, action).unwrap(), decision.verdict(), "fresh: {context}");
        if (n + round).is_multiple_of(5) {
            assert_eq!(authz::check(pool, user, action).await.unwrap(), *decision, "check: {context}");
            let explained = authz::explain(pool, user, action).await.unwrap();
            assert_eq!(explained.decision, *decision, "explain: {context}");
        }
    }

    let decisions_by_sub = authz::check_many_by_sub(pool, &by_sub).await.unwrap();
    for (n, ((sub, action), decision)) in by_sub.iter().zip(&decisions_by_sub).enumerate() {
        let context = format!("{sub} {action}: {context}");
        assert_eq!(followed.check_sub(sub, action).unwrap(), decision.verdict(), "followed: {context}");
        assert_eq!(fresh.check_sub(sub, action).unwrap(), decision.verdict(), "fresh: {context}");
        if (n + round).is_multiple_of(5) {
            assert_eq!(authz::check(pool, sub, action).await.unwrap(), *decision, "check: {context}");
        }
    }
    fresh.shutdown().await;
    can.into_iter().filter(|can| *can).count()
}

async fn trail_agrees(pool: &PgPool, context: &str) {
    let differences = audit::verify_state(pool).await.unwrap();
    assert!(differences.is_empty(), "verify_state {differences:?}: {context}");
    let now = sqlx::query_scalar("select clock_timestamp()").fetch_one(pool).await.unwrap();
    for action in ACTIONS.map(support::action) {
        let mut could: Vec<UserName> = audit::who_could(pool, &action, Moment::At(now))
            .await
            .unwrap()
            .into_iter()
            .map(|access| access.user)
            .collect();
        could.sort();
        let mut can = authz::users_who_can(pool, &action, None, 1000).await.unwrap().users;
        can.sort();
        assert_eq!(could, can, "who_could {action}: {context}");
    }
}

async fn all_agree_after_sessions(seed: u64) {
    let (database, pool) = support::database().await;
    sqlx::raw_sql(WORLD).execute(&pool).await.unwrap();
    let followed = Snapshot::options().by_sub(true).start(pool.clone()).await.unwrap();
    let open = |number| Session::open(database.url(), seed * SESSIONS + number);
    let mut sessions = join_all((0..SESSIONS).map(open)).await;
    let mut context = String::new();
    let mut allowed = 0;
    for round in 0..ROUNDS {
        let two_transactions =
            async |session: &mut Session| [session.transaction().await, session.transaction().await];
        let mut transactions = join_all(sessions.iter_mut().map(two_transactions)).await.concat();
        // What changes anything waits for the end of the one before, so this is the order of the revisions.
        transactions.sort();
        context = format!("seed {seed}, round {round}, after");
        for (_, told) in transactions {
            write!(context, "\n{told}").unwrap();
        }
        closure_is_that_of_the_edges(&pool, &context).await;
        reach_is_the_closure_joined_with_the_grants(&pool, &context).await;
        allowed += checks_agree(&pool, &followed, round, &context).await;
    }
    trail_agrees(&pool, &context).await;
    followed.shutdown().await;
    let asked = ROUNDS * ACTIONS.len() * usize::try_from(USERS).unwrap();
    assert!(
        (1..asked).contains(&allowed),
        "a world without variety proves little: seed {seed}, allowed {allowed}"
    );
}

// Two tests, so that they run side by side.
#[tokio::test]
async fn all_agree_whatever_sessions_do_at_once_0_to_2() {
    for seed in 0..3 {
        all_agree_after_sessions(seed).await;
    }
}

#[tokio::test]
async fn all_agree_whatever_sessions_do_at_once_3_to_5() {
    for seed in 3..6 {
        all_agree_after_sessions(seed).await;
    }
}
