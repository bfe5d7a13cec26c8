//! Staging of members: a group whose listing has the digest of the last one is not staged at all, and of one that had
//! another digest only what differs from the mirror. One that had none is held in memory until it is known whether it has to
//! be.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use hashbrown::HashTable;
use sqlx::PgPool;

use super::Run;
use super::beside::Beside;
use super::compare_members::{Listing, Present, read_present};
use super::copy_in::{CopyRows, send};
use super::held::{Held, Taken};
use super::known::{Hasher, KnownDigest, KnownDigests, KnownUsers, load_digests, place};
use super::members::StagedMembers;
use super::plan::has_grants;
use super::second_look::Missed;
use super::stage::{StagedGroup, storable};
use super::users::StagedUsers;
use super::watch::Watcher;
use crate::error::Error;

/// So many members go to the database at once.
pub(super) const AT_ONCE: usize = 8192;
pub(super) const COPY: &str = "copy authz.sync_stage_members (run_id, group_external_id, kind, member_external_id, member_name, role) \
     from stdin (format binary)";
/// So many members are compared with the mirror at once.
const COMPARED_AT_ONCE: usize = 32_768;
/// Fewer memberships than this part of the mirror's users are not held: to copy them takes a reading of all users.
const FEWER: usize = 8;
/// Members of unfinished listings that are kept in memory; past it the longest one is staged as it comes.
const AT_MOST: usize = 200_000;

/// What of a run is in memory.
#[derive(Default)]
pub(super) struct Staging {
    reading_users: Option<Beside<KnownUsers>>,
    pub(super) users: Option<KnownUsers>,
    /// Users on their way to the staging table; gives the rows that came to be.
    pub(super) sending_users: Option<Beside<u64>>,
    /// Pages that came before the mirror's users were read.
    pub(super) waiting_users: Vec<StagedUsers>,
    /// Of the users and of the groups.
    pub(super) hasher: Hasher,
    /// Prints of the groups that were listed.
    pub(super) seen_groups: HashTable<u128>,
    /// Groups that go to the staging table next.
    pub(super) ready_groups: Vec<StagedGroup>,
    /// Groups on their way there; gives the rows that came to be.
    pub(super) sending_groups: Option<Beside<u64>>,
    digests: Option<KnownDigests>,
    open: HashMap<String, Open>,
    pub(super) finished: HashMap<String, Finished>,
    /// Groups that the mirror may have no members of, staged only if it turns out otherwise.
    pub(super) held: Held,
    ready: Vec<(String, StagedMembers)>,
    /// Members on their way to the staging table; gives the rows that came to be.
    sending: Option<Beside<u64>>,
    /// Listings that wait for a look at the mirror.
    to_compare: Vec<Listing>,
    /// Members whom a second look may find.
    pub(super) missed: Missed,
    /// Those for which it is being taken.
    looking: Option<(Vec<Listing>, Beside<Present>)>,
}

/// A listing under way.
#[derive(Default)]
struct Open {
    members: StagedMembers,
    /// Members that were too many to wait for the end.
    spilled: u64,
}

/// What a listing that ended means.
pub(super) enum Finished {
    /// The group has so many members, the same as last time.
    Same(u64),
    /// So many are staged or held, all of them, and have this digest.
    Staged { digest: Option<[u8; 32]>, members: u64 },
    /// What differs is staged, of the mirror as the listing of `basis` left it.
    Compared { digest: Option<[u8; 32]>, basis: KnownDigest, same: u64 },
}

impl Staging {
    /// The mirror's users are being read from now on.
    pub(super) fn reading(pool: &PgPool, directory_id: i32) -> Self {
        let (pool, hasher) = (pool.clone(), Hasher::default());
        let held = Held::new(hasher.clone());
        let prints = hasher.clone();
        let reading = Beside::begin(async move { KnownUsers::load(&pool, directory_id, prints).await });
        Self { reading_users: Some(reading), held, hasher, ..Self::default() }
    }

    /// Nobody will ask for what is under way any more.
    pub(super) fn stop(&mut self) {
        self.reading_users = None;
        self.sending_users = None;
        self.sending_groups = None;
        self.sending = None;
        self.looking = None;
    }

