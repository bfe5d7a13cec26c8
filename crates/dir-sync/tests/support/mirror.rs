//! What the mirror of a directory holds, and what it should hold: two ways that share no code.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::Value;
use sqlx::PgPool;

/// The mirror of one directory, everything by the directory's own ids.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
pub(crate) struct Mirror {
    /// Name, display name, status; external members of the directory's groups included.
    pub(crate) users: BTreeMap<String, (String, String, String)>,
    /// Name, display name, description.
    pub(crate) groups: BTreeMap<String, (String, String, String)>,
    /// Group, user, role.
    pub(crate) members: BTreeSet<(String, String, String)>,
    /// Parent, child.
    pub(crate) nested: BTreeSet<(String, String)>,
    /// Groups that everyone of the directory is in.
    pub(crate) everyone: BTreeSet<String>,
    /// Group, ancestor of the same directory, depth.
    pub(crate) closure: BTreeSet<(String, String, i32)>,
}

impl Mirror {
    /// What the tables hold of a directory; also sees that deleted rows have no memberships.
    pub(crate) async fn read(pool: &PgPool, directory: &str) -> Self {
        let users: Vec<(String, String, String, String)> = sqlx::query_as(
            "select u.external_id, u.user_name, u.display_name, u.status
             from authz.users u join authz.directories d using (directory_id)
             where d.directory_name = $1 and u.status <> 'deleted'
             union
             select u.external_id, u.user_name, u.display_name, u.status
             from authz.users u
             join authz.group_users m using (user_id)
             join authz.groups g using (group_id)
             join authz.directories d on d.directory_id = g.directory_id
             where u.directory_id is null and u.status <> 'deleted' and d.directory_name = $1",
        )
        .bind(directory)
        .fetch_all(pool)
        .await
        .unwrap();
        let groups: Vec<(String, String, String, String)> = sqlx::query_as(
            "select g.external_id, g.group_name, g.display_name, g.description
             from authz.groups g join authz.directories d using (directory_id)
             where d.directory_name = $1 and g.status <> 'deleted'",
        )
        .bind(directory)
        .fetch_all(pool)
        .await
        .unwrap();
        let members: Vec<(String, String, String)> = sqlx::query_as(
            "select g.external_id, coalesce(u.external_id, u.user_name), m.role
             from authz.group_users m
             join authz.groups g using (group_id)
             join authz.users u using (user_id)
             join authz.directories d on d.directory_id = g.directory_id
             where d.directory_name = $1",
        )
        .bind(directory)
        .fetch_all(pool)
        .await
        .unwrap();
        let nested: Vec<(String, String)> = sqlx::query_as(
            "select p.external_id, coalesce(c.external_id, c.group_name)
             from authz.group_groups m
             join authz.groups p on p.group_id = m.parent_group_id
             join authz.groups c on c.group_id = m.child_group_id
             join authz.directories d on d.directory_id = p.directory_id
             where d.directory_name = $1",
        )
        .bind(directory)
        .fetch_all(pool)
        .await
        .unwrap();
        let everyone: Vec<(String, i32, i32)> = sqlx::query_as(
            "select g.external_id, m.directory_id, d.directory_id
             from authz.group_directories m
             join authz.groups g using (group_id)
             join authz.directories d on d.directory_id = g.directory_id
             where d.directory_name = $1",
        )
        .bind(directory)
        .fetch_all(pool)
        .await
        .unwrap();
        let closure: Vec<(String, String, i32)> = sqlx::query_as(
            "select g.external_id, a.external_id, c.depth
             from authz.group_ancestors c
             join authz.groups g on g.group_id = c.group_id
             join authz.groups a on a.group_id = c.ancestor_id
             join authz.directories d on d.directory_id = g.directory_id
             where d.directory_name = $1 and g.status <> 'deleted' and a.directory_id = g.directory_id",
        )
        .bind(directory)
        .fetch_all(pool)
        .await
        .unwrap();
        assert_deleted_rows_are_empty(pool).await;
        assert!(everyone.iter().all(|(_, member, own)| member == own), "everyone of another directory");
        Self {
            users: users
                .into_iter()
                .map(|(id, name, display, status)| (id, (name, display, status)))
                .collect(),
            groups: groups.into_iter().map(|(id, name, display, what)| (id, (name, display, what))).collect(),
            members: members.into_iter().collect(),
            nested: nested.into_iter().collect(),
            everyone: everyone.into_iter().map(|(group, _, _)| group).collect(),
            closure: closure.into_iter().collect(),
        }
    }

