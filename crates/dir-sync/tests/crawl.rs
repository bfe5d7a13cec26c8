//! The crawl over a directory held in memory: what is complete, what is not, and what is sent on.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use async_trait::async_trait;
use dir_sync::crawl::{Batch, Crawl, CrawlError, CrawlOptions, Listing, Progress, crawl};
use dir_sync::source::{Group, Member, MemberKind, Page, PageToken, Source, SourceError, User};
use tokio::sync::{mpsc, watch};

#[derive(Clone, Copy)]
enum Fault {
    Unavailable,
    Refused,
    Vanished,
    StaleToken,
    SameTokenAgain,
    EndlessTokens,
    // From this call on the directory lists one group less: the named one is gone.
    GroupGone,
}

/// A directory with pages of two; faults strike the n-th call (from one) of a listing.
#[derive(Default)]
struct Fake {
    users: Vec<User>,
    groups: Vec<Group>,
    members: HashMap<String, Vec<Member>>,
    faults: Vec<(&'static str, std::ops::RangeInclusive<usize>, Fault)>,
    gone: Mutex<Option<&'static str>>,
    calls_of: Mutex<HashMap<String, usize>>,
    calls: AtomicU64,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

const PAGE: usize = 2;

impl Fake {
    async fn page<T: Clone>(
        &self,
        listing: &str,
        all: &[T],
        token: Option<&PageToken>,
    ) -> Result<Page<T>, SourceError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_under_way.fetch_max(under_way, Ordering::SeqCst);
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
        self.under_way.fetch_sub(1, Ordering::SeqCst);

        let number = {
            let mut calls = self.calls_of.lock().unwrap();
            let number = calls.entry(listing.to_owned()).or_default();
            *number += 1;
            *number
        };
        let start: usize = token.map_or(0, |token| token.0.parse().unwrap());
        let items: Vec<T> = all.iter().skip(start).take(PAGE).cloned().collect();
        let mut next = (start + PAGE < all.len()).then(|| PageToken((start + PAGE).to_string()));
        let what = listing.to_owned();
        for (name, strikes, fault) in &self.faults {
            if *name != listing || !strikes.contains(&number) {
                continue;
            }
            match fault {
                Fault::Unavailable => {
                    return Err(SourceError::Unavailable { what, attempts: 6, cause: "status 503".into() });
                }
                Fault::Refused => return Err(SourceError::Refused { message: "no scope".to_owned() }),
                Fault::Vanished => return Err(SourceError::GroupVanished { group: what }),
                Fault::StaleToken => return Err(SourceError::StalePageToken { what }),
                Fault::SameTokenAgain => next = Some(PageToken("0".to_owned())),
                Fault::EndlessTokens => next = Some(PageToken(format!("{}", 1000 + number))),
                Fault::GroupGone => {}
            }
        }
        Ok(Page { items, next })
    }
}

#[async_trait]
impl Source for Fake {
    fn describe(&self) -> String {
        "a directory in memory".to_owned()
    }

    async fn users(&self, page: Option<&PageToken>) -> Result<Page<User>, SourceError> {
        self.page("users", &self.users, page).await
    }

    async fn groups(&self, page: Option<&PageToken>) -> Result<Page<Group>, SourceError> {
        let number = self.calls_of.lock().unwrap().get("groups").copied().unwrap_or(0) + 1;
        let goes = self.faults.iter().any(|(name, strikes, fault)| {
            *name == "groups" && strikes.contains(&number) && matches!(fault, Fault::GroupGone)
        });
        let gone = if goes { *self.gone.lock().unwrap() } else { None };
        let listed: Vec<Group> =
            self.groups.iter().filter(|group| Some(group.id.as_str()) != gone).cloned().collect();
        self.page("groups", &listed, page).await
    }

    async fn members(&self, group: &Group, page: Option<&PageToken>) -> Result<Page<Member>, SourceError> {
        let none = Vec::new();
        self.page(&group.id, self.members.get(&group.id).unwrap_or(&none), page).await
    }

