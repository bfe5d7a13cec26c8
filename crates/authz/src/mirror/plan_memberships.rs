//! The part of the plan about who is in which group: what is staged against what the mirror has, as sets.

use sqlx::PgConnection;

use super::Run;
use crate::error::Error;

/// Fills `sync_plan_members`. To be called when users and groups are planned, since a membership needs both.
///
/// A group whose members could not be listed, or are the same as last time, keeps what it has, but for members that the
/// plan removes.
#[expect(clippy::too_many_lines, reason = "one statement")]
pub(super) async fn compare(
    tx: &mut PgConnection,
    run_id: i64,
    directory_id: i32,
    include_external: bool,
    names_few_users: bool,
) -> Result<(), Error> {
    sqlx::query!(
        r#"
        with person as materialized (
            -- Whom a staged row may name: all users, or those alone. To read and to hash all takes longer than all the rest
            -- where few are named.
            select u.user_id, u.external_id, u.directory_id, u.status
            from authz.users u
            where not $4
            union all
            select u.user_id, u.external_id, u.directory_id, u.status
            from (select distinct m.member_external_id
                  from authz.sync_stage_members m
                  where m.run_id = $1 and m.kind = 'user') m
            cross join lateral (select x.user_id, x.external_id, x.directory_id, x.status from authz.users x
                                where x.external_id = m.member_external_id offset 0) u
            where $4
        ),
        staged_group as (
            -- Groups that will be there; one that a name keeps out is not.
            select s.external_id, s.members_complete and not s.members_fresh as compared
            from authz.sync_stage_groups s
            where s.run_id = $1
              and (exists (select from authz.sync_plan_groups p where p.run_id = $1 and p.external_id = s.external_id)
                   or exists (select from authz.groups g
                              where g.directory_id = $2 and g.external_id = s.external_id and g.status = 'active'))
        ),
        mirror_group as (
            -- Groups that are there, those included that the plan adopts. All memberships are compared of those that are
            -- staged as a whole or go; of the others only what is staged, or goes with a user or group that goes.
            select g.group_id, coalesce(p.external_id, g.external_id, 'group ' || g.group_id) as external_id,
                   s.external_id is null or (s.members_complete and s.members_listed) as listed,
                   s.external_id is null or (s.members_complete and s.members_listed and s.members_basis is null) as whole
            from authz.groups g
            left join authz.sync_plan_groups p on p.run_id = $1 and p.group_id = g.group_id
            left join authz.sync_stage_groups s on s.run_id = $1 and s.external_id = coalesce(p.external_id, g.external_id)
            where g.status = 'active' and (g.directory_id = $2 or p.op = 'change')
        ),
        going_user as (
            select p.user_id from authz.sync_plan_users p where p.run_id = $1 and p.op = 'remove'
        ),
        going_group as (
            select p.group_id from authz.sync_plan_groups p where p.run_id = $1 and p.op = 'remove'
        ),
        looked_at as (
            -- Of groups that are not compared as a whole: the memberships that a staged row or a removal is about, one by one.
            select gu.group_id, gu.user_id
            from going_user x
            cross join lateral (select m.group_id, m.user_id from authz.group_users m where m.user_id = x.user_id offset 0) gu
            union
            select g.group_id, m.user_id
            from authz.sync_stage_gone_members m
            join mirror_group g on g.external_id = m.group_external_id and not g.whole
            where m.run_id = $1
            union
            select g.group_id, coalesce(p.user_id, u.user_id)
            from authz.sync_stage_members m
            join mirror_group g on g.external_id = m.group_external_id and not g.whole
            left join authz.sync_plan_users p on p.run_id = $1 and p.external_id = m.member_external_id
            left join person u on u.external_id = m.member_external_id
            where m.run_id = $1 and m.kind = 'user'
        ),
        mirror_user_member as (
            select g.external_id, g.whole, gu.group_id, gu.user_id, gu.role, u.external_id as user_external_id
            from mirror_group g
            join authz.group_users gu on gu.group_id = g.group_id
            join authz.users u on u.user_id = gu.user_id
            where g.whole
            union all
            -- Lateral, as each is looked up by its key: to join all memberships takes longer the more there are.
            select g.external_id, g.whole, gu.group_id, gu.user_id, gu.role, u.external_id
            from looked_at l
            join mirror_group g on g.group_id = l.group_id and not g.whole
            cross join lateral (select m.group_id, m.user_id, m.role from authz.group_users m
                                where m.group_id = l.group_id and m.user_id = l.user_id offset 0) gu
            cross join lateral (select x.external_id from authz.users x where x.user_id = gu.user_id offset 0) u
        ),
        staged_user as (
            -- Users that will be there and may be members: the directory's own, and external ones if let in.
            select m.member_external_id as external_id
            from (select distinct c.member_external_id
                  from authz.sync_stage_members c
                  join staged_group s on s.external_id = c.group_external_id and s.compared
                  where c.run_id = $1 and c.kind = 'user') m
            left join authz.sync_plan_users p on p.run_id = $1 and p.external_id = m.member_external_id
            left join person u on u.external_id = m.member_external_id and u.status <> 'deleted'
            where case
                when p.op in ('add', 'change') then p.new_directory_id = $2 or $3
                when p.op = 'remove' then false
                else u.user_id is not null and ($3 or u.directory_id = $2)
            end
        ),
        wanted as (
            -- Joins, not `exists` inside the case: that would be looked up row by row.
            select m.group_external_id, m.kind, m.member_external_id, m.role
            from authz.sync_stage_members m
            join staged_group s on s.external_id = m.group_external_id and s.compared
            left join staged_user u on m.kind = 'user' and u.external_id = m.member_external_id
            left join staged_group c on m.kind = 'group' and c.external_id = m.member_external_id
            where m.run_id = $1
              and case m.kind
                  when 'user' then u.external_id is not null
                  when 'group' then c.external_id is not null and c.external_id <> m.group_external_id
                  else true
              end
        ),
        present as (
            select g.external_id as group_external_id, 'user' as kind,
                   coalesce(p.external_id, g.user_external_id, 'user ' || g.user_id) as member_external_id,
                   g.role, g.group_id, g.user_id as member_id,
                   g.whole or gone.user_id is not null or exists (select from going_user x where x.user_id = g.user_id) as going
            from mirror_user_member g
            left join authz.sync_stage_gone_members gone
                on gone.run_id = $1 and gone.group_external_id = g.external_id and gone.user_id = g.user_id
            left join authz.sync_plan_users p on p.run_id = $1 and p.user_id = g.user_id
            union all
            select g.external_id, 'group', coalesce(m.external_id, 'group ' || gg.child_group_id), 'member',
                   g.group_id, gg.child_group_id,
                   g.listed or exists (select from going_group x where x.group_id = gg.child_group_id)
            from mirror_group g
            join authz.group_groups gg on gg.parent_group_id = g.group_id
            left join mirror_group m on m.group_id = gg.child_group_id
            union all
            select g.external_id, 'everyone',
                   case when gd.directory_id = $2 then 'everyone' else 'directory ' || gd.directory_id end, 'member',
                   g.group_id, gd.directory_id, g.listed
            from mirror_group g
            join authz.group_directories gd on gd.group_id = g.group_id
        )
        insert into authz.sync_plan_members
            (run_id, group_external_id, kind, member_external_id, op, role, group_id, member_id)
        select $1, coalesce(w.group_external_id, p.group_external_id), coalesce(w.kind, p.kind),
               coalesce(w.member_external_id, p.member_external_id),
               case when p.group_id is null then 'add' when w.role is null then 'remove' else 'change' end,
               coalesce(w.role, p.role), p.group_id, p.member_id
        from wanted w
        full join present p
            on (p.group_external_id, p.kind, p.member_external_id) = (w.group_external_id, w.kind, w.member_external_id)
        where p.group_id is null
           or (w.role is null and p.going)
           or (w.kind = 'user' and w.role <> p.role)
        "#,
        run_id,
        directory_id,
        include_external,
        names_few_users,
    )
    .execute(tx)
    .await?;
    Ok(())
}

