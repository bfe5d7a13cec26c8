//! The plan: staging and mirror compared by set-based statements inside the transaction that will apply it.
//!
//! Rows are matched by the directory's immutable id; a name is an attribute. What a name stands in the way
//! of is left out and reported as a conflict, and the rest goes on.

use sqlx::{Connection, PgConnection, Postgres, Transaction};
use std::sync::atomic::Ordering;

use super::plan_summary::count;
use super::report::{Plan, Totals};
use super::{Interrupt, LEASE_TTL, Run, plan_memberships};
use crate::error::Error;

/// From so many staged rows on, tables are joined as a whole.
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
    pub(super) options: PlanOptions,
    pub(super) plan: Plan,
}

impl Planned {
    /// What would change.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
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
    /// [`Error::OtherCustomer`] if the source shows another organisation than before, [`Error::LeaseLost`] if
    /// the staging area is not what was staged, [`Error::Database`].
    pub async fn plan(self, options: PlanOptions) -> Result<Planned, (Self, Error)> {
        match self.make(&options).await {
            Ok((tx, plan)) => Ok(Planned { run: self, tx, options, plan }),
            Err(error) => Err((self, error)),
        }
    }

    async fn make(&self, options: &PlanOptions) -> Result<(Transaction<'static, Postgres>, Plan), Error> {
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
        sqlx::query!("select authz.analyze_staging()").fetch_one(&self.pool).await?;
        let mut tx = self.pool.begin().await?;
        self.prepare_session(&mut tx).await?;
        self.hold_lease(&mut tx).await?;
        self.heartbeat.abort(); // from here on the lock is the sign of life
        // INVARIANT: nobody else's change comes between the look at the mirror and the change of it, another
        // directory's sync included (held by the test `a_plan_is_made_of_what_it_will_change`).
        sqlx::query!("select authz.hold_revision()").fetch_one(&mut *tx).await?;
        let listed = self.count_staged(&mut tx).await?;
        // Tables that this very transaction fills have no statistics: rows looked up one by one would never end, and what
        // looks expensive would be compiled for longer than it runs.
        sqlx::query!(
            r#"
            select set_config('jit', 'off', true) as "jit!",
                   case when $1 then set_config('enable_nestloop', 'off', true) end as nestloop,
                   case when $1 then set_config('work_mem', '64MB', true) end as work_mem
            "#,
            self.staged.rows() > BULK,
        )
        .fetch_one(&mut *tx)
        .await?;
        let disturbed_groups = self.set_disturbed_aside(&mut tx).await?;
        self.stage_remembered(&mut tx).await?;
        self.plan_listed_users(&mut tx, options).await?;
        if options.include_external {
            self.plan_external_users(&mut tx).await?;
        }
        self.plan_removed_users(&mut tx, options).await?;
        let mut withheld = Totals::default();
        if options.no_remove {
            withheld.users = self.withhold_users(&mut tx).await?;
        }
        while self.settle_user_names(&mut tx).await? > 0 {}
        self.plan_groups(&mut tx, options).await?;
        if options.no_remove {
            withheld.groups = self.withhold_groups(&mut tx).await?;
        }
        while self.settle_group_names(&mut tx).await? > 0 {}
        self.drop_idle_changes(&mut tx).await?;
        plan_memberships::compare(&mut tx, self.run_id, self.directory_id, options.include_external).await?;
        if options.no_remove {
            withheld.memberships = self.withhold_memberships(&mut tx).await?;
        }
        let mut plan = self.read_plan(&mut tx, listed).await?;
        plan.withheld = withheld;
        plan.disturbed_groups = disturbed_groups;
        if !plan.is_empty() {
            plan.actions = self.action_changes(&mut tx).await?;
        }
        Ok((tx, plan))
    }

    /// From here on locks show that the run lives, so they must not outlive it: the server ends this session if nothing
    /// is heard of us for as long as a lease lasts (we are paused, or our machine is gone without a word).
    // INVARIANT: a run that was paused in its apply finds its transaction gone and writes nothing (held by the test
    // `process_paused_in_the_apply_does_not_hold_up_the_next_run_and_writes_nothing`).
    async fn prepare_session(&self, tx: &mut PgConnection) -> Result<(), Error> {
        let row = sqlx::query!(
            r#"
            select pg_backend_pid() as "backend!",
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
        Ok(())
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

    /// Counts what was listed: the staged rows, and what was not staged because the mirror has it.
    // INVARIANT: staging that lost rows (unlogged tables are emptied by a crash of the server) is never
    // compared with the mirror (held by the test `staging_lost_in_a_crash_is_not_absence`).
    async fn count_staged(&self, tx: &mut PgConnection) -> Result<Totals, Error> {
        let row = sqlx::query!(
            r#"
            select (select count(*) from authz.sync_stage_users where run_id = $1) as "users!",
                   (select count(*) from authz.sync_stage_groups where run_id = $1) as "groups!",
                   (select count(*) from authz.sync_stage_members where run_id = $1) as "memberships!",
                   (select count(*) from authz.sync_stage_unseen_users where run_id = $1) as "unseen_users!",
                   (select count(*) from authz.sync_stage_gone_members where run_id = $1) as "gone_members!"
            "#,
            self.run_id,
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
        Ok(Totals {
            users: users + staged.same_users.load(Ordering::Relaxed),
            groups,
            memberships: memberships + staged.same_members.load(Ordering::Relaxed),
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
