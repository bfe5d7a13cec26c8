//! Apply: the planned rows carried out, in the transaction that planned them. Readers see the old directory
//! or the new one.

use std::sync::atomic::Ordering;

use sqlx::PgConnection;

use super::Planned;
use super::fill::fill_fresh_groups;
use super::lease::{Closing, close};
use super::plan::{BULK, set_nested_loops};
use super::remember::{Found, remember};
use super::report::{Kinds, Plan, Tally, Totals};
use super::stage::storable;
use crate::audit::line::{ERROR_LIMIT, shorten};
use crate::audit::{self, Actor, Outcome, Record};
use crate::decision::Revision;
use crate::error::Error;
use crate::revision;

/// Up to so many planned rows are looked up in the mirror one by one.
const LOOKED_UP: u64 = 50_000;

impl Planned {
    /// Carries the plan out, records the run, and gives the lease back: all of it, or nothing. A plan
    /// without changes touches no row of the mirror.
    ///
    /// `message` tells what could not be listed, if anything could not; the run's status then is `partial`.
    /// Returns the plan and the revision that the mirror has now.
    ///
    /// # Errors
    /// [`Error::Database`] if the database refuses, or does not answer: nothing was changed, unless it was the answer to
    /// the commit that was lost. [`record_failure`](super::record_failure) tells.
    pub async fn apply(
        mut self,
        message: Option<&str>,
        api_calls: u64,
        actor: &Actor,
    ) -> Result<(Plan, Revision), Error> {
        let changes = !self.plan.is_empty();
        // Who goes takes memberships along that are planned nowhere.
        let counts = &self.plan.counts;
        let mut as_planned = self.plan.withheld == Totals::default()
            && (counts.users.removed, counts.groups.removed) == (0, 0);
        if changes {
            sqlx::query!(
                r#"select set_config('authz.sync_run', $1, true) as "run!""#,
                self.run.run_id.to_string()
            )
            .fetch_one(&mut *self.tx)
            .await?;
            audit::act_as(&mut self.tx, actor).await?;
            // A few rows out of much that was staged are looked up in the mirror by its keys.
            let counts = &self.plan.counts;
            let rows: u64 = [counts.users, counts.groups, counts.memberships]
                .iter()
                .map(|tally| tally.added + tally.removed + tally.changed)
                .sum();
            let look_up = self.run.staged.rows() > BULK && rows <= LOOKED_UP;
            if look_up {
                set_nested_loops(&mut self.tx, "on").await?;
            }
            apply_users(&mut self.tx, self.run.run_id, counts.users).await?;
            apply_groups(&mut self.tx, self.run.run_id, self.run.directory_id, counts.groups).await?;
            let fresh = self.plan.fresh_memberships;
            let planned = self.plan.counts.memberships;
            let planned = Tally { added: planned.added - fresh, ..planned };
            let (run_id, directory_id) = (self.run.run_id, self.run.directory_id);
            let kinds = self.plan.kinds;
            as_planned &= apply_memberships(&mut self.tx, run_id, directory_id, planned, kinds).await?;
            if look_up {
                set_nested_loops(&mut self.tx, "off").await?;
            }
            if fresh > 0 {
                let held = std::mem::take(&mut self.run.staging.get_mut().held);
                let filled = self.run.fill_held(&mut self.tx, held).await?
                    + fill_fresh_groups(&mut self.tx, run_id, directory_id).await?;
                as_planned &= filled == fresh;
            }
        }
        if self.run.staged.listed_groups.load(Ordering::Relaxed) > 0 {
            let include_external = self.options.include_external;
            let (run_id, directory_id) = (self.run.run_id, self.run.directory_id);
            let found = Found {
                as_planned,
                users_are_own: as_planned && self.plan.external_users == 0 && self.plan.conflicts.is_empty(),
                include_external,
                names_few_users: self.run.staged.names_few_users(),
            };
            remember(&mut self.tx, run_id, directory_id, found).await?;
        }
        let status = match (message, changes) {
            (Some(_), _) => "partial",
            (None, true) => "applied",
            (None, false) => "unchanged",
        };
        sqlx::query!(
            r#"
            update authz.directories d
            set customer_id = coalesce(d.customer_id, $3),
                last_complete_sync_at = case when $4 then r.started_at else d.last_complete_sync_at end
            from authz.sync_runs r
            where d.directory_id = $1 and r.run_id = $2
            "#,
            self.run.directory_id,
            self.run.run_id,
            self.options.customer_id,
            message.is_none(),
        )
        .execute(&mut *self.tx)
        .await?;
        self.end(status, Outcome::Succeeded, message, api_calls, actor).await
    }

