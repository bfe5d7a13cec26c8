//! Members of groups that the mirror may have no members of, held in memory as numbers: a person is in many groups, and what
//! is not staged need not be joined, sorted and cleared away again.

use std::collections::HashMap;

use hashbrown::HashTable;

use super::known::{Hasher, place};
use super::members::{Staged, StagedMembers};
use crate::group::Role;

/// What is held at most; past it all is staged.
#[derive(Clone, Copy)]
struct Room {
    /// Four bytes each.
    memberships: usize,
    /// Bytes of the people, their ids and names included.
    people: usize,
}

const ROOM: Room = Room { memberships: 2_000_000, people: 32 << 20 };

/// One membership: the number of a person, or what an apply makes of it, and the role.
pub(super) type Membership = u32;
/// Bits of a [`Membership`] that are the role's.
const ROLE: u32 = 2;

/// The groups.
pub(super) struct Held {
    people: People,
    groups: HashMap<String, Vec<Membership>>,
    memberships: usize,
    room: Room,
    /// There was no room for all, so there is room for none.
    is_full: bool,
}

impl Default for Held {
    fn default() -> Self {
        Self::new(Hasher::default())
    }
}

/// Everybody who is in one of the groups, once.
#[derive(Default)]
struct People {
    hasher: Hasher,
    /// Numbers, by print.
    numbers: HashTable<u32>,
    all: Vec<Person>,
    /// Of each the id and the name.
    text: String,
}

struct Person {
    print: u128,
    start: u32,
    id: u32,
    name: Option<u16>,
}

/// What became of members that were to be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// They are held.
    Yes,
    /// They are not such as can be.
    No,
    /// There is no room, and from now on for none: what is held already is to be staged too.
    Full,
}

impl Held {
    /// With this hasher, so that its prints are those of the known users.
    pub(super) fn new(hasher: Hasher) -> Self {
        let people = People { hasher, ..People::default() };
        Self { people, groups: HashMap::new(), memberships: 0, room: ROOM, is_full: false }
    }

    /// Takes the members of a group, if all of them are users.
    pub(super) fn take(&mut self, group: &str, members: &StagedMembers) -> Taken {
        if self.is_full {
            return Taken::No;
        }
        self.remove(group);
        let room = self.room;
        if self.memberships + members.len() > room.memberships
            || self.people.bytes() + members.text_len() > room.people
        {
            self.is_full = true;
            return Taken::Full;
        }
        if !members.iter().all(|member| member.is_user()) {
            return Taken::No;
        }
        let mut numbers = Vec::with_capacity(members.len());
        for member in members.iter() {
            let Some(number) = self.people.number(&member) else { return Taken::No };
            numbers.push(number << ROLE | code_of(member.role));
        }
        self.memberships += numbers.len();
        self.groups.insert(group.to_owned(), numbers);
        Taken::Yes
    }

    /// Forgets a group. Says whether it was held.
    pub(super) fn remove(&mut self, group: &str) -> bool {
        let members = self.groups.remove(group);
        self.memberships -= members.as_ref().map_or(0, Vec::len);
        members.is_some()
    }

    /// Takes a group out, to be staged.
    pub(super) fn take_out(&mut self, group: &str) -> Option<StagedMembers> {
        let members = self.groups.remove(group)?;
        self.memberships -= members.len();
        Some(self.people.members(&members))
    }

    /// The groups for which `keeps` does not hold, or that have somebody for whom `fits` does not.
    pub(super) fn unfit(&self, keeps: impl Fn(&str) -> bool, fits: impl Fn(u128) -> bool) -> Vec<String> {
        let fit: Vec<bool> = self.people.all.iter().map(|person| fits(person.print)).collect();
        let fits = |member: &Membership| fit.get((member >> ROLE) as usize).copied().unwrap_or_default();
        let unfit = self.groups.iter().filter(|(group, members)| !(keeps(group) && members.iter().all(fits)));
        unfit.map(|(group, _)| group.clone()).collect()
    }

    /// Gives the memory back, when no group is held and none will be.
    pub(super) fn forget_people(&mut self) {
        self.people = People { hasher: self.people.hasher.clone(), ..People::default() };
    }

    pub(super) fn hasher(&self) -> &Hasher {
        &self.people.hasher
    }

    /// How many memberships are held.
    pub(super) fn len(&self) -> usize {
        self.memberships
    }

    /// The groups that are held, those without members included.
    pub(super) fn groups(&self) -> impl Iterator<Item = &str> {
        self.groups.keys().map(String::as_str)
    }

    /// Whether no group is held.
    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
}

