//! Every registered action with its row, found by name.
//!
//! In parts, each an immutable block of entries: a refresh copies those that change, and leaves all others in the caches of those
//! who ask. Where an entry lies is known from the tags of its part, eight of eight bits, as in the buckets of the users.

use std::collections::HashSet;
use std::sync::Arc;

use super::lanes::{LANES, first_place, has_empty_lane, lanes_of, next_lane, next_place, with_tag};
use super::row::Row;
use crate::name::{ActionName, hash_of};

/// Names up to this length lie beside their row, so that a look-up follows no pointer to compare them.
const NEAR: usize = 31;
/// The length of a name that lies elsewhere.
const FAR: u8 = u8::MAX;
/// How many actions a part holds on average at most. One in fifty is then not in its first part.
const FILL: usize = 5;

/// The actions of one state.
#[derive(Clone)]
pub(super) struct Actions {
    /// INVARIANT: one has an empty lane at least, so a search ends (held by `parts_are_enough_and_those_that_do_not_change_are_shared`).
    parts: Arc<[Part]>,
    count: usize,
}

#[derive(Clone, Default)]
struct Part {
    /// Of the entries in their order, and zeros behind them.
    tags: u64,
    entries: Arc<[Entry]>,
}

/// Two lines of memory. Where there are few nodes a look-up needs the first alone, and the counter of a part's owners, which a
/// refresh writes, lies in neither.
#[derive(Clone)]
#[repr(C, align(64))]
struct Entry {
    near: [u8; NEAR],
    length: u8,
    row: Row,
    far: Option<Arc<str>>,
}

impl Entry {
    fn new(name: &str, row: Row) -> Self {
        let mut near = [0; NEAR];
        match (near.get_mut(..name.len()), u8::try_from(name.len())) {
            (Some(place), Ok(length)) => {
                place.copy_from_slice(name.as_bytes());
                Self { near, length, row, far: None }
            }
            _ => Self { near, length: FAR, row, far: Some(name.into()) },
        }
    }

    #[inline]
    fn name(&self) -> &[u8] {
        match self.near.get(..usize::from(self.length)) {
            Some(near) => near,
            None => self.far.as_deref().unwrap_or_default().as_bytes(),
        }
    }
}

impl Actions {
    /// These actions, each name once.
    pub(super) fn of(named: impl ExactSizeIterator<Item = (impl AsRef<str>, Row)>) -> Self {
        Self::build(named.len(), named.map(|(name, row)| Entry::new(name.as_ref(), row)))
    }

    fn build(count: usize, entries: impl Iterator<Item = Entry>) -> Self {
        let mut drafts: Vec<(u64, Vec<Entry>)> = Vec::new();
        drafts.resize_with(count / FILL + 1, Default::default);
        let mut placed = 0;
        for entry in entries {
            let hash = hash_of(entry.name());
            let mut place = first_place(hash, drafts.len());
            for _ in 0..drafts.len() {
                match drafts.get_mut(place) {
                    Some((tags, entries)) if entries.len() < LANES => {
                        *tags = with_tag(*tags, entries.len(), hash);
                        entries.push(entry);
                        placed += 1;
                        break;
                    }
                    _ => place = next_place(place, drafts.len()),
                }
            }
        }
        let part = |(tags, entries): (u64, Vec<Entry>)| Part { tags, entries: entries.into() };
        Self { parts: drafts.into_iter().map(part).collect(), count: placed }
    }

    /// The row of an action.
    #[inline]
    pub(super) fn get(&self, name: &ActionName) -> Option<&Row> {
        let (part, lane) = self.find(name.as_str().as_bytes(), name.hash_code())?;
        Some(&self.parts.get(part)?.entries.get(lane)?.row)
    }

    /// The part and the lane of an action.
    #[inline]
    fn find(&self, name: &[u8], hash: u64) -> Option<(usize, usize)> {
        let mut place = first_place(hash, self.parts.len());
        for _ in 0..self.parts.len() {
            let part = self.parts.get(place)?;
            let mut lanes = lanes_of(part.tags, hash);
            while let Some(lane) = next_lane(&mut lanes) {
                if part.entries.get(lane).is_some_and(|entry| same_bytes(entry.name(), name)) {
                    return Some((place, lane));
                }
            }
            if has_empty_lane(part.tags) {
                return None;
            }
            place = next_place(place, self.parts.len());
        }
        None
    }

    /// These actions with other rows and more actions, and without those that are `gone`.
    pub(super) fn with(&self, changed: Vec<(Arc<str>, Row)>, gone: &HashSet<String>) -> Self {
        let mut next = self.clone();
        let mut new = Vec::new();
        for (name, row) in changed {
            let found = self.find(name.as_bytes(), hash_of(name.as_bytes()));
            let part = found.and_then(|(part, _)| Arc::make_mut(&mut next.parts).get_mut(part));
            match (part, found) {
                (Some(part), Some((_, lane))) => {
                    if let Some(entry) = Arc::make_mut(&mut part.entries).get_mut(lane) {
                        entry.row = row;
                    }
                }
                _ => new.push(Entry::new(&name, row)),
            }
        }
        if new.is_empty() && gone.is_empty() {
            return next;
        }
        // Actions come and go seldom, when services are rolled out.
        let stays = |entry: &&Entry| !std::str::from_utf8(entry.name()).is_ok_and(|name| gone.contains(name));
        let kept: Vec<Entry> = next.entries().filter(stays).cloned().chain(new).collect();
        Self::build(kept.len(), kept.into_iter())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries().filter_map(|entry| std::str::from_utf8(entry.name()).ok())
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.parts.iter().flat_map(|part| part.entries.iter())
    }

