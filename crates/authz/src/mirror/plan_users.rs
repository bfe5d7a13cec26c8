//! The part of the plan about users: listed, external and removed ones, and whose name stands in the way.

use sqlx::PgConnection;

use super::Run;
use super::plan::PlanOptions;
use crate::error::Error;

impl Run {
    pub(super) async fn plan_listed_users(
        &self,
        tx: &mut PgConnection,
        options: &PlanOptions,
    ) -> Result<(), Error> {
        sqlx::query!(
            r#"
            with matched as (
                select s.external_id, coalesce(s.user_name, u.user_name) as user_name, s.display_name,
                       case when s.suspended then 'suspended' else 'active' end as status,
                       coalesce(u.user_id, l.user_id) as user_id
                from authz.sync_stage_users s
                left join authz.users u on u.external_id = s.external_id
                left join authz.users l on $3 and u.user_id is null and l.user_name = s.user_name
                    and not exists (select from authz.sync_stage_users other -- the first of a name adopts
                                    where other.run_id = $1 and other.user_name = s.user_name
                                      and other.external_id < s.external_id)
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
            where m.user_name is not null
              and (u.user_id is null or u.status = 'deleted' or u.directory_id is null or u.directory_id = $2
                   or ($3 and u.directory_id = 0))
              and (u.user_name, u.display_name, u.status, u.directory_id)
                  is distinct from (m.user_name, m.display_name, m.status, $2)
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
    pub(super) async fn plan_external_users(&self, tx: &mut PgConnection) -> Result<(), Error> {
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
                  and not exists (select from authz.users u -- listed just as it is
                                  where u.external_id = m.member_external_id and u.directory_id = $2 and u.status <> 'deleted'
                                    and not exists (select from authz.sync_stage_unseen_users x
                                                    where x.run_id = $1 and x.user_id = u.user_id))
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
               -- Nobody's row, or ours that is listed no more (the guard counts those). One that another
               -- directory has is its business, also a deleted one.
               or (u.directory_id is null
                   and (u.status <> 'external' or u.user_name <> coalesce(m.user_name, u.user_name)))
               or u.directory_id = $2
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Takes new external users out of the plan who would be in no group, since theirs are left out. To be called when the
    /// groups are planned.
    // INVARIANT: whom a run makes an external user it makes a member, too, or the next run of another directory would take the
    // user away, and ours add it again, for ever (held by the test `guest_of_no_group_but_one_that_is_left_out_has_no_row`).
    pub(super) async fn drop_groupless_external_users(&self, tx: &mut PgConnection) -> Result<(), Error> {
        sqlx::query!(
            r#"
            delete from authz.sync_plan_users p
            where p.run_id = $1 and p.op = 'add' and p.new_status = 'external'
              -- As long as there is nobody, members are not looked through.
              and (select exists (select from authz.sync_plan_users e
                                  where e.run_id = $1 and e.op = 'add' and e.new_status = 'external'))
              and not exists (
                  select from authz.sync_stage_members m
                  left join authz.sync_plan_groups s on s.run_id = $1 and s.external_id = m.group_external_id
                  left join authz.groups g
                      on g.directory_id = $2 and g.external_id = m.group_external_id and g.status = 'active'
                  where m.run_id = $1 and m.kind = 'user' and m.member_external_id = p.external_id
                    and (s.external_id is not null or g.group_id is not null))
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok(())
    }

    pub(super) async fn plan_removed_users(
        &self,
        tx: &mut PgConnection,
        options: &PlanOptions,
    ) -> Result<(), Error> {
        sqlx::query!(
            r#"
            insert into authz.sync_plan_users (run_id, external_id, user_id, op, old_name, old_display_name,
                old_status, old_directory_id)
            select $1, coalesce(u.external_id, 'user ' || u.user_id), u.user_id, 'remove', u.user_name, u.display_name,
                   u.status, u.directory_id
            from authz.sync_stage_unseen_users x
            join authz.users u on u.user_id = x.user_id
            where x.run_id = $1 and u.directory_id = $2 and u.status <> 'deleted'
              and not exists (select from authz.sync_stage_users s where s.run_id = $1 and s.external_id = u.external_id)
              and not exists (select from authz.sync_plan_users p where p.run_id = $1 and p.user_id = u.user_id)
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(&mut *tx)
        .await?;
        // An external user goes when no directory has it as a member any more, whoever took it out: who is in no group
        // at all goes too, since a direct grant would stand for ever.
        sqlx::query!(
            r#"
            insert into authz.sync_plan_users (run_id, external_id, user_id, op, old_name, old_display_name,
                old_status, old_directory_id)
            select $1, coalesce(u.external_id, 'user ' || u.user_id), u.user_id, 'remove', u.user_name, u.display_name,
                   u.status, null
            from authz.users u
            where u.directory_id is null and u.status = 'external'
              -- As long as there is nobody, memberships are not looked through.
              and (select exists (select from authz.users e where e.directory_id is null and e.status = 'external'))
              and not exists (select from authz.sync_plan_users p where p.run_id = $1 and p.user_id = u.user_id)
              and not ($3 and exists (select from authz.sync_stage_members m
                                      where m.run_id = $1 and m.kind = 'user' and m.member_external_id = u.external_id))
              and not exists (
                  select from authz.group_users gu
                  join authz.groups g on g.group_id = gu.group_id
                  left join authz.sync_stage_groups s on s.run_id = $1 and s.external_id = g.external_id
                  where gu.user_id = u.user_id
                    and (g.directory_id not in (0, $2)
                         or (g.directory_id = $2 and not (s.members_complete and s.members_listed))))
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
    pub(super) async fn settle_user_names(&self, tx: &mut PgConnection) -> Result<i64, Error> {
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
            -- Hardly ever anybody: those whose name another one has or wants.
            contested as (
                select external_id, user_id, op, new_name, turn from wanting where not keeps and turn > 1
                union
                select w.external_id, w.user_id, w.op, w.new_name, w.turn
                from wanting w
                join authz.users h on h.user_name = w.new_name and h.status <> 'deleted' and h.user_id is distinct from w.user_id
                where not w.keeps
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
                from contested w
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
}
