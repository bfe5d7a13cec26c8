//! The part of the plan about groups.

use std::sync::atomic::Ordering;

use sqlx::PgConnection;

use super::Run;
use super::plan::{PlanOptions, set_nested_loops};
use crate::error::Error;

/// From so many staged groups on, they are joined as a whole.
const MANY_GROUPS: u64 = 500;

impl Run {
    /// Says whether there is anything to do or to report.
    pub(super) async fn plan_groups(
        &self,
        tx: &mut PgConnection,
        options: &PlanOptions,
    ) -> Result<bool, Error> {
        // Where nothing but groups is staged, nobody has counted them, and the planner takes them for few.
        let join_as_a_whole = self.staged.groups.load(Ordering::Relaxed) > MANY_GROUPS;
        let before = if join_as_a_whole { Some(set_nested_loops(tx, "off").await?) } else { None };
        let differs = self.compare_groups(tx, options).await?;
        if let Some(before) = before {
            set_nested_loops(tx, &before).await?;
        }
        Ok(differs)
    }

    async fn compare_groups(&self, tx: &mut PgConnection, options: &PlanOptions) -> Result<bool, Error> {
        let differing = sqlx::query!(
            r#"
            with matched as (
                select s.external_id, coalesce(s.group_name, g.group_name) as group_name, s.display_name, s.description,
                       -- Of the two at most one is there.
                       coalesce(g.group_id, l.group_id) as group_id, coalesce(g.group_name, l.group_name) as old_name,
                       coalesce(g.display_name, l.display_name) as old_display_name,
                       coalesce(g.description, l.description) as old_description,
                       coalesce(g.status, l.status) as old_status, coalesce(g.directory_id, l.directory_id) as old_directory_id
                from authz.sync_stage_groups s
                left join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id
                left join authz.groups l on $3 and g.group_id is null and l.group_name = s.group_name
                    and not exists (select from authz.sync_stage_groups other -- the first of a name adopts
                                    where other.run_id = $1 and other.group_name = s.group_name
                                      and other.external_id < s.external_id)
                    and l.directory_id = 0 and l.external_id is null and l.status <> 'deleted'
                where s.run_id = $1
            )
            insert into authz.sync_plan_groups (run_id, external_id, group_id, op, old_name, new_name,
                old_display_name, new_display_name, old_description, new_description)
            select $1, m.external_id, m.group_id,
                   case when m.group_id is null or m.old_status = 'deleted' then 'add' else 'change' end,
                   m.old_name, m.group_name, m.old_display_name, m.display_name, m.old_description, m.description
            from matched m
            where m.group_name is not null
              and (m.old_name, m.old_display_name, m.old_description, m.old_status, m.old_directory_id)
                  is distinct from (m.group_name, m.display_name, m.description, 'active', $2)
            "#,
            self.run_id,
            self.directory_id,
            options.adopt_local,
        )
        .execute(&mut *tx)
        .await?;
        let nameless = sqlx::query!(
            r#"
            insert into authz.sync_plan_conflicts (run_id, kind, external_id, name, reason)
            select $1, 'group', s.external_id, coalesce(g.group_name, s.external_id), 'its address cannot be a name'
            from authz.sync_stage_groups s
            left join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id
            where s.run_id = $1 and s.group_name is null
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(&mut *tx)
        .await?;
        let gone = sqlx::query!(
            r#"
            insert into authz.sync_plan_groups (run_id, external_id, group_id, op, old_name, old_display_name, old_description)
            select $1, coalesce(g.external_id, 'group ' || g.group_id), g.group_id, 'remove',
                   g.group_name, g.display_name, g.description
            from authz.groups g
            where g.directory_id = $2 and g.status <> 'deleted'
              and not exists (select from authz.sync_stage_groups s where s.run_id = $1 and s.external_id = g.external_id)
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok([differing, nameless, gone].iter().any(|done| done.rows_affected() > 0))
    }

    /// [`Self::settle_user_names`] for groups.
    pub(super) async fn settle_group_names(&self, tx: &mut PgConnection) -> Result<i64, Error> {
        let blocked = sqlx::query_scalar!(
            r#"
            with wanting as (
                select p.external_id, p.group_id, p.op, p.new_name,
                       (p.op = 'change' and p.new_name = p.old_name) as keeps,
                       row_number() over (partition by p.new_name
                           order by (p.op = 'change' and p.new_name = p.old_name) desc, p.external_id) as turn
                from authz.sync_plan_groups p
                where p.run_id = $1 and p.op in ('add', 'change')
            ),
            blocked as (
                select w.external_id, w.op, w.new_name,
                       coalesce(
                           (select case when h.directory_id = 0
                                        then 'a local group holds this name; rename one of them, or --adopt-local links them'
                                        else format('another group of directory `%s` holds this name', d.directory_name) end
                            from authz.groups h
                            join authz.directories d on d.directory_id = h.directory_id
                            left join authz.sync_plan_groups hp on hp.run_id = $1 and hp.group_id = h.group_id
                            where h.group_name = w.new_name and h.status <> 'deleted'
                              and h.group_id is distinct from w.group_id
                              and not coalesce(hp.op = 'remove' or (hp.op = 'change' and hp.new_name <> hp.old_name), false)
                            limit 1),
                           case when w.turn > 1 then 'the directory lists another group of this name' end) as reason
                from wanting w
                where not w.keeps
            ),
            noted as (
                insert into authz.sync_plan_conflicts (run_id, kind, external_id, name, reason)
                select $1, 'group', external_id, new_name, reason from blocked where reason is not null
                on conflict do nothing
            ),
            dropped as (
                delete from authz.sync_plan_groups p using blocked b
                where b.reason is not null and b.op = 'add' and p.run_id = $1 and p.external_id = b.external_id
            ),
            kept as (
                update authz.sync_plan_groups p set new_name = p.old_name
                from blocked b
                where b.reason is not null and b.op = 'change' and p.run_id = $1 and p.external_id = b.external_id
            )
            select count(*) as "blocked!" from blocked where reason is not null
            "#,
            self.run_id,
        )
        .fetch_one(tx)
        .await?;
        Ok(blocked)
    }
}
