//! A small directory, built step by step.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use dir_sync::file::FileSource;
use directory_emulator::Directory;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::address;

/// A directory. A name without `@` stands for the address at example.com.
#[derive(Debug, Clone)]
pub(crate) struct Org {
    customer: String,
    users: BTreeMap<String, Value>,
    groups: BTreeMap<String, Value>,
    members: BTreeMap<String, Vec<Value>>,
}

impl Org {
    pub(crate) fn new(customer: &str) -> Self {
        Self {
            customer: customer.to_owned(),
            users: BTreeMap::new(),
            groups: BTreeMap::new(),
            members: BTreeMap::new(),
        }
    }

    pub(crate) fn user(mut self, id: &str, name: &str) -> Self {
        let user = json!({
            "id": id, "primaryEmail": address(name), "customerId": self.customer, "suspended": false,
            "archived": false, "name": {"fullName": format!("Full {id}")},
        });
        self.users.insert(id.to_owned(), user);
        self
    }

    pub(crate) fn set_user(mut self, id: &str, key: &str, value: impl Into<Value>) -> Self {
        self.users.get_mut(id).unwrap()[key] = value.into();
        self
    }

    pub(crate) fn rename_user(self, id: &str, name: &str) -> Self {
        self.set_user(id, "primaryEmail", address(name))
    }

    /// The user is no longer listed, nor a member of any group.
    pub(crate) fn without_user(mut self, id: &str) -> Self {
        assert!(self.users.remove(id).is_some());
        for members in self.members.values_mut() {
            members.retain(|member| member["id"] != id);
        }
        self
    }

    /// The user is no longer listed, but stays where it is a member.
    pub(crate) fn unlisted_user(mut self, id: &str) -> Self {
        assert!(self.users.remove(id).is_some());
        self
    }

    pub(crate) fn group(mut self, id: &str, name: &str) -> Self {
        let group = json!({
            "id": id, "email": address(name), "name": format!("Group {id}"), "description": format!("for {id}"),
        });
        self.groups.insert(id.to_owned(), group);
        self.members.entry(id.to_owned()).or_default();
        self
    }

    pub(crate) fn rename_group(mut self, id: &str, name: &str) -> Self {
        self.groups.get_mut(id).unwrap()["email"] = json!(address(name));
        self
    }

    /// The group is no longer listed, has no members and is a member of none.
    pub(crate) fn without_group(mut self, id: &str) -> Self {
        assert!(self.groups.remove(id).is_some());
        self.members.remove(id);
        for members in self.members.values_mut() {
            members.retain(|member| member["id"] != id);
        }
        self
    }

    pub(crate) fn member(self, group: &str, user: &str) -> Self {
        self.member_as(group, user, "MEMBER")
    }

    pub(crate) fn member_as(self, group: &str, user: &str, role: &str) -> Self {
        let email = self.users[user]["primaryEmail"].clone();
        self.raw_member(group, json!({"id": user, "email": email, "role": role, "type": "USER"}))
    }

    /// A member whom this directory does not list.
    pub(crate) fn external(self, group: &str, id: &str, name: &str) -> Self {
        self.raw_member(group, json!({"id": id, "email": address(name), "role": "MEMBER", "type": "USER"}))
    }

    pub(crate) fn nested(self, group: &str, child: &str) -> Self {
        let email = self.groups[child]["email"].clone();
        self.raw_member(group, json!({"id": child, "email": email, "role": "MEMBER", "type": "GROUP"}))
    }

    pub(crate) fn everyone(self, group: &str, customer: &str) -> Self {
        self.raw_member(group, json!({"id": customer, "role": "MEMBER", "type": "CUSTOMER"}))
    }

    pub(crate) fn raw_member(mut self, group: &str, member: Value) -> Self {
        self.members.get_mut(group).unwrap().push(member);
        self
    }

    pub(crate) fn without_member(mut self, group: &str, id: &str) -> Self {
        let members = self.members.get_mut(group).unwrap();
        let before = members.len();
        members.retain(|member| member["id"] != id);
        assert!(members.len() < before, "{id} is no member of {group}");
        self
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "customerId": self.customer,
            "asOf": "2026-01-01",
            "users": self.users.values().collect::<Vec<_>>(),
            "groups": self.groups.values().collect::<Vec<_>>(),
            "members": self.members,
        })
    }

    /// As a directory file; it goes with the folder.
    pub(crate) fn write(&self) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("org.json");
        std::fs::write(&path, self.json().to_string()).unwrap();
        (folder, path)
    }

    /// As a source that reads a directory file.
    pub(crate) fn source(&self) -> Arc<FileSource> {
        let (_folder, path) = self.write();
        Arc::new(FileSource::open(path).unwrap())
    }

    /// As what the emulator serves.
    pub(crate) fn directory(&self) -> Directory {
        Directory::from_value(self.json()).unwrap()
    }
}
