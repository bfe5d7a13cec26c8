//! One run: crawl, stage, plan, guard, apply, report, in this order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use authz::DirectoryName;
use authz::audit::Actor;
use authz::mirror::{Counts, PlanOptions, Planned, Run};
use rand::Rng;
use sqlx::PgPool;
use tokio::sync::{mpsc, watch};

use crate::crawl::{Batch, Crawl, CrawlOptions, Progress, crawl};
use crate::filter::GroupFilter;
use crate::guard::{Limits, admit};
use crate::report::{Report, Status};
use crate::source::{Source, error_chain};
use crate::stage::{Met, stage};

/// Pages that may wait for the database before the crawl has to wait too.
const WAITING_PAGES: usize = 32;

/// A sync of one directory from one source.
#[derive(Clone)]
pub struct DirectorySync {
    pool: PgPool,
    directory: DirectoryName,
    source: Arc<dyn Source>,
    options: Options,
}

/// What a sync may and shall do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Mirror members whom the directory does not list; by default outsiders get no rights.
    pub include_external: bool,
    /// Link local users and groups that have the name of a directory's.
    pub adopt_local: bool,
    /// Which groups are mirrored.
    pub filter: GroupFilter,
    /// What may go at once.
    pub limits: Limits,
    /// The hash of a plan that may pass the limits.
    pub approve: Option<String>,
    /// Calls under way at the same time.
    pub concurrency: usize,
    /// No run takes longer until it begins to change the mirror.
    pub deadline: Option<Duration>,
    /// Waits at random up to so long before it begins, so that many jobs of one minute do not meet at the quota.
    pub start_jitter: Duration,
    /// Where to show how far the crawl is.
    pub progress: Option<watch::Sender<Progress>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            include_external: false,
            adopt_local: false,
            filter: GroupFilter::default(),
            limits: Limits::default(),
            approve: None,
            concurrency: CrawlOptions::default().concurrency,
            deadline: None,
            start_jitter: Duration::ZERO,
            progress: None,
        }
    }
}

impl DirectorySync {
    /// A sync of `directory` from `source` into the database of `pool`, which needs at least two connections.
    #[must_use]
    pub fn new(pool: PgPool, directory: DirectoryName, source: Arc<dyn Source>) -> Self {
        Self { pool, directory, source, options: Options::default() }
    }

    /// With other options.
    #[must_use]
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// What a run would change. The mirror stays as it is.
    pub async fn plan(self) -> Report {
        let started = Instant::now();
        let mut report = self.blank();
        match self.prepare_in_time(&mut report).await {
            Ok(planned) => {
                let ended = planned.discard(None, self.source.calls(), &actor()).await;
                match ended {
                    Ok(plan) => {
                        report.plan = Some(plan);
                        report.status = Status::Planned;
                    }
                    Err(error) => {
                        report.error = Some(error_chain(&error));
                        self.record_failure(&report).await;
                    }
                }
            }
            Err(error) => fail(&mut report, &error),
        }
        self.finish(report, started)
    }

    /// Makes the mirror what the directory is, within the limits.
    pub async fn run(self) -> Report {
        let started = Instant::now();
        let mut report = self.blank();
        match self.prepare_in_time(&mut report).await {
            Ok(planned) => {
                if let Err(error) = self.guard_and_apply(planned, &mut report).await {
                    report.status = Status::Failed;
                    report.error = Some(error_chain(&error));
                    self.record_failure(&report).await;
                }
            }
            Err(error) => fail(&mut report, &error),
        }
        self.finish(report, started)
    }

    async fn guard_and_apply(&self, planned: Planned, report: &mut Report) -> Result<(), authz::Error> {
        if let Err(refusal) = admit(planned.plan(), &self.options.limits, self.options.approve.as_deref()) {
            let plan = planned.discard(Some(&refusal.to_string()), self.source.calls(), &actor()).await?;
            report.plan = Some(plan);
            report.refusal = Some(refusal);
            report.status = Status::Refused;
            return Ok(());
        }
        let missing = (!report.incomplete.is_empty()).then(|| {
            let groups: Vec<_> = report.incomplete.iter().map(|(g, why)| format!("{g}: {why}")).collect();
            format!("not listed: {}", groups.join("; "))
        });
        let (plan, revision) = planned.apply(missing.as_deref(), self.source.calls(), &actor()).await?;
        report.status = match (missing, plan.is_empty()) {
            (Some(_), _) => Status::Partial,
            (None, true) => Status::Unchanged,
            (None, false) => Status::Applied,
        };
        report.plan = Some(plan);
        tracing::debug!(%revision, "applied");
        Ok(())
    }

    /// [`Self::prepare`] after the jitter and before the deadline. Past the deadline nothing has been changed, and the
    /// lease is given back.
    async fn prepare_in_time(&self, report: &mut Report) -> Result<Planned, RunError> {
        if !self.options.start_jitter.is_zero() {
            let pause = self.options.start_jitter.mul_f64(rand::rng().random_range(0.0..=1.0));
            tracing::info!(pause_ms = pause.as_millis(), "waits before it begins");
            tokio::time::sleep(pause).await;
        }
        let Some(deadline) = self.options.deadline else { return self.prepare(report).await };
        if let Ok(prepared) = tokio::time::timeout(deadline, self.prepare(report)).await {
            return prepared;
        }
        let error = RunError::Deadline { seconds: deadline.as_secs() };
        report.error = Some(error_chain(&error));
        self.record_failure(report).await;
        Err(error)
    }

