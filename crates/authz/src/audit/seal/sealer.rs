//! The task that seals from time to time.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Sealed, SigningKey, seal};
use crate::audit::retention;
use crate::error::Error;

/// How long a record stays unsealed, as a rule.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
/// How often to look whether the next months have their partitions.
const PARTITIONS_EVERY: Duration = Duration::from_hours(1);
/// Others take turns with this one, so none keeps it waiting for so long.
const TURN: Duration = Duration::from_mins(5);

/// Seals in the background, and makes the partitions of the coming months.
///
/// One in each instance of a service does no harm: they take turns. A run that fails is logged and tried again.
#[derive(Debug)]
pub struct Sealer {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Sealer {
    /// Starts it; `interval` is how long a record may stay unsealed after its transaction and those before have ended.
    #[must_use]
    pub fn start(pool: PgPool, interval: Duration, key: Option<Arc<SigningKey>>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(run(pool, interval.max(Duration::from_millis(10)), key, stopped));
        Self { stop, task }
    }

    /// Lets the run under way end, seals once more what is there, and stops.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        let _ = self.task.await;
    }
}

async fn run(
    pool: PgPool,
    interval: Duration,
    key: Option<Arc<SigningKey>>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut partitions_due = Instant::now();
    let mut waiting = Waiting::default();
    loop {
        // Seen before a run, so that one more run seals what was there at shutdown.
        let stopping = *stopped.borrow();
        if Instant::now() >= partitions_due {
            match retention::make_partitions(&pool, retention::MONTHS_AHEAD).await {
                Ok(_) => partitions_due += PARTITIONS_EVERY,
                Err(error) => log(&error, "the coming months of the audit trail could not be prepared"),
            }
        }
        let sealed = seal(&pool, key.as_deref()).await;
        let busy = sealed.as_ref().is_ok_and(|sealed| sealed.busy && sealed.seals == 0);
        if waiting.is_long(busy, Instant::now()) {
            tracing::warn!(
                minutes = TURN.as_secs() / 60,
                "another session has been sealing the audit trail for long, or holds the lock and does not; see pg_locks"
            );
        }
        match sealed {
            Ok(Sealed { seals: 0, .. }) => {}
            Ok(sealed) => {
                tracing::debug!(seals = sealed.seals, records = sealed.records, "sealed the audit trail");
            }
            Err(error) => log(&error, "the audit trail could not be sealed"),
        }
        if stopping {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            gone = stopped.wait_for(|stop| *stop) => {
                if gone.is_err() {
                    return;
                }
            }
        }
    }
}

/// For how long another one has been at work whenever this one came.
#[derive(Debug, Default)]
struct Waiting {
    since: Option<Instant>,
    is_told: bool,
}

impl Waiting {
    /// Takes note of a run; whether it is time to tell, which it is once.
    fn is_long(&mut self, busy: bool, now: Instant) -> bool {
        if !busy {
            *self = Self::default();
            return false;
        }
        let since = *self.since.get_or_insert(now);
        let tell = !self.is_told && now.duration_since(since) >= TURN;
        self.is_told |= tell;
        tell
    }
}

fn log(error: &Error, message: &str) {
    tracing::warn!(error = error as &dyn std::error::Error, "{message}; will be tried again");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_that_another_keeps_is_told_of_once() {
        let (mut waiting, began) = (Waiting::default(), Instant::now());
        let told = [
            (0, true),
            (4, true),
            (5, true),
            (6, true),
            (7, false),
            (8, true),
            (12, true),
            (13, true),
            (14, true),
        ]
        .map(|(minute, busy)| waiting.is_long(busy, began + Duration::from_mins(minute)));
        assert_eq!(told, [false, false, true, false, false, false, false, true, false]);
    }
}
