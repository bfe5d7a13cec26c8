//! One run: crawl, stage, plan, guard, apply, report, in this order.

use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use authz::DirectoryName;
use authz::audit::Actor;
use authz::mirror::{Failure, Interrupt, LEASE_TTL, Missing, PlanOptions, Planned, Run, Totals};
use rand::Rng;
use sqlx::PgPool;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::crawl::{Crawl, CrawlError, CrawlOptions, Progress, crawl, crawl_again, crawl_members_again};
use crate::filter::GroupFilter;
use crate::guard::{Limits, Refusal, admit};
use crate::report::{Report, Status};
use crate::source::{Source, error_chain};
use crate::stage::{Met, Page, stage};
use crate::stop::{Reason, Stop};

/// Pages that may wait for the database before the crawl has to wait too.
const WAITING_PAGES: usize = 32;
/// How long taking a free lease may last when the run shall stop already.
const TAKING_A_LEASE: Duration = Duration::from_secs(2);
/// How long the database has for the end of what it does once the run shall stop. It is interrupted, so it takes longer only if
/// nothing is heard of it. The same again for the record; a pod has 30 seconds for all of it.
const AFTER_STOP: Duration = Duration::from_secs(5);
/// How long the end of a run may take to be recorded if nobody wants it to stop: the server has ended a silent session by then.
const RECORDING: Duration = LEASE_TTL.saturating_add(AFTER_STOP);
/// Between two interrupts: what is interrupted between two statements goes on to the next one.
const INTERRUPT_EVERY: Duration = Duration::from_millis(100);
const NOT_KNOWN: &str =
    "it is not known whether it was applied: `dir-sync runs` tells, once the database answers";

/// Why a group keeps its members though they were listed.
const DISTURBED: &str =
    "somebody else changed its members while they were listed; the next run lists them again";

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
    /// Add and change only; what the directory lists no more stays.
    pub no_remove: bool,
    /// What may go at once.
    pub limits: Limits,
    /// The hash of a plan that may pass the limits.
    pub approve: Option<String>,
    /// Calls under way at the same time.
    pub concurrency: usize,
    /// A run that takes longer than this ends, in a few seconds even if the database has gone silent.
    pub deadline: Option<Duration>,
    /// Waits at random up to so long before it begins, so that many jobs of one minute do not meet at the quota.
    pub start_jitter: Duration,
    /// Where to show how far the crawl is.
    pub progress: Option<watch::Sender<Progress>>,
    /// When to end early: the mirror then stays as it was.
    pub stop: Stop,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            include_external: false,
            adopt_local: false,
            filter: GroupFilter::default(),
            no_remove: false,
            limits: Limits::default(),
            approve: None,
            concurrency: CrawlOptions::default().concurrency,
            deadline: None,
            start_jitter: Duration::ZERO,
            progress: None,
            stop: Stop::default(),
        }
    }
}

impl DirectorySync {
    /// A sync of `directory` from `source` into the database of `pool`, which needs at least two connections
    /// and is at its fastest and best to interrupt from three on.
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

    /// What a run would change, and whether it would be refused. The mirror stays as it is.
    // The parts are boxed, or whoever awaits this would have all of a crawl on the stack.
    pub async fn plan(mut self) -> Report {
        let started = Instant::now();
        let mut report = Report::blank(&self.directory);
        let ended = match Box::pin(self.prepare_in_time(&mut report)).await {
            Ok(planned) => {
                report.refusal = self.admit(&planned).err();
                Box::pin(self.discard(planned, None, &mut report)).await
            }
            Err(error) => Err(error),
        };
        self.finish(report, &ended, started)
    }

    /// Makes the mirror what the directory is, within the limits.
    pub async fn run(mut self) -> Report {
        let started = Instant::now();
        let mut report = Report::blank(&self.directory);
        let ended = match Box::pin(self.prepare_in_time(&mut report)).await {
            Ok(planned) => Box::pin(self.guard_and_apply(planned, &mut report)).await,
            Err(error) => Err(error),
        };
        self.finish(report, &ended, started)
    }

    fn admit(&self, planned: &Planned) -> Result<(), Refusal> {
        admit(planned.plan(), &self.options.limits, self.options.approve.as_deref(), self.options.no_remove)
    }

