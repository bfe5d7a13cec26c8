//! Verifies the trail in its database.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool};

use super::walk::next_group;
use super::{Chain, Finding, Mismatch, Problem, Report, Trust, locate};
use crate::audit::canonical::{Encoder, Place};
use crate::audit::reading::begin_reading;
use crate::audit::seal::{Forms, copy_range, last_seal, moment, normal_end};
use crate::error::Error;
use crate::lent::Lent;

/// Holds every sealed record against its seal and every seal against the one before, against `trust`, and says what
/// is the first that does not fit. Works in one snapshot of the database, beside writers and sealers.
///
/// # Errors
/// [`Error::Database`] if the database does not answer. What does not fit is no error, it is in the report.
pub async fn verify(pool: &PgPool, trust: &Trust) -> Result<Report, Error> {
    let mut connection = Lent::from(pool).await?;
    let mut tx = begin_reading(&mut connection).await?;
    let mut chain = Chain::new(trust.clone());
    let pruned = pruned(&mut tx).await?;
    chain.report.pruned_before = pruned.and_then(|pruned| moment(pruned.before));
    chain.begins_at(1);
    let found = follow(&mut tx, &mut chain, pruned).await?;
    let found = match found {
        None => tail(&mut tx, &mut chain).await?,
        found => found,
    };
    chain.report.finding = found;
    chain.end();
    tx.rollback().await?;
    connection.give_back();
    Ok(chain.report)
}

async fn follow(
    connection: &mut PgConnection,
    chain: &mut Chain,
    pruned: Option<Pruned>,
) -> Result<Option<Finding>, Error> {
    let mut encoder = Encoder::new();
    let mut records = Vec::new();
    while let Some((seals, range)) = next_group(connection, chain.previous()).await? {
        records.clear();
        let mut forms = Forms::of(&seals);
        copy_range(connection, &range, |row| {
            records.push(encoder.row(row, |place| forms.at(place))?);
            Ok(())
        })
        .await?;
        let mut rest = records.as_slice();
        for seal in &seals {
            let (mine, left) = rest.split_at(rest.partition_point(|record| record.place() < seal.until()));
            rest = left;
            if let Err(finding) = chain.link(seal) {
                return Ok(Some(finding));
            }
            let mut entries = Vec::new();
            if let Err(Mismatch) = Chain::records(seal, mine) {
                let found = entries_of(connection, seal.seal_id..=seal.seal_id).await?;
                entries = found.into_iter().next().unwrap_or_default();
                if let Err(finding) = locate(seal, mine, &entries, pruned) {
                    return Ok(Some(finding));
                }
            }
            if let Err(finding) = chain.removed.see(seal, mine, &entries, pruned) {
                return Ok(Some(finding));
            }
            if let Err(finding) = chain.times(seal, mine) {
                return Ok(Some(finding));
            }
            chain.done(seal, mine.len());
        }
    }
    Ok(None)
}

/// Counts what is not sealed yet, and looks for records that pretend to be older than that.
async fn tail(connection: &mut PgConnection, chain: &mut Chain) -> Result<Option<Finding>, Error> {
    let last = last_seal(&mut *connection).await?;
    let ended = last.as_ref().is_some_and(crate::audit::seal::Seal::ends_era);
    let (era, from) = last.as_ref().map_or((1, Place::START), crate::audit::seal::Seal::next_place);
    let base =
        last.as_ref().map_or(i64::MIN, |seal| if ended { seal.last_audit_id } else { seal.base_audit_id });
    let closing = last.as_ref().is_some_and(|seal| seal.closing && !ended);
    let (normal_until, normal_last) = normal_end(connection, era).await?;
    let cap = if closing { last.as_ref().map_or(i64::MAX, |seal| seal.last_audit_id) } else { i64::MAX };
    let row = sqlx::query!(
        r#"
        select count(*) filter (where (not early or beyond) and not closed) as "unsealed!",
               min(audit_id) filter (where early and beyond and not closed) as early,
               min(audit_id) filter (where transaction_id >= pg_snapshot_xmax(pg_current_snapshot())) as late,
               (select system_identifier from pg_control_system()) as "cluster_id!"
        from (select audit_id, transaction_id,
                     (transaction_id, audit_id) < ($2::text::xid8, $3) as early, audit_id > $4 as beyond,
                     audit_id <= $7 and (transaction_id, audit_id) < ($5::text::xid8, $6) as closed
              from authz.audit_log
              where audit_id > $1 and ((transaction_id, audit_id) >= ($2::text::xid8, $3) or audit_id > $4)) t
        "#,
        base,
        normal_until.transaction_id.to_string(),
        normal_until.audit_id,
        normal_last,
        if closing { from.transaction_id } else { 0 }.to_string(),
        if closing { from.audit_id } else { i64::MIN },
        cap,
    )
    .fetch_one(connection)
    .await?;
    chain.report.unsealed = row.unsealed.unsigned_abs();
    // In another cluster than that of the last seal transactions are counted anew, until the sealer has been there.
    let same = last.as_ref().is_some_and(|seal| seal.cluster_id == row.cluster_id);
    let seal_id = last.map_or(0, |seal| seal.seal_id);
    let pretends = if same && !closing { row.early.or(row.late) } else { None };
    Ok(pretends.map(|audit_id| Finding::record(Problem::RecordInserted, seal_id, audit_id)))
}

/// The entries of these seals, in order.
pub(crate) async fn entries_of(
    connection: &mut PgConnection,
    seals: RangeInclusive<i64>,
) -> Result<Vec<Vec<u8>>, Error> {
    let entries = sqlx::query_scalar!(
        "select entries from authz.audit_seals where seal_id between $1 and $2 order by seal_id",
        seals.start(),
        seals.end(),
    )
    .fetch_all(connection)
    .await?;
    Ok(entries)
}

/// What retention has removed, as the records of its work say. That it was whole months is for
/// [`Removed`](super::Removed) to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pruned {
    /// Records older than this, in microseconds since 2000-01-01 UTC,
    pub(crate) before: i64,
    /// of seals up to this one.
    pub(crate) through_seal: i64,
}

impl Pruned {
    pub(crate) const fn covers(&self, seal_id: i64, recorded_at: i64) -> bool {
        seal_id <= self.through_seal && recorded_at < self.before
    }
}

pub(crate) async fn pruned(connection: &mut PgConnection) -> Result<Option<Pruned>, Error> {
    let row = sqlx::query!(
        r#"
        select max((detail ->> 'before_micros')::numeric)::bigint as before,
               max((detail ->> 'through_seal')::numeric)::bigint as through_seal
        from authz.audit_log
        where action = 'audit.prune' and outcome = 'succeeded' and coalesce(by_database, true)
          and jsonb_typeof(detail -> 'before_micros') = 'number' and jsonb_typeof(detail -> 'through_seal') = 'number'
          and (detail ->> 'before_micros')::numeric between -9223372036854775808 and 9223372036854775807
          and (detail ->> 'through_seal')::numeric between -9223372036854775808 and 9223372036854775807
          -- The month under way cannot be removed.
          and (detail ->> 'before_micros')::numeric <= extract(epoch from
              date_trunc('month', recorded_at at time zone 'UTC') - timestamp '2000-01-01') * 1000000
        "#
    )
    .fetch_one(connection)
    .await?;
    Ok(row.before.zip(row.through_seal).map(|(before, through_seal)| Pruned { before, through_seal }))
}
