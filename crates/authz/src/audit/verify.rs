//! Whether the trail is what was sealed, and the grants what the trail says.

mod chain;
mod database;
mod file;
mod locate;
mod removed;
mod state;
pub(crate) mod walk;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

pub(crate) use chain::{Chain, Mismatch};
pub use database::verify;
pub(crate) use database::{Pruned, entries_of, pruned};
pub use file::verify_exports;
pub(crate) use locate::locate;
pub(crate) use removed::Removed;
pub(crate) use state::differences;
pub use state::{Difference, verify_state};

use super::seal::{Checkpoint, PublicKey};

/// What a verification holds the trail against, beside the trail itself.
#[derive(Debug, Clone)]
pub struct Trust {
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) keys: Vec<PublicKey>,
    pub(crate) signed_from: i64,
    pub(crate) tolerance: TimeDelta,
}

impl Default for Trust {
    fn default() -> Self {
        Self { checkpoints: Vec::new(), keys: Vec::new(), signed_from: 1, tolerance: TimeDelta::seconds(60) }
    }
}

impl Trust {
    /// Nothing but the chain: shows a change that left the later seals as they were, not a rewrite of all.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A checkpoint kept outside the database: shows a rewrite of what came before it, and that it is still there.
    #[must_use]
    pub fn checkpoint(mut self, checkpoint: Checkpoint) -> Self {
        self.checkpoints.push(checkpoint);
        self
    }

    /// A key that seals may be signed with. With one or more, every seal must be signed by one of them.
    #[must_use]
    pub fn key(mut self, key: PublicKey) -> Self {
        self.keys.push(key);
        self
    }

    /// Seals before this one need no signature.
    #[must_use]
    pub const fn signed_from(mut self, seal_id: i64) -> Self {
        self.signed_from = seal_id;
        self
    }

    /// By how much a record's time may contradict the seals around it, for a clock that was set: a minute if not said.
    #[must_use]
    pub const fn tolerance(mut self, tolerance: TimeDelta) -> Self {
        self.tolerance = tolerance;
        self
    }
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Problem {
    /// The record is not what was sealed.
    RecordAltered,
    /// A sealed record is missing.
    RecordRemoved,
    /// The record stands among sealed ones and was not sealed.
    RecordInserted,
    /// The record stands at another place than when it was sealed.
    RecordMoved,
    /// The record claims an earlier time than its transaction can have written it at.
    RecordBackDated,
    /// The record claims a later time than that of its seal.
    RecordPostDated,
    /// Records of the seal were changed, and so was what would tell which.
    RecordsAltered,
    /// The seal is not what was written.
    SealAltered,
    /// The seal was written by a later version of this library than the one that verifies.
    SealNewer,
    /// A seal is missing.
    SealRemoved,
    /// The seal bears no signature, and should.
    SealUnsigned,
    /// The seal's signature is not by a trusted key.
    SignatureWrong,
    /// A seal is not the one of the checkpoint: it, or something before it, was written anew.
    ChainRewritten,
    /// The chain ends before the checkpoint.
    ChainTruncated,
    /// A file's lines do not go on where those before ended, or end too soon.
    ExportIncomplete,
    /// A line is not what an export has.
    ExportUnreadable,
}

impl Problem {
    const fn text(self) -> &'static str {
        match self {
            Self::RecordAltered => "was altered after it was sealed",
            Self::RecordRemoved => "was removed after it was sealed",
            Self::RecordInserted => "was inserted among sealed records",
            Self::RecordMoved => "stands at another place than when it was sealed",
            Self::RecordBackDated => "claims an earlier time than it can have been written at",
            Self::RecordPostDated => "claims a later time than that of its seal",
            Self::RecordsAltered => "does not fit its records, and its entries were altered as well",
            Self::SealAltered => "was altered",
            Self::SealNewer => "was written by a later version than this one: verify with that",
            Self::SealRemoved => "is missing",
            Self::SealUnsigned => "is not signed",
            Self::SignatureWrong => "is not signed by a trusted key",
            Self::ChainRewritten => "is not the one of the checkpoint: the chain was rewritten",
            Self::ChainTruncated => "of the checkpoint is not there: the chain was cut",
            Self::ExportIncomplete => "is where the export ends or goes on elsewhere",
            Self::ExportUnreadable => "has a line that is not part of an export",
        }
    }
}

/// The first thing that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// What is wrong.
    pub problem: Problem,
    /// In which seal; zero for none of them yet.
    pub seal_id: i64,
    /// With which record; `None` if it is not one record.
    pub audit_id: Option<i64>,
    /// On which line of an export.
    pub line: Option<u64>,
}

impl Finding {
    pub(crate) const fn seal(problem: Problem, seal_id: i64) -> Self {
        Self { problem, seal_id, audit_id: None, line: None }
    }

    pub(crate) const fn record(problem: Problem, seal_id: i64, audit_id: i64) -> Self {
        Self { problem, seal_id, audit_id: Some(audit_id), line: None }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.audit_id {
            Some(audit_id) => write!(f, "record {audit_id} (seal {}) {}", self.seal_id, self.problem.text()),
            None => write!(f, "seal {} {}", self.seal_id, self.problem.text()),
        }?;
        match self.line {
            Some(line) => write!(f, " (line {line})"),
            None => Ok(()),
        }
    }
}

/// What a verification saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// How many seals fit.
    pub seals: u64,
    /// How many records fit their seals.
    pub records: u64,
    /// How many records were sealed and are gone by retention.
    pub pruned: u64,
    /// Up to when retention has removed records, as the trail says.
    pub pruned_before: Option<DateTime<Utc>>,
    /// How many records are not sealed yet, so that nothing can be said of them; always 0 for an export.
    pub unsealed: u64,
    /// The first seal that was looked at: past 1 for an export that begins later.
    pub first_seal: Option<i64>,
    /// The last seal that fits: keep it outside.
    pub checkpoint: Option<Checkpoint>,
    /// Checkpoints to hold against that are older than the first seal looked at, and so were not.
    pub unchecked_checkpoints: u64,
    /// The first thing that does not fit, where the verification ended; `None` if all fits.
    pub finding: Option<Finding>,
}

impl Report {
    /// Whether all that was looked at fits.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.finding.is_none()
    }
}
