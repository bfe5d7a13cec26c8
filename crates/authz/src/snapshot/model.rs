//! What the refresher keeps to work out rows: the graph above the users, who holds which grant, and the numbers of
//! the nodes. It holds neither names of users nor memberships.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::row::{NEVER, Row};
use crate::name::{ActionName, EVERYTHING};

/// So many nodes more than twice those of the last full load are one too many.
const SPARE_NODES: u32 = 1_024;

type Map<K, V> = HashMap<K, V, RandomState>;

/// What can hold a grant or pass one on to users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Node {
    Group(i64),
    /// Everyone in a directory: below each group that has them.
    Everyone(i32),
    /// A user with grants of the user's own.
    User(i64),
}

/// The graph and the grants. Only what some grant reaches, also an ended one, has a node.
#[derive(Default)]
pub(super) struct Model {
    groups: Map<i64, u32>,
    everyone: Map<i32, u32>,
    users: Map<i64, u32>,
    next_node: u32,
    /// How many nodes there were after the full load.
    loaded_nodes: u32,
    children: Map<i64, Vec<i64>>,
    parents: Map<i64, Vec<i64>>,
    directories: Map<i64, Vec<i32>>,
    /// Nodes of deleted groups, whose grants count for nothing.
    dead: HashSet<u32>,
    /// By pattern, the holders with the end of their grants, sorted by node.
    grants: BTreeMap<Arc<str>, Vec<(u32, i64)>>,
    /// By node, the nodes that are right below; made anew when the graph or the nodes change.
    below: Vec<Box<[u32]>>,
}

impl Model {
    pub(super) fn node(&self, node: Node) -> Option<u32> {
        match node {
            Node::Group(id) => self.groups.get(&id),
            Node::Everyone(id) => self.everyone.get(&id),
            Node::User(id) => self.users.get(&id),
        }
        .copied()
    }

    pub(super) fn groups(&self) -> usize {
        self.groups.len()
    }

    pub(super) fn nodes(&self) -> usize {
        self.next_node as usize
    }

    /// The groups that have nodes, sorted by those.
    pub(super) fn groups_by_node(&self) -> Vec<(u32, i64)> {
        let mut groups: Vec<_> = self.groups.iter().map(|(group, node)| (*node, *group)).collect();
        groups.sort_unstable();
        groups
    }

    /// The nodes of a user: of the groups, of the user's directory, of the user; sorted.
    pub(super) fn nodes_of(
        &self,
        user_id: i64,
        directory_id: Option<i32>,
        groups: impl Iterator<Item = u32>,
        nodes: &mut Vec<u32>,
    ) {
        nodes.clear();
        nodes.extend(groups);
        nodes.extend(directory_id.and_then(|directory| self.node(Node::Everyone(directory))));
        if !self.users.is_empty() {
            nodes.extend(self.node(Node::User(user_id)));
        }
        nodes.sort_unstable();
    }

    /// Gives numbers to a node and all below it that have none; says which are new.
    ///
    /// INVARIANT: what is below a numbered node is numbered, or members of a nested group would miss their grants
    /// (held by `new_grant_reaches_members_of_nested_groups`).
    fn number(&mut self, node: Node, new: &mut Vec<Node>) -> u32 {
        let mut waiting = vec![node];
        while let Some(node) = waiting.pop() {
            if self.node(node).is_some() {
                continue;
            }
            let number = self.next_node;
            self.next_node += 1;
            match node {
                Node::Group(id) => {
                    self.groups.insert(id, number);
                    waiting.extend(
                        self.children.get(&id).into_iter().flatten().map(|&child| Node::Group(child)),
                    );
                    waiting
                        .extend(self.directories.get(&id).into_iter().flatten().map(|&d| Node::Everyone(d)));
                }
                Node::Everyone(id) => {
                    self.everyone.insert(id, number);
                }
                Node::User(id) => {
                    self.users.insert(id, number);
                }
            }
            new.push(node);
        }
        self.node(node).unwrap_or_default()
    }

