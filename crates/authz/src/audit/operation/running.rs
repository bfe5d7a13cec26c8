//! An operation that runs: begun, and not yet ended.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::audit::Outcome;
use crate::audit::line::{Redact, failure, redacted};
use crate::audit::open::Open;
use crate::permit::Permit;

/// Who tells an end waits so long for it to be durable; the writer goes on trying.
const PATIENCE: Duration = Duration::from_secs(10);

/// An operation whose `started` record is durable: made by [`Operation::start`](super::Operation::start).
///
/// Dropped without [`succeed`](Self::succeed) or [`fail`](Self::fail), it is recorded as `abandoned`.
#[must_use = "an operation that is dropped at once is abandoned"]
pub struct Running<A> {
    permit: Arc<Permit<A>>,
    ending: Ending,
}

/// The part that tells the end.
pub(super) struct Ending {
    open: Open,
    action: String,
    redact: Option<Redact>,
}

impl<A> Running<A> {
    pub(in crate::audit) fn new(permit: Arc<Permit<A>>, open: Open, redact: Option<Redact>) -> Self {
        let action = permit.action().to_string();
        Self { permit, ending: Ending { open, action, redact } }
    }

    pub(super) fn split(self) -> (Ending, Arc<Permit<A>>) {
        (self.ending, self.permit)
    }

    /// Proof that the user may do it, for the functions that demand one.
    pub fn permit(&self) -> &Permit<A> {
        &self.permit
    }

    /// The number of the `started` record, which the end names as its `operation_id`.
    #[must_use]
    pub const fn audit_id(&self) -> i64 {
        self.ending.open.audit_id()
    }

    /// Records that it is done. Comes back when that is durable, or after some seconds: an end that the database does not
    /// take is written as soon as it does.
    pub async fn succeed(self) {
        self.ending.succeed().await;
    }

    /// The same, with something to be known about how it was done.
    pub async fn succeed_with(self, detail: Value) {
        self.ending.end(Outcome::Succeeded, detail).await;
    }

    /// Records that it was tried and did not work, and why: the error's text, its alternate form (`{:#}`).
    pub async fn fail(self, error: &impl Display) {
        self.ending.fail(error).await;
    }
}

impl<A> fmt::Debug for Running<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("audit_id", &self.audit_id())
            .field("permit", &self.permit)
            .finish_non_exhaustive()
    }
}

impl Ending {
    pub(super) async fn succeed(self) {
        self.end(Outcome::Succeeded, json!({})).await;
    }

    pub(super) async fn fail(self, error: &impl Display) {
        self.end(Outcome::Failed, failure("error", &format!("{error:#}"))).await;
    }

    async fn end(self, outcome: Outcome, detail: Value) {
        let detail = redacted(self.redact.as_ref(), &self.action, detail);
        let audit_id = self.open.audit_id();
        if let Some(written) = self.open.tell(outcome, &detail)
            && tokio::time::timeout(PATIENCE, written).await.is_ok()
        {
            return;
        }
        tracing::warn!(
            audit_id,
            action = self.action,
            outcome = outcome.as_str(),
            "the end of an operation is not recorded yet"
        );
    }
}
