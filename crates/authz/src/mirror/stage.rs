//! Staging: what the source lists, page by page, before anything is compared. Members are in `stage_members`.

use std::sync::atomic::Ordering;

use super::Run;
use super::beside::Beside;
use super::copy_in::{CopyRows, send};
use super::known::{Sight, place};
use super::stage_members::Staging;
use super::users::{ListedUser, StagedUsers};
use crate::error::Error;
use crate::group::Role;
use crate::name::{GroupName, UserName};

/// Pages of users that may wait until the mirror's users are read.
const WAITING_PAGES: usize = 64;
/// So many users go to the database at once.
const AT_ONCE: usize = 4096;
/// The same of groups: the last of them are sent when the crawl has ended, and waited for.
const GROUPS_AT_ONCE: usize = 512;
const COPY_GROUPS: &str = "copy authz.sync_stage_groups (run_id, external_id, group_name, display_name, description) \
                           from stdin (format binary)";
const COPY_USERS: &str = "copy authz.sync_stage_users (run_id, external_id, user_name, display_name, suspended) \
                    from stdin (format binary)";

/// Of what the mirror has rows that were not listed so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Missing {
    /// Users are missing.
    pub users: bool,
    /// Groups are missing.
    pub groups: bool,
}

/// A user as the directory lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedUser {
    /// The directory's immutable id.
    pub external_id: String,
    /// The primary address; `None` if it cannot be a name: then the mirror keeps the name it has.
    pub name: Option<UserName>,
    /// For people.
    pub display_name: String,
    /// Suspended or archived.
    pub suspended: bool,
}

/// A group as the directory lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedGroup {
    /// The directory's immutable id.
    pub external_id: String,
    /// The address; `None` if it cannot be a name: then the mirror keeps the name it has.
    pub name: Option<GroupName>,
    /// For people.
    pub display_name: String,
    /// For people.
    pub description: String,
}

/// A direct member of a group as the directory lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StagedMember {
    /// A user, listed by the directory or external.
    User {
        /// The member's immutable id.
        external_id: String,
        /// The member's address, which names an external user.
        name: Option<UserName>,
        /// What the directory says of the member.
        role: Role,
    },
    /// A group inside the group.
    Group {
        /// The group's immutable id.
        external_id: String,
    },
    /// Everyone whom the directory lists.
    Everyone,
}

