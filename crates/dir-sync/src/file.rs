//! A directory file as a source: `{"customerId", "users": [...], "groups": [...], "members": {groupId: [...]}}` with the
//! objects as the Directory API returns them, plain or gzipped.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::google::shape::{GroupShape, Lacking, MemberShape, Shape, UserShape};
use crate::source::{Cause, Group, Member, Page, PageToken, Source, SourceError, User};

const USERS_PER_PAGE: usize = 500;
const GROUPS_PER_PAGE: usize = 200;
const MEMBERS_PER_PAGE: usize = 200;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// A directory read from a file, which is read once and whole.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    customer_id: String,
    users: Vec<User>,
    groups: Vec<Group>,
    // `None`: the file says that the group has members but does not list them.
    members: HashMap<String, Option<Vec<Member>>>,
}

impl FileSource {
    /// Reads the file.
    ///
    /// # Errors
    /// [`SourceError::File`] if the file cannot be read, is cut short, or is not a directory file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SourceError> {
        let path = path.as_ref();
        let file_error = |problem: String, cause: Option<Cause>| SourceError::File {
            path: path.to_owned(),
            problem,
            cause,
        };
        let bytes = read(path).map_err(|error| {
            let problem = match error.kind() {
                std::io::ErrorKind::NotFound => "does not exist",
                std::io::ErrorKind::UnexpectedEof => "is cut short; write it again",
                _ => "cannot be read",
            };
            file_error(problem.to_owned(), Some(error.into()))
        })?;
        let shape: DirectoryShape = serde_json::from_slice(&bytes).map_err(|error| {
            let problem = if error.is_eof() {
                "is cut short; write it again"
            } else if error.is_syntax() {
                "is not JSON"
            } else {
                "is not a directory file"
            };
            file_error(problem.to_owned(), Some(error.into()))
        })?;
        Self::from_shape(path, shape).map_err(|problem| file_error(problem, None))
    }

    fn from_shape(path: &Path, shape: DirectoryShape) -> Result<Self, String> {
        let missing = |key: &str| {
            format!("has no `{key}`; expected an object with `customerId`, `users`, `groups`, `members`")
        };
        let customer_id = shape.customer_id.ok_or_else(|| missing("customerId"))?;
        let user_shapes = shape.users.ok_or_else(|| missing("users"))?;
        let group_shapes = shape.groups.ok_or_else(|| missing("groups"))?;
        let mut member_shapes = shape.members.ok_or_else(|| missing("members"))?.0;

        let spoiled = |lacking: Lacking| format!("is not a directory file: {lacking}");
        let users = items(user_shapes).map_err(spoiled)?;
        let mut groups = Vec::with_capacity(group_shapes.len());
        let mut members: HashMap<String, Option<Vec<Member>>> = HashMap::with_capacity(group_shapes.len());
        for group_shape in group_shapes {
            let has_members = group_shape.says_it_has_members();
            let Some(group) = group_shape.into_item().map_err(spoiled)? else { continue };
            match member_shapes.remove(&group.id) {
                Some(shapes) => {
                    let listed = items(shapes).map_err(|lacking| {
                        format!("is not a directory file: in group `{}`, {lacking}", group.email)
                    })?;
                    members.insert(group.id.clone(), Some(listed));
                }
                // A group that stands in the file twice keeps the members it has.
                None if members.contains_key(&group.id) => {}
                None => {
                    members.insert(group.id.clone(), (!has_members).then(Vec::new));
                }
            }
            groups.push(group);
        }
        if let Some(stray) = member_shapes.keys().min() {
            return Err(format!("lists members of group `{stray}`, which is not among its `groups`"));
        }
        Ok(Self { path: path.to_owned(), customer_id, users, groups, members })
    }
}

fn items<S: Shape>(shapes: Vec<S>) -> Result<Vec<S::Item>, Lacking> {
    shapes.into_iter().filter_map(|shape| shape.into_item().transpose()).collect()
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    BufReader::new(File::open(path)?).read_to_end(&mut bytes)?;
    if !bytes.starts_with(&GZIP_MAGIC) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain)?;
    Ok(plain)
}

#[async_trait]
impl Source for FileSource {
    fn describe(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        format!("file {}", name.to_string_lossy())
    }

    async fn users(&self, page: Option<&PageToken>) -> Result<Page<User>, SourceError> {
        slice(&self.users, USERS_PER_PAGE, page, || "users".to_owned())
    }

    async fn groups(&self, page: Option<&PageToken>) -> Result<Page<Group>, SourceError> {
        slice(&self.groups, GROUPS_PER_PAGE, page, || "groups".to_owned())
    }

    async fn members(&self, group: &Group, page: Option<&PageToken>) -> Result<Page<Member>, SourceError> {
        let what = || format!("members of group `{}`", group.email);
        match self.members.get(&group.id) {
            Some(Some(members)) => slice(members, MEMBERS_PER_PAGE, page, what),
            Some(None) => Err(SourceError::Malformed {
                what: what(),
                problem: "the file gives the group direct members but lists none".to_owned(),
            }),
            None => Err(SourceError::GroupVanished { group: group.email.clone() }),
        }
    }

    fn calls(&self) -> u64 {
        0
    }

    fn customer_id(&self) -> Option<String> {
        Some(self.customer_id.clone())
    }
}

/// The page that starts at the token, which is a position.
fn slice<T: Clone>(
    all: &[T],
    per_page: usize,
    page: Option<&PageToken>,
    what: impl Fn() -> String,
) -> Result<Page<T>, SourceError> {
    let start = match page {
        None => 0,
        Some(PageToken(token)) => token.parse().map_err(|_| SourceError::StalePageToken { what: what() })?,
    };
    let rest = all.get(start..).ok_or_else(|| SourceError::StalePageToken { what: what() })?;
    let items: Vec<T> = rest.iter().take(per_page).cloned().collect();
    let next = (rest.len() > per_page).then(|| PageToken((start + per_page).to_string()));
    Ok(Page { items, next })
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object with `customerId`, `users`, `groups`, `members`")]
struct DirectoryShape {
    customer_id: Option<String>,
    users: Option<Vec<UserShape>>,
    groups: Option<Vec<GroupShape>>,
    members: Option<MembersShape>,
}

/// Members by group; a group that stands there twice is an error, where a map would keep the last one in silence.
#[derive(Debug)]
struct MembersShape(HashMap<String, Vec<MemberShape>>);

impl<'de> Deserialize<'de> for MembersShape {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByGroup;

        impl<'de> Visitor<'de> for ByGroup {
            type Value = MembersShape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of members by group id")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MembersShape, A::Error> {
                let mut members = HashMap::new();
                while let Some((group, listed)) = map.next_entry::<String, Vec<MemberShape>>()? {
                    if members.contains_key(&group) {
                        return Err(A::Error::custom(format_args!("`members` has group `{group}` twice")));
                    }
                    members.insert(group, listed);
                }
                Ok(MembersShape(members))
            }
        }

        deserializer.deserialize_map(ByGroup)
    }
}