    /// Puts a grant, in place of the one of the same holder and pattern.
    pub(super) fn grant(&mut self, holder: Node, pattern: &str, end: i64, new: &mut Vec<Node>) {
        let node = self.number(holder, new);
        if !self.grants.contains_key(pattern) {
            self.grants.insert(pattern.into(), Vec::new());
        }
        if let Some(holders) = self.grants.get_mut(pattern) {
            match holders.binary_search_by_key(&node, |&(holder, _)| holder) {
                Ok(at) => {
                    if let Some(grant) = holders.get_mut(at) {
                        grant.1 = end;
                    }
                }
                Err(at) => holders.insert(at, (node, end)),
            }
        }
    }

    /// Takes a grant away, if it is there.
    pub(super) fn revoke(&mut self, holder: Node, pattern: &str) {
        let Some(node) = self.node(holder) else { return };
        if let Some(holders) = self.grants.get_mut(pattern) {
            holders.retain(|&(holder, _)| holder != node);
            if holders.is_empty() {
                self.grants.remove(pattern);
            }
        }
    }

    /// Says whether a group is deleted; gives the patterns that this matters to.
    pub(super) fn set_deleted(&mut self, group: i64, deleted: bool) -> Vec<Arc<str>> {
        let Some(node) = self.node(Node::Group(group)) else { return Vec::new() };
        let changed = if deleted { self.dead.insert(node) } else { self.dead.remove(&node) };
        if !changed {
            return Vec::new();
        }
        let holds =
            |holders: &[(u32, i64)]| holders.binary_search_by_key(&node, |&(holder, _)| holder).is_ok();
        self.grants
            .iter()
            .filter(|(_, holders)| holds(holders))
            .map(|(pattern, _)| Arc::clone(pattern))
            .collect()
    }

    /// Sets the groups that contain `child`; says whether that changed anything.
    pub(super) fn set_parents(&mut self, child: i64, mut parents: Vec<i64>, new: &mut Vec<Node>) -> bool {
        parents.sort_unstable();
        let old = self.parents.remove(&child).unwrap_or_default();
        if old == parents {
            if !old.is_empty() {
                self.parents.insert(child, old);
            }
            return false;
        }
        for parent in &old {
            if let Some(children) = self.children.get_mut(parent) {
                children.retain(|&c| c != child);
                if children.is_empty() {
                    self.children.remove(parent);
                }
            }
        }
        for &parent in &parents {
            self.children.entry(parent).or_default().push(child);
        }
        if parents.iter().any(|&parent| self.node(Node::Group(parent)).is_some()) {
            self.number(Node::Group(child), new);
        }
        if !parents.is_empty() {
            self.parents.insert(child, parents);
        }
        true
    }

    /// Sets the directories of which everyone is in the group; says whether that changed anything.
    pub(super) fn set_directories(
        &mut self,
        group: i64,
        mut directories: Vec<i32>,
        new: &mut Vec<Node>,
    ) -> bool {
        directories.sort_unstable();
        let old = self.directories.remove(&group).unwrap_or_default();
        let changed = old != directories;
        if self.node(Node::Group(group)).is_some() {
            for &directory in &directories {
                self.number(Node::Everyone(directory), new);
            }
        }
        if !directories.is_empty() {
            self.directories.insert(group, directories);
        }
        changed
    }

    /// To be called after the graph or the nodes have changed, before rows are made.
    pub(super) fn link(&mut self) {
        let mut below = vec![Box::default(); self.nodes()];
        for (group, &node) in &self.groups {
            let children = self.children.get(group).into_iter().flatten();
            let directories = self.directories.get(group).into_iter().flatten();
            let nodes = children
                .filter_map(|&child| self.node(Node::Group(child)))
                .chain(directories.filter_map(|&directory| self.node(Node::Everyone(directory))));
            if let Some(place) = below.get_mut(node as usize) {
                *place = nodes.collect();
            }
        }
        self.below = below;
    }

    /// Ends a load: gives back what the lists have taken in advance.
    pub(super) fn settle(&mut self) {
        self.grants.values_mut().for_each(Vec::shrink_to_fit);
        self.children.values_mut().for_each(Vec::shrink_to_fit);
        self.parents.values_mut().for_each(Vec::shrink_to_fit);
        self.loaded_nodes = self.next_node;
    }

    /// Whether so many nodes have come since the load that those without use may be many.
    pub(super) fn is_wasteful(&self) -> bool {
        self.next_node > self.loaded_nodes.saturating_mul(2).saturating_add(SPARE_NODES)
    }

