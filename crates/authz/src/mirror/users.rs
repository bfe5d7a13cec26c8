//! The users of a page, packed.

use super::stage::StagedUser;
use crate::name::UserName;

/// Users as the directory lists them: a page of the listing. Pack it where it was read, so that what goes from thread to
/// thread is few pieces of memory and not one for each name.
#[derive(Debug, Default)]
pub struct StagedUsers {
    /// Of each user the id, the name and the display name.
    text: String,
    rows: Vec<Row>,
}

/// Users for whom there is room from the start, and bytes for each.
const EXPECTED: usize = 512;
const TEXT: usize = 96;

/// Lengths in bytes.
#[derive(Debug, Clone, Copy)]
struct Row {
    id: usize,
    name: Option<usize>,
    display_name: usize,
    suspended: bool,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ListedUser<'a> {
    pub(super) external_id: &'a str,
    pub(super) name: Option<&'a str>,
    pub(super) display_name: &'a str,
    pub(super) suspended: bool,
}

impl FromIterator<StagedUser> for StagedUsers {
    fn from_iter<I: IntoIterator<Item = StagedUser>>(users: I) -> Self {
        let users = users.into_iter();
        let expected = users.size_hint().1.unwrap_or_default().min(EXPECTED);
        let mut packed =
            Self { text: String::with_capacity(expected * TEXT), rows: Vec::with_capacity(expected) };
        for StagedUser { external_id, name, display_name, suspended } in users {
            let name = name.as_ref().map(UserName::as_str);
            packed.text.extend([&external_id, name.unwrap_or_default(), &display_name]);
            let (id, name, display_name) = (external_id.len(), name.map(str::len), display_name.len());
            packed.rows.push(Row { id, name, display_name, suspended });
        }
        packed
    }
}

impl StagedUsers {
    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = ListedUser<'_>> {
        let mut rest = self.text.as_str();
        self.rows.iter().map(move |row| {
            // The lengths are those of the very texts, one behind the other.
            let mut next = |length| {
                let (text, behind) = rest.split_at_checked(length).unwrap_or_default();
                rest = behind;
                text
            };
            ListedUser {
                external_id: next(row.id),
                name: row.name.map(&mut next),
                display_name: next(row.display_name),
                suspended: row.suspended,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_out_as_they_went_in() {
        let user = |id: &str, name: Option<&str>, display_name: &str, suspended| StagedUser {
            external_id: id.to_owned(),
            name: name.map(|name| UserName::parse(name).unwrap()),
            display_name: display_name.to_owned(),
            suspended,
        };
        let users = vec![
            user("1", Some("a@example.com"), "", true),
            user("", None, "Zoë", false),
            user("23", None, "", false),
            user("4", Some("ü@example.com"), "Ü", false),
        ];
        let packed: StagedUsers = users.iter().cloned().collect();
        let unpacked = packed
            .iter()
            .map(|listed| user(listed.external_id, listed.name, listed.display_name, listed.suspended));
        assert_eq!(unpacked.collect::<Vec<_>>(), users);
    }
}
