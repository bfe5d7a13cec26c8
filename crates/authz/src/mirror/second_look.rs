//! Members whom a listing of several pages has missed, because its pages are of different moments.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use futures_util::TryStreamExt;

use super::Run;
use super::known::{Hasher, place};
use super::members::{Staged, StagedMembers};
use super::stage_members::{Finished, Staging};
use crate::error::Error;

/// Who is missing in a group: what to ask the directory before an absence is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissingMembers {
    /// These users and groups of the directory, by their ids: ask for each whether it is a member.
    Each(Vec<String>),
    /// So many, or one whom it may not be possible to ask for: list the members once more.
    Many,
}

impl MissingMembers {
    /// One more is missing; at most `most` are worth a question each.
    fn add(&mut self, external_id: String, can_be_asked_for: bool, most: usize) {
        match self {
            Self::Each(ids) if can_be_asked_for && ids.len() < most => ids.push(external_id),
            Self::Each(_) | Self::Many => *self = Self::Many,
        }
    }
}

/// Who is missing in which group: prints of the ids, ascending. Many may be.
#[derive(Default)]
pub(super) struct Missed(HashMap<String, Vec<u128>>);

impl Missed {
    fn note(&mut self, group: String, kind: &str, id: u128) {
        self.0.entry(group).or_default().push(print_of(kind, id));
    }

    fn sort(&mut self) {
        for prints in self.0.values_mut() {
            prints.sort_unstable();
        }
    }

    /// Those of the members who are missing in the group.
    fn found(&self, group: &str, members: &StagedMembers, hasher: &Hasher) -> StagedMembers {
        let mut found = StagedMembers::default();
        if let Some(missing) = self.0.get(group) {
            let is_missing = |member: &Staged<'_>| {
                missing.binary_search(&print_of(member.kind(), hasher.of_id(member.id))).is_ok()
            };
            members.iter().filter(is_missing).for_each(|member| found.push_staged(&member));
        }
        found
    }
}

/// Of a member, by the print of the id: a user and a group may have the same.
fn print_of(kind: &str, id: u128) -> u128 {
    id ^ match kind {
        "user" => 0,
        "group" => 1,
        _ => 2,
    }
}

/// What came of a second look at some members.
struct Kept {
    /// Who will not go, and whether the user is the directory's own.
    not_gone: Vec<bool>,
    /// Rows that were staged.
    staged: u64,
}

