//! Groups that the mirror has no members of: which they are, and how they get all that are listed, without a plan of each
//! membership.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use futures_util::TryStreamExt;
use hashbrown::HashTable;
use sqlx::PgConnection;

use super::Run;
use super::copy_in::{CopyRows, copy_in};
use super::held::Held;
use super::known::{Hasher, place};
use super::members::StagedMembers;
use super::stage_members::{AT_ONCE, COPY, copied};
use crate::error::Error;
use crate::snapshot::copy::{Field, Rows};

/// So many bytes go to the database at once.
const PIECE: usize = 1 << 20;

impl Run {
    /// Marks the groups whose plan is their listing: the mirror has no members of them, and will have all that are listed,
    /// who are users and groups of its own. What is held of others is staged.
    // INVARIANT: a fresh group's staged or held members are what would be planned for it (held by the tests in
    // `crates/dir-sync/tests/fresh.rs`).
    pub(super) async fn mark_fresh_groups(
        &self,
        tx: &mut PgConnection,
        has_grants: bool,
    ) -> Result<(), Error> {
        let candidates = self.candidates(tx).await?;
        let held = self.settle_held(tx, &candidates, has_grants).await?;
        let staged: Vec<_> = candidates.into_iter().filter(|group| !held.contains(group)).collect();
        let held: Vec<_> = held.into_iter().collect();
        if !held.is_empty() {
            sqlx::query!(
                r#"
                update authz.sync_stage_groups s
                set members_fresh = true, members_same = members_staged -- none of them is in the staging table
                where s.run_id = $1 and s.external_id = any ($2)
                "#,
                self.run_id,
                &held,
            )
            .execute(&mut *tx)
            .await?;
        }
        if !staged.is_empty() {
            self.mark_staged(tx, &staged).await?;
        }
        Ok(())
    }

