//! What the readers and the refresher share: the state behind one pointer, and until when it may be used.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{Notify, watch};

use super::poll::{DirectoryAge, Poll};
use super::state::{Answer, State};
use super::users::Key;
use super::{Options, clock};
use crate::decision::Revision;
use crate::error::Error;
use crate::name::ActionName;

/// In place of the age of a directory that was never mirrored.
const NEVER: u64 = u64::MAX;
/// In place of the age of directories that nobody asks for.
const UNASKED: u64 = 0;

/// A number for every state that any snapshot in this process publishes.
static GENERATIONS: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The state that this thread has seen last, and its generation.
    static SEEN: RefCell<(u64, Option<Arc<State>>)> = const { RefCell::new((0, None)) };
}

pub(super) struct Shared {
    state: ArcSwap<State>,
    /// Of the state, stored after it.
    generation: AtomicU64,
    /// On [`clock::coarse`], the last moment at which the state may be used; 0 when closed.
    good_until: AtomicU64,
    /// On [`clock::exact`], the moment that the state is certainly true of.
    as_of: AtomicU64,
    /// At `as_of`, the nanoseconds since the oldest directory was mirrored.
    directory_age: AtomicU64,
    /// From [`clock::awake_or_asleep_micros`] to the database's clock.
    clock_offset: AtomicI64,
    max_staleness: Duration,
    max_directory_age: Option<Duration>,
    /// The revision of the state, for those who wait for one.
    revision: watch::Sender<Revision>,
    closed: watch::Sender<bool>,
    /// Full loads so far.
    loads: AtomicU64,
    /// Wakes the refresher before its time.
    pub(super) wake: Notify,
}

impl Shared {
    pub(super) fn new(options: &Options, state: State, poll: &Poll) -> Self {
        let shared = Self {
            revision: watch::Sender::new(state.revision),
            state: ArcSwap::from_pointee(state),
            generation: AtomicU64::new(GENERATIONS.fetch_add(1, Ordering::Relaxed)),
            good_until: AtomicU64::new(0),
            as_of: AtomicU64::new(0),
            directory_age: AtomicU64::new(0),
            clock_offset: AtomicI64::new(0),
            max_staleness: options.max_staleness,
            max_directory_age: options.max_directory_age,
            closed: watch::Sender::new(false),
            loads: AtomicU64::new(1),
            wake: Notify::new(),
        };
        shared.confirm(poll);
        shared
    }

    /// The answer of the state, if that may be used.
    #[inline]
    pub(super) fn judge(&self, key: Key<'_>, action: &ActionName) -> (Answer, Revision) {
        self.ask(|state| state.judge(key, action, || self.database_micros()))
            .unwrap_or((Answer::Unusable, Revision(0)))
    }

    /// What `ask` finds in the state, if that may be used, and the revision of the state.
    ///
    /// A thread keeps the state that it has seen last, so that a check writes no memory that others read: counting a
    /// reader in and out costs as much as the look-up.
    ///
    /// INVARIANT: `good_until` is read first, because the refresher stores the state before it: so an old state is
    /// never judged by the time of a newer one (held by `state_is_never_older_than_its_time`).
    #[inline]
    pub(super) fn ask<T>(&self, ask: impl FnOnce(&State) -> T) -> Option<(T, Revision)> {
        let good_until = self.good_until.load(Ordering::Acquire);
        let generation = self.generation.load(Ordering::Acquire);
        // It cannot be in use further up, and a thread that is ending has no answer.
        let asked = SEEN.try_with(|seen| {
            let mut seen = seen.try_borrow_mut().ok()?;
            if seen.0 != generation {
                self.look(generation, &mut seen);
            }
            let state = seen.1.as_deref()?;
            Some((ask(state), state.revision))
        });
        match asked {
            Ok(Some(asked)) if clock::coarse() <= good_until => Some(asked),
            _ => None,
        }
    }

    #[cold]
    fn look(&self, generation: u64, seen: &mut (u64, Option<Arc<State>>)) {
        // The generation was read before the state: if that is newer, the next check looks again.
        *seen = (generation, Some(self.state.load_full()));
    }

