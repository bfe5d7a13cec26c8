//! The guard: limits that a plan must keep, or be approved by its hash. A refused plan changes nothing.

use std::fmt;
use std::str::FromStr;

use authz::mirror::Plan;
use serde::Serialize;

/// How much may go at once: a share of what is there, or a number, whichever is more. The number alone never lets more
/// than half go, rounded up, so that it protects a directory of ten people too.
///
/// ```
/// use dir_sync::guard::Limit;
///
/// let limit: Limit = "10%,3".parse()?;
/// assert_eq!(limit.of(1_000), 100);
/// assert_eq!(limit.of(10), 3);
/// assert_eq!(limit.of(4), 2);
/// # Ok::<(), dir_sync::guard::LimitError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    percent: u8,
    floor: u64,
}

impl Limit {
    /// At most `percent` of what is there, and always `floor`, but not more than half by that, rounded up.
    #[must_use]
    pub const fn new(percent: u8, floor: u64) -> Self {
        Self { percent, floor }
    }

    /// How many of `there` may go.
    #[must_use]
    pub fn of(self, there: u64) -> u64 {
        self.share(there).max(self.floor.min(there.div_ceil(2)))
    }

    /// How many of the `there` members of one group may go: the number counts in full, since a group of two that is
    /// handed on to two others is nothing unusual.
    #[must_use]
    pub fn of_group(self, there: u64) -> u64 {
        self.share(there).max(self.floor)
    }

    fn share(self, there: u64) -> u64 {
        u64::try_from(u128::from(there) * u128::from(self.percent) / 100).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%,{}", self.percent, self.floor)
    }
}

/// Why a text is not a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a limit; write a share and a number such as `10%,3`: at most a tenth, or three, whichever is more"
)]
pub struct LimitError(String);

impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let parsed = text.split_once(',').and_then(|(share, floor)| {
            let percent = share.trim().strip_suffix('%')?.trim_end().parse().ok().filter(|p| *p <= 100)?;
            Some(Self { percent, floor: floor.trim().parse().ok()? })
        });
        parsed.ok_or_else(|| LimitError(text.to_owned()))
    }
}

/// The limits of one directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Users removed, newly suspended, or newly external. External ones, who go with their last membership, are left out.
    pub users: Limit,
    /// Groups removed.
    pub groups: Limit,
    /// Memberships removed.
    pub memberships: Limit,
    /// Members by which one group shrinks that itself stays: those who come in the place of others count against them.
    pub members_of_group: Limit,
    /// Users who lose an action, in whatever way: one nested group less, or "everyone", can take it from many.
    pub losing_users: Limit,
}

impl Limits {
    /// Whatever the directory says goes.
    pub const NONE: Self = {
        let all = Limit::new(100, 0);
        Self { users: all, groups: all, memberships: all, members_of_group: all, losing_users: all }
    };
}

impl Default for Limits {
    /// A tenth; in small directories three users, three groups, ten memberships, ten users who lose an action, but not more than
    /// half, rounded up. Of one group half the members; of a small group five.
    fn default() -> Self {
        Self {
            users: Limit::new(10, 3),
            groups: Limit::new(10, 3),
            memberships: Limit::new(10, 10),
            members_of_group: Limit::new(50, 5),
            losing_users: Limit::new(10, 10),
        }
    }
}

/// What a limit was set for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Users.
    Users,
    /// Groups.
    Groups,
    /// Memberships.
    Memberships,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Users => "users",
            Self::Groups => "groups",
            Self::Memberships => "memberships",
        })
    }
}

/// A limit that a plan does not keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Violation {
    /// The source lists none of what the mirror has.
    EmptyListing {
        /// Of what.
        kind: Kind,
        /// How many the mirror has.
        there: u64,
    },
    /// More would go than may.
    TooMany {
        /// Of what.
        kind: Kind,
        /// How many would go.
        going: u64,
        /// Of how many.
        there: u64,
        /// How many may.
        limit: u64,
    },
    /// More users would lose an action than may.
    TooManyLosing {
        /// How many would.
        losing: u64,
        /// Of how many.
        there: u64,
        /// How many may.
        limit: u64,
    },
    /// Groups that stay would shrink by more members than they may.
    EmptiedGroups {
        /// Some of them, those that lose most first.
        groups: Vec<EmptiedGroup>,
        /// How many there are beside those.
        more: u64,
    },
}

/// A group that would shrink too much.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EmptiedGroup {
    /// Its name.
    pub group: String,
    /// Members now.
    pub there: u64,
    /// Members that it would have.
    pub left: u64,
    /// By how many it may shrink.
    pub limit: u64,
}

/// Groups that a refusal names.
const GROUPS_NAMED: usize = 5;

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyListing { kind, there } => {
                write!(f, "the source lists no {kind} at all, while the mirror has {there}")
            }
            Self::TooMany { kind: Kind::Users, going, there, limit } => {
                write!(
                    f,
                    "{going} of {there} users would be removed, suspended or external, at most {limit} may at once"
                )
            }
            Self::TooMany { kind, going, there, limit } => {
                write!(f, "{going} of {there} {kind} would be removed, at most {limit} may at once")
            }
            Self::TooManyLosing { losing, there, limit } => {
                write!(f, "{losing} of {there} users would lose an action, at most {limit} may at once")
            }
            Self::EmptiedGroups { groups, more } => {
                for (n, EmptiedGroup { group, there, left, limit }) in groups.iter().enumerate() {
                    let comma = if n == 0 { "" } else { ", " };
                    write!(
                        f,
                        "{comma}group `{group}` would shrink from {there} to {left} members, at most {limit} may go at once"
                    )?;
                }
                if *more > 0 { write!(f, ", and {more} more groups") } else { Ok(()) }
            }
        }
    }
}

