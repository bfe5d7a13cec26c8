//! The plan read back: counts, hash, and the rows that people are shown.

use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use super::Run;
use super::report::{
    ActionChanges, Change, Conflict, Counts, GroupChange, Kinds, MembershipChange, Plan, SHOWN, Shrinking,
    Tally, Totals, UserChange,
};
use crate::audit::canonical::to_hex;
use crate::error::Error;

impl Run {
    /// `known_users` are the users that the mirror has, if that is known. With `joining_are_listed` whoever is planned to join a
    /// group is a user whom the directory lists.
    #[expect(clippy::too_many_lines, reason = "mostly one statement")]
    pub(super) async fn read_plan(
        &self,
        tx: &mut PgConnection,
        listed: Totals,
        known_users: Option<u64>,
        joining_are_listed: bool,
    ) -> Result<Plan, Error> {
        let totals = sqlx::query!(
            r#"
            with joining as (
                select distinct p.member_external_id
                from authz.sync_plan_members p
                where $5 and p.run_id = $1 and p.op = 'add' and p.kind = 'user'
            ),
            odd as materialized (
                -- Fresh groups have only members of the directory's own.
                select m.kind, m.member_external_id
                from authz.sync_stage_groups s
                join authz.sync_stage_members m on m.run_id = $1 and m.group_external_id = s.external_id
                left join joining j on m.kind = 'user' and j.member_external_id = m.member_external_id
                where s.run_id = $1 and not s.members_fresh and j.member_external_id is null
            ),
            own as materialized (
                -- Those of the directory's users whom such a row may name: all, or each one looked up where few are named.
                select u.user_id, u.external_id
                from authz.users u
                where not $3 and u.directory_id = $2 and u.status <> 'deleted'
                union all
                select u.user_id, u.external_id
                from (select distinct m.member_external_id from odd m where m.kind = 'user') m
                cross join lateral (select x.user_id, x.external_id from authz.users x
                                    where x.external_id = m.member_external_id and x.directory_id = $2 and x.status <> 'deleted'
                                    offset 0) u
                where $3
            )
            select
                (select count(*) filter (where op = 'add') from authz.sync_plan_users where run_id = $1) as "users_added!",
                (select count(*) filter (where op = 'remove') from authz.sync_plan_users where run_id = $1) as "users_removed!",
                (select count(*) filter (where op = 'change') from authz.sync_plan_users where run_id = $1) as "users_changed!",
                (select count(*) filter (where op = 'change' and old_status <> 'suspended' and new_status = 'suspended')
                 from authz.sync_plan_users where run_id = $1) as "newly_suspended!",
                (select count(*) filter (where op = 'change' and old_directory_id = $2 and new_directory_id is null)
                 from authz.sync_plan_users where run_id = $1) as "newly_external!",
                (select count(*) filter (where op = 'remove' and old_directory_id is distinct from $2)
                 from authz.sync_plan_users where run_id = $1) as "guests_removed!",
                (select count(*) filter (where op = 'add') from authz.sync_plan_groups where run_id = $1) as "groups_added!",
                (select count(*) filter (where op = 'remove') from authz.sync_plan_groups where run_id = $1) as "groups_removed!",
                (select count(*) filter (where op = 'change') from authz.sync_plan_groups where run_id = $1) as "groups_changed!",
                m.of_groups as "of_groups!", m.of_everyone as "of_everyone!",
                m.added + f.added as "memberships_added!", f.added as "memberships_fresh!", m.removed as "memberships_removed!", m.changed as "memberships_changed!",
                coalesce($4, (select count(*) from authz.users where directory_id = $2 and status <> 'deleted')) as "users!",
                (select count(*) from authz.groups where directory_id = $2 and status <> 'deleted') as "groups!",
                (select coalesce(sum(coalesce(d.members, (select count(*) from authz.group_users m where m.group_id = g.group_id)
                                                       + (select count(*) from authz.group_groups m where m.parent_group_id = g.group_id)
                                                       + (select count(*) from authz.group_directories m where m.group_id = g.group_id))), 0)
                 from authz.groups g
                 left join authz.group_digests d on d.group_id = g.group_id
                 where g.directory_id = $2)::bigint as "memberships!",
                (select count(distinct m.member_external_id) from odd m
                 where m.kind = 'user'
                   and not exists (select from authz.sync_stage_users s where s.run_id = $1 and s.external_id = m.member_external_id)
                   and not exists (select from own u
                                   where u.external_id = m.member_external_id
                                     and not exists (select from authz.sync_stage_unseen_users x
                                                     where x.run_id = $1 and x.user_id = u.user_id)))
                    as "external_users!",
                (select count(distinct m.member_external_id) from odd m
                 where m.kind = 'group'
                   and not exists (select from authz.sync_stage_groups s where s.run_id = $1 and s.external_id = m.member_external_id))
                    as "external_groups!"
            from (select count(*) filter (where op = 'add') as added, count(*) filter (where op = 'remove') as removed,
                         count(*) filter (where op = 'change') as changed,
                         count(*) filter (where kind = 'group') > 0 as of_groups,
                         count(*) filter (where kind = 'everyone') > 0 as of_everyone
                  from authz.sync_plan_members where run_id = $1) m,
                 (select coalesce(sum(members_staged), 0)::bigint as added
                  from authz.sync_stage_groups where run_id = $1 and members_fresh) f
            "#,
            self.run_id,
            self.directory_id,
            self.staged.names_few_users(),
            known_users.and_then(|users| i64::try_from(users).ok()),
            joining_are_listed,
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
                memberships: tally(
                    totals.memberships_added,
                    totals.memberships_removed,
                    totals.memberships_changed,
                ),
            },
            before: Totals {
                users: count(totals.users),
                groups: count(totals.groups),
                memberships: count(totals.memberships),
            },
            listed,
            fresh_memberships: count(totals.memberships_fresh),
            kinds: Kinds { groups: totals.of_groups, everyone: totals.of_everyone },
            newly_suspended: count(totals.newly_suspended),
            newly_external: count(totals.newly_external),
            external_users: count(totals.external_users),
            external_groups: count(totals.external_groups),
            incomplete_groups: self.incomplete_groups(&mut *tx).await?,
            users: self.user_changes(&mut *tx).await?,
            groups: self.group_changes(&mut *tx).await?,
            memberships: self.membership_changes(&mut *tx).await?,
            conflicts: self.conflicts(&mut *tx).await?,
            shrinking: self.shrinking(&mut *tx).await?,
            people: count(totals.users),
            guests_removed: count(totals.guests_removed),
            actions: ActionChanges::default(),
            withheld: Totals::default(),
            disturbed_groups: Vec::new(),
        })
    }

    /// Over every planned row, by the directory's ids: the same mirror and the same listing give the same hash.
    pub(super) async fn hash(&self, tx: &mut PgConnection) -> Result<String, Error> {
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
                -- A group's members by one hash of their own: a text of all of them would have no room in a large plan. The
                -- length says where an id ends, whatever is in it.
                select jsonb_build_array('members', group_external_id,
                                         encode(sha256(convert_to(string_agg(line, E'\n' order by line), 'UTF8')), 'hex'))::text
                from (
                    select group_external_id,
                           concat_ws(' ', kind, op, role, octet_length(member_external_id), member_external_id) collate "C" as line
                    from authz.sync_plan_members where run_id = $1
                ) m
                group by group_external_id
                union all
                -- A fresh group has all its listing has, and of that there is a digest already.
                select jsonb_build_array('fresh', external_id, encode(members_digest, 'hex'))::text
                from authz.sync_stage_groups where run_id = $1 and members_fresh and members_staged > 0
            ) changes
            "#,
            self.run_id,
            self.directory.as_str(),
        )
        .fetch_one(tx)
        .await?;
        Ok(hash)
    }

    /// [`Self::hash`] where no row is planned.
    pub(super) fn hash_of_nothing(&self) -> String {
        let mut hash = to_hex(&Sha256::digest(self.directory.as_str()));
        hash.truncate(16);
        hash
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
            select name as "group!", added as "added!", removed as "removed!", changed as "changed!", before as "before!"
            from (
                select coalesce(max(g.group_name), max(s.group_name), p.group_external_id) as name,
                       count(*) filter (where p.op = 'add') as added,
                       count(*) filter (where p.op = 'remove') as removed,
                       count(*) filter (where p.op = 'change') as changed,
                       coalesce((select d.members from authz.group_digests d where d.group_id = max(g.group_id)),
                                (select count(*) from authz.group_users m where m.group_id = max(g.group_id))
                                + (select count(*) from authz.group_groups m where m.parent_group_id = max(g.group_id))
                                + (select count(*) from authz.group_directories m where m.group_id = max(g.group_id))) as before
                from authz.sync_plan_members p
                left join authz.groups g on g.group_id = p.group_id
                left join authz.sync_stage_groups s on s.run_id = $1 and s.external_id = p.group_external_id
                where p.run_id = $1
                group by p.group_external_id
                union all
                select coalesce(s.group_name, s.external_id), s.members_staged, 0, 0, 0
                from authz.sync_stage_groups s
                where s.run_id = $1 and s.members_fresh and s.members_staged > 0
            ) changes
            order by removed desc, added + removed + changed desc, 1
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
                tally: Tally {
                    added: count(row.added),
                    removed: count(row.removed),
                    changed: count(row.changed),
                },
            })
            .collect())
    }

    /// All groups that stay and lose members; the listing above is cut, the guard's must not be.
    async fn shrinking(&self, tx: &mut PgConnection) -> Result<Vec<Shrinking>, Error> {
        let rows = sqlx::query!(
            r#"
            select g.group_name, s.going as "going!", s.coming as "coming!",
                   coalesce((select d.members from authz.group_digests d where d.group_id = g.group_id),
                            (select count(*) from authz.group_users m where m.group_id = g.group_id)
                            + (select count(*) from authz.group_groups m where m.parent_group_id = g.group_id)
                            + (select count(*) from authz.group_directories m where m.group_id = g.group_id)) as "before!"
            from (
                select max(p.group_id) as group_id, count(*) filter (where p.op = 'remove') as going,
                       count(*) filter (where p.op = 'add') as coming
                from authz.sync_plan_members p
                where p.run_id = $1
                group by p.group_external_id
                having count(*) filter (where p.op = 'remove') > 0
            ) s
            join authz.groups g on g.group_id = s.group_id
            where not exists (select from authz.sync_plan_groups p
                              where p.run_id = $1 and p.group_id = s.group_id and p.op = 'remove')
            order by s.going desc, g.group_name
            "#,
            self.run_id,
        )
        .fetch_all(tx)
        .await?;
        Ok(rows
            .into_iter()
            .map(|row| Shrinking {
                group: row.group_name,
                before: count(row.before),
                going: count(row.going),
                coming: count(row.coming),
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

pub(super) fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
