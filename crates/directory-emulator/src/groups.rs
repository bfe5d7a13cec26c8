use serde_json::{Value, json};

use crate::Directory;
use crate::directory::{Object, text};
use crate::error_body::ApiError;
use crate::listing::{Listing, complete};
use crate::members::Who;
use crate::parameters::Parameters;
use crate::server::Shaping;
use crate::users::{Query, Scope, sort};

const KIND: &str = "admin#directory#group";

/// `groups.list`
pub(crate) fn list(
    directory: &Directory,
    subject: &str,
    path: &str,
    parameters: &Parameters,
    shaping: Shaping,
) -> Result<Value, ApiError> {
    let scope = Scope::of(directory, subject, parameters)?;
    let member = match parameters.get("userKey") {
        Some(_) if parameters.get("customer").is_some() => return Err(ApiError::bad_request()),
        Some(key) => Some(Who::anyone(directory, key).ok_or_else(|| ApiError::not_found("userKey"))?),
        None if scope.is_none() => return Err(ApiError::bad_request()),
        None => None,
    };
    let query = match parameters.get("query").map(Query::parse).transpose()? {
        Some(Query::IsSuspended(_)) => return Err(ApiError::invalid_input("query")),
        query => query,
    };

    let mut groups: Vec<&Object> = directory
        .groups()
        .iter()
        .filter(|group| scope.as_ref().is_none_or(|scope| scope.contains(text(group, "email"))))
        .filter(|group| query.as_ref().is_none_or(|query| query.matches(group, "email")))
        .filter(|group| {
            let members = directory.members(text(group, "id"));
            member.as_ref().is_none_or(|who| members.iter().any(|member| who.is(member)))
        })
        .collect();
    if parameters.one_of("orderBy", &["email"])?.is_some() {
        sort(&mut groups, parameters, |group| text(group, "email"))?;
    }
    Listing::GROUPS.page(path, parameters, &groups, shaping, |group| with_count(directory, group))
}

/// `groups.get`
pub(crate) fn get(directory: &Directory, key: &str) -> Result<Value, ApiError> {
    let group = directory.group(key).ok_or_else(|| ApiError::not_found("groupKey"))?;
    Ok(Value::Object(with_count(directory, group)))
}

fn with_count(directory: &Directory, group: &Object) -> Object {
    if group.contains_key("directMembersCount") {
        return complete(group, KIND);
    }
    let mut counted = group.clone();
    let count = directory.members(text(group, "id")).len();
    counted.insert("directMembersCount".to_owned(), json!(count.to_string()));
    complete(&counted, KIND)
}
