//! The task in the background: polls, follows what has changed or loads anew, and publishes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{PgConnection, PgPool};
use tokio::sync::watch;

use super::load::{Loaded, read_all};
use super::model::Model;
use super::poll::{self, Poll, Reads};
use super::shared::Shared;
use super::state::State;
use super::{Options, changes, follow, listen};
use crate::error::Error;
use crate::lent::Lent;

/// A poll may take this long, even if the snapshot is to be younger.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);
/// A full load may take this long, and ten times the bound of the age.
const LOAD_PATIENCE: Duration = Duration::from_mins(10);

pub(super) struct Refresher {
    options: Options,
    pool: PgPool,
    shared: Arc<Shared>,
    /// Gone after a refresh that failed half-way: the next one loads all.
    model: Option<Model>,
    owner: watch::Receiver<bool>,
    closing: watch::Receiver<bool>,
    failing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Poll,
    Incremental,
    Full,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Incremental => "incremental",
            Self::Full => "full",
        }
    }
}

/// What a refresh brought.
struct Refreshed {
    poll: Poll,
    /// With what it needs to go on; `None` if nothing has changed.
    loaded: Option<Loaded>,
}

impl Refresher {
    /// Loads for the first time. The sender ends the refresher when it is dropped.
    pub(super) async fn first(
        options: Options,
        pool: PgPool,
    ) -> Result<(Self, Arc<Shared>, watch::Sender<bool>), Error> {
        let started = Instant::now();
        let mut kind = Kind::Full;
        let outcome = refresh(&options, &pool, None, &mut None, &mut kind).await;
        count(kind, outcome.is_ok(), started.elapsed());
        let Refreshed { poll, loaded: Some(Loaded { model, state }) } = outcome? else {
            return Err(Error::SnapshotClosed);
        };
        let owner = watch::Sender::new(false);
        let shared = Arc::new(Shared::new(&options, state, &poll));
        tracing::info!(
            revision = poll.revision.0,
            duration_ms = millis(started.elapsed()),
            size = ?shared.state().size,
            "the snapshot of permissions is loaded"
        );
        let first = Self {
            options,
            pool,
            model: Some(model),
            owner: owner.subscribe(),
            closing: shared.closing(),
            shared: Arc::clone(&shared),
            failing: false,
        };
        first.gauge();
        Ok((first, shared, owner))
    }

    /// Until the last handle goes or the snapshot is shut down.
    pub(super) async fn run(mut self) {
        let mut owner = self.owner.clone();
        let mut closing = self.closing.clone();
        let end = async {
            tokio::select! {
                _ = owner.wait_for(|gone| *gone) => {}
                _ = closing.wait_for(|closed| *closed) => {}
            }
        };
        let listening = listen::listen(self.options.listen, self.pool.clone(), Arc::clone(&self.shared));
        tokio::select! {
            () = end => {}
            () = async { tokio::join!(listening, self.poll()); } => {}
        }
        self.shared.close();
    }

    async fn poll(&mut self) {
        loop {
            // Whatever woke us, one poll sees all that has happened so far: a burst costs one or two.
            let _ = tokio::time::timeout(self.options.poll_interval, self.shared.wake.notified()).await;
            self.refresh().await;
        }
    }

    async fn refresh(&mut self) {
        let started = Instant::now();
        let old = arc_swap::Guard::into_inner(self.shared.state());
        let known = old.revision;
        let mut kind = Kind::Poll;
        let refreshed = refresh(&self.options, &self.pool, Some(old), &mut self.model, &mut kind).await;
        count(kind, refreshed.is_ok(), started.elapsed());
        match refreshed {
            Ok(Refreshed { mut poll, loaded }) => {
                // INVARIANT: what was known to be true of a moment stays so, as long as the revision does not go back.
                // A standby that has lost its primary cannot tell more than when something last happened, which may be
                // long ago (held by `standby_without_a_primary_serves_until_the_bound_and_not_longer`).
                if poll.revision >= known {
                    poll.as_of = poll.as_of.max(self.shared.as_of());
                }
                if let Some(Loaded { model, state }) = loaded {
                    self.model = Some(model);
                    tracing::debug!(
                        kind = kind.name(),
                        revision = poll.revision.0,
                        duration_ms = millis(started.elapsed()),
                        "the snapshot of permissions took over changes"
                    );
                    self.shared.publish(state, kind == Kind::Full);
                }
                self.shared.confirm(&poll);
                if std::mem::take(&mut self.failing) {
                    tracing::info!(
                        revision = poll.revision.0,
                        "the snapshot of permissions is refreshed again"
                    );
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        age_ms = millis(self.shared.age()),
                        "the snapshot of permissions cannot be refreshed; it goes on trying"
                    );
                }
            }
        }
        self.gauge();
    }

    #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
    fn gauge(&self) {
        let state = self.shared.state();
        metrics::gauge!("authz_snapshot_revision").set(state.revision.0 as f64);
        metrics::gauge!("authz_snapshot_age_seconds").set(self.shared.age().as_secs_f64());
        metrics::gauge!("authz_snapshot_bytes").set(state.size.bytes as f64);
        metrics::gauge!("authz_snapshot_users").set(state.size.users as f64);
    }
}

