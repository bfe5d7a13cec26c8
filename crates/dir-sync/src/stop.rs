//! The wish that a run ends early: a signal of the system, or whatever else a program waits for.

use std::fmt;
use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Duration, Instant};

/// Says when a run shall end. One that never comes is the default.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    signals: Option<watch::Receiver<Option<Reason>>>,
    deadline: Option<Instant>,
}

/// What wanted the end, as in `SIGTERM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason(&'static str);

/// The run took too long.
const DEADLINE: Reason = Reason("its deadline (give it longer: `--deadline`)");

impl Reason {
    /// Whether somebody wanted the end, and not the run itself.
    #[must_use]
    pub fn is_from_outside(self) -> bool {
        self != DEADLINE
    }
}

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
        Ok(Self { signals: Some(receiver), deadline: None })
    }

    /// Comes after so long as well, if not before.
    #[must_use]
    pub fn or_after(mut self, time: Duration) -> Self {
        let end = Instant::now().checked_add(time);
        self.deadline = [self.deadline, end].into_iter().flatten().min();
        self
    }

    /// Waits until a run shall end.
    pub async fn wanted(&self) -> Reason {
        let late = async {
            match self.deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = self.signalled() => reason,
            () = late => DEADLINE,
        }
    }

    async fn signalled(&self) -> Reason {
        if let Some(receiver) = &self.signals {
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
