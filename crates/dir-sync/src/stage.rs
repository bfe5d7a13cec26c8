//! From what a source lists to what `authz` stages: names parsed, types mapped, nothing dropped silently.

use authz::group::Role;
use authz::mirror::{Run, StagedGroup, StagedMember, StagedUser};
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

/// Takes batches until the crawl ends, and stages them.
///
/// # Errors
/// [`authz::Error`] if the database does not take them; the crawl then ends because nobody listens.
pub(crate) async fn stage(
    run: &Run,
    mut batches: mpsc::Receiver<Batch>,
    customer_id: impl Fn() -> Option<String>,
) -> Result<Met, authz::Error> {
    let mut met = Met::default();
    // "Everyone" members that came before the directory's own customer was known, and their groups.
    let mut unsure: Vec<(String, Member)> = Vec::new();
    while let Some(batch) = batches.recv().await {
        match batch {
            Batch::Users(users) => run.stage_users(&users.iter().map(user).collect::<Vec<_>>()).await?,
            Batch::Groups(groups) => run.stage_groups(&groups.iter().map(group).collect::<Vec<_>>()).await?,
            Batch::Members { group_id, members } => {
                let ours = customer_id();
                let (later, now): (Vec<_>, Vec<_>) =
                    members.into_iter().partition(|m| m.kind == MemberKind::Customer && ours.is_none());
                unsure.extend(later.into_iter().map(|m| (group_id.clone(), m)));
                let staged: Vec<_> =
                    now.iter().filter_map(|m| member(m, ours.as_deref(), &mut met)).collect();
                run.stage_members(&group_id, &staged).await?;
            }
            Batch::Restart(Listing::Users) => run.restart_users().await?,
            Batch::Restart(Listing::Groups) => run.restart_groups().await?,
            Batch::Restart(Listing::Members { group_id }) => {
                unsure.retain(|(group, _)| *group != group_id);
                run.restart_members(&group_id).await?;
            }
        }
    }
    let ours = customer_id();
    for (group_id, everyone) in unsure {
        if let Some(staged) = member(&everyone, ours.as_deref(), &mut met) {
            run.stage_members(&group_id, &[staged]).await?;
        }
    }
    Ok(met)
}

fn user(user: &User) -> StagedUser {
    StagedUser {
        external_id: user.id.clone(),
        name: UserName::parse(&user.email).ok(),
        display_name: user.display_name.clone(),
        suspended: user.suspended,
    }
}

fn group(group: &Group) -> StagedGroup {
    StagedGroup {
        external_id: group.id.clone(),
        name: GroupName::parse(&group.email).ok(),
        display_name: group.name.clone(),
        description: group.description.clone(),
    }
}

/// `None` for a type that nobody knows (the crawl counts those) and for everyone of another customer.
fn member(member: &Member, customer_id: Option<&str>, met: &mut Met) -> Option<StagedMember> {
    match &member.kind {
        MemberKind::User => Some(StagedMember::User {
            external_id: member.id.clone(),
            name: member.email.as_deref().and_then(|email| UserName::parse(email).ok()),
            role: role(&member.role),
        }),
        MemberKind::Group => Some(StagedMember::Group { external_id: member.id.clone() }),
        MemberKind::Customer if customer_id == Some(member.id.as_str()) => Some(StagedMember::Everyone),
        MemberKind::Customer => {
            met.foreign_everyone += 1;
            None
        }
        MemberKind::Other(_) => None,
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
        let mut met = Met::default();
        let owner = member(&sent(MemberKind::User, "1"), None, &mut met);
        assert_eq!(
            owner,
            Some(StagedMember::User { external_id: "1".into(), name: None, role: Role::Owner })
        );
        assert_eq!(member(&sent(MemberKind::Other("BOT".into()), "1"), None, &mut met), None);
    }

    #[test]
    fn everyone_of_another_customer_is_not_everyone_of_ours() {
        let mut met = Met::default();
        assert_eq!(
            member(&sent(MemberKind::Customer, "C1"), Some("C1"), &mut met),
            Some(StagedMember::Everyone)
        );
        assert_eq!(member(&sent(MemberKind::Customer, "C2"), Some("C1"), &mut met), None);
        assert_eq!(member(&sent(MemberKind::Customer, "C2"), None, &mut met), None);
        assert_eq!(met.foreign_everyone, 2);
    }
}
