//! What a sync costs: in time beside a raw `COPY` of the memberships, in written log, in memory, and in calls.
//!
//! Without arguments: the ratios; `once` makes fewer rounds. With `emulator`: memory and CPU of a process that reads the
//! API. `small` takes a directory of a tenth. See `README.md`.

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

use dir_sync::crawl::{CrawlOptions, crawl};
use dir_sync::guard::{Limit, Limits};
use dir_sync::{DirectorySync, Options, Report, Status};
use sqlx::PgPool;
use sqlx::postgres::PgPoolCopyExt;
use testdb::Database;
use tokio::sync::mpsc;

use self::world::World;

const ROUNDS: usize = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |name: &str| arguments.iter().any(|argument| argument == name);
    let world = if given("small") { World::s() } else { World::m() };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if given("child") {
        runtime.block_on(emulator::child());
    } else if given("emulator") {
        runtime.block_on(emulator::measure(world));
    } else {
        runtime.block_on(ratios(world, if given("once") { 1 } else { ROUNDS }));
    }
}

pub(crate) async fn migrated() -> (Database, PgPool) {
    let database = Database::empty().await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    (database, pool)
}

pub(crate) fn options() -> Options {
    let all = Limit::new(100, u64::MAX);
    Options {
        limits: Limits { users: all, groups: all, memberships: all, members_of_group: all },
        ..Options::default()
    }
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
    let (pages, mut batches) = mpsc::channel(32);
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

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

async fn ratios(world: World, rounds: usize) {
    let (mut copies, mut crawls, mut firsts, mut unchanged, mut spread, mut concentrated) =
        (vec![], vec![], vec![], vec![], vec![], vec![]);
    let mut logs: Vec<i64> = vec![];
    for _ in 0..rounds {
        let (_database, pool) = migrated().await;
        copies.push(copy(&pool, world).await);
        crawls.push(crawl_alone(world).await);
        let (time, report) = sync(&pool, world).await;
        assert_eq!(report.status, Status::Applied, "{report}");
        firsts.push(time);
        // What a database does by itself after so large a change.
        sqlx::raw_sql("vacuum analyze").execute(&pool).await.unwrap();
        for _ in 0..ROUNDS {
            let before = log_position(&pool).await;
            let (time, report) = sync(&pool, world).await;
            assert_eq!(report.status, Status::Unchanged, "{report}");
            unchanged.push(time);
            logs.push(log_position(&pool).await - before);
        }
        copies.push(copy(&pool, world).await);
        for (times, is_concentrated) in [(&mut spread, false), (&mut concentrated, true)] {
            for moment in [1, 0] {
                let (time, report) =
                    sync(&pool, World { moment, concentrated: is_concentrated, ..world }).await;
                assert_eq!(report.status, Status::Applied, "{report}");
                let counts = report.counts.memberships;
                println!("churn: {} added, {} removed: {time:?}", counts.added, counts.removed);
                times.push(time);
            }
        }
    }
    let unit = median(copies);
    let crawl = median(crawls);
    println!("raw copy of {} rows: {unit:?}; crawl alone: {crawl:?}", world.memberships);
    println!("log written by an unchanged run: at most {} KiB", logs.iter().max().unwrap() / 1024);
    for (what, times) in [
        ("first load", firsts),
        ("unchanged", unchanged),
        ("1 % churn, spread", spread),
        ("1 % churn, few groups", concentrated),
    ] {
        let whole = median(times);
        let beyond = whole.saturating_sub(crawl);
        println!(
            "{what:<22} {whole:>10.1?} {:>7.2} × copy; beyond the crawl {beyond:>10.1?} {:>7.2} × copy",
            whole.as_secs_f64() / unit.as_secs_f64(),
            beyond.as_secs_f64() / unit.as_secs_f64()
        );
    }
}
