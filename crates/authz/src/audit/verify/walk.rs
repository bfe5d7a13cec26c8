//! The seals of the database in groups, with the range of records that each group covers.

use sqlx::PgConnection;

use crate::audit::canonical::Place;
use crate::audit::seal::{Range, Seal, normal_end, seals_after};
use crate::error::Error;

/// So many seals are looked at together, at most,
const SEALS: i64 = 1_000;
/// and so many records, if one seal has no more.
const RECORDS: i64 = 100_000;

/// The seals after `previous` that are of one era and kind, and where their records are; `None` at the end.
pub(crate) async fn next_group(
    connection: &mut PgConnection,
    previous: Option<&Seal>,
) -> Result<Option<(Vec<Seal>, Range)>, Error> {
    let mut seals = seals_after(&mut *connection, previous.map_or(0, |seal| seal.seal_id), SEALS).await?;
    let Some(first) = seals.first().cloned() else { return Ok(None) };
    let mut records = 0_i64;
    let mut taken = 0;
    for seal in &seals {
        records = records.saturating_add(seal.records.max(0));
        let alike = (seal.era, seal.closing, seal.base_audit_id)
            == (first.era, first.closing, first.base_audit_id)
            && (!seal.closing || seal.last_audit_id == first.last_audit_id);
        if taken > 0 && (!alike || records > RECORDS) {
            break;
        }
        taken += 1;
    }
    seals.truncate(taken);
    let (sealed_until, sealed_last) = normal_end(connection, first.era).await?;
    // The first closing seal of an era begins at the start again.
    let from = previous.map_or(Place::START, |previous| {
        let (era, place) = previous.next_place();
        if era != first.era || previous.closing != first.closing { Place::START } else { place }
    });
    let until = seals.last().map_or(from, Seal::until);
    let range = if first.closing {
        Range {
            base_audit_id: first.base_audit_id,
            cap: first.last_audit_id,
            from,
            until,
            sealed_until,
            sealed_last,
            limit: i64::MAX,
        }
    } else {
        Range {
            base_audit_id: first.base_audit_id,
            cap: sealed_last,
            from,
            until,
            sealed_until: Place::START,
            sealed_last: i64::MAX,
            limit: i64::MAX,
        }
    };
    Ok(Some((seals, range)))
}
