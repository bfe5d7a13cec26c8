//! How far a crawl is, on a terminal: one line that is written over, and gone at the end.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::crawl::Progress;

const REDRAW_EVERY: Duration = Duration::from_millis(100);
const BAR: u64 = 24;

/// A line on standard error that follows a crawl until it is dropped; nothing where that is no terminal.
#[derive(Debug)]
pub struct ProgressLine(JoinHandle<()>);

impl ProgressLine {
    /// Draws what the returned sender is given, if standard error is a terminal.
    #[must_use]
    pub fn on_terminal() -> Option<(Self, watch::Sender<Progress>)> {
        if !std::io::stderr().is_terminal() {
            return None;
        }
        let (sender, mut receiver) = watch::channel(Progress::default());
        let drawing = tokio::spawn(async move {
            while receiver.changed().await.is_ok() {
                let line = draw(*receiver.borrow_and_update());
                let _ = write!(std::io::stderr(), "\r\x1b[2K{line}");
                let _ = std::io::stderr().flush();
                tokio::time::sleep(REDRAW_EVERY).await;
            }
        });
        Some((Self(drawing), sender))
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.0.abort();
        let _ = write!(std::io::stderr(), "\r\x1b[2K");
    }
}

/// The groups grow while they are listed, so the bar may step back; it is never past its end.
fn draw(progress: Progress) -> String {
    let Progress { users, groups, groups_done, memberships } = progress;
    let filled = (groups_done.min(groups) * BAR).checked_div(groups).unwrap_or_default();
    let bar: String = (0..BAR).map(|n| if n < filled { '█' } else { '░' }).collect();
    format!("{bar} {groups_done}/{groups} groups, {users} users, {memberships} memberships")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_is_as_full_as_groups_are_done() {
        let full = |groups, groups_done| {
            let line = draw(Progress { users: 5, groups, groups_done, memberships: 7 });
            assert!(
                line.ends_with(&format!("{groups_done}/{groups} groups, 5 users, 7 memberships")),
                "{line}"
            );
            line.matches('█').count()
        };
        assert_eq!(
            [(0, 0), (10, 0), (10, 5), (10, 10), (10, 11)].map(|(all, done)| full(all, done)),
            [0, 0, 12, 24, 24]
        );
    }
}
