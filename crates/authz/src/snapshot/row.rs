//! What one action looks like from below: which nodes reach a grant that covers it.

use std::sync::Arc;

/// So many nodes fit into [`NodeSet`].
pub(super) const FEW_NODES: usize = 256;
/// The nodes of a user where there are few of them in all, as bits: to go through a list takes longer than to look at all.
pub(super) type NodeSet = [u32; FEW_NODES / 32];

/// When a grant without an end ends.
pub(super) const NEVER: i64 = i64::MAX;

/// Over the nodes, closed over ancestry: a node's bit is set if it, or an active group above it, holds a grant.
#[derive(Clone, Default)]
pub(super) struct Row {
    /// Two sets of bits, one behind the other, so that a check finds both in one place.
    ///
    /// First: the nodes that reach a grant without an end, and a word of zeros, which stands for all words behind it:
    /// nobody can predict whether a node lies there, so a branch on that costs more than a look. Then a power of two of
    /// words, or none: where a node's bit is not set at its place in them, modulo their number, the node reaches no
    /// grant with an end. Grants with an end are few, so this is small and most denies end here.
    ///
    /// These have as many as a [`NodeSet`] at least, of whose nodes each then has a bit of its own.
    words: Arc<[u32]>,
    /// Of the first set what a [`NodeSet`] holds, in here: to follow the pointer would take a tenth of a check.
    few: NodeSet,
    /// How many words the first set has.
    always: u32,
    /// By node, the latest end in microseconds.
    ends: Arc<[(u32, i64)]>,
}

/// What reaches a user; the greater one allows for longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// No grant.
    Never,
    /// Only grants with an end, the last at so many microseconds since 1970.
    Until(i64),
    /// A grant without an end.
    Always,
}

impl Row {
    /// Of the nodes that reach a grant, each with the latest end of those; in any order, repeated or not.
    pub(super) fn new(reached: impl Iterator<Item = (u32, i64)>) -> Self {
        let mut always: Vec<u32> = Vec::new();
        let mut ends = Vec::new();
        for (node, end) in reached {
            if end != NEVER {
                ends.push((node, end));
                continue;
            }
            let at = word_of(node);
            if always.len() <= at {
                always.resize(at + 1, 0);
            }
            if let Some(word) = always.get_mut(at) {
                *word |= 1 << (node & 31);
            }
        }
        ends.sort_unstable_by_key(|&(node, end)| (node, std::cmp::Reverse(end)));
        ends.dedup_by_key(|(node, _)| *node);
        // Eight words for each such node, so that a node is taken for one in vain once in 256 times.
        let exact = ends.last().map_or(0, |(node, _)| word_of(*node) + 1);
        let enough = (8 * ends.len()).min(exact).next_power_of_two().max(size_of::<NodeSet>() / 4);
        let mut perhaps = vec![0_u32; if ends.is_empty() { 0 } else { enough }];
        for (node, _) in &ends {
            let at = word_of(*node) & perhaps.len().wrapping_sub(1);
            if let Some(word) = perhaps.get_mut(at) {
                *word |= 1 << (node & 31);
            }
        }
        let mut few = NodeSet::default();
        few.iter_mut().zip(&always).for_each(|(to, from)| *to = *from);
        always.push(0);
        // Nodes are numbered with 32 bits, so their words are as well.
        let words_always = u32::try_from(always.len()).unwrap_or(u32::MAX);
        always.append(&mut perhaps);
        Self { words: always.into(), few, always: words_always, ends: ends.into() }
    }

    /// What reaches a user with these nodes.
    #[inline]
    pub(super) fn reach<N: Copy + Into<u32>>(&self, nodes: &[N]) -> Reach {
        let Some((always, perhaps)) = self.words.split_at_checked(self.always as usize) else {
            return Reach::Never;
        };
        let last = always.len().wrapping_sub(1);
        if finds(always, nodes, |at| at.min(last)) {
            return Reach::Always;
        }
        let mask = perhaps.len().wrapping_sub(1);
        if !perhaps.is_empty() && finds(perhaps, nodes, |at| at & mask) {
            return self.last_end(nodes);
        }
        Reach::Never
    }

    /// The same where no node is past a [`NodeSet`].
    #[inline]
    pub(super) fn reach_set(&self, nodes: &NodeSet) -> Reach {
        if meet(&self.few, nodes) {
            return Reach::Always;
        }
        match self.words.get(self.always as usize..).and_then(<[u32]>::first_chunk) {
            Some(perhaps) if meet(perhaps, nodes) => self.last_end_of_set(nodes),
            _ => Reach::Never,
        }
    }

    #[cold]
    fn last_end<N: Copy + Into<u32>>(&self, nodes: &[N]) -> Reach {
        let end_of = |node: N| self.ends.binary_search_by_key(&node.into(), |&(node, _)| node).ok();
        let ends = nodes.iter().filter_map(|&node| self.ends.get(end_of(node)?));
        ends.map(|&(_, end)| end).max().map_or(Reach::Never, Reach::Until)
    }