    async fn member(&self, group: &Group, id: &str) -> Result<Option<Member>, SourceError> {
        let members = self.members.get(&group.id).into_iter().flatten();
        Ok(members.into_iter().find(|member| member.id == id).cloned())
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn customer_id(&self) -> Option<String> {
        Some("C1".to_owned())
    }
}

fn user(id: &str) -> User {
    let email = format!("{id}@example.com");
    User { id: id.to_owned(), email, display_name: String::new(), suspended: false, customer_id: None }
}

fn group(id: &str) -> Group {
    let email = format!("{id}@example.com");
    Group { id: id.to_owned(), email, name: id.to_owned(), description: String::new() }
}

fn member(id: &str) -> Member {
    Member { id: id.to_owned(), email: None, role: "MEMBER".to_owned(), kind: MemberKind::User }
}

/// Five users, three groups: `g1` with five members, `g2` with one, `g3` with none.
fn directory() -> Fake {
    Fake {
        users: ["u1", "u2", "u3", "u4", "u5"].map(user).to_vec(),
        groups: ["g1", "g2", "g3"].map(group).to_vec(),
        members: HashMap::from([
            ("g1".to_owned(), ["u1", "u2", "u3", "u4", "u5"].map(member).to_vec()),
            ("g2".to_owned(), vec![member("u1")]),
        ]),
        ..Fake::default()
    }
}

fn with_fault(listing: &'static str, calls: std::ops::RangeInclusive<usize>, fault: Fault) -> Fake {
    let mut directory = directory();
    directory.faults.push((listing, calls, fault));
    directory
}

/// What a receiver holds that does as the batches say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mirror {
    users: Vec<String>,
    groups: Vec<String>,
    members: BTreeMap<String, Vec<String>>,
    ever_listed: BTreeSet<String>,
}

impl Mirror {
    fn take(&mut self, batch: Batch) {
        match batch {
            Batch::Users(users) => self.users.extend(users.into_iter().map(|user| user.id)),
            Batch::Groups(groups) => {
                self.ever_listed.extend(groups.iter().map(|group| group.id.clone()));
                self.groups.extend(groups.into_iter().map(|group| group.id));
            }
            Batch::Members { group_id, members } => {
                assert!(self.ever_listed.contains(&group_id), "members of {group_id} came before the group");
                self.members.entry(group_id).or_default().extend(members.into_iter().map(|member| member.id));
            }
            Batch::Listed { group_id } => {
                self.members.entry(group_id).or_default();
            }
            // Only of a second look, which a crawl is not.
            Batch::MembersAgain { group_id, .. } => assert_eq!(group_id, "listed once"),
            Batch::Restart(Listing::Users) => self.users.clear(),
            Batch::Restart(Listing::Groups) => self.groups.clear(),
            Batch::Restart(Listing::Members { group_id }) => {
                self.members.remove(&group_id);
            }
        }
    }

