//! What one action looks like from below: which nodes reach a grant that covers it.

use std::sync::Arc;

/// When a grant without an end ends.
pub(super) const NEVER: i64 = i64::MAX;

/// Over the nodes, closed over ancestry: a node's bit is set if it, or an active group above it, holds a grant.
#[derive(Clone, Default)]
pub(super) struct Row {
    /// Bits of grants without an end, and of those with one, side by side. A node past the end has neither.
    words: Arc<[[u64; 2]]>,
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
        let mut words: Vec<[u64; 2]> = Vec::new();
        let mut ends = Vec::new();
        for (node, end) in reached {
            let at = (node >> 6) as usize;
            if words.len() <= at {
                words.resize(at + 1, [0; 2]);
            }
            let Some([always, timed]) = words.get_mut(at) else { continue };
            if end == NEVER {
                *always |= 1 << (node & 63);
            } else {
                *timed |= 1 << (node & 63);
                ends.push((node, end));
            }
        }
        ends.sort_unstable_by_key(|&(node, end)| (node, std::cmp::Reverse(end)));
        ends.dedup_by_key(|(node, _)| *node);
        Self { words: words.into(), ends: ends.into() }
    }

    /// What reaches a user with these nodes.
    #[inline]
    pub(super) fn reach(&self, nodes: &[u32]) -> Reach {
        let [mut always, mut timed] = [0, 0];
        for &node in nodes {
            let [a, t] = self.words.get((node >> 6) as usize).copied().unwrap_or_default();
            always |= a >> (node & 63);
            timed |= t >> (node & 63);
        }
        if always & 1 == 1 {
            Reach::Always
        } else if timed & 1 == 1 {
            self.last_end(nodes)
        } else {
            Reach::Never
        }
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
}
