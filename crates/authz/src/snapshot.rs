//! The permissions in memory: answers in about the time of a look-up in a hash map, and knows how old it is.
//!
//! ```no_run
//! use authz::{ActionName, Snapshot, UserName};
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! const SCALE: ActionName = ActionName::constant("workers.scale");
//!
//! let snapshot = Snapshot::options().start(pool).await?;
//! let ada = UserName::parse("ada@example.com")?;
//! if snapshot.check(&ada, &SCALE)?.is_allow() {
//!     // …
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # How fresh it is
//! A task in the background polls the database, every second unless told otherwise, and takes over what has changed.
//! A notification (`LISTEN authz_revision`) makes it poll at once, so that a change is seen after some milliseconds;
//! nothing depends on one. If the database has not answered for [`Options::max_staleness`], a check is
//! [`Error::SnapshotStale`], neither an allow nor a deny, until it answers again. A grant with an end counts until that
//! moment by the database's clock, at most a round trip less, never longer.
//!
//! A hot standby serves as well, and the age then includes what it lags behind its primary (a connection to the
//! primary that breaks without a word shows after the standby's `wal_receiver_timeout`). So does a connection pooler
//! in transaction mode: a poll reads in one transaction, and one that two standbys have answered counts as no answer. The
//! host's pool then needs what every user of sqlx needs there, `statement_cache_capacity(0)`; notifications do not come
//! through, so polling alone keeps the snapshot fresh.
//!
//! Behind a standby of a standby, an outage between the primary and the first of them cannot be seen from the second. What a
//! subscriber of logical replication lags cannot be seen at all, since it looks like a primary. Where that matters set
//! [`Options::max_directory_age`]: what a sync writes on the primary must then arrive. Several standbys may share one name; a
//! poll that meets one which is not as far as the last one counts as no answer.
//!
//! The listener has a connection of its own, opened with the options of the host's pool. A poll takes one from the
//! pool; a pool that the host has used up lets the snapshot grow old.
//!
//! The age is taken on a clock that stops while the machine sleeps: after a sleep the snapshot counts as fresh until
//! the first poll, which comes at once or within [`Options::max_staleness`].
//!
//! # Certain answers
//! [`Snapshot::check_confirmed`] and its kin ask a connection for the revision that it sees, inside the transaction that
//! makes a change for example, and answer from memory if that is the snapshot's, from the database if not: the
//! answer of [`check`](crate::check()) for about twice what the shortest statement takes.
//!
//! # What it costs
//! A check takes no lock and allocates nothing, except that one of an action which nobody has registered may write a
//! warning. Each thread keeps the state that it has seen last until its next check, so threads that have stopped
//! asking, such as those of a pool that has shrunk, can hold on to an old one: beside the sizes below.
//!
//! Every user's name is held, but only those groups and memberships that some grant can reach. See [`Size`].
//!
//! # Metrics and events
//! Through the `metrics` facade: gauges `authz_snapshot_revision`, `authz_snapshot_age_seconds` (as of the last poll
//! that was tried), `authz_snapshot_bytes`, `authz_snapshot_users`; the histogram `authz_snapshot_refresh_seconds` with
//! the label `kind` (`full`, `incremental`); the counter `authz_snapshot_refreshes_total` with `kind` (also `poll`, which
//! found nothing new) and `outcome` (`ok`, `error`). Through `tracing`: each refresh (debug; a full one info), the first
//! failure and the recovery of an outage (warn, info).

mod actions;
mod changes;
mod clock;
mod confirm;
pub(crate) mod copy;
mod follow;
mod graph;
mod lanes;
mod lend;
mod listen;
mod load;
mod memberships;
mod model;
mod poll;
mod refresher;
mod row;
mod shared;
mod state;
mod users;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;

pub use self::lend::{Lend, Lending, Loan};
pub use self::state::Size;

use self::refresher::Refresher;
use self::shared::Shared;
use self::state::Answer;
use self::users::Key;
use crate::decision::{Denial, Revision, Verdict};
use crate::error::Error;
use crate::name::{ActionName, Sub, UserKey, UserName};
use crate::permit::{Action, Named, On, Permit, Question, Refusal};
use crate::unregistered;