    fn members_of(&self, group: &str) -> Vec<&str> {
        self.members
            .get(group)
            .map(|members| members.iter().map(String::as_str).collect())
            .unwrap_or_default()
    }
}

async fn crawl_with(directory: &Arc<Fake>, options: CrawlOptions) -> (Result<Crawl, CrawlError>, Mirror) {
    let (pages, mut batches) = mpsc::channel(1);
    let source: Arc<dyn Source> = Arc::clone(directory) as _;
    let crawl = tokio::spawn(crawl(source, options, pages));
    let mut mirror = Mirror::default();
    while let Some(batch) = batches.recv().await {
        mirror.take(batch);
    }
    (crawl.await.unwrap(), mirror)
}

async fn crawled(directory: Fake) -> (Result<Crawl, CrawlError>, Mirror) {
    crawl_with(&Arc::new(directory), CrawlOptions::default()).await
}

fn reasons(crawl: &Crawl) -> Vec<(&str, &str)> {
    crawl.incomplete.iter().map(|group| (group.group_id.as_str(), group.reason.as_str())).collect()
}

const ALL: [&str; 5] = ["u1", "u2", "u3", "u4", "u5"];

#[tokio::test]
async fn whole_directory_is_sent_once() {
    let (crawl, mirror) = crawled(directory()).await;
    let crawl = crawl.unwrap();
    assert_eq!(mirror.users, ALL);
    assert_eq!(mirror.groups, ["g1", "g2", "g3"]);
    assert_eq!(mirror.members_of("g1"), ALL);
    assert_eq!(mirror.members_of("g2"), ["u1"]);
    assert_eq!((crawl.users, crawl.groups, crawl.memberships), (5, 3, 6));
    assert_eq!(crawl.customer_id.as_deref(), Some("C1"));
    assert!(crawl.incomplete.is_empty() && crawl.vanished.is_empty());
}

#[tokio::test]
async fn group_without_members_is_sent_as_such() {
    let (_, mirror) = crawled(directory()).await;
    assert_eq!(mirror.members.get("g3"), Some(&vec![]));
}

#[tokio::test]
async fn calls_are_the_minimum() {
    // Users 3 pages, groups 2, members 3 + 1 + 1.
    assert_eq!(crawled(directory()).await.0.unwrap().calls, 10);
    assert_eq!(crawled(Fake::default()).await.0.unwrap().calls, 2);
}

#[tokio::test]
async fn calls_under_way_are_bounded() {
    for bound in [1, 3] {
        let mut directory = directory();
        for number in 0..40 {
            directory.groups.push(group(&format!("more{number}")));
        }
        let directory = Arc::new(directory);
        let (crawl, _) =
            crawl_with(&directory, CrawlOptions { concurrency: bound, ..CrawlOptions::default() }).await;
        assert_eq!(crawl.unwrap().groups, 43);
        assert_eq!(directory.most_under_way.load(Ordering::SeqCst), bound);
    }
}

#[tokio::test]
async fn failed_users_or_groups_fail_the_crawl() {
    for listing in ["users", "groups"] {
        let (crawl, _) = crawled(with_fault(listing, 2..=2, Fault::Unavailable)).await;
        let error = crawl.unwrap_err();
        assert!(matches!(error, CrawlError::Listing { .. }), "{error}");
        assert!(error.to_string().contains(listing), "{error}");
    }
}

#[tokio::test]
async fn failed_members_leave_the_other_groups_alone() {
    let (crawl, mirror) = crawled(with_fault("g1", 2..=2, Fault::Unavailable)).await;
    let crawl = crawl.unwrap();
    let reason = "no usable answer for the g1 in 6 attempts; try again later: status 503";
    assert_eq!(reasons(&crawl), [("g1", reason)]);
    assert_eq!(mirror.members_of("g2"), ["u1"]);
    assert_eq!((crawl.users, crawl.groups, crawl.memberships), (5, 3, 1));
}

#[tokio::test]
async fn refusal_at_one_group_stops_the_crawl() {
    let (crawl, _) = crawled(with_fault("g2", 1..=1, Fault::Refused)).await;
    assert_eq!(crawl.unwrap_err().to_string(), "no scope");
}

#[tokio::test]
async fn token_that_comes_twice_is_incomplete() {
    let (crawl, _) = crawled(with_fault("g1", 1..=99, Fault::SameTokenAgain)).await;
    assert_eq!(reasons(&crawl.unwrap()), [("g1", "page token `0` came twice")]);

    let (crawl, _) = crawled(with_fault("users", 1..=99, Fault::SameTokenAgain)).await;
    let error = crawl.unwrap_err().to_string();
    assert!(error.contains("users") && error.contains("page token `0` came twice"), "{error}");
}

#[tokio::test]
async fn pages_that_never_end_are_incomplete() {
    let (crawl, _) = crawled(with_fault("g1", 1..=usize::MAX, Fault::EndlessTokens)).await;
    assert_eq!(reasons(&crawl.unwrap()), [("g1", "20 pages in a row had nothing new")]);
}

#[tokio::test]
async fn conflicting_member_is_incomplete() {
    let mut directory = directory();
    let owner = Member { role: "OWNER".to_owned(), ..member("u1") };
    directory.members.get_mut("g1").unwrap().push(owner);
    let (crawl, _) = crawled(directory).await;
    assert_eq!(reasons(&crawl.unwrap()), [("g1", "id `u1` came twice with different content")]);
}

#[tokio::test]
async fn conflicting_user_or_group_fails_the_crawl() {
    let mut twice = directory();
    twice.users.push(User { suspended: true, ..user("u2") });
    let error = crawled(twice).await.0.unwrap_err();
    assert!(matches!(&error, CrawlError::Incomplete { listing: Listing::Users, .. }), "{error}");

    let mut twice = directory();
    twice.groups.push(Group { name: "other".to_owned(), ..group("g1") });
    let error = crawled(twice).await.0.unwrap_err();
    assert!(matches!(&error, CrawlError::Incomplete { listing: Listing::Groups, .. }), "{error}");
}

#[tokio::test]
async fn identical_duplicate_is_dropped() {
    let mut directory = directory();
    directory.users.push(user("u1"));
    directory.groups.push(group("g2"));
    directory.members.get_mut("g1").unwrap().push(member("u3"));
    let (crawl, mirror) = crawled(directory).await;
    let crawl = crawl.unwrap();
    assert_eq!((crawl.users, crawl.groups, crawl.memberships), (5, 3, 6));
    assert_eq!(mirror.users, ALL);
    assert_eq!(mirror.groups, ["g1", "g2", "g3"]);
    assert_eq!(mirror.members_of("g1"), ALL);
    assert_eq!(mirror.members_of("g2"), ["u1"]);
}

#[tokio::test]
async fn stale_token_starts_the_listing_again() {
    for listing in ["users", "groups", "g1"] {
        let (crawl, mirror) = crawled(with_fault(listing, 2..=2, Fault::StaleToken)).await;
        let crawl = crawl.unwrap();
        assert_eq!((crawl.users, crawl.groups, crawl.memberships), (5, 3, 6), "{listing}");
        assert_eq!(mirror.users, ALL, "{listing}");
        assert_eq!(mirror.groups, ["g1", "g2", "g3"], "{listing}");
        assert_eq!(mirror.members_of("g1"), ALL, "{listing}");
        assert!(crawl.incomplete.is_empty() && crawl.vanished.is_empty());
    }
}

#[tokio::test]
async fn listing_starts_again_twice_at_most() {
    let (crawl, _) = crawled(with_fault("g1", 1..=99, Fault::StaleToken)).await;
    let crawl = crawl.unwrap();
    assert_eq!(crawl.incomplete.len(), 1);
    // Users 3, groups 2, `g1` 3 times its first page, `g2` and `g3` 1 each.
    assert_eq!(crawl.calls, 10);
}

#[tokio::test]
async fn group_lost_by_a_restart_counts_as_vanished() {
    let mut directory = with_fault("groups", 2..=2, Fault::StaleToken);
    directory.faults.push(("groups", 3..=99, Fault::GroupGone));
    directory.gone = Mutex::new(Some("g1"));
    let (crawl, mirror) = crawled(directory).await;
    let crawl = crawl.unwrap();
    assert_eq!(crawl.vanished, ["g1"]);
    assert_eq!(crawl.groups, 2);
    assert_eq!(mirror.groups, ["g2", "g3"]);
    assert_eq!(mirror.members.get("g1"), None);
}

#[tokio::test]
async fn group_that_is_really_gone_is_vanished() {
    // `g1` gives one page and is not found from then on; the second listing of groups has it no more.
    let mut directory = with_fault("g1", 2..=99, Fault::Vanished);
    directory.faults.push(("groups", 3..=99, Fault::GroupGone));
    directory.gone = Mutex::new(Some("g1"));
    let (crawl, mirror) = crawled(directory).await;
    let crawl = crawl.unwrap();
    assert_eq!(crawl.vanished, ["g1"]);
    assert!(crawl.incomplete.is_empty());
    assert_eq!((crawl.groups, crawl.memberships), (2, 1));
    assert_eq!(mirror.members.get("g1"), None);
}

#[tokio::test]
async fn group_that_is_still_listed_gets_a_second_chance() {
    let (crawl, mirror) = crawled(with_fault("g1", 2..=2, Fault::Vanished)).await;
    let crawl = crawl.unwrap();
    assert!(crawl.vanished.is_empty() && crawl.incomplete.is_empty());
    assert_eq!(mirror.members_of("g1"), ALL);
    assert_eq!(crawl.memberships, 6);
}

#[tokio::test]
async fn group_that_is_listed_but_never_found_is_incomplete() {
    let (crawl, _) = crawled(with_fault("g1", 1..=99, Fault::Vanished)).await;
    let crawl = crawl.unwrap();
    assert_eq!(reasons(&crawl), [("g1", "the directory lists the group but does not find it")]);
    assert!(crawl.vanished.is_empty());
}

#[tokio::test]
async fn group_not_found_is_not_gone_while_groups_cannot_be_listed_again() {
    let mut directory = with_fault("g1", 1..=99, Fault::Vanished);
    directory.faults.push(("groups", 3..=99, Fault::Unavailable));
    let (crawl, _) = crawled(directory).await;
    let crawl = crawl.unwrap();
    assert_eq!(crawl.incomplete.len(), 1);
    assert!(crawl.vanished.is_empty());
}

#[tokio::test]
async fn member_of_an_unknown_type_is_counted_and_sent() {
    let mut directory = directory();
    let robot = Member { kind: MemberKind::Other("ROBOT".to_owned()), ..member("r1") };
    directory.members.get_mut("g2").unwrap().push(robot);
    let (crawl, mirror) = crawled(directory).await;
    assert_eq!(crawl.unwrap().unknown_member_types, BTreeMap::from([("ROBOT".to_owned(), 1)]));
    assert_eq!(mirror.members_of("g2"), ["u1", "r1"]);
}

#[tokio::test]
async fn crawl_ends_when_nobody_takes_its_pages() {
    let (pages, batches) = mpsc::channel::<Batch>(1);
    drop(batches);
    let result = crawl(Arc::new(directory()), CrawlOptions::default(), pages).await;
    assert!(matches!(result, Err(CrawlError::ReceiverGone)));
}

#[tokio::test]
async fn progress_ends_at_the_totals() {
    let (progress, seen) = watch::channel(Progress::default());
    let options = CrawlOptions { progress: Some(progress), ..CrawlOptions::default() };
    let (crawl, _) = crawl_with(&Arc::new(directory()), options).await;
    crawl.unwrap();
    assert_eq!(*seen.borrow(), Progress { users: 5, groups: 3, groups_done: 3, memberships: 6 });
}
