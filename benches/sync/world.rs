//! A directory that exists only page by page: nothing of it is kept, so what is measured is the sync.

use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dir_sync::source::{Group, Member, MemberKind, Page, PageToken, Source, SourceError, User};
use serde_json::{Value, json};

/// How large a directory is, and what moment of it is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct World {
    pub(crate) users: usize,
    pub(crate) groups: usize,
    pub(crate) memberships: usize,
    /// One membership in two hundred has another user at each moment: one removal and one addition.
    pub(crate) moment: usize,
    /// At later moments it is the same number of memberships, but in a few groups only.
    pub(crate) concentrated: bool,
    /// How long each answer takes.
    pub(crate) pace: Duration,
}

/// What has been answered since [`forget_answers`].
static ANSWERS: Mutex<Answers> = Mutex::new(Answers { count: 0, listed: None, last: None });

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Answers {
    count: usize,
    /// When every page was given once; a second look comes after that.
    pub(crate) listed: Option<Instant>,
    pub(crate) last: Option<Instant>,
}

pub(crate) fn forget_answers() {
    *ANSWERS.lock().unwrap() = Answers::default();
}

pub(crate) fn answers() -> Answers {
    *ANSWERS.lock().unwrap()
}

const USERS_PER_PAGE: usize = 500;
const PER_PAGE: usize = 200;
const CUSTOMER: &str = "C0world";

impl World {
    /// 100,000 users, 5,000 groups, 1,000,000 memberships.
    pub(crate) fn m() -> Self {
        Self {
            users: 100_000,
            groups: 5_000,
            memberships: 1_000_000,
            moment: 0,
            concentrated: false,
            pace: Duration::ZERO,
        }
    }

    /// A tenth of [`Self::m`].
    pub(crate) fn s() -> Self {
        Self { users: 10_000, groups: 500, memberships: 100_000, ..Self::m() }
    }

    /// Half of all memberships are in one group of a hundred.
    pub(crate) fn size(&self, group: usize) -> usize {
        let large = self.groups / 100;
        let number = if group < large { large } else { self.groups - large };
        // Both halves are multiples of the numbers of groups, but for a rest that the first groups have.
        let half = self.memberships / 2;
        half / number + usize::from(group % number < half % number)
    }

    fn replaced(&self, group: usize, place: usize) -> bool {
        if self.moment == 0 {
            return false;
        }
        if self.concentrated {
            // As many as below, in one small group of fifty: half of it.
            let large = self.groups / 100;
            return group >= large && group.is_multiple_of(50) && place.is_multiple_of(2);
        }
        (group * 31 + place * 17).is_multiple_of(200)
    }

    fn user_id(number: usize) -> String {
        format!("1{number:020}")
    }

    fn user_email(number: usize) -> String {
        format!("firstname.lastname{number}@example.com")
    }

    fn group_id(number: usize) -> String {
        format!("0{number:014}")
    }

    fn member_number(&self, group: usize, place: usize) -> usize {
        let place = if self.replaced(group, place) { place + self.size(group) * self.moment } else { place };
        (group * 7_919 + place) % self.users
    }

    fn user(number: usize) -> User {
        User {
            id: Self::user_id(number),
            email: Self::user_email(number),
            display_name: format!("Firstname Lastname{number}"),
            suspended: number.is_multiple_of(50),
            customer_id: Some(CUSTOMER.to_owned()),
        }
    }

    fn group(number: usize) -> Group {
        Group {
            id: Self::group_id(number),
            email: format!("group{number}@example.com"),
            name: format!("Group {number}"),
            description: format!("What group {number} is for"),
        }
    }

    fn member(&self, group: usize, place: usize) -> Member {
        let number = self.member_number(group, place);
        Member {
            id: Self::user_id(number),
            email: Some(Self::user_email(number)),
            role: if place == 0 { "OWNER" } else { "MEMBER" }.to_owned(),
            kind: MemberKind::User,
        }
    }

    /// Gives an answer when it is due.
    async fn answer<T>(&self, answer: T) -> T {
        if !self.pace.is_zero() {
            tokio::time::sleep(self.pace).await;
        }
        let mut answers = ANSWERS.lock().unwrap();
        answers.count += 1;
        answers.last = Some(Instant::now());
        if answers.count == self.pages() {
            answers.listed = answers.last;
        }
        answer
    }

