//! The chain of seals, link by link, and the records of each.

use std::collections::VecDeque;

use super::{Finding, Problem, Removed, Report, Trust};
use crate::audit::canonical::{Digest, Sealable, entries, from_hex};
use crate::audit::seal::Seal;

/// How far the chain was followed.
pub(crate) struct Chain {
    trust: Trust,
    previous: Option<Seal>,
    /// Of the seals of this era: the next transaction when they were made, and when that was. A later transaction
    /// cannot have written before.
    clock: VecDeque<(u64, i64)>,
    pub(crate) removed: Removed,
    pub(crate) report: Report,
}

/// The records are not those of the seal; or some are gone by retention, which its entries will tell.
pub(crate) struct Mismatch;

impl Chain {
    pub(crate) fn new(trust: Trust) -> Self {
        Self {
            trust,
            previous: None,
            clock: VecDeque::new(),
            removed: Removed::default(),
            report: Report::default(),
        }
    }

    pub(crate) const fn previous(&self) -> Option<&Seal> {
        self.previous.as_ref()
    }

    /// A chain that is followed from its middle: its first seal says what comes before.
    pub(crate) fn begins_at(&mut self, seal_id: i64) {
        if self.report.first_seal.is_none() {
            self.report.first_seal = Some(seal_id);
            let before =
                self.trust.checkpoints.iter().filter(|c| c.seal_id < seal_id.saturating_sub(1)).count();
            self.report.unchecked_checkpoints = u64::try_from(before).unwrap_or(u64::MAX);
        }
    }

    /// Whether the seal is the next link.
    pub(crate) fn link(&mut self, seal: &Seal) -> Result<(), Finding> {
        let expected = match &self.previous {
            Some(previous) => previous.seal_id.saturating_add(1),
            None => self.report.first_seal.unwrap_or(1),
        };
        self.begins_at(expected);
        if seal.seal_id != expected {
            return Err(Finding::seal(Problem::SealRemoved, expected));
        }
        let before = match &self.previous {
            Some(previous) => Some(previous.digest),
            None if seal.seal_id == 1 => None,
            None => {
                // The beginning of an export: the checkpoint right before it, if it was kept, vouches for it.
                let kept =
                    self.trust.checkpoints.iter().find(|c| c.seal_id == seal.seal_id.saturating_sub(1));
                if kept.is_some_and(|kept| Some(kept.digest) != seal.previous_digest) {
                    return Err(Finding::seal(Problem::ChainRewritten, seal.seal_id));
                }
                seal.previous_digest
            }
        };
        if seal.digest != seal.computed_digest() || seal.previous_digest != before {
            return Err(Finding::seal(Problem::SealAltered, seal.seal_id));
        }
        if seal.form().is_none() {
            return Err(Finding::seal(Problem::SealNewer, seal.seal_id));
        }
        if self
            .trust
            .checkpoints
            .iter()
            .any(|kept| kept.seal_id == seal.seal_id && kept.digest != seal.digest)
        {
            return Err(Finding::seal(Problem::ChainRewritten, seal.seal_id));
        }
        self.signature(seal)
    }

    fn signature(&self, seal: &Seal) -> Result<(), Finding> {
        if self.trust.keys.is_empty() || seal.seal_id < self.trust.signed_from {
            return Ok(());
        }
        let (Some(key_id), Some(signature)) = (&seal.key_id, seal.signature.as_deref().and_then(from_hex))
        else {
            return Err(Finding::seal(Problem::SealUnsigned, seal.seal_id));
        };
        let signed =
            |key: &super::PublicKey| key.key_id() == *key_id && key.verifies(seal.digest, &signature);
        if self.trust.keys.iter().any(signed) {
            Ok(())
        } else {
            Err(Finding::seal(Problem::SignatureWrong, seal.seal_id))
        }
    }

    /// Whether these are the records of the seal; gives their entries.
    pub(crate) fn records(seal: &Seal, records: &[Sealable]) -> Result<Vec<u8>, Mismatch> {
        let entries = entries(records);
        if seal.records != i64::try_from(records.len()).unwrap_or(i64::MAX)
            || Digest::of(&entries) != seal.records_digest
            || records.iter().any(|record| seal.form() != Some(record.form))
        {
            return Err(Mismatch);
        }
        Ok(entries)
    }

    /// Whether the times of the records can be true.
    pub(crate) fn times(&mut self, seal: &Seal, records: &[Sealable]) -> Result<(), Finding> {
        let slack = self.trust.tolerance.num_microseconds().unwrap_or(i64::MAX);
        if self.previous.as_ref().is_some_and(|previous| previous.era != seal.era) {
            self.clock.clear();
        }
        for record in records {
            let Sealable { entry, transaction_id, .. } = record;
            if !seal.could_hold(entry.recorded_at, self.trust.tolerance) {
                return Err(Finding::record(Problem::RecordPostDated, seal.seal_id, entry.audit_id));
            }
            if seal.closing {
                continue;
            }
            let earlier = self.clock.partition_point(|(next, _)| next <= transaction_id);
            let not_before = earlier.checked_sub(1).and_then(|last| self.clock.get(last));
            if not_before.is_some_and(|(_, sealed_at)| entry.recorded_at < sealed_at.saturating_sub(slack)) {
                return Err(Finding::record(Problem::RecordBackDated, seal.seal_id, entry.audit_id));
            }
        }
        Ok(())
    }

    /// All of the seal fits; `kept` of its records are there.
    pub(crate) fn done(&mut self, seal: &Seal, kept: usize) {
        if !seal.closing {
            if self
                .clock
                .back()
                .is_none_or(|(next, at)| *next <= seal.next_transaction_id && *at <= seal.sealed_at)
            {
                self.clock.push_back((seal.next_transaction_id, seal.sealed_at));
            }
            // Records to come are of transactions from there on.
            let reached = self.clock.partition_point(|(next, _)| *next <= seal.until_transaction_id);
            self.clock.drain(..reached.saturating_sub(1));
        }
        let kept = u64::try_from(kept).unwrap_or(u64::MAX);
        self.report.seals += 1;
        self.report.records += kept;
        self.report.pruned += seal.records.unsigned_abs().saturating_sub(kept);
        self.report.checkpoint = Some(seal.checkpoint());
        self.previous = Some(seal.clone());
    }

    /// What the chain that ended here lacks.
    pub(crate) fn end(&mut self) {
        let last = self.previous.as_ref().map_or(0, |seal| seal.seal_id);
        let beyond = self.trust.checkpoints.iter().map(|kept| kept.seal_id).filter(|id| *id > last).min();
        if let (None, Some(seal_id)) = (&self.report.finding, beyond) {
            self.report.finding = Some(Finding::seal(Problem::ChainTruncated, seal_id));
        }
    }
}
