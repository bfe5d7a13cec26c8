//! Makes shards of users, each by itself, so that several processors can work on one load.

use std::sync::Arc;

use super::{
    ALIAS, BUCKET, HEADER, Nodes, Shard, TAGS, Unfit, Users, bucket_at, bytes_of, counts, entries_in,
    entry_at, first_entry, fits, offset_in, shard_of, write_entry,
};
use crate::error::Error;
use crate::name::hash_of;
use crate::snapshot::lanes::{LANES, first_place, has_empty_lane, next_place, tag_of};

/// How many entries a bucket holds on average at most. One entry in fifty is then not in its first bucket.
const FILL: u32 = 5;
/// So few that a bucket and its entry are mostly on one page of memory.
const USERS_PER_SHARD: usize = 64;
/// So many are too many. Sixteen bits say where an entry lies, so the more there are the more room would be wasted for each.
const MOST_PER_SHARD: u32 = 4_096;

/// Takes users in any order and makes a part of [`Users`] of them.
pub(in crate::snapshot) struct Builder {
    shift: u32,
    /// The shards of this part, of which this is the first.
    first: usize,
    shards: Vec<Vec<u32>>,
    nodes_are: Nodes,
}

/// What a [`Builder`] has made.
pub(in crate::snapshot) struct Built {
    shift: u32,
    shards: Vec<Shard>,
    nodes_are: Nodes,
}

impl Builder {
    /// As many builders as asked for, or fewer: every key is one's, so that each can work on a processor of its own. For
    /// about so many users.
    pub(in crate::snapshot) fn parts(expected: usize, nodes_are: Nodes, parts: usize) -> Vec<Self> {
        // At least two shards, so that the shift stays below the width of the hash.
        let shards = (expected / USERS_PER_SHARD).next_power_of_two().max(2);
        let shift = 64 - shards.trailing_zeros();
        let each = shards.div_ceil(parts.max(1));
        (0..shards)
            .step_by(each)
            .map(|first| Self { shift, first, shards: vec![Vec::new(); each.min(shards - first)], nodes_are })
            .collect()
    }

    /// Whether the entry under this key is in this part.
    pub(in crate::snapshot) fn takes(&self, key: &[u8]) -> bool {
        self.place(key).is_some()
    }

    fn place(&self, key: &[u8]) -> Option<usize> {
        let place = shard_of(hash_of(key), self.shift).checked_sub(self.first)?;
        (place < self.shards.len()).then_some(place)
    }

    /// Adds a user, if this part takes the key.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the user is in more groups than an entry can hold.
    pub(in crate::snapshot) fn push(
        &mut self,
        user_id: i64,
        suspended: bool,
        key: &[u8],
        name: &str,
        nodes: &[u32],
    ) -> Result<(), Error> {
        fits(key, nodes)?;
        let shard = self.place(key).and_then(|place| self.shards.get_mut(place));
        let most = self.nodes_are.most();
        let past =
            |Unfit| Error::Unreadable { what: format!("a node past the {most} that an entry can name") };
        shard.map_or(Ok(()), |shard| {
            write_entry(shard, self.nodes_are, user_id, suspended, key, name, nodes).map_err(past)
        })
    }

    /// # Errors
    /// [`Unfit`].
    pub(in crate::snapshot) fn finish(self) -> Result<Built, Unfit> {
        let Self { shift, shards, nodes_are, .. } = self;
        // Each draft goes before the next block is made, so that the peak is little more than one copy.
        let shards = shards.into_iter().map(|draft| assemble(nodes_are, &draft)).collect::<Result<_, _>>()?;
        Ok(Built { shift, shards, nodes_are })
    }
}

impl Users {
    /// All parts together, in their order.
    ///
    /// # Errors
    /// [`Unfit`] if there is none.
    pub(in crate::snapshot) fn of(parts: Vec<Built>) -> Result<Self, Unfit> {
        let Some(&Built { shift, nodes_are, .. }) = parts.first() else { return Err(Unfit) };
        let shards: Arc<[Shard]> = parts.into_iter().flat_map(|part| part.shards).collect();
        let (mut count, mut memberships, mut bytes) = (0, 0, size_of::<Shard>() * shards.len());
        for shard in &*shards {
            let (more_users, more_memberships) = counts(shard);
            count += more_users;
            memberships += more_memberships;
            bytes += bytes_of(shard);
        }
        Ok(Self { shift, shards, nodes_are, count, memberships, bytes })
    }
}

/// A shard of these entries, which hold their places behind the buckets.
pub(super) fn assemble(nodes_are: Nodes, drafted: &[u32]) -> Result<Shard, Unfit> {
    let (mut total, mut users, mut memberships) = (0_u32, 0_u32, 0_u32);
    for (user, _) in entries_in(drafted, 0, 0, nodes_are) {
        total += 1;
        if user.key.first() != Some(&ALIAS) {
            users += 1;
            memberships += u32::try_from(user.nodes).unwrap_or(u32::MAX);
        }
    }
    if total > MOST_PER_SHARD {
        return Err(Unfit);
    }
    // INVARIANT: one lane at least stays empty, so a search ends (held by `every_key_is_found_and_no_other`).
    let buckets = total / FILL + 1;
    let most = |unit: u32| first_entry(buckets, unit) + drafted.len() + ((total as usize) << unit);
    let unit = (0..usize::BITS / 2).find(|unit| u16::try_from(most(*unit) >> unit).is_ok()).ok_or(Unfit)?;
    let first_entry = first_entry(buckets, unit);
    let mut words = Vec::with_capacity(first_entry + drafted.len());
    words.extend([users, memberships]);
    words.resize(first_entry, 0);
    for (user, entry) in entries_in(drafted, 0, 0, nodes_are) {
        words.resize(words.len().next_multiple_of(1 << unit), 0);
        let offset = words.len();
        words.extend_from_slice(entry);
        place(&mut words, (buckets, unit), user.key, offset, nodes_are)?;
    }
    Ok(Shard { buckets, unit, words: words.into() })
}

/// Writes tag and offset of an entry into the first empty lane from its bucket on.
fn place(
    words: &mut [u32],
    (buckets, unit): (u32, u32),
    key: &[u8],
    offset: usize,
    nodes_are: Nodes,
) -> Result<(), Unfit> {
    let hash = hash_of(key);
    let mut bucket = first_place(hash, buckets as usize);
    for _ in 0..buckets {
        let (tags, offsets) = bucket_at(words, bucket).ok_or(Unfit)?;
        let others = (0..LANES).map_while(|lane| offset_in(offsets, lane)).take_while(|offset| *offset != 0);
        for other in others.clone() {
            if entry_at(words, other << unit, nodes_are).is_some_and(|(other, _)| other.key == key) {
                return Err(Unfit);
            }
        }
        let lane = others.count();
        debug_assert_eq!(
            lane == LANES,
            !has_empty_lane(tags),
            "an entry has a tag and an offset, or neither"
        );
        let start = HEADER + BUCKET * bucket;
        if lane < LANES {
            let offset = u16::try_from(offset >> unit).map_err(|_| Unfit)?;
            *words.get_mut(start + lane / 4).ok_or(Unfit)? |= u32::from(tag_of(hash)) << (8 * (lane % 4));
            *words.get_mut(start + TAGS + lane / 2).ok_or(Unfit)? |= u32::from(offset) << (16 * (lane % 2));
            return Ok(());
        }
        bucket = next_place(bucket, buckets as usize);
    }
    Err(Unfit)
}