impl People {
    /// The number of whoever has this id and this name; `None` if the id has another name.
    fn number(&mut self, member: &Staged<'_>) -> Option<u32> {
        let print = self.hasher.of_id(member.id);
        let found = self.numbers.find(place(print), |number| {
            self.all.get(*number as usize).is_some_and(|person| person.print == print)
        });
        if let Some(number) = found {
            let person = self.all.get(*number as usize)?;
            return (self.name(person) == member.name).then_some(*number);
        }
        let number = u32::try_from(self.all.len()).ok()?;
        let start = u32::try_from(self.text.len()).ok()?;
        self.text.push_str(member.id);
        self.text.push_str(member.name.unwrap_or_default());
        // A name has at most 320 bytes.
        let name = member.name.map(|name| u16::try_from(name.len()).unwrap_or(u16::MAX));
        self.all.push(Person { print, start, id: u32::try_from(member.id.len()).ok()?, name });
        let all = &self.all;
        self.numbers.insert_unique(place(print), number, |number| {
            all.get(*number as usize).map_or(0, |person| place(person.print))
        });
        Some(number)
    }

    /// What they take in memory, or a little less.
    fn bytes(&self) -> usize {
        self.text.len() + self.all.len() * (size_of::<Person>() + size_of::<u32>())
    }

    fn id(&self, person: &Person) -> &str {
        let start = person.start as usize;
        self.text.get(start..start + person.id as usize).unwrap_or_default()
    }

    fn name(&self, person: &Person) -> Option<&str> {
        let start = person.start as usize + person.id as usize;
        let name = person.name?;
        self.text.get(start..start + usize::from(name))
    }

    /// As they were staged.
    fn members(&self, members: &[Membership]) -> StagedMembers {
        let mut staged = StagedMembers::default();
        for member in members {
            if let Some(person) = self.all.get((member >> ROLE) as usize) {
                staged.push_user(self.id(person), self.name(person), role_of(*member));
            }
        }
        staged
    }
}

/// The memberships as an apply writes them: by the mirror's numbers of groups and users.
pub(super) struct Numbered {
    /// The users' numbers, ascending. A membership says which of them it is of.
    users: Vec<i64>,
    /// In the order of the groups' numbers, each with its members in the order of theirs.
    groups: Vec<(i64, Vec<Membership>)>,
}

impl Held {
    /// By these numbers of users and groups; whoever has none is left out.
    pub(super) fn numbered(
        self,
        users: impl Fn(u128) -> Option<i64>,
        groups: impl Fn(&str) -> Option<i64>,
    ) -> Numbered {
        let found: Vec<Option<i64>> = self.people.all.iter().map(|person| users(person.print)).collect();
        let mut users: Vec<i64> = found.iter().copied().flatten().collect();
        users.sort_unstable();
        users.dedup();
        let rank_of = |id: i64| users.binary_search(&id).ok().and_then(|rank| u32::try_from(rank).ok());
        let ranks: Vec<Option<u32>> = found.into_iter().map(|id| id.and_then(rank_of)).collect();
        let ranked = |member: Membership| {
            let rank = ranks.get((member >> ROLE) as usize).copied().flatten()?;
            Some(rank << ROLE | member & ((1 << ROLE) - 1))
        };
        let numbered = self.groups.into_iter().filter_map(|(group, members)| {
            let mut members: Vec<Membership> = members.into_iter().filter_map(ranked).collect();
            members.sort_unstable();
            Some((groups(&group)?, members))
        });
        let mut groups: Vec<_> = numbered.collect();
        groups.sort_unstable_by_key(|(group_id, _)| *group_id);
        Numbered { users, groups }
    }
}

impl Numbered {
    /// Each as group, user and role, group by group.
    pub(super) fn iter(&self) -> impl Iterator<Item = (i64, i64, Role)> {
        self.groups.iter().flat_map(|(group_id, members)| {
            members.iter().filter_map(|member| {
                let user_id = self.users.get((member >> ROLE) as usize)?;
                Some((*group_id, *user_id, role_of(*member)))
            })
        })
    }
}

fn code_of(role: Role) -> u32 {
    match role {
        Role::Owner => 0,
        Role::Manager => 1,
        Role::Member => 2,
    }
}

