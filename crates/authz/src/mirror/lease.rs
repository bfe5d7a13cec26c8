//! One run per directory at a time: a lease row with a heartbeat, and the run's id as the fencing token.
//!
//! Rows and their clock are all it needs, so it works through a connection pooler.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::stage::storable;
use super::stage_members::Staging;
use crate::audit::line::{ERROR_LIMIT, shorten};
use crate::audit::{self, Actor, Outcome, Record};
use crate::error::Error;
use crate::name::DirectoryName;

/// How long a lease outlives the last heartbeat of its holder.
pub const LEASE_TTL: Duration = Duration::from_secs(15);
/// How often the holder shows that it lives.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// One run of a sync: holds the lease of its directory until it is finished or dropped.
#[derive(Debug)]
#[expect(clippy::struct_field_names, reason = "`run_id` is what the tables call it")]
pub struct Run {
    pub(super) pool: PgPool,
    pub(super) run_id: i64,
    pub(super) directory: DirectoryName,
    pub(super) directory_id: i32,
    pub(super) customer_id: Option<String>,
    pub(super) staged: Arc<Staged>,
    pub(super) staging: tokio::sync::Mutex<Staging>,
    /// Steps of the staging that have begun and have not come to their end.
    pub(super) open_steps: AtomicU64,
    pub(super) heartbeat: JoinHandle<()>,
    pub(super) backend: Arc<AtomicI32>,
    lost: watch::Receiver<bool>,
}

/// Interrupts the statement that a run has under way in its plan or apply, so that it ends now and with an error.
#[derive(Debug, Clone)]
pub struct Interrupt {
    pool: PgPool,
    backend: Arc<AtomicI32>,
}

impl Interrupt {
    /// Interrupts what is under way at this moment; nothing, if nothing is.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn now(&self) -> Result<(), Error> {
        let backend = self.backend.load(Ordering::Relaxed);
        if backend != 0 {
            sqlx::query_scalar!(r#"select pg_cancel_backend($1) as "cancelled!""#, backend)
                .fetch_one(&self.pool)
                .await?;
        }
        Ok(())
    }
}

/// Rows that are in staging as far as we know; staging tables are unlogged, and a crash empties them.
#[derive(Debug, Default)]
pub(super) struct Staged {
    pub(super) users: AtomicU64,
    pub(super) groups: AtomicU64,
    pub(super) members: AtomicU64,
    pub(super) unseen_users: AtomicU64,
    pub(super) gone_members: AtomicU64,
    /// Listed just as the mirror has them, and therefore not staged.
    pub(super) same_users: AtomicU64,
    pub(super) same_members: AtomicU64,
    /// Groups whose members were listed, and not just as the mirror has them.
    pub(super) listed_groups: AtomicU64,
    /// Users of the mirror when the run began, and the revision before they were read.
    pub(super) known_users: AtomicU64,
    pub(super) known_at: AtomicI64,
}

impl Staged {
    /// Rows that are in staging because the mirror has them otherwise, or may have. Groups always are.
    pub(super) fn differences(&self) -> u64 {
        self.rows() - self.groups.load(Ordering::Relaxed)
    }

    /// Whether the rows in staging that name a user are so few that each user is better looked up than all are read.
    pub(super) fn names_few_users(&self) -> bool {
        let rows = [&self.members, &self.unseen_users, &self.gone_members];
        let rows: u64 = rows.iter().map(|rows| rows.load(Ordering::Relaxed)).sum();
        rows < self.known_users.load(Ordering::Relaxed) / 8
    }

    /// Rows that are in staging.
    pub(super) fn rows(&self) -> u64 {
        let tables = [&self.users, &self.groups, &self.members, &self.unseen_users, &self.gone_members];
        tables.iter().map(|rows| rows.load(Ordering::Relaxed)).sum()
    }
}

