use std::collections::HashMap;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_mins(1);

/// Counts calls a minute, for each user and for the whole account.
#[derive(Debug, Default)]
pub(crate) struct Quota {
    per_user: Option<u32>,
    per_account: Option<u32>,
    users: HashMap<Option<String>, Window>,
    account: Option<Window>,
}

#[derive(Debug)]
struct Window {
    start: Instant,
    calls: u32,
}

/// Which limit a call went over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Exceeded {
    User,
    /// With the time until calls are taken again.
    Account(Duration),
}

impl Quota {
    pub(crate) fn new(per_user: Option<u32>, per_account: Option<u32>) -> Self {
        Self { per_user, per_account, ..Self::default() }
    }

    /// Counts a call by this user. A call that is refused counts as well, as it does for Google.
    pub(crate) fn take(&mut self, user: Option<&str>, now: Instant) -> Result<(), Exceeded> {
        if let Some(limit) = self.per_account {
            let window = self.account.get_or_insert(Window { start: now, calls: 0 });
            if window.count(now) > limit {
                return Err(Exceeded::Account(window.remaining(now)));
            }
        }
        if let Some(limit) = self.per_user {
            let window = self.users.entry(user.map(str::to_owned)).or_insert(Window { start: now, calls: 0 });
            if window.count(now) > limit {
                return Err(Exceeded::User);
            }
        }
        Ok(())
    }
}

impl Window {
    fn count(&mut self, now: Instant) -> u32 {
        if now.saturating_duration_since(self.start) >= WINDOW {
            *self = Self { start: now, calls: 0 };
        }
        self.calls = self.calls.saturating_add(1);
        self.calls
    }

    fn remaining(&self, now: Instant) -> Duration {
        WINDOW.saturating_sub(now.saturating_duration_since(self.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_minute_gives_a_new_quota() {
        let mut quota = Quota::new(Some(2), None);
        let start = Instant::now();
        assert_eq!(quota.take(Some("a"), start), Ok(()));
        assert_eq!(quota.take(Some("a"), start), Ok(()));
        assert_eq!(quota.take(Some("a"), start + Duration::from_secs(59)), Err(Exceeded::User));
        assert_eq!(quota.take(Some("a"), start + Duration::from_mins(1)), Ok(()));
    }

    #[test]
    fn each_user_has_a_quota_and_the_account_has_one() {
        let mut quota = Quota::new(Some(1), Some(3));
        let now = Instant::now();
        assert_eq!(quota.take(Some("a"), now), Ok(()));
        assert_eq!(quota.take(Some("b"), now), Ok(()));
        assert_eq!(quota.take(Some("a"), now), Err(Exceeded::User));
        assert_eq!(quota.take(Some("c"), now), Err(Exceeded::Account(Duration::from_mins(1))));
    }
}
