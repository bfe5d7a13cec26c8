//! Notices that the directory has stopped answering, or wants to be left alone, so that not each of thousands of groups uses
//! up its attempts.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

/// Failed attempts in a row after which one call at a time finds out whether the directory answers again.
const DOUBT: u32 = 16;
/// Calls in a row that used up all their attempts after which it is taken for dead.
const DEAD: u32 = 5;
/// Calls in a row that met a used-up quota at all of their attempts after which it is taken for used up for good.
const OUT_OF_QUOTA: u32 = 5;
/// No run is at work for longer.
const LONGEST_REST: Duration = Duration::from_hours(24);

/// Shared by all calls.
///
/// Sound, all calls go ahead. In doubt, one goes ahead with all its attempts and pauses, and the others wait for what it
/// finds. Dead, or out of quota for as long as several calls may try, none is sent any more. One answer makes it sound again. Nor is one sent while the directory wants to be left
/// alone for longer than any call may wait.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failed_in_a_row: AtomicU32,
    used_up_in_a_row: AtomicU32,
    out_of_quota_in_a_row: AtomicU32,
    probe: Mutex<()>,
    rests_until: SyncMutex<Option<Instant>>,
}

/// Whether to send an attempt.
#[derive(Debug)]
pub(super) enum Admitted<'a> {
    /// As usual.
    Sound,
    /// As the only one; keep it until the call is over.
    Probing(MutexGuard<'a, ()>),
    /// Not at all.
    Dead,
    /// Not at all, for now.
    Resting,
    /// Not at all: the quota does not come back.
    OutOfQuota,
}

impl Breaker {
    /// To be asked before each attempt that is not a probe's.
    pub(super) async fn admit(&self) -> Admitted<'_> {
        if self.rests() {
            return Admitted::Resting;
        }
        if self.out_of_quota_in_a_row.load(Ordering::Relaxed) >= OUT_OF_QUOTA {
            return Admitted::OutOfQuota;
        }
        if self.is_dead() {
            return Admitted::Dead;
        }
        if !self.is_in_doubt() {
            return Admitted::Sound;
        }
        let probe = self.probe.lock().await;
        if self.is_dead() {
            Admitted::Dead
        } else if self.is_in_doubt() {
            Admitted::Probing(probe)
        } else {
            Admitted::Sound
        }
    }

    /// An answer came, be it an error about the request.
    pub(super) fn answered(&self) {
        self.failed_in_a_row.store(0, Ordering::Relaxed);
        self.used_up_in_a_row.store(0, Ordering::Relaxed);
        self.out_of_quota_in_a_row.store(0, Ordering::Relaxed);
    }

    /// No usable answer came.
    pub(super) fn failed(&self) {
        self.failed_in_a_row.fetch_add(1, Ordering::Relaxed);
    }

    /// A call has no attempt left.
    pub(super) fn used_up(&self) {
        self.used_up_in_a_row.fetch_add(1, Ordering::Relaxed);
    }

    /// A call has met a used-up quota at each attempt.
    pub(super) fn out_of_quota(&self) {
        self.out_of_quota_in_a_row.fetch_add(1, Ordering::Relaxed);
    }

    /// The directory wants no calls for so long.
    pub(super) fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause.min(LONGEST_REST);
        let mut rests_until = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        *rests_until = (*rests_until).max(Some(until));
    }

    fn rests(&self) -> bool {
        let rests_until = self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        rests_until.is_some_and(|until| Instant::now() < until)
    }

    fn is_in_doubt(&self) -> bool {
        self.failed_in_a_row.load(Ordering::Relaxed) >= DOUBT
    }

    // INVARIANT: in doubt before dead, so what is dead was probed; held by `dead_directory_is_not_asked_for_each_group`.
    fn is_dead(&self) -> bool {
        self.is_in_doubt() && self.used_up_in_a_row.load(Ordering::Relaxed) >= DEAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn in_doubt_one_goes_ahead_and_an_answer_ends_the_doubt() {
        let breaker = Breaker::default();
        for _ in 0..DOUBT {
            assert!(matches!(breaker.admit().await, Admitted::Sound));
            breaker.failed();
        }
        let probing = breaker.admit().await;
        assert!(matches!(probing, Admitted::Probing(_)));
        assert!(breaker.admit().now_or_never().is_none(), "the others wait");
        breaker.answered();
        drop(probing);
        assert!(matches!(breaker.admit().await, Admitted::Sound));
    }

    #[tokio::test(start_paused = true)]
    async fn who_wants_to_be_left_alone_is_asked_again_after_that() {
        let breaker = Breaker::default();
        breaker.rest(Duration::from_mins(10));
        breaker.rest(Duration::from_mins(6));
        breaker.answered(); // one that was under way
        tokio::time::advance(Duration::from_mins(9)).await;
        assert!(matches!(breaker.admit().await, Admitted::Resting));
        tokio::time::advance(Duration::from_mins(1)).await;
        assert!(matches!(breaker.admit().await, Admitted::Sound));
        breaker.rest(Duration::MAX);
        assert!(matches!(breaker.admit().await, Admitted::Resting));
    }

    #[tokio::test]
    async fn groups_that_are_broken_themselves_do_not_kill_it() {
        let breaker = Breaker::default();
        for _ in 0..100 {
            breaker.failed();
            breaker.used_up();
            breaker.answered();
        }
        assert!(matches!(breaker.admit().await, Admitted::Sound));
    }
}