impl Run {
    /// Begins a run: makes the directory if this is its first, takes the lease, and clears what runs that
    /// were killed left behind. `source` is written into the run's record.
    ///
    /// A lease whose holder no longer shows signs of life is waited for, [`LEASE_TTL`] or a little more.
    ///
    /// # Errors
    /// [`Error::LeaseHeld`] as soon as the holder has shown that it lives; [`Error::LocalDirectory`];
    /// [`Error::NotMigrated`].
    pub async fn begin(pool: &PgPool, directory: &DirectoryName, source: &str) -> Result<Self, Error> {
        if directory.is_local() {
            return Err(Error::LocalDirectory);
        }
        let (directory_id, customer_id) = directory_row(pool, directory).await?;
        let run_id = acquire(pool, directory, directory_id, source).await?;
        let (losing, lost) = watch::channel(false);
        let heartbeat = tokio::spawn(beat(pool.clone(), directory_id, run_id, losing));
        let run = Self {
            pool: pool.clone(),
            run_id,
            directory: directory.clone(),
            directory_id,
            customer_id,
            staged: Arc::default(),
            staging: tokio::sync::Mutex::new(Staging::reading(pool, directory_id)),
            open_steps: AtomicU64::new(0),
            heartbeat,
            backend: Arc::default(),
            lost,
        };
        // With the heartbeat already: there may be much to clear.
        clear_earlier_runs(pool, directory_id, run_id).await?;
        Ok(run)
    }

    /// The number of this run, in `authz.sync_runs`.
    #[must_use]
    pub const fn id(&self) -> i64 {
        self.run_id
    }

    /// Waits until the lease is found to be another run's: what this one goes on to do is for nothing.
    ///
    /// It is only to save effort. What keeps a run without its lease from writing is the check in [`Run::plan`].
    pub async fn lost(&self) {
        let mut lost = self.lost.clone();
        if lost.wait_for(|lost| *lost).await.is_err() {
            std::future::pending::<()>().await; // the heartbeat ended, and the lock on the lease took over
        }
    }

    /// What interrupts the plan or the apply of this run.
    #[must_use]
    pub fn interrupt(&self) -> Interrupt {
        Interrupt { pool: self.pool.clone(), backend: Arc::clone(&self.backend) }
    }

    /// Ends a run that could not do its work: the mirror stays as it was. `message` is kept in the record.
    ///
    /// # Errors
    /// [`Error::Database`] if not even this could be written; the lease then ends by itself.
    pub async fn fail(mut self, message: &str, api_calls: u64, actor: &Actor) -> Result<Failure, Error> {
        // It may have the last connections of the pool.
        self.staging.get_mut().stop();
        record_failure(&self.pool, self.run_id, message, api_calls, actor).await
    }
}

/// What became of a run that went wrong, by the database.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Failure {
    /// Its record says `failed` now. It has changed nothing, and what it may still have under way will change nothing.
    Recorded,
    /// Another run has taken its lease over. It has changed nothing.
    LeaseLost,
    /// It had ended before, with this status: it was only the answer that did not arrive.
    EndedBefore(String),
}

/// Records that a run failed, and gives its lease back, for a run whose [`Run`] went into a failed plan or apply.
/// A run that is ended already keeps its record, and that is what the answer says then.
///
/// What the run still has under way in its plan or apply is waited for, the lease being locked by it: [`LEASE_TTL`] or a
/// little more, if it has gone silent.
// INVARIANT: an apply whose failure is recorded is not committed later (held by the tests in
// `crates/dir-sync/tests/answer_lost.rs`). It has the lease row locked until its end, and that is waited for here
// before anything is recorded; one that has not come to that lock finds the lease gone.
///
/// # Errors
/// [`Error::Database`] if not even this could be written; the lease then ends by itself.
pub async fn record_failure(
    pool: &PgPool,
    run_id: i64,
    message: &str,
    api_calls: u64,
    actor: &Actor,
) -> Result<Failure, Error> {
    let mut attempts = 0;
    loop {
        match try_record_failure(pool, run_id, message, api_calls, actor).await {
            // An interrupt that was meant for the statement before.
            Err(Error::Database(error)) if attempts < 3 && has_code(&error, "57014") => attempts += 1,
            other => return other,
        }
    }
}

async fn try_record_failure(
    pool: &PgPool,
    run_id: i64,
    message: &str,
    api_calls: u64,
    actor: &Actor,
) -> Result<Failure, Error> {
    let mut tx = crate::begin(pool).await?;
    let closing = Closing { status: "failed", hash: None, counts: None, message: Some(message), api_calls };
    let closed = close(&mut tx, run_id, &closing).await?;
    let failure = if let Some(directory) = closed.directory {
        let detail = serde_json::json!({"run_id": run_id, "status": "failed", "message": shorten(&storable(message), ERROR_LIMIT)});
        let record = Record::new("directory.sync", Outcome::Failed).target(&directory).detail(detail);
        audit::record(&mut *tx, actor, &record).await?;
        if closed.had_lease { Failure::Recorded } else { Failure::LeaseLost }
    } else {
        let status = sqlx::query_scalar!("select status from authz.sync_runs where run_id = $1", run_id);
        match status.fetch_one(&mut *tx).await? {
            status if status == "abandoned" => Failure::LeaseLost,
            status => Failure::EndedBefore(status),
        }
    };
    tx.commit().await?;
    Ok(failure)
}

