//! An operation that has begun, and the duty to tell how it ends.

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::Outcome;
use super::line::{Line, failure, json_text};
use super::writer::{Answer, Kind, Message, send};

/// Whoever holds this tells how the operation ended. Dropped without that (by a panic, by a future that is not polled to
/// its end), it tells that it was abandoned.
pub(super) struct Open {
    /// Keeps the writer from ending before this has told. None if the writer is at its end: then the sweeper tells.
    sender: Option<mpsc::UnboundedSender<Message>>,
    /// As the operation began; taken when its end is told.
    line: Option<Line>,
    audit_id: i64,
}

impl Open {
    pub(super) fn new(sender: &mpsc::WeakUnboundedSender<Message>, line: Line, audit_id: i64) -> Self {
        Self { sender: sender.upgrade(), line: Some(line), audit_id }
    }

    /// The number of the `started` record.
    pub(super) const fn audit_id(&self) -> i64 {
        self.audit_id
    }

    /// Tells the end; what comes back says when it is written.
    pub(super) fn tell(mut self, outcome: Outcome, detail: &Value) -> Option<oneshot::Receiver<Answer>> {
        self.end(outcome, detail)
    }

    fn end(&mut self, outcome: Outcome, detail: &Value) -> Option<oneshot::Receiver<Answer>> {
        let (line, sender) = (self.line.take()?, self.sender.take()?);
        // What has happened is told even if the words for it cannot be.
        let detail = super::line::detail(detail)
            .or_else(|error| json_text(&failure("detail", &error.to_string())))
            .unwrap_or_else(|_| "{}".to_owned());
        let end = Line { outcome, detail, decision: None, operation_id: Some(self.audit_id), ..line };
        Some(send(&sender, end, Kind::End))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.line.is_some() {
            let reason = if std::thread::panicking() {
                "the task that ran it panicked"
            } else {
                "the task that ran it was cancelled"
            };
            drop(self.end(Outcome::Abandoned, &json!({ "reason": reason })));
        }
    }
}
