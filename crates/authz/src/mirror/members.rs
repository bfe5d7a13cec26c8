//! The members of a group while its listing is under way: packed, since many listings are under way at once, and their
//! digest, which does not depend on the order in which they came.

use std::cmp::Ordering;

use super::stage::StagedMember;
use crate::group::Role;
use crate::name::UserName;

/// Direct members of a group: a page of its listing, or all of it. Pack a page where it was read, so that what goes from
/// thread to thread is few pieces of memory and not millions.
#[derive(Debug, Default)]
pub struct StagedMembers {
    text: String,
    rows: Vec<Row>,
}

/// Members for whom there is room from the start, and bytes for each.
const EXPECTED: usize = 256;
const TEXT: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    User,
    Group,
    Everyone,
}

/// The id is followed by the name, if there is one.
#[derive(Debug, Clone, Copy)]
struct Row {
    start: u32,
    id: u32,
    name: Option<u16>,
    kind: Kind,
    role: Role,
}

impl Row {
    fn end(&self) -> u32 {
        self.start + self.id + u32::from(self.name.unwrap_or_default())
    }
}

/// One member as it is staged.
pub(super) struct Staged<'a> {
    kind: Kind,
    pub(super) id: &'a str,
    pub(super) name: Option<&'a str>,
    pub(super) role: Role,
}

impl Staged<'_> {
    pub(super) fn is_user(&self) -> bool {
        self.kind == Kind::User
    }

    /// As the database holds it.
    pub(super) fn kind(&self) -> &'static str {
        match self.kind {
            Kind::User => "user",
            Kind::Group => "group",
            Kind::Everyone => "everyone",
        }
    }
}

impl FromIterator<StagedMember> for StagedMembers {
    fn from_iter<I: IntoIterator<Item = StagedMember>>(members: I) -> Self {
        let members = members.into_iter();
        let expected = members.size_hint().1.unwrap_or_default().min(EXPECTED);
        let mut packed =
            Self { text: String::with_capacity(expected * TEXT), rows: Vec::with_capacity(expected) };
        for member in members {
            packed.push(&member);
        }
        packed
    }
}

impl StagedMembers {
    /// Adds a member.
    pub(super) fn push(&mut self, member: &StagedMember) {
        let (kind, id, name, role) = match member {
            StagedMember::User { external_id, name, role } => {
                (Kind::User, external_id.as_str(), name.as_ref().map(UserName::as_str), *role)
            }
            StagedMember::Group { external_id } => (Kind::Group, external_id.as_str(), None, Role::Member),
            StagedMember::Everyone => (Kind::Everyone, "everyone", None, Role::Member),
        };
        self.push_as(kind, id, name, role);
    }

    /// Adds a user.
    pub(super) fn push_user(&mut self, id: &str, name: Option<&str>, role: Role) {
        self.push_as(Kind::User, id, name, role);
    }

    /// Adds one of other members.
    pub(super) fn push_staged(&mut self, member: &Staged<'_>) {
        self.push_as(member.kind, member.id, member.name, member.role);
    }

    fn push_as(&mut self, kind: Kind, id: &str, name: Option<&str>, role: Role) {
        // A text of four gigabytes never comes together: long listings are staged as they come.
        let Ok(start) = u32::try_from(self.text.len()) else { return };
        // Postgres takes every character in a text but NUL.
        if id.contains('\0') {
            self.text.extend(id.chars().filter(|c| *c != '\0'));
        } else {
            self.text.push_str(id);
        }
        let id = u32::try_from(self.text.len()).unwrap_or(u32::MAX) - start;
        // A name has at most 320 bytes.
        let name = name.and_then(|name| {
            self.text.push_str(name);
            u16::try_from(name.len()).ok()
        });
        self.rows.push(Row { start, id, name, kind, role });
    }

    /// Adds a page.
    pub(super) fn append(&mut self, page: Self) {
        if self.rows.is_empty() {
            *self = page;
            return;
        }
        // As above.
        let Ok(before) = u32::try_from(self.text.len()) else { return };
        self.text.push_str(&page.text);
        let moved = |row: Row| Row { start: row.start.saturating_add(before), ..row };
        self.rows.extend(page.rows.into_iter().map(moved));
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Bytes of all ids and names.
    pub(super) fn text_len(&self) -> usize {
        self.text.len()
    }

    fn staged(&self, row: &Row) -> Staged<'_> {
        let start = row.start as usize;
        let end = start + row.id as usize;
        let name = row.name.map(|length| self.text.get(end..end + usize::from(length)).unwrap_or_default());
        Staged { kind: row.kind, id: self.text.get(start..end).unwrap_or_default(), name, role: row.role }
    }

