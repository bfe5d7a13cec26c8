//! Records through one writer beside plain single-row INSERTs, on a server that is durable.
//!
//! Not by criterion: what counts is the ratio of two sides that take turns, with many callers at once.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may stop, and says what it found")]

use std::convert::Infallible;
use std::time::{Duration, Instant};

use authz::audit::{Actor, Outcome, Record, Writer};
use authz::grant::{self, Grant};
use authz::{ActionPattern, Authz, UserName};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

authz::actions! {
    const ACTIONS;

    /// Set a role's number of workers.
    WorkersScale = "workers.scale";
}

/// Each measurement takes so long; the sides take turns.
const SLICE: Duration = Duration::from_millis(500);
const ROUNDS: usize = 9;
/// How many connections the callers of plain INSERTs have at most.
const CONNECTIONS: u32 = 32;

async fn plain(pool: PgPool, end: Instant) -> u32 {
    let mut calls = 0;
    while Instant::now() < end {
        sqlx::query(
            "insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
             values ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind("bench")
        .bind("ada@example.com")
        .bind("workers.scale")
        .bind("succeeded")
        .bind("role web")
        .bind(serde_json::json!({ "workers": 4 }))
        .bind("req-1")
        .bind(7_i64)
        .execute(&pool)
        .await
        .unwrap();
        calls += 1;
    }
    calls
}

async fn written(writer: Writer, end: Instant) -> u32 {
    let who = Actor::new("ada@example.com", "bench").request("req-1");
    let mut calls = 0;
    while Instant::now() < end {
        let record = Record::new("workers.scale", Outcome::Succeeded)
            .target("role web")
            .detail(serde_json::json!({ "workers": 4 }));
        writer.record(&who, &record).await.unwrap();
        calls += 1;
    }
    calls
}

async fn operations(authz: Authz, user: UserName, end: Instant) -> u32 {
    let mut calls = 0;
    while Instant::now() < end {
        authz
            .operation::<WorkersScale>(&user)
            .target("role web")
            .run(async |_| Ok::<_, Infallible>(()))
            .await
            .unwrap();
        calls += 1;
    }
    calls
}

/// Calls per second of so many callers, each of which waits for its call before the next.
async fn rate<F: Future<Output = u32> + Send + 'static>(
    callers: usize,
    caller: impl Fn(Instant) -> F,
) -> f64 {
    let started = Instant::now();
    let tasks: Vec<_> = (0..callers).map(|_| tokio::spawn(caller(started + SLICE))).collect();
    let mut calls = 0;
    for task in tasks {
        calls += task.await.unwrap();
    }
    f64::from(calls) / started.elapsed().as_secs_f64()
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap()
}

#[tokio::main]
async fn main() {
    let server = testdb::Server::start().await.unwrap();
    let url = server.url("postgres");
    let pool = PgPoolOptions::new().max_connections(CONNECTIONS).connect(&url).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    let user = UserName::parse("ada@example.com").unwrap();
    let me = Actor::new("bench", "bench");
    authz::action::register(&pool, ACTIONS, &me).await.unwrap();
    authz::user::create(&pool, &user, "Ada", &me).await.unwrap();
    let all = Grant::new(ActionPattern::parse("*").unwrap(), "");
    grant::to_user(&pool, &user, &all, &me).await.unwrap();
    let durable: String =
        sqlx::query_scalar("select format('fsync %s, synchronous_commit %s, wal_sync_method %s, data in %s',
             current_setting('fsync'), current_setting('synchronous_commit'), current_setting('wal_sync_method'),
             current_setting('data_directory'))")
            .fetch_one(&pool)
            .await
            .unwrap();
    println!("{durable}");
    println!("callers | plain INSERT/s | writer/s | ratio | operations/s | of plain");
    for callers in [1, 8, 64, 256] {
        let (mut plains, mut writers, mut ran, mut ratios, mut shares) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let writer = Writer::start(pool.clone());
            let authz = Authz::new(pool.clone()).service("bench");
            // Connected, and its statements prepared, before the clock runs.
            written(writer.clone(), Instant::now() + SLICE / 50).await;
            operations(authz.clone(), user.clone(), Instant::now() + SLICE / 50).await;
            let one = rate(callers, |end| plain(pool.clone(), end)).await;
            let two = rate(callers, |end| written(writer.clone(), end)).await;
            let three = rate(callers, |end| operations(authz.clone(), user.clone(), end)).await;
            writer.close().await;
            authz.shutdown().await;
            // The first round only warms up.
            if round > 0 {
                plains.push(one);
                writers.push(two);
                ran.push(three);
                ratios.push(two / one);
                shares.push(three / one);
            }
        }
        println!(
            "{callers:>7} | {:>14.0} | {:>8.0} | {:>5.2} | {:>12.0} | {:>8.2}",
            median(plains),
            median(writers),
            median(ratios),
            median(ran),
            median(shares)
        );
    }
    pool.close().await;
}
