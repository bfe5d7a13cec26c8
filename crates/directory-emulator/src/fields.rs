use std::collections::BTreeMap;
use std::iter::Peekable;
use std::str::Chars;

use serde_json::Value;

use crate::directory::Object;
use crate::error_body::ApiError;

const USER: &[&str] = &[
    "addresses",
    "agreedToTerms",
    "aliases",
    "archivalTime",
    "archived",
    "changePasswordAtNextLogin",
    "creationTime",
    "customSchemas",
    "customerId",
    "deletionTime",
    "emails",
    "etag",
    "externalIds",
    "gender",
    "guestAccountInfo",
    "hashFunction",
    "id",
    "ims",
    "includeInGlobalAddressList",
    "ipWhitelisted",
    "isAdmin",
    "isDelegatedAdmin",
    "isEnforcedIn2Sv",
    "isEnrolledIn2Sv",
    "isGuestUser",
    "isMailboxSetup",
    "keywords",
    "kind",
    "languages",
    "lastLoginTime",
    "locations",
    "name",
    "nonEditableAliases",
    "notes",
    "orgUnitPath",
    "organizations",
    "password",
    "phones",
    "posixAccounts",
    "primaryEmail",
    "recoveryEmail",
    "recoveryPhone",
    "relations",
    "sshPublicKeys",
    "suspended",
    "suspensionReason",
    "suspensionTime",
    "thumbnailPhotoEtag",
    "thumbnailPhotoUrl",
    "websites",
];
const GROUP: &[&str] = &[
    "adminCreated",
    "aliases",
    "description",
    "directMembersCount",
    "email",
    "etag",
    "externalIds",
    "id",
    "kind",
    "name",
    "nonEditableAliases",
];
const MEMBER: &[&str] = &["delivery_settings", "email", "etag", "id", "kind", "role", "status", "type"];

/// What a call answers with, as far as a `fields` parameter may name parts of it.
///
/// The names are those of the discovery document, revision 20261104. Names further down are not checked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Schema {
    Users,
    Groups,
    Members,
    User,
    Group,
    Member,
    HasMember,
}

impl Schema {
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Users => &["etag", "kind", "nextPageToken", "trigger_event", "users"],
            Self::Groups => &["etag", "groups", "kind", "nextPageToken"],
            Self::Members => &["etag", "kind", "members", "nextPageToken"],
            Self::User => USER,
            Self::Group => GROUP,
            Self::Member => MEMBER,
            Self::HasMember => &["isMember"],
        }
    }

    fn below(self, name: &str) -> Option<Self> {
        match (self, name) {
            (Self::Users, "users") => Some(Self::User),
            (Self::Groups, "groups") => Some(Self::Group),
            (Self::Members, "members") => Some(Self::Member),
            _ => None,
        }
    }
}

/// Deeper selections are refused, so that none can exhaust the stack.
const DEEPEST: usize = 20;

/// A parsed `fields` parameter: `a,b(c,d/e),f/g,*`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    /// Empty means the whole value.
    names: BTreeMap<String, Selection>,
}

impl Selection {
    pub(crate) fn parse(text: &str, schema: Schema) -> Result<Self, ApiError> {
        let selection = Parser { rest: text.chars().peekable() }
            .all()
            .ok_or_else(|| invalid(&format!("Invalid field selection {text}")))?;
        selection.check(schema)?;
        Ok(selection)
    }

    /// Leaves out what was not selected. A list is selected from object by object.
    pub(crate) fn apply(&self, value: Value) -> Value {
        if self.names.is_empty() {
            return value;
        }
        match value {
            Value::Object(object) => Value::Object(self.apply_to_object(object)),
            Value::Array(values) => Value::Array(values.into_iter().map(|value| self.apply(value)).collect()),
            other => other,
        }
    }

    fn apply_to_object(&self, object: Object) -> Object {
        let any = self.names.get("*");
        let select = |(name, value): (String, Value)| {
            let selection = self.names.get(&name).or(any)?;
            Some((name, selection.apply(value)))
        };
        object.into_iter().filter_map(select).collect()
    }

