//! Who there is: every user under the name, with the nodes through which grants reach the user.
//!
//! A fixed number of shards, each one immutable block of words, so that a look-up touches one bucket and one entry,
//! and a change rebuilds one small block:
//!
//! ```text
//! users, memberships | bucket: eight tags (2), eight offsets (4) | … | entry: shape, nodes, key (padded), user_id (2) | …
//! ```
//!
//! The nodes are a sorted list, or a [`NodeSet`] in every entry where there are few nodes in all. They come first, so that
//! where they are is known with the entry; what a check does not read comes last, for what it takes is the memory that it
//! touches.
//!
//! The key of an entry is the user's name. An entry under a `sub` has the name behind the id: its length and the name,
//! padded.

mod build;

use std::sync::Arc;

pub(super) use self::build::{Builder, Built};

use self::build::assemble;
use super::actions::same_bytes;
use super::lanes::{LANES, first_place, has_empty_lane, lanes_of, next_lane, next_place};
use super::row::{self, FEW_NODES, NodeSet, Reach, Row};
use crate::error::Error;
use crate::name::{UserName, hash_of};

const HEADER: usize = 2;
/// The words of a bucket: a tag of 8 bits and an offset of 16 for each of its entries.
const TAGS: usize = LANES / 4;
const BUCKET: usize = TAGS + LANES / 2;
/// Words of an entry before its nodes, and those of the id behind its key.
const ENTRY: usize = 1;
const ID: usize = 2;
const NAME_BITS: u32 = 11;
const NODE_BITS: u32 = 20;
/// Marks an entry under another key than the name (the `sub`): it is not counted as a user.
const ALIAS: u8 = 0;

/// The users of one state.
#[derive(Clone)]
pub(super) struct Users {
    shift: u32,
    shards: Arc<[Shard]>,
    nodes_are: Nodes,
    /// How many users, memberships and bytes, all shards together.
    pub(super) count: usize,
    pub(super) memberships: usize,
    pub(super) bytes: usize,
}

#[derive(Clone)]
struct Shard {
    /// Out here, or a look-up would have to fetch one more line of memory before it knows which.
    buckets: u32,
    /// Entries lie at multiples of two to the power of this, so that sixteen bits say where.
    unit: u32,
    words: Arc<[u32]>,
}

/// How entries hold nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nodes {
    /// As a sorted list of words.
    Listed,
    /// As a sorted list of half words.
    Short,
    /// As a [`NodeSet`].
    Few,
}

impl Nodes {
    /// How to hold so many nodes, and those that come until the next full load.
    pub(super) const fn of(count: usize) -> Self {
        match count {
            _ if count <= Self::Few.most() / 4 * 3 => Self::Few,
            _ if count <= Self::Short.most() / 4 * 3 => Self::Short,
            _ => Self::Listed,
        }
    }

    /// Whether entries can hold every one of so many nodes.
    pub(super) const fn hold(self, count: usize) -> bool {
        count <= self.most()
    }

    const fn most(self) -> usize {
        match self {
            Self::Listed => u32::MAX as usize,
            Self::Short => 1 << u16::BITS,
            Self::Few => FEW_NODES,
        }
    }

    /// The words of so many nodes, by the shape of an entry.
    #[inline]
    const fn words(self, nodes: usize) -> usize {
        match self {
            Self::Listed => nodes,
            Self::Short => nodes.div_ceil(2),
            Self::Few => size_of::<NodeSet>() / 4,
        }
    }

    fn write(self, nodes: &[u32], words: &mut Vec<u32>) -> Result<(), Unfit> {
        match self {
            Self::Listed => words.extend_from_slice(nodes),
            Self::Short => {
                for pair in nodes.chunks(2) {
                    let mut halves = [0; 2];
                    for (half, node) in halves.iter_mut().zip(pair) {
                        *half = u16::try_from(*node).map_err(|_| Unfit)?;
                    }
                    words.push(bytemuck::cast(halves));
                }
            }
            Self::Few => words.extend(row::set_of(nodes).ok_or(Unfit)?),
        }
        Ok(())
    }
}

