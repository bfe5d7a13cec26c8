//! The plan: staging and mirror compared by set-based statements inside the transaction that will apply it.
//!
//! Rows are matched by the directory's immutable id; a name is an attribute. What a name stands in the way
//! of is left out and reported as a conflict, and the rest goes on.

use sqlx::{Connection, PgConnection, Postgres, Transaction};
use std::sync::atomic::Ordering;

use super::plan_summary::count;
use super::report::{Plan, Totals};
use super::watch::{Watch, Watched, Watcher};
use super::{Interrupt, LEASE_TTL, Run, plan_memberships};
use crate::begin::begin_alone;
use crate::error::Error;

/// From so many rows on, staged or held, tables are joined as a whole.
pub(super) const BULK: u64 = 10_000;

/// What a sync is asked to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// The organisation that the source shows, if it says so.
    pub customer_id: Option<String>,
    /// Mirror members whom the directory does not list.
    pub include_external: bool,
    /// Link a local user or group that has the name of a directory's one, instead of reporting a conflict.
    pub adopt_local: bool,
    /// Add and change only: what the directory lists no more stays, and is counted in [`Plan::withheld`].
    pub no_remove: bool,
}

/// A plan in the open transaction that made it: apply it or discard it.
#[derive(Debug)]
pub struct Planned {
    pub(super) run: Run,
    pub(super) tx: Transaction<'static, Postgres>,
    /// Of the session that has the transaction, for as long as it may.
    #[expect(dead_code, reason = "it is there to be dropped")]
    watch: Option<Watch>,
    pub(super) options: PlanOptions,
    pub(super) plan: Plan,
}

/// A transaction with a plan made in it.
struct Made {
    tx: Transaction<'static, Postgres>,
    watch: Option<Watch>,
    plan: Plan,
}

/// What there is to compare.
#[expect(clippy::struct_excessive_bools, reason = "each says whether one kind of thing is there")]
struct Staging {
    /// Users of the mirror, if they are still those who were read.
    known_users: Option<u64>,
    /// Members that are staged or held.
    memberships: u64,
    /// Groups whose members are other ones than last time, or may be.
    listed: bool,
    /// Some of them were compared with the mirror before they were staged.
    compared: bool,
    /// Some of them are staged or held as a whole.
    whole: bool,
    /// Groups whose members could not be listed.
    incomplete: bool,
    /// Users who are in no directory.
    externals: bool,
    /// Remembered members who are no users or groups of this mirror.
    outsiders: bool,
    listed_totals: Totals,
}

/// Whether anybody has been given any right.
pub(super) async fn has_grants(tx: &mut PgConnection) -> Result<bool, Error> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from authz.user_actions) or exists (select from authz.group_actions) as "any!""#
    )
    .fetch_one(tx)
    .await?)
}

/// Lets the planner look rows up one by one, or not, for the rest of a transaction; gives what was set before.
pub(super) async fn set_nested_loops(tx: &mut PgConnection, setting: &str) -> Result<String, Error> {
    let row = sqlx::query!(
        r#"
        with before as materialized (select current_setting('enable_nestloop') as setting)
        select setting as "before!", set_config('enable_nestloop', $1, true) as "set!" from before
        "#,
        setting
    )
    .fetch_one(tx)
    .await?;
    Ok(row.before)
}

impl Planned {
    /// What would change.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The number of the run that made it.
    #[must_use]
    pub const fn run_id(&self) -> i64 {
        self.run.id()
    }

    /// What interrupts the apply.
    #[must_use]
    pub fn interrupt(&self) -> Interrupt {
        self.run.interrupt()
    }
}

impl Run {
    /// Compares what is staged with the mirror. Nothing changes yet.
    ///
    /// # Errors
    /// The run comes back with the error, so that its end can be recorded:
    /// [`Error::OtherCustomer`] if the source shows another organisation than before, [`Error::CustomerTaken`] if another directory
    /// mirrors that organisation, [`Error::LeaseLost`],
    /// [`Error::StagingLost`] if the staging area is not what was staged, if a step of the staging failed or was dropped, or if this
    /// run was to be planned before, [`Error::Database`].
    pub async fn plan(self, options: PlanOptions) -> Result<Planned, (Self, Error)> {
        match self.make(&options).await {
            Ok(Made { tx, watch, plan }) => Ok(Planned { run: self, tx, watch, options, plan }),
            Err(error) => Err((self, error)),
        }
    }

