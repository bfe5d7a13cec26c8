//! Lists a whole directory: users, groups and members side by side, page by page, and says what is complete.

mod again;
mod walk;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use futures_util::stream::{self, Stream, StreamExt};
use tokio::sync::{Semaphore, mpsc, watch};

pub use self::again::{crawl_again, crawl_members_again};
use self::walk::{Groups, MembersOf, Step, Stop, Users, Walk};
use crate::filter::GroupFilter;
use crate::source::{Group, Member, MemberKind, Source, SourceError, User, error_chain};

/// A listing of the directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Listing {
    /// The users.
    Users,
    /// The groups.
    Groups,
    /// One group's direct members.
    Members {
        /// The group.
        group_id: String,
    },
}

impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Users => f.write_str("users"),
            Self::Groups => f.write_str("groups"),
            Self::Members { group_id } => write!(f, "members of group `{group_id}`"),
        }
    }
}

/// What the crawl hands on as it comes in. A group's own batch comes before those of its members; only after the
/// groups restarted may members come before their group is listed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Batch {
    /// Some of the users.
    Users(Vec<User>),
    /// Some of the groups.
    Groups(Vec<Group>),
    /// Some of a group's members. They count once the group is [`Listed`](Self::Listed).
    Members {
        /// The group.
        group_id: String,
        /// Its direct members.
        members: Vec<Member>,
    },
    /// The members of this group are complete: those that were sent, and no others.
    Listed {
        /// The group.
        group_id: String,
    },
    /// Members that a second look at the group shows: whoever the listing missed stays.
    MembersAgain {
        /// The group.
        group_id: String,
        /// Some of its direct members.
        members: Vec<Member>,
    },
    /// That listing starts again: forget what was sent for it.
    Restart(Listing),
}

/// How to crawl.
#[derive(Debug, Clone)]
pub struct CrawlOptions {
    /// Calls under way at the same time, at most; at least one.
    pub concurrency: usize,
    /// Groups to leave out as if the directory did not list them.
    pub filter: GroupFilter,
    /// Where to show how far the crawl is.
    pub progress: Option<watch::Sender<Progress>>,
}

impl Default for CrawlOptions {
    fn default() -> Self {
        Self { concurrency: 8, filter: GroupFilter::default(), progress: None }
    }
}

/// How far a crawl is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Users so far.
    pub users: u64,
    /// Groups so far.
    pub groups: u64,
    /// Groups whose members were listed, or could not be.
    pub groups_done: u64,
    /// Memberships so far.
    pub memberships: u64,
}

/// What a finished crawl found. The users and groups are complete; of the members only `incomplete` is not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Crawl {
    /// Users.
    pub users: u64,
    /// Groups, without the vanished ones and those left out.
    pub groups: u64,
    /// Groups that the filter left out.
    pub left_out: u64,
    /// Direct memberships in the groups whose listing is complete.
    pub memberships: u64,
    /// Groups whose members are not known.
    pub incomplete: Vec<Incomplete>,
    /// Ids of groups that went away during the crawl: take them as not listed.
    pub vanished: Vec<String>,
    /// Ids of all groups that were listed, the vanished ones included.
    pub listed: HashSet<String>,
    /// Groups whose members came on several pages, which are not of one moment, or that have none at all.
    pub unsure: Vec<Unsure>,
    /// Members of types not known here, by type; they were sent all the same.
    pub unknown_member_types: BTreeMap<String, u64>,
    /// API calls that were sent.
    pub calls: u64,
    /// The directory's customer, if known.
    pub customer_id: Option<String>,
}

/// A group whose listing is no proof that somebody is not a member any more: its pages are of different moments, or it is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsure {
    /// The group.
    pub group: Group,
    /// On how many pages its members came.
    pub pages: usize,
}

/// A group whose members could not be listed completely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incomplete {
    /// The group's id.
    pub group_id: String,
    /// The group's address.
    pub group_email: String,
    /// Why, in one line.
    pub reason: String,
}

/// Why a crawl gave no result; nothing of what was sent may be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CrawlError {
    /// The directory cannot be read at all.
    #[error(transparent)]
    Fatal(SourceError),
    /// The users or the groups could not be listed.
    #[error("the {listing} could not be listed, so nothing is changed")]
    Listing {
        /// Which ones.
        listing: Listing,
        /// Why.
        #[source]
        cause: SourceError,
    },
    /// The users or the groups were listed in a way that cannot be trusted.
    #[error("the listing of {listing} is not complete, so nothing is changed: {reason}; run again")]
    Incomplete {
        /// Which ones.
        listing: Listing,
        /// Why.
        reason: String,
    },
    /// Nobody takes the pages any more.
    #[error("the crawl was stopped: its pages are no longer taken")]
    ReceiverGone,
}