fn role_of(member: Membership) -> Role {
    match member & ((1 << ROLE) - 1) {
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

    fn member(id: &str, role: Role) -> StagedMember {
        let name = UserName::parse(&format!("{id}@example.com")).ok();
        StagedMember::User { external_id: id.to_owned(), name, role }
    }

    fn members(of: &[(&str, Role)]) -> StagedMembers {
        of.iter().map(|(id, role)| member(id, *role)).collect()
    }

    fn told(members: &StagedMembers) -> Vec<(String, Option<String>, Role)> {
        let told = |m: Staged<'_>| (m.id.to_owned(), m.name.map(str::to_owned), m.role);
        members.iter().map(told).collect()
    }

    #[test]
    fn what_is_taken_comes_out_as_it_was() {
        let mut held = Held::default();
        let mut all: StagedMembers =
            members(&[("1", Role::Owner), ("2", Role::Manager), ("3", Role::Member)]);
        all.push(&StagedMember::User { external_id: String::new(), name: None, role: Role::Member });
        let again = members(&[("2", Role::Owner), ("1", Role::Member)]);
        assert_eq!(held.take("a", &all), Taken::Yes);
        assert_eq!(held.take("b", &again), Taken::Yes);
        assert_eq!(held.take("c", &StagedMembers::default()), Taken::Yes);
        assert_eq!((held.len(), held.people.all.len()), (6, 4));
        assert_eq!(told(&held.take_out("a").unwrap()), told(&all));
        assert_eq!(told(&held.take_out("b").unwrap()), told(&again));
        assert!(held.take_out("b").is_none() && held.remove("c") && !held.remove("c"));
        assert_eq!((held.len(), held.groups().count()), (0, 0));
    }

    #[test]
    fn groups_and_people_of_two_names_are_not_held() {
        let mut held = Held::default();
        let nested = StagedMember::Group { external_id: "1".to_owned() };
        let with =
            |other: StagedMember| [member("2", Role::Member), other].into_iter().collect::<StagedMembers>();
        assert_eq!(held.take("a", &with(nested)), Taken::No);
        assert_eq!(held.take("a", &with(StagedMember::Everyone)), Taken::No);
        assert_eq!(held.take("a", &members(&[("1", Role::Member)])), Taken::Yes);
        let nameless = StagedMember::User { external_id: "1".to_owned(), name: None, role: Role::Member };
        assert_eq!(held.take("b", &with(nameless)), Taken::No);
        let renamed = UserName::parse("other@example.com").ok();
        let renamed = StagedMember::User { external_id: "1".to_owned(), name: renamed, role: Role::Member };
        assert_eq!(held.take("b", &with(renamed)), Taken::No);
        assert_eq!(held.groups().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn where_there_is_no_room_there_is_none_for_what_comes_later() {
        for room in [Room { memberships: 3, people: 1 << 10 }, Room { memberships: 100, people: 120 }] {
            let mut held = Held { room, ..Held::default() };
            assert_eq!(held.take("a", &members(&[("1", Role::Member), ("2", Role::Member)])), Taken::Yes);
            assert_eq!(held.take("b", &members(&[("3", Role::Member), ("4", Role::Member)])), Taken::Full);
            assert_eq!(held.take("c", &members(&[])), Taken::No);
            assert_eq!(held.take_out("a").unwrap().len(), 2);
        }
    }

    #[test]
    fn groups_with_others_than_were_asked_for_are_told() {
        let mut held = Held::default();
        for (group, of) in [("a", ["1", "2"]), ("b", ["2", "3"]), ("c", ["1", "1"])] {
            assert_eq!(held.take(group, &members(&of.map(|id| (id, Role::Member)))), Taken::Yes);
        }
        let print = |id: &str| held.hasher().of_id(id);
        let unfit = |keeps: &[&str], fits: &[&str]| {
            let fits: Vec<u128> = fits.iter().copied().map(print).collect();
            let mut unfit = held.unfit(|group| keeps.contains(&group), |print| fits.contains(&print));
            unfit.sort_unstable();
            unfit.concat()
        };
        assert_eq!(unfit(&["a", "b", "c"], &["1", "2", "3"]), "");
        assert_eq!(unfit(&["a", "b", "c"], &["1", "2"]), "b");
        assert_eq!(unfit(&["b", "c"], &["1", "2"]), "ab");
        assert_eq!(unfit(&[], &["1", "2", "3"]), "abc");
    }

    #[test]
    fn memberships_have_the_numbers_of_the_mirror_in_their_order() {
        let mut held = Held::default();
        let (ada, bo, cy) = (("ada", Role::Owner), ("bo", Role::Manager), ("cy", Role::Member));
        for (group, of) in
            [("a", vec![ada, bo, cy]), ("b", vec![cy, ada]), ("gone", vec![bo]), ("none", vec![])]
        {
            assert_eq!(held.take(group, &members(&of)), Taken::Yes);
        }
        let prints = ["ada", "bo", "cy"].map(|id| held.hasher().of_id(id));
        // Bo has no number.
        let users = |print| {
            [(prints[0], 70), (prints[2], 7)].into_iter().find(|user| user.0 == print).map(|user| user.1)
        };
        let groups =
            |group: &str| [("a", 20), ("b", 3), ("none", 1)].into_iter().find(|g| g.0 == group).map(|g| g.1);
        let numbered = held.numbered(users, groups);
        let wanted =
            [(3, 7, Role::Member), (3, 70, Role::Owner), (20, 7, Role::Member), (20, 70, Role::Owner)];
        assert_eq!(numbered.iter().collect::<Vec<_>>(), wanted);
    }
}
