//! Staging: what the source lists, page by page, before anything is compared.

use std::sync::atomic::Ordering;

use super::Run;
use crate::error::Error;
use crate::group::Role;
use crate::name::{GroupName, UserName};

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
    /// Adds a page of users. A user that was staged before is not staged twice.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn stage_users(&self, users: &[StagedUser]) -> Result<(), Error> {
        let ids: Vec<_> = users.iter().map(|u| storable(&u.external_id)).collect();
        let names: Vec<_> = users.iter().map(|u| u.name.as_ref().map(ToString::to_string)).collect();
        let display_names: Vec<_> = users.iter().map(|u| storable(&u.display_name)).collect();
        let suspended: Vec<_> = users.iter().map(|u| u.suspended).collect();
        let done = sqlx::query!(
            r#"
            insert into authz.sync_stage_users (run_id, external_id, user_name, display_name, suspended)
            select $1, v.* from unnest($2::text[], $3::text[], $4::text[], $5::bool[]) as v
            on conflict do nothing
            "#,
            self.run_id,
            &ids,
            &names as &[Option<String>],
            &display_names,
            &suspended,
        )
        .execute(&self.pool)
        .await?;
        self.staged.users.fetch_add(done.rows_affected(), Ordering::Relaxed);
        Ok(())
    }

    /// Adds a page of groups. A group that was staged before is not staged twice.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn stage_groups(&self, groups: &[StagedGroup]) -> Result<(), Error> {
        let ids: Vec<_> = groups.iter().map(|g| storable(&g.external_id)).collect();
        let names: Vec<_> = groups.iter().map(|g| g.name.as_ref().map(ToString::to_string)).collect();
        let display_names: Vec<_> = groups.iter().map(|g| storable(&g.display_name)).collect();
        let descriptions: Vec<_> = groups.iter().map(|g| storable(&g.description)).collect();
        let done = sqlx::query!(
            r#"
            insert into authz.sync_stage_groups (run_id, external_id, group_name, display_name, description)
            select $1, v.* from unnest($2::text[], $3::text[], $4::text[], $5::text[]) as v
            on conflict do nothing
            "#,
            self.run_id,
            &ids,
            &names as &[Option<String>],
            &display_names,
            &descriptions,
        )
        .execute(&self.pool)
        .await?;
        self.staged.groups.fetch_add(done.rows_affected(), Ordering::Relaxed);
        Ok(())
    }

    /// Adds a page of a group's direct members. A member that was staged before is not staged twice.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn stage_members(
        &self,
        group_external_id: &str,
        members: &[StagedMember],
    ) -> Result<(), Error> {
        let mut kinds = Vec::with_capacity(members.len());
        let mut ids = Vec::with_capacity(members.len());
        let mut names = Vec::with_capacity(members.len());
        let mut roles = Vec::with_capacity(members.len());
        for member in members {
            let (kind, id, name, role) = match member {
                StagedMember::User { external_id, name, role } => {
                    ("user", external_id.as_str(), name.as_ref().map(ToString::to_string), *role)
                }
                StagedMember::Group { external_id } => ("group", external_id.as_str(), None, Role::Member),
                StagedMember::Everyone => ("everyone", "everyone", None, Role::Member),
            };
            kinds.push(kind.to_owned());
            ids.push(storable(id));
            names.push(name);
            roles.push(role.as_str().to_owned());
        }
        let done = sqlx::query!(
            r#"
            insert into authz.sync_stage_members (run_id, group_external_id, kind, member_external_id, member_name, role)
            select $1, $2, v.* from unnest($3::text[], $4::text[], $5::text[], $6::text[]) as v
            on conflict do nothing
            "#,
            self.run_id,
            group_external_id,
            &kinds,
            &ids,
            &names as &[Option<String>],
            &roles,
        )
        .execute(&self.pool)
        .await?;
        self.staged.members.fetch_add(done.rows_affected(), Ordering::Relaxed);
        Ok(())
    }

    /// Forgets all users staged so far: their listing begins again.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn restart_users(&self) -> Result<(), Error> {
        sqlx::query!("delete from authz.sync_stage_users where run_id = $1", self.run_id)
            .execute(&self.pool)
            .await?;
        self.staged.users.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Forgets all groups staged so far: their listing begins again.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn restart_groups(&self) -> Result<(), Error> {
        sqlx::query!("delete from authz.sync_stage_groups where run_id = $1", self.run_id)
            .execute(&self.pool)
            .await?;
        self.staged.groups.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Forgets the members of one group: their listing begins again.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn restart_members(&self, group_external_id: &str) -> Result<(), Error> {
        let done = sqlx::query!(
            "delete from authz.sync_stage_members where run_id = $1 and group_external_id = $2",
            self.run_id,
            group_external_id,
        )
        .execute(&self.pool)
        .await?;
        self.staged.members.fetch_sub(done.rows_affected(), Ordering::Relaxed);
        Ok(())
    }

    /// Takes groups back out: they vanished while the source was read.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn forget_groups(&self, external_ids: &[String]) -> Result<(), Error> {
        for id in external_ids {
            self.restart_members(id).await?;
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
    }

    /// Marks groups whose members could not be listed: they keep the memberships that the mirror has.
    ///
    /// # Errors
    /// [`Error::Database`] if the database does not answer.
    pub async fn mark_incomplete(&self, external_ids: &[String]) -> Result<(), Error> {
        sqlx::query!(
            "update authz.sync_stage_groups set members_complete = false where run_id = $1 and external_id = any ($2)",
            self.run_id,
            external_ids,
        )
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

/// Postgres takes every character in a text but NUL.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "")
}
