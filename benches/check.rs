//! Database checks beside `SELECT 1`, on one connection over a unix socket, in worlds of two sizes.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![expect(clippy::unwrap_used, reason = "a benchmark may stop")]

mod worlds;

use authz::{ActionName, UserName};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use sqlx::{Connection, PgConnection};
use tokio::runtime::Builder;

use self::worlds::{MEDIUM, SMALL, World};

/// Random questions, by their answer.
async fn questions(connection: &mut PgConnection, world: &World) -> [Vec<(UserName, ActionName)>; 2] {
    let mut rng = SmallRng::seed_from_u64(1);
    let [mut denied, mut allowed] = [Vec::new(), Vec::new()];
    while denied.len().min(allowed.len()) < 500 {
        let (user, action) = world.question(&mut rng);
        let decision = authz::check(&mut *connection, &user, &action).await.unwrap();
        if decision.is_allow() { &mut allowed } else { &mut denied }.push((user, action));
    }
    [denied, allowed]
}

fn check(criterion: &mut Criterion) {
    // One thread, as there is one connection: no answer has to wake another thread.
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    for world in [&SMALL, &MEDIUM] {
        let database = runtime.block_on(world.build());
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
