//! The Directory API's objects as they stand in JSON, and what becomes of them here.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use crate::source::{Group, Member, MemberKind, Page, PageToken, User};

/// A user as sent.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(crate) struct UserShape {
    id: Option<String>,
    primary_email: Option<String>,
    name: Option<NameShape>,
    suspended: Option<bool>,
    archived: Option<bool>,
    customer_id: Option<String>,
    deletion_time: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
struct NameShape {
    full_name: Option<String>,
}

/// A group as sent.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object")]
pub(crate) struct GroupShape {
    id: Option<String>,
    email: Option<String>,
    name: Option<String>,
    description: Option<String>,
    // An int64, which the API writes as a string.
    direct_members_count: Option<Value>,
}

/// A member as sent.
#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
pub(crate) struct MemberShape {
    id: Option<String>,
    email: Option<String>,
    role: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// What an object lacks that it cannot do without.
#[derive(Debug, thiserror::Error)]
#[error("{object} has no {key}")]
pub(crate) struct Lacking {
    object: String,
    key: &'static str,
}

fn required(value: Option<String>, object: &str, key: &'static str) -> Result<String, Lacking> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| Lacking { object: object.to_owned(), key })
}

/// An object of a listing, and what it becomes.
pub(crate) trait Shape: for<'de> Deserialize<'de> {
    /// What the object becomes.
    type Item;
    /// The key of the collection in a listing.
    const KEY: &'static str;
    /// The `kind` of a listing.
    const KIND: &'static str;

    /// The item; `None` for what is not to be listed.
    fn into_item(self) -> Result<Option<Self::Item>, Lacking>;
}

impl Shape for UserShape {
    type Item = User;
    const KEY: &'static str = "users";
    const KIND: &'static str = "admin#directory#users";

    fn into_item(self) -> Result<Option<User>, Lacking> {
        if self.deletion_time.is_some() {
            return Ok(None);
        }
        let named = self.primary_email.as_deref().unwrap_or_default();
        let id = required(self.id, &format!("user `{named}`"), "id")?;
        let email = required(self.primary_email, &format!("user `{id}`"), "primaryEmail")?;
        Ok(Some(User {
            id,
            email,
            display_name: self.name.and_then(|name| name.full_name).unwrap_or_default(),
            suspended: [self.suspended, self.archived].contains(&Some(true)),
            customer_id: self.customer_id,
        }))
    }
}

impl GroupShape {
    /// Whether the directory says that the group has direct members.
    pub(crate) fn says_it_has_members(&self) -> bool {
        match &self.direct_members_count {
            None | Some(Value::Null) => false,
            Some(Value::String(count)) => count.trim() != "0",
            Some(count) => count.as_u64() != Some(0),
        }
    }
}

impl Shape for GroupShape {
    type Item = Group;
    const KEY: &'static str = "groups";
    const KIND: &'static str = "admin#directory#groups";

    fn into_item(self) -> Result<Option<Group>, Lacking> {
        let named = self.email.as_deref().unwrap_or_default();
        let id = required(self.id, &format!("group `{named}`"), "id")?;
        let email = required(self.email, &format!("group `{id}`"), "email")?;
        Ok(Some(Group {
            id,
            email,
            name: self.name.unwrap_or_default(),
            description: self.description.unwrap_or_default(),
        }))
    }
}

impl Shape for MemberShape {
    type Item = Member;
    const KEY: &'static str = "members";
    const KIND: &'static str = "admin#directory#members";

    fn into_item(self) -> Result<Option<Member>, Lacking> {
        let named = self.email.as_deref().unwrap_or_default();
        let id = required(self.id, &format!("member `{named}`"), "id")?;
        let kind = match required(self.kind, &format!("member `{id}`"), "type")? {
            kind if kind == "USER" => MemberKind::User,
            kind if kind == "GROUP" => MemberKind::Group,
            kind if kind == "CUSTOMER" => MemberKind::Customer,
            kind => MemberKind::Other(kind),
        };
        Ok(Some(Member {
            id,
            email: self.email.filter(|email| !email.is_empty()),
            role: self.role.unwrap_or_default(),
            kind,
        }))
    }
}

impl MemberShape {
    /// The member that was asked for by its id.
    ///
    /// # Errors
    /// What does not fit, as text without the answer's content.
    pub(crate) fn into_member(self, id: &str) -> Result<Member, String> {
        match self.into_item() {
            Ok(Some(member)) if member.id == id => Ok(member),
            Ok(Some(_) | None) => Err("it is of another member".to_owned()),
            Err(lacking) => Err(lacking.to_string()),
        }
    }
}

/// One page of a listing as sent. An empty collection omits its key, so it is the `kind` that tells an empty page from an
/// answer of something else.
#[derive(Debug)]
pub(crate) struct Answer<S> {
    kind: Option<String>,
    listed: Option<Vec<S>>,
    next: Option<String>,
}

impl<'de, S: Shape> Deserialize<'de> for Answer<S> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfAnswer<S>(PhantomData<S>);

