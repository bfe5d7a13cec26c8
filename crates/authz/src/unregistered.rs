//! The warning about actions that nobody has registered: each name once in a while, and not without bound, because
//! names can come from a client that makes them up.

use std::collections::HashSet;
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

/// So many names are warned of in one period.
const MOST: usize = 100;
const PERIOD: Duration = Duration::from_mins(10);

static SAID: Mutex<Said> = Mutex::new(Said { names: None });

struct Said {
    names: Option<(Instant, HashSet<String>)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Say {
    This,
    ThatThereAreMore,
    Nothing,
}

impl Said {
    fn of(&mut self, action: &str, now: Instant) -> Say {
        let (since, names) = self.names.get_or_insert_with(|| (now, HashSet::new()));
        if now.saturating_duration_since(*since) > PERIOD {
            (*since, *names) = (now, HashSet::new());
        }
        if names.len() > MOST || names.contains(action) {
            return Say::Nothing;
        }
        names.insert(action.to_owned());
        if names.len() > MOST { Say::ThatThereAreMore } else { Say::This }
    }
}

/// A check has named this action, and it is not registered.
#[cold]
pub(crate) fn warn(action: &str) {
    // Whoever would have to wait says nothing: a check must not.
    let say = match SAID.try_lock() {
        Ok(mut said) => said.of(action, Instant::now()),
        Err(TryLockError::Poisoned(said)) => said.into_inner().of(action, Instant::now()),
        Err(TryLockError::WouldBlock) => Say::Nothing,
    };
    match say {
        Say::This => {
            tracing::warn!(action, "a check names an action that is not registered, so nobody may do it");
        }
        Say::ThatThereAreMore => {
            tracing::warn!(
                most = MOST,
                period_s = PERIOD.as_secs(),
                "checks name many actions that are not registered; no more are logged for now"
            );
        }
        Say::Nothing => {
            tracing::debug!(%action, "a check names an action that is not registered, so nobody may do it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_said_once_in_a_period_and_not_without_bound() {
        let mut said = Said { names: None };
        let now = Instant::now();
        for n in 0..MOST {
            assert_eq!(said.of(&format!("a{n}"), now), Say::This);
            assert_eq!(said.of(&format!("a{n}"), now), Say::Nothing);
        }
        assert_eq!(said.of("b", now), Say::ThatThereAreMore);
        for n in 0..1_000 {
            assert_eq!(said.of(&format!("c{n}"), now), Say::Nothing);
        }
        assert!(said.names.as_ref().unwrap().1.len() <= MOST + 1);
        assert_eq!(said.of("a0", now + PERIOD + Duration::from_secs(1)), Say::This);
    }
}
