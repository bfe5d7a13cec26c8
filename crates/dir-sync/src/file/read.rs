//! Reads a directory file in one pass: an object is packed as soon as it is read, so the file itself is never in memory.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::packed::{Packed, PackedUser, Texts};
use crate::google::shape::{GroupShape, MemberShape, Shape, UserShape};
use crate::source::{Group, Member};

/// What stands in the file.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) customer_id: Option<String>,
    pub(super) users: Option<Vec<PackedUser>>,
    /// Each with whether the file says that it has members.
    pub(super) groups: Option<Vec<(Group, bool)>>,
    pub(super) members: Option<HashMap<String, Vec<Packed>>>,
    pub(super) texts: Texts,
}

impl<'de> Visitor<'de> for Content {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `customerId`, `users`, `groups`, `members`")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "customerId" => self.customer_id.replace(map.next_value()?).is_some(),
                "users" => {
                    let mut users = Vec::new();
                    let texts = &mut self.texts;
                    map.next_value_seed(Each::new(|user: UserShape| {
                        let user = user.into_item().map_err(|lacking| lacking.to_string())?;
                        users.extend(user.map(|user| texts.pack_user(&user)));
                        Ok(())
                    }))?;
                    self.users.replace(users).is_some()
                }
                "groups" => {
                    let mut groups = Vec::new();
                    map.next_value_seed(Each::new(|group: GroupShape| {
                        let has_members = group.says_it_has_members();
                        let group = group.into_item().map_err(|lacking| lacking.to_string())?;
                        groups.extend(group.map(|group| (group, has_members)));
                        Ok(())
                    }))?;
                    self.groups.replace(groups).is_some()
                }
                "members" => {
                    let members = map.next_value_seed(ByGroup(&mut self.texts))?;
                    self.members.replace(members).is_some()
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format_args!("`{key}` stands there twice")));
            }
        }
        Ok(self)
    }
}

/// A list whose elements are taken one by one.
struct Each<S, F> {
    take: F,
    shape: PhantomData<S>,
}

impl<S: Shape, F: FnMut(S) -> Result<(), String>> Each<S, F> {
    fn new(take: F) -> Self {
        Self { take, shape: PhantomData }
    }
}

impl<'de, S: Shape, F: FnMut(S) -> Result<(), String>> DeserializeSeed<'de> for Each<S, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, S: Shape, F: FnMut(S) -> Result<(), String>> Visitor<'de> for Each<S, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", S::KEY)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        while let Some(shape) = seq.next_element::<S>()? {
            (self.take)(shape).map_err(A::Error::custom)?;
        }
        Ok(())
    }
}

/// Members by group; a group that stands there twice is an error, where a map would keep the last one in silence.
struct ByGroup<'t>(&'t mut Texts);

impl<'de> DeserializeSeed<'de> for ByGroup<'_> {
    type Value = HashMap<String, Vec<Packed>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ByGroup<'_> {
    type Value = HashMap<String, Vec<Packed>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of members by group id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut by_group = HashMap::new();
        while let Some(group) = map.next_key::<String>()? {
            let mut members = Vec::new();
            map.next_value_seed(Each::new(|member: MemberShape| {
                let member = member.into_item();
                let member: Option<Member> =
                    member.map_err(|lacking| format!("in group `{group}`, {lacking}"))?;
                members.extend(member.map(|member| self.0.pack(&member)));
                Ok(())
            }))?;
            members.shrink_to_fit();
            if by_group.contains_key(&group) {
                return Err(A::Error::custom(format_args!("`members` has group `{group}` twice")));
            }
            by_group.insert(group, members);
        }
        Ok(by_group)
    }
}
