//! One connection that writes the records of many callers, a batch per commit.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::line::Line;
use super::link::{Link, is_refusal, is_unacceptable};
use super::open::Open;
use super::{Actor, Record, batch, sweep};
use crate::error::Error;

/// At most so many records share a commit.
const MOST: usize = 1024;
/// A batch waits at most so long for those who are about to join it.
const GATHER: Duration = Duration::from_millis(5);
/// How often an owner of operations renews its lease, and tries again to write what it could not.
const BEAT: Duration = Duration::from_secs(5);
/// How soon it tries again after a failure.
const RETRY: Duration = Duration::from_millis(500);
/// An owner that has not renewed its lease for so long is taken for gone.
const LEASE: Duration = Duration::from_secs(30);
/// How often an owner looks for operations of owners that are gone, and how old these must be.
const SWEEP_EVERY: Duration = Duration::from_mins(1);
/// For so long a start whose answer got lost may still turn up in the trail.
const DOUBT: Duration = Duration::from_mins(10);
/// How often a writer that is to end tries to get rid of what it could not write.
const LAST_TRIES: u32 = 5;

/// Writes records that stand by themselves: one connection of its own, any number of callers, as many of their
/// records in each commit as are waiting. Cheap to clone.
///
/// A record is durable once [`Writer::record`] has come back, also where the server is set to `synchronous_commit = off`,
/// and stays if the caller's own transaction is rolled back.
///
/// The connection is made with the options of the pool (hooks of the pool do not run on it), when the first record is to
/// be written; if the database was restored into another cluster meanwhile, that is noted then, so that the trail is read in
/// its order. The writer ends when its last handle is dropped, every operation that it began has ended, and everything
/// is written; [`Writer::close`] waits for that.
///
/// Metrics: counters `authz_audit_records_total` and `authz_audit_failures_total`, histogram `authz_audit_batch_records`.
#[derive(Clone)]
pub struct Writer {
    sender: mpsc::UnboundedSender<Message>,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("closed", &self.sender.is_closed()).finish()
    }
}

/// What a record means to the operations that are under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing.
    Plain,
    /// It begins one.
    Start,
    /// It tells how something ended, so it is written sooner or later: kept and tried again if need be.
    End,
}

/// What became of a record: its number and, if it began an operation, the duty to tell how that ends.
pub(crate) type Answer = Result<(i64, Option<Open>), Error>;

pub(super) struct Order {
    line: Line,
    kind: Kind,
    reply: oneshot::Sender<Answer>,
}

pub(super) enum Message {
    Write(Box<Order>),
    /// Dropped when the writer ends.
    WhenEnded(oneshot::Sender<()>),
}

