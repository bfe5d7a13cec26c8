//! Database checks beside `SELECT 1`, on one connection over a unix socket, in worlds of two sizes; in turns, since the
//! machine may change its speed.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![expect(clippy::unwrap_used, reason = "a benchmark may stop")]

mod worlds;

use std::hint::black_box;
use std::time::{Duration, Instant};

use authz::{ActionName, Snapshot, UserName};
use criterion::{Criterion, criterion_group, criterion_main};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::runtime::Builder;

use self::worlds::{MEDIUM, SMALL, World};

/// What is asked.
enum Ask {
    One,
    Many(Vec<(UserName, ActionName)>),
    Check(Vec<(UserName, ActionName)>),
    Confirmed(Snapshot, Vec<(UserName, ActionName)>),
    ManyConfirmed(Snapshot, Vec<(UserName, ActionName)>),
    Can(Vec<(UserName, ActionName)>),
    Explain(Vec<(UserName, ActionName)>),
}

impl Ask {
    async fn ask(&self, connection: &mut PgConnection) {
        let pick = |pairs: &Vec<(UserName, ActionName)>| pairs.choose(&mut rand::rng()).cloned().unwrap();
        match self {
            Self::One => {
                let one: i32 = sqlx::query_scalar("select 1").fetch_one(connection).await.unwrap();
                black_box(one);
            }
            Self::Many(questions) => {
                black_box(authz::check_many(connection, questions).await.unwrap());
            }
            Self::Check(pairs) => {
                let (user, action) = pick(pairs);
                let _ = black_box(authz::check(connection, &user, &action).await.unwrap());
            }
            Self::Confirmed(snapshot, pairs) => {
                let (user, action) = pick(pairs);
                let _ = black_box(snapshot.check_confirmed(connection, &user, &action).await.unwrap());
            }
            Self::ManyConfirmed(snapshot, questions) => {
                black_box(snapshot.check_many_confirmed(connection, questions).await.unwrap());
            }
            Self::Can(pairs) => {
                let (user, action) = pick(pairs);
                let can: bool = sqlx::query_scalar("select authz.can($1, $2)")
                    .bind(user.as_str())
                    .bind(action.as_str())
                    .fetch_one(connection)
                    .await
                    .unwrap();
                black_box(can);
            }
            Self::Explain(pairs) => {
                let (user, action) = pick(pairs);
                black_box(authz::explain(connection, &user, &action).await.unwrap());
            }
        }
    }

    /// How many questions it answers at once.
    fn questions(&self) -> f64 {
        match self {
            Self::Many(questions) | Self::ManyConfirmed(_, questions) => float(questions.len()),
            _ => 1.0,
        }
    }
}

async fn timed(ask: &Ask, connection: &mut PgConnection) -> Duration {
    let started = Instant::now();
    ask.ask(connection).await;
    started.elapsed()
}

/// Prints what a question takes beside `select 1`: of all that were asked, the medians.
fn print(name: &str, ask: &Ask, mut ones: Vec<Duration>, mut asked: Vec<Duration>) {
    ones.sort_unstable();
    asked.sort_unstable();
    let middle = |times: &[Duration]| times.get(times.len() / 2).copied().unwrap_or_default();
    let each = middle(&asked).div_f64(ask.questions());
    let one = middle(&ones);
    println!(
        "{name}: {each:.1?} a question, `select 1` {one:.1?}: {:.2} times\n",
        each.div_duration_f64(one)
    );
}

#[expect(clippy::cast_precision_loss, reason = "a figure to be printed")]
fn float(number: usize) -> f64 {
    number as f64
}

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
        let mut connection = runtime.block_on(PgConnection::connect(database.url())).unwrap();
        let [denied, allowed] = runtime.block_on(questions(&mut connection, world));
        let pool = runtime.block_on(PgPool::connect(database.url())).unwrap();
        let snapshot = runtime.block_on(Snapshot::options().start(pool)).unwrap();
        let many: Vec<_> = denied.iter().take(90).chain(allowed.iter().take(10)).cloned().collect();
        let asks = [
            ("check/allow", Ask::Check(allowed.clone())),
            ("check/deny", Ask::Check(denied.clone())),
            ("check_confirmed/allow", Ask::Confirmed(snapshot.clone(), allowed.clone())),
            ("check_confirmed/deny", Ask::Confirmed(snapshot.clone(), denied.clone())),
            ("check_many of 100", Ask::Many(many.clone())),
            ("check_many_confirmed of 100", Ask::ManyConfirmed(snapshot, many)),
            ("authz.can/allow", Ask::Can(allowed.clone())),
            ("authz.can/deny", Ask::Can(denied.clone())),
            ("explain/allow", Ask::Explain(allowed)),
            ("explain/deny", Ask::Explain(denied)),
        ];
        let mut group = criterion.benchmark_group(format!("check/{}", world.name));
        for (name, ask) in asks {
            let (mut ones, mut asked) = (Vec::new(), Vec::new());
            group.bench_function(name, |b| {
                b.iter_custom(|times| {
                    runtime.block_on(async {
                        let mut total = Duration::ZERO;
                        for _ in 0..times {
                            // The first ones find the processor's caches full of the question before.
                            for _ in 0..2 {
                                timed(&Ask::One, &mut connection).await;
                            }
                            ones.push(timed(&Ask::One, &mut connection).await);
                            let took = timed(&ask, &mut connection).await;
                            asked.push(took);
                            total += took;
                        }
                        total
                    })
                });
            });
            if !asked.is_empty() {
                print(&format!("{} {name}", world.name), &ask, ones, asked);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, check);
criterion_main!(benches);
