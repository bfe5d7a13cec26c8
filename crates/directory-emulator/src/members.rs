use std::collections::HashSet;

use serde_json::{Value, json};

use crate::Directory;
use crate::directory::{Object, text};
use crate::error_body::ApiError;
use crate::listing::{Listing, complete};
use crate::parameters::Parameters;
use crate::server::Shaping;

const KIND: &str = "admin#directory#member";
const ROLES: [&str; 3] = ["OWNER", "MANAGER", "MEMBER"];

/// `members.list`
pub(crate) fn list(
    directory: &Directory,
    group_key: &str,
    path: &str,
    parameters: &Parameters,
    shaping: Shaping,
) -> Result<Value, ApiError> {
    let group_id = group_id(directory, group_key)?;
    let mut members = if parameters.flag("includeDerivedMembership")? {
        derived(directory, group_id)
    } else {
        directory.members(group_id).iter().collect()
    };
    if let Some(roles) = roles(parameters)? {
        members.retain(|member| roles.contains(&role(member)));
    }
    Listing::MEMBERS.page(path, parameters, &members, shaping, |member| complete(member, KIND))
}

/// `members.get`: direct members only.
pub(crate) fn get(directory: &Directory, group_key: &str, member_key: &str) -> Result<Value, ApiError> {
    let members = directory.members(group_id(directory, group_key)?);
    let who = Who::anyone(directory, member_key).ok_or_else(|| ApiError::not_found("memberKey"))?;
    let member = members.iter().find(|member| who.is(member));
    let member = member.ok_or_else(|| ApiError::not_found("memberKey"))?;
    Ok(Value::Object(complete(member, KIND)))
}

/// `members.hasMember`: direct or nested; refused for one who is not of the organisation.
pub(crate) fn has_member(
    directory: &Directory,
    group_key: &str,
    member_key: &str,
) -> Result<Value, ApiError> {
    let group_id = group_id(directory, group_key)?;
    let who = Who::of_the_organisation(directory, member_key)
        .ok_or_else(|| ApiError::invalid_input("memberKey"))?;
    let is_user = directory.user(member_key).is_some();
    let everyone = |member: &Object| is_user && text(member, "type") == "CUSTOMER";
    let is_member = derived(directory, group_id).into_iter().any(|member| who.is(member) || everyone(member));
    Ok(json!({"isMember": is_member}))
}

/// Someone as a member record names them: by id, or by address alone.
pub(crate) struct Who {
    id: String,
    email: Option<String>,
}

impl Who {
    /// A user or group of the directory.
    fn of_the_organisation(directory: &Directory, key: &str) -> Option<Self> {
        let object = directory.user(key).or_else(|| directory.group(key))?;
        Some(Self { id: text(object, "id").to_owned(), email: None })
    }

    /// A user or group of the directory, or one from outside who is a member of some group.
    pub(crate) fn anyone(directory: &Directory, key: &str) -> Option<Self> {
        Self::of_the_organisation(directory, key).or_else(|| {
            let outside = Self { id: key.to_owned(), email: Some(key.to_owned()) };
            let mut groups = directory.groups().iter();
            groups
                .any(|group| directory.members(text(group, "id")).iter().any(|member| outside.is(member)))
                .then_some(outside)
        })
    }

    pub(crate) fn is(&self, member: &Object) -> bool {
        let email = text(member, "email");
        text(member, "id") == self.id
            || self.email.as_ref().is_some_and(|own| email.eq_ignore_ascii_case(own))
    }
}

fn group_id<'a>(directory: &'a Directory, key: &str) -> Result<&'a str, ApiError> {
    directory.group(key).map(|group| text(group, "id")).ok_or_else(|| ApiError::not_found("groupKey"))
}

/// Direct and nested members, each once. INVARIANT: ends in a cycle too (`derived_members_of_a_cycle_are_listed_once`).
fn derived<'a>(directory: &'a Directory, group_id: &str) -> Vec<&'a Object> {
    let mut seen: HashSet<&str> = HashSet::new();
    let mut members: Vec<&Object> = directory.members(group_id).iter().collect();
    members.retain(|member| seen.insert(text(member, "id")));
    let mut next = 0;
    while let Some(member) = members.get(next) {
        // Only groups of the directory have members here.
        let nested = directory.members(text(member, "id"));
        members.extend(nested.iter().filter(|member| seen.insert(text(member, "id"))));
        next += 1;
    }
    members
}

fn role(member: &Object) -> &str {
    let role = text(member, "role");
    if role.is_empty() { "MEMBER" } else { role }
}

fn roles(parameters: &Parameters) -> Result<Option<Vec<&'static str>>, ApiError> {
    let Some(asked) = parameters.get("roles") else { return Ok(None) };
    let known = |asked: &str| ROLES.into_iter().find(|role| role.eq_ignore_ascii_case(asked.trim()));
    let roles: Option<Vec<_>> = asked.split(',').map(known).collect();
    roles.map(Some).ok_or_else(|| ApiError::invalid_input("roles"))
}
