//! Every registered action with its row, found by name.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use super::row::Row;

/// Names up to this length lie beside their row, so that a look-up follows no pointer to compare them.
const NEAR: usize = 32;

/// The actions of one state.
#[derive(Clone, Default)]
pub(super) struct Actions {
    hasher: RandomState,
    table: HashTable<Entry>,
}

#[derive(Clone)]
struct Entry {
    name: Name,
    row: Row,
}

#[derive(Clone)]
enum Name {
    Near { length: u8, bytes: [u8; NEAR] },
    Far(Arc<str>),
}

impl Name {
    fn new(name: &str) -> Self {
        let mut bytes = [0; NEAR];
        match (u8::try_from(name.len()), bytes.get_mut(..name.len())) {
            (Ok(length), Some(place)) => {
                place.copy_from_slice(name.as_bytes());
                Self::Near { length, bytes }
            }
            _ => Self::Far(name.into()),
        }
    }

    #[inline]
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Near { length, bytes } => bytes.get(..usize::from(*length)).unwrap_or_default(),
            Self::Far(name) => name.as_bytes(),
        }
    }
}

impl Actions {
    #[inline]
    pub(super) fn get(&self, name: &str) -> Option<&Row> {
        let found = self
            .table
            .find(self.hash(name.as_bytes()), |entry| same_bytes(entry.name.as_bytes(), name.as_bytes()));
        found.map(|entry| &entry.row)
    }

    pub(super) fn insert(&mut self, name: &str, row: Row) {
        let hasher = &self.hasher;
        let entry = self.table.entry(
            hash(hasher, name.as_bytes()),
            |entry| entry.name.as_bytes() == name.as_bytes(),
            |entry| hash(hasher, entry.name.as_bytes()),
        );
        entry.insert(Entry { name: Name::new(name), row });
    }

    pub(super) fn remove(&mut self, name: &str) {
        let hash = self.hash(name.as_bytes());
        if let Ok(entry) = self.table.find_entry(hash, |entry| entry.name.as_bytes() == name.as_bytes()) {
            entry.remove();
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.table.iter().filter_map(|entry| std::str::from_utf8(entry.name.as_bytes()).ok())
    }

    /// What the actions take in memory, rows that are shared once.
    pub(super) fn bytes(&self) -> usize {
        let table = self.table.capacity() * (size_of::<Entry>() + 1) * 8 / 7;
        let far = |entry: &Entry| match &entry.name {
            Name::Near { .. } => 0,
            Name::Far(name) => name.len() + 2 * size_of::<usize>(),
        };
        let names = self.table.iter().map(far).sum::<usize>();
        let mut rows: Vec<&Row> = self.table.iter().map(|entry| &entry.row).collect();
        rows.sort_unstable_by_key(|row| row.address());
        rows.dedup_by_key(|row| row.address());
        table + names + rows.into_iter().map(Row::bytes).sum::<usize>()
    }

    #[inline]
    fn hash(&self, name: &[u8]) -> u64 {
        hash(&self.hasher, name)
    }
}

#[inline]
fn hash(hasher: &RandomState, name: &[u8]) -> u64 {
    let mut state = hasher.build_hasher();
    state.write(name);
    state.finish()
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
    use super::*;

    #[test]
    fn names_of_every_length_are_found_replaced_and_removed() {
        let names: Vec<String> = (1..=255).map(|length| "a".repeat(length)).collect();
        let mut actions = Actions::default();
        for (n, name) in (0_u32..).zip(&names) {
            actions.insert(name, Row::new([(n, 1)].into_iter()));
        }
        for (n, name) in (0_u32..).zip(&names) {
            actions.insert(name, Row::new([(n + 1, 1)].into_iter()));
        }
        for (n, name) in (0_u32..).zip(&names) {
            let row = actions.get(name).unwrap();
            assert_eq!(row.reach(&[n + 1]), super::super::row::Reach::Until(1), "{name}");
            assert_eq!(row.reach(&[n]), super::super::row::Reach::Never, "{name}");
        }
        assert_eq!(actions.names().count(), 255);
        for name in names.iter().step_by(2) {
            actions.remove(name);
        }
        for (n, name) in names.iter().enumerate() {
            assert_eq!(actions.get(name).is_none(), n % 2 == 0, "{name}");
        }
        assert!(actions.get("").is_none());
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