    fn check(&self, schema: Schema) -> Result<(), ApiError> {
        for (name, selection) in &self.names {
            if name != "*" && !schema.names().contains(&name.as_str()) {
                return Err(invalid(&format!("Invalid field selection {name}")));
            }
            if let Some(below) = schema.below(name) {
                selection.check(below)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, name: String, selection: Self) {
        match self.names.get_mut(&name) {
            // `a,a(b)` is all of `a`.
            Some(known) if known.names.is_empty() || selection.names.is_empty() => *known = Self::default(),
            Some(known) => {
                for (name, selection) in selection.names {
                    known.add(name, selection);
                }
            }
            None => {
                self.names.insert(name, selection);
            }
        }
    }
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
}

impl Parser<'_> {
    fn all(mut self) -> Option<Selection> {
        let selection = self.list(0)?;
        self.rest.next().is_none().then_some(selection)
    }

    fn list(&mut self, depth: usize) -> Option<Selection> {
        if depth > DEEPEST {
            return None;
        }
        let mut selection = Selection::default();
        loop {
            let (name, below) = self.path(depth)?;
            selection.add(name, below);
            if self.rest.next_if_eq(&',').is_none() {
                return Some(selection);
            }
        }
    }

    fn path(&mut self, depth: usize) -> Option<(String, Selection)> {
        let mut name = String::new();
        while let Some(letter) =
            self.rest.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '*'))
        {
            name.push(letter);
        }
        if name.is_empty() || (name.contains('*') && name != "*") {
            return None;
        }
        if self.rest.next_if_eq(&'/').is_some() {
            if depth > DEEPEST {
                return None;
            }
            let (below, selection) = self.path(depth + 1)?;
            let mut names = BTreeMap::new();
            names.insert(below, selection);
            return Some((name, Selection { names }));
        }
        if self.rest.next_if_eq(&'(').is_some() {
            let selection = self.list(depth + 1)?;
            self.rest.next_if_eq(&')')?;
            return Some((name, selection));
        }
        Some((name, Selection::default()))
    }
}

fn invalid(message: &str) -> ApiError {
    ApiError::invalid_parameter("fields", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn select(text: &str, value: Value) -> Value {
        Selection::parse(text, Schema::User).expect(text).apply(value)
    }

    fn user() -> Value {
        json!({
            "id": "1",
            "name": {"givenName": "Ada", "familyName": "Berg", "fullName": "Ada Berg"},
            "emails": [{"address": "a@x", "type": "work"}, {"address": "b@x"}],
        })
    }

    #[test]
    fn paths_and_parentheses_select_the_same() {
        let both =
            json!({"name": {"givenName": "Ada", "familyName": "Berg"}, "emails": [{"type": "work"}, {}]});
        assert_eq!(select("name(givenName,familyName),emails/type", user()), both);
        assert_eq!(select("emails(type),name/givenName,name/familyName", user()), both);
    }

    #[test]
    fn star_selects_everything_on_its_level() {
        assert_eq!(select("*", user()), user());
        let first = json!({"id": "1", "name": {"givenName": "Ada"}, "emails": user()["emails"]});
        assert_eq!(select("*,name/givenName", user()), first);
    }

    #[test]
    fn the_wider_of_two_selections_wins() {
        assert_eq!(select("name/givenName,name", user()), json!({"name": user()["name"]}));
        assert_eq!(select("name,name/givenName", user()), json!({"name": user()["name"]}));
    }

    #[test]
    fn what_is_no_selection_is_refused() {
        let deep = "name(".repeat(10_000);
        let long = "name/".repeat(10_000);
        for text in
            ["", ",", "id,", "name(", "name()", "name)", "name/", "/id", "i d", "i*", "a(b", &deep, &long]
        {
            assert!(Selection::parse(text, Schema::User).is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_the_api_does_not_have_are_refused() {
        assert!(Selection::parse("users(id,mail)", Schema::Users).is_err());
        assert!(Selection::parse("user(id)", Schema::Users).is_err());
        assert!(Selection::parse("users/id,nextPageToken", Schema::Users).is_ok());
    }
}
