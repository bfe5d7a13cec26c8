//! The answer of a check: allow with the grant that did it, or deny with the reason.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::name::{ActionPattern, GroupName};

/// The number of a committed change that can alter a decision; it only grows, in commit order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Revision(pub i64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a user may do an action. An error of the check is neither.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[must_use = "a decision that nobody looks at protects nothing"]
pub enum Decision {
    /// The user may.
    Allow(Allow),
    /// The user may not.
    Deny(Deny),
}

impl Decision {
    /// Whether the user may.
    #[must_use]
    pub const fn is_allow(&self) -> bool {
        matches!(self, Self::Allow(_))
    }

    /// The state of the database that the answer is true of.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Allow(allow) => allow.revision,
            Self::Deny(deny) => deny.revision,
        }
    }
}

impl Decision {
    /// The answer without the grant.
    pub const fn verdict(&self) -> Verdict {
        match self {
            Self::Allow(Allow { revision, .. }) => Verdict::Allow { revision: *revision },
            Self::Deny(Deny { reason, revision }) => {
                Verdict::Deny { reason: reason.denial(), revision: *revision }
            }
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow(allow) => write!(f, "allow: {}", allow.grant),
            Self::Deny(deny) => write!(f, "deny: {}", deny.reason),
        }
    }
}

/// Why the user may: one unexpired grant that covers the action, the nearest if there are several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Allow {
    /// The grant.
    pub grant: MatchedGrant,
    /// The state of the database that the answer is true of.
    pub revision: Revision,
}

/// A grant that covers the action, and how the user comes by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MatchedGrant {
    /// What was granted: the action, or a pattern that covers it.
    pub pattern: ActionPattern,
    /// Who holds it.
    pub holder: Holder,
    /// When it ends; `None` for never.
    pub expires_at: Option<DateTime<Utc>>,
}

impl fmt::Display for MatchedGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.holder {
            Holder::User => write!(f, "`{}` granted to the user", self.pattern),
            Holder::Group { group, member_of, depth } => {
                write!(f, "`{}` granted to group `{group}`", self.pattern)?;
                if *depth > 0 {
                    write!(f, ", which contains `{member_of}`")?;
                }
                Ok(())
            }
        }
    }
}

/// Who holds a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// The user.
    User,
    /// A group that has the user, directly or through groups inside it.
    Group {
        /// The group that holds the grant.
        group: GroupName,
        /// The group that has the user (the same at depth 0).
        member_of: GroupName,
        /// How many steps up from `member_of` to `group`, by the shortest way.
        depth: u32,
    },
}

/// Why the user may not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Deny {
    /// The reason.
    pub reason: DenyReason,
    /// The state of the database that the answer is true of.
    pub revision: Revision,
}

/// The reasons for a deny; the first that applies, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DenyReason {
    /// No user of that name, or a deleted one.
    UnknownUser,
    /// The user is suspended or archived in the directory.
    Suspended,
    /// No action of that name is registered.
    UnknownAction,
    /// There was a grant, and it has ended.
    Expired(MatchedGrant),
    /// No grant covers the action.
    NoGrant,
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired(grant) => write!(f, "{grant}, but that has ended"),
            _ => self.denial().fmt(f),
        }
    }
}

impl DenyReason {
    /// The reason without the grant.
    const fn denial(&self) -> Denial {
        match self {
            Self::UnknownUser => Denial::UnknownUser,
            Self::Suspended => Denial::Suspended,
            Self::UnknownAction => Denial::UnknownAction,
            Self::Expired(_) => Denial::Expired,
            Self::NoGrant => Denial::NoGrant,
        }
    }
}

/// Whether a user may do an action, as a [`Snapshot`](crate::Snapshot) answers: without the grant that did it, which
/// [`explain`](crate::explain()) tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[must_use = "a verdict that nobody looks at protects nothing"]
pub enum Verdict {
    /// The user may.
    Allow {
        /// The state of the database that the answer is true of.
        revision: Revision,
    },
    /// The user may not.
    Deny {
        /// Why not.
        reason: Denial,
        /// The state of the database that the answer is true of.
        revision: Revision,
    },
}

impl Verdict {
    /// Whether the user may.
    #[must_use]
    pub const fn is_allow(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }

    /// The state of the database that the answer is true of.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Allow { revision } | Self::Deny { revision, .. } => *revision,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow { .. } => f.write_str("allow"),
            Self::Deny { reason, .. } => write!(f, "deny: {reason}"),
        }
    }
}

/// A [`DenyReason`] without the grant; the first that applies, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Denial {
    /// No user of that name, or a deleted one.
    UnknownUser,
    /// The user is suspended or archived in the directory.
    Suspended,
    /// No action of that name is registered.
    UnknownAction,
    /// There was a grant, and it has ended.
    Expired,
    /// No grant covers the action.
    NoGrant,
}

impl From<&DenyReason> for Denial {
    fn from(reason: &DenyReason) -> Self {
        reason.denial()
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownUser => "the user is not known, or was deleted",
            Self::Suspended => "the user is suspended",
            Self::UnknownAction => "the action is not registered",
            Self::Expired => "there was a grant, but that has ended",
            Self::NoGrant => "no grant covers it",
        })
    }
}