    #[cold]
    fn last_end_of_set(&self, nodes: &NodeSet) -> Reach {
        let has = |node: u32| nodes.get(word_of(node)).is_some_and(|word| word >> (node & 31) & 1 == 1);
        let ends = self.ends.iter().filter(|(node, _)| has(*node));
        ends.map(|&(_, end)| end).max().map_or(Reach::Never, Reach::Until)
    }

    /// Held in memory, with the counters.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.words) + size_of_val(&*self.ends) + 4 * size_of::<usize>()
    }

    /// The same for rows that share their memory.
    pub(super) fn address(&self) -> (usize, usize) {
        (self.words.as_ptr().addr(), self.ends.as_ptr().addr())
    }
}

/// Whether a node's bit is set in the word at its place. A loop without a branch on what it finds: nobody can predict at
/// which node an answer lies.
#[inline]
fn finds<N: Copy + Into<u32>>(words: &[u32], nodes: &[N], place: impl Fn(usize) -> usize) -> bool {
    let bit = |node: u32| words.get(place(word_of(node))).copied().unwrap_or_default() >> (node & 31);
    nodes.iter().fold(0, |found, &node| found | bit(node.into())) & 1 == 1
}

/// Whether a node is in both sets.
#[inline]
fn meet(one: &NodeSet, other: &NodeSet) -> bool {
    one.iter().zip(other).fold(0, |met, (one, other)| met | one & other) != 0
}

/// These nodes as a set, if all fit.
pub(super) fn set_of(nodes: &[u32]) -> Option<NodeSet> {
    let mut set = NodeSet::default();
    for node in nodes {
        *set.get_mut(word_of(*node))? |= 1 << (node & 31);
    }
    Some(set)
}

fn word_of(node: u32) -> usize {
    (node >> 5) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_end_counts_unless_a_grant_has_none() {
        let row = Row::new([(0, 5), (0, 7), (0, 6), (64, NEVER), (130, 3), (130, 3)].into_iter());
        assert_eq!(row.reach(&[0_u32, 1]), Reach::Until(7));
        assert_eq!(row.reach(&[0_u32, 130]), Reach::Until(7));
        assert_eq!(row.reach(&[1_u32, 130, 131]), Reach::Until(3));
        assert_eq!(row.reach(&[0_u32, 64]), Reach::Always);
        assert_eq!(row.reach(&[1_u32, 63, 65, 9_999]), Reach::Never);
        assert_eq!(row.reach::<u32>(&[]), Reach::Never);
        assert_eq!(Row::default().reach(&[0_u32]), Reach::Never);
    }

    #[test]
    fn what_allows_for_longer_is_greater() {
        let ascending =
            [Reach::Never, Reach::Until(i64::MIN), Reach::Until(5), Reach::Until(NEVER), Reach::Always];
        assert!(ascending.is_sorted());
    }

    #[test]
    fn nodes_that_share_a_bit_are_told_apart() {
        // One node with an end: eight words, so 70 looks like 326 and so on.
        let row = Row::new([(70, 5)].into_iter());
        assert_eq!((row.words.len(), row.always), (9, 1));
        assert_eq!(row.reach(&[6_u32, 326]), Reach::Never);
        assert_eq!(row.reach(&[6_u32, 70, 326]), Reach::Until(5));
        let nodes: Vec<u32> = (0..500).map(|n| n * 7).collect();
        let row = Row::new(nodes.iter().map(|&node| (node, i64::from(node))));
        for node in 0..4_000 {
            let wanted = if nodes.contains(&node) { Reach::Until(i64::from(node)) } else { Reach::Never };
            assert_eq!(row.reach(&[node]), wanted);
        }
    }

    #[test]
    fn set_of_nodes_is_reached_as_their_list_is() {
        let lists =
            [vec![], vec![0], vec![31, 32], vec![255], vec![3, 64, 127, 128, 200, 255], (0..256).collect()];
        let ends =
            |node: u32, round: u32| if (node + round).is_multiple_of(3) { NEVER } else { i64::from(node) };
        for round in 0..60 {
            // The first rows have no node at all, or one; later ones nodes that no set holds.
            let reached = (0..round).map(|n| (n * n * 7 % (30 + 6 * round), round));
            let row = Row::new(reached.map(|(node, round)| (node, ends(node, round))));
            for list in &lists {
                let halves: Vec<u16> = list.iter().map(|&node| node.try_into().unwrap()).collect();
                assert_eq!(row.reach(&halves), row.reach(list), "{round} {list:?}");
                assert_eq!(row.reach_set(&set_of(list).unwrap()), row.reach(list), "{round} {list:?}");
            }
        }
        assert_eq!(Row::default().reach_set(&set_of(&[0]).unwrap()), Reach::Never);
        assert!(set_of(&[256]).is_none() && set_of(&[1, 70_000]).is_none());
    }
}
