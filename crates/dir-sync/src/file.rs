//! A directory file as a source: `{"customerId", "users": [...], "groups": [...], "members": {groupId: [...]}}` with the
//! objects as the Directory API returns them, plain or gzipped.

mod packed;
mod read;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use flate2::bufread::MultiGzDecoder;
use serde::Deserializer;

use self::packed::{Packed, PackedUser, Texts};
use self::read::Content;
use crate::source::{Cause, Group, Member, Page, PageToken, Source, SourceError, User};

const USERS_PER_PAGE: usize = 500;
const GROUPS_PER_PAGE: usize = 200;
const MEMBERS_PER_PAGE: usize = 200;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const BUFFER: usize = 64 * 1024;

/// A directory read from a file, which is read once, in one pass.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    customer_id: String,
    users: Vec<PackedUser>,
    groups: Vec<Group>,
    // `None`: the file says that the group has members but does not list them.
    members: HashMap<String, Option<Vec<Packed>>>,
    texts: Texts,
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
        let content = read(path).map_err(|error| {
            let problem = match &error {
                ReadError::Io(error) if error.kind() == ErrorKind::NotFound => "does not exist",
                ReadError::Io(error) if error.kind() != ErrorKind::UnexpectedEof => "cannot be read",
                ReadError::Json(error) if error.is_syntax() => "is not JSON",
                ReadError::Json(error) if error.is_data() => "is not a directory file",
                ReadError::Io(_) | ReadError::Json(_) => "is cut short; write it again",
            };
            let cause = match error {
                ReadError::Io(error) => error.into(),
                ReadError::Json(error) => error.into(),
            };
            file_error(problem.to_owned(), Some(cause))
        })?;
        Self::of(path, content).map_err(|problem| file_error(problem, None))
    }

    fn of(path: &Path, content: Content) -> Result<Self, String> {
        let missing = |key: &str| {
            format!("has no `{key}`; expected an object with `customerId`, `users`, `groups`, `members`")
        };
        let customer_id = content.customer_id.ok_or_else(|| missing("customerId"))?;
        let users = content.users.ok_or_else(|| missing("users"))?;
        let listed = content.groups.ok_or_else(|| missing("groups"))?;
        let mut listed_members = content.members.ok_or_else(|| missing("members"))?;

        let mut groups = Vec::with_capacity(listed.len());
        let mut members: HashMap<String, Option<Vec<Packed>>> = HashMap::with_capacity(listed.len());
        for (group, has_members) in listed {
            match listed_members.remove(&group.id) {
                Some(listed) => {
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
        if let Some(stray) = listed_members.keys().min() {
            return Err(format!("lists members of group `{stray}`, which is not among its `groups`"));
        }
        Ok(Self { path: path.to_owned(), customer_id, users, groups, members, texts: content.texts })
    }
}

enum ReadError {
    Io(std::io::Error),
    Json(serde_json::Error),
}

fn read(path: &Path) -> Result<Content, ReadError> {
    let mut file = BufReader::with_capacity(BUFFER, File::open(path).map_err(ReadError::Io)?);
    let parsed = if file.fill_buf().map_err(ReadError::Io)?.starts_with(&GZIP_MAGIC) {
        parse(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(file)))
    } else {
        parse(file)
    };
    parsed.map_err(|error| if error.is_io() { ReadError::Io(error.into()) } else { ReadError::Json(error) })
}

fn parse(reader: impl Read) -> Result<Content, serde_json::Error> {
    let mut json = serde_json::Deserializer::from_reader(reader);
    let mut content = (&mut json).deserialize_map(Content::default())?;
    content.texts.close();
    // To the end of the file: what is packed has its checksum there.
    json.end()?;
    Ok(content)
}

#[async_trait]
impl Source for FileSource {
    fn describe(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        format!("file {}", name.to_string_lossy())
    }

    async fn users(&self, page: Option<&PageToken>) -> Result<Page<User>, SourceError> {
        slice(&self.users, USERS_PER_PAGE, page, |user| self.texts.unpack_user(*user), || "users".to_owned())
    }

    async fn groups(&self, page: Option<&PageToken>) -> Result<Page<Group>, SourceError> {
        slice(&self.groups, GROUPS_PER_PAGE, page, Group::clone, || "groups".to_owned())
    }

    async fn members(&self, group: &Group, page: Option<&PageToken>) -> Result<Page<Member>, SourceError> {
        let what = || format!("members of group `{}`", group.email);
        match self.members.get(&group.id) {
            Some(Some(members)) => {
                slice(members, MEMBERS_PER_PAGE, page, |member| self.texts.unpack(*member), what)
            }
            Some(None) => Err(SourceError::Malformed {
                what: what(),
                problem: "the file gives the group direct members but lists none".to_owned(),
            }),
            None => Err(SourceError::GroupVanished { group: group.email.clone() }),
        }
    }

    async fn member(&self, group: &Group, id: &str) -> Result<Option<Member>, SourceError> {
        let mut members = self.members.get(&group.id).into_iter().flatten().flatten();
        let member = members.find(|member| self.texts.id(**member) == id);
        Ok(member.map(|member| self.texts.unpack(*member)))
    }

    fn is_of_one_moment(&self) -> bool {
        true
    }

    fn calls(&self) -> u64 {
        0
    }

    fn customer_id(&self) -> Option<String> {
        Some(self.customer_id.clone())
    }
}

/// The page that starts at the token, which is a position.
fn slice<T, U>(
    all: &[T],
    per_page: usize,
    page: Option<&PageToken>,
    item: impl Fn(&T) -> U,
    what: impl Fn() -> String,
) -> Result<Page<U>, SourceError> {
    let start = match page {
        None => 0,
        Some(PageToken(token)) => token.parse().map_err(|_| SourceError::StalePageToken { what: what() })?,
    };
    let rest = all.get(start..).ok_or_else(|| SourceError::StalePageToken { what: what() })?;
    let items = rest.iter().take(per_page).map(item).collect();
    let next = (rest.len() > per_page).then(|| PageToken((start + per_page).to_string()));
    Ok(Page { items, next })
}