    /// Crawl, stage and plan; a failure is recorded and gives the lease back.
    async fn prepare(&self, report: &mut Report) -> Result<Planned, RunError> {
        let run = Run::begin(&self.pool, &self.directory, &self.source.describe()).await?;
        report.run_id = Some(run.id());
        tracing::info!(run_id = run.id(), directory = %self.directory, source = self.source.describe(), "run begins");
        let crawled = match self.crawl(&run).await {
            Ok((crawled, met)) => {
                report.foreign_everyone = met.foreign_everyone;
                crawled
            }
            Err(error) => {
                give_up(run, &error, self.source.calls()).await;
                return Err(error);
            }
        };
        report.left_out_groups = crawled.left_out;
        report.unknown_member_types.clone_from(&crawled.unknown_member_types);
        report.incomplete =
            crawled.incomplete.iter().map(|i| (i.group_email.clone(), i.reason.clone())).collect();
        let options = PlanOptions {
            customer_id: crawled.customer_id.clone(),
            include_external: self.options.include_external,
            adopt_local: self.options.adopt_local,
        };
        match run.plan(options).await {
            Ok(planned) => Ok(planned),
            Err((run, error)) => {
                let error = RunError::from(error);
                give_up(run, &error, self.source.calls()).await;
                Err(error)
            }
        }
    }

    async fn crawl(&self, run: &Run) -> Result<(Crawl, Met), RunError> {
        let (sender, batches) = mpsc::channel::<Batch>(WAITING_PAGES);
        let options = CrawlOptions {
            concurrency: self.options.concurrency,
            filter: self.options.filter.clone(),
            progress: self.options.progress.clone(),
        };
        let (crawled, staged) = tokio::join!(
            crawl(Arc::clone(&self.source), options, sender),
            stage(run, batches, self.options.include_external, || self.source.customer_id()),
        );
        // A database that does not take the pages ends the crawl, so its error is the one to tell.
        let met = staged?;
        let crawled = crawled?;
        run.forget_groups(&crawled.vanished).await?;
        let incomplete: Vec<_> = crawled.incomplete.iter().map(|i| i.group_id.clone()).collect();
        run.mark_incomplete(&incomplete).await?;
        Ok((crawled, met))
    }

    /// The apply took the run with it, lease and all; what is left to do is to say so in the record.
    async fn record_failure(&self, report: &Report) {
        if let (Some(run_id), Some(message)) = (report.run_id, &report.error) {
            let recorded =
                authz::mirror::record_failure(&self.pool, run_id, message, self.source.calls(), &actor())
                    .await;
            if let Err(error) = recorded {
                tracing::warn!(run_id, error = error_chain(&error), "the failure could not be recorded");
            }
        }
    }

    fn blank(&self) -> Report {
        Report {
            status: Status::Failed,
            directory: self.directory.to_string(),
            run_id: None,
            plan_hash: None,
            counts: Counts::default(),
            api_calls: 0,
            duration_ms: 0,
            plan: None,
            refusal: None,
            incomplete: BTreeMap::new(),
            unknown_member_types: BTreeMap::new(),
            foreign_everyone: 0,
            left_out_groups: 0,
            error: None,
            exit_code: None,
        }
    }

    fn finish(&self, mut report: Report, started: Instant) -> Report {
        if let Some(plan) = &report.plan {
            report.plan_hash = Some(plan.hash.clone());
            report.counts = plan.counts;
        }
        report.api_calls = self.source.calls();
        report.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            run_id = report.run_id,
            directory = report.directory,
            status = ?report.status,
            api_calls = report.api_calls,
            duration_ms = report.duration_ms,
            "run ended"
        );
        report
    }
}

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The source could not be read.
    #[error(transparent)]
    Crawl(#[from] crate::crawl::CrawlError),
    /// The database, the lease or the plan.
    #[error(transparent)]
    Mirror(#[from] authz::Error),
    /// It took too long.
    #[error("the run was not through in {seconds} s, so nothing was changed; give it longer (`--deadline`)")]
    Deadline {
        /// How long it had.
        seconds: u64,
    },
}

fn actor() -> Actor {
    Actor::new("dir-sync", "dir-sync")
}

fn fail(report: &mut Report, error: &RunError) {
    report.status = Status::Failed;
    report.error = Some(error_chain(error));
    if let RunError::Mirror(authz::Error::LeaseHeld { .. }) = error {
        report.exit_code = Some(5);
    }
}

async fn give_up(run: Run, error: &RunError, api_calls: u64) {
    let run_id = run.id();
    if let Err(error) = run.fail(&error_chain(error), api_calls, &actor()).await {
        tracing::warn!(run_id, error = error_chain(&error), "the failure could not be recorded");
    }
}