    /// Every node that reaches a grant of the pattern, with its end, possibly more than once; the last end first.
    fn closure(&self, pattern: &str, seen: &mut Vec<u64>) -> Vec<(u32, i64)> {
        let mut holders: Vec<(u32, i64)> = self.grants.get(pattern).into_iter().flatten().copied().collect();
        holders.retain(|(node, _)| !self.dead.contains(node));
        holders.sort_unstable_by_key(|&(_, end)| std::cmp::Reverse(end));
        seen.resize(self.nodes().div_ceil(64), 0);
        let mut reached: Vec<(u32, i64)> = Vec::with_capacity(holders.len());
        let mut waiting = Vec::new();
        for (holder, end) in holders {
            waiting.push(holder);
            while let Some(node) = waiting.pop() {
                let Some(word) = seen.get_mut((node >> 6) as usize) else { continue };
                if *word >> (node & 63) & 1 == 1 {
                    continue; // reached by a grant that ends later, or around a cycle
                }
                *word |= 1 << (node & 63);
                reached.push((node, end));
                waiting.extend(self.below.get(node as usize).into_iter().flatten());
            }
        }
        for (node, _) in &reached {
            if let Some(word) = seen.get_mut((node >> 6) as usize) {
                *word = 0;
            }
        }
        reached
    }

    /// The row that stands beside that of every action: of the grants of everything.
    pub(super) fn everything(&self) -> Option<Row> {
        let reached = self.closure(EVERYTHING, &mut Vec::new());
        (!reached.is_empty()).then(|| Row::new(reached.into_iter()))
    }

    /// The rows of these actions, without the grants of everything.
    pub(super) fn rows<'a>(&self, names: impl Iterator<Item = &'a Arc<str>>) -> Vec<(Arc<str>, Row)> {
        let mut seen = Vec::new();
        let mut closures: HashMap<String, Vec<(u32, i64)>> = HashMap::new();
        let mut shared: HashMap<Vec<String>, Row> = HashMap::new();
        let mut rows = Vec::new();
        for name in names {
            let mut patterns = ActionName::stored(name.to_string()).covering();
            patterns.retain(|pattern| pattern != EVERYTHING && self.grants.contains_key(&**pattern));
            // Actions that the same patterns cover share one row: resources below one wildcard cost next to nothing.
            let row = if let Some(row) = shared.get(&patterns) {
                row.clone()
            } else {
                for pattern in &patterns {
                    if !closures.contains_key(pattern) {
                        closures.insert(pattern.clone(), self.closure(pattern, &mut seen));
                    }
                }
                let row = Row::new(patterns.iter().filter_map(|p| closures.get(p)).flatten().copied());
                // An exact name covers this action alone.
                closures.remove(&**name);
                if patterns.iter().all(|pattern| **pattern != **name) {
                    shared.insert(patterns, row.clone());
                }
                row
            };
            rows.push((Arc::clone(name), row));
        }
        rows
    }

    /// About how much memory this takes.
    pub(super) fn bytes(&self) -> usize {
        /// With a control byte, and room for a quarter more.
        fn map<K, V>(map: &Map<K, V>) -> usize {
            map.capacity() * (size_of::<(K, V)>() + 1) * 8 / 7
        }
        fn lists<K, V>(lists: &Map<K, Vec<V>>) -> usize {
            map(lists) + lists.values().map(|list| list.capacity() * size_of::<V>()).sum::<usize>()
        }
        let grants = self.grants.iter().map(|(pattern, holders)| {
            pattern.len()
                + 2 * size_of::<usize>()
                + size_of::<(Arc<str>, Vec<(u32, i64)>)>()
                + holders.capacity() * size_of::<(u32, i64)>()
        });
        map(&self.groups)
            + map(&self.everyone)
            + map(&self.users)
            + lists(&self.children)
            + lists(&self.parents)
            + lists(&self.directories)
            + self.below.iter().map(|below| size_of_val(below) + size_of_val(&**below)).sum::<usize>()
            + grants.sum::<usize>()
            + self.dead.capacity() * 8
    }
}

/// The end of a grant as rows hold it.
pub(super) fn end_of(expires_at: Option<chrono::DateTime<chrono::Utc>>) -> i64 {
    expires_at.map_or(NEVER, |at| at.timestamp_micros())
}
