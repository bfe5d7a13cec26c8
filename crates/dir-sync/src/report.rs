//! How a run ended: for people, for programs, and as an exit code.

use std::fmt;

use authz::DirectoryName;
use authz::mirror::{Counts, Plan};
use serde::Serialize;
use std::collections::BTreeMap;

use crate::guard::Refusal;
use crate::plan::Summary;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The mirror is what the directory was.
    Applied,
    /// It was already.
    Unchanged,
    /// Nothing was to be changed: only the plan was asked for.
    Planned,
    /// The guard refused; nothing was changed.
    Refused,
    /// Applied, but some groups could not be listed and keep the members they had.
    Partial,
    /// Nothing was changed, unless the error says that this is not known.
    Failed,
}

impl Status {
    /// All that there are.
    pub const ALL: [Self; 6] =
        [Self::Applied, Self::Unchanged, Self::Planned, Self::Refused, Self::Partial, Self::Failed];
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Planned => "planned",
            Self::Refused => "refused",
            Self::Partial => "partial",
            Self::Failed => "failed",
        })
    }
}

/// One finished run, as `--output json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// How it ended.
    pub status: Status,
    /// The directory.
    pub directory: String,
    /// The run's number, once it had one.
    pub run_id: Option<i64>,
    /// Names the changes, for `--approve`.
    pub plan_hash: Option<String>,
    /// What was or would be changed.
    pub counts: Counts,
    /// API calls that were sent, retries included.
    pub api_calls: u64,
    /// From start to end.
    pub duration_ms: u64,
    /// The whole plan, its rows cut at [`authz::mirror::SHOWN`].
    pub plan: Option<Plan>,
    /// Why the guard refused; of a plan, why it would refuse to apply it.
    pub refusal: Option<Refusal>,
    /// Groups whose members could not be listed: address and reason.
    pub incomplete: BTreeMap<String, String>,
    /// Members of types that nobody knows, not mirrored, by type.
    pub unknown_member_types: BTreeMap<String, u64>,
    /// "Everyone" members of another customer, not mirrored.
    pub foreign_everyone: u64,
    /// Groups that the filter left out.
    pub left_out_groups: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// The exit code, if it is not the status' own.
    #[serde(skip)]
    pub exit_code: Option<u8>,
}

impl Report {
    /// What there is to say of a run before it began.
    #[must_use]
    pub fn blank(directory: &DirectoryName) -> Self {
        Self {
            status: Status::Failed,
            directory: directory.to_string(),
            run_id: None,
            plan_hash: None,
            counts: Counts::default(),
            api_calls: 0,
            duration_ms: 0,
            plan: None,
            refusal: None,
            incomplete: BTreeMap::new(),
            unknown_member_types: BTreeMap::new(),
            foreign_everyone: 0,
            left_out_groups: 0,
            error: None,
            exit_code: None,
        }
    }

    /// 0 done or nothing to do, 1 failed, 3 refused by the guard, 4 partial, 5 another run holds the lease, 6 ended by a signal.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        self.exit_code.unwrap_or(match self.status {
            Status::Applied | Status::Unchanged | Status::Planned => 0,
            Status::Failed => 1,
            Status::Refused => 3,
            Status::Partial => 4,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(plan) = &self.plan {
            write!(f, "{}", Summary(plan))?;
        }
        for (kind, count) in &self.unknown_member_types {
            writeln!(f, "{:<15}{count} members of type `{kind}` are not mirrored", "unknown type")?;
        }
        if self.foreign_everyone > 0 {
            writeln!(
                f,
                "{:<15}{} groups have everyone of another customer; not mirrored",
                "foreign", self.foreign_everyone
            )?;
        }
        if self.left_out_groups > 0 {
            writeln!(
                f,
                "{:<15}{} groups by --include-groups or --exclude-groups",
                "left out", self.left_out_groups
            )?;
        }
        for (group, reason) in &self.incomplete {
            writeln!(f, "{:<15}{group} keeps the members it had: {reason}", "incomplete")?;
        }
        let seconds = std::time::Duration::from_millis(self.duration_ms).as_secs_f64();
        let effort = format!("{} API calls, {seconds:.1} s", self.api_calls);
        let hash = self.plan_hash.as_deref().unwrap_or("none");
        match self.status {
            Status::Applied => writeln!(f, "applied plan {hash} to `{}` ({effort})", self.directory),
            Status::Unchanged => {
                writeln!(f, "`{}` is up to date, nothing changed ({effort})", self.directory)
            }
            Status::Planned => {
                writeln!(f, "planned only, nothing changed; plan {hash} ({effort})")?;
                match &self.refusal {
                    Some(refusal) => writeln!(f, "a run would be refused: {refusal}"),
                    None => Ok(()),
                }
            }
            Status::Partial => {
                writeln!(f, "partly applied plan {hash} to `{}` ({effort})", self.directory)
            }
            Status::Refused => match &self.refusal {
                Some(refusal) => writeln!(f, "refused: {refusal}"),
                None => writeln!(f, "refused"),
            },
            Status::Failed => {
                writeln!(f, "failed: {}", self.error.as_deref().unwrap_or("for a reason that is not known"))
            }
        }
    }
}
