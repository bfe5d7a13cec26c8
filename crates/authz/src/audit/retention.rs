//! How long the trail is kept: partitions for the coming months, and old months exported and dropped.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use chrono::{Datelike, NaiveDate};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use sqlx::{Connection, PgConnection, PgPool};

use super::canonical::{Hasher, Place};
use super::export::export_in;
use super::reading::begin_reading;
use super::seal::{SigningKey, micros, seal, seals_after};
use super::silence::{WORK, end_with_us, within};
use super::verify::{differences, pruned, verify_exports};
use super::{Actor, Digest, Exported, Trust, act_as, checkpoint};
use crate::error::Error;
use crate::lent::Lent;

/// For how many months ahead there is a partition.
pub const MONTHS_AHEAD: u16 = 3;

/// Makes the partitions of this month and of the next ones; says how many it made.
///
/// # Errors
/// [`Error::Database`] if the database does not answer, or if readers did not let it work within two seconds: then a
/// later attempt will do, records go to a default partition meanwhile.
pub async fn make_partitions(pool: &PgPool, months_ahead: u16) -> Result<u32, Error> {
    let mut connection = Lent::from(pool).await?;
    let making =
        sqlx::query_scalar!(r#"select authz.make_audit_partitions($1) as "made!""#, i32::from(months_ahead))
            .fetch_one(&mut *connection);
    let made = within(WORK, async { Ok(making.await?) }).await?;
    connection.give_back();
    Ok(made.unsigned_abs())
}

/// The first day of the month, in UTC, that came so many months before the one under way.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn months_ago(pool: &PgPool, months: u16) -> Result<NaiveDate, Error> {
    let day = sqlx::query_scalar!(
        r#"select (date_trunc('month', now() at time zone 'UTC') - make_interval(months => $1))::date as "day!""#,
        i32::from(months)
    )
    .fetch_one(pool)
    .await?;
    Ok(day)
}

/// What a run of [`prune`] did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Pruning {
    /// The partitions that are gone; none if there was nothing to do.
    pub dropped: Vec<String>,
    /// What was exported before.
    pub exported: Option<Exported>,
    /// The export.
    pub file: Option<PathBuf>,
    /// The SHA-256 of the export.
    pub sha256: Option<Digest>,
}

/// Removes the months before the one that `before` is in: seals what is there; exports into `folder` all that was sealed
/// since the run before, gzipped; reads the export back and verifies it; holds the grants against the trail; and drops
/// the months, with a baseline of the grants for later replays and a record of itself in the same transaction.
///
/// The files of all runs together, in their order, are the whole chain. The chain in the database still verifies, from
/// what the seals say of each record. Stops readers and writers of the trail for the last step, which the database by itself
/// refuses if a month holds a record that is in no seal.
///
/// # Errors
/// [`Error::TrailAltered`], [`Error::StateDiffers`], [`Error::MonthNotRemovable`] if a transaction under way holds
/// records back, [`Error::Export`], [`Error::Database`]; nothing is dropped then.
pub async fn prune(
    pool: &PgPool,
    before: NaiveDate,
    folder: &Path,
    key: Option<&SigningKey>,
    actor: &Actor,
) -> Result<Pruning, Error> {
    let before = before.with_day(1).unwrap_or(before);
    make_partitions(pool, MONTHS_AHEAD).await?;
    if !has_month_before(pool, before).await? {
        return Ok(Pruning { dropped: Vec::new(), exported: None, file: None, sha256: None });
    }
    seal(pool, key).await?;
    let differ = super::verify_state(pool).await?.len();
    if differ > 0 {
        return Err(Error::StateDiffers(differ));
    }

    // INVARIANT: what was done so far held no connection meanwhile, so a pool of one will do (held by the test
    // `one_connection_is_enough_to_prune`).
    let mut connection = Lent::from(pool).await?;
    let mut tx = begin_reading(&mut connection).await?;
    let first = pruned(&mut tx).await?.map_or(1, |pruned| pruned.through_seal.saturating_add(1));
    let last = checkpoint(&mut *tx).await?.map_or(0, |checkpoint| checkpoint.seal_id);
    let file = folder.join(format!("audit-{first:012}-{last:012}.ndjson.gz"));
    let exported = write_file(&mut tx, first, &file).await?;
    tx.rollback().await?;
    let sha256 = read_back(&mut connection, &file, &exported).await?;

    let tx = connection.begin_with("begin isolation level read committed").await?;
    let dropped = match drop_months(tx, before, actor, &exported, &file, sha256).await {
        Ok((tx, dropped)) => {
            // Whether a commit that fails took place is not known, so the file stays.
            tx.commit().await?;
            dropped
        }
        Err(error) => {
            // Nothing was dropped, and the next attempt writes these records again.
            let _ = std::fs::remove_file(&file);
            return Err(error);
        }
    };
    connection.give_back();
    Ok(Pruning { dropped, exported: Some(exported), file: Some(file), sha256: Some(sha256) })
}

