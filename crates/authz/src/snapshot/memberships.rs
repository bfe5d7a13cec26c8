//! Who is in which groups, as a full load reads it: group by group, for a message per user costs more than what is in it,
//! and turned round in memory.

use std::collections::HashMap;

use foldhash::fast::RandomState;

/// Takes in the members of groups.
pub(super) struct Memberships {
    /// By user, where in the order of the users.
    places: HashMap<i64, u32, RandomState>,
    /// By place, in how many groups.
    counts: Vec<u32>,
    /// The places of all members, group by group.
    members: Vec<u32>,
    /// The node of each group, and how many members it has.
    groups: Vec<(u32, usize)>,
}

/// The nodes of the groups of each user.
pub(super) struct NodesByUser {
    nodes: Vec<u32>,
    /// By place, where the nodes of the user end.
    ends: Vec<usize>,
}

impl Memberships {
    /// Of these users, in this order.
    pub(super) fn of(user_ids: impl ExactSizeIterator<Item = i64>) -> Self {
        let counts = vec![0; user_ids.len()];
        let places = user_ids.zip(0..).collect();
        Self { places, counts, members: Vec::new(), groups: Vec::new() }
    }

    /// Adds the members of a group. Users of whom nothing is known are left out.
    pub(super) fn add(&mut self, node: u32, user_ids: impl Iterator<Item = i64>) {
        let before = self.members.len();
        for place in user_ids.filter_map(|user_id| self.places.get(&user_id).copied()) {
            if let Some(count) = self.counts.get_mut(place as usize) {
                *count += 1;
                self.members.push(place);
            }
        }
        self.groups.push((node, self.members.len() - before));
    }

    /// The nodes of each user, in the order in which they were added.
    pub(super) fn by_user(self) -> NodesByUser {
        let Self { places, counts, members, groups } = self;
        drop(places);
        let mut nodes = vec![0; members.len()];
        // Where the next node of each user goes; in the end, where they end.
        let mut ends: Vec<usize> = Vec::with_capacity(counts.len());
        let mut start = 0;
        for count in counts {
            ends.push(start);
            start += count as usize;
        }
        let mut members = members.into_iter();
        for (node, count) in groups {
            for place in members.by_ref().take(count) {
                if let Some(next) = ends.get_mut(place as usize) {
                    if let Some(slot) = nodes.get_mut(*next) {
                        *slot = node;
                    }
                    *next += 1;
                }
            }
        }
        NodesByUser { nodes, ends }
    }
}

impl NodesByUser {
    /// Of each user, in the order of the users.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let mut start = 0;
        self.ends
            .iter()
            .map(move |end| self.nodes.get(std::mem::replace(&mut start, *end)..*end).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_user_gets_the_nodes_of_the_groups_in_the_order_of_the_groups() {
        let mut memberships = Memberships::of([7, -3, 12, 5].into_iter());
        memberships.add(4, [5, 7].into_iter());
        memberships.add(2, std::iter::empty());
        memberships.add(9, [12, 99, -3, 7].into_iter());
        memberships.add(1, [7].into_iter());
        let nodes = memberships.by_user();
        assert_eq!(nodes.iter().collect::<Vec<_>>(), [&[4, 9, 1][..], &[9], &[9], &[4]]);
    }

    #[test]
    fn nobody_has_no_nodes() {
        let mut memberships = Memberships::of(std::iter::empty());
        memberships.add(1, [1, 2].into_iter());
        assert_eq!(memberships.by_user().iter().count(), 0);
        assert_eq!(Memberships::of([1].into_iter()).by_user().iter().collect::<Vec<_>>(), [&[] as &[u32]]);
    }
}
