//! Which record of a seal is the first that does not fit.

use std::collections::HashSet;

use super::{Finding, Problem, Pruned};
use crate::audit::canonical::{Digest, Entry, Sealable};
use crate::audit::seal::Seal;

/// Compares what is there with what was sealed. `Ok` if all that differs is that records are gone by
/// retention.
pub(crate) fn locate(
    seal: &Seal,
    found: &[Sealable],
    entries: &[u8],
    pruned: Option<Pruned>,
) -> Result<(), Finding> {
    if Digest::of(entries) != seal.records_digest {
        return Err(Finding::seal(Problem::RecordsAltered, seal.seal_id));
    }
    let sealed: Vec<Entry> = Entry::all_from_bytes(entries).collect();
    let ids = |entries: &mut dyn Iterator<Item = &Entry>| entries.map(|e| e.audit_id).collect::<HashSet<_>>();
    let sealed_ids = ids(&mut sealed.iter());
    let found_ids = ids(&mut found.iter().map(|record| &record.entry));
    let record = |problem, audit_id| Err(Finding::record(problem, seal.seal_id, audit_id));
    let mut expected = sealed
        .iter()
        .filter(|e| {
            found_ids.contains(&e.audit_id)
                || !pruned.is_some_and(|pruned| pruned.covers(seal.seal_id, e.recorded_at))
        })
        .peekable();
    let mut seen = HashSet::with_capacity(found.len());
    for Sealable { entry, form, .. } in found {
        if !seen.insert(entry.audit_id) {
            return record(Problem::RecordInserted, entry.audit_id);
        }
        match expected.next() {
            Some(sealed) if sealed == entry && seal.form() == Some(*form) => {}
            Some(sealed) if sealed.audit_id == entry.audit_id => {
                if found.iter().filter(|other| other.entry.audit_id == entry.audit_id).nth(1).is_some() {
                    return record(Problem::RecordInserted, entry.audit_id);
                }
                return record(Problem::RecordAltered, entry.audit_id);
            }
            Some(sealed) if !found_ids.contains(&sealed.audit_id) => {
                return record(Problem::RecordRemoved, sealed.audit_id);
            }
            _ if !sealed_ids.contains(&entry.audit_id) => {
                return record(Problem::RecordInserted, entry.audit_id);
            }
            _ => return record(Problem::RecordMoved, entry.audit_id),
        }
    }
    match expected.next() {
        Some(sealed) => record(Problem::RecordRemoved, sealed.audit_id),
        None => Ok(()),
    }
}
