//! What a plan says: counts for the guard, rows for people.

use serde::Serialize;

/// At most so many rows of each kind are listed in a [`Plan`]; the counts are always exact.
pub const SHOWN: i64 = 1000;
/// At most so many actions are named for one user of [`ActionChanges`]; the count is always exact.
pub const SHOWN_ACTIONS: i32 = 50;

/// Everything that a sync would change. The hash names exactly these changes, and what they take from whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// Names these changes and no others: 16 hexadecimal digits of a SHA-256. If somebody loses an action by them, it names that
    /// too, so that a grant given meanwhile does not pass with a hash that was looked at before.
    pub hash: String,
    /// What would change.
    pub counts: Counts,
    /// What the mirror of the directory holds now.
    pub before: Totals,
    /// What the source lists.
    pub listed: Totals,
    /// Users who would be suspended by it.
    pub newly_suspended: u64,
    /// Users whom the directory lists no more, and who stay as external members of groups.
    pub newly_external: u64,
    /// Distinct members that the directory does not list as users.
    pub external_users: u64,
    /// Distinct member groups that the directory does not list; they are never mirrored.
    pub external_groups: u64,
    /// Whose members could not be listed, by name.
    pub incomplete_groups: Vec<String>,
    /// Whose members somebody else changed while they were listed, by name. They keep what they have for this run.
    pub disturbed_groups: Vec<String>,
    /// Users, at most [`SHOWN`]: removed ones first, then by name.
    pub users: Vec<UserChange>,
    /// Groups, at most [`SHOWN`]: removed ones first, then by name.
    pub groups: Vec<GroupChange>,
    /// Memberships, summed up by group, at most [`SHOWN`]: the most removals first.
    pub memberships: Vec<MembershipChange>,
    /// What cannot be mirrored as it is, and why.
    pub conflicts: Vec<Conflict>,
    /// Who may do less by it, and who more.
    pub actions: ActionChanges,
    /// What would go, but stays because no removal was asked for ([`super::PlanOptions::no_remove`]).
    pub withheld: Totals,
    /// Of the memberships that would be added those of groups that have none yet.
    #[serde(skip)]
    pub(super) fresh_memberships: u64,
    /// Of which kinds the others are, beside users.
    #[serde(skip)]
    pub(super) kinds: Kinds,
    /// Groups that stay and lose members: all of them, for the guard.
    #[serde(skip)]
    pub shrinking: Vec<Shrinking>,
    /// Whom it can take an action from, for the guard: the directory's users, and once one in twenty of so many would lose one,
    /// whoever else is in the directory's groups.
    #[serde(skip)]
    pub people: u64,
    /// Of the users who would be removed those who are external ones: in no group any more. They are not among `before.users`.
    #[serde(skip)]
    pub guests_removed: u64,
}

impl Plan {
    /// The plan of a mirror that has all that is listed, and nothing else.
    pub(super) fn of_nothing(hash: String, listed: Totals) -> Self {
        Self {
            hash,
            counts: Counts::default(),
            before: listed,
            listed,
            newly_suspended: 0,
            newly_external: 0,
            external_users: 0,
            external_groups: 0,
            incomplete_groups: Vec::new(),
            disturbed_groups: Vec::new(),
            users: Vec::new(),
            groups: Vec::new(),
            memberships: Vec::new(),
            conflicts: Vec::new(),
            actions: ActionChanges::default(),
            withheld: Totals::default(),
            fresh_memberships: 0,
            kinds: Kinds::default(),
            shrinking: Vec::new(),
            people: listed.users,
            guests_removed: 0,
        }
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts == Counts::default()
    }
}

/// What is in groups beside users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Kinds {
    /// Groups.
    pub(super) groups: bool,
    /// Everyone of a directory.
    pub(super) everyone: bool,
}

/// Changes by kind of row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Users.
    pub users: Tally,
    /// Groups.
    pub groups: Tally,
    /// Memberships: of users, of groups in groups, and "everyone of the directory".
    pub memberships: Tally,
}

/// Changes of one kind of row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Tally {
    /// New rows, restored ones included.
    pub added: u64,
    /// Rows that go.
    pub removed: u64,
    /// Rows that stay and differ.
    pub changed: u64,
}

/// Numbers of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Totals {
    /// Users.
    pub users: u64,
    /// Groups.
    pub groups: u64,
    /// Memberships of all kinds.
    pub memberships: u64,
}

/// What happens to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It is new, or comes back.
    Add,
    /// It stays and differs.
    Change,
    /// It goes.
    Remove,
}

impl Change {
    pub(super) fn parse(text: &str) -> Self {
        match text {
            "add" => Self::Add,
            "remove" => Self::Remove,
            _ => Self::Change,
        }
    }
}

/// A user that changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct UserChange {
    /// What happens.
    pub change: Change,
    /// The directory's immutable id.
    pub external_id: String,
    /// The name before, if there was a row.
    pub old_name: Option<String>,
    /// The name after, unless removed.
    pub new_name: Option<String>,
    /// The status before, if there was a row.
    pub old_status: Option<String>,
    /// The status after, unless removed.
    pub new_status: Option<String>,
}

/// A group that changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct GroupChange {
    /// What happens.
    pub change: Change,
    /// The directory's immutable id.
    pub external_id: String,
    /// The name before, if there was a row.
    pub old_name: Option<String>,
    /// The name after, unless removed.
    pub new_name: Option<String>,
}

/// How the members of a group change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MembershipChange {
    /// The group's name before, or after if it is new.
    pub group: String,
    /// Members now.
    pub before: u64,
    /// How many come, go and differ.
    #[serde(flatten)]
    pub tally: Tally,
}

/// What a plan does to what people may do: registered actions that grants cover, through groups or not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct ActionChanges {
    /// Users who may do some action no more.
    pub users_losing: u64,
    /// Users who may do some action more.
    pub users_gaining: u64,
    /// Who may do less, those who lose most first; with `gaining` at most [`SHOWN`].
    pub losing: Vec<ActionChange>,
    /// Who may do more, those who gain most first.
    pub gaining: Vec<ActionChange>,
}

/// The actions that one user gains, or loses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ActionChange {
    /// The user's name, after the plan if there still is one.
    pub user: String,
    /// How many actions.
    pub count: u64,
    /// The first of them by name, at most [`SHOWN_ACTIONS`].
    pub actions: Vec<String>,
}

/// A group that stays and loses members.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shrinking {
    /// The group's name.
    pub group: String,
    /// Members now.
    pub before: u64,
    /// Members that go.
    pub going: u64,
    /// Members that come.
    pub coming: u64,
}

/// A row of the directory that cannot be mirrored as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Conflict {
    /// `user` or `group`.
    pub kind: String,
    /// The directory's immutable id.
    pub external_id: String,
    /// The name that the directory has for it.
    pub name: String,
    /// What stands in the way.
    pub reason: String,
}