    async fn guard_and_apply(&self, planned: Planned, report: &mut Report) -> Result<(), RunError> {
        if let Err(refusal) = self.admit(&planned) {
            self.discard(planned, Some(&refusal.to_string()), report).await?;
            report.refusal = Some(refusal);
            return Ok(());
        }
        let missing = missing(report, &planned.plan().withheld);
        let status = match (&missing, planned.plan().is_empty()) {
            (Some(_), _) => Status::Partial,
            (None, true) => Status::Unchanged,
            (None, false) => Status::Applied,
        };
        let (missing, calls, actor) = (missing.as_deref(), self.source.calls(), &actor());
        let applying = |planned: Planned| async move {
            let (_, revision) = planned.apply(missing, calls, actor).await?;
            tracing::debug!(%revision, "applied");
            Ok(())
        };
        self.end(planned, applying, status, report).await
    }

    async fn discard(
        &self,
        planned: Planned,
        refusal: Option<&str>,
        report: &mut Report,
    ) -> Result<(), RunError> {
        let status = if refusal.is_some() { Status::Refused } else { Status::Planned };
        let (calls, actor) = (self.source.calls(), &actor());
        let discarding =
            |planned: Planned| async move { planned.discard(refusal, calls, actor).await.map(drop) };
        self.end(planned, discarding, status, report).await
    }

    /// Ends a run that has a plan, which shall give this status. If that goes wrong, the database is asked what became of it:
    /// it may have been done, and only the answer was lost.
    async fn end<Ending: Future<Output = Result<(), authz::Error>>>(
        &self,
        planned: Planned,
        ending: impl FnOnce(Planned) -> Ending,
        status: Status,
        report: &mut Report,
    ) -> Result<(), RunError> {
        let (run_id, plan, interrupt) = (planned.run_id(), planned.plan().clone(), planned.interrupt());
        let ending = Box::pin(ending(planned));
        if let Err(error) = self.unless_stopped(&interrupt, ending).await {
            let changes = !matches!(status, Status::Planned | Status::Refused);
            match (self.record_failure(run_id, &error).await, error) {
                (Some(Failure::EndedBefore(found)), error) if found == status.to_string() => {
                    let error = error_chain(&error);
                    tracing::warn!(run_id, status = found, error, "only the answer was lost");
                }
                (Some(Failure::LeaseLost), RunError::Mirror(_)) => {
                    return Err(authz::Error::LeaseLost { run_id }.into());
                }
                (None, RunError::Stopped(reason)) if changes => return Err(RunError::StoppedUnheard(reason)),
                (None, RunError::Mirror(error @ authz::Error::Database(_)))
                    if changes && !error.is_rolled_back() =>
                {
                    return Err(RunError::Unheard(error));
                }
                (_, error) => return Err(error),
            }
        }
        report.status = status;
        report.plan = Some(plan);
        Ok(())
    }

