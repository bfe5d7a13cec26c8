//! Sealing and verifying a trail, beside reading its rows out of the database with a plain `COPY` and beside digesting
//! as many bytes; all of them in turns, since the machine may change its speed.

#![expect(clippy::unwrap_used, reason = "a benchmark may stop")]

use std::io::Write;
use std::time::{Duration, Instant};

use authz::audit::{Trust, export, seal, verify, verify_exports};
use futures_util::TryStreamExt;
use ring::digest::{SHA256, digest};
use rustix::time::{ClockId, clock_gettime};
use sqlx::{Executor, PgPool};
use testdb::Database;
use tokio::runtime::Builder;

const RECORDS: u32 = 200_000;
const ROUNDS: u32 = 9;

fn main() {
    // Not asked to run, only whether it is there (`cargo test --benches`).
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    // One thread reads what the server sends: no answer has to wake another one.
    Builder::new_current_thread().enable_all().build().unwrap().block_on(run());
}

/// Records such as a service leaves: one in three transactions has three of them.
async fn fill(pool: &PgPool) {
    for _ in 0..50 {
        sqlx::query(
            "insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, decision, revision)
             select 'dashboard', format('user%s@example.com', n % 997), format('workers.scale.team%s', n % 31), 'succeeded',
                    format('cluster-%s/workers', n % 13), jsonb_build_object('replicas', n % 100, 'reason', 'load'),
                    md5(n::text), jsonb_build_object('allow', jsonb_build_object('grant', jsonb_build_object('pattern',
                    'workers.*', 'holder', jsonb_build_object('group', 'ops@example.com')), 'revision', n)), n
             from generate_series(1, $1) n",
        )
        .bind(i32::try_from(RECORDS / 50).unwrap())
        .execute(pool)
        .await
        .unwrap();
    }
    sqlx::query("analyze authz.audit_log").execute(pool).await.unwrap();
}

/// The columns that a seal is about, in the order of the chain.
async fn copy_out(pool: &PgPool) -> usize {
    let mut connection = pool.acquire().await.unwrap();
    let mut rows = connection
        .copy_out_raw(
            "copy (
                select audit_id, recorded_at, service, actor, action, outcome, target, detail::text, request_id,
                       decision::text, revision, database_user, transaction_id, operation_id
                from authz.audit_log
                order by transaction_id, audit_id
            ) to stdout (format binary)",
        )
        .await
        .unwrap();
    let mut bytes = 0;
    while let Some(chunk) = rows.try_next().await.unwrap() {
        bytes += chunk.len();
    }
    bytes
}

/// As if nothing had been sealed. Only a superuser can, with the triggers off.
async fn unseal(pool: &PgPool) {
    let mut connection = pool.acquire().await.unwrap();
    let script = "set session_replication_role = replica; delete from authz.audit_seals; set session_replication_role = origin";
    connection.execute(sqlx::raw_sql(script)).await.unwrap();
}

/// The digest of a record of that many bytes, alone.
fn digests(bytes: usize) -> Duration {
    let record = vec![7_u8; bytes];
    let started = Instant::now();
    for _ in 0..RECORDS {
        std::hint::black_box(digest(&SHA256, std::hint::black_box(&record)));
    }
    started.elapsed()
}

/// What this process has used of the processors; the database is another process.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap()
}

/// What each step took, round by round, in µs a record.
#[derive(Default)]
struct Steps(Vec<(&'static str, Vec<f64>)>);

impl Steps {
    fn took(&mut self, what: &'static str, took: Duration) {
        let each = took.as_secs_f64() * 1e6 / f64::from(RECORDS);
        match self.0.iter_mut().find(|(name, _)| *name == what) {
            Some((_, rounds)) => rounds.push(each),
            None => self.0.push((what, vec![each])),
        }
    }

    /// All rounds, the machine's slow moments among them.
    fn print(&self) {
        for (what, rounds) in &self.0 {
            let mut sorted = rounds.clone();
            sorted.sort_by(f64::total_cmp);
            let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
            let all: Vec<String> = rounds.iter().map(|each| format!("{each:.2}")).collect();
            println!("{what:<36} {median:>6.2} µs a record {:>8.0}/s   {}", 1e6 / median, all.join(" "));
        }
    }
}

async fn run() {
    let database = Database::empty().await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    fill(&pool).await;
    let bytes = copy_out(&pool).await / RECORDS as usize;
    println!("{RECORDS} records of {bytes} bytes, {ROUNDS} rounds");

    let mut steps = Steps::default();
    for _ in 0..ROUNDS {
        unseal(&pool).await;
        steps.took("SHA-256 of as many bytes", digests(bytes));

        let started = Instant::now();
        copy_out(&pool).await;
        steps.took("COPY of the columns", started.elapsed());

        let (started, cpu) = (Instant::now(), cpu_time());
        let sealed = seal(&pool, None).await.unwrap();
        steps.took("seal", started.elapsed());
        steps.took("seal: CPU of this process", cpu_time().saturating_sub(cpu));
        assert_eq!(sealed.records, u64::from(RECORDS));

        let started = Instant::now();
        let report = verify(&pool, &Trust::new()).await.unwrap();
        steps.took("verify in the database", started.elapsed());
        assert!(report.is_clean() && report.records == u64::from(RECORDS));

        let started = Instant::now();
        let mut lines = Vec::new();
        export(&pool, 1, None, &mut lines).await.unwrap();
        steps.took("export", started.elapsed());
        let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        zipped.write_all(&lines).unwrap();
        let zipped = zipped.finish().unwrap();
        for (what, bytes) in [("verify of an export", &lines), ("verify of a gzipped export", &zipped)] {
            let started = Instant::now();
            let report = verify_exports([bytes.as_slice()], &Trust::new()).unwrap();
            steps.took(what, started.elapsed());
            assert!(report.is_clean() && report.records == u64::from(RECORDS));
        }
    }
    steps.print();
}
