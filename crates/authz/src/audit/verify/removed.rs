//! What retention removed. It takes months as a whole, so of a month of which a record is left nothing was removed by it.

use std::collections::{BTreeMap, HashSet};

use chrono::Datelike;

use super::{Finding, Problem, Pruned};
use crate::audit::canonical::{Entry, Sealable};
use crate::audit::seal::{Seal, moment};

/// The months that retention is said to have removed, as far as the chain was followed.
#[derive(Debug, Default)]
pub(crate) struct Removed(BTreeMap<(i32, u32), Month>);

#[derive(Debug, Default)]
struct Month {
    left: bool,
    /// The first record that is not there.
    gone: Option<Finding>,
}

impl Removed {
    /// Takes in the records of one seal that are there, and its entries if some are not.
    ///
    /// # Errors
    /// The first record that is gone although others of its month are left.
    pub(crate) fn see(
        &mut self,
        seal: &Seal,
        found: &[Sealable],
        entries: &[u8],
        pruned: Option<Pruned>,
    ) -> Result<(), Finding> {
        let Some(pruned) = pruned.filter(|pruned| seal.seal_id <= pruned.through_seal) else { return Ok(()) };
        for record in found {
            if pruned.covers(seal.seal_id, record.entry.recorded_at) {
                let month = self.month(record.entry.recorded_at);
                month.left = true;
                month.judge()?;
            }
        }
        let there: HashSet<i64> = if entries.is_empty() {
            HashSet::new()
        } else {
            found.iter().map(|record| record.entry.audit_id).collect()
        };
        for entry in Entry::all_from_bytes(entries) {
            if !there.contains(&entry.audit_id) {
                let month = self.month(entry.recorded_at);
                let gone = Finding::record(Problem::RecordRemoved, seal.seal_id, entry.audit_id);
                month.gone.get_or_insert(gone);
                month.judge()?;
            }
        }
        Ok(())
    }

    fn month(&mut self, recorded_at: i64) -> &mut Month {
        // Months of the trail are those of UTC.
        let month = moment(recorded_at).map_or((0, 0), |at| (at.year(), at.month()));
        self.0.entry(month).or_default()
    }
}

impl Month {
    fn judge(&self) -> Result<(), Finding> {
        match &self.gone {
            Some(gone) if self.left => Err(gone.clone()),
            _ => Ok(()),
        }
    }
}
