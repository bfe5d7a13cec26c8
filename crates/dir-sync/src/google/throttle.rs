//! How many calls may be under way: fewer after the directory said that its quota is used up, more again while it answers.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Calls that were under way together meet the same used-up quota: that counts once.
const ONE_CUT_IN: Duration = Duration::from_secs(1);

/// Adds one place for each round of answers, halves the places at a rate limit.
#[derive(Debug)]
pub(super) struct Throttle {
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    most: f64,
    places: f64,
    under_way: f64,
    last_cut: Option<Instant>,
}

/// A place taken; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place<'a>(&'a Throttle);

impl Throttle {
    /// At most so many calls at once; at least one.
    pub(super) fn new(most: u16) -> Self {
        let most = f64::from(most.max(1));
        Self {
            state: Mutex::new(State { most, places: most, under_way: 0.0, last_cut: None }),
            freed: Notify::new(),
        }
    }

    // INVARIANT: no more calls are under way than there are places; held by `rate_limit_halves_the_calls_under_way`.
    /// Waits for a place.
    pub(super) async fn enter(&self) -> Place<'_> {
        loop {
            let freed = self.freed.notified();
            {
                let mut state = self.state();
                if state.under_way + 1.0 <= state.places {
                    state.under_way += 1.0;
                    return Place(self);
                }
            }
            freed.await;
        }
    }

    /// An answer came.
    pub(super) fn answered(&self) {
        let mut state = self.state();
        let before = state.places.floor();
        state.places = (state.places + 1.0 / state.places).min(state.most);
        if state.places.floor() > before {
            self.freed.notify_one();
        }
    }

    /// The directory said that there were too many calls.
    pub(super) fn rate_limited(&self) {
        let mut state = self.state();
        let now = Instant::now();
        if state.last_cut.is_none_or(|last| now.duration_since(last) >= ONE_CUT_IN) {
            state.last_cut = Some(now);
            state.places = (state.places / 2.0).max(1.0);
            tracing::info!(places = state.places, "the quota is used up: fewer calls at once");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.state().under_way -= 1.0;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn enters_at_once(throttle: &Throttle) -> Option<Place<'_>> {
        throttle.enter().now_or_never()
    }

    #[tokio::test(start_paused = true)]
    async fn rate_limit_halves_the_calls_under_way() {
        let throttle = Throttle::new(8);
        let mut places: Vec<_> = std::iter::from_fn(|| enters_at_once(&throttle)).collect();
        assert_eq!(places.len(), 8);
        throttle.rate_limited();
        throttle.rate_limited(); // one that was under way as well
        places.truncate(4);
        assert!(enters_at_once(&throttle).is_none());
        places.truncate(3);
        assert!(enters_at_once(&throttle).is_some());
        tokio::time::advance(ONE_CUT_IN).await;
        throttle.rate_limited();
        places.truncate(1);
        assert!(enters_at_once(&throttle).is_some());
        for _ in 0..9 {
            tokio::time::advance(ONE_CUT_IN).await;
            throttle.rate_limited();
        }
        places.clear();
        assert!(enters_at_once(&throttle).is_some(), "one call may always be under way");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_give_the_places_back() {
        let throttle = Throttle::new(4);
        throttle.rate_limited();
        for _ in 0..100 {
            throttle.answered();
        }
        let places: Vec<_> = std::iter::from_fn(|| enters_at_once(&throttle)).collect();
        assert_eq!(places.len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_on_when_a_place_is_free() {
        let throttle = Throttle::new(1);
        let place = throttle.enter().await;
        let (_, ()) = tokio::join!(throttle.enter(), async { drop(place) });
    }
}