impl Run {
    /// A step of the staging.
    ///
    /// INVARIANT: what was taken in and then lost, because the database did not answer or nobody waited for it, is never
    /// planned without: such a step stays open (held by `page_that_is_lost_is_not_absence`).
    pub(super) async fn step(&self, work: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
        self.open_steps.fetch_add(1, Ordering::Relaxed);
        work.await?;
        self.open_steps.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    /// Takes a page of users. Only those that differ from the mirror are staged, each once: of a user who comes again,
    /// what came first counts.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer, [`Error::StagingLost`] if it did not when the mirror's users were read;
    /// the run cannot be planned any more then.
    pub async fn stage_users(&self, users: StagedUsers) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            staging.waiting_users.push(users);
            if staging.reads_users() && staging.waiting_users.len() < WAITING_PAGES {
                return Ok(());
            }
            self.take_in_users(&mut staging).await
        })
        .await
    }

    /// Compares the pages that wait with the mirror.
    pub(super) async fn take_in_users(&self, staging: &mut Staging) -> Result<(), Error> {
        let waiting = std::mem::take(&mut staging.waiting_users);
        let known = self.known_users(staging).await?;
        let (mut same, mut staged) = (0, Vec::new());
        for user in waiting.iter().flat_map(StagedUsers::iter) {
            match known.sees(&user) {
                Sight::Same => same += 1,
                Sight::Differs => staged.push(user),
                Sight::Again => {}
            }
        }
        self.staged.same_users.fetch_add(same, Ordering::Relaxed);
        for page in staged.chunks(AT_ONCE) {
            let rows = copied(self.run_id, page);
            self.take_sent_users(staging).await?;
            staging.sending_users = Some(Beside::begin(send(self.pool.clone(), COPY_USERS, rows)));
        }
        Ok(())
    }

    /// Waits for the users who are on their way to the staging table.
    pub(super) async fn take_sent_users(&self, staging: &mut Staging) -> Result<(), Error> {
        if let Some(sending) = staging.sending_users.take() {
            self.staged.users.fetch_add(sending.end().await?, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Adds a page of groups. A group that was staged before is not staged twice.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn stage_groups(&self, groups: &[StagedGroup]) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            for group in groups {
                let print = staging.hasher.of_id(&group.external_id);
                if staging.seen_groups.find(place(print), |seen| *seen == print).is_none() {
                    staging.seen_groups.insert_unique(place(print), print, |seen| place(*seen));
                    staging.ready_groups.push(group.clone());
                }
            }
            if staging.ready_groups.len() >= GROUPS_AT_ONCE {
                self.flush_groups(&mut staging).await
            } else {
                Ok(())
            }
        })
        .await
    }

    /// Sends the groups that are ready, once those before have arrived.
    async fn flush_groups(&self, staging: &mut Staging) -> Result<(), Error> {
        self.take_sent_groups(staging).await?;
        if !staging.ready_groups.is_empty() {
            let rows = copied_groups(self.run_id, &std::mem::take(&mut staging.ready_groups));
            staging.sending_groups = Some(Beside::begin(send(self.pool.clone(), COPY_GROUPS, rows)));
        }
        Ok(())
    }

    async fn take_sent_groups(&self, staging: &mut Staging) -> Result<(), Error> {
        if let Some(sending) = staging.sending_groups.take() {
            self.staged.groups.fetch_add(sending.end().await?, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sends the groups that are ready, and waits for them and for those before.
    pub(super) async fn settle_groups(&self, staging: &mut Staging) -> Result<(), Error> {
        self.flush_groups(staging).await?;
        self.take_sent_groups(staging).await
    }

    /// What the mirror has and the listings have not shown so far, and would therefore go.
    ///
    /// A listing of several pages is not of one moment: who is renamed meanwhile can be moved from a page that is still to
    /// come to one that came already, and is on neither. List again what misses somebody, and stage that too, before
    /// an absence is believed.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn missing(&self) -> Result<Missing, Error> {
        let mut missing = Missing::default();
        self.step(async {
            let mut staging = self.staging.lock().await;
            self.take_in_users(&mut staging).await?;
            self.settle_groups(&mut staging).await?;
            missing.users = self.known_users(&mut staging).await?.misses_any();
            missing.groups = sqlx::query_scalar!(
                r#"
                -- Not `not exists`: nothing is known of the staging table yet, and each group would be looked for in all of it.
                select exists (
                    select g.external_id from authz.groups g
                    where g.directory_id = $2 and g.status = 'active' and g.external_id is not null
                    except
                    select s.external_id from authz.sync_stage_groups s where s.run_id = $1
                ) as "any!"
                "#,
                self.run_id,
                self.directory_id,
            )
            .fetch_one(&self.pool)
            .await?;
            Ok(())
        })
        .await?;
        Ok(missing)
    }

    /// Forgets all users staged so far: their listing begins again.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn restart_users(&self) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            self.take_sent_users(&mut staging).await?;
            sqlx::query!("delete from authz.sync_stage_users where run_id = $1", self.run_id)
                .execute(&self.pool)
                .await?;
            staging.waiting_users.clear();
            if let Some(known) = &mut staging.users {
                known.forget();
            }
            self.staged.users.store(0, Ordering::Relaxed);
            self.staged.same_users.store(0, Ordering::Relaxed);
            Ok(())
        })
        .await
    }

    /// Forgets all groups staged so far: their listing begins again.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer; the run cannot be planned any more then.
    pub async fn restart_groups(&self) -> Result<(), Error> {
        self.step(async {
            let mut staging = self.staging.lock().await;
            self.take_sent_groups(&mut staging).await?;
            sqlx::query!("delete from authz.sync_stage_groups where run_id = $1", self.run_id)
                .execute(&self.pool)
                .await?;
            staging.ready_groups.clear();
            staging.seen_groups.clear();
            self.staged.groups.store(0, Ordering::Relaxed);
            Ok(())
        })
        .await
    }
}

/// Users as rows of the staging table, in the form of a binary `COPY`. None of them is there yet.
fn copied(run_id: i64, users: &[ListedUser<'_>]) -> Vec<u8> {
    let mut rows = CopyRows::new();
    for user in users {
        rows.begin(5);
        rows.value(&run_id.to_be_bytes());
        rows.value(storable(user.external_id).as_bytes());
        rows.value_or_null(user.name.map(str::as_bytes));
        rows.value(storable(user.display_name).as_bytes());
        rows.value(&[u8::from(user.suspended)]);
    }
    rows.end()
}

/// The same of groups.
fn copied_groups(run_id: i64, groups: &[StagedGroup]) -> Vec<u8> {
    let mut rows = CopyRows::new();
    for group in groups {
        rows.begin(5);
        rows.value(&run_id.to_be_bytes());
        rows.value(storable(&group.external_id).as_bytes());
        rows.value_or_null(group.name.as_ref().map(|name| name.as_str().as_bytes()));
        rows.value(storable(&group.display_name).as_bytes());
        rows.value(storable(&group.description).as_bytes());
    }
    rows.end()
}

/// Postgres takes every character in a text but NUL.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "")
}