    /// Why the state may not be used.
    #[cold]
    pub(super) fn why_not(&self) -> Error {
        if self.is_closed() {
            return Error::SnapshotClosed;
        }
        let age = self.age();
        if let Some(max) = self.max_directory_age
            && age <= self.max_staleness
        {
            let at_poll = self.directory_age.load(Ordering::Acquire);
            let age = (at_poll != NEVER).then(|| Duration::from_nanos(at_poll).saturating_add(age));
            if age.is_none_or(|age| age > max) {
                return Error::DirectoryStale { age, max };
            }
        }
        // Also where a poll came in between: the caller asks again or not, as with every error.
        Error::SnapshotStale { age, max: self.max_staleness }
    }

    pub(super) fn state(&self) -> Guard<Arc<State>> {
        self.state.load()
    }

    pub(super) fn loads(&self) -> u64 {
        self.loads.load(Ordering::Relaxed)
    }

    pub(super) fn age(&self) -> Duration {
        Duration::from_nanos(clock::exact().saturating_sub(self.as_of()))
    }

    /// On [`clock::exact`], the moment that the state is certainly true of.
    pub(super) fn as_of(&self) -> u64 {
        self.as_of.load(Ordering::Acquire)
    }

    /// The database's clock now, never less than it shows: it was read after the question was sent, and counts from
    /// then.
    pub(super) fn database_micros(&self) -> i64 {
        let offset = self.clock_offset.load(Ordering::Acquire);
        // One more, for the fractions that both readings have lost.
        clock::awake_or_asleep_micros().saturating_add(offset).saturating_add(1)
    }

    /// Takes over a new state; to be confirmed next.
    pub(super) fn publish(&self, state: State, full: bool) {
        self.loads.fetch_add(u64::from(full), Ordering::Relaxed);
        self.state.store(Arc::new(state));
        self.generation.store(GENERATIONS.fetch_add(1, Ordering::Relaxed), Ordering::Release);
    }

    /// The state is true of the moment of this poll.
    pub(super) fn confirm(&self, poll: &Poll) {
        let directory_age = match poll.directory {
            None => UNASKED,
            Some(DirectoryAge::Never) => NEVER,
            Some(DirectoryAge::Ago(age)) => nanos(age).min(NEVER - 1),
        };
        let mut left = nanos(self.max_staleness);
        if let (Some(max), Some(_)) = (self.max_directory_age, poll.directory) {
            left = match nanos(max).checked_sub(directory_age) {
                Some(directory_left) => left.min(directory_left),
                None => 0,
            };
        }
        // The cheap clock lags by up to a tick, so the time ends a tick earlier.
        let good_until = poll.as_of.saturating_add(left).saturating_sub(clock::resolution());
        let too_old = left == 0;
        self.clock_offset.store(poll.clock_offset, Ordering::Release);
        self.directory_age.store(directory_age, Ordering::Release);
        self.as_of.store(poll.as_of, Ordering::Release);
        self.good_until.store(if too_old { 0 } else { good_until }, Ordering::Release);
        if self.is_closed() {
            // Closed meanwhile: whoever comes second stores the end.
            self.good_until.store(0, Ordering::Release);
        }
        let revision = self.state.load().revision;
        self.revision.send_if_modified(|known| std::mem::replace(known, revision) != revision);
    }

    pub(super) async fn at_least(&self, wanted: Revision) -> Result<(), Error> {
        let mut revision = self.revision.subscribe();
        let mut closed = self.closed.subscribe();
        let arrived = async {
            if *revision.borrow_and_update() >= wanted {
                return Ok(());
            }
            self.wake.notify_one();
            tokio::select! {
                _ = closed.wait_for(|closed| *closed) => Err(Error::SnapshotClosed),
                found = revision.wait_for(|revision| *revision >= wanted) => {
                    found.map(|_| ()).map_err(|_| Error::SnapshotClosed)
                }
            }
        };
        if self.is_closed() {
            return Err(Error::SnapshotClosed);
        }
        tokio::time::timeout(self.max_staleness, arrived)
            .await
            .unwrap_or_else(|_| Err(Error::SnapshotBehind { wanted, has: self.state().revision }))
    }

