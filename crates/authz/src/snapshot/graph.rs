//! All that a full load reads but users and memberships: which group is in which, who holds a grant, which actions there are.

use std::cmp::Ordering;
use std::sync::Arc;

use sqlx::PgConnection;

use super::copy::Field;
use super::load::{end_in, rows};
use super::model::{Model, Node};
use crate::error::Error;

/// One statement, for in a small organisation a load is little more than its round trips; and its tables as they are, for the
/// client sorts them faster than the server joins and groups them.
const GRAPH: &str = "copy (
        select 1 as kind, e.child_group_id as id, e.parent_group_id as other,
               null::text as action_name, null::timestamptz as expires_at
        from authz.group_groups e
        union all
        select 2, gd.group_id, gd.directory_id, null, null from authz.group_directories gd
        union all
        select 3, ga.group_id, null, ga.action_name, ga.expires_at from authz.group_actions ga
        union all
        select 4, ua.user_id, null, ua.action_name, ua.expires_at from authz.user_actions ua
        union all
        select 5, g.group_id, null, null, null from authz.groups g where g.status <> 'active'
        union all
        select 6, null, null, a.action_name, null from authz.actions a
    ) to stdout (format binary)";

/// What the database gives, in any order.
#[derive(Default)]
pub(super) struct Found {
    /// A child and a parent of it each.
    parents: Vec<(i64, i64)>,
    /// A group and a directory each, everyone in which is in the group.
    directories: Vec<(i64, i32)>,
    grants: Vec<Grant>,
    /// The patterns of the grants, one behind the other.
    patterns: String,
    /// Groups that are not active.
    deleted: Vec<i64>,
    /// Of the actions.
    names: Vec<Arc<str>>,
}

struct Grant {
    holder: Node,
    /// Where in the patterns, and how long.
    pattern: (usize, usize),
    end: i64,
}

/// What a load makes of it.
pub(super) struct Graph {
    pub(super) model: Model,
    /// Of the actions.
    pub(super) names: Vec<Arc<str>>,
}

/// Reads it.
///
/// # Errors
/// [`Error::Database`], or [`Error::Unreadable`] for what this version does not understand.
pub(super) async fn read(connection: &mut PgConnection) -> Result<Found, Error> {
    let mut found = Found::default();
    rows(connection, GRAPH, |row| found.push(row)).await?;
    Ok(found)
}

impl Found {
    fn push(&mut self, [kind, id, other, name, end]: [Field<'_>; 5]) -> Result<(), Error> {
        match kind.int4_or_null()? {
            Some(1) => self.parents.push((id.int8()?, other.int8()?)),
            Some(2) => {
                let group = id.int8()?;
                self.directories
                    .extend(i32::try_from(other.int8()?).ok().map(|directory| (group, directory)));
            }
            Some(3) => self.grant(Node::Group(id.int8()?), name.text()?, end_in(end)?),
            Some(4) => self.grant(Node::User(id.int8()?), name.text()?, end_in(end)?),
            Some(5) => self.deleted.push(id.int8()?),
            _ => self.names.push(name.text()?.into()),
        }
        Ok(())
    }

    fn grant(&mut self, holder: Node, pattern: &str, end: i64) {
        self.grants.push(Grant { holder, pattern: (self.patterns.len(), pattern.len()), end });
        self.patterns.push_str(pattern);
    }

    /// The model, with nodes in an order that makes rows short: holders of one grant get numbers near each other, and users,
    /// who have the grants of one each as a rule, come after all groups.
    pub(super) fn into_graph(self) -> Graph {
        let Self { mut parents, mut directories, mut grants, patterns, deleted, names } = self;
        let (mut model, mut new) = (Model::default(), Vec::new());
        parents.sort_unstable();
        for edges in parents.chunk_by(|one, other| one.0 == other.0) {
            let Some(&(child, _)) = edges.first() else { continue };
            model.set_parents(child, edges.iter().map(|edge| edge.1).collect(), &mut new);
        }
        directories.sort_unstable();
        for everyone in directories.chunk_by(|one, other| one.0 == other.0) {
            let Some(&(group, _)) = everyone.first() else { continue };
            model.set_directories(
                group,
                everyone.iter().map(|(_, directory)| *directory).collect(),
                &mut new,
            );
        }
        let pattern = |grant: &Grant| {
            let (start, length) = grant.pattern;
            patterns.get(start..start + length).unwrap_or_default()
        };
        grants.sort_unstable_by(|one, other| match (one.holder, other.holder) {
            (Node::User(_), Node::User(_)) => one.holder.cmp(&other.holder),
            (Node::User(_), _) => Ordering::Greater,
            (_, Node::User(_)) => Ordering::Less,
            _ => (pattern(one), one.holder).cmp(&(pattern(other), other.holder)),
        });
        for grant in &grants {
            model.grant(grant.holder, pattern(grant), grant.end, &mut new);
        }
        // After the grants: before, the model would not know the groups.
        for group in deleted {
            model.set_deleted(group, true);
        }
        model.settle();
        model.link();
        Graph { model, names }
    }
}

#[cfg(test)]
mod tests {
    use super::super::row::{NEVER, Reach};
    use super::*;

