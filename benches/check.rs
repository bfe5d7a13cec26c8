//! Database checks beside `SELECT 1`, on one connection over a unix socket, in worlds of two sizes.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![expect(clippy::unwrap_used, reason = "a benchmark may stop")]

use authz::{ActionName, UserName};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use sqlx::{Connection, Executor, PgConnection, PgPool};
use testdb::Database;
use tokio::runtime::Runtime;

struct World {
    name: &'static str,
    users: i64,
    groups: i64,
    memberships: i64,
    grants: i64,
}

const WORLDS: [World; 2] = [
    World { name: "S", users: 1_000, groups: 100, memberships: 5_000, grants: 500 },
    World { name: "M", users: 100_000, groups: 5_000, memberships: 1_000_000, grants: 20_000 },
];
const ACTIONS: i64 = 1_000;

/// Groups in trees of depth three; grants to groups and (one in ten) to users, one in twenty a wildcard and
/// one in twenty ended; one user in fifty is suspended.
async fn build(world: &World) -> Database {
    let database = Database::empty().await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    let World { users, groups, memberships, grants, .. } = world;
    let script = format!(
        "select setseed(0.5);
         insert into authz.actions select format('area%s.task%s', n % 20, n) from generate_series(1, {ACTIONS}) n;
         insert into authz.users (user_id, user_name, status)
             select n, format('user%s@example.com', n), case when n % 50 = 0 then 'suspended' else 'active' end
             from generate_series(1, {users}) n;
         insert into authz.groups (group_id, group_name)
             select n, format('group%s@example.com', n) from generate_series(1, {groups}) n;
         insert into authz.group_groups
             select n / 5, n from generate_series(5, {groups}) n where n % 5 <> 0 and n / 5 > 0;
         insert into authz.group_users (group_id, user_id)
             select 1 + floor(random() * {groups})::bigint, 1 + n % {users} from generate_series(1, {memberships}) n
             on conflict do nothing;
         insert into authz.group_actions (group_id, action_name, expires_at)
             select 1 + floor(random() * {groups})::bigint,
                    case when n % 20 = 0 then format('area%s.*', n % 19) else format('area%s.task%s', a % 20, a) end,
                    case when n % 20 = 1 then now() - interval '1 day' end
             from (select n, 1 + floor(random() * {ACTIONS})::int as a from generate_series(1, {grants} * 9 / 10) n) v
             on conflict do nothing;
         insert into authz.user_actions (user_id, action_name)
             select 1 + floor(random() * {users})::bigint, format('area%s.task%s', a % 20, a)
             from (select n, 1 + floor(random() * {ACTIONS})::int as a from generate_series(1, {grants} / 10) n) v
             on conflict do nothing;
         analyze;"
    );
    pool.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(script))).await.unwrap();
    pool.close().await;
    database
}

/// Random questions, by their answer.
async fn questions(connection: &mut PgConnection, world: &World) -> [Vec<(UserName, ActionName)>; 2] {
    let mut rng = SmallRng::seed_from_u64(1);
    let [mut denied, mut allowed] = [Vec::new(), Vec::new()];
    while denied.len().min(allowed.len()) < 500 {
        let task = rng.random_range(1..=ACTIONS);
        let user =
            UserName::parse(&format!("user{}@example.com", rng.random_range(1..=world.users))).unwrap();
        let action = ActionName::parse(&format!("area{}.task{task}", task % 20)).unwrap();
        let decision = authz::check(&mut *connection, &user, &action).await.unwrap();
        if decision.is_allow() { &mut allowed } else { &mut denied }.push((user, action));
    }
    [denied, allowed]
}

fn check(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    for world in &WORLDS {
        let database = runtime.block_on(build(world));
        let connection = runtime.block_on(PgConnection::connect(database.url())).unwrap();
        let connection = tokio::sync::Mutex::new(connection);
        let [denied, allowed] =
            runtime.block_on(async { questions(&mut *connection.lock().await, world).await });

        let mut group = criterion.benchmark_group(format!("check/{}", world.name));
        group.bench_function("select 1", |b| {
            b.to_async(&runtime).iter(async || {
                let one: i32 =
                    sqlx::query_scalar("select 1").fetch_one(&mut *connection.lock().await).await.unwrap();
                one
            });
        });
        let many: Vec<_> = denied.iter().take(90).chain(allowed.iter().take(10)).cloned().collect();
        group.bench_function("check_many of 100", |b| {
            b.to_async(&runtime)
                .iter(async || authz::check_many(&mut *connection.lock().await, &many).await.unwrap());
        });
        for (answer, pairs) in [("allow", &allowed), ("deny", &denied)] {
            group.bench_function(BenchmarkId::new("check", answer), |b| {
                b.to_async(&runtime).iter(async || {
                    let (user, action) = pairs.choose(&mut rand::rng()).unwrap();
                    authz::check(&mut *connection.lock().await, user, action).await.unwrap()
                });
            });
            group.bench_function(BenchmarkId::new("authz.can", answer), |b| {
                b.to_async(&runtime).iter(async || {
                    let (user, action) = pairs.choose(&mut rand::rng()).unwrap();
                    let can: bool = sqlx::query_scalar("select authz.can($1, $2)")
                        .bind(user.as_str())
                        .bind(action.as_str())
                        .fetch_one(&mut *connection.lock().await)
                        .await
                        .unwrap();
                    can
                });
            });
            group.bench_function(BenchmarkId::new("explain", answer), |b| {
                b.to_async(&runtime).iter(async || {
                    let (user, action) = pairs.choose(&mut rand::rng()).unwrap();
                    authz::explain(&mut *connection.lock().await, user, action).await.unwrap()
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, check);
criterion_main!(benches);
