//! Notifications, which make polls come sooner. Nothing depends on them.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::{PgListener, PgPoolOptions};

use super::shared::Shared;

const CHANNEL: &str = "authz_revision";
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
const PATIENCE: Duration = Duration::from_secs(10);

/// Wakes the refresher at each notification; never ends.
pub(super) async fn listen(wanted: bool, pool: PgPool, shared: Arc<Shared>) {
    if !wanted {
        return std::future::pending().await;
    }
    let mut pause = FIRST_PAUSE;
    let mut said = false;
    loop {
        let error = match connect(&pool).await {
            Ok(mut listener) => {
                pause = FIRST_PAUSE;
                said = false;
                // What happened before we listened.
                shared.wake.notify_one();
                loop {
                    match listener.try_recv().await {
                        Ok(Some(_)) => shared.wake.notify_one(),
                        // Lost: what was sent meanwhile is too, so poll, then connect anew.
                        Ok(None) => break None,
                        Err(error) => break Some(error),
                    }
                }
            }
            Err(error) => Some(error),
        };
        shared.wake.notify_one();
        if let Some(error) = error
            && !std::mem::replace(&mut said, true)
        {
            tracing::info!(
                error = &error as &dyn std::error::Error,
                "the snapshot of permissions gets no notifications (a hot standby or a pooler has none); it polls"
            );
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// A listener on a connection of its own: one of the host's pool would be missing there for good.
async fn connect(pool: &PgPool) -> Result<PgListener, sqlx::Error> {
    let own = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .acquire_timeout(PATIENCE)
        .connect_lazy_with((*pool.connect_options()).clone());
    let mut listener = PgListener::connect_with(&own).await?;
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    Ok(listener)
}