    /// Leaves the mirror as it is: the plan was only asked for, or refused for the reason given. Only a
    /// refusal leaves a record in the audit trail.
    ///
    /// # Errors
    /// [`Error::Database`] if the end of the run could not be recorded.
    pub async fn discard(self, refusal: Option<&str>, api_calls: u64, actor: &Actor) -> Result<Plan, Error> {
        let status = if refusal.is_some() { "refused" } else { "planned" };
        let (plan, _) = self.end(status, Outcome::Denied, refusal, api_calls, actor).await?;
        Ok(plan)
    }

    async fn end(
        self,
        status: &str,
        outcome: Outcome,
        message: Option<&str>,
        api_calls: u64,
        actor: &Actor,
    ) -> Result<(Plan, Revision), Error> {
        let Self { run, mut tx, plan, .. } = self;
        let counts = serde_json::json!(plan.counts);
        if status != "planned" {
            let detail = serde_json::json!({
                "run_id": run.run_id, "status": status, "plan_hash": plan.hash, "counts": counts, "message": message.map(|text| shorten(&storable(text), ERROR_LIMIT)),
            });
            let record = Record::new("directory.sync", outcome).target(run.directory.as_str()).detail(detail);
            audit::record(&mut *tx, actor, &record).await?;
        }
        let closing = Closing { status, hash: Some(&plan.hash), counts: Some(counts), message, api_calls };
        close(&mut tx, run.run_id, &closing).await?;
        let revision = revision::commit(tx).await?;
        Ok((plan, revision))
    }
}

/// Removals first, then all changes in one statement (which may swap names), then what is new: so a name is
/// free before it is taken.
async fn apply_users(tx: &mut PgConnection, run_id: i64, planned: Tally) -> Result<(), Error> {
    if planned.removed > 0 {
        sqlx::query!(
            r#"
        update authz.users u set status = 'deleted'
        from authz.sync_plan_users p
        where p.run_id = $1 and p.op = 'remove' and u.user_id = p.user_id
        "#,
            run_id,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            r#"
        delete from authz.group_users gu
        using authz.sync_plan_users p, authz.groups g
        where p.run_id = $1 and p.op = 'remove' and gu.user_id = p.user_id
          and g.group_id = gu.group_id and g.directory_id <> 0
        "#,
            run_id,
        )
        .execute(&mut *tx)
        .await?;
    }
    if planned.added + planned.changed > 0 {
        sqlx::query!(
            r#"
        update authz.users u
        set user_name = p.new_name, display_name = p.new_display_name, status = p.new_status,
            directory_id = p.new_directory_id, external_id = p.external_id
        from authz.sync_plan_users p
        where p.run_id = $1 and p.op in ('add', 'change') and u.user_id = p.user_id
        "#,
            run_id,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            r#"
        insert into authz.users (user_name, directory_id, external_id, display_name, status)
        select p.new_name, p.new_directory_id, p.external_id, p.new_display_name, p.new_status
        from authz.sync_plan_users p
        where p.run_id = $1 and p.op = 'add' and p.user_id is null
        order by p.new_name
        "#,
            run_id,
        )
        .execute(tx)
        .await?;
    }
    Ok(())
}

async fn apply_groups(
    tx: &mut PgConnection,
    run_id: i64,
    directory_id: i32,
    planned: Tally,
) -> Result<(), Error> {
    if planned.removed > 0 {
        sqlx::query!(
            r#"
        update authz.groups g set status = 'deleted'
        from authz.sync_plan_groups p
        where p.run_id = $1 and p.op = 'remove' and g.group_id = p.group_id
        "#,
            run_id,
        )
        .execute(&mut *tx)
        .await?;
    }
    if planned.added + planned.changed > 0 {
        sqlx::query!(
            r#"
        update authz.groups g
        set group_name = p.new_name, display_name = p.new_display_name, description = p.new_description,
            status = 'active', directory_id = $2, external_id = p.external_id
        from authz.sync_plan_groups p
        where p.run_id = $1 and p.op in ('add', 'change') and g.group_id = p.group_id
        "#,
            run_id,
            directory_id,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            r#"
        insert into authz.groups (group_name, directory_id, external_id, display_name, description)
        select p.new_name, $2, p.external_id, p.new_display_name, p.new_description
        from authz.sync_plan_groups p
        where p.run_id = $1 and p.op = 'add' and p.group_id is null
        order by p.new_name
        "#,
            run_id,
            directory_id,
        )
        .execute(tx)
        .await?;
    }
    Ok(())
}

