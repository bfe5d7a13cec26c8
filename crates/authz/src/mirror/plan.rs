//! The plan: staging and mirror compared by set-based statements inside the transaction that will apply it.
//!
//! Rows are matched by the directory's immutable id; a name is an attribute. What a name stands in the way
//! of is left out and reported as a conflict, and the rest goes on.

use sqlx::{PgConnection, Postgres, Transaction};
use std::sync::atomic::Ordering;

use super::report::{Change, Conflict, Counts, GroupChange, MembershipChange, Plan, SHOWN, Tally, Totals, UserChange};
use super::{Run, plan_memberships};
use crate::error::Error;

/// What a sync is asked to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// The organisation that the source shows, if it says so.
    pub customer_id: Option<String>,
    /// Mirror members whom the directory does not list.
    pub include_external: bool,
    /// Link a local user or group that has the name of a directory's one, instead of reporting a conflict.
    pub adopt_local: bool,
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
        let mut tx = self.pool.begin().await?;
        self.hold_lease(&mut tx).await?;
        let listed = self.count_staged(&mut tx).await?;
        self.plan_listed_users(&mut tx, options).await?;
        if options.include_external {
            self.plan_external_users(&mut tx).await?;
        }
        self.plan_removed_users(&mut tx, options).await?;
        while self.settle_user_names(&mut tx).await? > 0 {}
        self.plan_groups(&mut tx, options).await?;
        while self.settle_group_names(&mut tx).await? > 0 {}
        self.drop_idle_changes(&mut tx).await?;
        plan_memberships::compare(&mut tx, self.run_id, self.directory_id, options.include_external).await?;
        let plan = self.read_plan(&mut tx, listed).await?;
        Ok((tx, plan))
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

    /// Counts the staged rows.
    // INVARIANT: staging that lost rows (unlogged tables are emptied by a crash of the server) is never
    // compared with the mirror (held by the test `staging_lost_in_a_crash_is_not_absence`).
    async fn count_staged(&self, tx: &mut PgConnection) -> Result<Totals, Error> {
        let row = sqlx::query!(
            r#"
            select (select count(*) from authz.sync_stage_users where run_id = $1) as "users!",
                   (select count(*) from authz.sync_stage_groups where run_id = $1) as "groups!",
                   (select count(*) from authz.sync_stage_members where run_id = $1) as "memberships!"
            "#,
            self.run_id,
        )
        .fetch_one(tx)
        .await?;
        let found =
            Totals { users: count(row.users), groups: count(row.groups), memberships: count(row.memberships) };
        let staged = Totals {
            users: self.staged.users.load(Ordering::Relaxed),
            groups: self.staged.groups.load(Ordering::Relaxed),
            memberships: self.staged.members.load(Ordering::Relaxed),
        };
        if found == staged { Ok(found) } else { Err(Error::StagingLost { run_id: self.run_id }) }
    }

    async fn plan_listed_users(&self, tx: &mut PgConnection, options: &PlanOptions) -> Result<(), Error> {
        sqlx::query!(
            r#"
            with matched as (
                select s.external_id, coalesce(s.user_name, u.user_name) as user_name, s.display_name,
                       case when s.suspended then 'suspended' else 'active' end as status,
                       coalesce(u.user_id, l.user_id) as user_id
                from authz.sync_stage_users s
                left join authz.users u on u.external_id = s.external_id
                left join authz.users l on $3 and u.user_id is null and l.user_name = s.user_name
                    and l.directory_id = 0 and l.external_id is null and l.status <> 'deleted'
                where s.run_id = $1
            )
            insert into authz.sync_plan_users (run_id, external_id, user_id, op, old_name, new_name,
                old_display_name, new_display_name, old_status, new_status, old_directory_id, new_directory_id)
            select $1, m.external_id, u.user_id,
                   case when u.user_id is null or u.status = 'deleted' then 'add' else 'change' end,
                   u.user_name, m.user_name, u.display_name, m.display_name, u.status, m.status, u.directory_id, $2
            from matched m
            left join authz.users u on u.user_id = m.user_id
            where (u.user_id is null and m.user_name is not null)
               or ((u.status = 'deleted' or u.directory_id is null or u.directory_id = $2 or ($3 and u.directory_id = 0))
                   and (u.user_name, u.display_name, u.status, u.directory_id)
                       is distinct from (m.user_name, m.display_name, m.status, $2))
            "#,
            self.run_id,
            self.directory_id,
            options.adopt_local,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            r#"
            insert into authz.sync_plan_conflicts (run_id, kind, external_id, name, reason)
            select $1, 'user', s.external_id, coalesce(s.user_name, u.user_name),
                   case when u.directory_id = 0 then 'a local user has this id; --adopt-local links them'
                        else format('directory `%s` lists this user too, and has it', d.directory_name) end
            from authz.sync_stage_users s
            join authz.users u on u.external_id = s.external_id
            join authz.directories d on d.directory_id = u.directory_id
            where s.run_id = $1 and u.status <> 'deleted' and u.directory_id <> $2
              and not ($3 and u.directory_id = 0)
            "#,
            self.run_id,
            self.directory_id,
            options.adopt_local,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            r#"
            insert into authz.sync_plan_conflicts (run_id, kind, external_id, name, reason)
            select $1, 'user', s.external_id, coalesce(u.user_name, s.external_id), 'its address cannot be a name'
            from authz.sync_stage_users s
            left join authz.users u on u.external_id = s.external_id
            where s.run_id = $1 and s.user_name is null
            on conflict do nothing
            "#,
            self.run_id,
        )
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Members of staged groups whom the directory does not list.
    async fn plan_external_users(&self, tx: &mut PgConnection) -> Result<(), Error> {
        sqlx::query!(
            r#"
            with member as (
                select m.member_external_id as external_id, min(m.member_name) as user_name
                from authz.sync_stage_members m
                join authz.sync_stage_groups g
                    on g.run_id = $1 and g.external_id = m.group_external_id and g.members_complete
                where m.run_id = $1 and m.kind = 'user'
                  and not exists (select from authz.sync_stage_users s
                                  where s.run_id = $1 and s.external_id = m.member_external_id)
                group by m.member_external_id
            ),
            nameless as (
                insert into authz.sync_plan_conflicts (run_id, kind, external_id, name, reason)
                select $1, 'user', m.external_id, m.external_id, 'an external member without an address'
                from member m
                left join authz.users u on u.external_id = m.external_id
                where m.user_name is null and u.user_id is null
            )
            insert into authz.sync_plan_users (run_id, external_id, user_id, op, old_name, new_name,
                old_display_name, new_display_name, old_status, new_status, old_directory_id, new_directory_id)
            select $1, m.external_id, u.user_id,
                   case when u.user_id is null or u.status = 'deleted' then 'add' else 'change' end,
                   u.user_name, coalesce(m.user_name, u.user_name), u.display_name, coalesce(u.display_name, ''),
                   u.status, 'external', u.directory_id, null
            from member m
            left join authz.users u on u.external_id = m.external_id
            where (u.user_id is null and m.user_name is not null)
               -- Nobody's row, or ours that is listed no more. One that its own directory deleted stays deleted.
               or (u.directory_id is null
                   and (u.status <> 'external' or u.user_name <> coalesce(m.user_name, u.user_name)))
               or (u.directory_id = $2 and u.status <> 'deleted')
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok(())
    }

    async fn plan_removed_users(&self, tx: &mut PgConnection, options: &PlanOptions) -> Result<(), Error> {
        sqlx::query!(
            r#"
            insert into authz.sync_plan_users (run_id, external_id, user_id, op, old_name, old_display_name,
                old_status, old_directory_id)
            select $1, coalesce(u.external_id, 'user ' || u.user_id), u.user_id, 'remove', u.user_name, u.display_name,
                   u.status, u.directory_id
            from authz.users u
            where u.directory_id = $2 and u.status <> 'deleted'
              and not exists (select from authz.sync_stage_users s where s.run_id = $1 and s.external_id = u.external_id)
              and not exists (select from authz.sync_plan_users p where p.run_id = $1 and p.user_id = u.user_id)
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(&mut *tx)
        .await?;
        // An external user goes when no directory has it as a member any more.
        sqlx::query!(
            r#"
            insert into authz.sync_plan_users (run_id, external_id, user_id, op, old_name, old_display_name,
                old_status, old_directory_id)
            select $1, coalesce(u.external_id, 'user ' || u.user_id), u.user_id, 'remove', u.user_name, u.display_name,
                   u.status, null
            from authz.users u
            where u.directory_id is null and u.status = 'external'
              and exists (select from authz.group_users gu join authz.groups g on g.group_id = gu.group_id
                          where gu.user_id = u.user_id and g.directory_id = $2)
              and not exists (select from authz.sync_plan_users p where p.run_id = $1 and p.user_id = u.user_id)
              and not ($3 and exists (select from authz.sync_stage_members m
                                      where m.run_id = $1 and m.kind = 'user' and m.member_external_id = u.external_id))
              and not exists (
                  select from authz.group_users gu
                  join authz.groups g on g.group_id = gu.group_id
                  left join authz.sync_stage_groups s on s.run_id = $1 and s.external_id = g.external_id
                  where gu.user_id = u.user_id
                    and (g.directory_id not in (0, $2) or (g.directory_id = $2 and not s.members_complete)))
            "#,
            self.run_id,
            self.directory_id,
            options.include_external,
        )
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Takes out of the plan what a name stands in the way of; says how many rows that were. To be repeated
    /// until none is: a user who keeps the old name may stand in another's way.
    async fn settle_user_names(&self, tx: &mut PgConnection) -> Result<i64, Error> {
        let blocked = sqlx::query_scalar!(
            r#"
            with wanting as (
                select p.external_id, p.user_id, p.op, p.new_name, p.old_name,
                       (p.op = 'change' and p.new_name = p.old_name) as keeps,
                       row_number() over (partition by p.new_name
                           order by (p.op = 'change' and p.new_name = p.old_name) desc, p.external_id) as turn
                from authz.sync_plan_users p
                where p.run_id = $1 and p.op in ('add', 'change')
            ),
            blocked as (
                select w.external_id, w.op, w.new_name,
                       coalesce(
                           (select format('%s holds this name',
                                          case when h.directory_id = 0 then 'a local user'
                                               when h.directory_id is null then 'an external user'
                                               else format('another user of directory `%s`', d.directory_name) end)
                                   || case when h.directory_id = 0 then '; rename one of them, or --adopt-local links them'
                                           else '' end
                            from authz.users h
                            left join authz.directories d on d.directory_id = h.directory_id
                            left join authz.sync_plan_users hp on hp.run_id = $1 and hp.user_id = h.user_id
                            where h.user_name = w.new_name and h.status <> 'deleted'
                              and h.user_id is distinct from w.user_id
                              and not coalesce(hp.op = 'remove' or (hp.op = 'change' and hp.new_name <> hp.old_name), false)
                            limit 1),
                           case when w.turn > 1 then 'the directory lists another user of this name' end) as reason
                from wanting w
                where not w.keeps
            ),
            noted as (
                insert into authz.sync_plan_conflicts (run_id, kind, external_id, name, reason)
                select $1, 'user', external_id, new_name, reason from blocked where reason is not null
                on conflict do nothing
            ),
            dropped as (
                delete from authz.sync_plan_users p using blocked b
                where b.reason is not null and b.op = 'add' and p.run_id = $1 and p.external_id = b.external_id
            ),
            kept as (
                update authz.sync_plan_users p set new_name = p.old_name
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

    async fn plan_groups(&self, tx: &mut PgConnection, options: &PlanOptions) -> Result<(), Error> {
        sqlx::query!(
            r#"
            with matched as (
                select s.external_id, coalesce(s.group_name, g.group_name) as group_name, s.display_name, s.description,
                       coalesce(g.group_id, l.group_id) as group_id
                from authz.sync_stage_groups s
                left join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id
                left join authz.groups l on $3 and g.group_id is null and l.group_name = s.group_name
                    and l.directory_id = 0 and l.external_id is null and l.status <> 'deleted'
                where s.run_id = $1
            )
            insert into authz.sync_plan_groups (run_id, external_id, group_id, op, old_name, new_name,
                old_display_name, new_display_name, old_description, new_description)
            select $1, m.external_id, g.group_id,
                   case when g.group_id is null or g.status = 'deleted' then 'add' else 'change' end,
                   g.group_name, m.group_name, g.display_name, m.display_name, g.description, m.description
            from matched m
            left join authz.groups g on g.group_id = m.group_id
            where (g.group_id is null and m.group_name is not null)
               or g.directory_id <> $2
               or (g.group_name, g.display_name, g.description, g.status)
                  is distinct from (m.group_name, m.display_name, m.description, 'active')
            "#,
            self.run_id,
            self.directory_id,
            options.adopt_local,
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
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
        sqlx::query!(
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
        Ok(())
    }

    /// [`Self::settle_user_names`] for groups.
    async fn settle_group_names(&self, tx: &mut PgConnection) -> Result<i64, Error> {
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

    async fn read_plan(&self, tx: &mut PgConnection, listed: Totals) -> Result<Plan, Error> {
        let totals = sqlx::query!(
            r#"
            select
                (select count(*) filter (where op = 'add') from authz.sync_plan_users where run_id = $1) as "users_added!",
                (select count(*) filter (where op = 'remove') from authz.sync_plan_users where run_id = $1) as "users_removed!",
                (select count(*) filter (where op = 'change') from authz.sync_plan_users where run_id = $1) as "users_changed!",
                (select count(*) filter (where op = 'change' and old_status <> 'suspended' and new_status = 'suspended')
                 from authz.sync_plan_users where run_id = $1) as "newly_suspended!",
                (select count(*) filter (where op = 'add') from authz.sync_plan_groups where run_id = $1) as "groups_added!",
                (select count(*) filter (where op = 'remove') from authz.sync_plan_groups where run_id = $1) as "groups_removed!",
                (select count(*) filter (where op = 'change') from authz.sync_plan_groups where run_id = $1) as "groups_changed!",
                (select count(*) filter (where op = 'add') from authz.sync_plan_members where run_id = $1) as "memberships_added!",
                (select count(*) filter (where op = 'remove') from authz.sync_plan_members where run_id = $1) as "memberships_removed!",
                (select count(*) filter (where op = 'change') from authz.sync_plan_members where run_id = $1) as "memberships_changed!",
                (select count(*) from authz.users where directory_id = $2 and status <> 'deleted') as "users!",
                (select count(*) from authz.groups where directory_id = $2 and status <> 'deleted') as "groups!",
                (select count(*) from authz.groups g join authz.group_users m on m.group_id = g.group_id where g.directory_id = $2)
                    + (select count(*) from authz.groups g join authz.group_groups m on m.parent_group_id = g.group_id where g.directory_id = $2)
                    + (select count(*) from authz.groups g join authz.group_directories m on m.group_id = g.group_id where g.directory_id = $2)
                    as "memberships!",
                (select count(distinct m.member_external_id) from authz.sync_stage_members m
                 where m.run_id = $1 and m.kind = 'user'
                   and not exists (select from authz.sync_stage_users s where s.run_id = $1 and s.external_id = m.member_external_id))
                    as "external_users!",
                (select count(distinct m.member_external_id) from authz.sync_stage_members m
                 where m.run_id = $1 and m.kind = 'group'
                   and not exists (select from authz.sync_stage_groups s where s.run_id = $1 and s.external_id = m.member_external_id))
                    as "external_groups!"
            "#,
            self.run_id,
            self.directory_id,
        )
        .fetch_one(&mut *tx)
        .await?;
        let tally = |added, removed, changed| Tally {
            added: count(added),
            removed: count(removed),
            changed: count(changed),
        };
        Ok(Plan {
            hash: self.hash(&mut *tx).await?,
            counts: Counts {
                users: tally(totals.users_added, totals.users_removed, totals.users_changed),
                groups: tally(totals.groups_added, totals.groups_removed, totals.groups_changed),
                memberships: tally(totals.memberships_added, totals.memberships_removed, totals.memberships_changed),
            },
            before: Totals {
                users: count(totals.users),
                groups: count(totals.groups),
                memberships: count(totals.memberships),
            },
            listed,
            newly_suspended: count(totals.newly_suspended),
            external_users: count(totals.external_users),
            external_groups: count(totals.external_groups),
            incomplete_groups: self.incomplete_groups(&mut *tx).await?,
            users: self.user_changes(&mut *tx).await?,
            groups: self.group_changes(&mut *tx).await?,
            memberships: self.membership_changes(&mut *tx).await?,
            conflicts: self.conflicts(&mut *tx).await?,
        })
    }

    /// Over every planned row, by the directory's ids: the same mirror and the same listing give the same hash.
    async fn hash(&self, tx: &mut PgConnection) -> Result<String, Error> {
        let hash = sqlx::query_scalar!(
            r#"
            select left(encode(sha256(convert_to($2 || coalesce(string_agg(line, E'\n' order by line collate "C"), ''), 'UTF8')), 'hex'), 16) as "hash!"
            from (
                select jsonb_build_array('user', external_id, op, old_name, new_name, old_display_name, new_display_name,
                                         old_status, new_status, new_directory_id is null)::text as line
                from authz.sync_plan_users where run_id = $1
                union all
                select jsonb_build_array('group', external_id, op, old_name, new_name, old_display_name, new_display_name,
                                         old_description, new_description)::text
                from authz.sync_plan_groups where run_id = $1
                union all
                select jsonb_build_array('member', group_external_id, kind, member_external_id, op, role)::text
                from authz.sync_plan_members where run_id = $1
            ) changes
            "#,
            self.run_id,
            self.directory.as_str(),
        )
        .fetch_one(tx)
        .await?;
        Ok(hash)
    }

    async fn incomplete_groups(&self, tx: &mut PgConnection) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar!(
            r#"select coalesce(group_name, external_id) as "name!" from authz.sync_stage_groups where run_id = $1 and not members_complete order by 1"#,
            self.run_id,
        )
        .fetch_all(tx)
        .await?)
    }

    async fn user_changes(&self, tx: &mut PgConnection) -> Result<Vec<UserChange>, Error> {
        let rows = sqlx::query!(
            r#"
            select op, external_id, old_name, new_name, old_status, new_status
            from authz.sync_plan_users where run_id = $1
            order by op desc, coalesce(old_name, new_name), external_id
            limit $2
            "#,
            self.run_id,
            SHOWN,
        )
        .fetch_all(tx)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| UserChange {
                change: Change::parse(&row.op),
                external_id: row.external_id,
                old_name: row.old_name,
                new_name: row.new_name,
                old_status: row.old_status,
                new_status: row.new_status,
            })
            .collect())
    }

    async fn group_changes(&self, tx: &mut PgConnection) -> Result<Vec<GroupChange>, Error> {
        let rows = sqlx::query!(
            r#"
            select op, external_id, old_name, new_name
            from authz.sync_plan_groups where run_id = $1
            order by op desc, coalesce(old_name, new_name), external_id
            limit $2
            "#,
            self.run_id,
            SHOWN,
        )
        .fetch_all(tx)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| GroupChange {
                change: Change::parse(&row.op),
                external_id: row.external_id,
                old_name: row.old_name,
                new_name: row.new_name,
            })
            .collect())
    }

    async fn membership_changes(&self, tx: &mut PgConnection) -> Result<Vec<MembershipChange>, Error> {
        let rows = sqlx::query!(
            r#"
            select coalesce(max(g.group_name), max(s.group_name), p.group_external_id) as "group!",
                   count(*) filter (where p.op = 'add') as "added!",
                   count(*) filter (where p.op = 'remove') as "removed!",
                   count(*) filter (where p.op = 'change') as "changed!",
                   (select count(*) from authz.group_users m where m.group_id = max(g.group_id))
                   + (select count(*) from authz.group_groups m where m.parent_group_id = max(g.group_id))
                   + (select count(*) from authz.group_directories m where m.group_id = max(g.group_id)) as "before!"
            from authz.sync_plan_members p
            left join authz.groups g on g.group_id = p.group_id
            left join authz.sync_stage_groups s on s.run_id = $1 and s.external_id = p.group_external_id
            where p.run_id = $1
            group by p.group_external_id
            order by count(*) filter (where p.op = 'remove') desc, count(*) desc, 1
            limit $2
            "#,
            self.run_id,
            SHOWN,
        )
        .fetch_all(tx)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| MembershipChange {
                group: row.group,
                before: count(row.before),
                tally: Tally { added: count(row.added), removed: count(row.removed), changed: count(row.changed) },
            })
            .collect())
    }

    async fn conflicts(&self, tx: &mut PgConnection) -> Result<Vec<Conflict>, Error> {
        let rows = sqlx::query!(
            r#"
            select kind, external_id, name, reason
            from authz.sync_plan_conflicts where run_id = $1
            order by kind, name, external_id
            "#,
            self.run_id,
        )
        .fetch_all(tx)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| Conflict {
                kind: row.kind,
                external_id: row.external_id,
                name: row.name,
                reason: row.reason,
            })
            .collect())
    }
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