/// What the end of a run found.
pub(super) struct Closed {
    /// The directory's name, unless the run had ended before.
    directory: Option<String>,
    /// Whether the lease was still the run's.
    had_lease: bool,
}

/// Writes the end of a run into its record, unless it has one, empties its staging area and gives the lease back.
pub(super) async fn close(
    tx: &mut PgConnection,
    run_id: i64,
    closing: &Closing<'_>,
) -> Result<Closed, Error> {
    // First, because an apply has it locked before all else.
    let given_back =
        sqlx::query!("delete from authz.sync_leases where run_id = $1", run_id).execute(&mut *tx).await?;
    let directory = sqlx::query_scalar!(
        r#"
        update authz.sync_runs r
        set status = $2, finished_at = clock_timestamp(), plan_hash = $3, counts = $4, api_calls = $5, message = $6
        from authz.directories d
        where r.run_id = $1 and r.status = 'running' and d.directory_id = r.directory_id
        returning d.directory_name
        "#,
        run_id,
        closing.status,
        closing.hash,
        closing.counts,
        i64::try_from(closing.api_calls).unwrap_or(i64::MAX),
        closing.message.map(storable),
    )
    .fetch_optional(&mut *tx)
    .await?;
    clear(&mut *tx, &[run_id]).await?;
    Ok(Closed { directory, had_lease: given_back.rows_affected() > 0 })
}

impl Drop for Run {
    fn drop(&mut self) {
        self.heartbeat.abort();
    }
}

/// How a run ends.
pub(super) struct Closing<'a> {
    pub(super) status: &'a str,
    pub(super) hash: Option<&'a str>,
    pub(super) counts: Option<serde_json::Value>,
    pub(super) message: Option<&'a str>,
    pub(super) api_calls: u64,
}

async fn directory_row(pool: &PgPool, directory: &DirectoryName) -> Result<(i32, Option<String>), Error> {
    sqlx::query!(
        "insert into authz.directories (directory_name) values ($1) on conflict (directory_name) do nothing",
        directory.as_str()
    )
    .execute(pool)
    .await?;
    let row = sqlx::query!(
        "select directory_id, customer_id from authz.directories where directory_name = $1",
        directory.as_str()
    )
    .fetch_one(pool)
    .await?;
    Ok((row.directory_id, row.customer_id))
}

