//! What a run remembers of the groups' members for the next one, and what it makes of that: a group whose listing is the
//! one of last time is not staged, but for the members whom something else than the listing decides about.

use sqlx::PgConnection;

use super::Run;
use crate::error::Error;

/// What an apply knows of its run.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing")]
pub(super) struct Found {
    /// Each planned row was carried out and none was withheld, so that nothing has to be counted.
    pub(super) as_planned: bool,
    /// Each user who is staged as a member is the directory's own.
    pub(super) users_are_own: bool,
    /// Whom the directory does not list is let in.
    pub(super) include_external: bool,
    /// The staged rows name few users.
    pub(super) names_few_users: bool,
}

impl Run {
    /// Stages of the groups that are as last time the members who have to be looked at again: its outsiders, who may be
    /// listed by now, and users whom the directory lists no more, who may stay as external ones. Says how many rows that are.
    pub(super) async fn stage_remembered(&self, tx: &mut PgConnection) -> Result<u64, Error> {
        let done = sqlx::query!(
            r#"
            with same as (
                -- Compared groups too: those of their members who are as listed are not staged either.
                select s.external_id, g.group_id, s.members_listed as compared
                from authz.sync_stage_groups s
                join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id
                where s.run_id = $1 and s.members_complete and (not s.members_listed or s.members_basis is not null)
            ),
            outsider as (
                select same.external_id as group_external_id, o.kind, o.external_id, o.member_name, o.role
                from authz.group_outsiders o
                join same on same.group_id = o.group_id and not same.compared
            ),
            left_behind as materialized (
                select same.external_id as group_external_id, 'user' as kind, u.external_id, u.user_name as member_name, gu.role
                from authz.sync_stage_unseen_users x
                join authz.users u on u.user_id = x.user_id and u.external_id is not null
                join authz.group_users gu on gu.user_id = u.user_id
                join same on same.group_id = gu.group_id
                where x.run_id = $1
                  and not exists (select from authz.sync_stage_users s where s.run_id = $1 and s.external_id = u.external_id)
                  and not exists (select from authz.sync_stage_gone_members x2
                                  where x2.run_id = $1 and x2.group_external_id = same.external_id and x2.user_id = u.user_id)
                  and not exists (select from authz.sync_stage_members m
                                  where m.run_id = $1 and m.group_external_id = same.external_id
                                    and m.kind = 'user' and m.member_external_id = u.external_id)
            ),
            doubtful as (
                -- Counted among the compared ones and staged: such a group is staged as a whole next time.
                update authz.sync_stage_groups s set members_digest = null
                where s.run_id = $1 and s.members_basis is not null
                  and s.external_id in (select group_external_id from left_behind)
            )
            insert into authz.sync_stage_members (run_id, group_external_id, kind, member_external_id, member_name, role)
            select distinct on (group_external_id, kind, external_id)
                   $1::bigint, group_external_id, kind, external_id, member_name, role
            from (select 1 as turn, * from outsider union all select 2, * from left_behind) m
            order by group_external_id, kind, external_id, turn
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok(done.rows_affected())
    }
}

/// Writes down the digests of the groups that were staged or held (of those `members_same` says how many members they have), now that the mirror has what was listed. Comes after the last
/// change of a membership, since each takes the digest of its group away.
///
/// A group that has not become what was listed, for whatever reason, gets no digest: the next run stages it again.
// INVARIANT: a group has become what was listed if all of its plan was carried out, since its plan is the difference (held
// by the tests `group_that_does_not_become_what_was_listed_is_not_remembered` and
// `guest_whose_removal_was_withheld_goes_with_the_next_run_that_removes`).
// INVARIANT: the number of members is what the mirror has, and who is listed besides is an outsider, also where neither is
// looked up (held by `any_sequence_of_small_changes_is_mirrored`).
pub(super) async fn remember(
    tx: &mut PgConnection,
    run_id: i64,
    directory_id: i32,
    found: Found,
) -> Result<(), Error> {
    let Found { as_planned, include_external, names_few_users, .. } = found;
    sqlx::query!(
        r#"
        with person as materialized (
            -- All users, or each one looked up where few are named.
            select u.user_id, u.external_id, u.directory_id, u.status
            from authz.users u
            where not $5
            union all
            select u.user_id, u.external_id, u.directory_id, u.status
            from (select distinct m.member_external_id
                  from authz.sync_stage_members m
                  where m.run_id = $1 and m.kind = 'user') m
            cross join lateral (select x.user_id, x.external_id, x.directory_id, x.status from authz.users x
                                where x.external_id = m.member_external_id offset 0) u
            where $5
        ),
        listed as (
            -- What a fresh group gets, and what a compared one had and loses and gets, is known.
            select s.external_id, s.members_digest, s.members_same, g.group_id, s.members_staged + coalesce(p.more, 0) as members,
                   $3 and (s.members_fresh or s.members_basis is not null) as is_sure
            from authz.sync_stage_groups s
            left join (
                select p.group_external_id, count(*) filter (where p.op = 'add') - count(*) filter (where p.op = 'remove') as more
                from authz.sync_plan_members p
                where $3 and p.run_id = $1
                group by p.group_external_id
            ) p on p.group_external_id = s.external_id
            join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id and g.status = 'active'
            where s.run_id = $1 and s.members_complete and s.members_listed and s.members_digest is not null
        ),
        staged as (
            -- How many of the listed members the mirror should have. One of the directory's own users it has for sure; of
            -- the others it is looked up, and users among them should be there only if they are let in: one whose removal was
            -- withheld is there too.
            select l.group_id,
                   count(*) filter (where case
                       when m.kind = 'user' and u.directory_id = $2 then true
                       when m.kind = 'user' then $4 and exists (select from authz.group_users gu
                                                                where gu.group_id = l.group_id and gu.user_id = u.user_id)
                       else exists (select from authz.group_groups gg
                                    where gg.parent_group_id = l.group_id and gg.child_group_id = c.group_id)
                   end) as members
            from listed l
            join authz.sync_stage_members m on m.run_id = $1 and m.group_external_id = l.external_id
            left join person u on m.kind = 'user' and u.external_id = m.member_external_id and u.status <> 'deleted'
            left join authz.groups c on m.kind = 'group' and c.directory_id = $2 and c.external_id = m.member_external_id
                and c.status = 'active'
            where not l.is_sure
            group by l.group_id
        ),
        expected as (
            select l.group_id, l.members_digest,
                   case when l.is_sure then l.members else l.members_same + coalesce(s.members, 0) end as members
            from listed l
            left join staged s on s.group_id = l.group_id
        )
        insert into authz.group_digests (group_id, digest, members)
        select e.group_id, e.members_digest, e.members
        from expected e
        where case when $3 then true
              else e.members = (select count(*) from authz.group_users m where m.group_id = e.group_id)
                               + (select count(*) from authz.group_groups m where m.parent_group_id = e.group_id)
                               + (select count(*) from authz.group_directories m where m.group_id = e.group_id)
              end
        on conflict (group_id) do update set digest = excluded.digest, members = excluded.members
        "#,
        run_id,
        directory_id,
        as_planned,
        include_external,
        names_few_users,
    )
    .execute(&mut *tx)
    .await?;
    remember_outsiders(tx, run_id, directory_id, found).await
}

/// Writes down the listed members of these groups whom the mirror does not have in them.
// INVARIANT: outsiders are those of the listing whose digest is remembered: where it is still that of an earlier one, theirs stay
// (held by `outsiders_of_a_listing_that_missed_somebody_are_not_remembered`).
async fn remember_outsiders(
    tx: &mut PgConnection,
    run_id: i64,
    directory_id: i32,
    Found { users_are_own, names_few_users, .. }: Found,
) -> Result<(), Error> {
    sqlx::query!(
        r#"
        delete from authz.group_outsiders o
        using authz.sync_stage_groups s, authz.groups g, authz.group_digests d
        where s.run_id = $1 and s.members_listed and g.directory_id = $2 and g.external_id = s.external_id
          and d.group_id = g.group_id and d.digest = s.members_digest
          and o.group_id = g.group_id
        "#,
        run_id,
        directory_id,
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        r#"
        with own as materialized (
            -- As above.
            select u.user_id, u.external_id
            from authz.users u
            where not $3 and not $4 and u.directory_id = $2 and u.status <> 'deleted'
            union all
            select u.user_id, u.external_id
            from (select distinct m.member_external_id
                  from authz.sync_stage_members m
                  where m.run_id = $1 and m.kind = 'user') m
            cross join lateral (select x.user_id, x.external_id from authz.users x
                                where x.external_id = m.member_external_id and x.directory_id = $2 and x.status <> 'deleted'
                                offset 0) u
            where $3 and not $4
        )
        insert into authz.group_outsiders (group_id, kind, external_id, member_name, role)
        select d.group_id, m.kind, m.member_external_id, m.member_name, m.role
        from authz.sync_stage_members m
        join authz.sync_stage_groups s on s.run_id = $1 and s.external_id = m.group_external_id and not s.members_fresh
        join authz.groups g on g.directory_id = $2 and g.external_id = m.group_external_id
        join authz.group_digests d on d.group_id = g.group_id and (d.digest = s.members_digest or not s.members_listed)
        left join own u on m.kind = 'user' and u.external_id = m.member_external_id
        where m.run_id = $1 and (m.kind <> 'user' or not $4)
          and case m.kind
              when 'user' then u.user_id is null
              else not exists (select from authz.group_groups gg
                               join authz.groups c on c.group_id = gg.child_group_id
                               where gg.parent_group_id = g.group_id
                                 and c.directory_id = $2 and c.external_id = m.member_external_id)
          end
        on conflict do nothing
        "#,
        run_id,
        directory_id,
        names_few_users,
        users_are_own,
    )
    .execute(tx)
    .await?;
    Ok(())
}
