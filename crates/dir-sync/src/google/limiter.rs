//! Holds API calls to a quota: at most so many in any sliding minute.

use std::collections::VecDeque;
use std::sync::{Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

const WINDOW: Duration = Duration::from_mins(1);

/// Lets at most `per_minute` calls start in any sixty seconds; the others wait in the order they came.
#[derive(Debug)]
pub(crate) struct Limiter {
    per_minute: usize,
    // When the last `per_minute` calls started. The one at the head of the queue waits while holding the lock,
    // so a call that is given up before its turn costs nothing.
    starts: Mutex<VecDeque<Instant>>,
    hold: SyncMutex<Option<Instant>>,
}

impl Limiter {
    /// A limiter for so many calls a minute; 0 sets no limit.
    pub(crate) fn new(per_minute: u32) -> Self {
        let per_minute = usize::try_from(per_minute).unwrap_or(usize::MAX);
        Self { per_minute, starts: Mutex::default(), hold: SyncMutex::default() }
    }

    // INVARIANT: no sliding minute has more starts than the limit; held by `no_sliding_minute_has_more_calls_than_the_limit`.
    /// Waits until a call may start, and counts it as started.
    pub(crate) async fn start(&self) {
        let mut starts = self.starts.lock().await;
        loop {
            let quota = match starts.front() {
                Some(oldest) if self.per_minute > 0 && starts.len() >= self.per_minute => {
                    Some(*oldest + WINDOW)
                }
                _ => None,
            };
            let ready = quota.max(*self.hold.lock().unwrap_or_else(PoisonError::into_inner));
            match ready {
                Some(at) if at > Instant::now() => sleep_until(at).await,
                _ => break,
            }
        }
        if self.per_minute > 0 {
            if starts.len() >= self.per_minute {
                starts.pop_front();
            }
            starts.push_back(Instant::now());
        }
    }

    /// Lets no call start for a while: the directory said that its quota is used up, which all calls share.
    pub(crate) fn hold_for(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut hold = self.hold.lock().unwrap_or_else(PoisonError::into_inner);
        *hold = (*hold).max(Some(until));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    async fn starts_of(limiter: Limiter, calls: usize) -> Vec<Duration> {
        let (limiter, begin) = (Arc::new(limiter), Instant::now());
        let mut tasks = tokio::task::JoinSet::new();
        for number in 0..calls {
            let limiter = Arc::clone(&limiter);
            tasks.spawn(async move {
                // Calls come in over time, not all at once.
                tokio::time::sleep(Duration::from_millis(700 * number as u64)).await;
                limiter.start().await;
                begin.elapsed()
            });
        }
        let mut starts = tasks.join_all().await;
        starts.sort();
        starts
    }

    #[tokio::test(start_paused = true)]
    async fn no_sliding_minute_has_more_calls_than_the_limit() {
        let starts = starts_of(Limiter::new(10), 35).await;
        for eleven in starts.windows(11) {
            assert!(eleven[10] >= eleven[0] + WINDOW, "11 calls within a minute: {eleven:?}");
        }
        // And no slower than the limit asks for: the 31st call is the first of the fourth minute.
        assert!(starts[30] < Duration::from_secs(181), "{:?}", starts[30]);
    }

    #[tokio::test(start_paused = true)]
    async fn limit_of_zero_never_waits() {
        let starts = starts_of(Limiter::new(0), 100).await;
        assert!(starts[99] < Duration::from_secs(70));
    }

    #[tokio::test(start_paused = true)]
    async fn hold_delays_every_call() {
        let limiter = Limiter::new(0);
        limiter.hold_for(Duration::from_secs(5));
        limiter.hold_for(Duration::from_secs(2));
        let begin = Instant::now();
        limiter.start().await;
        assert!(begin.elapsed() >= Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn call_given_up_before_its_turn_costs_nothing() {
        let limiter = Limiter::new(1);
        limiter.start().await;
        let impatient = tokio::time::timeout(Duration::from_secs(1), limiter.start()).await;
        assert!(impatient.is_err());
        let begin = Instant::now();
        limiter.start().await;
        assert!(begin.elapsed() <= Duration::from_mins(1));
    }
}
