//! What a sync costs: in time beside a raw `COPY` of the memberships, in written log, in memory, and in calls.
//!
//! Without arguments: the ratios; `once` makes fewer rounds, `granted` gives somebody a right before, `paced` has each answer of
//! the source take two milliseconds. With `emulator`: memory and CPU of a process that reads the API. `small` takes a directory of a
//! tenth. See `README.md`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    reason = "a benchmark may stop, and its numbers are small"
)]

mod emulator;
mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dir_sync::crawl::{Batch, CrawlOptions, crawl};
use dir_sync::guard::Limits;
use dir_sync::{DirectorySync, Options, Report, Status};
use sqlx::PgPool;
use sqlx::postgres::PgPoolCopyExt;
use testdb::Database;
use tokio::sync::mpsc;

use self::world::World;

const ROUNDS: usize = 3;
/// With eight calls under way a hundred times as fast as Google's quota allows; Google itself takes ten times as long or more.
const PACE: Duration = Duration::from_millis(2);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |name: &str| arguments.iter().any(|argument| argument == name);
    let mut world = if given("small") { World::s() } else { World::m() };
    if given("paced") {
        world.pace = PACE;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if given("child") {
        runtime.block_on(emulator::child());
    } else if given("emulator") {
        runtime.block_on(emulator::measure(world));
    } else {
        runtime.block_on(ratios(world, if given("once") { 1 } else { ROUNDS }, given("granted")));
    }
}

pub(crate) async fn migrated() -> (Database, PgPool) {
    let database = Database::empty().await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    (database, pool)
}

pub(crate) fn options() -> Options {
    Options { limits: Limits::NONE, ..Options::default() }
}

async fn sync(pool: &PgPool, world: World) -> (Duration, Report) {
    let started = Instant::now();
    let sync = DirectorySync::new(pool.clone(), "world".parse().unwrap(), Arc::new(world));
    let report = sync.options(options()).run().await;
    (started.elapsed(), report)
}

/// A crawl whose pages go nowhere: the part of a run that is the source's.
async fn crawl_alone(world: World) -> Duration {
    let started = Instant::now();
    let (pages, mut batches) = mpsc::channel::<Batch>(32);
    let crawled = tokio::join!(crawl(Arc::new(world), CrawlOptions::default(), pages), async {
        while batches.recv().await.is_some() {}
    });
    crawled.0.unwrap();
    started.elapsed()
}

/// The memberships as rows of integers, to a table without keys.
async fn copy(pool: &PgPool, world: World) -> Duration {
    sqlx::raw_sql(
        "drop table if exists raw; create table raw (group_id bigint not null, user_id bigint not null, role text not null)",
    )
    .execute(pool)
    .await
    .unwrap();
    let mut bytes = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0".to_vec();
    for group in 0..world.groups {
        for place in 0..world.size(group) {
            bytes.extend(3_i16.to_be_bytes());
            for value in [group as i64, ((group * 7_919 + place) % world.users) as i64] {
                bytes.extend(8_i32.to_be_bytes());
                bytes.extend(value.to_be_bytes());
            }
            bytes.extend(6_i32.to_be_bytes());
            bytes.extend(b"member");
        }
    }
    bytes.extend((-1_i16).to_be_bytes());
    let started = Instant::now();
    let mut copy = pool.copy_in_raw("copy raw from stdin (format binary)").await.unwrap();
    for piece in bytes.chunks(1 << 20) {
        copy.send(piece).await.unwrap();
    }
    assert_eq!(copy.finish().await.unwrap(), world.memberships as u64);
    started.elapsed()
}

async fn log_position(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetch_one(pool).await.unwrap()
}

/// One run, and what the machine did in between: it may change its speed within seconds.
struct Measured {
    whole: Duration,
    copy: Duration,
    crawl: Duration,
    /// From the last answer of the source to the end.
    after: Duration,
    /// From the last page of the listing to the end: with the second look at what it has missed, and its answers.
    after_listing: Duration,
}

