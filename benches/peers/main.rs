//! Other libraries' decisions beside a look-up in a `HashMap`, in the same worlds, after all have agreed.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(clippy::unwrap_used, reason = "a benchmark may stop")]

mod casbin;
mod cedar;
mod world;

use std::collections::HashMap;
use std::time::Instant;

use authz::Snapshot;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::runtime::Runtime;

use crate::cedar::{Cedar, Encoding};
use crate::world::{Question, Shape, World, user_name};

const SHAPES: [Shape; 2] = [
    Shape { name: "S", users: 1_000, groups: 100, memberships: 5_000, grants: 500 },
    Shape { name: "M", users: 100_000, groups: 5_000, memberships: 1_000_000, grants: 20_000 },
];
/// Questions on which all must agree.
const AGREED: usize = 2_000;
/// Of those, the ones that casbin is asked in world M, where one takes it milliseconds.
const AGREED_BY_CASBIN_IN_M: usize = 100;
/// Questions of each answer that the measurements go round.
const MEASURED: usize = 10_000;
/// Fewer than the 200 answers that casbin's cache holds unless told otherwise.
const HOT: usize = 100;

fn peers(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    for shape in &SHAPES {
        let world = World::draw(shape);
        let agreed: Vec<Question> = world.questions(1).take(AGREED).collect();
        let expected: Vec<bool> = agreed.iter().map(|question| world.allows(question)).collect();
        let database = timed("the database", shape, || runtime.block_on(world.fill()));
        runtime.block_on(async {
            let mut connection = PgConnection::connect(database.url()).await.unwrap();
            for (question, expected) in agreed.iter().zip(&expected) {
                let decision = authz::check(&mut connection, &question.user, &question.action).await.unwrap();
                assert_eq!(
                    decision.is_allow(),
                    *expected,
                    "authz::check, {}, {}",
                    question.user,
                    question.action
                );
            }
        });
        let answers = [("allow", measured(&world, true)), ("deny", measured(&world, false))];

        let mut group = criterion.benchmark_group(format!("peers/{}", shape.name));
        let users: HashMap<String, u32> = (1..=shape.users).map(|user| (user_name(user), user)).collect();
        for (answer, questions) in &answers {
            measure(&mut group, BenchmarkId::new("HashMap", answer), questions, |question| {
                look_up(&users, question.user.as_str())
            });
        }
        // One poll a second goes on meanwhile, as it does in a service.
        let snapshot = timed("the snapshot", shape, || {
            runtime.block_on(load_snapshot(database.url(), &agreed, &expected))
        });
        let size = snapshot.size();
        println!("the snapshot of world {}: {size:?}", shape.name);
        for (answer, questions) in &answers {
            measure(&mut group, BenchmarkId::new("Snapshot::check", answer), questions, |question| {
                snapshot.check(&question.user, &question.action).unwrap()
            });
        }
        for (name, encoding) in
            [("cedar, performers", Encoding::Performers), ("cedar, sets", Encoding::Allowed)]
        {
            let cedar = timed(name, shape, || Cedar::load(&world, encoding));
            for (n, (request, expected)) in cedar.requests(&agreed).iter().zip(&expected).enumerate() {
                assert_eq!(cedar.allows(request), *expected, "{name}, question {n}");
            }
            for (answer, questions) in &answers {
                let requests = cedar.requests(questions);
                let id = BenchmarkId::new(name, answer);
                measure(&mut group, id, &requests, |request| cedar.allows(request));
            }
        }

        let enforcer = timed("casbin", shape, || runtime.block_on(casbin::load(&world)));
        let asked = if shape.name == "M" { AGREED_BY_CASBIN_IN_M } else { AGREED };
        for (question, expected) in agreed.iter().zip(&expected).take(asked) {
            let allowed = casbin::allows(&enforcer, question);
            assert_eq!(allowed, *expected, "casbin, {}, {}", question.user, question.action);
        }
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        for (answer, questions) in &answers {
            let id = BenchmarkId::new("casbin enforce", answer);
            measure(&mut group, id, questions, |question| casbin::allows(&enforcer, question));
        }
        group.finish();
        drop(enforcer);
        if shape.name == "S" {
            hot(criterion, &runtime, &world, &users, &snapshot);
        }
    }
}

/// The permissions of the database in memory, once it agrees.
async fn load_snapshot(url: &str, agreed: &[Question], expected: &[bool]) -> Snapshot {
    let snapshot = Snapshot::options().start(PgPool::connect(url).await.unwrap()).await.unwrap();
    for (question, expected) in agreed.iter().zip(expected) {
        let verdict = snapshot.check(&question.user, &question.action).unwrap();
        assert_eq!(verdict.is_allow(), *expected, "the snapshot, {}, {}", question.user, question.action);
    }
    snapshot
}

/// Casbin's cached answers: a few questions over and over, each already asked. The unit goes round the same ones.
fn hot(
    criterion: &mut Criterion,
    runtime: &Runtime,
    world: &World,
    users: &HashMap<String, u32>,
    snapshot: &Snapshot,
) {
    let questions: Vec<Question> = world.questions(3).take(HOT).collect();
    let enforcer = runtime.block_on(casbin::load_cached(world));
    for question in &questions {
        assert_eq!(casbin::allows(&enforcer, question), world.allows(question), "casbin, before the cache");
    }
    let mut group = criterion.benchmark_group(format!("peers/{}/hot", world.shape.name));
    measure(&mut group, BenchmarkId::from_parameter("HashMap"), &questions, |question| {
        look_up(users, question.user.as_str())
    });
    measure(&mut group, BenchmarkId::from_parameter("Snapshot::check"), &questions, |question| {
        snapshot.check(&question.user, &question.action).unwrap()
    });
    measure(&mut group, BenchmarkId::from_parameter("casbin cache hit"), &questions, |question| {
        casbin::allows(&enforcer, question)
    });
    group.finish();
}

/// The unit: one look-up of an owned name by a borrowed one.
fn look_up(users: &HashMap<String, u32>, user: &str) -> Option<u32> {
    users.get(user).copied()
}

/// Goes round the questions, so that no answer is the one before.
fn measure<Q, A>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    questions: &[Q],
    ask: impl Fn(&Q) -> A,
) {
    let mut next = questions.iter().cycle();
    group.bench_function(id, |b| b.iter(|| next.next().map(&ask)));
}

fn measured(world: &World, allowed: bool) -> Vec<Question> {
    world.questions(2).filter(|question| world.allows(question) == allowed).take(MEASURED).collect()
}

fn timed<T>(what: &str, shape: &Shape, load: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let loaded = load();
    println!("{what} holds world {} after {:.1} s", shape.name, start.elapsed().as_secs_f64());
    loaded
}

criterion_group!(benches, peers);
criterion_main!(benches);
