//! The part of the plan about rights: who may do what no more, and who may do more, if the plan is applied.
//!
//! Both sides are computed from the tables as they are and the planned rows, for the users whose rights can differ.

use sqlx::PgConnection;

use super::Run;
use super::plan_summary::count;
use super::report::{ActionChange, ActionChanges, SHOWN, SHOWN_ACTIONS};
use crate::error::Error;

impl Run {
    /// Compares what users may do before and after the plan, at this moment: a grant that is over gives nothing. The hash of the
    /// plan becomes one of what is lost, too, if anything is.
    //
    // Members of fresh groups are taken from the staging table: none is held of a group that rights come through (`settle_held`).
    //
    // INVARIANT: what it says is what the apply does to the answers of `authz.can` (held by the test
    // `plan_says_who_gains_and_loses_what_the_apply_gives_and_takes`).
    #[expect(clippy::too_many_lines, reason = "it is one statement, told in the order of its steps")]
    pub(super) async fn action_changes(
        &self,
        tx: &mut PgConnection,
        hash: &str,
    ) -> Result<(ActionChanges, String), Error> {
        let rows = sqlx::query!(
            r#"
            with recursive
            planned_members as not materialized (
                select m.op, m.kind, m.group_external_id, m.member_external_id, m.group_id, m.member_id
                from authz.sync_plan_members m
                where m.run_id = $1
                union all
                select 'add', m.kind, m.group_external_id, m.member_external_id, null, null
                from authz.sync_stage_groups s
                join authz.sync_stage_members m on m.run_id = $1 and m.group_external_id = s.external_id
                where s.run_id = $1 and s.members_fresh
            ),
            planned_users as materialized (
                -- A row that is to come has no number yet: it gets a negative one.
                select p.external_id, coalesce(p.user_id, -row_number() over (order by p.external_id)) as user_id,
                       coalesce(p.new_name, p.old_name) as user_name,
                       coalesce(p.old_status in ('active', 'external'), false) as was,
                       p.op <> 'remove' and p.new_status in ('active', 'external') as will,
                       p.old_directory_id, p.new_directory_id
                from authz.sync_plan_users p
                where p.run_id = $1
            ),
            planned_groups as materialized (
                select p.external_id, coalesce(p.group_id, -row_number() over (order by p.external_id)) as group_id, p.op
                from authz.sync_plan_groups p
                where p.run_id = $1
            ),
            held as materialized (
                select ga.group_id, ga.action_name collate "C" as pattern, g.status = 'active' as was,
                       coalesce(pg.op <> 'remove', g.status = 'active') as will
                from authz.group_actions ga
                join authz.groups g on g.group_id = ga.group_id
                left join planned_groups pg on pg.group_id = ga.group_id
                where ga.expires_at is null or ga.expires_at > statement_timestamp()
            ),
            changed_edges as materialized (
                select m.op, coalesce(m.group_id, pg.group_id, g.group_id) as parent,
                       coalesce(m.member_id, pc.group_id, c.group_id) as child
                from planned_members m
                left join planned_groups pg on pg.external_id = m.group_external_id
                left join authz.groups g on g.directory_id = $2 and g.external_id = m.group_external_id
                left join planned_groups pc on pc.external_id = m.member_external_id
                left join authz.groups c on c.directory_id = $2 and c.external_id = m.member_external_id
                where m.kind = 'group' and m.op in ('add', 'remove')
            ),
            edges_after as materialized (
                select gg.parent_group_id as parent, gg.child_group_id as child
                from authz.group_groups gg
                where not exists (select from changed_edges e
                                  where e.op = 'remove' and (e.parent, e.child) = (gg.parent_group_id, gg.child_group_id))
                  -- A group that goes or comes back is emptied.
                  and not exists (select from planned_groups pg where pg.group_id = gg.parent_group_id and pg.op <> 'change')
                union
                select e.parent, e.child from changed_edges e where e.op = 'add'
            ),
            reach_before as materialized (
                select distinct re.group_id, re.action_name as pattern
                from held h
                join authz.group_reach re on re.holder_id = h.group_id and re.action_name = h.pattern
                where h.was
            ),
            reach_after as (
                select h.group_id, h.pattern from held h where h.will
                union
                select e.child, r.pattern from reach_after r join edges_after e on e.parent = r.group_id
            ),
            reaching as materialized (
                select group_id from reach_before union select group_id from reach_after
            ),
            shifted as materialized (
                select group_id from (table reach_before except table reach_after) lost
                union
                select group_id from (table reach_after except table reach_before) won
            ),
            -- Under the id by which the plan names them; groups of other directories are in no plan of this one.
            reaching_here as materialized (
                select r.group_id, coalesce(pg.external_id, g.external_id) as external_id
                from reaching r
                left join planned_groups pg on pg.group_id = r.group_id
                left join authz.groups g on g.group_id = r.group_id
                where pg.group_id is not null or g.directory_id = $2
            ),
            changed_members as materialized (
                select m.op, m.kind, m.group_id, m.member_id
                from planned_members m
                join reaching r on r.group_id = m.group_id
                where m.op = 'remove' and m.kind <> 'group'
                union all
                select m.op, m.kind, r.group_id,
                       case m.kind when 'user' then coalesce(pu.user_id, u.user_id) else $2 end
                from planned_members m
                join reaching_here r on r.external_id = m.group_external_id
                left join planned_users pu on m.kind = 'user' and pu.external_id = m.member_external_id
                left join authz.users u on m.kind = 'user' and u.external_id = m.member_external_id
                where m.op = 'add' and m.kind <> 'group'
            ),
            -- Groups that lose all that is in them, with the memberships that the plan does not list one by one.
            emptied as materialized (
                select r.group_id from reaching r join planned_groups pg on pg.group_id = r.group_id and pg.op <> 'change'
            ),
            candidate as materialized (
                select p.user_id from planned_users p
                where p.was <> p.will or p.old_directory_id is distinct from p.new_directory_id
                union
                select m.member_id from changed_members m where m.kind = 'user' and m.member_id is not null
                union
                select gu.user_id from authz.group_users gu
                where gu.group_id in (select group_id from shifted union all select group_id from emptied)
                union
                select u.user_id
                from authz.users u
                where u.directory_id in (
                    select gd.directory_id from authz.group_directories gd
                    where gd.group_id in (select group_id from shifted union all select group_id from emptied)
                    union all
                    select m.member_id from changed_members m where m.kind = 'everyone')
            ),
            person as materialized (
                select c.user_id, coalesce(p.user_name, u.user_name) as user_name,
                       coalesce(p.was, u.status in ('active', 'external')) as was,
                       coalesce(p.will, u.status in ('active', 'external')) as will,
                       u.directory_id as directory_before,
                       case when p.user_id is null then u.directory_id else p.new_directory_id end as directory_after
                from candidate c
                left join planned_users p on p.user_id = c.user_id
                left join authz.users u on u.user_id = c.user_id
            ),
            own as materialized (
                select ua.user_id, ua.action_name collate "C" as pattern
                from authz.user_actions ua
                where ua.expires_at is null or ua.expires_at > statement_timestamp()
            ),
            rights_before as materialized (
                select p.user_id, o.pattern from person p join own o on o.user_id = p.user_id where p.was
                union
                select p.user_id, r.pattern
                from person p
                join authz.group_users gu on gu.user_id = p.user_id
                join reach_before r on r.group_id = gu.group_id
                where p.was
                union
                select p.user_id, r.pattern
                from person p
                join authz.group_directories gd on gd.directory_id = p.directory_before
                join reach_before r on r.group_id = gd.group_id
                where p.was
            ),
            rights_after as materialized (
                select p.user_id, o.pattern from person p join own o on o.user_id = p.user_id where p.will
                union
                select p.user_id, r.pattern
                from person p
                join (
                    select gu.user_id, gu.group_id
                    from authz.group_users gu
                    where gu.group_id not in (select group_id from emptied)
                      and not exists (select from changed_members m
                                      where m.op = 'remove' and m.kind = 'user'
                                        and (m.group_id, m.member_id) = (gu.group_id, gu.user_id))
                    union all
                    select m.member_id, m.group_id from changed_members m where m.op = 'add' and m.kind = 'user'
                ) gu on gu.user_id = p.user_id
                join reach_after r on r.group_id = gu.group_id
                where p.will
                union
                select p.user_id, r.pattern
                from person p
                join (
                    select gd.directory_id, gd.group_id
                    from authz.group_directories gd
                    where gd.group_id not in (select group_id from emptied)
                      and not exists (select from changed_members m
                                      where m.op = 'remove' and m.kind = 'everyone'
                                        and (m.group_id, m.member_id) = (gd.group_id, gd.directory_id))
                    union all
                    select m.member_id, m.group_id from changed_members m where m.op = 'add' and m.kind = 'everyone'
                ) gd on gd.directory_id = p.directory_after
                join reach_after r on r.group_id = gd.group_id
                where p.will
            ),
            -- Two patterns may cover the same action: what counts is the actions.
            covered as materialized (
                select a.action_name, unnest(authz.covering(a.action_name)) collate "C" as pattern from authz.actions a
            ),
            differing as materialized (
                select user_id, pattern, 'lose' as change from (table rights_before except table rights_after) lost
                union all
                select user_id, pattern, 'gain' from (table rights_after except table rights_before) won
            ),
            other_side as materialized (
                select r.user_id, c.action_name, r.change
                from (select user_id, pattern, 'lose' as change from rights_after
                      union all
                      select user_id, pattern, 'gain' from rights_before) r
                join covered c on c.pattern = r.pattern
                where r.user_id in (select user_id from differing)
            ),
            concerned as (
                select distinct d.user_id, d.change, c.action_name
                from differing d
                join covered c on c.pattern = d.pattern
                where not exists (select from other_side o
                                  where (o.user_id, o.change, o.action_name) = (d.user_id, d.change, c.action_name))
            ),
            summed as (
                select p.user_name, c.change, count(*) as actions,
                       (array_agg(c.action_name order by c.action_name collate "C"))[1:$4] as names
                from concerned c
                join person p on p.user_id = c.user_id
                group by c.user_id, p.user_name, c.change
            )
            select user_name as "user_name!", change as "change!", actions as "actions!", names as "names!",
                   count(*) filter (where change = 'lose') over () as "users_losing!",
                   count(*) filter (where change = 'gain') over () as "users_gaining!",
                   (select left(encode(sha256(convert_to(string_agg(
                        jsonb_build_array(p.user_name, c.action_name)::text, E'\n'
                        order by p.user_name collate "C", c.action_name collate "C") || $5, 'UTF8')), 'hex'), 16)
                    from concerned c
                    join person p on p.user_id = c.user_id
                    where c.change = 'lose') as hash
            from summed
            order by change desc, actions desc, user_name
            limit $3
            "#,
            self.run_id,
            self.directory_id,
            SHOWN,
            SHOWN_ACTIONS,
            hash,
        )
        .fetch_all(tx)
        .await?;
        let (mut changes, mut hash) = (ActionChanges::default(), hash.to_owned());
        for row in rows {
            if let Some(with_losses) = row.hash {
                hash = with_losses;
            }
            changes.users_losing = count(row.users_losing);
            changes.users_gaining = count(row.users_gaining);
            let change = ActionChange { user: row.user_name, count: count(row.actions), actions: row.names };
            if row.change == "lose" { changes.losing.push(change) } else { changes.gaining.push(change) }
        }
        Ok((changes, hash))
    }

    /// Users whom the directory does not list, and who are in its groups.
    pub(super) async fn people_of_others(&self, tx: &mut PgConnection) -> Result<u64, Error> {
        let people = sqlx::query_scalar!(
            r#"
            select count(*) as "people!"
            from authz.users u
            where u.directory_id is distinct from $1 and u.status <> 'deleted'
              and exists (select from authz.group_users gu
                          join authz.groups g on g.group_id = gu.group_id and g.directory_id = $1
                          where gu.user_id = u.user_id)
            "#,
            self.directory_id,
        )
        .fetch_one(tx)
        .await?;
        Ok(count(people))
    }
}