/// A handle on the permissions in memory, for many tasks to share; cheap to clone. See the [module](self).
///
/// When the last handle goes, the task in the background ends; [`Snapshot::shutdown`] waits for that.
#[derive(Clone)]
pub struct Snapshot {
    shared: Arc<Shared>,
    /// Ends the refresher when the last handle goes.
    _owner: Arc<tokio::sync::watch::Sender<bool>>,
    by_sub: bool,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("revision", &self.revision())
            .field("age", &self.age())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// With the usual settings, to be changed before [`Options::start`].
    pub fn options() -> Options {
        Options::default()
    }

    /// Whether `user` may do `action` now: no waiting, no lock, no allocation.
    ///
    /// # Errors
    /// [`Error::SnapshotStale`], [`Error::DirectoryStale`] and [`Error::SnapshotClosed`]: the caller cannot tell, and
    /// must not go on.
    #[inline]
    pub fn check(&self, user: &UserName, action: &ActionName) -> Result<Verdict, Error> {
        self.judge(Key::of_name(user), action)
    }

    /// The same for a user who is known by the `sub` of an OpenID Connect login; needs [`Options::by_sub`].
    ///
    /// # Errors
    /// As [`Snapshot::check`], and [`Error::Unindexed`] without [`Options::by_sub`].
    pub fn check_sub(&self, sub: &Sub, action: &ActionName) -> Result<Verdict, Error> {
        if !self.by_sub {
            return Err(Error::Unindexed);
        }
        users::with_sub_key(sub.as_str(), |key| self.judge(key, action))
    }

    #[inline]
    fn judge(&self, key: Key<'_>, action: &ActionName) -> Result<Verdict, Error> {
        let (answer, revision) = self.shared.judge(key, action);
        self.verdict(answer, revision, action)
    }

    /// The verdict, and the name of a user who was found by `sub`.
    pub(crate) fn ask(
        &self,
        user: UserKey<'_>,
        action: &ActionName,
    ) -> Result<(Verdict, Option<UserName>), Error> {
        if matches!(user, UserKey::Sub(_)) && !self.by_sub {
            return Err(Error::Unindexed);
        }
        let asked = self.shared.ask(|state| state.ask(user, action, || self.shared.database_micros()));
        let ((answer, name), revision) = asked.unwrap_or(((Answer::Unusable, None), Revision(0)));
        Ok((self.verdict(answer, revision, action)?, name))
    }

    #[inline]
    fn verdict(&self, answer: Answer, revision: Revision, action: &ActionName) -> Result<Verdict, Error> {
        let reason = match answer {
            Answer::Allow => return Ok(Verdict::Allow { revision }),
            Answer::UnknownUser => Denial::UnknownUser,
            Answer::Suspended => Denial::Suspended,
            Answer::UnknownAction => {
                unregistered::warn(action.as_str());
                Denial::UnknownAction
            }
            Answer::Expired => Denial::Expired,
            Answer::NoGrant => Denial::NoGrant,
            Answer::Unusable => return Err(self.shared.why_not()),
        };
        Ok(Verdict::Deny { reason, revision })
    }

    /// A permit for `A`, if `user` may do it now; see [`authorize`](crate::authorize()). It names no grant. By `sub`, it
    /// needs [`Options::by_sub`].
    ///
    /// # Errors
    /// [`Refusal::Denied`] if the user may not, [`Refusal::Undecided`] if the snapshot cannot tell.
    pub fn authorize<'u, A: Action>(&self, user: impl Into<UserKey<'u>>) -> Result<Permit<A>, Refusal> {
        Question::about().ask_snapshot(self, user.into())
    }

    /// A permit for `A` on one resource; see [`authorize_on`](crate::authorize_on()).
    ///
    /// # Errors
    /// As [`authorize`](Self::authorize), and [`Refusal::NotAResource`].
    pub fn authorize_on<'u, A: Action>(
        &self,
        user: impl Into<UserKey<'u>>,
        resource: &str,
    ) -> Result<Permit<On<A>>, Refusal> {
        Question::on(resource)?.ask_snapshot(self, user.into())
    }

    /// A permit for an action whose name is only known at run time.
    ///
    /// # Errors
    /// As [`authorize`](Self::authorize).
    pub fn authorize_named<'u>(
        &self,
        user: impl Into<UserKey<'u>>,
        action: &ActionName,
    ) -> Result<Permit<Named>, Refusal> {
        Question::named(action).ask_snapshot(self, user.into())
    }

    /// Waits until the snapshot has come to a revision, such as the one that a write has just given back.
    ///
    /// # Errors
    /// [`Error::SnapshotBehind`] after [`Options::max_staleness`]; [`Error::SnapshotClosed`].
    pub async fn at_least(&self, wanted: Revision) -> Result<(), Error> {
        self.shared.at_least(wanted).await
    }

    /// The state of the database that answers are true of.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.shared.state().revision
    }

    /// How long ago the answers were certainly those of the database.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.shared.age()
    }

    /// How much is in memory.
    #[must_use]
    pub fn size(&self) -> Size {
        self.shared.state().size
    }

    /// How often all was loaded, the first time included; other changes were followed one by one.
    #[must_use]
    pub fn loads(&self) -> u64 {
        self.shared.loads()
    }

    /// Ends the task in the background and waits until it has given back its connections. Checks are then
    /// [`Error::SnapshotClosed`], on all handles.
    pub async fn shutdown(&self) {
        self.shared.close();
        self.shared.ended().await;
    }
}