impl Run {
    /// Whether there is anything that [`compare`] could find: groups that are listed and not fresh, staged members of others,
    /// or rows that go.
    pub(super) async fn has_memberships_to_compare(&self, tx: &mut PgConnection) -> Result<bool, Error> {
        Ok(sqlx::query_scalar!(
            r#"
            select exists (select from authz.sync_plan_users where run_id = $1 and op = 'remove')
                or exists (select from authz.sync_plan_groups where run_id = $1 and op = 'remove')
                or exists (select from authz.sync_stage_groups
                           where run_id = $1 and members_complete and members_listed and not members_fresh) as "any!"
            "#,
            self.run_id,
        )
        .fetch_one(tx)
        .await?)
    }

    /// Takes the compared groups out whose members, or members' ids, were changed since: they keep what they have. Says which.
    ///
    /// To be called under the lock on the revision: from there on nothing else changes them.
    pub(super) async fn set_disturbed_aside(&self, tx: &mut PgConnection) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar!(
            r#"
            with disturbed as (
                update authz.sync_stage_groups s
                set members_complete = false, members_listed = false, members_digest = null, members_basis = null
                where s.run_id = $1 and s.members_basis is not null
                  and not exists (select from authz.groups g
                                  join authz.group_digests d on d.group_id = g.group_id
                                  where g.directory_id = $2 and g.external_id = s.external_id and g.status = 'active'
                                    and d.digest = s.members_basis)
                returning s.external_id, coalesce(s.group_name, s.external_id) as group_name
            ),
            members as (
                delete from authz.sync_stage_members m using disturbed d
                where m.run_id = $1 and m.group_external_id = d.external_id
            ),
            gone as (
                delete from authz.sync_stage_gone_members m using disturbed d
                where m.run_id = $1 and m.group_external_id = d.external_id
            )
            select group_name as "group_name!" from disturbed order by 1
            "#,
            self.run_id,
            self.directory_id,
        )
        .fetch_all(tx)
        .await?)
    }
}