/// The last step of [`prune`], but for its commit.
async fn drop_months<'c>(
    mut tx: sqlx::Transaction<'c, sqlx::Postgres>,
    before: NaiveDate,
    actor: &Actor,
    exported: &Exported,
    file: &Path,
    sha256: Digest,
) -> Result<(sqlx::Transaction<'c, sqlx::Postgres>, Vec<String>), Error> {
    let checkpoint = exported.checkpoint.as_ref();
    let through_seal =
        checkpoint.map_or(exported.first_seal.saturating_sub(1), |checkpoint| checkpoint.seal_id);
    end_with_us(&mut tx).await?;
    act_as(&mut tx, actor).await?;
    sqlx::query!("set local lock_timeout = '5s'").execute(&mut *tx).await?;
    sqlx::query!("select authz.hold_audit_trail(exclusive => true)").fetch_one(&mut *tx).await?;
    let unsealed = beyond(&mut tx, before, through_seal).await?;
    if unsealed > 0 {
        let reason = format!("{unsealed} of its records are not sealed and exported yet; try again later");
        return Err(Error::MonthNotRemovable { month: before, reason });
    }
    let differ = differences(&mut tx).await?.len();
    if differ > 0 {
        return Err(Error::StateDiffers(differ));
    }
    sqlx::query!("select authz.write_audit_baseline()").fetch_one(&mut *tx).await?;
    let dropped = sqlx::query_scalar!(r#"select authz.drop_audit_months($1) as "dropped!""#, before)
        .fetch_one(&mut *tx)
        .await?;
    let midnight = before.and_time(chrono::NaiveTime::MIN).and_utc();
    let detail = serde_json::json!({
        "before": before, "before_micros": micros(midnight), "through_seal": through_seal,
        "through_digest": checkpoint.map(|checkpoint| checkpoint.digest), "dropped": dropped,
        "file": file.file_name().map(|name| name.to_string_lossy()), "sha256": sha256,
    });
    sqlx::query!(r#"select authz.note_audit_prune($1) as "audit_id!""#, detail).fetch_one(&mut *tx).await?;
    Ok((tx, dropped))
}

async fn has_month_before(pool: &PgPool, before: NaiveDate) -> Result<bool, Error> {
    let found = sqlx::query_scalar!(
        r#"
        select exists (select from pg_inherits i join pg_class c on c.oid = i.inhrelid
                       where i.inhparent = 'authz.audit_log'::regclass and c.relname ~ '^audit_log_[0-9]{6}$'
                         and right(c.relname, 6) < to_char($1::date, 'YYYYMM')) as "found!"
        "#,
        before,
    )
    .fetch_one(pool)
    .await?;
    Ok(found)
}

async fn write_file(connection: &mut PgConnection, first: i64, path: &Path) -> Result<Exported, Error> {
    // Never over a file that is there: it may be the only copy of what an earlier run dropped.
    let file = File::options().write(true).create_new(true).open(path).map_err(Error::Export)?;
    let written = async {
        let mut out = GzEncoder::new(BufWriter::new(&file), Compression::default());
        let exported = export_in(connection, first, None, &mut out).await?;
        out.finish().and_then(|mut out| out.flush()).map_err(Error::Export)?;
        file.sync_all().map_err(Error::Export)?;
        Ok(exported)
    }
    .await;
    if written.is_err() {
        let _ = std::fs::remove_file(path);
    }
    written
}

/// Verifies the file as it is on disk; gives its digest.
async fn read_back(connection: &mut PgConnection, path: &Path, exported: &Exported) -> Result<Digest, Error> {
    let mut trust = Trust::new();
    let before = seals_after(&mut *connection, exported.first_seal.saturating_sub(2), 1).await?.pop();
    if let Some(before) = before.filter(|seal| seal.seal_id == exported.first_seal.saturating_sub(1)) {
        trust = trust.checkpoint(before.checkpoint());
    }
    if let Some(checkpoint) = &exported.checkpoint {
        trust = trust.checkpoint(checkpoint.clone());
    }
    let path = path.to_owned();
    let read = move || {
        let report = verify_exports([File::open(&path).map_err(Error::Export)?], &trust)?;
        if let Some(finding) = report.finding {
            return Err(Error::TrailAltered(finding));
        }
        let mut file = File::open(&path).map_err(Error::Export)?;
        let mut hasher = Hasher::new();
        let mut piece = vec![0; 1 << 16];
        loop {
            let read = file.read(&mut piece).map_err(Error::Export)?;
            match piece.get(..read) {
                Some(some) if !some.is_empty() => hasher.update(some),
                _ => return Ok(hasher.finish()),
            }
        }
    };
    tokio::task::spawn_blocking(read).await.map_err(|e| Error::Export(std::io::Error::other(e)))?
}

/// How many records of before that day are in no seal up to this one. With writers held off.
async fn beyond(connection: &mut PgConnection, before: NaiveDate, through_seal: i64) -> Result<u64, Error> {
    let through = seals_after(&mut *connection, through_seal.saturating_sub(1), 1).await?.pop();
    // The closing seals of an era come in one go; a chain that stops among them is not through with anything.
    let (base, until, last) = match through {
        Some(seal) if seal.ends_era() => (seal.last_audit_id, Place::START, i64::MAX),
        Some(seal) if !seal.closing => (seal.base_audit_id, seal.until(), seal.last_audit_id),
        _ => (i64::MIN, Place::START, i64::MAX),
    };
    let count = sqlx::query_scalar!(
        r#"
        select count(*) as "count!" from authz.audit_log
        where recorded_at < $1::date::timestamp at time zone 'UTC' and audit_id > $2
          and ((transaction_id, audit_id) >= ($3::text::xid8, $4) or audit_id > $5)
        "#,
        before,
        base,
        until.transaction_id.to_string(),
        until.audit_id,
        last,
    )
    .fetch_one(connection)
    .await?;
    Ok(count.unsigned_abs())
}