/// What is known of one user.
#[derive(Clone, Copy)]
pub(super) struct User<'a> {
    pub(super) id: i64,
    pub(super) suspended: bool,
    key: &'a [u8],
    /// How many nodes.
    nodes: usize,
    /// The nodes, as [`Users`] holds them.
    words: &'a [u32],
}

/// What a user is looked up by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key<'a> {
    bytes: &'a [u8],
    hash: u64,
}

impl<'a> Key<'a> {
    #[inline]
    pub(super) fn of_name(name: &'a UserName) -> Self {
        Self { bytes: name.as_str().as_bytes(), hash: name.hash_code() }
    }

    pub(super) fn of_bytes(bytes: &'a [u8]) -> Self {
        Self { bytes, hash: hash_of(bytes) }
    }
}

/// A user to be put in, under one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NewUser {
    pub(super) id: i64,
    pub(super) suspended: bool,
    pub(super) key: Vec<u8>,
    /// Kept if the key is a `sub`.
    pub(super) name: String,
    /// Sorted.
    pub(super) nodes: Vec<u32>,
}

/// Two users under one key, which the database does not allow, a node past [`Nodes::hold`], or so many more users than at the last
/// full load that the shards are too few: the state is not what it was taken for.
#[derive(Debug)]
pub(super) struct Unfit;

/// The key of a user's `sub`. Names hold no control characters, so it is no name.
pub(super) fn sub_key(sub: &str) -> Vec<u8> {
    [&[ALIAS], sub.as_bytes()].concat()
}

