//! What one action looks like from below: which nodes reach a grant that covers it.

use std::sync::Arc;

/// So many nodes fit into [`NodeSet`].
pub(super) const FEW_NODES: usize = 255;
/// The nodes of a user where there are few of them in all, as bits: to go through a list takes longer than to look at all.
pub(super) type NodeSet = [u32; 8];

/// The bit of a [`NodeSet`] that is no node's.
const ENDS: u32 = 1 << 31;

/// When a grant without an end ends.
pub(super) const NEVER: i64 = i64::MAX;

/// Over the nodes, closed over ancestry: a node's bit is set if it, or an active group above it, holds a grant.
#[derive(Clone, Default)]
#[repr(C)]
pub(super) struct Row {
    /// Of the first set of `words` what a [`NodeSet`] holds: to follow the pointer would take a tenth of a check. In front, where
    /// it shares a line of memory with the name of the action. The last bit says whether there are `ends`.
    few: NodeSet,
    /// The nodes that reach a grant as bits, and a word of zeros, which stands for all words behind it: nobody can predict
    /// whether a node lies there, so a branch on that costs more than a look. Behind them, where there are `ends`, which of the
    /// first nodes have one, as a [`NodeSet`].
    words: Arc<[u32]>,
    /// How many words the nodes have, with the one of zeros.
    reached: u32,
    /// Where the bit of a node modulo 64 is not set, the node is not in `ends`: those are few, so nobody has to look there for most
    /// nodes.
    ending: u64,
    /// By node that reaches grants with an end alone, the latest one in microseconds.
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
        let mut words: Vec<u32> = Vec::new();
        let mut ends = Vec::new();
        for (node, end) in reached {
            if end == NEVER {
                set(&mut words, node);
            } else {
                ends.push((node, end));
            }
        }
        ends.retain(|(node, _)| !is_set(&words, *node));
        ends.sort_unstable_by_key(|&(node, end)| (node, std::cmp::Reverse(end)));
        ends.dedup_by_key(|(node, _)| *node);
        let (mut ending, mut with_end) = (0, Vec::new());
        for (node, _) in &ends {
            ending |= 1 << (node & 63);
            set(&mut words, *node);
            if word_of(*node) < NodeSet::default().len() {
                set(&mut with_end, *node);
            }
        }
        let mut few = NodeSet::default();
        few.iter_mut().zip(&words).for_each(|(to, from)| *to = *from);
        if let Some(last) = few.last_mut() {
            *last = *last & !ENDS | if ends.is_empty() { 0 } else { ENDS };
        }
        words.push(0);
        // Nodes are numbered with 32 bits, so their words are as well.
        let reached = u32::try_from(words.len()).unwrap_or(u32::MAX);
        if !ends.is_empty() {
            with_end.resize(few.len(), 0);
            words.append(&mut with_end);
        }
        Self { few, words: words.into(), reached, ending, ends: ends.into() }
    }

    /// What reaches a user with these nodes.
    #[inline]
    pub(super) fn reach<N: Copy + Into<u32>>(&self, nodes: &[N]) -> Reach {
        let reached = self.words.get(..self.reached as usize).unwrap_or_default();
        match hit(reached, nodes) {
            None => Reach::Never,
            Some(node) if self.ending >> (node & 63) & 1 == 0 || self.end_of(node).is_none() => Reach::Always,
            Some(_) => self.latest(nodes.iter().map(|&node| node.into())),
        }
    }

    /// The same where no node is past a [`NodeSet`].
    #[inline]
    pub(super) fn reach_set(&self, nodes: &NodeSet) -> Reach {
        let mut met = *nodes;
        met.iter_mut().zip(&self.few).for_each(|(nodes, reached)| *nodes &= reached);
        if !is_any(&met) {
            return Reach::Never;
        }
        if self.few.last().is_some_and(|last| last & ENDS == 0) {
            return Reach::Always;
        }
        let with_end = self.words.get(self.reached as usize..).unwrap_or_default();
        let with_end: NodeSet = with_end.first_chunk().copied().unwrap_or([u32::MAX; 8]);
        let mut without = met;
        without.iter_mut().zip(with_end).for_each(|(met, with_end)| *met &= !with_end);
        if is_any(&without) {
            return Reach::Always;
        }
        self.latest((0..).take(FEW_NODES).filter(|node| is_set(&met, *node)))
    }

    /// What reaches the one of these nodes that is reached for longest.
    #[cold]
    fn latest(&self, nodes: impl Iterator<Item = u32>) -> Reach {
        let reached = self.words.get(..self.reached as usize).unwrap_or_default();
        let reach = |node| match self.end_of(node) {
            Some(end) => Reach::Until(end),
            None if is_set(reached, node) => Reach::Always,
            None => Reach::Never,
        };
        nodes.map(reach).max().unwrap_or(Reach::Never)
    }

    /// The end in `ends`.
    fn end_of(&self, node: u32) -> Option<i64> {
        let at = self.ends.binary_search_by_key(&node, |&(node, _)| node).ok()?;
        self.ends.get(at).map(|&(_, end)| end)
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

/// One of the nodes whose bits are set, if there is one; the last word stands for all behind it. A loop without a branch on
/// what it finds: nobody can predict at which node an answer lies.
#[inline]
fn hit<N: Copy + Into<u32>>(words: &[u32], nodes: &[N]) -> Option<u32> {
    let last = u32::try_from(words.len().checked_sub(1)?).ok()?;
    let mut hit = u32::MAX;
    for &node in nodes {
        let node: u32 = node.into();
        let word = words.get((node >> 5).min(last) as usize).copied().unwrap_or_default();
        hit = std::hint::select_unpredictable(word >> (node & 31) & 1 == 1, node, hit);
    }
    (hit != u32::MAX).then_some(hit)
}

#[inline]
fn is_any(set: &NodeSet) -> bool {
    set.iter().fold(0, |any, word| any | word) != 0
}

fn is_set(words: &[u32], node: u32) -> bool {
    words.get(word_of(node)).is_some_and(|word| word >> (node & 31) & 1 == 1)
}

fn set(words: &mut Vec<u32>, node: u32) {
    let at = word_of(node);
    if words.len() <= at {
        words.resize(at + 1, 0);
    }
    if let Some(word) = words.get_mut(at) {
        *word |= 1 << (node & 31);
    }
}

/// These nodes as a set, if all fit.
pub(super) fn set_of(nodes: &[u32]) -> Option<NodeSet> {
    let mut set = NodeSet::default();
    for node in nodes {
        *set.get_mut(word_of(*node)).filter(|_| (*node as usize) < FEW_NODES)? |= 1 << (node & 31);
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
        let reached = [(0, 5), (0, 7), (0, 6), (64, NEVER), (64, 9), (64, NEVER), (130, 3), (130, 3)];
        for reached in [reached.to_vec(), reached.iter().rev().copied().collect()] {
            let row = Row::new(reached.into_iter());
            assert_eq!(row.reach(&[0_u32, 1]), Reach::Until(7));
            assert_eq!(row.reach(&[0_u32, 130]), Reach::Until(7));
            assert_eq!(row.reach(&[1_u32, 130, 131]), Reach::Until(3));
            assert_eq!(row.reach(&[0_u32, 64]), Reach::Always);
            assert_eq!(row.reach(&[1_u32, 63, 65, 9_999]), Reach::Never);
            assert_eq!(row.reach::<u32>(&[]), Reach::Never);
        }
        assert_eq!(Row::default().reach(&[0_u32]), Reach::Never);
    }

    #[test]
    fn few_nodes_come_first() {
        assert_eq!((std::mem::offset_of!(Row, few), size_of::<NodeSet>()), (0, 32));
    }

    #[test]
    fn what_allows_for_longer_is_greater() {
        let ascending =
            [Reach::Never, Reach::Until(i64::MIN), Reach::Until(5), Reach::Until(NEVER), Reach::Always];
        assert!(ascending.is_sorted());
    }

    #[test]
    fn nodes_that_share_a_bit_are_told_apart() {
        // Modulo 64, all are 6, of which one reaches a grant with an end and one a grant without.
        let row = Row::new([(70, 5), (582, NEVER)].into_iter());
        assert_eq!((row.words.len(), row.reached, row.ending), (20 + 8, 20, 1 << 6));
        assert_eq!(row.reach(&[6_u32, 326]), Reach::Never);
        assert_eq!(row.reach(&[6_u32, 70, 326]), Reach::Until(5));
        assert_eq!(row.reach(&[6_u32, 582]), Reach::Always);
        assert_eq!(row.reach(&[70_u32, 582]), Reach::Always);
        let nodes: Vec<u32> = (0..500).map(|n| n * 7).collect();
        let row = Row::new(nodes.iter().map(|&node| (node, i64::from(node))));
        for node in 0..4_000 {
            let wanted = if nodes.contains(&node) { Reach::Until(i64::from(node)) } else { Reach::Never };
            assert_eq!(row.reach(&[node]), wanted);
        }
    }

    #[test]
    fn every_one_of_many_nodes_is_looked_at() {
        let nodes: Vec<u32> = (0..70).map(|n| n * 3).collect();
        for count in 0..nodes.len() {
            for at in 0..nodes.len() {
                for end in [NEVER, 5] {
                    let row = Row::new([(nodes[at], end)].into_iter());
                    let wanted = match end {
                        _ if at >= count => Reach::Never,
                        NEVER => Reach::Always,
                        end => Reach::Until(end),
                    };
                    assert_eq!(row.reach(&nodes[..count]), wanted, "{at} of {count}");
                }
                // The longest one counts, wherever it is.
                let ends = nodes.iter().enumerate().map(|(n, &node)| (node, if n == at { 9 } else { 7 }));
                let wanted =
                    if count == 0 { Reach::Never } else { Reach::Until(if at < count { 9 } else { 7 }) };
                assert_eq!(Row::new(ends).reach(&nodes[..count]), wanted, "{at} of {count}");
            }
        }
    }

    #[test]
    fn set_of_nodes_is_reached_as_their_list_is() {
        let lists =
            [vec![], vec![0], vec![31, 32], vec![254], vec![3, 64, 127, 128, 200, 254], (0..255).collect()];
        let ends =
            |node: u32, round: u32| if (node + round).is_multiple_of(3) { NEVER } else { i64::from(node) };
        for round in 0..60 {
            // The first rows have no node at all, or one; later ones nodes that no set holds.
            let reached = (0..round).map(|n| (n * n * 7 % (30 + 6 * round), round));
            let row = Row::new(reached.map(|(node, round)| (node, ends(node, round))));
            for list in &lists {
                let halves: Vec<u16> = list.iter().map(|&node| node.try_into().unwrap()).collect();
                let wanted = row.reach(list);
                assert_eq!(row.reach(&halves), wanted, "{round} {list:?}");
                assert_eq!(row.reach_set(&set_of(list).unwrap()), wanted, "{round} {list:?}");
            }
        }
        assert_eq!(Row::default().reach_set(&set_of(&[0]).unwrap()), Reach::Never);
        assert!(set_of(&[255]).is_none() && set_of(&[1, 70_000]).is_none());
    }
}
