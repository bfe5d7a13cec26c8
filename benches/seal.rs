//! Sealing and verifying a trail, beside reading its rows out of the database with a plain `COPY`.

#![expect(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a benchmark may stop, and rounds")]

use std::io::Write;
use std::time::{Duration, Instant};

use authz::audit::{Trust, export, seal, verify, verify_exports};
use futures_util::TryStreamExt;
use sqlx::PgPool;
use testdb::Database;

const RECORDS: u32 = 500_000;

fn main() {
    // Not asked to run, only whether it is there (`cargo test --benches`).
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(run());
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

async fn copy_out(pool: &PgPool) -> usize {
    let mut connection = pool.acquire().await.unwrap();
    let mut rows = connection
        .copy_out_raw("copy (select * from authz.audit_log) to stdout (format binary)")
        .await
        .unwrap();
    let mut bytes = 0;
    while let Some(chunk) = rows.try_next().await.unwrap() {
        bytes += chunk.len();
    }
    bytes
}

fn say(what: &str, took: Duration, unit: Duration) {
    let each = took.as_secs_f64() * 1e6 / f64::from(RECORDS);
    let rate = f64::from(RECORDS) / took.as_secs_f64();
    println!(
        "{what:<44} {each:>6.2} µs a record {rate:>10.0}/s  × {:.1}",
        took.as_secs_f64() / unit.as_secs_f64()
    );
}

async fn run() {
    let database = Database::empty().await.unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    authz::migrate(&pool).await.unwrap();
    fill(&pool).await;
    copy_out(&pool).await;

    let started = Instant::now();
    let bytes = copy_out(&pool).await;
    let unit = started.elapsed();
    println!("{RECORDS} records of {:.0} bytes", bytes as f64 / f64::from(RECORDS));
    say("COPY of the rows (the unit)", unit, unit);

    let started = Instant::now();
    let sealed = seal(&pool, None).await.unwrap();
    say("seal", started.elapsed(), unit);
    assert_eq!(sealed.records, u64::from(RECORDS));

    for _ in 0..2 {
        let started = Instant::now();
        let report = verify(&pool, &Trust::new()).await.unwrap();
        say("verify in the database", started.elapsed(), unit);
        assert!(report.is_clean() && report.records == u64::from(RECORDS));
    }

    let started = Instant::now();
    let mut lines = Vec::new();
    export(&pool, 1, None, &mut lines).await.unwrap();
    say("export", started.elapsed(), unit);
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    zipped.write_all(&lines).unwrap();
    let zipped = zipped.finish().unwrap();
    println!(
        "an export has {} bytes a record, {} gzipped",
        lines.len() / RECORDS as usize,
        zipped.len() / RECORDS as usize
    );
    for _ in 0..3 {
        for (what, bytes) in [("verify of an export", &lines), ("verify of a gzipped export", &zipped)] {
            let started = Instant::now();
            let report = verify_exports([bytes.as_slice()], &Trust::new()).unwrap();
            say(what, started.elapsed(), unit);
            assert!(report.is_clean() && report.records == u64::from(RECORDS));
        }
    }
}
