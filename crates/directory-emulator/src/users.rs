use std::cmp::Reverse;

use axum::http::StatusCode;
use serde_json::Value;

use crate::Directory;
use crate::directory::{Object, domain_of, text};
use crate::error_body::ApiError;
use crate::listing::{Listing, complete};
use crate::parameters::Parameters;
use crate::server::Shaping;

const KIND: &str = "admin#directory#user";

/// `users.list`
pub(crate) fn list(
    directory: &Directory,
    subject: &str,
    path: &str,
    parameters: &Parameters,
    shaping: Shaping,
) -> Result<Value, ApiError> {
    let scope = Scope::of(directory, subject, parameters)?.ok_or_else(ApiError::bad_request)?;
    let deleted = parameters.flag("showDeleted")?;
    let query = parameters.get("query").map(Query::parse).transpose()?;
    let projection = projection(parameters)?;
    parameters.one_of("viewType", &["admin_view", "domain_public"])?;

    let mut users: Vec<&Object> = directory
        .users()
        .iter()
        .filter(|user| user.contains_key("deletionTime") == deleted)
        .filter(|user| scope.contains(text(user, "primaryEmail")))
        .filter(|user| query.as_ref().is_none_or(|query| query.matches(user, "primaryEmail")))
        .collect();
    match parameters.one_of("orderBy", &["email", "familyName", "givenName"])? {
        Some("email") => sort(&mut users, parameters, |user| text(user, "primaryEmail"))?,
        Some(name) => sort(&mut users, parameters, |user| {
            user.get("name").and_then(|names| names.get(name)).and_then(Value::as_str).unwrap_or_default()
        })?,
        None => {
            sort_order(parameters)?;
        }
    }
    Listing::USERS.page(path, parameters, &users, shaping, |user| projected(user, projection))
}

/// `users.get`
pub(crate) fn get(directory: &Directory, key: &str, parameters: &Parameters) -> Result<Value, ApiError> {
    let projection = projection(parameters)?;
    let user = directory.user(key).filter(|user| !user.contains_key("deletionTime"));
    let user = user.ok_or_else(|| ApiError::not_found("userKey"))?;
    Ok(Value::Object(projected(user, projection)))
}

/// Which objects `customer` or `domain` asks for.
pub(crate) enum Scope {
    Customer,
    Domain(String),
}

impl Scope {
    /// `None` when neither parameter is there.
    pub(crate) fn of(
        directory: &Directory,
        subject: &str,
        parameters: &Parameters,
    ) -> Result<Option<Self>, ApiError> {
        match (parameters.get("customer"), parameters.get("domain")) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "badRequest",
                "The directory emulator refuses customer together with domain: Google then silently drops \
                 secondary domains. Send one of them.",
            )),
            (Some(id), None) if id == "my_customer" || id == directory.customer_id() => {
                Ok(Some(Self::Customer))
            }
            (Some(_), None) => Err(ApiError::bad_request()),
            (None, Some(domain)) => {
                let domain = domain.to_lowercase();
                let is_known = directory.has_domain(&domain) || domain_of(subject).as_ref() == Some(&domain);
                if is_known { Ok(Some(Self::Domain(domain))) } else { Err(ApiError::domain_not_found()) }
            }
        }
    }

    pub(crate) fn contains(&self, address: &str) -> bool {
        match self {
            Self::Customer => true,
            Self::Domain(domain) => domain_of(address).as_ref() == Some(domain),
        }
    }
}

/// A search of one clause; Google has many more.
pub(crate) enum Query {
    Email(String),
    EmailPrefix(String),
    IsSuspended(bool),
}

impl Query {
    pub(crate) fn parse(query: &str) -> Result<Self, ApiError> {
        let query = query.trim();
        let unquoted = |value: &str| value.trim_matches(['\'', '"']).to_lowercase();
        if query.contains(char::is_whitespace) {
            Err(ApiError::invalid_input("query"))
        } else if let Some(value) = query.strip_prefix("email=") {
            Ok(Self::Email(unquoted(value)))
        } else if let Some(prefix) = query.strip_prefix("email:").and_then(|value| value.strip_suffix('*')) {
            Ok(Self::EmailPrefix(unquoted(prefix)))
        } else {
            match query {
                "isSuspended=true" => Ok(Self::IsSuspended(true)),
                "isSuspended=false" => Ok(Self::IsSuspended(false)),
                _ => Err(ApiError::invalid_input("query")),
            }
        }
    }

    pub(crate) fn matches(&self, object: &Object, address_field: &str) -> bool {
        match self {
            Self::Email(email) => text(object, address_field).eq_ignore_ascii_case(email),
            Self::EmailPrefix(prefix) => text(object, address_field).to_lowercase().starts_with(prefix),
            Self::IsSuspended(wanted) => {
                object.get("suspended").and_then(Value::as_bool).unwrap_or(false) == *wanted
            }
        }
    }
}

/// Sorts ignoring case, in the order that `sortOrder` asks for.
pub(crate) fn sort<'a>(
    objects: &mut [&'a Object],
    parameters: &Parameters,
    key: impl Fn(&'a Object) -> &'a str,
) -> Result<(), ApiError> {
    if sort_order(parameters)? == Some("DESCENDING") {
        objects.sort_by_cached_key(|object| Reverse(key(object).to_lowercase()));
    } else {
        objects.sort_by_cached_key(|object| key(object).to_lowercase());
    }
    Ok(())
}

fn sort_order(parameters: &Parameters) -> Result<Option<&'static str>, ApiError> {
    parameters.one_of("sortOrder", &["ASCENDING", "DESCENDING"])
}

/// Whether custom schemas are shown.
#[derive(Clone, Copy)]
enum Projection {
    Basic,
    WithCustomSchemas,
}

fn projection(parameters: &Parameters) -> Result<Projection, ApiError> {
    let named = parameters.one_of("projection", &["basic", "custom", "full"])?;
    Ok(if matches!(named, Some("custom" | "full")) {
        Projection::WithCustomSchemas
    } else {
        Projection::Basic
    })
}

fn projected(user: &Object, projection: Projection) -> Object {
    let mut user = complete(user, KIND);
    if matches!(projection, Projection::Basic) {
        user.remove("customSchemas");
    }
    user
}