    async fn make(&self, options: &PlanOptions) -> Result<Made, Error> {
        if let (Some(known), Some(found)) = (&self.customer_id, &options.customer_id)
            && known != found
        {
            return Err(Error::OtherCustomer {
                directory: self.directory.clone(),
                known: known.clone(),
                found: found.clone(),
            });
        }
        self.finish_staging().await?;
        // The staging tables are emptied and filled by each run: what the planner knew of them is of no use.
        if self.staged.differences() > 0 {
            sqlx::query!("select authz.analyze_staging()").fetch_one(&self.pool).await?;
        }
        let (held, copies) = {
            let held = &self.staging.lock().await.held;
            (held.len() as u64, !held.is_empty())
        };
        let watcher = if copies { Some(Watcher::take(&self.pool).await?) } else { None };
        // It is copied on, and that must come to its end.
        let mut tx = begin_alone(&self.pool).await?;
        let session = self.prepare_session(&mut tx).await?;
        let watch = watcher.map(|watcher| watcher.watch(session));
        self.hold_lease(&mut tx).await?;
        self.heartbeat.abort(); // from here on the lock is the sign of life
        // INVARIANT: nobody else's change comes between the look at the mirror and the change of it, another
        // directory's sync included (held by the tests `a_plan_is_made_of_what_it_will_change` and
        // `run_of_a_database_that_shows_the_past_remembers_the_present`).
        let revision =
            sqlx::query_scalar!(r#"select authz.hold_revision() as "revision!""#).fetch_one(&mut *tx).await?;
        self.refuse_taken_customer(&mut tx, options).await?;
        let staging = self.count_staged(&mut tx, held, revision).await?;
        // Tables that this very transaction fills have no statistics: rows looked up one by one would never end, and what
        // looks expensive would be compiled for longer than it runs.
        sqlx::query!(
            r#"
            select set_config('jit', 'off', true) as "jit!",
                   case when $1 then set_config('enable_nestloop', 'off', true) end as nestloop,
                   case when $1 then set_config('work_mem', '64MB', true) end as work_mem
            "#,
            self.staged.rows() + held > BULK,
        )
        .fetch_one(&mut *tx)
        .await?;
        let has_grants = has_grants(&mut tx).await?;
        let mut plan = self.compare_all(&mut tx, options, &staging, has_grants).await?;
        if !plan.is_empty() && has_grants {
            (plan.actions, plan.hash) = self.action_changes(&mut tx, &plan.hash).await?;
            if plan.actions.users_losing * 20 > plan.people {
                plan.people += self.people_of_others(&mut tx).await?;
            }
        }
        Ok(Made { tx, watch, plan })
    }

    /// Two directories of one organisation would take its users and groups from each other: each is one row here.
    async fn refuse_taken_customer(&self, tx: &mut PgConnection, options: &PlanOptions) -> Result<(), Error> {
        let Some(customer) = &options.customer_id else { return Ok(()) };
        let other = sqlx::query_scalar!(
            "select directory_name from authz.directories where customer_id = $1 and directory_id <> $2 limit 1",
            customer,
            self.directory_id,
        )
        .fetch_optional(tx)
        .await?;
        let (directory, customer) = (self.directory.clone(), customer.clone());
        other.map_or(Ok(()), |other| Err(Error::CustomerTaken { directory, other, customer }))
    }

    /// Fills the tables of the plan, and reads it. A step that has nothing to look at is left out: where all is as it was,
    /// only the groups are compared.
    // INVARIANT: what is left out would change nothing (held by the tests in `crates/dir-sync/tests/unchanged.rs`).
    async fn compare_all(
        &self,
        tx: &mut PgConnection,
        options: &PlanOptions,
        staging: &Staging,
        has_grants: bool,
    ) -> Result<Plan, Error> {
        let users_differ =
            [&self.staged.users, &self.staged.unseen_users].iter().any(|n| n.load(Ordering::Relaxed) > 0);
        let disturbed_groups =
            if staging.compared { self.set_disturbed_aside(tx).await? } else { Vec::new() };
        let looked_at_again = if staging.compared || staging.outsiders || users_differ {
            self.stage_remembered(tx).await?
        } else {
            0
        };
        let mut withheld = Totals::default();
        let guests = options.include_external && (staging.memberships > 0 || looked_at_again > 0);
        if users_differ || staging.externals || guests {
            self.plan_listed_users(tx, options).await?;
            if options.include_external {
                self.plan_external_users(tx).await?;
            }
            self.plan_removed_users(tx, options).await?;
            if options.no_remove {
                withheld.users = self.withhold_users(tx).await?;
            }
            while self.settle_user_names(tx).await? > 0 {}
        }
        let groups_differ = self.plan_groups(tx, options).await?;
        if groups_differ {
            if options.no_remove {
                withheld.groups = self.withhold_groups(tx).await?;
            }
            while self.settle_group_names(tx).await? > 0 {}
            if options.include_external {
                self.drop_groupless_external_users(tx).await?;
            }
        }
        // Externals and outsiders are listed and no members of this mirror, which then has fewer than are listed.
        let fewer = staging.externals || staging.outsiders;
        let differs = users_differ || groups_differ || staging.listed || staging.incomplete || fewer;
        let nothing_differs = !differs && staging.memberships + looked_at_again == 0;
        if nothing_differs {
            return Ok(Plan::of_nothing(self.hash_of_nothing(), staging.listed_totals));
        }
        self.drop_idle_changes(tx).await?;
        if staging.whole {
            self.mark_fresh_groups(tx, has_grants).await?;
        }
        let looks_on = looked_at_again > 0
            || withheld != Totals::default()
            || self.has_memberships_to_compare(tx).await?;
        if looks_on {
            let (include_external, few) = (options.include_external, self.staged.names_few_users());
            plan_memberships::compare(tx, self.run_id, self.directory_id, include_external, few).await?;
        }
        if options.no_remove {
            withheld.memberships = self.withhold_memberships(tx).await?;
        }
        // Nobody of the directory's is listed no more, and no outsider is let in: whoever joins a group is a listed user.
        let joining_are_listed =
            !options.include_external && self.staged.unseen_users.load(Ordering::Relaxed) == 0;
        let plan = self.read_plan(tx, staging.listed_totals, staging.known_users, joining_are_listed).await?;
        Ok(Plan { disturbed_groups, withheld, ..plan })
    }

    /// From here on locks show that the run lives, so they must not outlive it: the server ends this session if nothing
    /// is heard of us for as long as a lease lasts (we are paused, or our machine is gone without a word).
    // INVARIANT: a run that was paused in its apply finds its transaction gone and writes nothing (held by the test
    // `process_paused_in_the_apply_does_not_hold_up_the_next_run_and_writes_nothing`). In the middle of a `COPY`, where this
    // does nothing, by the [`Watch`], without which nothing is held to be copied (held by
    // `process_paused_in_a_copy_does_not_hold_up_the_next_run_and_writes_nothing`).
    async fn prepare_session(&self, tx: &mut PgConnection) -> Result<Watched, Error> {
        let row = sqlx::query!(
            r#"
            select pg_backend_pid() as "backend!", now() as "began!",
                   set_config('idle_in_transaction_session_timeout', $1, true) as "silence!",
                   -- Compiling statements that run once, on estimates of tables just filled, took twelve seconds.
                   set_config('jit', 'off', true) as "jit!"
            "#,
            format!("{}ms", LEASE_TTL.as_millis()),
        )
        .fetch_one(&mut *tx)
        .await?;
        self.backend.store(row.backend, Ordering::Relaxed);
        // In the middle of a long statement too, where the server can: not every system tells it of a closed connection.
        let mut attempt = tx.begin().await?;
        let noticing = sqlx::query!(
            r#"
            select set_config('client_connection_check_interval', '5s', true) as "check!",
                   set_config('tcp_keepalives_idle', '10', true) as "idle!",
                   set_config('tcp_keepalives_interval', '5', true) as "interval!",
                   set_config('tcp_keepalives_count', '3', true) as "count!"
            "#
        )
        .fetch_one(&mut *attempt)
        .await;
        match noticing {
            Ok(_) => attempt.commit().await?,
            Err(error) if error.as_database_error().is_some() => {
                attempt.rollback().await?;
                tracing::debug!(%error, "the server will not notice our end before its statement is done");
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Watched { backend: row.backend, began: row.began })
    }

    /// The fencing check.
    // INVARIANT: the lease row is locked until this transaction ends, so no other run can take it between
    // here and the commit (held by the tests `lost_lease_writes_nothing` and `apply_holds_the_lease`).
    async fn hold_lease(&self, tx: &mut PgConnection) -> Result<(), Error> {
        sqlx::query!(
            "select run_id from authz.sync_leases where directory_id = $1 and run_id = $2 for update",
            self.directory_id,
            self.run_id,
        )
        .fetch_optional(tx)
        .await?
        .map(|_| ())
        .ok_or(Error::LeaseLost { run_id: self.run_id })
    }

    /// Counts what was listed: the staged rows, what is held, and what was not staged because the mirror has it.
    // INVARIANT: staging that lost rows (unlogged tables are emptied by a crash of the server) is never
    // compared with the mirror (held by the test `staging_lost_in_a_crash_is_not_absence`).
    async fn count_staged(&self, tx: &mut PgConnection, held: u64, revision: i64) -> Result<Staging, Error> {
        let row = sqlx::query!(
            r#"
            select (select count(*) from authz.sync_stage_users where run_id = $1) as "users!",
                   (select count(*) from authz.sync_stage_members where run_id = $1) as "memberships!",
                   (select count(*) from authz.sync_stage_unseen_users where run_id = $1) as "unseen_users!",
                   (select count(*) from authz.sync_stage_gone_members where run_id = $1) as "gone_members!",
                   s.groups as "groups!", s.listed as "listed!", s.compared as "compared!", s.whole as "whole!", s.incomplete as "incomplete!",
                   exists (select from authz.users where directory_id is null and status = 'external') as "externals!",
                   exists (select from authz.group_outsiders o join authz.groups g on g.group_id = o.group_id
                           where g.directory_id = $2) as "outsiders!"
            from (select count(*) as groups, coalesce(bool_or(members_listed), false) as listed,
                         coalesce(bool_or(members_basis is not null), false) as compared,
                         coalesce(bool_or(members_listed and members_basis is null), false) as whole,
                         coalesce(bool_or(not members_complete), false) as incomplete
                  from authz.sync_stage_groups where run_id = $1) s
            "#,
            self.run_id,
            self.directory_id,
        )
        .fetch_one(tx)
        .await?;
        let found = [row.users, row.groups, row.memberships, row.unseen_users, row.gone_members].map(count);
        let staged = &self.staged;
        let sent =
            [&staged.users, &staged.groups, &staged.members, &staged.unseen_users, &staged.gone_members];
        if found != sent.map(|rows| rows.load(Ordering::Relaxed)) {
            return Err(Error::StagingLost { run_id: self.run_id });
        }
        let [users, groups, memberships, ..] = found;
        let memberships = memberships + held;
        // INVARIANT: whatever changes who is a user of the directory raises the revision (held by
        // `users_before_are_those_of_the_plan_and_not_of_the_crawl`).
        let known_users = (revision == staged.known_at.load(Ordering::Relaxed))
            .then(|| staged.known_users.load(Ordering::Relaxed));
        Ok(Staging {
            known_users,
            memberships,
            listed: row.listed,
            compared: row.compared,
            whole: row.whole,
            incomplete: row.incomplete,
            externals: row.externals,
            outsiders: row.outsiders,
            listed_totals: Totals {
                users: users + staged.same_users.load(Ordering::Relaxed),
                groups,
                memberships: memberships + staged.same_members.load(Ordering::Relaxed),
            },
        })
    }

    /// A change of nothing but a name that had to stay is none.
    async fn drop_idle_changes(&self, tx: &mut PgConnection) -> Result<(), Error> {
        sqlx::query!(
            r#"
            delete from authz.sync_plan_users
            where run_id = $1 and op = 'change'
              and (old_name, old_display_name, old_status, old_directory_id)
                  is not distinct from (new_name, new_display_name, new_status, new_directory_id)
            "#,
            self.run_id,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            r#"
            delete from authz.sync_plan_groups p
            using authz.groups g
            where p.run_id = $1 and p.op = 'change' and g.group_id = p.group_id and g.directory_id = $2
              and (old_name, old_display_name, old_description)
                  is not distinct from (new_name, new_display_name, new_description)
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok(())
    }
}