/// The same without an allocation for every `sub` that OpenID Connect allows.
pub(super) fn with_sub_key<T>(sub: &str, use_key: impl FnOnce(Key<'_>) -> T) -> T {
    let mut buffer = [ALIAS; 256];
    match buffer.get_mut(1..=sub.len()) {
        Some(place) => {
            place.copy_from_slice(sub.as_bytes());
            use_key(Key::of_bytes(buffer.get(..=sub.len()).unwrap_or_default()))
        }
        None => use_key(Key::of_bytes(&sub_key(sub))),
    }
}

impl Users {
    /// The user under a key: one bucket, one entry.
    #[inline]
    pub(super) fn get(&self, key: Key<'_>) -> Option<User<'_>> {
        self.find(key).map(|(user, _)| user)
    }

    /// What of a row reaches a user.
    #[inline]
    pub(super) fn reach(&self, user: User<'_>, row: &Row) -> Reach {
        match self.nodes_are {
            Nodes::Few => user.words.as_array().map_or(Reach::Never, |set| row.reach_set(set)),
            Nodes::Short => {
                let nodes = bytemuck::cast_slice::<u32, u16>(user.words);
                nodes.get(..user.nodes).map_or(Reach::Never, |nodes| row.reach(nodes))
            }
            Nodes::Listed => row.reach(user.words),
        }
    }

    /// How entries hold nodes.
    pub(super) const fn nodes_are(&self) -> Nodes {
        self.nodes_are
    }

    /// The name of the user under the key of a `sub`.
    pub(super) fn name_of(&self, key: Key<'_>) -> Option<UserName> {
        let (user, behind) = self.find(key)?;
        let name = name_behind(user.key, behind)?;
        std::str::from_utf8(name).ok().map(|name| UserName::stored(name.to_owned()))
    }

    /// The user under a key, and the words behind the key.
    #[inline]
    fn find(&self, Key { bytes: key, hash }: Key<'_>) -> Option<(User<'_>, &[u32])> {
        let shard = self.shards.get(shard_of(hash, self.shift))?;
        let mut bucket = first_place(hash, shard.buckets as usize);
        for _ in 0..shard.buckets {
            let (tags, offsets) = bucket_at(&shard.words, bucket)?;
            let mut lanes = lanes_of(tags, hash);
            while let Some(lane) = next_lane(&mut lanes) {
                let offset = offset_in(offsets, lane)?;
                let found = user_at(&shard.words, offset << shard.unit, self.nodes_are)?;
                if same_bytes(found.0.key, key) {
                    return Some(found);
                }
            }
            if has_empty_lane(tags) {
                return None;
            }
            bucket = next_place(bucket, shard.buckets as usize);
        }
        None
    }

    /// These users with others in place of those whose ids are in `ids`. With `everywhere` their old entries are
    /// looked for in all shards; without, only where the new ones go.
    ///
    /// # Errors
    /// [`Unfit`].
    pub(super) fn replace(
        &self,
        ids: &std::collections::HashSet<i64>,
        everywhere: bool,
        added: &[NewUser],
    ) -> Result<Self, Unfit> {
        let mut additions: std::collections::BTreeMap<usize, Vec<u32>> = std::collections::BTreeMap::new();
        for user in added {
            let shard = shard_of(hash_of(&user.key), self.shift);
            let (words, is) = (additions.entry(shard).or_default(), self.nodes_are);
            write_entry(words, is, user.id, user.suspended, &user.key, &user.name, &user.nodes)?;
        }
        let mut shards = self.shards.to_vec();
        let (mut users, mut memberships, mut bytes) = (self.count, self.memberships, self.bytes);
        for (number, shard) in shards.iter_mut().enumerate() {
            let new = additions.remove(&number);
            if new.is_none()
                && !(everywhere && entries(shard, self.nodes_are).any(|(user, _)| ids.contains(&user.id)))
            {
                continue;
            }
            let mut kept = Vec::with_capacity(shard.words.len() + new.as_ref().map_or(0, Vec::len));
            for (user, words) in entries(shard, self.nodes_are) {
                if !ids.contains(&user.id) {
                    kept.extend_from_slice(words);
                }
            }
            kept.extend(new.unwrap_or_default());
            let (old_users, old_memberships) = counts(shard);
            let old_bytes = bytes_of(shard);
            *shard = assemble(self.nodes_are, &kept)?;
            let (new_users, new_memberships) = counts(shard);
            users = users + new_users - old_users;
            memberships = memberships + new_memberships - old_memberships;
            bytes = bytes + bytes_of(shard) - old_bytes;
        }
        Ok(Self {
            shift: self.shift,
            shards: shards.into(),
            nodes_are: self.nodes_are,
            count: users,
            memberships,
            bytes,
        })
    }
}

/// Whether an entry can hold this.
///
/// # Errors
/// [`Error::Unreadable`] if not.
pub(super) fn fits(key: &[u8], nodes: &[u32]) -> Result<(), Error> {
    if key.len() < 1 << NAME_BITS && nodes.len() < 1 << NODE_BITS {
        return Ok(());
    }
    let what = format!("a user with a key of {} bytes and {} memberships", key.len(), nodes.len());
    Err(Error::Unreadable { what })
}

#[inline]
fn shard_of(hash: u64, shift: u32) -> usize {
    usize::try_from(hash >> shift).unwrap_or(usize::MAX)
}

/// The tags of a bucket, the first one lowest, and its offsets.
#[inline]
fn bucket_at(shard: &[u32], bucket: usize) -> Option<(u64, &[u32; LANES / 2])> {
    let words = shard.get(HEADER + BUCKET * bucket..)?.first_chunk::<BUCKET>()?;
    let tags = words.first_chunk::<TAGS>()?.map(u64::from);
    Some((tags[0] | tags[1] << 32, words.last_chunk()?))
}

/// The offset of a lane, in units of its shard; 0 if it is empty.
#[inline]
fn offset_in(offsets: &[u32; LANES / 2], lane: usize) -> Option<usize> {
    let pair = *offsets.get(lane / 2)?;
    Some((pair >> (16 * (lane % 2)) & 0xffff) as usize)
}

/// The user of the entry at an offset, and the words behind the id.
#[inline]
fn user_at(shard: &[u32], offset: usize, nodes_are: Nodes) -> Option<(User<'_>, &[u32])> {
    let words = shard.get(offset..)?;
    let shape = *words.first()?;
    let name_len = (shape & ((1 << NAME_BITS) - 1)) as usize;
    let nodes = ((shape >> NAME_BITS) & ((1 << NODE_BITS) - 1)) as usize;
    let key_at = ENTRY + nodes_are.words(nodes);
    let end = key_at + name_len.div_ceil(4);
    let key = bytemuck::cast_slice::<u32, u8>(words.get(key_at..end)?).get(..name_len)?;
    let ([low, high], behind) = words.get(end..)?.split_first_chunk::<ID>()?;
    let user = User {
        id: (u64::from(*high) << 32 | u64::from(*low)).cast_signed(),
        suspended: shape >> 31 == 1,
        key,
        nodes,
        words: words.get(ENTRY..key_at)?,
    };
    Some((user, behind))
}

/// The entry at an offset, and its words.
fn entry_at(shard: &[u32], offset: usize, nodes_are: Nodes) -> Option<(User<'_>, &[u32])> {
    let (user, behind) = user_at(shard, offset, nodes_are)?;
    let name = name_behind(user.key, behind).map_or(0, |name| 1 + name.len().div_ceil(4));
    let end = shard.len() - behind.len() + name;
    Some((user, shard.get(offset..end)?))
}

/// The name in an entry under a `sub`.
fn name_behind<'a>(key: &[u8], behind: &'a [u32]) -> Option<&'a [u8]> {
    let (length, name) = behind.split_first().filter(|_| key.first() == Some(&ALIAS))?;
    bytemuck::cast_slice::<u32, u8>(name).get(..*length as usize)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "`fits` has bounded the lengths; an id is cut in two halves"
)]
fn write_entry(
    words: &mut Vec<u32>,
    nodes_are: Nodes,
    user_id: i64,
    suspended: bool,
    key: &[u8],
    name: &str,
    nodes: &[u32],
) -> Result<(), Unfit> {
    let id = user_id.cast_unsigned();
    let shape = key.len() as u32 | (nodes.len() as u32) << NAME_BITS | u32::from(suspended) << 31;
    words.push(shape);
    nodes_are.write(nodes, words)?;
    words.extend(padded(key));
    words.extend([id as u32, (id >> 32) as u32]);
    if key.first() == Some(&ALIAS) {
        words.push(name.len() as u32);
        words.extend(padded(name.as_bytes()));
    }
    Ok(())
}

