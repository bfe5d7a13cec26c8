//! From what a source lists to what `authz` stages: names parsed, types mapped, nothing dropped silently.

use std::collections::HashMap;

use authz::group::Role;
use authz::mirror::{Run, StagedGroup, StagedMember, StagedMembers, StagedUser, StagedUsers};
use authz::{GroupName, UserName};
use tokio::sync::mpsc;

use crate::crawl::{Batch, Listing};
use crate::source::{Group, Member, MemberKind, User};

/// What was met on the way that is not mirrored, for the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Met {
    /// "Everyone of the customer" members of another customer than the directory's.
    pub foreign_everyone: u64,
}

/// A [`Batch`] as it is staged, made by the task that reads it: text that one task takes from the other piece by piece
/// took longer than all else that becomes of it.
pub(crate) enum Page {
    Users(StagedUsers),
    Groups(Vec<StagedGroup>),
    Members {
        group_id: String,
        members: StagedMembers,
        /// The customers whose everyone is a member.
        everyone_of: Vec<String>,
    },
    Listed {
        group_id: String,
    },
    /// Members that a second look shows, and the customers whose everyone is one.
    MembersAgain {
        group_id: String,
        members: StagedMembers,
        everyone_of: Vec<String>,
    },
    Restart(Listing),
}

impl From<Batch> for Page {
    fn from(batch: Batch) -> Self {
        match batch {
            Batch::Users(users) => Self::Users(users.into_iter().map(user).collect()),
            Batch::Groups(groups) => Self::Groups(groups.into_iter().map(group).collect()),
            Batch::Members { group_id, members } => {
                let (members, everyone_of) = packed(members);
                Self::Members { group_id, members, everyone_of }
            }
            Batch::MembersAgain { group_id, members } => {
                let (members, everyone_of) = packed(members);
                Self::MembersAgain { group_id, members, everyone_of }
            }
            Batch::Listed { group_id } => Self::Listed { group_id },
            Batch::Restart(listing) => Self::Restart(listing),
        }
    }
}

/// Members as they are staged, and the customers whose everyone is one.
fn packed(members: Vec<Member>) -> (StagedMembers, Vec<String>) {
    let everyone = members.iter().filter(|member| member.kind == MemberKind::Customer);
    let everyone_of = everyone.map(|member| member.id.clone()).collect();
    (members.into_iter().filter_map(member).collect(), everyone_of)
}

/// Takes pages until the crawl ends, and stages them.
///
/// # Errors
/// [`authz::Error`] if the database does not take them; the crawl then ends because nobody listens.
pub(crate) async fn stage(
    run: &Run,
    mut pages: mpsc::Receiver<Page>,
    include_external: bool,
    customer_id: impl Fn() -> Option<String>,
) -> Result<Met, authz::Error> {
    // "Everyone" members wait for the end: only then it is certain which customer is the directory's own.
    let mut everyone: HashMap<String, Everyone> = HashMap::new();
    while let Some(page) = pages.recv().await {
        match page {
            Page::Users(users) => run.stage_users(users).await?,
            Page::Groups(groups) => run.stage_groups(&groups).await?,
            Page::Members { group_id, members, everyone_of } => {
                if !everyone_of.is_empty() {
                    everyone.entry(group_id.clone()).or_default().of.extend(everyone_of);
                }
                run.stage_members(&group_id, members).await?;
            }
            Page::Listed { group_id } => match everyone.get_mut(&group_id) {
                Some(waiting) => waiting.listed = true,
                None => run.finish_members(&group_id, include_external).await?,
            },
            Page::MembersAgain { group_id, members, everyone_of } => {
                run.keep_members(&group_id, members).await?;
                // Known by now, if at all.
                if customer_id().is_some_and(|ours| everyone_of.contains(&ours)) {
                    let everyone = StagedMembers::from_iter([StagedMember::Everyone]);
                    run.keep_members(&group_id, everyone).await?;
                }
            }
            Page::Restart(Listing::Users) => run.restart_users().await?,
            Page::Restart(Listing::Groups) => run.restart_groups().await?,
            Page::Restart(Listing::Members { group_id }) => {
                everyone.remove(&group_id);
                run.restart_members(&group_id).await?;
            }
        }
    }
    let ours = customer_id();
    let mut met = Met::default();
    for (group_id, Everyone { of, .. }) in everyone.into_iter().filter(|(_, everyone)| everyone.listed) {
        for customer in of {
            if ours.as_ref() == Some(&customer) {
                run.stage_members(&group_id, StagedMembers::from_iter([StagedMember::Everyone])).await?;
            } else {
                met.foreign_everyone += 1;
            }
        }
        run.finish_members(&group_id, include_external).await?;
    }
    // Also where the crawl was cut off: then the staging area is emptied, and nothing may come into it after that.
    run.staged().await?;
    Ok(met)
}

/// The "everyone" members of a group.
#[derive(Debug, Default)]
struct Everyone {
    /// Of which customers.
    of: Vec<String>,
    /// Whether the group's listing is complete.
    listed: bool,
}

fn user(user: User) -> StagedUser {
    StagedUser {
        name: UserName::try_from(user.email).ok(),
        external_id: user.id,
        display_name: user.display_name,
        suspended: user.suspended,
    }
}

fn group(group: Group) -> StagedGroup {
    StagedGroup {
        name: GroupName::try_from(group.email).ok(),
        external_id: group.id,
        display_name: group.name,
        description: group.description,
    }
}

/// `None` for a type that nobody knows (the crawl counts those), and for everyone, who are staged at the end.
fn member(member: Member) -> Option<StagedMember> {
    match member.kind {
        MemberKind::User => Some(StagedMember::User {
            external_id: member.id,
            name: member.email.and_then(|email| UserName::try_from(email).ok()),
            role: role(&member.role),
        }),
        MemberKind::Group => Some(StagedMember::Group { external_id: member.id }),
        MemberKind::Customer | MemberKind::Other(_) => None,
    }
}

/// The role never decides whether somebody is a member, so an unknown one is a plain member's.
fn role(role: &str) -> Role {
    match role {
        "OWNER" => Role::Owner,
        "MANAGER" => Role::Manager,
        _ => Role::Member,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(kind: MemberKind, id: &str) -> Member {
        Member { id: id.into(), email: None, role: "OWNER".into(), kind }
    }

    #[test]
    fn owners_are_members_and_unknown_types_are_not() {
        let owner = member(sent(MemberKind::User, "1"));
        assert_eq!(
            owner,
            Some(StagedMember::User { external_id: "1".into(), name: None, role: Role::Owner })
        );
        assert_eq!(member(sent(MemberKind::Other("BOT".into()), "1")), None);
    }
}
