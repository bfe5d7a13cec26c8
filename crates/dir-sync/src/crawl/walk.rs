//! One listing from its first page to its last, and whether it can be trusted.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hash};

use foldhash::quality::RandomState;
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::source::{Group, Member, Page, PageToken, Source, SourceError, User};

const RESTARTS: u32 = 2;
// A directory may send a page or two without anything new; a listing that goes on like that never ends.
const BARREN_PAGES: u32 = 20;

/// An object with the directory's immutable id.
pub(super) trait Identified: Hash {
    fn id(&self) -> &str;
}

impl Identified for User {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Identified for Group {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Identified for Member {
    fn id(&self) -> &str {
        &self.id
    }
}

/// Where one listing's pages come from.
pub(super) trait Fetch {
    type Item: Identified;

    fn fetch<'a>(
        &'a self,
        page: Option<&'a PageToken>,
    ) -> BoxFuture<'a, Result<Page<Self::Item>, SourceError>>;
}

/// The users of a source.
pub(super) struct Users<'s>(pub(super) &'s dyn Source);
/// The groups of a source.
pub(super) struct Groups<'s>(pub(super) &'s dyn Source);
/// One group's direct members.
pub(super) struct MembersOf<'s>(pub(super) &'s dyn Source, pub(super) &'s Group);

impl Fetch for Users<'_> {
    type Item = User;

    fn fetch<'a>(&'a self, page: Option<&'a PageToken>) -> BoxFuture<'a, Result<Page<User>, SourceError>> {
        self.0.users(page)
    }
}

impl Fetch for Groups<'_> {
    type Item = Group;

    fn fetch<'a>(&'a self, page: Option<&'a PageToken>) -> BoxFuture<'a, Result<Page<Group>, SourceError>> {
        self.0.groups(page)
    }
}

impl Fetch for MembersOf<'_> {
    type Item = Member;

    fn fetch<'a>(&'a self, page: Option<&'a PageToken>) -> BoxFuture<'a, Result<Page<Member>, SourceError>> {
        self.0.members(self.1, page)
    }
}

/// How far a listing got.
#[derive(Debug)]
pub(super) enum Step<T> {
    /// What is new on one more page.
    Page(Vec<T>),
    /// The listing starts again; what came before is void.
    Restarted,
    /// The listing is complete.
    Done,
}

/// Why a listing did not become complete.
#[derive(Debug)]
pub(super) enum Stop {
    /// A page could not be had.
    Failed(SourceError),
    /// The pages contradict themselves or each other.
    Untrusted(String),
}

/// Goes through one listing.
pub(super) struct Walk<'p, F> {
    permits: &'p Semaphore,
    fetch: F,
    place: Place,
    restarts: u32,
    ledger: Ledger,
}

enum Place {
    First,
    Next(PageToken),
    End,
}

impl<'p, F: Fetch> Walk<'p, F> {
    /// A walk that holds one of the permits while it waits for a page, and none while it does not.
    pub(super) fn new(permits: &'p Semaphore, fetch: F) -> Self {
        Self { permits, fetch, place: Place::First, restarts: 0, ledger: Ledger::default() }
    }

    // INVARIANT: a listing is done only if it ended without a token, saw no token twice and no id twice in conflict;
    // held by `token_that_comes_twice_is_incomplete` and `conflicting_member_is_incomplete`.
    /// The next step.
    pub(super) async fn next(&mut self) -> Result<Step<F::Item>, Stop> {
        let token = match &self.place {
            Place::First => None,
            Place::Next(token) => Some(token),
            Place::End => return Ok(Step::Done),
        };
        let answer = {
            // Nobody closes the semaphore; without a permit the call is still right, only not counted.
            let _permit = self.permits.acquire().await.ok();
            self.fetch.fetch(token).await
        };
        match answer {
            Ok(page) => {
                let fresh = self.ledger.enter(page.items).map_err(Stop::Untrusted)?;
                self.place = match page.next {
                    None => Place::End,
                    Some(token) => {
                        self.ledger.turn(&token, fresh.is_empty()).map_err(Stop::Untrusted)?;
                        Place::Next(token)
                    }
                };
                Ok(Step::Page(fresh))
            }
            Err(SourceError::StalePageToken { .. }) if self.restarts < RESTARTS => {
                self.restarts += 1;
                self.place = Place::First;
                self.ledger = Ledger::default();
                Ok(Step::Restarted)
            }
            Err(error) => Err(Stop::Failed(error)),
        }
    }
}

/// What one pass over a listing has seen: hashes, so that it stays small. They are seeded anew for each pass.
#[derive(Default)]
struct Ledger {
    hasher: RandomState,
    // An id's hash to its content's. Two ids with one hash would pass for a conflict, never for a duplicate.
    seen: HashMap<u64, u64, RandomState>,
    tokens: HashSet<String>,
    barren: u32,
}

impl Ledger {
    /// What of a page is new; a reason if it contradicts an earlier one.
    fn enter<T: Identified>(&mut self, items: Vec<T>) -> Result<Vec<T>, String> {
        let mut fresh = Vec::with_capacity(items.len());
        for item in items {
            let content = self.hasher.hash_one(&item);
            match self.seen.entry(self.hasher.hash_one(item.id())) {
                Entry::Vacant(entry) => {
                    entry.insert(content);
                    fresh.push(item);
                }
                Entry::Occupied(entry) if *entry.get() == content => {}
                Entry::Occupied(_) => {
                    return Err(format!("id `{}` came twice with different content", item.id()));
                }
            }
        }
        Ok(fresh)
    }

    /// Notes the token of the next page; a reason if the listing runs in a circle.
    fn turn(&mut self, token: &PageToken, barren: bool) -> Result<(), String> {
        if !self.tokens.insert(token.0.clone()) {
            return Err(format!("page token `{}` came twice", token.0));
        }
        self.barren = if barren { self.barren + 1 } else { 0 };
        if self.barren >= BARREN_PAGES {
            return Err(format!("{BARREN_PAGES} pages in a row had nothing new"));
        }
        Ok(())
    }
}
