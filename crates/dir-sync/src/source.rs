//! Where a directory's users, groups and members come from: the one seam between dir-sync and the outside.

use std::error::Error;
use std::path::PathBuf;

use async_trait::async_trait;

/// A user whom the directory lists. Users being deleted are left out by the source.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct User {
    /// The directory's immutable id; equals the OpenID Connect `sub`.
    pub id: String,
    /// The primary address, as the directory spells it.
    pub email: String,
    /// The full name; empty if the directory has none.
    pub display_name: String,
    /// Suspended **or** archived.
    pub suspended: bool,
    /// The customer the user belongs to, where the directory says so.
    pub customer_id: Option<String>,
}

/// A group that the directory lists.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Group {
    /// The directory's immutable id.
    pub id: String,
    /// The group's address, as the directory spells it.
    pub email: String,
    /// The name for people; empty if there is none.
    pub name: String,
    /// What the group is for; empty if there is none.
    pub description: String,
}

/// What a member is. The directory's set is open, so what is unknown here is kept by its name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MemberKind {
    /// A user, who may be external: in no listing of users.
    User,
    /// A nested group, which may be external too.
    Group,
    /// Everyone of the customer whose id the member has.
    Customer,
    /// Any other type, as sent.
    Other(String),
}

/// A direct member of a group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    /// The immutable id of the user, group or customer.
    pub id: String,
    /// The address; a customer has none.
    pub email: Option<String>,
    /// `OWNER`, `MANAGER`, `MEMBER` as sent; empty when absent. It never decides membership.
    pub role: String,
    /// What the member is.
    pub kind: MemberKind,
}

/// Where the next page of a listing starts; opaque.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PageToken(pub String);

/// One page of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// What is on the page; may be empty.
    pub items: Vec<T>,
    /// Where the next page starts; `None` on the last one.
    pub next: Option<PageToken>,
}

/// A directory that can be listed page by page. A source retries what is worth retrying before it answers with an error.
#[async_trait]
pub trait Source: Send + Sync {
    /// The source in words for people, without secrets.
    fn describe(&self) -> String;

    /// One page of the users; the first without a token.
    ///
    /// # Errors
    /// [`SourceError`] says whether this listing, or everything, has to stop.
    async fn users(&self, page: Option<&PageToken>) -> Result<Page<User>, SourceError>;

    /// One page of the groups; the first without a token.
    ///
    /// # Errors
    /// [`SourceError`] says whether this listing, or everything, has to stop.
    async fn groups(&self, page: Option<&PageToken>) -> Result<Page<Group>, SourceError>;

    /// One page of a group's direct members; the first without a token.
    ///
    /// # Errors
    /// [`SourceError::GroupVanished`] if the directory does not know the group any more; else as above.
    async fn members(&self, group: &Group, page: Option<&PageToken>) -> Result<Page<Member>, SourceError>;

    /// The direct member of a group that has this id, be it a user or a nested group; `None` if the directory says that the group
    /// has no such member.
    ///
    /// # Errors
    /// As above. Any error but a fatal one has the group's members listed again instead.
    async fn member(&self, group: &Group, id: &str) -> Result<Option<Member>, SourceError>;

    /// Whether all pages are of one moment, as those of a file are. Nobody can be on none of them by moving meanwhile then, and
    /// nothing is looked for a second time.
    fn is_of_one_moment(&self) -> bool {
        false
    }

    /// API calls sent so far, retries included, calls for a token not.
    fn calls(&self) -> u64;

    /// The customer whose directory this is, once it is known.
    fn customer_id(&self) -> Option<String>;
}

/// The error below a [`SourceError`].
pub type Cause = Box<dyn Error + Send + Sync>;

/// Why a page could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The directory does not know the group any more.
    #[error("group `{group}` is no longer in the directory")]
    GroupVanished {
        /// The group's address.
        group: String,
    },
    /// The group has no such member.
    #[error("the directory has no {what}")]
    NoSuchMember {
        /// Who was asked for, of which group.
        what: String,
    },
    /// The directory refused a page token that it gave out before: the listing restarts from its first page.
    #[error("the directory refused the page token of the {what}; that listing has to start again")]
    StalePageToken {
        /// What was listed.
        what: String,
    },
    /// No usable answer came, however often it was tried.
    #[error("no usable answer for the {what} in {attempts} attempts; try again later")]
    Unavailable {
        /// What was listed.
        what: String,
        /// Calls that were sent.
        attempts: u32,
        /// What went wrong at the last one.
        #[source]
        cause: Cause,
    },
    /// The directory rejects this one request; others may succeed.
    #[error("the directory rejected the request for the {what}: {answer}")]
    Rejected {
        /// What was listed.
        what: String,
        /// The directory's words.
        answer: String,
    },
    /// The directory refuses us; nothing will succeed until someone changes a setting.
    #[error("{message}")]
    Refused {
        /// What is missing and where to set it.
        message: String,
    },
    /// Signing in is not possible.
    #[error("{message}")]
    Credentials {
        /// What is wrong and where to set it right.
        message: String,
        /// The error below, where there is one.
        #[source]
        cause: Option<Cause>,
    },
    /// The answer has not the shape of a directory listing.
    #[error("the answer for the {what} is not a directory listing: {problem}")]
    Malformed {
        /// What was listed.
        what: String,
        /// What does not fit.
        problem: String,
    },
    /// The directory file cannot be used.
    #[error("directory file `{}` {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as the end of a sentence about the file.
        problem: String,
        /// The error below, where there is one.
        #[source]
        cause: Option<Cause>,
    },
    /// A setting of the source has no usable value.
    #[error("{message}")]
    Setting {
        /// Which one and what it should be.
        message: String,
    },
}

impl SourceError {
    /// Whether no other listing can succeed either, so that the whole crawl has to stop.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Credentials { .. } | Self::File { .. } | Self::Setting { .. } => {
                true
            }
            Self::GroupVanished { .. }
            | Self::NoSuchMember { .. }
            | Self::StalePageToken { .. }
            | Self::Unavailable { .. }
            | Self::Rejected { .. }
            | Self::Malformed { .. } => false,
        }
    }
}

/// An error and all its sources in one line, for a report or a log field.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut below = error.source();
    while let Some(source) = below {
        let text = source.to_string();
        // Some errors repeat their source in their own message.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        below = source.source();
    }
    line
}