    /// Whether a look at the mirror's users would have to wait for them.
    pub(super) fn reads_users(&self) -> bool {
        self.reading_users.as_ref().is_some_and(|reading| !reading.is_finished())
    }
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Staging").field("finished", &self.finished.len()).finish_non_exhaustive()
    }
}

impl Run {
    /// Takes a page of a group's direct members. They count once the listing is finished.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn stage_members(&self, group_external_id: &str, members: StagedMembers) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            let open = &mut staging.open;
            if !open.contains_key(group_external_id) {
                open.insert(group_external_id.to_owned(), Open::default());
            }
            if let Some(listing) = open.get_mut(group_external_id) {
                listing.members.append(members);
            }
            if open.values().map(|listing| listing.members.len()).sum::<usize>() > AT_MOST
                && let Some((group, longest)) =
                    open.iter_mut().max_by_key(|(_, listing)| listing.members.len())
            {
                let members = std::mem::take(&mut longest.members);
                longest.spilled += members.len() as u64;
                let group = group.clone();
                staging.ready.push((group, members));
                self.flush(&mut staging).await?;
            }
            Ok(())
        })
        .await
    }

    /// The members of the group are listed, all of them: the group will have those and no others.
    ///
    /// If they are the ones of the last listing, and nothing else has changed them since, nothing is staged.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn finish_members(&self, group_external_id: &str, include_external: bool) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            if staging.digests.is_none() {
                staging.digests = Some(load_digests(&self.pool, self.directory_id).await?);
            }
            let Open { mut members, spilled } = staging.open.remove(group_external_id).unwrap_or_default();
            members.settle();
            let digest = if spilled == 0 { members.digest(include_external) } else { None };
            let known = staging.digests.as_ref().and_then(|digests| digests.get(group_external_id));
            let group = group_external_id.to_owned();
            let finished = match (digest, known.copied()) {
                (Some(digest), Some(known)) if digest == known.digest => Finished::Same(members.len() as u64),
                // INVARIANT: a group is compared only if it has a digest, and what came of it counts only if it has the same
                // one when the plan holds the revision: whatever changes its memberships, or who its members are, takes the
                // digest away (held by `group_that_somebody_changes_after_it_was_compared_keeps_what_it_has`).
                (Some(digest), Some(basis)) => {
                    staging.to_compare.push(Listing { group: group.clone(), members });
                    Finished::Compared { digest: Some(digest), basis, same: 0 }
                }
                (digest, known) => {
                    let count = spilled + members.len() as u64;
                    let is_new = digest.is_some() && known.is_none();
                    let taken = if is_new { staging.held.take(&group, &members) } else { Taken::No };
                    if taken != Taken::Yes {
                        staging.ready.push((group.clone(), members));
                    }
                    if taken == Taken::Full {
                        let all = staging.held.groups().map(ToOwned::to_owned).collect();
                        self.release(&mut staging, all).await?;
                        staging.held.forget_people();
                    }
                    Finished::Staged { digest, members: count }
                }
            };
            staging.finished.insert(group, finished);
            if staging.to_compare.iter().map(|listing| listing.members.len()).sum::<usize>()
                >= COMPARED_AT_ONCE
            {
                self.compare(&mut staging).await?;
            }
            self.flush_if_many(&mut staging).await
        })
        .await
    }

    /// Forgets the members of one group: their listing begins again.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn restart_members(&self, group_external_id: &str) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            let spilled = staging.open.remove(group_external_id).is_some_and(|listing| listing.spilled > 0);
            let finished = staging.finished.remove(group_external_id);
            if staging.held.remove(group_external_id) && !spilled {
                return Ok(());
            }
            if !spilled && !matches!(finished, Some(Finished::Staged { .. } | Finished::Compared { .. })) {
                return Ok(());
            }
            staging.to_compare.retain(|listing| listing.group != group_external_id);
            // Boxed, as it is seldom there.
            Box::pin(self.take_compared(&mut staging)).await?;
            staging.ready.retain(|(group, _)| group != group_external_id);
            self.take_sent(&mut staging).await?;
            let gone = sqlx::query!(
                "delete from authz.sync_stage_gone_members where run_id = $1 and group_external_id = $2",
                self.run_id,
                group_external_id,
            )
            .execute(&self.pool)
            .await?;
            self.staged.gone_members.fetch_sub(gone.rows_affected(), Ordering::Relaxed);
            let done = sqlx::query!(
                "delete from authz.sync_stage_members where run_id = $1 and group_external_id = $2",
                self.run_id,
                group_external_id,
            )
            .execute(&self.pool)
            .await?;
            self.staged.members.fetch_sub(done.rows_affected(), Ordering::Relaxed);
            Ok(())
        })
        .await
    }

    /// Takes groups back out: they vanished while the source was read.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn forget_groups(&self, external_ids: &[String]) -> Result<(), Error> {
        self.step(async {
            if external_ids.is_empty() {
                return Ok(());
            }
            for id in external_ids {
                self.restart_members(id).await?;
            }
            let mut staging = self.staging.lock().await;
            self.settle_groups(&mut staging).await?;
            for id in external_ids {
                let print = staging.hasher.of_id(id);
                if let Ok(seen) = staging.seen_groups.find_entry(place(print), |seen| *seen == print) {
                    seen.remove();
                }
            }
            let done = sqlx::query!(
                "delete from authz.sync_stage_groups where run_id = $1 and external_id = any ($2)",
                self.run_id,
                external_ids,
            )
            .execute(&self.pool)
            .await?;
            self.staged.groups.fetch_sub(done.rows_affected(), Ordering::Relaxed);
            Ok(())
        })
        .await
    }

    /// Marks groups whose members could not be listed: they keep the memberships that the mirror has.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn mark_incomplete(&self, external_ids: &[String]) -> Result<(), Error> {
        self.step(async {
            if external_ids.is_empty() {
                return Ok(());
            }
            for id in external_ids {
                self.restart_members(id).await?;
            }
            self.settle_groups(&mut *self.staging.lock().await).await?;
            sqlx::query!(
                "update authz.sync_stage_groups set members_complete = false where run_id = $1 and external_id = any ($2)",
                self.run_id,
                external_ids,
            )
            .execute(&self.pool)
            .await?;
            Ok(())
        })
        .await
    }

    /// The users of the mirror, once they are read.
    pub(super) async fn known_users<'a>(
        &self,
        staging: &'a mut Staging,
    ) -> Result<&'a mut KnownUsers, Error> {
        let users = match (staging.users.take(), staging.reading_users.take()) {
            (Some(users), _) => users,
            (None, Some(reading)) => reading.end().await?,
            // Held members are told by the prints of those that were read, so nobody else's will do.
            (None, None) => return Err(Error::StagingLost { run_id: self.run_id }),
        };
        Ok(staging.users.insert(users))
    }

    /// Writes what is still in memory and the plan needs. Listings that did not end count for nothing.
    ///
    /// # Errors
    /// [`Error::StagingLost`] if a step of the staging did not come to its end, or if this was begun before.
    pub(super) async fn finish_staging(&self) -> Result<(), Error> {
        if self.open_steps.fetch_add(1, Ordering::Relaxed) > 0 {
            return Err(Error::StagingLost { run_id: self.run_id });
        }
        let mut staging = self.staging.lock().await;
        let open: Vec<_> = staging.open.keys().cloned().collect();
        drop(staging);
        for group in open {
            self.restart_members(&group).await?;
        }
        staging = self.staging.lock().await;
        self.take_in_users(&mut staging).await?;
        self.take_sent_users(&mut staging).await?;
        self.settle_groups(&mut staging).await?;
        self.settle_members(&mut staging).await?;
        self.stage_strangers(&mut staging).await?;
        self.settle_members(&mut staging).await?;
        let known = self.known_users(&mut staging).await?;
        let unseen = known.unseen();
        self.staged.known_users.store(known.len() as u64, Ordering::Relaxed);
        self.staged.known_at.store(known.revision, Ordering::Relaxed);
        // Nobody looks at them any more.
        (staging.users, staging.missed) = (None, Missed::default());
        if !unseen.is_empty() {
            sqlx::query!(
                "insert into authz.sync_stage_unseen_users (run_id, user_id) select $1, unnest($2::bigint[])",
                self.run_id,
                &unseen,
            )
            .execute(&self.pool)
            .await?;
        }
        self.staged.unseen_users.store(unseen.len() as u64, Ordering::Relaxed);
        let (mut groups, mut digests, mut bases, mut same_here, mut members_here, mut same) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), 0);
        let number = |members: u64| i64::try_from(members).unwrap_or(i64::MAX);
        for (group, finished) in std::mem::take(&mut staging.finished) {
            let (digest, compared_as, same_of_group, members_of_group) = match finished {
                Finished::Same(members) => {
                    same += members;
                    continue;
                }
                Finished::Staged { digest, members } => (digest, None, 0, number(members)),
                Finished::Compared { digest, basis, same } => {
                    (digest, Some(basis.digest), same, basis.members)
                }
            };
            same += same_of_group;
            groups.push(storable(&group));
            digests.push(digest.map(|digest| digest.to_vec()));
            bases.push(compared_as.map(|digest| digest.to_vec()));
            same_here.push(number(same_of_group));
            // What a compared group had, of any other what it is to have.
            members_here.push(members_of_group);
        }
        self.staged.same_members.store(same, Ordering::Relaxed);
        self.staged.listed_groups.store(groups.len() as u64, Ordering::Relaxed);
        if groups.is_empty() {
            return Ok(());
        }
        sqlx::query!(
            r#"
            update authz.sync_stage_groups s
            set members_listed = true, members_digest = v.digest, members_basis = v.basis, members_same = v.same,
                members_staged = v.staged
            from unnest($2::text[], $3::bytea[], $4::bytea[], $5::bigint[], $6::bigint[])
                as v (external_id, digest, basis, same, staged)
            where s.run_id = $1 and s.external_id = v.external_id
            "#,
            self.run_id,
            &groups,
            &digests as &[Option<Vec<u8>>],
            &bases as &[Option<Vec<u8>>],
            &same_here,
            &members_here,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Writes what is still in memory of listings that ended, but for what stays held, and waits for it.
    pub(super) async fn settle_members(&self, staging: &mut Staging) -> Result<(), Error> {
        self.compare(staging).await?;
        self.take_compared(staging).await?;
        self.flush(staging).await?;
        self.take_sent(staging).await
    }

    /// Waits until nothing of what was staged so far is on its way to the database any more.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn staged(&self) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            self.take_sent_users(&mut staging).await?;
            self.settle_groups(&mut staging).await?;
            self.take_compared(&mut staging).await?;
            self.flush(&mut staging).await?;
            self.take_sent(&mut staging).await
        })
        .await
    }

    /// Begins a look at the mirror for the listings that wait for one, once the one before is done.
    async fn compare(&self, staging: &mut Staging) -> Result<(), Error> {
        self.take_compared(staging).await?;
        if staging.to_compare.is_empty() {
            return Ok(());
        }
        let listings = std::mem::take(&mut staging.to_compare);
        let groups = listings.iter().map(|listing| listing.group.clone()).collect();
        let (pool, directory_id) = (self.pool.clone(), self.directory_id);
        let look = Beside::begin(async move { read_present(&pool, directory_id, groups).await });
        staging.looking = Some((listings, look));
        Ok(())
    }

    /// Leaves of the listings for which the look at the mirror is taken only what the mirror does not have.
    async fn take_compared(&self, staging: &mut Staging) -> Result<(), Error> {
        let Some((mut listings, look)) = staging.looking.take() else { return Ok(()) };
        let present = look.end().await?;
        let users = self.known_users(staging).await?;
        for (group, found) in self.compare_listings(&mut listings, present, users).await? {
            if let Some(Finished::Compared { same, .. }) = staging.finished.get_mut(&group) {
                *same = found;
            }
        }
        let left = listings.into_iter().filter(|listing| listing.members.len() > 0);
        staging.ready.extend(left.map(|listing| (listing.group, listing.members)));
        Ok(())
    }

    /// Stages these groups, which are held.
    pub(super) async fn release(&self, staging: &mut Staging, groups: Vec<String>) -> Result<(), Error> {
        for group in groups {
            if let Some(members) = staging.held.take_out(&group) {
                staging.ready.push((group, members));
                self.flush_if_many(staging).await?;
            }
        }
        Ok(())
    }

    /// Stages the held groups that the plan would have to look at, as far as it can be told before: those with members whom the
    /// directory does not list, that the mirror has members of, or that rights come through, so that the plan can say who gains
    /// them. And all of them if they are few, or if the session that would copy them cannot be watched.
    async fn stage_strangers(&self, staging: &mut Staging) -> Result<(), Error> {
        if staging.held.is_empty() {
            return Ok(());
        }
        let known = self.known_users(staging).await?.len();
        let few = staging.held.len() < known / FEWER;
        let unfit = if few || !Watcher::is_possible(&self.pool).await? {
            staging.held.groups().map(ToOwned::to_owned).collect()
        } else {
            let looked_at = self.groups_to_look_at().await?;
            let Staging { users: Some(users), held, .. } = staging else { return Ok(()) };
            held.unfit(|group| !looked_at.contains(group), |print| users.has_seen(print))
        };
        self.release(staging, unfit).await
    }

    /// The groups of the mirror that have members but are not known to have those of any listing, or that rights come through
    /// by all edges that are staged.
    async fn groups_to_look_at(&self) -> Result<HashSet<String>, Error> {
        let mut connection = self.pool.acquire().await?;
        let filled = sqlx::query_scalar!(
            r#"
            select g.external_id as "external_id!"
            from authz.groups g
            where g.directory_id = $1 and g.external_id is not null
              and not exists (select from authz.group_digests d where d.group_id = g.group_id)
              and (exists (select from authz.group_users m where m.group_id = g.group_id)
                   or exists (select from authz.group_groups m where m.parent_group_id = g.group_id)
                   or exists (select from authz.group_directories m where m.group_id = g.group_id))
            "#,
            self.directory_id,
        )
        .fetch_all(&mut *connection)
        .await?;
        let has_grants = has_grants(&mut connection).await?;
        let reached = if has_grants { self.reached_groups(&mut connection).await? } else { Vec::new() };
        Ok(filled.into_iter().chain(reached).collect())
    }

    async fn flush_if_many(&self, staging: &mut Staging) -> Result<(), Error> {
        if staging.ready.iter().map(|(_, members)| members.len()).sum::<usize>() >= AT_ONCE {
            self.flush(staging).await?;
        }
        Ok(())
    }

    /// Sends what is ready to the staging table, without a key to look up: a listing names nobody twice. It is on its way
    /// then; only what was sent before has arrived.
    async fn flush(&self, staging: &mut Staging) -> Result<(), Error> {
        let ready = std::mem::take(&mut staging.ready);
        if ready.iter().all(|(_, members)| members.len() == 0) {
            return Ok(());
        }
        let rows = copied(self.run_id, &ready);
        drop(ready);
        self.take_sent(staging).await?;
        staging.sending = Some(Beside::begin(send(self.pool.clone(), COPY, rows)));
        Ok(())
    }

    /// Waits for what is on its way to the staging table.
    async fn take_sent(&self, staging: &mut Staging) -> Result<(), Error> {
        if let Some(sending) = staging.sending.take() {
            self.staged.members.fetch_add(sending.end().await?, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Members of groups as rows of the staging table, in the form of a binary `COPY`.
pub(super) fn copied(run_id: i64, listings: &[(String, StagedMembers)]) -> Vec<u8> {
    let mut rows = CopyRows::new();
    for (group, members) in listings {
        let group = storable(group);
        for member in members.iter() {
            rows.begin(6);
            rows.value(&run_id.to_be_bytes());
            for text in [group.as_str(), member.kind(), member.id] {
                rows.value(text.as_bytes());
            }
            rows.value_or_null(member.name.map(str::as_bytes));
            rows.value(member.role.as_str().as_bytes());
        }
    }
    rows.end()
}