    /// [`Self::prepare`] after the jitter; from its end on, the deadline counts.
    async fn prepare_in_time(&mut self, report: &mut Report) -> Result<Planned, RunError> {
        if !self.options.start_jitter.is_zero() {
            let pause = self.options.start_jitter.mul_f64(rand::rng().random_range(0.0..=1.0));
            tracing::info!(pause_ms = pause.as_millis(), "waits before it begins");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                reason = self.options.stop.wanted() => return Err(RunError::Stopped(reason)),
            }
        }
        if let Some(deadline) = self.options.deadline {
            self.options.stop = std::mem::take(&mut self.options.stop).or_after(deadline);
        }
        Box::pin(self.prepare(report)).await
    }

    /// Crawl, stage and plan; a failure is recorded and gives the lease back.
    async fn prepare(&self, report: &mut Report) -> Result<Planned, RunError> {
        let run = self.begin().await?;
        let run_id = run.id();
        report.run_id = Some(run_id);
        tracing::info!(run_id, directory = %self.directory, source = self.source.describe(), "run begins");
        match self.crawl_and_plan(run, report).await {
            Ok(planned) => Ok(planned),
            Err(error) => match (self.record_failure(run_id, &error).await, error) {
                // To a process that was paused the database has not answered in time; if another run has taken the lease
                // meanwhile, that is what happened.
                (Some(Failure::LeaseLost), RunError::Mirror(authz::Error::Database(_))) => {
                    Err(authz::Error::LeaseLost { run_id }.into())
                }
                (_, error) => Err(error),
            },
        }
    }

    async fn crawl_and_plan(&self, run: Run, report: &mut Report) -> Result<Planned, RunError> {
        let (crawled, met) = self.soon_after_stop(Box::pin(self.crawl(&run))).await?;
        report.foreign_everyone = met.foreign_everyone;
        report.left_out_groups = crawled.left_out;
        report.unknown_member_types.clone_from(&crawled.unknown_member_types);
        report.incomplete =
            crawled.incomplete.iter().map(|i| (i.group_email.clone(), i.reason.clone())).collect();
        let options = PlanOptions {
            customer_id: crawled.customer_id.clone(),
            include_external: self.options.include_external,
            adopt_local: self.options.adopt_local,
            no_remove: self.options.no_remove,
        };
        let interrupt = run.interrupt();
        let planning = Box::pin(async { run.plan(options).await.map_err(|(_, error)| error) });
        let planned = self.unless_stopped(&interrupt, planning).await?;
        let disturbed = planned.plan().disturbed_groups.iter();
        report.incomplete.extend(disturbed.map(|group| (group.clone(), DISTURBED.to_owned())));
        Ok(planned)
    }

    /// Takes the lease. A wish to stop that comes in between is answered at once if the lease is another's, and else
    /// as soon as it is ours, so that it can be given back.
    async fn begin(&self) -> Result<Run, RunError> {
        let source = self.source.describe();
        let mut beginning = pin!(Run::begin(&self.pool, &self.directory, &source));
        tokio::select! {
            biased;
            begun = &mut beginning => Ok(begun?),
            reason = self.options.stop.wanted() => {
                let error = RunError::Stopped(reason);
                if let Ok(Ok(run)) = tokio::time::timeout(TAKING_A_LEASE, beginning).await {
                    let run_id = run.id();
                    drop(run);
                    self.record_failure(run_id, &error).await;
                }
                Err(error)
            }
        }
    }

    /// What the database does, until it is done or, once the run shall stop, interrupted. What is done nonetheless counts.
    async fn unless_stopped<T>(
        &self,
        interrupt: &Interrupt,
        work: impl Future<Output = Result<T, authz::Error>>,
    ) -> Result<T, RunError> {
        let interrupting = async {
            self.options.stop.wanted().await;
            loop {
                if let Err(error) = interrupt.now().await {
                    tracing::warn!(
                        error = error_chain(&error),
                        "the statement under way could not be interrupted"
                    );
                }
                tokio::time::sleep(INTERRUPT_EVERY).await;
            }
        };
        let work = async {
            tokio::select! {
                biased;
                done = work => done,
                () = interrupting => std::future::pending().await,
            }
        };
        self.soon_after_stop(work).await
    }

    /// What the database does, until it is done or, once the run shall stop, given up. The server goes on with it for a
    /// while if it has only gone silent: the fencing check and the time that a silent session has there keep it from harm.
    async fn soon_after_stop<T, E: Into<RunError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, RunError> {
        let mut work = pin!(work);
        let reason = tokio::select! {
            biased;
            done = &mut work => return done.map_err(Into::into),
            reason = self.options.stop.wanted() => reason,
        };
        match tokio::time::timeout(AFTER_STOP, work).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(_)) => Err(RunError::Stopped(reason)),
            Err(_) => {
                tracing::warn!("the database does not answer; what it had to do is given up");
                Err(RunError::Stopped(reason))
            }
        }
    }

    async fn crawl(&self, run: &Run) -> Result<(Crawl, Met), RunError> {
        let (source, options) = (&self.source, self.crawl_options());
        let reading = |pages| crawl(Arc::clone(source), options, pages);
        let (crawled, mut met) = self.stage_while(run, reading).await?;
        // INVARIANT: nobody goes whom a listing has missed because it was not of one moment (held by
        // `user_renamed_between_two_pages_is_not_removed` and `group_renamed_between_two_pages_is_not_removed`).
        let look_again = !self.options.no_remove && !source.is_of_one_moment();
        let missing = if look_again { run.missing().await? } else { Missing::default() };
        let crawled = if missing == Missing::default() {
            crawled
        } else {
            let options = self.crawl_options();
            let reading = |pages| crawl_again(Arc::clone(source), options, missing, crawled, pages);
            let (crawled, more) = self.stage_while(run, reading).await?;
            met.foreign_everyone += more.foreign_everyone;
            crawled
        };
        let crawled = if look_again { self.look_for_members(run, crawled).await? } else { crawled };
        run.forget_groups(&crawled.vanished).await?;
        let incomplete: Vec<_> = crawled.incomplete.iter().map(|i| i.group_id.clone()).collect();
        run.mark_incomplete(&incomplete).await?;
        Ok((crawled, met))
    }

    /// The same for the members of groups that were listed on several pages, or as empty: no error is not proof.
    // INVARIANT: nobody loses a membership whom the listing or the second look shows (held by
    // `member_who_moves_between_two_pages_stays`).
    async fn look_for_members(&self, run: &Run, crawled: Crawl) -> Result<Crawl, RunError> {
        // To ask for each takes no more calls than its pages did, and is no matter of pages.
        let unsure = crawled.unsure.iter().map(|unsure| (unsure.group.id.clone(), unsure.pages)).collect();
        let mut missing = run.missing_members(&unsure, self.options.include_external).await?;
        if missing.is_empty() {
            return Ok(crawled);
        }
        let groups = crawled.unsure.iter().map(|unsure| &unsure.group);
        let groups = groups.filter_map(|group| Some((group.clone(), missing.remove(&group.id)?))).collect();
        let (source, options) = (Arc::clone(&self.source), self.crawl_options());
        let reading = |pages| crawl_members_again(source, options, groups, crawled, pages);
        Ok(self.stage_while(run, reading).await?.0)
    }

    fn crawl_options(&self) -> CrawlOptions {
        CrawlOptions {
            concurrency: self.options.concurrency,
            filter: self.options.filter.clone(),
            progress: self.options.progress.clone(),
        }
    }

    /// Stages what is read, until all of it is, or the run shall stop.
    async fn stage_while<Reading>(
        &self,
        run: &Run,
        read: impl FnOnce(mpsc::Sender<Page>) -> Reading,
    ) -> Result<(Crawl, Met), RunError>
    where
        Reading: Future<Output = Result<Crawl, CrawlError>> + Send + 'static,
    {
        let (sender, batches) = mpsc::channel::<Page>(WAITING_PAGES);
        // A task of its own: pages are compared while the next ones are read. It ends when the set is dropped.
        let mut reading = JoinSet::new();
        let gone = sender.clone();
        reading.spawn(read(sender));
        // What the crawl has sent when it is cut off is still staged if the database answers, so that no statement is left
        // under way when the staging area is cleared.
        let crawling = async move {
            tokio::select! {
                crawled = reading.join_next() => match crawled {
                    Some(Ok(crawled)) => Ok(crawled?),
                    Some(Err(error)) if error.is_panic() => resume_unwind(error.into_panic()),
                    // Only a runtime that shuts down ends it otherwise.
                    Some(Err(_)) | None => Err(CrawlError::ReceiverGone.into()),
                },
                reason = self.options.stop.wanted() => Err(RunError::Stopped(reason)),
                // Without waiting for the next page: that may take a while.
                () = gone.closed() => Err(CrawlError::ReceiverGone.into()),
                () = run.lost() => Err(authz::Error::LeaseLost { run_id: run.id() }.into()),
            }
        };
        let (crawled, staged) = tokio::join!(
            crawling,
            stage(run, batches, self.options.include_external, || self.source.customer_id())
        );
        // A database that does not take the pages ends the crawl, so its error is the one to tell.
        let met = staged?;
        Ok((crawled?, met))
    }

    /// Writes the failure of a run into its record, which gives the lease back, and says what became of the run. `None` if
    /// the database does not say so in time.
    async fn record_failure(&self, run_id: i64, error: &RunError) -> Option<Failure> {
        let (message, actor) = (error_chain(error), actor());
        let recording =
            authz::mirror::record_failure(&self.pool, run_id, &message, self.source.calls(), &actor);
        let stopped = async {
            self.options.stop.wanted().await;
            tokio::time::sleep(AFTER_STOP).await;
        };
        let why = tokio::select! {
            biased;
            recorded = recording => match recorded {
                Ok(failure) => return Some(failure),
                Err(error) => error_chain(&error),
            },
            () = stopped => "no answer in time".to_owned(),
            () = tokio::time::sleep(RECORDING) => "no answer in time".to_owned(),
        };
        tracing::warn!(run_id, error = why, "the failure could not be recorded");
        None
    }

    fn finish(&self, mut report: Report, ended: &Result<(), RunError>, started: Instant) -> Report {
        if let Err(error) = ended {
            fail(&mut report, error);
        }
        if let Some(plan) = &report.plan {
            report.plan_hash = Some(plan.hash.clone());
            report.counts = plan.counts;
        }
        report.api_calls = self.source.calls();
        report.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        // INVARIANT: what somebody has to look at is loud in a log that shows warnings only, too (held by the test
        // `end_that_somebody_has_to_look_at_is_a_warning_or_an_error`).
        let reason = match report.status {
            Status::Failed => report.error.clone(),
            Status::Refused => report.refusal.as_ref().map(ToString::to_string),
            Status::Partial => report.plan.as_ref().and_then(|plan| missing(&report, &plan.withheld)),
            Status::Applied | Status::Unchanged | Status::Planned => None,
        };
        macro_rules! ended {
            ($level:ident) => {
                tracing::$level!(
                    target: ENDED,
                    run_id = report.run_id,
                    directory = report.directory,
                    status = %report.status,
                    api_calls = report.api_calls,
                    duration_ms = report.duration_ms,
                    exit_code = report.exit_code(),
                    plan_hash = report.plan_hash,
                    conflicts = report.plan.as_ref().map(|plan| plan.conflicts.len()),
                    reason,
                    "run ended"
                )
            };
        }
        match report.status {
            // Another run at work, and a signal, are no fault.
            Status::Failed if report.exit_code() == 1 => ended!(error),
            Status::Failed | Status::Refused | Status::Partial => ended!(warn),
            Status::Applied | Status::Unchanged | Status::Planned => ended!(info),
        }
        report
    }
}