/// Judges a plan; an empty answer lets it pass.
#[must_use]
pub fn judge(plan: &Plan, limits: &Limits) -> Vec<Violation> {
    let mut violations = Vec::new();
    let counts = &plan.counts;
    let kinds = [
        (
            Kind::Users,
            limits.users,
            plan.before.users,
            plan.listed.users,
            // Who is external goes with the last membership, and those have a limit of their own.
            counts.users.removed.saturating_sub(plan.guests_removed)
                + plan.newly_suspended
                + plan.newly_external,
        ),
        (Kind::Groups, limits.groups, plan.before.groups, plan.listed.groups, counts.groups.removed),
        (
            Kind::Memberships,
            limits.memberships,
            plan.before.memberships,
            plan.listed.memberships,
            counts.memberships.removed,
        ),
    ];
    for (kind, limit, before, listed, going) in kinds {
        // A group that is adopted brings memberships that were not the directory's before.
        let there = before.max(going);
        if before > 0 && listed == 0 && going > 0 {
            violations.push(Violation::EmptyListing { kind, there });
        } else if going > limit.of(there) {
            violations.push(Violation::TooMany { kind, going, there, limit: limit.of(there) });
        }
    }
    let losing = plan.actions.users_losing;
    // By a group of another kind, it can be others still.
    let there = plan.people.max(losing);
    let limit = limits.losing_users.of(there);
    if losing > limit {
        violations.push(Violation::TooManyLosing { losing, there, limit });
    }
    let emptied = plan.shrinking.iter().filter_map(|group| {
        let limit = limits.members_of_group.of_group(group.before);
        let loss = group.going.saturating_sub(group.coming);
        (loss > limit).then(|| EmptiedGroup {
            group: group.group.clone(),
            there: group.before,
            left: group.before.saturating_sub(loss),
            limit,
        })
    });
    let mut groups: Vec<_> = emptied.collect();
    if !groups.is_empty() {
        let more = groups.len().saturating_sub(GROUPS_NAMED);
        groups.truncate(GROUPS_NAMED);
        violations.push(Violation::EmptiedGroups { groups, more: u64::try_from(more).unwrap_or(u64::MAX) });
    }
    violations
}

/// Why a plan was refused, and how to let it pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The limits that it does not keep.
    pub violations: Vec<Violation>,
    /// The plan's hash.
    pub plan_hash: String,
    /// What `--approve` named, if it named another plan.
    pub approved: Option<String>,
    /// All of it in words, and what to do.
    pub message: String,
    /// Whether it would pass if nothing was removed.
    #[serde(skip)]
    no_remove_helps: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, violation) in self.violations.iter().enumerate() {
            write!(f, "{}{violation}", if n == 0 { "" } else { "; " })?;
        }
        if let Some(approved) = &self.approved {
            write!(f, "; --approve named `{approved}`, but the plan is now another one")?;
        }
        write!(f, "; nothing was changed. If this is right, run again with --approve {}", self.plan_hash)?;
        if self.no_remove_helps {
            f.write_str("; if only the removals are in doubt, --no-remove applies the rest")?;
        }
        Ok(())
    }
}

/// Whether the plan may be applied: it keeps the limits, or `approve` names its hash. `no_remove` says that removals have been taken
/// out of it already.
///
/// # Errors
/// [`Refusal`].
pub fn admit(plan: &Plan, limits: &Limits, approve: Option<&str>, no_remove: bool) -> Result<(), Refusal> {
    let violations = judge(plan, limits);
    if violations.is_empty() || approve == Some(plan.hash.as_str()) {
        return Ok(());
    }
    let mut refusal = Refusal {
        violations,
        plan_hash: plan.hash.clone(),
        approved: approve.map(str::to_owned),
        message: String::new(),
        // Who is suspended would be so all the same.
        no_remove_helps: !no_remove && plan.newly_suspended <= limits.users.of(plan.before.users),
    };
    refusal.message = refusal.to_string();
    Err(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_share_or_a_floor_whichever_is_more() {
        let limit = Limit::new(10, 3);
        assert_eq!([10, 30, 39, 40, 1_478].map(|n| limit.of(n)), [3, 3, 3, 4, 147]);
        assert_eq!(Limit::new(0, 0).of(u64::MAX), 0);
        assert_eq!(Limit::new(100, 0).of(u64::MAX), u64::MAX);
    }

    #[test]
    fn number_lets_at_most_half_go() {
        let limit = Limit::new(10, 10);
        assert_eq!([0, 1, 2, 3, 10, 19, 20, 100, 101].map(|n| limit.of(n)), [0, 1, 1, 2, 5, 10, 10, 10, 10]);
        assert_eq!(Limit::new(100, 0).of(3), 3, "a share is meant as it is written");
        let group = Limits::default().members_of_group;
        assert_eq!([1, 6, 10, 13].map(|n| group.of_group(n)), [5, 5, 5, 6]);
    }

    #[test]
    fn limits_are_written_as_they_are_read() {
        assert_eq!("5%,20".parse(), Ok(Limit::new(5, 20)));
        assert_eq!(" 5 % , 20 ".parse(), Ok(Limit::new(5, 20)));
        assert_eq!(Limit::new(5, 20).to_string().parse(), Ok(Limit::new(5, 20)));
        for bad in ["", "5", "5%", "5,20", "101%,1", "-1%,1", "5%,-1", "5%,x"] {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
    }
}