/// Removals, then changes, then what is new. Says whether that were as many rows as planned.
#[expect(clippy::too_many_lines, reason = "mostly statements")]
async fn apply_memberships(
    tx: &mut PgConnection,
    run_id: i64,
    directory_id: i32,
    planned: Tally,
    kinds: Kinds,
) -> Result<bool, Error> {
    let (mut removed, mut changed, mut added) = (0, 0, 0);
    if planned.removed > 0 {
        let done = sqlx::query!(
            r#"
            delete from authz.group_users m using authz.sync_plan_members p
            where p.run_id = $1 and p.op = 'remove' and p.kind = 'user' and m.group_id = p.group_id and m.user_id = p.member_id
            "#,
            run_id,
        )
        .execute(&mut *tx)
        .await?;
        removed += done.rows_affected();
        if kinds.groups {
            let done = sqlx::query!(
                r#"
            delete from authz.group_groups m using authz.sync_plan_members p
            where p.run_id = $1 and p.op = 'remove' and p.kind = 'group'
              and m.parent_group_id = p.group_id and m.child_group_id = p.member_id
            "#,
                run_id,
            )
            .execute(&mut *tx)
            .await?;
            removed += done.rows_affected();
        }
        if kinds.everyone {
            let done = sqlx::query!(
                r#"
            delete from authz.group_directories m using authz.sync_plan_members p
            where p.run_id = $1 and p.op = 'remove' and p.kind = 'everyone'
              and m.group_id = p.group_id and m.directory_id = p.member_id
            "#,
                run_id,
            )
            .execute(&mut *tx)
            .await?;
            removed += done.rows_affected();
        }
    }
    if planned.changed > 0 {
        let done = sqlx::query!(
            r#"
            update authz.group_users m set role = p.role from authz.sync_plan_members p
            where p.run_id = $1 and p.op = 'change' and p.kind = 'user' and m.group_id = p.group_id and m.user_id = p.member_id
            "#,
            run_id,
        )
        .execute(&mut *tx)
        .await?;
        changed += done.rows_affected();
    }
    if planned.added > 0 {
        let done = sqlx::query!(
            r#"
            insert into authz.group_users (group_id, user_id, role)
            select g.group_id, u.user_id, p.role
            from authz.sync_plan_members p
            join authz.groups g on g.directory_id = $2 and g.external_id = p.group_external_id
            join authz.users u on u.external_id = p.member_external_id
            where p.run_id = $1 and p.op = 'add' and p.kind = 'user'
            order by g.group_id, u.user_id
            on conflict do nothing
            "#,
            run_id,
            directory_id,
        )
        .execute(&mut *tx)
        .await?;
        added += done.rows_affected();
        if kinds.groups {
            let done = sqlx::query!(
                r#"
            insert into authz.group_groups (parent_group_id, child_group_id)
            select g.group_id, c.group_id
            from authz.sync_plan_members p
            join authz.groups g on g.directory_id = $2 and g.external_id = p.group_external_id
            join authz.groups c on c.directory_id = $2 and c.external_id = p.member_external_id
            where p.run_id = $1 and p.op = 'add' and p.kind = 'group'
            on conflict do nothing
            "#,
                run_id,
                directory_id,
            )
            .execute(&mut *tx)
            .await?;
            added += done.rows_affected();
        }
        if kinds.everyone {
            let done = sqlx::query!(
                r#"
            insert into authz.group_directories (group_id, directory_id)
            select g.group_id, $2
            from authz.sync_plan_members p
            join authz.groups g on g.directory_id = $2 and g.external_id = p.group_external_id
            where p.run_id = $1 and p.op = 'add' and p.kind = 'everyone'
            on conflict do nothing
            "#,
                run_id,
                directory_id,
            )
            .execute(&mut *tx)
            .await?;
            added += done.rows_affected();
        }
    }
    Ok((removed, changed, added) == (planned.removed, planned.changed, planned.added))
}
