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
