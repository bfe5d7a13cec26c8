use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// As many calls as are kept; a server that runs for days must not fill the memory.
const KEPT_CALLS: usize = 500_000;

/// One call that reached the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// As in `GET`.
    pub method: String,
    /// As it was sent, still percent-encoded.
    pub path: String,
    /// As it was sent, without the `?`; empty when there was none.
    pub query: String,
    /// The status answered; `None` while the call is under way, and for one that was never answered.
    pub status: Option<u16>,
}

/// Every call in the order of arrival, the oldest forgotten past a limit.
#[derive(Debug, Default)]
pub(crate) struct CallLog {
    calls: Mutex<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    kept: VecDeque<Call>,
    /// How many were forgotten: the number of the first one kept.
    forgotten: u64,
}

impl CallLog {
    /// Notes a call that arrived and gives it a number.
    pub(crate) fn begin(&self, method: &str, path: &str, query: &str) -> u64 {
        let mut calls = self.lock();
        if calls.kept.len() == KEPT_CALLS {
            calls.kept.pop_front();
            calls.forgotten += 1;
        }
        calls.kept.push_back(Call {
            method: method.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            status: None,
        });
        calls.count() - 1
    }

    pub(crate) fn finish(&self, number: u64, status: u16) {
        let mut calls = self.lock();
        let index = number.checked_sub(calls.forgotten).and_then(|index| usize::try_from(index).ok());
        if let Some(call) = index.and_then(|index| calls.kept.get_mut(index)) {
            call.status = Some(status);
        }
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.lock().kept.iter().cloned().collect()
    }

    /// All calls ever, those forgotten too.
    pub(crate) fn count(&self) -> u64 {
        self.lock().count()
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Calls {
    fn count(&self) -> u64 {
        self.forgotten + self.kept.len() as u64
    }
}