    /// Sorts them, and drops what stands there twice. Their text is in their order then, too.
    pub(super) fn settle(&mut self) {
        let mut rows = std::mem::take(&mut self.rows);
        let key = |row: &Row| {
            let start = row.start as usize;
            (row.kind as u8, self.text.get(start..start + row.id as usize))
        };
        // Stable: of two the first stays.
        rows.sort_by(|a, b| key(a).cmp(&key(b)));
        rows.dedup_by(|a, b| key(a).cmp(&key(b)) == Ordering::Equal);
        let mut end = 0;
        let in_order = rows.iter().all(|row| row.start == std::mem::replace(&mut end, row.end()));
        self.rows = rows;
        if !in_order || end as usize != self.text.len() {
            self.keep(|_| true);
        }
    }

    /// The digest of settled members, as a directory listed them under these settings.
    ///
    /// `None` if what they stand for depends on more than themselves: on whose everyone it is.
    pub(super) fn digest(&self, include_external: bool) -> Option<[u8; 32]> {
        let mut form = Vec::with_capacity(10 + 9 * self.rows.len());
        form.extend([4, u8::from(include_external)]); // the first byte is the version of this form
        form.extend((self.rows.len() as u64).to_be_bytes());
        for row in &self.rows {
            if row.kind == Kind::Everyone {
                return None;
            }
            form.extend([row.kind as u8, row.role as u8, u8::from(row.name.is_some())]);
            form.extend(row.id.to_be_bytes());
            form.extend(row.name.unwrap_or_default().to_be_bytes());
        }
        // The lengths say which byte of the text is whose.
        Some(*blake3::Hasher::new().update(&form).update(self.text.as_bytes()).finalize().as_bytes())
    }

    /// Keeps the users for whom `keep` says so, and whoever is no user.
    pub(super) fn retain_users(&mut self, mut keep: impl FnMut(&Staged<'_>) -> bool) {
        let kept: Vec<bool> =
            self.rows.iter().map(|row| row.kind != Kind::User || keep(&self.staged(row))).collect();
        let mut kept = kept.into_iter();
        self.keep(|_| kept.next().unwrap_or(true));
    }

    fn keep(&mut self, mut keep: impl FnMut(&Row) -> bool) {
        let mut kept = Self::default();
        for row in &self.rows {
            if !keep(row) {
                continue;
            }
            let Ok(start) = u32::try_from(kept.text.len()) else { continue };
            kept.text.push_str(self.text.get(row.start as usize..row.end() as usize).unwrap_or_default());
            kept.rows.push(Row { start, ..*row });
        }
        *self = kept;
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = Staged<'_>> {
        self.rows.iter().map(|row| self.staged(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: &str, name: Option<&str>, role: Role) -> StagedMember {
        let name = name.map(|name| UserName::parse(name).unwrap());
        StagedMember::User { external_id: id.to_owned(), name, role }
    }

    fn digest(members: &[StagedMember]) -> Option<[u8; 32]> {
        let mut packed = StagedMembers::default();
        for page in members.chunks(2) {
            packed.append(page.iter().cloned().collect());
        }
        packed.settle();
        packed.digest(false)
    }

    #[test]
    fn order_and_duplicates_do_not_change_the_digest_and_everything_else_does() {
        let a = || user("1", Some("a@example.com"), Role::Member);
        let b = || user("2", None, Role::Member);
        let same = digest(&[a(), b()]);
        assert_eq!(digest(&[b(), a()]), same);
        assert_eq!(digest(&[b(), a(), b()]), same);
        let others = [
            vec![a()],
            vec![a(), user("2", None, Role::Owner)],
            vec![a(), user("3", None, Role::Member)],
            vec![a(), user("2", Some("b@example.com"), Role::Member)],
            vec![a(), StagedMember::Group { external_id: "2".to_owned() }],
            vec![user("1a@example.com", None, Role::Member), b()],
            vec![],
        ];
        for other in &others {
            assert_ne!(digest(other), same, "{other:?}");
        }
    }

    #[test]
    fn external_members_let_in_or_not_is_part_of_the_digest() {
        let packed = StagedMembers::default();
        assert_ne!(packed.digest(false), packed.digest(true));
    }

    #[test]
    fn everyone_has_no_digest() {
        assert_eq!(digest(&[StagedMember::Everyone]), None);
    }
}