impl Run {
    /// Those of these groups that would lose a member whom the directory still lists among its users or groups, or who can be a
    /// guest if those are let in. To be called when the listings are done, those included that [`Run::missing`] asks for.
    ///
    /// As with users and groups, a listing of several pages can miss whoever moves from one page to another: ask for those
    /// members or list the groups' members again, and let [`Run::keep_members`] know, before an absence is believed.
    /// `groups` has the ids of the groups, each with the number of members up to which it is better to ask for each.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn missing_members(
        &self,
        groups: &HashMap<String, usize>,
        include_external: bool,
    ) -> Result<HashMap<String, MissingMembers>, Error> {
        let (mut missing, mut by_group) = (Missed::default(), HashMap::new());
        self.step(async {
            let mut staging = self.staging.lock().await;
            self.take_in_users(&mut staging).await?;
            self.settle_groups(&mut staging).await?;
            let (mut compared, mut whole) = (Vec::new(), Vec::new());
            for group in groups.keys() {
                match staging.finished.get(group) {
                    Some(Finished::Compared { .. }) => compared.push(group.clone()),
                    Some(Finished::Staged { .. }) => whole.push(group.clone()),
                    Some(Finished::Same(_)) | None => {}
                }
            }
            if !whole.is_empty() {
                whole = self.filled_groups(&whole).await?;
                self.release(&mut staging, whole.clone()).await?;
            }
            if compared.is_empty() && whole.is_empty() {
                return Ok(());
            }
            self.settle_members(&mut staging).await?;
            self.known_users(&mut staging).await?;
            let Staging { users: Some(users), seen_groups, hasher, .. } = &*staging else { return Ok(()) };
            let mut rows = sqlx::query!(
                r#"
                -- Not `not exists`: nothing is known of the staging tables yet, and each member would be looked for in all of them.
                with compared as materialized (select unnest($3::text[]) as external_id),
                whole as materialized (select unnest($4::text[]) as external_id),
                here as materialized (
                    select g.group_id, g.external_id, w.external_id is not null as is_whole
                    from (select external_id from compared union all select external_id from whole) looked_at
                    join authz.groups g on g.directory_id = $2 and g.external_id = looked_at.external_id and g.status = 'active'
                    left join whole w on w.external_id = g.external_id
                )
                select x.group_external_id as "group!", 'user' as "kind!", u.external_id as "member!"
                from authz.sync_stage_gone_members x
                join compared c on c.external_id = x.group_external_id
                join authz.users u on u.user_id = x.user_id and u.external_id is not null
                where x.run_id = $1
                union all
                select h.external_id, 'user', u.external_id
                from here h
                join authz.group_users m on m.group_id = h.group_id
                join authz.users u on u.user_id = m.user_id and u.external_id is not null
                where h.is_whole
                union all
                select h.external_id, 'group', c.external_id
                from here h
                join authz.group_groups m on m.parent_group_id = h.group_id
                join authz.groups c on c.group_id = m.child_group_id and c.directory_id = $2 and c.external_id is not null
                union all
                select h.external_id, 'everyone', 'everyone'
                from here h
                join authz.group_directories m on m.group_id = h.group_id and m.directory_id = $2
                except all
                -- Who is no user of the directory's mirror is staged beside what is gone.
                select m.group_external_id, m.kind, m.member_external_id
                from authz.sync_stage_members m
                join here h on h.external_id = m.group_external_id
                where m.run_id = $1
                "#,
                self.run_id,
                self.directory_id,
                &compared,
                &whole,
            )
            .fetch(&self.pool);
            while let Some(row) = rows.try_next().await? {
                let print = hasher.of_id(&row.member);
                let is_listed = match row.kind.as_str() {
                    "user" => users.has_seen(print),
                    "group" => seen_groups.find(place(print), |seen| *seen == print).is_some(),
                    _ => false,
                };
                // Whoever the directory does not list at all is in no group of it, but as a guest.
                let is_gone = match row.kind.as_str() {
                    "user" => !include_external && !is_listed,
                    "group" => !is_listed,
                    _ => false,
                };
                if !is_gone {
                    let most = groups.get(&row.group).copied().unwrap_or_default();
                    let in_group = by_group.entry(row.group.clone());
                    let in_group = in_group.or_insert_with(|| MissingMembers::Each(Vec::new()));
                    in_group.add(row.member, is_listed, most);
                    missing.note(row.group, &row.kind, print);
                }
            }
            drop(rows);
            missing.sort();
            staging.missed = missing;
            Ok(())
        })
        .await?;
        Ok(by_group)
    }

    /// Those of the groups that have members in the mirror.
    async fn filled_groups(&self, groups: &[String]) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar!(
            r#"
            select g.external_id as "external_id!"
            from authz.groups g
            where g.directory_id = $1 and g.external_id = any ($2) and g.status = 'active'
              and (exists (select from authz.group_users m where m.group_id = g.group_id)
                   or exists (select from authz.group_groups m where m.parent_group_id = g.group_id)
                   or exists (select from authz.group_directories m where m.group_id = g.group_id))
            "#,
            self.directory_id,
            groups,
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Takes members who a second look shows are in the group: whoever of them the mirror has, and the first listing has
    /// missed, stays. Whoever comes with the second one only is left to the next run.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn keep_members(&self, group_external_id: &str, members: StagedMembers) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            let found = staging.missed.found(group_external_id, &members, &staging.hasher);
            if found.len() == 0 {
                return Ok(());
            }
            let is_whole = match staging.finished.get(group_external_id) {
                Some(Finished::Compared { .. }) => false,
                Some(Finished::Staged { .. }) => true,
                Some(Finished::Same(_)) | None => return Ok(()),
            };
            let Kept { not_gone, staged } = self.keep(group_external_id, is_whole, &found).await?;
            self.staged.gone_members.fetch_sub(not_gone.len() as u64, Ordering::Relaxed);
            self.staged.members.fetch_add(staged, Ordering::Relaxed);
            if not_gone.is_empty() && staged == 0 {
                return Ok(());
            }
            // INVARIANT: the digest of a listing that missed somebody is not remembered: the mirror has other members (held by
            // `member_whom_a_listing_missed_goes_when_the_next_one_is_like_it`).
            match staging.finished.get_mut(group_external_id) {
                Some(Finished::Compared { digest, same, .. }) => {
                    *digest = None;
                    *same += not_gone.iter().filter(|is_own| **is_own).count() as u64;
                }
                Some(Finished::Staged { digest, members }) => {
                    *digest = None;
                    *members += staged;
                }
                Some(Finished::Same(_)) | None => {}
            }
            Ok(())
        })
        .await
    }

    /// Takes members out of those who would go, and stages the others that the mirror has; the directory's own users only where a
    /// listing is staged as a whole.
    async fn keep(
        &self,
        group_external_id: &str,
        is_whole: bool,
        members: &StagedMembers,
    ) -> Result<Kept, Error> {
        let [mut kinds, mut ids, mut roles] = [const { Vec::new() }; 3];
        let mut names = Vec::new();
        for member in members.iter() {
            kinds.push(member.kind().to_owned());
            ids.push(member.id.to_owned());
            names.push(member.name.map(ToOwned::to_owned));
            roles.push(member.role.as_str().to_owned());
        }
        let not_gone = sqlx::query_scalar!(
            r#"
            with listed as materialized (
                select u.user_id, u.directory_id is not distinct from $5 as is_own
                from unnest($3::text[], $4::text[]) as l (kind, external_id)
                join authz.users u on u.external_id = l.external_id
                where l.kind = 'user'
            )
            delete from authz.sync_stage_gone_members x using listed l
            where x.run_id = $1 and x.group_external_id = $2 and x.user_id = l.user_id
            returning l.is_own as "is_own!"
            "#,
            self.run_id,
            group_external_id,
            &kinds,
            &ids,
            self.directory_id,
        )
        .fetch_all(&self.pool)
        .await?;
        let staged = sqlx::query!(
            r#"
            with listed as materialized (
                select l.* from unnest($4::text[], $5::text[], $6::text[], $7::text[]) as l (kind, external_id, name, role)
            ),
            here as (
                select g.group_id from authz.groups g
                where g.directory_id = $3 and g.external_id = $2 and g.status = 'active'
            ),
            present as materialized (
                select l.*
                from listed l
                join authz.users u on u.external_id = l.external_id
                join authz.group_users m on m.user_id = u.user_id and m.group_id = (select group_id from here)
                -- Guests are staged always: the plan knows by that who still is one.
                where l.kind = 'user' and ($8 or u.directory_id is distinct from $3)
                union all
                select l.*
                from listed l
                join authz.groups c on c.directory_id = $3 and c.external_id = l.external_id
                join authz.group_groups m on m.child_group_id = c.group_id and m.parent_group_id = (select group_id from here)
                where l.kind = 'group'
                union all
                select l.*
                from listed l
                join authz.group_directories m on m.directory_id = $3 and m.group_id = (select group_id from here)
                where l.kind = 'everyone'
            )
            insert into authz.sync_stage_members (run_id, group_external_id, kind, member_external_id, member_name, role)
            select $1, $2, p.kind, p.external_id, p.name, p.role
            from present p
            left join authz.sync_stage_members s on s.run_id = $1 and s.group_external_id = $2
                and (s.kind, s.member_external_id) = (p.kind, p.external_id)
            where s.run_id is null
            "#,
            self.run_id,
            group_external_id,
            self.directory_id,
            &kinds,
            &ids,
            &names as &[Option<String>],
            &roles,
            is_whole,
        )
        .execute(&self.pool)
        .await?
        .rows_affected();
        Ok(Kept { not_gone, staged })
    }
}