fn padded(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        u32::from_ne_bytes(word)
    })
}

/// All entries of a row of them, which need not be a shard yet, at multiples of a unit.
fn entries_in(
    words: &[u32],
    mut offset: usize,
    unit: u32,
    nodes_are: Nodes,
) -> impl Iterator<Item = (User<'_>, &[u32])> {
    std::iter::from_fn(move || {
        let (user, entry) = entry_at(words, offset, nodes_are)?;
        offset = (offset + entry.len()).next_multiple_of(1 << unit);
        Some((user, entry))
    })
}

fn entries(shard: &Shard, nodes_are: Nodes) -> impl Iterator<Item = (User<'_>, &[u32])> {
    entries_in(&shard.words, first_entry(shard.buckets, shard.unit), shard.unit, nodes_are)
}

fn first_entry(buckets: u32, unit: u32) -> usize {
    (HEADER + BUCKET * buckets as usize).next_multiple_of(1 << unit)
}

fn counts(shard: &Shard) -> (usize, usize) {
    match &*shard.words {
        [users, memberships, ..] => (*users as usize, *memberships as usize),
        _ => (0, 0),
    }
}

/// With the two counters before the words.
fn bytes_of(shard: &Shard) -> usize {
    size_of_val(&*shard.words) + 2 * size_of::<usize>()
}

#[cfg(test)]
mod tests;
