//! The task that seals from time to time.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Sealed, SigningKey, seal};
use crate::audit::retention;
use crate::error::Error;

/// How long a record stays unsealed, as a rule.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
/// How often to look whether the next months have their partitions.
const PARTITIONS_EVERY: Duration = Duration::from_hours(1);

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
    let mut partitions_due = tokio::time::Instant::now();
    loop {
        // Seen before a run, so that one more run seals what was there at shutdown.
        let stopping = *stopped.borrow();
        if tokio::time::Instant::now() >= partitions_due {
            match retention::make_partitions(&pool, retention::MONTHS_AHEAD).await {
                Ok(_) => partitions_due += PARTITIONS_EVERY,
                Err(error) => log(&error, "the coming months of the audit trail could not be prepared"),
            }
        }
        match seal(&pool, key.as_deref()).await {
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

fn log(error: &Error, message: &str) {
    tracing::warn!(error = error as &dyn std::error::Error, "{message}; will be tried again");
}