    /// Groups that are listed as a whole and that the mirror has no members of.
    async fn candidates(&self, tx: &mut PgConnection) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar!(
            r#"
            with staged as (
                select s.external_id, coalesce(p.group_id, g.group_id) as group_id
                from authz.sync_stage_groups s
                left join authz.sync_plan_groups p on p.run_id = $1 and p.external_id = s.external_id
                left join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id and g.status = 'active'
                where s.run_id = $1 and s.members_complete and s.members_listed and s.members_basis is null
                  and s.members_digest is not null
                  and (p.external_id is not null or g.group_id is not null)
            )
            select external_id as "external_id!" from staged
            -- Looked up for each: to join all memberships takes longer the more there are.
            where not (select exists (select from authz.group_users m where m.group_id = staged.group_id))
              and not (select exists (select from authz.group_groups m where m.parent_group_id = staged.group_id))
              and not (select exists (select from authz.group_directories m where m.group_id = staged.group_id))
            "#,
            self.run_id,
            self.directory_id,
        )
        .fetch_all(tx)
        .await?)
    }

    /// Marks those of the candidates whose staged members are all users and groups of the directory.
    async fn mark_staged(&self, tx: &mut PgConnection, candidates: &[String]) -> Result<(), Error> {
        sqlx::query!(
            r#"
            with candidate as materialized (
                select c.external_id from unnest($3::text[]) as c (external_id)
            ),
            own_user as (
                select p.external_id from authz.sync_plan_users p
                where p.run_id = $1 and p.op in ('add', 'change') and p.new_directory_id = $2
                union all
                select u.external_id from authz.users u
                where u.directory_id = $2 and u.status <> 'deleted'
                  and not exists (select from authz.sync_plan_users p where p.run_id = $1 and p.external_id = u.external_id)
            ),
            own_group as (
                select s.external_id from authz.sync_stage_groups s
                where s.run_id = $1
                  and (exists (select from authz.sync_plan_groups p where p.run_id = $1 and p.external_id = s.external_id)
                       or exists (select from authz.groups g
                                  where g.directory_id = $2 and g.external_id = s.external_id and g.status = 'active'))
            ),
            odd as (
                select m.group_external_id
                from authz.sync_stage_members m
                join candidate c on c.external_id = m.group_external_id
                left join own_user u on m.kind = 'user' and u.external_id = m.member_external_id
                left join own_group g on m.kind = 'group' and g.external_id = m.member_external_id
                    and g.external_id <> m.group_external_id
                where m.run_id = $1 and u.external_id is null and g.external_id is null
            )
            update authz.sync_stage_groups s set members_fresh = true
            from candidate c
            where s.run_id = $1 and s.external_id = c.external_id
              and not exists (select from odd where odd.group_external_id = s.external_id)
            "#,
            self.run_id,
            self.directory_id,
            candidates,
        )
        .execute(tx)
        .await?;
        Ok(())
    }

    /// Stages what is held and has to be looked at: the groups that are no candidates, that have a member who will not be the
    /// directory's own, or that rights come through, so that the plan can say who gains them. Gives the others.
    ///
    /// Most of those were staged before the plan began; these are what has become so meanwhile, and what only the plan tells.
    async fn settle_held(
        &self,
        tx: &mut PgConnection,
        candidates: &[String],
        has_grants: bool,
    ) -> Result<HashSet<String>, Error> {
        let mut staging = self.staging.lock().await;
        let held = &mut staging.held;
        if held.is_empty() {
            return Ok(HashSet::new());
        }
        let mut kept: HashSet<&str> = candidates.iter().map(String::as_str).collect();
        if has_grants {
            for group in self.reached_groups(tx).await? {
                kept.remove(group.as_str());
            }
        }
        let own = self.own_users(tx, held.hasher()).await?;
        let is_own = |print| own.find(place(print), |known| *known == print).is_some();
        let out = held.unfit(|group| kept.contains(group), is_own);
        drop((kept, own));
        let (mut ready, mut members) = (Vec::new(), 0);
        for group in &out {
            let Some(taken) = held.take_out(group) else { continue };
            members += taken.len();
            ready.push((group.clone(), taken));
            if members >= AT_ONCE {
                self.stage_here(tx, &std::mem::take(&mut ready)).await?;
                members = 0;
            }
        }
        if !ready.is_empty() {
            self.stage_here(tx, &ready).await?;
        }
        if !out.is_empty() {
            sqlx::query!("select authz.analyze_staging()").fetch_one(&mut *tx).await?;
        }
        Ok(held.groups().map(ToOwned::to_owned).collect())
    }

    /// The groups of the directory that a grant reaches, or would with all staged edges and before any is taken away. As long as
    /// nothing is planned: by the names that the mirror has now.
    pub(super) async fn reached_groups(&self, connection: &mut PgConnection) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar!(
            r#"
            with recursive
            node as materialized (
                -- Under the id by which the plan names it, or one that no directory gives.
                select g.group_id,
                       coalesce(p.external_id, case when g.directory_id = $2 then g.external_id end, E'\x01' || g.group_id) as name
                from authz.groups g
                left join authz.sync_plan_groups p on p.run_id = $1 and p.group_id = g.group_id
            ),
            edge as materialized (
                select a.name as parent, c.name as child
                from authz.group_groups e
                join node a on a.group_id = e.parent_group_id
                join node c on c.group_id = e.child_group_id
                union
                select m.group_external_id, m.member_external_id
                from authz.sync_stage_members m
                where m.run_id = $1 and m.kind = 'group'
            ),
            reached as (
                select n.name from node n where n.group_id in (select ga.group_id from authz.group_actions ga)
                union
                select e.child from reached r join edge e on e.parent = r.name
            )
            select name as "name!" from reached
            "#,
            self.run_id,
            self.directory_id,
        )
        .fetch_all(connection)
        .await?)
    }

    /// Stages members inside the transaction of the plan.
    async fn stage_here(
        &self,
        tx: &mut PgConnection,
        groups: &[(String, StagedMembers)],
    ) -> Result<(), Error> {
        let rows = copy_in(tx, COPY, copied(self.run_id, groups)).await?;
        self.staged.members.fetch_add(rows, Ordering::Relaxed);
        Ok(())
    }

    /// The prints of those whom the directory will have when the plan is applied.
    async fn own_users(&self, tx: &mut PgConnection, hasher: &Hasher) -> Result<HashTable<u128>, Error> {
        let mut own = HashTable::new();
        self.copy_out(
            tx,
            "copy (
                select p.external_id
                from authz.sync_plan_users p
                where p.run_id = current_setting('authz.sync_copied_run')::bigint and p.op in ('add', 'change')
                  and p.new_directory_id = current_setting('authz.sync_directory')::integer
                union all
                select u.external_id
                from authz.users u
                where u.directory_id = current_setting('authz.sync_directory')::integer and u.status <> 'deleted'
                  and u.external_id is not null
                  and not exists (select from authz.sync_plan_users p
                                  where p.run_id = current_setting('authz.sync_copied_run')::bigint
                                    and p.external_id = u.external_id)
             ) to stdout (format binary)",
            |[id]| {
                let print = hasher.of_id(id.text()?);
                own.insert_unique(place(print), print, |known| place(*known));
                Ok(())
            },
        )
        .await?;
        Ok(own)
    }

    /// Reads rows of this run and directory on a connection that goes back to no pool if this does not come to its end.
    async fn copy_out<const N: usize>(
        &self,
        tx: &mut PgConnection,
        statement: &'static str,
        mut each: impl FnMut([Field<'_>; N]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        // `copy` takes no parameters.
        sqlx::query!(
            r#"
            select set_config('authz.sync_directory', $1, true) as "directory!",
                   set_config('authz.sync_copied_run', $2, true) as "run!"
            "#,
            self.directory_id.to_string(),
            self.run_id.to_string(),
        )
        .fetch_one(&mut *tx)
        .await?;
        let mut rows = Rows::default();
        let mut pieces = tx.copy_out_raw(statement).await?;
        while let Some(piece) = pieces.try_next().await? {
            rows.feed(&piece, &mut each)?;
        }
        rows.end()
    }

    /// Puts what is held into the groups, now that they and their members have their numbers. Says how many memberships.
    pub(super) async fn fill_held(&self, tx: &mut PgConnection, held: Held) -> Result<u64, Error> {
        if held.is_empty() {
            return Ok(0);
        }
        let hasher = held.hasher().clone();
        let mut users: HashTable<(u128, i64)> = HashTable::new();
        self.copy_out(
            tx,
            "copy (
                select u.external_id, u.user_id
                from authz.users u
                where u.directory_id = current_setting('authz.sync_directory')::integer and u.status <> 'deleted'
                  and u.external_id is not null
             ) to stdout (format binary)",
            |[id, user_id]| {
                let user = (hasher.of_id(id.text()?), user_id.int8()?);
                users.insert_unique(place(user.0), user, |(print, _)| place(*print));
                Ok(())
            },
        )
        .await?;
        let groups = sqlx::query!(
            r#"
            select g.external_id as "external_id!", g.group_id
            from authz.groups g
            where g.directory_id = $1 and g.status = 'active' and g.external_id is not null
            "#,
            self.directory_id,
        )
        .fetch_all(&mut *tx)
        .await?;
        let groups: HashMap<String, i64> =
            groups.into_iter().map(|row| (row.external_id, row.group_id)).collect();
        let user_of = |print| users.find(place(print), |user| user.0 == print).map(|user| user.1);
        let numbered = held.numbered(user_of, |group| groups.get(group).copied());
        drop((users, groups));

        let mut copy = tx
            .copy_in_raw("copy authz.group_users (group_id, user_id, role) from stdin (format binary)")
            .await?;
        let mut rows = CopyRows::new();
        for (group_id, user_id, role) in numbered.iter() {
            rows.begin(3);
            rows.value(&group_id.to_be_bytes());
            rows.value(&user_id.to_be_bytes());
            rows.value(role.as_str().as_bytes());
            if rows.len() >= PIECE {
                copy.send(rows.take()).await?;
            }
        }
        copy.send(rows.end()).await?;
        Ok(copy.finish().await?)
    }
}