/// Between two polls.
const LEAST_INTERVAL: Duration = Duration::from_millis(1);

/// The settings of a [`Snapshot`].
#[derive(Debug, Clone)]
#[must_use = "nothing is loaded before `start`"]
pub struct Options {
    max_staleness: Duration,
    poll_interval: Duration,
    listen: bool,
    by_sub: bool,
    max_directory_age: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_staleness: Duration::from_secs(30),
            poll_interval: Duration::from_secs(1),
            listen: true,
            by_sub: false,
            max_directory_age: None,
        }
    }
}

impl Options {
    /// How long the database may be silent before checks are [`Error::SnapshotStale`]; 30 seconds unless set. A full
    /// load must take less, or the snapshot goes stale in each.
    pub const fn max_staleness(mut self, max: Duration) -> Self {
        self.max_staleness = max;
        self
    }

    /// How often the database is asked whether something has changed; 1 second unless set, at least three times in
    /// [`Self::max_staleness`], and at most every millisecond where nothing is announced.
    pub const fn poll_interval(mut self, interval: Duration) -> Self {
        self.poll_interval = interval;
        self
    }

    /// Whether to listen for notifications, on a connection of the snapshot's own; yes unless set.
    pub const fn listen(mut self, listen: bool) -> Self {
        self.listen = listen;
        self
    }

    /// Whether users can be found by `sub` too ([`Snapshot::check_sub`], permits and gates), which takes twice the memory;
    /// no unless set.
    pub const fn by_sub(mut self, by_sub: bool) -> Self {
        self.by_sub = by_sub;
        self
    }

    /// How long ago the last complete sync of each directory may be before checks are [`Error::DirectoryStale`]; a
    /// directory that was never synced counts as too old. No bound unless set.
    pub const fn max_directory_age(mut self, max: Duration) -> Self {
        self.max_directory_age = Some(max);
        self
    }

    /// A poll that is late once must not make the snapshot stale, and polls without a pause would do nothing else.
    fn interval(&self) -> Duration {
        self.poll_interval.min(self.max_staleness / 3).max(LEAST_INTERVAL)
    }

    /// Loads the permissions, then keeps them fresh by a task on the current runtime.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; [`Error::NotMigrated`].
    pub async fn start(mut self, pool: PgPool) -> Result<Snapshot, Error> {
        self.poll_interval = self.interval();
        let by_sub = self.by_sub;
        let (refresher, shared, owner) = Refresher::first(self, pool).await?;
        tokio::spawn(refresher.run());
        Ok(Snapshot { shared, _owner: Arc::new(owner), by_sub })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polls_are_three_in_the_bound_and_never_without_a_pause() {
        let interval = |poll: u64, max: u64| {
            let options = Snapshot::options().poll_interval(Duration::from_millis(poll));
            options.max_staleness(Duration::from_millis(max)).interval().as_millis()
        };
        assert_eq!(
            [interval(1_000, 30_000), interval(20_000, 30_000), interval(5, 30_000)],
            [1_000, 10_000, 5]
        );
        assert_eq!([interval(0, 30_000), interval(1_000, 0), interval(0, 0)], [1, 1, 1]);
    }
}
