//! The users and members of a directory file: a person is in ten groups, so each text is kept once.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use crate::source::{Member, MemberKind, User};

/// Every text once, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Texts {
    hasher: RandomState,
    all: String,
    places: Vec<(usize, u32)>,
    /// By the hash of the text; of two texts with one hash the second is kept anew each time.
    known: HashMap<u64, u32>,
    /// The kinds and roles that there are, few.
    whats: Vec<(MemberKind, String)>,
    known_whats: HashMap<(MemberKind, String), u32>,
}

/// A member whose texts are kept elsewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packed {
    id: u32,
    /// [`NONE`] for none.
    email: u32,
    what: u32,
}

/// A user whose texts are kept elsewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct PackedUser {
    id: u32,
    email: u32,
    display_name: u32,
    /// [`NONE`] for none.
    customer_id: u32,
    suspended: bool,
}

const NONE: u32 = u32::MAX;

impl Texts {
    fn keep(&mut self, text: &str) -> u32 {
        let hash = self.hasher.hash_one(text);
        if let Some(known) = self.known.get(&hash)
            && self.get(*known) == text
        {
            return *known;
        }
        let number = self.keep_anew(text);
        self.known.entry(hash).or_insert(number);
        number
    }

    /// Of texts that hardly ever come twice.
    fn keep_anew(&mut self, text: &str) -> u32 {
        // Four thousand million texts are more than any file has.
        let number = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
        self.places.push((self.all.len(), u32::try_from(text.len()).unwrap_or(u32::MAX)));
        self.all.push_str(text);
        number
    }

    fn get(&self, number: u32) -> &str {
        let place = self.places.get(number as usize);
        place.and_then(|(start, length)| self.all.get(*start..start + *length as usize)).unwrap_or_default()
    }

    /// Packs a user.
    pub(super) fn pack_user(&mut self, user: &User) -> PackedUser {
        PackedUser {
            id: self.keep(&user.id),
            email: self.keep(&user.email),
            display_name: self.keep_anew(&user.display_name),
            customer_id: user.customer_id.as_ref().map_or(NONE, |id| self.keep(id)),
            suspended: user.suspended,
        }
    }

    /// The user as it was.
    pub(super) fn unpack_user(&self, user: PackedUser) -> User {
        User {
            id: self.get(user.id).to_owned(),
            email: self.get(user.email).to_owned(),
            display_name: self.get(user.display_name).to_owned(),
            suspended: user.suspended,
            customer_id: (user.customer_id != NONE).then(|| self.get(user.customer_id).to_owned()),
        }
    }

    /// Packs a member.
    pub(super) fn pack(&mut self, member: &Member) -> Packed {
        Packed {
            id: self.keep(&member.id),
            email: member.email.as_ref().map_or(NONE, |email| self.keep(email)),
            what: self.keep_what((member.kind.clone(), member.role.clone())),
        }
    }

    fn keep_what(&mut self, what: (MemberKind, String)) -> u32 {
        let whats = &mut self.whats;
        *self.known_whats.entry(what).or_insert_with_key(|what| {
            whats.push(what.clone());
            u32::try_from(whats.len() - 1).unwrap_or(NONE)
        })
    }

    /// Nothing more will be packed.
    pub(super) fn close(&mut self) {
        self.known = HashMap::new();
        self.known_whats = HashMap::new();
        self.all.shrink_to_fit();
        self.places.shrink_to_fit();
    }

    /// The member's id.
    pub(super) fn id(&self, member: Packed) -> &str {
        self.get(member.id)
    }

    /// The member as it was.
    pub(super) fn unpack(&self, member: Packed) -> Member {
        let (kind, role) = match self.whats.get(member.what as usize) {
            Some((kind, role)) => (kind.clone(), role.clone()),
            None => (MemberKind::Other(String::new()), String::new()),
        };
        Member {
            id: self.get(member.id).to_owned(),
            email: (member.email != NONE).then(|| self.get(member.email).to_owned()),
            role,
            kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_member_is_the_same_again_and_its_texts_are_kept_once() {
        let member = |id: &str, email: Option<&str>, kind: MemberKind| Member {
            id: id.to_owned(),
            email: email.map(str::to_owned),
            role: "MEMBER".to_owned(),
            kind,
        };
        let members = [
            member("1", Some("a@example.com"), MemberKind::User),
            member("1", Some("a@example.com"), MemberKind::Group),
            member("C1", None, MemberKind::Customer),
            member("1", Some(""), MemberKind::Other("BOT".to_owned())),
        ];
        let mut texts = Texts::default();
        let packed = members.each_ref().map(|member| texts.pack(member));
        assert_eq!(packed.map(|member| texts.unpack(member)), members);
        texts.close();
        assert_eq!(packed.map(|member| texts.unpack(member)), members);
        assert_eq!(texts.places.len(), 4, "two ids, two addresses");
    }

    #[test]
    fn packed_user_is_the_same_again() {
        let user = |id: &str, display_name: &str, customer_id: Option<&str>, suspended| User {
            id: id.to_owned(),
            email: format!("{id}@example.com"),
            display_name: display_name.to_owned(),
            suspended,
            customer_id: customer_id.map(str::to_owned),
        };
        let users = [
            user("1", "Ada", Some("C1"), false),
            user("2", "", None, true),
            user("1", "Ada", Some("C1"), false),
            user("", "Zoë", Some(""), false),
        ];
        let mut texts = Texts::default();
        let packed = users.each_ref().map(|user| texts.pack_user(user));
        texts.close();
        assert_eq!(packed.map(|user| texts.unpack_user(user)), users);
    }
}