    /// Each kind of row in the order that is given, and the facts that follow from them.
    fn graph(turn: impl Fn(usize) -> usize) -> Graph {
        fn turned<T>(rows: Vec<T>, turn: &impl Fn(usize) -> usize) -> Vec<T> {
            let count = rows.len();
            let mut rows: Vec<_> = rows.into_iter().enumerate().collect();
            rows.sort_by_key(|(at, _)| turn(*at) % count.max(1));
            rows.into_iter().map(|(_, row)| row).collect()
        }
        let mut found = Found {
            // 3 is in 1 and 2, 4 in 3, 5 in 2.
            parents: turned(vec![(3, 1), (4, 3), (5, 2), (3, 2)], &turn),
            // Everyone in 7 and 8 is in 4, everyone in 9 in 2 and 6.
            directories: turned(vec![(4, 7), (6, 9), (2, 9), (4, 8)], &turn),
            deleted: turned(vec![6, 77], &turn),
            names: turned(["a.one", "a.two", "b", "c"].map(Arc::from).to_vec(), &turn),
            ..Found::default()
        };
        let grants = vec![
            (Node::Group(1), "a.*", NEVER),
            (Node::Group(2), "b", 5),
            (Node::User(50), "b", NEVER),
            (Node::Group(6), "c", NEVER),
            (Node::User(40), "a.one", 9),
        ];
        for (holder, pattern, end) in turned(grants, &turn) {
            found.grant(holder, pattern, end);
        }
        found.into_graph()
    }

    #[test]
    fn order_of_the_rows_changes_nothing() {
        let numbers = |graph: &Graph| {
            let groups = (1..=6).map(|id| graph.model.node(Node::Group(id)));
            let everyone = (7..=9).map(|id| graph.model.node(Node::Everyone(id)));
            groups
                .chain(everyone)
                .chain([40, 50].map(|id| graph.model.node(Node::User(id))))
                .collect::<Vec<_>>()
        };
        let first = numbers(&graph(|at| at));
        let orders: [fn(usize) -> usize; 6] =
            [|at| at, |at| 100 - at, |at| at + 1, |at| at + 2, |at| at * 3, |at| at ^ 1];
        for order in orders {
            let graph = graph(order);
            assert_eq!(numbers(&graph), first);
            let rows = graph.model.rows(graph.names.iter());
            let reach = |action: &str, node: Node| {
                let (_, row) = rows.iter().find(|(name, _)| &**name == action).unwrap();
                row.reach(&[graph.model.node(node).unwrap()])
            };
            for (node, a, b) in [
                (Node::Group(1), Reach::Always, Reach::Never),
                (Node::Group(2), Reach::Never, Reach::Until(5)),
                (Node::Group(3), Reach::Always, Reach::Until(5)),
                (Node::Group(4), Reach::Always, Reach::Until(5)),
                (Node::Group(5), Reach::Never, Reach::Until(5)),
                (Node::Everyone(7), Reach::Always, Reach::Until(5)),
                (Node::Everyone(8), Reach::Always, Reach::Until(5)),
                (Node::Everyone(9), Reach::Never, Reach::Until(5)),
                (Node::User(50), Reach::Never, Reach::Always),
            ] {
                assert_eq!((reach("a.two", node), reach("b", node)), (a, b), "{node:?}");
            }
            assert_eq!(reach("a.one", Node::User(40)), Reach::Until(9));
            // A deleted group gives nothing, neither to members nor to everyone in the directory.
            assert_eq!(
                (reach("c", Node::Group(6)), reach("c", Node::Everyone(9))),
                (Reach::Never, Reach::Never)
            );
        }
    }
}
