//! A migrated database per test, directories built in a few words, and what the mirror then has to be.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod change;
mod keyless;
mod mirror;
mod org;
mod program;
mod proxy;
mod workspace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use authz::DirectoryName;
use authz::audit::Actor;
use dir_sync::guard::Limits;
use dir_sync::source::Source;
use dir_sync::{DirectorySync, Options, Report, Status};
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool};
use testdb::Database;

pub(crate) use self::change::{changed, with_changing_parts};
pub(crate) use self::mirror::Mirror;
pub(crate) use self::org::Org;
pub(crate) use self::program::{Outcome, Program, Running};
pub(crate) use self::proxy::{Proxy, Way};
pub(crate) use self::workspace::{Workspace, workspace};

/// The directory of every test that needs only one.
pub(crate) const MAIN: &str = "main";
/// What tests grant.
pub(crate) const ACTION: &str = "workers.scale";
/// Far longer than anything takes; reached only when a test fails.
pub(crate) const DEADLINE: Duration = Duration::from_mins(2);

/// The database goes when the first is dropped, so keep it.
pub(crate) async fn database() -> (Database, PgPool) {
    let database = Database::create(&authz::schema_fingerprint(), |url| async move {
        let pool = PgPool::connect(&url).await?;
        authz::migrate(&pool).await?;
        pool.close().await;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    })
    .await
    .unwrap();
    let pool = connect(database.url()).await;
    (database, pool)
}

pub(crate) async fn connect(url: &str) -> PgPool {
    PgPoolOptions::new().max_connections(6).connect(url).await.unwrap()
}

pub(crate) fn name(directory: &str) -> DirectoryName {
    directory.parse().unwrap()
}

pub(crate) fn actor() -> Actor {
    Actor::new("tests", "tests")
}

/// A real organisation at one of three moments: `2025-01`, `2026-01`, `2026-08`.
pub(crate) fn organisation(moment: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../examples/data/org-{moment}.json.gz"))
}

/// Whatever goes may go.
pub(crate) fn unlimited() -> Options {
    let limits = Limits::NONE;
    Options { limits, ..Options::default() }
}

pub(crate) fn include_external() -> Options {
    Options { include_external: true, ..Options::default() }
}

pub(crate) fn adopt_local() -> Options {
    Options { adopt_local: true, ..Options::default() }
}

pub(crate) fn approve(report: &Report) -> Options {
    Options { approve: report.plan_hash.clone(), ..Options::default() }
}

/// Runs a sync, and sees that it leaves nothing behind, however it ends.
pub(crate) async fn run(pool: &PgPool, directory: &str, source: Arc<dyn Source>, options: Options) -> Report {
    let report = DirectorySync::new(pool.clone(), name(directory), source).options(options).run().await;
    if let Some(run_id) = report.run_id {
        assert_cleared(pool, run_id).await;
    }
    report
}

pub(crate) async fn sync(pool: &PgPool, directory: &str, org: &Org) -> Report {
    run(pool, directory, org.source(), Options::default()).await
}

pub(crate) async fn sync_with(pool: &PgPool, directory: &str, org: &Org, options: Options) -> Report {
    run(pool, directory, org.source(), options).await
}

/// A sync of `main` that has something to do and does it: the mirror then is what the directory is.
pub(crate) async fn applied(pool: &PgPool, org: &Org) -> Report {
    applied_with(pool, org, Options::default()).await
}

pub(crate) async fn applied_with(pool: &PgPool, org: &Org, options: Options) -> Report {
    let report = sync_with(pool, MAIN, org, options).await;
    assert_eq!(report.status, Status::Applied, "{report}");
    assert_eq!(Mirror::read(pool, MAIN).await, Mirror::wanted(&org.json(), false));
    report
}

/// No lease, no staged row and no planned row of the run is left, and its record has an end.
pub(crate) async fn assert_cleared(pool: &PgPool, run_id: i64) {
    for table in [
        "sync_leases",
        "sync_stage_users",
        "sync_stage_groups",
        "sync_stage_members",
        "sync_stage_gone_members",
        "sync_stage_unseen_users",
        "sync_plan_users",
        "sync_plan_groups",
        "sync_plan_members",
        "sync_plan_conflicts",
    ] {
        let sql = format!("select count(*) from authz.{table} where run_id = $1");
        let left: i64 = sqlx::query_scalar(AssertSqlSafe(sql)).bind(run_id).fetch_one(pool).await.unwrap();
        assert_eq!(left, 0, "rows of run {run_id} are left in {table}");
    }
    assert_ne!(run_status(pool, run_id).await, "running");
}

