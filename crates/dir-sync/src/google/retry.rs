//! How often and how long a failed call is tried again.

use std::time::Duration;

use rand::Rng;
use tokio::time::Instant;

/// Exponential backoff with full jitter, bounded in attempts and in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The longest pause before the second attempt; it doubles with each further one.
    pub base_delay: Duration,
    /// No pause is longer, unless the directory asks for it.
    pub max_delay: Duration,
    /// Attempts at a call, the first included.
    pub attempts: u32,
    /// Attempts at a call that meets a used-up quota, which is given back by the minute.
    pub rate_limited_attempts: u32,
    /// No new attempt starts this long after the first one did.
    pub total: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            base_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(32),
            attempts: 6,
            rate_limited_attempts: 10,
            total: Duration::from_mins(5),
        }
    }
}

/// One call's attempts.
#[derive(Debug)]
pub(super) struct Attempts<'a> {
    policy: &'a RetryPolicy,
    begun: Instant,
    made: u32,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(policy: &'a RetryPolicy) -> Self {
        Self { policy, begun: Instant::now(), made: 0 }
    }

    /// Attempts that failed so far.
    pub(super) fn made(&self) -> u32 {
        self.made
    }

    /// Counts a failed attempt; the pause before the next one, or `None` if there is to be none.
    pub(super) fn failed(&mut self, rate_limited: bool, retry_after: Option<Duration>) -> Option<Duration> {
        self.made += 1;
        let bound = if rate_limited { self.policy.rate_limited_attempts } else { self.policy.attempts };
        if self.made >= bound {
            return None;
        }
        let doubled = self.policy.base_delay.saturating_mul(1 << (self.made - 1).min(20));
        let longest = doubled.min(self.policy.max_delay);
        let jittered = longest.mul_f64(rand::rng().random_range(0.0..=1.0));
        // The directory's own advice is a lower bound; the jitter on top keeps callers out of step.
        let pause = retry_after.map_or(jittered, |advice| advice.saturating_add(jittered.min(advice / 4)));
        (self.begun.elapsed().saturating_add(pause) <= self.policy.total).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_up_to_the_bound_and_end() {
        let policy = RetryPolicy { attempts: 8, max_delay: Duration::from_secs(4), ..RetryPolicy::default() };
        let mut attempts = Attempts::new(&policy);
        let pauses: Vec<_> = std::iter::from_fn(|| attempts.failed(false, None)).collect();
        assert_eq!(pauses.len(), 7);
        for (pause, longest) in pauses.iter().zip([1, 2, 4, 4, 4, 4, 4]) {
            assert!(*pause <= Duration::from_secs(longest));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn advice_of_the_directory_is_a_lower_bound() {
        let policy = RetryPolicy::default();
        let pause = Attempts::new(&policy).failed(true, Some(Duration::from_secs(40))).unwrap();
        assert!(pause >= Duration::from_secs(40) && pause <= Duration::from_secs(50));
    }

    #[tokio::test(start_paused = true)]
    async fn advice_past_the_total_ends_the_attempts() {
        let policy = RetryPolicy::default();
        assert_eq!(Attempts::new(&policy).failed(true, Some(Duration::from_secs(301))), None);
    }
}
