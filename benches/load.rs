//! What a snapshot costs: its load beside a bare `COPY` of the same rows, its memory, a check beside one look-up in a
//! hash map, and what readers notice of a refresh. World L comes with the argument `large`.

#![expect(clippy::unwrap_used, reason = "a benchmark may stop")]

mod worlds;

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use authz::{ActionName, Snapshot, UserName};
use futures_util::TryStreamExt;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::runtime::Runtime;

use self::worlds::{LARGE, MEDIUM, SMALL, World};

/// How often the load and the copy take turns.
const LOADS: usize = 5;
/// Questions of each answer.
const QUESTIONS: usize = 10_000;
/// How often the check and the look-up take turns, each time with all questions.
const SLICES: usize = 101;
/// Checks between two looks at the clock.
const BATCH: usize = 100;
/// How often quiet and busy times take turns, and how long each is.
const TURNS: usize = 6;
const TURN: Duration = Duration::from_secs(1);
const BETWEEN_REFRESHES: Duration = Duration::from_millis(10);

type Question = (UserName, ActionName);

fn main() {
    let runtime = Runtime::new().unwrap();
    let mut worlds = vec![&SMALL, &MEDIUM];
    if std::env::args().any(|argument| argument == "large") {
        worlds.push(&LARGE);
    }
    for world in worlds {
        let start = Instant::now();
        let database = runtime.block_on(world.build());
        println!("\nworld {} on {}", world.name, testdb::describe().unwrap_or_default());
        println!("made in {:.1} s", start.elapsed().as_secs_f64());
        let pool = runtime.block_on(PgPool::connect(database.url())).unwrap();
        let snapshot = runtime.block_on(load(database.url(), &pool));
        let answers = questions(world, &snapshot);
        check(world, &snapshot, &answers);
        refresh(&runtime, &pool, &snapshot, &answers);
        runtime.block_on(snapshot.shutdown());
    }
}

/// The snapshot and the copy in turns.
async fn load(url: &str, pool: &PgPool) -> Snapshot {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let (mut copies, mut loads, mut snapshot) = (Vec::new(), Vec::new(), None);
    for _ in 0..LOADS {
        let start = Instant::now();
        let bytes = copy(&mut connection).await;
        copies.push((start.elapsed(), bytes));
        // Only one in memory at a time.
        drop(snapshot.take());
        let start = Instant::now();
        snapshot = Some(Snapshot::options().listen(false).start(pool.clone()).await.unwrap());
        loads.push(start.elapsed());
    }
    copies.sort_unstable();
    loads.sort_unstable();
    let ((copy, bytes), load) = (*copies.get(LOADS / 2).unwrap(), *loads.get(LOADS / 2).unwrap());
    println!(
        "load {:.1} ms, copy of {:.1} MB {:.1} ms: {:.2} times (medians of {LOADS}; fastest {:.2} times)",
        load.as_secs_f64() * 1e3,
        float(bytes) / 1e6,
        copy.as_secs_f64() * 1e3,
        load.div_duration_f64(copy),
        loads.first().unwrap().div_duration_f64(copies.first().unwrap().0),
    );
    let snapshot = snapshot.unwrap();
    let size = snapshot.size();
    println!(
        "{size:?}: {:.2} bytes per membership",
        float(u64::try_from(size.bytes).unwrap()) / float(u64::try_from(size.memberships).unwrap())
    );
    snapshot
}

/// Reads the rows that a snapshot needs to the end of each; gives back the bytes.
async fn copy(connection: &mut PgConnection) -> u64 {
    let mut bytes = 0;
    for statement in [
        "copy (select user_id, status, directory_id, user_name from authz.users where status <> 'deleted')
         to stdout (format binary)",
        "copy authz.group_users (group_id, user_id) to stdout (format binary)",
        "copy authz.group_groups (parent_group_id, child_group_id) to stdout (format binary)",
        "copy authz.group_actions (group_id, action_name, expires_at) to stdout (format binary)",
        "copy authz.user_actions (user_id, action_name, expires_at) to stdout (format binary)",
        "copy authz.actions (action_name) to stdout (format binary)",
    ] {
        let mut rows = connection.copy_out_raw(statement).await.unwrap();
        while let Some(piece) = rows.try_next().await.unwrap() {
            bytes += u64::try_from(black_box(piece).len()).unwrap();
        }
    }
    bytes
}