/// Lists the whole directory and sends it on page by page.
///
/// Without failures it asks for each page once and for nothing else. A group whose members cannot be listed does not
/// stop the others.
///
/// A [`Batch`] becomes what the receiver takes before it is sent, in the task of the crawl.
///
/// # Errors
/// [`CrawlError`] if the users or groups are not complete, if the directory refuses us, or if the receiver is gone.
pub async fn crawl<P: From<Batch> + Send>(
    source: Arc<dyn Source>,
    options: CrawlOptions,
    pages: mpsc::Sender<P>,
) -> Result<Crawl, CrawlError> {
    let calls_before = source.calls();
    let run = Run::new(source.as_ref(), &options, pages);
    // As many groups wait here as the directory lists ahead of their members; a group is small.
    let (found, to_list) = mpsc::unbounded_channel();
    let waiting =
        stream::unfold(to_list, |mut groups| async { groups.recv().await.map(|group| (group, groups)) });
    let (users, groups, mut tally) =
        tokio::try_join!(run.list_users(), run.list_groups(found), run.list_all_members(waiting))?;

    let mut vanished = run.look_again(&mut tally).await?;
    run.keep_unknown_everyone(&mut tally).await?;
    // A restart of the groups may have lost some whose members were listed already.
    for group_id in groups.lost {
        run.send(Batch::Restart(Listing::Members { group_id: group_id.clone() })).await?;
        tally.incomplete.retain(|group| group.group_id != group_id);
        if !vanished.contains(&group_id) {
            vanished.push(group_id);
        }
    }
    vanished.sort_unstable();
    tally.unsure.retain(|unsure| groups.listed.contains(&unsure.group.id));
    tally.unsure.sort_unstable_by(|a, b| a.group.email.cmp(&b.group.email));
    tally.incomplete.sort_unstable_by(|a, b| a.group_email.cmp(&b.group_email));
    let vanished_of_listed = vanished.iter().filter(|id| groups.listed.contains(*id)).count();
    let groups_left = groups.listed.len() - vanished_of_listed;
    warn_of(&tally.incomplete);
    Ok(Crawl {
        users,
        groups: u64::try_from(groups_left).unwrap_or(u64::MAX),
        left_out: groups.left_out,
        memberships: tally.memberships,
        incomplete: tally.incomplete,
        vanished,
        listed: groups.listed,
        unsure: tally.unsure,
        unknown_member_types: tally.unknown_member_types,
        calls: source.calls().saturating_sub(calls_before),
        customer_id: source.customer_id(),
    })
}

const NOT_FOUND: &str = "the directory lists the group but does not find it";

fn warn_of(incomplete: &[Incomplete]) {
    for Incomplete { group_id, group_email, reason } in incomplete {
        tracing::warn!(group_id, group = group_email, reason, "members not complete");
    }
}

fn incomplete(group: Group, reason: String) -> Incomplete {
    Incomplete { group_id: group.id, group_email: group.email, reason }
}

/// What the listings of members add up to.
#[derive(Debug, Default)]
struct Tally {
    memberships: u64,
    unknown_member_types: BTreeMap<String, u64>,
    incomplete: Vec<Incomplete>,
    vanished: Vec<Group>,
    /// Groups with everyone of some customer among their members.
    of_everyone: Vec<Group>,
    /// Groups whose members came on several pages, or not at all.
    unsure: Vec<Unsure>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.memberships += other.memberships;
        for (kind, count) in other.unknown_member_types {
            *self.unknown_member_types.entry(kind).or_default() += count;
        }
        self.incomplete.extend(other.incomplete);
        self.vanished.extend(other.vanished);
        self.of_everyone.extend(other.of_everyone);
        self.unsure.extend(other.unsure);
    }
}

/// The ids of the groups as listed last, and of those that an earlier, restarted pass had besides.
#[derive(Debug)]
struct GroupIds {
    listed: HashSet<String>,
    lost: Vec<String>,
    left_out: u64,
}

struct Run<'a, P> {
    source: &'a dyn Source,
    permits: Semaphore,
    concurrency: usize,
    filter: &'a GroupFilter,
    pages: mpsc::Sender<P>,
    progress: watch::Sender<Progress>,
}

impl<'a, P: From<Batch> + Send> Run<'a, P> {
    fn new(source: &'a dyn Source, options: &'a CrawlOptions, pages: mpsc::Sender<P>) -> Self {
        let concurrency = options.concurrency.max(1);
        Self {
            source,
            permits: Semaphore::new(concurrency),
            concurrency,
            filter: &options.filter,
            pages,
            progress: options.progress.clone().unwrap_or_default(),
        }
    }

