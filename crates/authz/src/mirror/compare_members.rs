//! Members of groups whose last listing is what the mirror has: compared with it in memory, so that only differences are staged.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use sqlx::PgPool;

use super::Run;
use super::known::KnownUsers;
use super::members::StagedMembers;
use crate::error::Error;
use crate::group::Role;

/// A listing to compare.
pub(super) struct Listing {
    pub(super) group: String,
    pub(super) members: StagedMembers,
}

/// What of a listing the mirror does not have, and has besides.
struct Differences {
    /// Members that the mirror has just as they are listed.
    same: u64,
    /// Users whom the mirror has and the listing has not.
    gone: Vec<i64>,
}

/// Whom the mirror has in groups, by the directory's id of the group: each user and the role in one number, see `role_of`.
pub(super) type Present = HashMap<String, Vec<i64>>;

/// Reads whom the mirror has in these groups of the directory.
pub(super) async fn read_present(
    pool: &PgPool,
    directory_id: i32,
    groups: Vec<String>,
) -> Result<Present, Error> {
    let rows = sqlx::query!(
        r#"
        select g.external_id as "external_id!",
               array(select gu.user_id * 4 + case gu.role when 'member' then 2 when 'owner' then 0 else 1 end
                     from authz.group_users gu
                     where gu.group_id = g.group_id) as "members!"
        from authz.groups g
        where g.directory_id = $1 and g.external_id = any ($2) and g.status = 'active'
        "#,
        directory_id,
        &groups,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.external_id, row.members)).collect())
}

impl Run {
    /// Leaves of each listing what the mirror does not have, and stages whom the mirror has besides. Returns for each
    /// group how many of its members the mirror has as listed.
    pub(super) async fn compare_listings(
        &self,
        listings: &mut [Listing],
        mut present: Present,
        users: &KnownUsers,
    ) -> Result<Vec<(String, u64)>, Error> {
        let (mut same, mut gone_groups, mut gone_users) = (Vec::new(), Vec::new(), Vec::new());
        for Listing { group, members } in listings {
            let found = differences(members, present.remove(group.as_str()).unwrap_or_default(), users);
            gone_groups.extend(found.gone.iter().map(|_| group.clone()));
            gone_users.extend(found.gone);
            same.push((group.clone(), found.same));
        }
        if !gone_users.is_empty() {
            let done = sqlx::query!(
                r#"
                insert into authz.sync_stage_gone_members (run_id, group_external_id, user_id)
                select $1, v.* from unnest($2::text[], $3::bigint[]) as v
                "#,
                self.run_id,
                &gone_groups,
                &gone_users,
            )
            .execute(&self.pool)
            .await?;
            self.staged.gone_members.fetch_add(done.rows_affected(), Ordering::Relaxed);
        }
        Ok(same)
    }
}

/// Takes out of `members` those that are `present` just so. Members that are no users of the directory's mirror stay in
/// it, and so do groups: the plan looks at them.
fn differences(members: &mut StagedMembers, mut present: Vec<i64>, users: &KnownUsers) -> Differences {
    present.sort_unstable();
    let mut met = vec![false; present.len()];
    let mut same = 0;
    members.retain_users(|listed| {
        let Some((user_id, has_name)) = users.find(listed.id, listed.name) else { return true };
        let place = present.partition_point(|member| member >> 2 < user_id);
        let (Some(member), Some(met)) = (present.get(place), met.get_mut(place)) else { return true };
        if member >> 2 != user_id {
            return true;
        }
        *met = true;
        // One who turns out to be external by the end has the name of this listing.
        let is_same = has_name && role_of(*member) == listed.role;
        same += u64::from(is_same);
        !is_same
    });
    let gone = present.iter().zip(met).filter(|(_, met)| !met).map(|(member, _)| member >> 2).collect();
    Differences { same, gone }
}

fn role_of(member: i64) -> Role {
    match member & 3 {
        0 => Role::Owner,
        1 => Role::Manager,
        _ => Role::Member,
    }
}

#[cfg(test)]
mod tests {
    use super::super::stage::StagedMember;
    use super::*;
    use crate::name::UserName;

    #[test]
    fn only_what_came_changed_or_went_is_left() {
        let users = KnownUsers::of(&[(1, "a"), (2, "b"), (3, "c"), (4, "d"), (5, "e")]);
        let mut members = StagedMembers::default();
        for (id, role) in
            [("a", Role::Member), ("b", Role::Owner), ("d", Role::Member), ("stranger", Role::Member)]
        {
            members.push(&StagedMember::User { external_id: id.to_owned(), name: None, role });
        }
        let name = UserName::parse("other@example.com").ok();
        members.push(&StagedMember::User { external_id: "e".to_owned(), name, role: Role::Member });
        members.push(&StagedMember::Group { external_id: "g".to_owned() });
        members.settle();
        // Users 1 as listed, 2 in another role, 3 listed no more, 5 of another name, 9 of no directory; 4 is not there.
        let present = vec![(9 << 2) + 2, (3 << 2) + 2, (1 << 2) + 2, (2 << 2) + 2, (5 << 2) + 2];
        let found = differences(&mut members, present, &users);
        assert_eq!((found.same, found.gone), (1, vec![3, 9]));
        assert_eq!(
            members.iter().map(|member| member.id).collect::<Vec<_>>(),
            ["b", "d", "e", "stranger", "g"]
        );
    }
}