pub(crate) async fn run_status(pool: &PgPool, run_id: i64) -> String {
    sqlx::query_scalar("select status from authz.sync_runs where run_id = $1")
        .bind(run_id)
        .fetch_one(pool)
        .await
        .unwrap()
}

/// Every row of what a decision depends on, each with the place and the transaction that wrote it: equal before and
/// after only if nothing was written, not even the same again.
pub(crate) async fn written_rows(pool: &PgPool) -> BTreeMap<&'static str, Vec<String>> {
    let mut rows = BTreeMap::new();
    for table in [
        "users",
        "groups",
        "group_users",
        "group_groups",
        "group_directories",
        "group_ancestors",
        "user_actions",
        "group_actions",
        "changes",
    ] {
        let sql = format!("select concat_ws(' ', ctid, xmin, t) from authz.{table} t order by 1");
        rows.insert(table, sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(pool).await.unwrap());
    }
    // Its row alone may be written as it was: where a digest is remembered.
    rows.insert("revision", vec![number(pool, "select revision from authz.revision").await.to_string()]);
    rows
}

pub(crate) async fn execute(pool: &PgPool, sql: &'static str) {
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
}

pub(crate) async fn text(pool: &PgPool, sql: &'static str) -> String {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

pub(crate) async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

pub(crate) fn address(name: &str) -> String {
    if name.contains('@') { name.to_owned() } else { format!("{name}@example.com") }
}

/// Whether the user may do what tests grant.
pub(crate) async fn can(pool: &PgPool, user: &str) -> bool {
    sqlx::query_scalar("select authz.can($1, $2)")
        .bind(address(user))
        .bind(ACTION)
        .fetch_one(pool)
        .await
        .unwrap()
}

pub(crate) async fn grant_to_user(pool: &PgPool, user: &str) {
    register(pool).await;
    let granted = sqlx::query(
        "insert into authz.user_actions (user_id, action_name)
         select user_id, $2 from authz.users where user_name = $1 and status <> 'deleted'",
    )
    .bind(address(user))
    .bind(ACTION)
    .execute(pool)
    .await
    .unwrap();
    assert_eq!(granted.rows_affected(), 1, "user {user} is not known");
}

pub(crate) async fn grant_to_group(pool: &PgPool, group: &str) {
    register(pool).await;
    let granted = sqlx::query(
        "insert into authz.group_actions (group_id, action_name)
         select group_id, $2 from authz.groups where group_name = $1 and status <> 'deleted'",
    )
    .bind(address(group))
    .bind(ACTION)
    .execute(pool)
    .await
    .unwrap();
    assert_eq!(granted.rows_affected(), 1, "group {group} is not known");
}

async fn register(pool: &PgPool) {
    sqlx::query("insert into authz.actions (action_name) values ($1) on conflict do nothing")
        .bind(ACTION)
        .execute(pool)
        .await
        .unwrap();
}

/// The conflicts of a report: kind, the directory's id, name, reason.
pub(crate) fn conflicts(report: &Report) -> Vec<(&str, &str, &str, &str)> {
    let conflicts = &report.plan.as_ref().unwrap().conflicts;
    conflicts.iter().map(|c| (&*c.kind, &*c.external_id, &*c.name, &*c.reason)).collect()
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(DEADLINE, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain until {what}");
}

/// Whether a session other than the asking one waits for a lock on this table, or for any while it runs a statement
/// that has this in it.
pub(crate) async fn waits_for_lock(pool: &PgPool, statement: &str) -> bool {
    sqlx::query_scalar(
        "select exists (select from pg_stat_activity a
                        where a.datname = current_database() and a.wait_event_type = 'Lock' and a.pid <> pg_backend_pid()
                          and (strpos(a.query, $1) > 0
                               or exists (select from pg_locks l
                                          where l.pid = a.pid and not l.granted and l.relation = case when $1 ~ '^[a-z_.]+$' then to_regclass($1) end)))",
    )
    .bind(statement)
    .fetch_one(pool)
    .await
    .unwrap()
}

/// The lease of a dead holder ends now, not in a while.
pub(crate) async fn expire_leases(pool: &PgPool) {
    execute(pool, "update authz.sync_leases set expires_at = clock_timestamp() - interval '1 second'").await;
}