    /// From now on every check is an error, and the refresher ends.
    pub(super) fn close(&self) {
        self.closed.send_replace(true);
        self.good_until.store(0, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// What [`Options::max_directory_age`] has set.
    pub(super) fn max_directory_age(&self) -> Option<Duration> {
        self.max_directory_age
    }

    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.closed.subscribe()
    }

    /// Waits until the refresher, which holds the other ends of this, is gone.
    pub(super) async fn ended(&self) {
        self.closed.closed().await;
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::snapshot::model::Model;
    use crate::snapshot::users::{Builder, Nodes, Users};

    const NOTHING: ActionName = ActionName::constant("nothing");

    fn state(revision: i64) -> State {
        let parts = Builder::parts(0, Nodes::of(0), 1).into_iter().map(|part| part.finish().unwrap());
        let users = Users::of(parts.collect()).unwrap();
        let at = (Revision(revision), super::super::poll::Mark::default());
        crate::snapshot::load::state(
            at,
            users,
            (crate::snapshot::actions::Actions::of(std::iter::empty::<(&str, _)>()), None),
            &Model::default(),
        )
    }

    fn poll(as_of: u64) -> Poll {
        let mark = super::super::poll::Mark::default();
        Poll { revision: Revision(0), mark, on_standby: false, as_of, clock_offset: 0, directory: None }
    }

    #[test]
    fn state_is_never_older_than_its_time() {
        let shared = Shared::new(&Options::default(), state(0), &poll(clock::exact()));
        let least = AtomicI64::new(0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for revision in 1..100_000 {
                    // What was known is too old; then comes a new state, then its time.
                    shared.confirm(&poll(0));
                    least.store(revision, Ordering::SeqCst);
                    shared.publish(state(revision), false);
                    shared.confirm(&poll(clock::exact()));
                }
                done.store(true, Ordering::SeqCst);
            });
            while !done.load(Ordering::SeqCst) {
                let wanted = least.load(Ordering::SeqCst);
                let (answer, revision) = shared.judge(Key::of_bytes(b"nobody"), &NOTHING);
                assert!(answer == Answer::Unusable || revision.0 >= wanted, "{revision} {wanted}");
            }
        });
        assert_eq!(shared.judge(Key::of_bytes(b"nobody"), &NOTHING), (Answer::UnknownUser, Revision(99_999)));
    }

    #[test]
    fn closed_stays_closed() {
        let shared = Shared::new(&Options::default(), state(0), &poll(clock::exact()));
        shared.close();
        shared.confirm(&poll(clock::exact()));
        assert_eq!(shared.judge(Key::of_bytes(b"nobody"), &NOTHING).0, Answer::Unusable);
        assert!(matches!(shared.why_not(), Error::SnapshotClosed));
    }

    #[test]
    fn state_from_before_the_machine_started_is_too_old() {
        const YEAR: u64 = 365 * 24 * 60 * 60 * 1_000_000_000;
        let year = Duration::from_nanos(YEAR);
        let options = Options::default().max_staleness(10 * year);
        for (lag, usable) in [(9 * YEAR, true), (11 * YEAR, false), (u64::MAX, false)] {
            let as_of = clock::exact().saturating_sub(lag);
            let shared = Shared::new(&options, state(0), &poll(as_of));
            assert_eq!(
                shared.judge(Key::of_bytes(b"nobody"), &NOTHING).0 != Answer::Unusable,
                usable,
                "{lag}"
            );
            assert!(shared.age() >= Duration::from_nanos(lag).min(100 * year), "{:?}", shared.age());
        }
    }

    #[test]
    fn directory_that_is_too_old_stops_all_answers() {
        let options = Options::default().max_directory_age(Duration::from_mins(1));
        for (directory, usable) in [
            (None, true),
            (Some(DirectoryAge::Ago(Duration::from_secs(5))), true),
            (Some(DirectoryAge::Ago(Duration::from_secs(61))), false),
            (Some(DirectoryAge::Never), false),
        ] {
            let shared = Shared::new(&options, state(0), &Poll { directory, ..poll(clock::exact()) });
            assert_eq!(
                shared.judge(Key::of_bytes(b"nobody"), &NOTHING).0 != Answer::Unusable,
                usable,
                "{directory:?}"
            );
            assert!(usable || matches!(shared.why_not(), Error::DirectoryStale { .. }));
        }
    }
}
