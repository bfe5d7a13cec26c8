use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Error;

/// A user, group or member as the API returns it, with every field it came with.
pub type Object = Map<String, Value>;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The users, groups and members of one organisation at one moment.
#[derive(Debug)]
pub struct Directory {
    content: Content,
    /// Index by id and by every address, in lower case.
    user_by_key: HashMap<String, usize>,
    group_by_key: HashMap<String, usize>,
    domains: HashSet<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    customer_id: String,
    as_of: Option<String>,
    users: Vec<Object>,
    groups: Vec<Object>,
    members: HashMap<String, Vec<Object>>,
}

impl Directory {
    /// Reads a directory file, plain JSON or gzip.
    ///
    /// # Errors
    /// When the file cannot be read, does not unpack, is not JSON, or its objects do not fit together.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::from_slice(&bytes)
            .map_err(|source| Error::File { path: path.to_owned(), source: Box::new(source) })
    }

    /// Reads the bytes of a directory file, plain JSON or gzip (told by its first bytes).
    ///
    /// # Errors
    /// When the bytes do not unpack, are not JSON, or the objects do not fit together.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.starts_with(&GZIP_MAGIC) {
            let mut json = Vec::new();
            MultiGzDecoder::new(bytes).read_to_end(&mut json).map_err(Error::Gunzip)?;
            Self::index(serde_json::from_slice(&json)?)
        } else {
            Self::index(serde_json::from_slice(bytes)?)
        }
    }

    /// Takes a directory that a test has built.
    ///
    /// # Errors
    /// When the value has not the shape of a directory file, or the objects do not fit together.
    pub fn from_value(json: Value) -> Result<Self, Error> {
        Self::index(serde_json::from_value(json)?)
    }

    /// The id of the Google Workspace account, as in `C01abc2de`.
    #[must_use]
    pub fn customer_id(&self) -> &str {
        &self.content.customer_id
    }

    /// The date that the file says it was taken on.
    #[must_use]
    pub fn as_of(&self) -> Option<&str> {
        self.content.as_of.as_deref()
    }

    /// All users in the order of the file, deleted ones (with a `deletionTime`) too.
    #[must_use]
    pub fn users(&self) -> &[Object] {
        &self.content.users
    }

    /// All groups in the order of the file.
    #[must_use]
    pub fn groups(&self) -> &[Object] {
        &self.content.groups
    }

    /// The direct members of the group with this id; empty for a group that is not known.
    #[must_use]
    pub fn members(&self, group_id: &str) -> &[Object] {
        self.content.members.get(group_id).map_or(&[], Vec::as_slice)
    }

    /// The user with this id, primary address or alias.
    #[must_use]
    pub fn user(&self, key: &str) -> Option<&Object> {
        self.user_by_key.get(&key.to_lowercase()).and_then(|index| self.content.users.get(*index))
    }

    /// The group with this id, address or alias.
    #[must_use]
    pub fn group(&self, key: &str) -> Option<&Object> {
        self.group_by_key.get(&key.to_lowercase()).and_then(|index| self.content.groups.get(*index))
    }

    pub(crate) fn has_domain(&self, domain: &str) -> bool {
        self.domains.contains(&domain.to_lowercase())
    }

    fn index(content: Content) -> Result<Self, Error> {
        let user_by_key = index_by_key(&content.users, "user", "primaryEmail")?;
        let group_by_key = index_by_key(&content.groups, "group", "email")?;

        let group_ids: HashSet<&str> = content.groups.iter().map(|group| text(group, "id")).collect();
        for (group_id, members) in &content.members {
            if !group_ids.contains(group_id.as_str()) {
                return Err(inconsistent(format!(
                    "`members` names group `{group_id}`, which is not in `groups`"
                )));
            }
            if members.iter().any(|member| text(member, "id").is_empty()) {
                return Err(inconsistent(format!("a member of group `{group_id}` has no `id`")));
            }
        }

        let addresses = content.users.iter().map(|user| text(user, "primaryEmail"));
        let domains = addresses
            .chain(content.groups.iter().map(|group| text(group, "email")))
            .filter_map(domain_of)
            .collect();
        Ok(Self { content, user_by_key, group_by_key, domains })
    }
}

/// The text of a field, empty when it is missing or no text.
pub(crate) fn text<'a>(object: &'a Object, field: &str) -> &'a str {
    object.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The part of an address behind the `@`, in lower case.
pub(crate) fn domain_of(address: &str) -> Option<String> {
    address.rsplit_once('@').map(|(_, domain)| domain.to_lowercase())
}

fn index_by_key(objects: &[Object], what: &str, address: &str) -> Result<HashMap<String, usize>, Error> {
    let mut by_key = HashMap::with_capacity(objects.len() * 2);
    for (index, object) in objects.iter().enumerate() {
        for field in ["id", address] {
            let key = text(object, field);
            if key.is_empty() {
                return Err(inconsistent(format!("{what} number {} has no `{field}`", index + 1)));
            }
            if by_key.insert(key.to_lowercase(), index).is_some() {
                return Err(inconsistent(format!("two {what}s have the {field} `{key}`")));
            }
        }
    }
    for (index, object) in objects.iter().enumerate() {
        for field in ["aliases", "nonEditableAliases"] {
            let aliases = object.get(field).and_then(Value::as_array);
            for alias in aliases.into_iter().flatten().filter_map(Value::as_str) {
                by_key.entry(alias.to_lowercase()).or_insert(index);
            }
        }
    }
    Ok(by_key)
}

fn inconsistent(what: String) -> Error {
    Error::Inconsistent { what }
}