    /// Of a whole listing.
    fn pages(&self) -> usize {
        // One world per process.
        static MEMBERS: OnceLock<usize> = OnceLock::new();
        let pages_of = |group| self.size(group).div_ceil(PER_PAGE).max(1);
        let members = MEMBERS.get_or_init(|| (0..self.groups).map(pages_of).sum());
        self.users.div_ceil(USERS_PER_PAGE) + self.groups.div_ceil(PER_PAGE) + members
    }

    /// The place of a user in a group, without looking at each.
    fn place_of(&self, group: usize, user: usize) -> Option<usize> {
        let size = self.size(group);
        let from_first = (user + self.users - group * 7_919 % self.users) % self.users;
        let places = [Some(from_first), from_first.checked_sub(size * self.moment)];
        let mut places = places.into_iter().flatten();
        places.find(|place| *place < size && self.member_number(group, *place) == user)
    }

    /// As a directory file, in the form of the API.
    pub(crate) fn json(&self) -> Value {
        let users: Vec<Value> = (0..self.users)
            .map(|number| {
                let user = Self::user(number);
                json!({"id": user.id, "primaryEmail": user.email, "name": {"fullName": user.display_name},
                       "suspended": user.suspended, "archived": false, "customerId": CUSTOMER})
            })
            .collect();
        let groups: Vec<Value> = (0..self.groups)
            .map(|number| {
                let group = Self::group(number);
                json!({"id": group.id, "email": group.email, "name": group.name, "description": group.description})
            })
            .collect();
        let members: serde_json::Map<String, Value> = (0..self.groups)
            .map(|group| {
                let members = (0..self.size(group)).map(|place| {
                    let member = self.member(group, place);
                    json!({"id": member.id, "email": member.email, "role": member.role, "type": "USER"})
                });
                (Self::group_id(group), Value::Array(members.collect()))
            })
            .collect();
        json!({"customerId": CUSTOMER, "users": users, "groups": groups, "members": members})
    }
}

fn page<T>(
    all: usize,
    per_page: usize,
    token: Option<&PageToken>,
    item: impl Fn(usize) -> T,
) -> Result<Page<T>, SourceError> {
    let stale = || SourceError::StalePageToken { what: "a page".to_owned() };
    let start = token.map_or(Ok(0), |token| token.0.parse().map_err(|_| stale()))?;
    let end = (start + per_page).min(all);
    let next = (end < all).then(|| PageToken(end.to_string()));
    Ok(Page { items: (start..end).map(item).collect(), next })
}

#[async_trait]
impl Source for World {
    fn describe(&self) -> String {
        "a directory that is made up".to_owned()
    }

    async fn users(&self, token: Option<&PageToken>) -> Result<Page<User>, SourceError> {
        self.answer(page(self.users, USERS_PER_PAGE, token, Self::user)).await
    }

    async fn groups(&self, token: Option<&PageToken>) -> Result<Page<Group>, SourceError> {
        self.answer(page(self.groups, PER_PAGE, token, Self::group)).await
    }

    async fn members(&self, group: &Group, token: Option<&PageToken>) -> Result<Page<Member>, SourceError> {
        let vanished = || SourceError::GroupVanished { group: group.email.clone() };
        let number: usize = group.id.parse().map_err(|_| vanished())?;
        self.answer(page(self.size(number), PER_PAGE, token, |place| self.member(number, place))).await
    }

    async fn member(&self, group: &Group, id: &str) -> Result<Option<Member>, SourceError> {
        let number_of = |id: &str| id.get(1..).and_then(|digits| digits.parse().ok());
        let (Ok(number), Some(user)) = (group.id.parse(), number_of(id)) else { return Ok(None) };
        self.answer(Ok(self.place_of(number, user).map(|place| self.member(number, place)))).await
    }

    fn calls(&self) -> u64 {
        0
    }

    fn customer_id(&self) -> Option<String> {
        Some(CUSTOMER.to_owned())
    }
}