/// One refresh on a connection of the pool. A connection on which anything went wrong is closed: it may hang, and
/// nobody else should wait for it longer than closing takes.
async fn refresh(
    options: &Options,
    pool: &PgPool,
    old: Option<Arc<State>>,
    model: &mut Option<Model>,
    kind: &mut Kind,
) -> Result<Refreshed, Error> {
    let patience = options.max_staleness.max(LEAST_PATIENCE);
    let mut connection = within(patience, async { Ok(Lent::from(pool).await?) }).await?;
    let refreshed = refresh_on(options, &mut connection, old, model, kind).await?;
    connection.give_back();
    Ok(refreshed)
}

async fn refresh_on(
    options: &Options,
    connection: &mut PgConnection,
    old: Option<Arc<State>>,
    model: &mut Option<Model>,
    kind: &mut Kind,
) -> Result<Refreshed, Error> {
    let patience = options.max_staleness.max(LEAST_PATIENCE);
    let directories = options.max_directory_age.is_some();
    // Without a model there is all to be read.
    if let (Some(old), true) = (&old, model.is_some()) {
        let asking = poll::begin(&mut *connection, directories, Reads::Revision);
        let (transaction, poll) = within(patience, asking).await?;
        within(patience, async { Ok(transaction.commit().await?) }).await?;
        if (old.revision, old.mark) == (poll.revision, poll.mark) {
            return Ok(Refreshed { poll, loaded: None });
        }
    }

    *kind = Kind::Incremental;
    let asking = poll::begin(connection, directories, Reads::Permissions);
    let (mut transaction, poll) = within(patience, asking).await?;
    if let Some(old) = &old
        && poll.on_standby
        && poll.revision < old.revision
    {
        // Another standby than before, which is not as far: what has been answered already is not taken back.
        return Err(Error::SnapshotBehind { wanted: old.revision, has: poll.revision });
    }
    let at = (poll.revision, poll.mark);
    let mut loaded = None;
    if let (Some(model), Some(old)) = (model.take(), old) {
        loaded = within(patience, async {
            match changes::since(&mut transaction, (old.revision, old.mark), poll.revision).await? {
                None => Ok(None),
                Some(found) => follow::follow(&mut transaction, model, old, found, at, options.by_sub).await,
            }
        })
        .await?;
    }
    if loaded.is_some() {
        within(patience, async { Ok(transaction.commit().await?) }).await?;
        return Ok(Refreshed { poll, loaded });
    }
    *kind = Kind::Full;
    let load_patience = options.max_staleness.saturating_mul(10).max(LOAD_PATIENCE);
    let read = within(load_patience, read_all(&mut transaction, options.by_sub)).await?;
    // The database is not held for what is made of it.
    let committed = within(patience, async { Ok(transaction.commit().await?) });
    let ((), loaded) = tokio::try_join!(committed, within(load_patience, read.into_loaded(at)))?;
    Ok(Refreshed { poll, loaded: Some(loaded) })
}

/// Gives up in time: a server that takes no notice must not hold the refresher for ever.
async fn within<T>(patience: Duration, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(patience, work)
        .await
        .unwrap_or_else(|_| Err(Error::Database(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))))
}

fn count(kind: Kind, ok: bool, duration: Duration) {
    let outcome = if ok { "ok" } else { "error" };
    metrics::counter!("authz_snapshot_refreshes_total", "kind" => kind.name(), "outcome" => outcome)
        .increment(1);
    if kind != Kind::Poll && ok {
        metrics::histogram!("authz_snapshot_refresh_seconds", "kind" => kind.name()).record(duration);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
