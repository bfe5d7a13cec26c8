//! One immutable state: what the checks read.

use super::actions::Actions;
use super::poll::Mark;
use super::row::{Reach, Row};
use super::users::{self, Key, User, Users};
use crate::decision::Revision;
use crate::name::{ActionName, UserKey, UserName};

/// The permissions as of one revision.
pub(super) struct State {
    pub(super) revision: Revision,
    /// Which change made the revision.
    pub(super) mark: Mark,
    pub(super) users: Users,
    pub(super) actions: Actions,
    /// Who reaches a grant of everything, if anybody holds one. By itself, or such a grant would change the rows of all
    /// actions, and leave none of them in the caches of those who ask.
    pub(super) everything: Option<Row>,
    /// With what the refresher keeps beside the state.
    pub(super) size: Size,
}

/// How much a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Size {
    /// Users that are not deleted.
    pub users: usize,
    /// Groups that a grant reaches, also an ended one; others are not loaded.
    pub groups: usize,
    /// Memberships of users in those groups; being part of "everyone in a directory" and having grants of one's own
    /// count as one each.
    pub memberships: usize,
    /// Bytes that stay in memory, about: users with their names, rows of actions, and what a refresh needs.
    pub bytes: usize,
}

impl State {
    /// The same questions in the same order as the check of the database asks them; `now` is its clock, in
    /// microseconds, asked only where a grant has an end.
    ///
    /// INVARIANT: gives the verdict of [`check`](crate::check()) for every user and action
    /// (held by `every_change_is_followed`).
    #[inline]
    pub(super) fn judge(&self, key: Key<'_>, action: &ActionName, now: impl FnOnce() -> i64) -> Answer {
        // Independent of each other, so that the processor fetches both at once.
        let row = self.actions.get(action);
        match (self.users.get(key), row) {
            (None, _) => Answer::UnknownUser,
            (Some(user), _) if user.suspended => Answer::Suspended,
            (Some(_), None) => Answer::UnknownAction,
            (Some(user), Some(row)) => match self.reach(user, row) {
                Reach::Always => Answer::Allow,
                // Live as in the database: as long as the end is greater than the clock.
                Reach::Until(end) if end > now() => Answer::Allow,
                Reach::Until(_) => Answer::Expired,
                Reach::Never => Answer::NoGrant,
            },
        }
    }

    /// What of an action's row, and of everything, reaches a user.
    #[inline]
    fn reach(&self, user: User<'_>, row: &Row) -> Reach {
        let reached = self.users.reach(user, row);
        match &self.everything {
            Some(everything) if reached != Reach::Always => reached.max(self.users.reach(user, everything)),
            _ => reached,
        }
    }
}

impl State {
    /// [`Self::judge`] of a user by name or by `sub`, with the name where that was the key.
    #[inline]
    pub(super) fn ask(
        &self,
        user: UserKey<'_>,
        action: &ActionName,
        now: impl FnOnce() -> i64,
    ) -> (Answer, Option<UserName>) {
        match user {
            UserKey::Name(name) => (self.judge(Key::of_name(name), action, now), None),
            UserKey::Sub(sub) => users::with_sub_key(sub.as_str(), |key| {
                (self.judge(key, action, now), self.users.name_of(key))
            }),
        }
    }
}

/// A verdict in one byte, which stays in a register: building a [`Verdict`](crate::Verdict) inside a `Result` on the
/// stack, piece by piece, took a tenth of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Allow,
    UnknownUser,
    Suspended,
    UnknownAction,
    Expired,
    NoGrant,
    /// The state may not be used.
    Unusable,
}