/// Puts the staged members into the groups that have none. Says how many.
///
/// Nothing is in the way of any of them, so none is looked for: `on conflict` takes longer than all the rest. In the
/// order of the primary key they take half the time that they take as they are staged, sorting included.
pub(super) async fn fill_fresh_groups(
    tx: &mut PgConnection,
    run_id: i64,
    directory_id: i32,
) -> Result<u64, Error> {
    let users = sqlx::query!(
        r#"
        insert into authz.group_users (group_id, user_id, role)
        select g.group_id, u.user_id, m.role
        -- Outer joins, so that the planner expects as many rows as there are members.
        from authz.sync_stage_members m
        left join (select s.external_id, g.group_id, s.members_fresh
                   from authz.sync_stage_groups s
                   join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id
                   where s.run_id = $1) g on g.external_id = m.group_external_id
        left join authz.users u on u.external_id = m.member_external_id
        where m.run_id = $1 and m.kind = 'user' and coalesce(g.members_fresh, false)
        order by g.group_id, u.user_id
        "#,
        run_id,
        directory_id,
    )
    .execute(&mut *tx)
    .await?;
    let groups = sqlx::query!(
        r#"
        insert into authz.group_groups (parent_group_id, child_group_id)
        select g.group_id, c.group_id
        from authz.sync_stage_groups s
        join authz.groups g on g.directory_id = $2 and g.external_id = s.external_id
        join authz.sync_stage_members m on m.run_id = $1 and m.group_external_id = s.external_id
        join authz.groups c on c.directory_id = $2 and c.external_id = m.member_external_id
        where s.run_id = $1 and s.members_fresh and m.kind = 'group'
        "#,
        run_id,
        directory_id,
    )
    .execute(tx)
    .await?;
    Ok(users.rows_affected() + groups.rows_affected())
}