    /// What a directory file asks for.
    pub(crate) fn wanted(directory: &Value, include_external: bool) -> Self {
        let mut mirror = Self::default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for user in directory["users"].as_array().unwrap() {
            let off = user["suspended"] == true || user["archived"] == true;
            let status = if off { "suspended" } else { "active" };
            let display = text(&user["name"]["fullName"]);
            let name = text(&user["primaryEmail"]).to_ascii_lowercase();
            mirror.users.insert(text(&user["id"]), (name, display, status.to_owned()));
        }
        for group in directory["groups"].as_array().unwrap() {
            let name = text(&group["email"]).to_ascii_lowercase();
            let row = (name, text(&group["name"]), text(&group["description"]));
            mirror.groups.insert(text(&group["id"]), row);
        }
        let listed: BTreeSet<_> = mirror.users.keys().cloned().collect();
        for (group, members) in directory["members"].as_object().unwrap() {
            for member in members.as_array().unwrap() {
                let id = text(&member["id"]);
                match member["type"].as_str().unwrap() {
                    "USER" if include_external || listed.contains(&id) => {
                        if !listed.contains(&id) {
                            let name = text(&member["email"]).to_ascii_lowercase();
                            mirror.users.insert(id.clone(), (name, String::new(), "external".to_owned()));
                        }
                        let role = text(&member["role"]).to_ascii_lowercase();
                        mirror.members.insert((group.clone(), id, role));
                    }
                    "GROUP" if mirror.groups.contains_key(&id) && id != *group => {
                        mirror.nested.insert((group.clone(), id));
                    }
                    "CUSTOMER" if directory["customerId"] == id.as_str() => {
                        mirror.everyone.insert(group.clone());
                    }
                    _ => {}
                }
            }
        }
        for group in mirror.groups.keys() {
            mirror.closure.extend(ancestors(group, &mirror.nested));
        }
        mirror
    }

    /// What a directory file on disk asks for.
    pub(crate) fn wanted_by_file(path: &Path) -> Self {
        let mut plain = String::new();
        GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut plain).unwrap();
        Self::wanted(&serde_json::from_str(&plain).unwrap(), false)
    }
}

async fn assert_deleted_rows_are_empty(pool: &PgPool) {
    let left: i64 = sqlx::query_scalar(
        "select (select count(*) from authz.group_users m join authz.users u using (user_id)
                 join authz.groups g using (group_id)
                 where g.status = 'deleted' or (u.status = 'deleted' and g.directory_id <> 0))
              + (select count(*) from authz.group_groups m
                 join authz.groups p on p.group_id = m.parent_group_id
                 join authz.groups c on c.group_id = m.child_group_id
                 where p.status = 'deleted' or (c.status = 'deleted' and p.directory_id <> 0))
              + (select count(*) from authz.group_directories m join authz.groups g using (group_id)
                 where g.status = 'deleted')",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    assert_eq!(left, 0, "deleted users or groups still have memberships");
}

/// A group and all above it, by the shortest way.
fn ancestors(group: &str, nested: &BTreeSet<(String, String)>) -> BTreeSet<(String, String, i32)> {
    let mut depths = BTreeMap::from([(group.to_owned(), 0)]);
    let mut queue = VecDeque::from([group.to_owned()]);
    while let Some(here) = queue.pop_front() {
        let depth = depths[&here] + 1;
        for (parent, _) in nested.iter().filter(|(_, child)| *child == here) {
            if !depths.contains_key(parent) {
                depths.insert(parent.clone(), depth);
                queue.push_back(parent.clone());
            }
        }
    }
    depths.into_iter().map(|(ancestor, depth)| (group.to_owned(), ancestor, depth)).collect()
}