    async fn send(&self, batch: Batch) -> Result<(), CrawlError> {
        self.pages.send(batch.into()).await.map_err(|_| CrawlError::ReceiverGone)
    }

    async fn list_users(&self) -> Result<u64, CrawlError> {
        let mut walk = Walk::new(&self.permits, Users(self.source));
        let mut count = 0;
        loop {
            match walk.next().await.map_err(|stop| stop.of(Listing::Users))? {
                Step::Page(users) => {
                    count += u64::try_from(users.len()).unwrap_or(u64::MAX);
                    self.progress.send_modify(|progress| progress.users = count);
                    self.send(Batch::Users(users)).await?;
                }
                Step::Restarted => {
                    count = 0;
                    self.send(Batch::Restart(Listing::Users)).await?;
                }
                Step::Done => return Ok(count),
            }
        }
    }

    async fn list_groups(&self, found: mpsc::UnboundedSender<Group>) -> Result<GroupIds, CrawlError> {
        let mut walk = Walk::new(&self.permits, Groups(self.source));
        // Each group by the pass that listed it last.
        let mut seen: HashMap<String, u32> = HashMap::new();
        let mut pass = 0;
        let mut left_out = 0;
        loop {
            match walk.next().await.map_err(|stop| stop.of(Listing::Groups))? {
                Step::Page(mut groups) => {
                    let all = groups.len();
                    groups.retain(|group| self.filter.keeps(&group.email));
                    left_out += u64::try_from(all - groups.len()).unwrap_or(u64::MAX);
                    self.send(Batch::Groups(groups.clone())).await?;
                    for group in groups {
                        // After a restart, members that were listed already need no second listing.
                        if seen.insert(group.id.clone(), pass).is_none() {
                            // The other end is open as long as this future is polled.
                            let _ = found.send(group);
                        }
                    }
                    let count = u64::try_from(seen.len()).unwrap_or(u64::MAX);
                    self.progress.send_modify(|progress| progress.groups = count);
                }
                Step::Restarted => {
                    pass += 1;
                    left_out = 0;
                    self.send(Batch::Restart(Listing::Groups)).await?;
                }
                Step::Done => {
                    let (listed, lost): (Vec<_>, Vec<_>) =
                        seen.into_iter().partition(|(_, last)| *last == pass);
                    let ids = |groups: Vec<(String, u32)>| groups.into_iter().map(|(id, _)| id);
                    let (listed, lost) = (ids(listed).collect(), ids(lost).collect());
                    return Ok(GroupIds { listed, lost, left_out });
                }
            }
        }
    }

    /// The ids of all groups, for a second look.
    async fn group_ids(&self) -> Result<HashSet<String>, Stop> {
        let mut walk = Walk::new(&self.permits, Groups(self.source));
        let mut ids = HashSet::new();
        loop {
            match walk.next().await? {
                Step::Page(groups) => ids.extend(groups.into_iter().map(|group| group.id)),
                Step::Restarted => ids.clear(),
                Step::Done => return Ok(ids),
            }
        }
    }

    /// Before a disappearance is believed, the groups are listed once more: those that are still there get their
    /// members listed again, the ids of the others are given back.
    async fn look_again(&self, tally: &mut Tally) -> Result<Vec<String>, CrawlError> {
        let not_found = std::mem::take(&mut tally.vanished);
        if not_found.is_empty() {
            return Ok(Vec::new());
        }
        let present = match self.group_ids().await {
            Ok(present) => present,
            Err(stop) => {
                let reason = format!(
                    "the directory did not find the group, and listing the groups again failed: {}",
                    stop.nonfatal()?
                );
                tally.incomplete.extend(not_found.into_iter().map(|group| incomplete(group, reason.clone())));
                return Ok(Vec::new());
            }
        };
        for group in &not_found {
            self.send(Batch::Restart(Listing::Members { group_id: group.id.clone() })).await?;
        }
        let (there, gone): (Vec<_>, Vec<_>) =
            not_found.into_iter().partition(|group| present.contains(&group.id));
        tally.add(self.list_all_members(stream::iter(there)).await?);
        let never_found = std::mem::take(&mut tally.vanished);
        tally.incomplete.extend(never_found.into_iter().map(|group| incomplete(group, NOT_FOUND.to_owned())));
        Ok(gone.into_iter().map(|group| group.id).collect())
    }