    /// What the actions take in memory, rows that are shared once.
    pub(super) fn bytes(&self) -> usize {
        // The counters of a part fill a line.
        let parts = self.parts.len() * (size_of::<Part>() + align_of::<Entry>());
        let far = |entry: &Entry| entry.far.as_ref().map_or(0, |name| name.len() + 2 * size_of::<usize>());
        let names = self.entries().map(far).sum::<usize>();
        let mut rows: Vec<&Row> = self.entries().map(|entry| &entry.row).collect();
        rows.sort_unstable_by_key(|row| row.address());
        rows.dedup_by_key(|row| row.address());
        let rows = rows.into_iter().map(Row::bytes).sum::<usize>();
        parts + self.count * size_of::<Entry>() + names + rows
    }
}

/// Whether two keys are equal. They are short, and a call of the general comparison costs more than this.
#[inline]
pub(super) fn same_bytes(one: &[u8], other: &[u8]) -> bool {
    if one.len() != other.len() {
        return false;
    }
    // The last eight bytes may overlap those compared before.
    let (Some(one_end), Some(other_end)) = (one.last_chunk::<8>(), other.last_chunk::<8>()) else {
        return one.iter().zip(other).all(|(one, other)| one == other);
    };
    let (ones, _) = one.as_chunks::<8>();
    let (others, _) = other.as_chunks::<8>();
    let mut differs = u64::from_ne_bytes(*one_end) ^ u64::from_ne_bytes(*other_end);
    for (one, other) in ones.iter().zip(others) {
        differs |= u64::from_ne_bytes(*one) ^ u64::from_ne_bytes(*other);
    }
    differs == 0
}

#[cfg(test)]
mod tests {
    use super::super::row::Reach;
    use super::*;

    fn row(node: u32) -> Row {
        Row::new([(node, 1)].into_iter())
    }

    fn get<'a>(actions: &'a Actions, name: &str) -> Option<&'a Row> {
        actions.get(&ActionName::stored(name.to_owned()))
    }

    fn reaches(actions: &Actions, name: &str, node: u32) -> bool {
        get(actions, name).unwrap().reach(&[node]) == Reach::Until(1)
    }

    #[test]
    fn names_of_every_length_are_found_replaced_and_removed() {
        let names: Vec<Arc<str>> = (1..=255).map(|length| "a".repeat(length).into()).collect();
        let rows = |by: u32| (by..).zip(&names).map(|(n, name)| (Arc::clone(name), row(n)));
        let before = Actions::of(rows(0).collect::<Vec<_>>().into_iter());
        let half = Actions::of(rows(0).step_by(2).collect::<Vec<_>>().into_iter());
        for old in [&before, &half, &Actions::of(Vec::<(&str, Row)>::new().into_iter())] {
            let after = old.with(rows(1).collect(), &HashSet::new());
            for (n, name) in (0_u32..).zip(&names) {
                assert!(reaches(&after, name, n + 1) && !reaches(&after, name, n), "{name}");
                assert!(reaches(&before, name, n), "{name}");
            }
            assert_eq!((after.names().count(), after.count), (255, 255));
            let even = names.iter().filter(|name| name.len() % 2 == 0).map(ToString::to_string);
            let gone: HashSet<String> = even.collect();
            // Together with rows that change, of those that go and of those that stay.
            let fewer = after.with(rows(2).skip(9).collect(), &gone);
            assert_eq!((fewer.names().count(), fewer.count), (128, 128));
            assert!(reaches(&fewer, &names[0], 1) && reaches(&fewer, &names[10], 12));
            let fewer = after.with(Vec::new(), &gone);
            for name in &names {
                assert_eq!(get(&fewer, name).is_none(), name.len() % 2 == 0, "{name}");
                assert!(get(&after, name).is_some(), "{name}");
            }
            assert!(get(&after, "").is_none() && get(&after, "b").is_none());
        }
    }

    #[test]
    fn parts_are_enough_and_those_that_do_not_change_are_shared() {
        for count in (0..200).chain([1_000, 5_000]) {
            let names: Vec<String> = (0..count).map(|n| format!("area{}.task{n}", n % 20)).collect();
            let actions = Actions::of(names.iter().map(|name| (name, row(7))));
            assert!(actions.parts.iter().any(|part| part.entries.len() < LANES));
            assert!(names.iter().all(|name| reaches(&actions, name, 7)));
            assert_eq!((actions.count, actions.names().count()), (count, count));
            assert!(get(&actions, "area.task").is_none());
            let Some(name) = names.last() else { continue };
            let changed = actions.with(vec![(name.as_str().into(), row(8))], &HashSet::new());
            assert!(reaches(&changed, name, 8) && reaches(&actions, name, 7));
            let other = |(one, other): (&Part, &Part)| !Arc::ptr_eq(&one.entries, &other.entries);
            assert_eq!(actions.parts.iter().zip(&*changed.parts).filter(|pair| other(*pair)).count(), 1);
        }
    }

    #[test]
    fn entry_of_few_nodes_is_in_one_line() {
        assert_eq!((size_of::<Entry>(), align_of::<Entry>()), (128, 64));
        let near = std::mem::offset_of!(Entry, length) + 1;
        assert_eq!((near, std::mem::offset_of!(Entry, row)), (32, 32));
    }

    #[test]
    fn bytes_are_the_same_only_if_all_are() {
        let key: Vec<u8> = (0..40).collect();
        for length in 0..=key.len() {
            assert!(same_bytes(&key[..length], &key.clone()[..length]));
            assert!(length == 0 || !same_bytes(&key[..length], &key[..length - 1]));
            for at in 0..length {
                let mut other = key[..length].to_vec();
                other[at] ^= 1;
                assert!(!same_bytes(&key[..length], &other), "{length} {at}");
            }
        }
    }
}
