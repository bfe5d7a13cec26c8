//! The wish that a run ends early: a signal of the system, or whatever else a program waits for.

use std::fmt;
use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Says when a run shall end. One that never comes is the default.
#[derive(Debug, Clone, Default)]
pub struct Stop(Option<watch::Receiver<Option<Reason>>>);

/// What wanted the end, as in `SIGTERM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason(&'static str);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Exit code of a program that a second signal ended on the spot.
const IMPATIENT: i32 = 130;

impl Stop {
    /// Comes with SIGTERM or SIGINT. A second signal ends the program on the spot, like a kill: the mirror stays as it
    /// was, and the lease ends by itself.
    ///
    /// # Errors
    /// If the system does not let signals be handled.
    pub fn on_signals() -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                if sender.borrow().is_some() {
                    std::process::exit(IMPATIENT);
                }
                tracing::warn!(signal = name, "ending the run");
                sender.send_replace(Some(Reason(name)));
            }
        });
        Ok(Self(Some(receiver)))
    }

    /// Waits until a run shall end.
    pub async fn wanted(&self) -> Reason {
        if let Some(receiver) = &self.0 {
            let mut receiver = receiver.clone();
            if let Ok(reason) = receiver.wait_for(Option::is_some).await
                && let Some(reason) = *reason
            {
                return reason;
            }
        }
        std::future::pending().await
    }
}