impl Measured {
    /// Whole, beyond the crawl, after the last answer, and after the listing, in multiples of the copy.
    fn ratios(&self) -> [f64; 4] {
        let beyond = self.whole.saturating_sub(self.crawl);
        [self.whole, beyond, self.after, self.after_listing].map(|time| time.div_duration_f64(self.copy))
    }
}

/// Measures a run between two copies and two crawls, whose means are its units.
async fn measured(pool: &PgPool, world: World, wanted: Status) -> (Measured, Report) {
    let (copy_before, crawl_before) = (copy(pool, world).await, crawl_alone(world).await);
    world::forget_answers();
    let (whole, report) = sync(pool, world).await;
    let answers = world::answers();
    let [after, after_listing] = [answers.last, answers.listed].map(|answer| answer.unwrap().elapsed());
    assert_eq!(report.status, wanted, "{report}");
    let (crawl_after, copy_after) = (crawl_alone(world).await, copy(pool, world).await);
    let (copy, crawl) = ((copy_before + copy_after) / 2, (crawl_before + crawl_after) / 2);
    (Measured { whole, copy, crawl, after, after_listing }, report)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// A local user and a local group with a right each, none of which the directory knows of.
const GRANTS: &str = "
    insert into authz.actions (action_name) values ('workers.scale');
    with u as (insert into authz.users (user_name) values ('ada@local.example') returning user_id)
    insert into authz.user_actions (user_id, action_name) select user_id, 'workers.scale' from u;
    with g as (insert into authz.groups (group_name) values ('ops@local.example') returning group_id)
    insert into authz.group_actions (group_id, action_name) select group_id, 'workers.scale' from g;";

async fn ratios(world: World, rounds: usize, is_granted: bool) {
    let [mut firsts, mut unchanged, mut spread, mut concentrated] = [const { Vec::new() }; 4];
    let mut logs: Vec<i64> = vec![];
    for _ in 0..rounds {
        let (_database, pool) = migrated().await;
        if is_granted {
            sqlx::raw_sql(GRANTS).execute(&pool).await.unwrap();
        }
        firsts.push(measured(&pool, world, Status::Applied).await.0);
        // What a database does by itself after so large a change.
        sqlx::raw_sql("vacuum analyze").execute(&pool).await.unwrap();
        for _ in 0..ROUNDS {
            let before = log_position(&pool).await;
            let (_, report) = sync(&pool, world).await;
            assert_eq!(report.status, Status::Unchanged, "{report}");
            logs.push(log_position(&pool).await - before);
            unchanged.push(measured(&pool, world, Status::Unchanged).await.0);
        }
        for (runs, is_concentrated) in [(&mut spread, false), (&mut concentrated, true)] {
            for moment in [1, 0, 1, 0] {
                let there = World { moment, concentrated: is_concentrated, ..world };
                let (run, report) = measured(&pool, there, Status::Applied).await;
                let counts = report.counts.memberships;
                assert_eq!(counts.added, counts.removed, "{report}");
                runs.push(run);
            }
        }
    }
    println!(
        "{} memberships; log written by an unchanged run: at most {} KiB",
        world.memberships,
        logs.iter().max().unwrap() / 1024
    );
    for (what, runs) in [
        ("first load", firsts),
        ("unchanged", unchanged),
        ("1 % churn, spread", spread),
        ("1 % churn, few groups", concentrated),
    ] {
        for run in &runs {
            let Measured { whole, copy, crawl, after, .. } = run;
            let [times, beyond, behind, listing] = run.ratios();
            println!(
                "  {what}: {whole:.1?}, crawl {crawl:.1?}, copy {copy:.1?}: {times:.2}, beyond the crawl {beyond:.2} × copy, after \
                 the last answer {after:.1?}: {behind:.2}, after the listing {listing:.2} × copy"
            );
        }
        let [whole, beyond, after, listing] =
            [0, 1, 2, 3].map(|at| median(runs.iter().map(|run| run.ratios()[at]).collect()));
        println!(
            "{what}, median: {whole:.2} × copy; beyond the crawl {beyond:.2}, after the last answer {after:.2}, after the listing \
             {listing:.2} × copy"
        );
    }
}