/// Takes the lease, or finds out whether its holder lives by watching for a heartbeat.
async fn acquire(
    pool: &PgPool,
    directory: &DirectoryName,
    directory_id: i32,
    source: &str,
) -> Result<i64, Error> {
    let mut seen = None;
    loop {
        let locked = match try_acquire(pool, directory_id, source).await {
            Ok(Some(run_id)) => return Ok(run_id),
            Ok(None) => false,
            Err(Error::Database(error)) if has_code(&error, "55P03") => true, // lock_not_available
            Err(error) => return Err(error),
        };
        let holder = sqlx::query!(
            "select run_id, heartbeat_at from authz.sync_leases where directory_id = $1",
            directory_id
        )
        .fetch_optional(pool)
        .await?
        .map(|row| (row.run_id, row.heartbeat_at));
        if let (Some(before), Some(now)) = (seen.or(holder), holder) {
            // It renewed the lease, or has held its lock for so long that it is no leftover of a killed run.
            if before != now || locked {
                return Err(Error::LeaseHeld { directory: directory.clone(), run_id: now.0 });
            }
        }
        seen = holder;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn try_acquire(pool: &PgPool, directory_id: i32, source: &str) -> Result<Option<i64>, Error> {
    let mut tx = crate::begin(pool).await?;
    // A run that applies has the row locked; one that was killed meanwhile lets go when the server notices.
    sqlx::query!(
        r#"select set_config('lock_timeout', $1, true) as "t!""#,
        format!("{}ms", LEASE_TTL.as_millis())
    )
    .fetch_one(&mut *tx)
    .await?;
    let run_id = sqlx::query_scalar!(
        "insert into authz.sync_runs (directory_id, source) values ($1, $2) returning run_id",
        directory_id,
        source,
    )
    .fetch_one(&mut *tx)
    .await?;
    let taken = sqlx::query!(
        r#"
        insert into authz.sync_leases (directory_id, run_id, heartbeat_at, expires_at)
        values ($1, $2, clock_timestamp(), clock_timestamp() + make_interval(secs => $3))
        on conflict (directory_id) do update
            set run_id = excluded.run_id, heartbeat_at = excluded.heartbeat_at, expires_at = excluded.expires_at
            where sync_leases.expires_at <= clock_timestamp()
        returning run_id
        "#,
        directory_id,
        run_id,
        LEASE_TTL.as_secs_f64(),
    )
    .fetch_optional(&mut *tx)
    .await?;
    if taken.is_none() {
        tx.rollback().await?;
        return Ok(None);
    }
    tx.commit().await?;
    Ok(Some(run_id))
}

pub(super) fn has_code(error: &sqlx::Error, wanted: &str) -> bool {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).is_some_and(|code| code == wanted)
}

async fn clear_earlier_runs(pool: &PgPool, directory_id: i32, run_id: i64) -> Result<(), Error> {
    let earlier = sqlx::query_scalar!(
        r#"
        update authz.sync_runs set status = 'abandoned', finished_at = clock_timestamp(), message = 'killed, or lost its lease'
        where directory_id = $1 and run_id < $2 and status = 'running'
        returning run_id
        "#,
        directory_id,
        run_id,
    )
    .fetch_all(pool)
    .await?;
    if !earlier.is_empty() {
        tracing::warn!(?earlier, "earlier runs did not end; their staging areas are cleared");
    }
    // One that lost its lease, staged on and was then killed has an end and rows, so the rows say what is left over.
    let staged = sqlx::query_scalar!(
        r#"
        select s.run_id as "run_id!"
        from (
            select run_id from authz.sync_stage_users
            union select run_id from authz.sync_stage_groups
            union select run_id from authz.sync_stage_members
            union select run_id from authz.sync_stage_gone_members
        ) s
        join authz.sync_runs r on r.run_id = s.run_id
        where r.directory_id = $1 and r.run_id < $2
        "#,
        directory_id,
        run_id,
    )
    .fetch_all(pool)
    .await?;
    let leftover: Vec<_> = earlier.into_iter().chain(staged).collect();
    if leftover.is_empty() {
        return Ok(());
    }
    clear(&mut *pool.acquire().await?, &leftover).await
}

/// Empties the staging areas of runs.
async fn clear(connection: &mut PgConnection, runs: &[i64]) -> Result<(), Error> {
    sqlx::query!(
        r#"
        with stage_users as (delete from authz.sync_stage_users where run_id = any ($1)),
             stage_groups as (delete from authz.sync_stage_groups where run_id = any ($1)),
             stage_members as (delete from authz.sync_stage_members where run_id = any ($1)),
             stage_gone_members as (delete from authz.sync_stage_gone_members where run_id = any ($1)),
             stage_unseen_users as (delete from authz.sync_stage_unseen_users where run_id = any ($1)),
             plan_users as (delete from authz.sync_plan_users where run_id = any ($1)),
             plan_groups as (delete from authz.sync_plan_groups where run_id = any ($1)),
             plan_members as (delete from authz.sync_plan_members where run_id = any ($1))
        delete from authz.sync_plan_conflicts where run_id = any ($1)
        "#,
        runs,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Renews the lease until it is aborted. A failed renewal is only a warning: the fencing check inside the
/// apply transaction decides, not this.
async fn beat(pool: PgPool, directory_id: i32, run_id: i64, losing: watch::Sender<bool>) {
    let mut ticks = tokio::time::interval(HEARTBEAT_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let renewed = sqlx::query!(
            r#"
            update authz.sync_leases
            set heartbeat_at = clock_timestamp(), expires_at = clock_timestamp() + make_interval(secs => $3)
            where directory_id = $1 and run_id = $2
            "#,
            directory_id,
            run_id,
            LEASE_TTL.as_secs_f64(),
        )
        .execute(&pool)
        .await;
        match renewed {
            Ok(done) if done.rows_affected() == 0 => {
                tracing::warn!(run_id, "the lease is not ours any more");
                losing.send_replace(true);
                return;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(run_id, %error, "the lease could not be renewed; trying again"),
        }
    }
}