/// Random questions by their answer.
fn questions(world: &World, snapshot: &Snapshot) -> [(&'static str, Vec<Question>); 2] {
    let mut rng = SmallRng::seed_from_u64(1);
    let [mut allowed, mut denied] = [("allow", Vec::new()), ("deny", Vec::new())];
    while allowed.1.len().min(denied.1.len()) < QUESTIONS {
        let (user, action) = world.question(&mut rng);
        let (_, questions) =
            if snapshot.check(&user, &action).unwrap().is_allow() { &mut allowed } else { &mut denied };
        if questions.len() < QUESTIONS {
            questions.push((user, action));
        }
    }
    [allowed, denied]
}

fn check(world: &World, snapshot: &Snapshot, answers: &[(&str, Vec<Question>)]) {
    let users: HashMap<String, u32> =
        (1..=world.users).map(|user| (format!("user{user}@example.com"), user)).collect();
    for (answer, questions) in answers {
        let (mut looked_up, mut checked) = (Vec::new(), Vec::new());
        for _ in 0..SLICES {
            looked_up.push(nanos_each(questions, |(user, _)| users.get(user.as_str()).copied()));
            checked.push(nanos_each(questions, |(user, action)| snapshot.check(user, action).unwrap()));
        }
        let (looked_up, checked) = (median(looked_up), median(checked));
        println!(
            "{answer}: check {checked:.0} ns, look-up {looked_up:.0} ns: {:.2} times",
            checked / looked_up
        );
    }
}

fn nanos_each<A>(questions: &[Question], ask: impl Fn(&Question) -> A) -> f64 {
    let start = Instant::now();
    for question in questions {
        black_box(ask(black_box(question)));
    }
    float(u64::try_from(start.elapsed().as_nanos()).unwrap()) / float(u64::try_from(questions.len()).unwrap())
}

/// What batches of checks take on a thread of their own: while nothing happens, while another snapshot follows changes,
/// and while the one that is asked does, in turns.
fn refresh(runtime: &Runtime, pool: &PgPool, snapshot: &Snapshot, answers: &[(&str, Vec<Question>)]) {
    let questions: Vec<Question> = answers.iter().flat_map(|(_, questions)| questions).cloned().collect();
    let hour = Duration::from_hours(1);
    let idle = Snapshot::options().listen(false).poll_interval(hour).max_staleness(hour * 3);
    let idle = runtime.block_on(idle.start(pool.clone())).unwrap();
    for pattern in ["area1.task1", "*"] {
        let [mut quiet, mut beside, mut busy] = [Vec::new(), Vec::new(), Vec::new()];
        let mut refreshes = 0;
        let mut next = questions.chunks_exact(BATCH).cycle();
        for _ in 0..TURNS {
            batches(&idle, &mut next, &mut quiet, || std::thread::sleep(TURN));
            for (asked, times) in [(&idle, &mut beside), (snapshot, &mut busy)] {
                batches(asked, &mut next, times, || {
                    refreshes += runtime.block_on(change(pool, snapshot, pattern));
                });
            }
        }
        let permilles = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            [500, 990, 999].map(|permille| times.get((times.len() - 1) * permille / 1_000).copied().unwrap())
        };
        let [quiet, beside, busy] = [quiet, beside, busy].map(|mut times| permilles(&mut times));
        println!(
            "{BATCH} checks, p50, p99, p99.9: {quiet:.1?}; while another follows a grant of `{pattern}` {beside:.1?}; while \
             this one does {busy:.1?}, {refreshes} refreshes"
        );
        let times = |at: usize| {
            let [quiet, beside, busy] =
                [quiet, beside, busy].map(|figures| figures.get(at).copied().unwrap());
            (beside.div_duration_f64(quiet), busy.div_duration_f64(quiet), busy.div_duration_f64(beside))
        };
        for (name, at) in [("p50", 0), ("p99", 1)] {
            let (beside, busy, alone) = times(at);
            println!("  {name}: another {beside:.2} times, this one {busy:.2} times, of another {alone:.2}");
        }
    }
    runtime.block_on(idle.shutdown());
}

/// Measures batches on a thread of their own while something else is done on this one.
fn batches<'a>(
    snapshot: &Snapshot,
    next: &mut (impl Iterator<Item = &'a [Question]> + Send),
    times: &mut Vec<Duration>,
    meanwhile: impl FnOnce(),
) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let batch = next.next().unwrap();
                let start = Instant::now();
                for (user, action) in batch {
                    let _ = black_box(snapshot.check(black_box(user), action).unwrap());
                }
                times.push(start.elapsed());
            }
        });
        meanwhile();
        done.store(true, Ordering::Relaxed);
    });
}

/// For one turn, gives somebody a right, or takes it away, and waits for the snapshot, again and again.
async fn change(pool: &PgPool, snapshot: &Snapshot, pattern: &str) -> usize {
    let mut refreshes = 0;
    let start = Instant::now();
    let mut due = tokio::time::interval(BETWEEN_REFRESHES);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    while start.elapsed() < TURN {
        due.tick().await;
        let statement = if refreshes % 2 == 0 {
            "insert into authz.user_actions (user_id, action_name) values (1, $1) on conflict do nothing"
        } else {
            "delete from authz.user_actions where user_id = 1 and action_name = $1"
        };
        sqlx::query(statement).bind(pattern).execute(pool).await.unwrap();
        snapshot.at_least(authz::revision::current(pool).await.unwrap()).await.unwrap();
        refreshes += 1;
    }
    refreshes
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    *times.get(times.len() / 2).unwrap()
}

#[expect(clippy::cast_precision_loss, reason = "a figure to be printed")]
fn float(number: u64) -> f64 {
    number as f64
}