/// The target of the log's last line about a run; for people who read the report already, a filter can leave it out.
pub const ENDED: &str = "dir_sync::ended";

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The source could not be read.
    #[error(transparent)]
    Crawl(#[from] CrawlError),
    /// The database, the lease or the plan.
    #[error(transparent)]
    Mirror(#[from] authz::Error),
    /// It was to end early.
    #[error("ended by {0} before it was done; nothing was changed")]
    Stopped(Reason),
    /// It was to end early, and the database said neither how the apply ended nor what became of it.
    #[error("ended by {0} while the plan was being applied; {NOT_KNOWN}")]
    StoppedUnheard(Reason),
    /// The database said neither how the apply ended nor what became of it.
    #[error("the answer was lost while the plan was being applied; {NOT_KNOWN}")]
    Unheard(#[source] authz::Error),
}

/// Why the mirror is not all that the directory is, if it will not be. A mirror that keeps people who are gone is not
/// as fresh as the listing, so what was withheld makes a run partial too.
fn missing(report: &Report, withheld: &Totals) -> Option<String> {
    let groups: Vec<_> = report.incomplete.iter().map(|(g, why)| format!("{g}: {why}")).collect();
    let listed = (!groups.is_empty()).then(|| format!("not listed: {}", groups.join("; ")));
    let kept = (*withheld != Totals::default()).then(|| {
        let Totals { users, groups, memberships } = withheld;
        format!("not removed (--no-remove): {users} users, {groups} groups, {memberships} memberships")
    });
    let reasons: Vec<_> = [listed, kept].into_iter().flatten().collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

fn actor() -> Actor {
    Actor::new("dir-sync", "dir-sync")
}

fn fail(report: &mut Report, error: &RunError) {
    report.status = Status::Failed;
    report.error = Some(error_chain(error));
    report.exit_code = match error {
        RunError::Mirror(authz::Error::LeaseHeld { .. } | authz::Error::LeaseLost { .. }) => Some(5),
        RunError::Stopped(reason) | RunError::StoppedUnheard(reason) => reason.is_from_outside().then_some(6),
        RunError::Mirror(_) | RunError::Crawl(_) | RunError::Unheard(_) => None,
    };
}
