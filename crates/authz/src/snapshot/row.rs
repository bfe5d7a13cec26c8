//! What one action looks like from below: which nodes reach a grant that covers it.

use std::sync::Arc;

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
    words: Arc<[u64]>,
    /// How many words the first set has.
    always: u32,
    /// By node, the latest end in microseconds.
    ends: Arc<[(u32, i64)]>,
}

/// What reaches a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// A grant without an end.
    Always,
    /// Only grants with an end, the last at so many microseconds since 1970.
    Until(i64),
    /// No grant.
    Never,
}

impl Row {
    /// Of the nodes that reach a grant, each with the latest end of those; in any order, repeated or not.
    pub(super) fn new(reached: impl Iterator<Item = (u32, i64)>) -> Self {
        let mut always: Vec<u64> = Vec::new();
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
                *word |= 1 << (node & 63);
            }
        }
        ends.sort_unstable_by_key(|&(node, end)| (node, std::cmp::Reverse(end)));
        ends.dedup_by_key(|(node, _)| *node);
        // One word for each such node, so that a node is taken for one in vain once in 64 times.
        let exact = ends.last().map_or(0, |(node, _)| word_of(*node) + 1);
        let mut perhaps =
            vec![0_u64; if ends.is_empty() { 0 } else { ends.len().min(exact).next_power_of_two() }];
        for (node, _) in &ends {
            let at = word_of(*node) & perhaps.len().wrapping_sub(1);
            if let Some(word) = perhaps.get_mut(at) {
                *word |= 1 << (node & 63);
            }
        }
        always.push(0);
        // Nodes are numbered with 32 bits, so their words are as well.
        let words_always = u32::try_from(always.len()).unwrap_or(u32::MAX);
        always.append(&mut perhaps);
        Self { words: always.into(), always: words_always, ends: ends.into() }
    }

    /// What reaches a user with these nodes.
    #[inline]
    pub(super) fn reach(&self, nodes: &[u32]) -> Reach {
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

    #[cold]
    fn last_end(&self, nodes: &[u32]) -> Reach {
        let end_of = |node| self.ends.binary_search_by_key(&node, |&(node, _)| node).ok();
        let ends = nodes.iter().filter_map(|&node| self.ends.get(end_of(node)?));
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
fn finds(words: &[u64], nodes: &[u32], place: impl Fn(usize) -> usize) -> bool {
    let bit = |node: u32| words.get(place(word_of(node))).copied().unwrap_or_default() >> (node & 63);
    nodes.iter().fold(0, |found, &node| found | bit(node)) & 1 == 1
}

fn word_of(node: u32) -> usize {
    (node >> 6) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_end_counts_unless_a_grant_has_none() {
        let row = Row::new([(0, 5), (0, 7), (0, 6), (64, NEVER), (130, 3), (130, 3)].into_iter());
        assert_eq!(row.reach(&[0, 1]), Reach::Until(7));
        assert_eq!(row.reach(&[0, 130]), Reach::Until(7));
        assert_eq!(row.reach(&[1, 130, 131]), Reach::Until(3));
        assert_eq!(row.reach(&[0, 64]), Reach::Always);
        assert_eq!(row.reach(&[1, 63, 65, 9_999]), Reach::Never);
        assert_eq!(row.reach(&[]), Reach::Never);
        assert_eq!(Row::default().reach(&[0]), Reach::Never);
    }

    #[test]
    fn nodes_that_share_a_bit_are_told_apart() {
        // One node with an end: one word, so 70 looks like 6, 134 and so on.
        let row = Row::new([(70, 5)].into_iter());
        assert_eq!((row.words.len(), row.always), (2, 1));
        assert_eq!(row.reach(&[6, 134]), Reach::Never);
        assert_eq!(row.reach(&[6, 70, 134]), Reach::Until(5));
        let nodes: Vec<u32> = (0..500).map(|n| n * 7).collect();
        let row = Row::new(nodes.iter().map(|&node| (node, i64::from(node))));
        for node in 0..4_000 {
            let wanted = if nodes.contains(&node) { Reach::Until(i64::from(node)) } else { Reach::Never };
            assert_eq!(row.reach(&[node]), wanted);
        }
    }
}