        impl<'de, S: Shape> Visitor<'de> for OfAnswer<S> {
            type Value = Answer<S>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a page of a listing")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Answer<S>, A::Error> {
                let mut answer = Answer { kind: None, listed: None, next: None };
                while let Some(key) = map.next_key::<Cow<'_, str>>()? {
                    match key.as_ref() {
                        "kind" => answer.kind = map.next_value()?,
                        "nextPageToken" => answer.next = map.next_value()?,
                        key if key == S::KEY => answer.listed = Some(map.next_value()?),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(answer)
            }
        }

        deserializer.deserialize_map(OfAnswer(PhantomData))
    }
}

impl<S: Shape> Answer<S> {
    /// What is on the page.
    ///
    /// # Errors
    /// What does not fit, as text without the answer's content.
    pub(crate) fn into_page(self) -> Result<Page<S::Item>, String> {
        match (self.kind.as_deref(), &self.listed) {
            (Some(kind), _) if kind == S::KIND => {}
            (Some(kind), _) => return Err(format!("it is of kind `{kind}`, expected `{}`", S::KIND)),
            (None, Some(_)) => {}
            (None, None) => return Err(format!("it has neither `kind` nor `{}`", S::KEY)),
        }
        let shapes = self.listed.unwrap_or_default();
        let mut items = Vec::with_capacity(shapes.len());
        for shape in shapes {
            items.extend(shape.into_item().map_err(|lacking| lacking.to_string())?);
        }
        Ok(Page { items, next: self.next.filter(|token| !token.is_empty()).map(PageToken) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn page<S: Shape>(answer: Value) -> Result<Page<S::Item>, String> {
        serde_json::from_value::<Answer<S>>(answer).map_err(|error| error.to_string())?.into_page()
    }

    #[test]
    fn empty_page_has_its_kind_and_no_collection() {
        let empty = page::<GroupShape>(json!({"kind": "admin#directory#groups"})).unwrap();
        assert_eq!(empty, Page { items: vec![], next: None });
    }

    #[test]
    fn answer_of_something_else_is_no_empty_page() {
        for answer in
            [json!({}), json!([]), json!("ok"), json!({"ok": true}), json!({"kind": "admin#directory#users"})]
        {
            assert!(page::<GroupShape>(answer.clone()).is_err(), "{answer}");
        }
    }

    #[test]
    fn archived_user_is_suspended() {
        let answer = json!({"users": [{"id": "1", "primaryEmail": "a@example.com", "archived": true}]});
        assert!(page::<UserShape>(answer).unwrap().items[0].suspended);
    }

    #[test]
    fn user_being_deleted_is_not_listed() {
        let answer = json!({"users": [
            {"id": "2", "primaryEmail": "b@example.com", "deletionTime": "2026-01-01T00:00:00Z"},
            {"primaryEmail": "d@example.com", "deletionTime": "2026-01-01T00:00:00Z"},
            {"id": "3", "primaryEmail": "c@example.com"},
        ]});
        let ids: Vec<_> = page::<UserShape>(answer).unwrap().items.into_iter().map(|user| user.id).collect();
        assert_eq!(ids, ["3"]);
    }

    #[test]
    fn member_of_a_new_type_is_kept_by_its_name() {
        let answer = json!({"members": [{"id": "1", "type": "ROBOT"}, {"id": "C1", "type": "CUSTOMER"}]});
        let members = page::<MemberShape>(answer).unwrap().items;
        assert_eq!(members[0].kind, MemberKind::Other("ROBOT".to_owned()));
        assert_eq!(
            members[1],
            Member { id: "C1".into(), email: None, role: String::new(), kind: MemberKind::Customer }
        );
    }

    #[test]
    fn answer_about_another_member_is_not_taken() {
        let answer = |answer: Value| serde_json::from_value::<MemberShape>(answer).unwrap().into_member("1");
        assert_eq!(answer(json!({"id": "1", "type": "USER", "role": "OWNER"})).unwrap().role, "OWNER");
        for other in [json!({}), json!({"id": "1"}), json!({"id": "2", "type": "USER"})] {
            assert!(answer(other.clone()).is_err(), "{other}");
        }
    }

    #[test]
    fn object_without_its_id_spoils_the_page() {
        assert!(
            page::<MemberShape>(json!({"members": [{"type": "USER", "email": "a@example.com"}]})).is_err()
        );
        assert!(page::<GroupShape>(json!({"groups": [{"email": "g@example.com"}]})).is_err());
        // To leave one out would be to take it for gone.
        let problem = page::<UserShape>(json!({"users": [{"primaryEmail": "a@example.com"}]})).unwrap_err();
        assert_eq!(problem, "user `a@example.com` has no id");
    }
}