impl Writer {
    /// A writer as a task on the current runtime. Fails only when used: nothing is asked of the database yet.
    ///
    /// # Panics
    /// Outside a tokio runtime, as everything that talks to the database.
    #[must_use]
    pub fn start(pool: PgPool) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let task = Task {
            sender: sender.downgrade(),
            receiver,
            link: Link::new(pool),
            owner: None,
            doubtful: Vec::new(),
            unwritten: VecDeque::new(),
            swept: Instant::now(),
            last_batch: 0,
            last_took: Duration::ZERO,
        };
        tokio::spawn(task.run());
        Self { sender }
    }

    /// Writes a record. It is durable, with the number that is returned, when this comes back; dropping the future does
    /// not take the record back.
    ///
    /// # Errors
    /// [`Error::NotRecorded`] if it could not be written, or if nobody knows; [`Error::RecordTooLarge`]. What the
    /// record tells of must not go on then.
    pub async fn record(&self, actor: &Actor, record: &Record<'_>) -> Result<i64, Error> {
        self.write(Line::of(actor, record)?).await
    }

    pub(super) async fn write(&self, line: Line) -> Result<i64, Error> {
        let (audit_id, _) = send(&self.sender, line, Kind::Plain).await.map_err(|_| gone())??;
        Ok(audit_id)
    }

    /// Writes a record that begins an operation.
    pub(super) async fn open(&self, line: Line) -> Result<Open, Error> {
        let (_, open) = send(&self.sender, line, Kind::Start).await.map_err(|_| gone())??;
        open.ok_or_else(gone)
    }

    /// Hands over how something ended: sooner or later it is written.
    pub(super) fn end(&self, line: Line) -> oneshot::Receiver<Answer> {
        send(&self.sender, line, Kind::End)
    }

    /// Waits until the other handles are dropped too, every operation has ended, and everything is written. What the
    /// database does not take then within some seconds is left to the sweeper.
    pub async fn close(self) {
        let (done, ended) = oneshot::channel();
        let told = self.sender.send(Message::WhenEnded(done)).is_ok();
        drop(self);
        if told {
            let _ = ended.await;
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// Hands a record over without waiting: also from `drop`.
pub(super) fn send(
    sender: &mpsc::UnboundedSender<Message>,
    line: Line,
    kind: Kind,
) -> oneshot::Receiver<Answer> {
    let (reply, answer) = oneshot::channel();
    if let Err(mpsc::error::SendError(Message::Write(order))) =
        sender.send(Message::Write(Box::new(Order { line, kind, reply })))
    {
        if kind == Kind::End {
            let Line { action, outcome, operation_id, .. } = &order.line;
            tracing::error!(
                action,
                outcome = outcome.as_str(),
                operation_id,
                "the writer of audit records ended before the operation did; that will be swept up as abandoned"
            );
        }
        let _ = order.reply.send(Err(gone()));
    }
    answer
}

fn gone() -> Error {
    Error::NotRecorded(Arc::new(sqlx::Error::WorkerCrashed))
}

struct Owner {
    owner_id: i64,
    /// Of its next operation.
    number: i64,
}

struct Task {
    /// For those who have to tell the end of an operation.
    sender: mpsc::WeakUnboundedSender<Message>,
    receiver: mpsc::UnboundedReceiver<Message>,
    link: Link,
    /// From the first operation on.
    owner: Option<Owner>,
    /// Starts of which nobody knows whether they are in the trail, by owner and number, and since when.
    doubtful: Vec<(i64, i64, Instant)>,
    /// Ends that the database did not take.
    unwritten: VecDeque<Order>,
    swept: Instant,
    /// How many records the last batch had, and how long it took.
    last_batch: usize,
    last_took: Duration,
}

impl Task {
    async fn run(mut self) {
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut messages = Vec::new();
        let mut waiting = Vec::new();
        loop {
            let tending = self.owner.is_some() || !self.unwritten.is_empty() || !self.doubtful.is_empty();
            tokio::select! {
                received = self.receiver.recv_many(&mut messages, MOST) => {
                    if received == 0 {
                        break;
                    }
                    self.gather(&mut messages).await;
                    let mut orders = Vec::with_capacity(received);
                    for message in messages.drain(..) {
                        match message {
                            Message::Write(order) => orders.push(*order),
                            Message::WhenEnded(done) => waiting.push(done),
                        }
                    }
                    self.write(orders).await;
                }
                _ = beat.tick(), if tending => self.tend().await,
            }
            if !self.unwritten.is_empty() {
                beat.reset_after(RETRY);
            }
        }
        self.end().await;
        drop(waiting);
    }

    /// Waits for those who were answered a moment ago and are about to hand over the next record: else the first of them
    /// would get a commit of its own, and the others wait for it. Alone, nobody waits; nobody does for long.
    async fn gather(&mut self, messages: &mut Vec<Message>) {
        let end = Instant::now() + (self.last_took / 2).min(GATHER);
        while messages.len() < self.last_batch && Instant::now() < end {
            tokio::task::yield_now().await;
            while messages.len() < MOST
                && let Ok(message) = self.receiver.try_recv()
            {
                messages.push(message);
            }
        }
    }

    /// Writes a batch and answers its callers.
    async fn write(&mut self, orders: Vec<Order>) {
        if orders.is_empty() {
            return;
        }
        let started = Instant::now();
        self.last_batch = orders.len();
        #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
        metrics::histogram!("authz_audit_batch_records").record(orders.len() as f64);
        let lines: Vec<_> = orders.iter().map(|order| (&order.line, order.kind)).collect();
        match self.insert(&lines).await {
            Ok(ids) => self.answer(orders, &ids),
            Err(error) if orders.len() > 1 && is_refusal(&error) => {
                // One of them is not acceptable. The others must not suffer from it.
                for order in orders {
                    match self.insert(&[(&order.line, order.kind)]).await {
                        Ok(ids) => self.answer(vec![order], &ids),
                        Err(error) => self.fail(vec![order], error),
                    }
                }
            }
            Err(error) => self.fail(orders, error),
        }
        self.last_took = started.elapsed();
        if !self.unwritten.is_empty() {
            self.write_ends().await;
        }
    }

    async fn insert(&mut self, lines: &[(&Line, Kind)]) -> Result<Vec<i64>, sqlx::Error> {
        let starts = lines.iter().any(|(_, kind)| *kind == Kind::Start);
        let ends = lines.iter().any(|(line, _)| line.operation_id.is_some());
        if !starts && !ends {
            let written = self.link.work(async |c| match lines {
                [(line, _)] => batch::insert_one(c, line).await.map(|audit_id| vec![audit_id]),
                lines => batch::insert(c, lines.iter().map(|(line, _)| *line)).await,
            });
            return written.await;
        }
        let owner_id = if starts { self.owner().await? } else { 0 };
        let numbers: Vec<_> = lines
            .iter()
            .map(|(_, kind)| match (kind, &mut self.owner) {
                (Kind::Start, Some(owner)) => {
                    owner.number += 1;
                    Some(owner.number)
                }
                _ => None,
            })
            .collect();
        let written = self
            .link
            .work(async |c| {
                batch::insert_operations(c, lines.iter().map(|(line, _)| *line), &numbers, owner_id).await
            })
            .await;
        if let Err(error) = &written
            && !is_refusal(error)
        {
            let now = Instant::now();
            self.doubtful.extend(numbers.iter().flatten().map(|number| (owner_id, *number, now)));
        }
        written
    }

    /// The owner of the operations that begin now, with a lease.
    async fn owner(&mut self) -> Result<i64, sqlx::Error> {
        if let Some(owner) = &self.owner {
            return Ok(owner.owner_id);
        }
        let owner_id = self.link.work(async |c| batch::new_owner(c, LEASE.as_secs_f64()).await).await?;
        self.owner = Some(Owner { owner_id, number: 0 });
        Ok(owner_id)
    }

    /// Tells the callers. One who has gone meanwhile drops what it was sent, and with it an operation that nobody runs.
    fn answer(&mut self, orders: Vec<Order>, ids: &[i64]) {
        metrics::counter!("authz_audit_records_total").increment(ids.len() as u64);
        let mut ids = ids.iter();
        for Order { line, kind, reply } in orders {
            let answer = ids.next().copied().ok_or_else(gone).map(|audit_id| {
                let open = (kind == Kind::Start).then(|| Open::new(&self.sender, line, audit_id));
                (audit_id, open)
            });
            let _ = reply.send(answer);
        }
    }

    /// Tells the callers; what must be written is kept.
    fn fail(&mut self, orders: Vec<Order>, error: sqlx::Error) {
        metrics::counter!("authz_audit_failures_total").increment(1);
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            records = orders.len(),
            "audit records could not be written"
        );
        let error = Arc::new(error);
        for mut order in orders {
            if order.kind == Kind::End {
                if is_unacceptable(&error) {
                    // It would be refused for ever; that it ended is worth more than how.
                    order.line.detail = String::from(r#"{"detail": "could not be recorded"}"#);
                    order.line.decision = None;
                }
                self.unwritten.push_back(order);
            } else {
                let _ = order.reply.send(Err(Error::NotRecorded(Arc::clone(&error))));
            }
        }
    }

    /// Tries again what must be written, until the first failure.
    async fn write_ends(&mut self) {
        while let Some(order) = self.unwritten.pop_front() {
            let line = &order.line;
            let written = if line.operation_id.is_some() {
                self.link.work(async |c| batch::insert_end_once(c, line).await.map(|id| vec![id])).await
            } else {
                self.link.work(async |c| batch::insert(c, std::iter::once(line)).await).await
            };
            match written {
                Ok(ids) => self.answer(vec![order], &ids),
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        waiting = self.unwritten.len() + 1,
                        "the end of an operation could not be recorded yet; it is tried again"
                    );
                    self.unwritten.push_front(order);
                    return;
                }
            }
        }
    }

    /// What is due from time to time.
    async fn tend(&mut self) {
        self.write_ends().await;
        if let Some(Owner { owner_id, .. }) = self.owner {
            match self.link.work(async |c| batch::renew(c, owner_id, LEASE.as_secs_f64()).await).await {
                Ok(true) => {}
                // Taken for gone and cleared away: what begins from now on has a new owner.
                Ok(false) => self.owner = None,
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        owner_id,
                        "the lease on running operations could not be renewed"
                    );
                    return;
                }
            }
        }
        self.clear_doubts().await;
        if self.swept.elapsed() >= SWEEP_EVERY {
            self.swept = Instant::now();
            match self.link.work(async |c| sql(sweep::sweep(c, SWEEP_EVERY).await)).await {
                Ok(0) => {}
                Ok(swept) => tracing::warn!(swept, "operations of processes that are gone were abandoned"),
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "operations of processes that are gone could not be looked for"
                ),
            }
        }
    }

    async fn clear_doubts(&mut self) {
        let mut owners: Vec<i64> = self.doubtful.iter().map(|(owner_id, ..)| *owner_id).collect();
        owners.dedup();
        for owner_id in owners {
            let numbers: Vec<_> =
                self.doubtful.iter().filter(|doubt| doubt.0 == owner_id).map(|doubt| doubt.1).collect();
            let disowned = self.link.work(async |c| sql(sweep::disown(c, owner_id, &numbers).await)).await;
            let disowned = disowned.unwrap_or_default();
            self.doubtful.retain(|(owner, number, since)| {
                since.elapsed() < DOUBT && (*owner != owner_id || !disowned.contains(number))
            });
        }
    }

    /// When nobody is left who could hand something over.
    async fn end(&mut self) {
        for _ in 0..LAST_TRIES {
            self.write_ends().await;
            self.clear_doubts().await;
            if self.unwritten.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        if !self.unwritten.is_empty() {
            tracing::error!(
                records = self.unwritten.len(),
                "the ends of operations could not be recorded; they will be swept up as abandoned"
            );
        }
        if let Some(Owner { owner_id, .. }) = self.owner {
            let _ = self.link.work(async |c| batch::retire(c, owner_id).await).await;
        }
        self.link.close().await;
    }
}

fn sql<T>(done: Result<T, Error>) -> Result<T, sqlx::Error> {
    done.map_err(|error| match error {
        Error::Database(error) | Error::NotMigrated(error) | Error::NotPermitted(error) => error,
        other => sqlx::Error::Protocol(other.to_string()),
    })
}
