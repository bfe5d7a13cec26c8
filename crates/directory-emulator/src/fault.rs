use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::directory::text;
use crate::{Directory, Gate, keyless};

/// Which calls a fault looks at; paths are compared without their percent-encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// Every call of the API, not those of the token endpoint.
    Anything,
    /// Calls of exactly this path, as in `/admin/directory/v1/users` or `/token`.
    Path(String),
    /// Calls of paths that start so.
    Prefix(String),
    /// Listings of the members of the group with this id, address or alias, however the call names it.
    MembersOf(String),
}

impl Target {
    /// Calls of exactly this path.
    #[must_use]
    pub fn path(path: impl Into<String>) -> Self {
        Self::Path(path.into())
    }

    /// Calls of paths that start so.
    #[must_use]
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self::Prefix(prefix.into())
    }

    /// Listings of users.
    #[must_use]
    pub fn users() -> Self {
        Self::path("/admin/directory/v1/users")
    }

    /// Listings of groups.
    #[must_use]
    pub fn groups() -> Self {
        Self::path("/admin/directory/v1/groups")
    }

    /// Listings of the members of this group.
    #[must_use]
    pub fn members_of(group_key: impl Into<String>) -> Self {
        Self::MembersOf(group_key.into())
    }

    /// Requests for an access token.
    #[must_use]
    pub fn token() -> Self {
        Self::path("/token")
    }

    fn matches(&self, path: &str, directory: &Directory) -> bool {
        let decoded = percent_decode_str(path).decode_utf8_lossy();
        match self {
            Self::Anything => decoded != "/token" && !keyless::is_keyless_path(&decoded),
            Self::Path(wanted) => decoded == *wanted,
            Self::Prefix(prefix) => decoded.starts_with(prefix.as_str()),
            Self::MembersOf(wanted) => members_key(&decoded).is_some_and(|key| {
                key == wanted
                    || directory.group(key).is_some_and(|group| {
                        directory.group(wanted).is_some_and(|other| text(group, "id") == text(other, "id"))
                    })
            }),
        }
    }
}

fn members_key(path: &str) -> Option<&str> {
    path.strip_prefix("/admin/directory/v1/groups/")?.strip_suffix("/members")
}

/// What happens to a call.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Effect {
    /// An error with Google's body for this reason (for `/token`: with OAuth's body).
    Status {
        /// As in 503.
        status: u16,
        /// As in `backendError`.
        reason: String,
        /// The header `Retry-After`, in seconds.
        retry_after_seconds: Option<u64>,
    },
    /// The status and the first half of the right answer; then the connection breaks.
    CutShort(Framing),
    /// The connection is closed without an answer.
    CloseConnection,
    /// A listing with nothing in it and no next page.
    EmptyListing,
    /// A listing whose next page is always the page that was asked for: a loop without end.
    RepeatPageToken,
    /// The right answer, later.
    Delay(Duration),
    /// The right answer once the gate is released.
    Hold(Gate),
    /// The directory is replaced just before the call is answered.
    ReplaceDirectory(Arc<Directory>),
}

impl Effect {
    /// An error with Google's body for this reason.
    #[must_use]
    pub fn status(status: u16, reason: impl Into<String>) -> Self {
        Self::Status { status, reason: reason.into(), retry_after_seconds: None }
    }

    /// An error that asks the caller to wait this many seconds.
    #[must_use]
    pub fn status_retry_after(status: u16, reason: impl Into<String>, seconds: u64) -> Self {
        Self::Status { status, reason: reason.into(), retry_after_seconds: Some(seconds) }
    }
}

/// How an answer that is cut short announced its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// With a `Content-Length` that is not reached.
    ContentLength,
    /// In chunks, the last of which never comes.
    Chunked,
}

/// A fault that tests switch on. Without a limit it strikes every call that it looks at.
#[derive(Clone, Debug)]
pub struct Fault {
    target: Target,
    effect: Effect,
    first_call: u64,
    last_call: u64,
}

impl Fault {
    /// Strikes every call of the target.
    #[must_use]
    pub fn new(target: Target, effect: Effect) -> Self {
        Self { target, effect, first_call: 1, last_call: u64::MAX }
    }

    /// Strikes only the n-th call of the target, counted from one since the fault was added.
    #[must_use]
    pub fn on_call(self, n: u64) -> Self {
        Self { first_call: n, last_call: n, ..self }
    }

    /// Strikes the n-th call of the target and all later ones, counted from one.
    #[must_use]
    pub fn from_call(self, n: u64) -> Self {
        Self { first_call: n, ..self }
    }

    /// Strikes no call of the target past the n-th, counted from one.
    #[must_use]
    pub fn up_to_call(self, n: u64) -> Self {
        Self { last_call: n, ..self }
    }
}

/// The faults that are switched on, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    active: Mutex<Vec<Active>>,
}

#[derive(Debug)]
struct Active {
    fault: Fault,
    seen: u64,
}

impl Faults {
    pub(crate) fn add(&self, fault: Fault) {
        self.lock().push(Active { fault, seen: 0 });
    }

    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    /// Counts this call on every fault that looks at it and gives the effects of those that strike.
    pub(crate) fn strike(&self, path: &str, directory: &Directory) -> Vec<Effect> {
        let mut effects = Vec::new();
        for active in self.lock().iter_mut() {
            if active.fault.target.matches(path, directory) {
                active.seen += 1;
                if (active.fault.first_call..=active.fault.last_call).contains(&active.seen) {
                    effects.push(active.fault.effect.clone());
                }
            }
        }
        effects
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