    /// Whether "everyone" is everyone of this directory cannot be told as long as the directory does not say which customer
    /// it is. Such a group is not known completely.
    async fn keep_unknown_everyone(&self, tally: &mut Tally) -> Result<(), CrawlError> {
        if self.source.customer_id().is_some() {
            return Ok(());
        }
        for group in std::mem::take(&mut tally.of_everyone) {
            self.send(Batch::Restart(Listing::Members { group_id: group.id.clone() })).await?;
            let reason = "everyone of a customer is a member, and no user says which customer this directory is; name it \
                          (`--google-customer`)";
            tally.incomplete.push(incomplete(group, reason.to_owned()));
        }
        Ok(())
    }

    async fn list_all_members(&self, groups: impl Stream<Item = Group>) -> Result<Tally, CrawlError> {
        let listings = groups.map(|group| self.list_or_forget_members(group));
        let mut listings = std::pin::pin!(listings.buffer_unordered(self.concurrency));
        let mut tally = Tally::default();
        // INVARIANT: nothing is waited for between two listings, since the others wait in the same queues and go on only while
        // they are polled here (held by `group_that_may_not_be_read_does_not_stop_the_others`).
        while let Some(listed) = listings.next().await {
            let listed = listed?;
            // A group that was not found is not done: it is looked at again at the end.
            self.progress.send_modify(|progress| {
                progress.groups_done += u64::from(listed.vanished.is_empty());
                progress.memberships += listed.memberships;
            });
            tally.add(listed);
        }
        Ok(tally)
    }

    /// One group's members; those of a group whose listing did not become complete are forgotten.
    async fn list_or_forget_members(&self, group: Group) -> Result<Tally, CrawlError> {
        let stop = match self.list_members(&group).await {
            Ok(tally) => return Ok(tally),
            Err(MembersStop::Send(error)) => return Err(error),
            Err(MembersStop::Listing(Stop::Failed(SourceError::GroupVanished { .. }))) => {
                return Ok(Tally { vanished: vec![group], ..Tally::default() });
            }
            Err(MembersStop::Listing(stop)) => stop,
        };
        let reason = stop.nonfatal()?;
        self.send(Batch::Restart(Listing::Members { group_id: group.id.clone() })).await?;
        Ok(Tally { incomplete: vec![incomplete(group, reason)], ..Tally::default() })
    }

    async fn list_members(&self, group: &Group) -> Result<Tally, MembersStop> {
        let mut walk = Walk::new(&self.permits, MembersOf(self.source, group));
        let mut tally = Tally::default();
        let mut pages = 0;
        loop {
            match walk.next().await.map_err(MembersStop::Listing)? {
                Step::Page(members) => {
                    pages += 1;
                    tally.memberships += u64::try_from(members.len()).unwrap_or(u64::MAX);
                    if tally.of_everyone.is_empty() && members.iter().any(|m| m.kind == MemberKind::Customer)
                    {
                        tally.of_everyone.push(group.clone());
                    }
                    for member in &members {
                        if let MemberKind::Other(kind) = &member.kind {
                            *tally.unknown_member_types.entry(kind.clone()).or_default() += 1;
                        }
                    }
                    if !members.is_empty() {
                        let batch = Batch::Members { group_id: group.id.clone(), members };
                        self.send(batch).await.map_err(MembersStop::Send)?;
                    }
                }
                Step::Restarted => {
                    (tally, pages) = (Tally::default(), 0);
                    let restart = Batch::Restart(Listing::Members { group_id: group.id.clone() });
                    self.send(restart).await.map_err(MembersStop::Send)?;
                }
                Step::Done => {
                    if pages > 1 || tally.memberships == 0 {
                        tally.unsure.push(Unsure { group: group.clone(), pages });
                    }
                    let listed = Batch::Listed { group_id: group.id.clone() };
                    self.send(listed).await.map_err(MembersStop::Send)?;
                    return Ok(tally);
                }
            }
        }
    }
}

/// Why a group's members were not listed.
enum MembersStop {
    Listing(Stop),
    Send(CrawlError),
}

impl Stop {
    /// As the failure of the users or the groups, which ends the crawl.
    fn of(self, listing: Listing) -> CrawlError {
        match self {
            Self::Failed(error) if error.is_fatal() => CrawlError::Fatal(error),
            Self::Failed(cause) => CrawlError::Listing { listing, cause },
            Self::Untrusted(reason) => CrawlError::Incomplete { listing, reason },
        }
    }

    /// As the reason why one listing is incomplete, unless no other can succeed either.
    fn nonfatal(self) -> Result<String, CrawlError> {
        match self {
            Self::Failed(error) if error.is_fatal() => Err(CrawlError::Fatal(error)),
            Self::Failed(error) => Ok(error_chain(&error)),
            Self::Untrusted(reason) => Ok(reason),
        }
    }
}
