//! What the mirror holds when a run begins, small enough to keep in memory: a listed row that it knows need not be staged.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::quality::RandomState;
use futures_util::TryStreamExt;
use hashbrown::HashTable;
use sqlx::{Connection, PgPool};

use super::stage::storable;
use super::users::ListedUser;
use crate::error::Error;
use crate::lent::Lent;
use crate::snapshot::copy::Rows;

/// The users of a directory by all that a listing says of them, and which of them were listed so far.
#[derive(Default)]
pub(super) struct KnownUsers {
    hasher: Hasher,
    users: HashTable<Known>,
    /// Prints of those who were listed and whom the mirror does not have.
    new: HashTable<u128>,
    /// Users without an id of the directory's, who are never listed.
    without_id: Vec<i64>,
    /// The revision before they were read.
    pub(super) revision: i64,
}

/// A user of the mirror by keyed hashes, since there are many.
struct Known {
    /// Of the directory's id alone.
    print: u128,
    user_id: i64,
    name: u64,
    /// Of whatever else a listing says.
    rest: u64,
    met: Met,
}

/// How the listing has met a user of the mirror so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Met {
    /// Not at all.
    #[default]
    Not,
    /// With something that the mirror has otherwise.
    Changed,
    /// As the mirror has the user.
    Same,
}

/// What the mirror makes of a listed user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sight {
    /// It has the user as listed.
    Same,
    /// It has no such user, or not as listed.
    Differs,
    /// It has met the user before: a second look at the listing shows whoever was on a page of the first one again.
    Again,
}

/// Keyed anew in each run, so nobody can prepare two users of one fingerprint.
#[derive(Clone, Default)]
pub(super) struct Hasher(RandomState, RandomState);

impl Hasher {
    /// Of an id of the directory's, as it is stored.
    pub(super) fn of_id(&self, id: &str) -> u128 {
        if id.contains('\0') {
            return self.of_id(&storable(id));
        }
        (u128::from(self.0.hash_one(id)) << 64) | u128::from(self.1.hash_one(id))
    }

    fn of_name(&self, name: &str) -> u64 {
        self.0.hash_one(name)
    }

    fn of_rest(&self, display_name: &str, status: &str) -> u64 {
        self.0.hash_one((display_name, status))
    }
}

/// Where the table has whoever has this fingerprint, which is as good as random.
#[expect(clippy::cast_possible_truncation, reason = "one half of the fingerprint is enough")]
pub(super) fn place(print: u128) -> u64 {
    print as u64
}

impl KnownUsers {
    /// Reads them.
    pub(super) async fn load(pool: &PgPool, directory_id: i32, hasher: Hasher) -> Result<Self, Error> {
        let mut known = Self { hasher, ..Self::default() };
        let mut connection = Lent::from(pool).await?;
        let mut tx = connection.begin().await?;
        // `copy` takes no parameters.
        let before = sqlx::query!(
            r#"select set_config('authz.sync_directory', $1, true) as "set!", r.revision from authz.revision r"#,
            directory_id.to_string()
        )
        .fetch_one(&mut *tx)
        .await?;
        known.revision = before.revision;
        let mut rows = Rows::default();
        {
            let mut pieces = tx
                .copy_out_raw(
                    "copy (select user_id, external_id, user_name, display_name, status from authz.users
                           where directory_id = current_setting('authz.sync_directory')::integer and status <> 'deleted')
                     to stdout (format binary)",
                )
                .await?;
            while let Some(piece) = pieces.try_next().await? {
                rows.feed(&piece, |[user_id, id, name, display_name, status]| {
                    let (id, user_id) = (id.text_or_null()?.unwrap_or_default(), user_id.int8()?);
                    let name = name.text()?;
                    known.add(user_id, id, name, display_name.text()?, status.text()?);
                    Ok(())
                })?;
            }
        }
        rows.end()?;
        tx.commit().await?;
        connection.give_back();
        Ok(known)
    }

    fn add(&mut self, user_id: i64, id: &str, name: &str, display_name: &str, status: &str) {
        if id.is_empty() {
            self.without_id.push(user_id);
            return;
        }
        let hasher = &self.hasher;
        let print = hasher.of_id(id);
        let (name, rest) = (hasher.of_name(name), hasher.of_rest(display_name, status));
        let user = Known { print, user_id, name, rest, met: Met::Not };
        self.users.insert_unique(place(print), user, |known| place(known.print));
    }

    /// The user of the directory who had this id when they were read, and whether that name, if one is given.
    pub(super) fn find(&self, external_id: &str, name: Option<&str>) -> Option<(i64, bool)> {
        let print = self.hasher.of_id(external_id);
        let known = self.users.find(place(print), |known| known.print == print)?;
        Some((known.user_id, name.is_none_or(|name| self.hasher.of_name(name) == known.name)))
    }

    #[cfg(test)]
    pub(super) fn of(ids: &[(i64, &str)]) -> Self {
        let mut known = Self::default();
        for (user_id, id) in ids {
            known.add(*user_id, id, &format!("{id}@example.com"), "", "active");
        }
        known
    }

    /// Compares a listed user with the mirror, and notes that the listing has the user.
    pub(super) fn sees(&mut self, user: &ListedUser<'_>) -> Sight {
        let print = self.hasher.of_id(user.external_id);
        let found = self.users.find_mut(place(print), |known| known.print == print);
        let Some(known) = found else { return self.sees_new(print) };
        if known.met != Met::Not {
            return Sight::Again;
        }
        let status = if user.suspended { "suspended" } else { "active" };
        let is_same = user.name.is_some_and(|name| self.hasher.of_name(name) == known.name)
            && self.hasher.of_rest(user.display_name, status) == known.rest;
        known.met = if is_same { Met::Same } else { Met::Changed };
        if is_same { Sight::Same } else { Sight::Differs }
    }

    fn sees_new(&mut self, print: u128) -> Sight {
        if self.new.find(place(print), |known| *known == print).is_some() {
            return Sight::Again;
        }
        self.new.insert_unique(place(print), print, |known| place(*known));
        Sight::Differs
    }

    /// Whether the listing has shown whoever has this print.
    pub(super) fn has_seen(&self, print: u128) -> bool {
        let known = self.users.find(place(print), |known| known.print == print);
        known.is_some_and(|known| known.met != Met::Not)
            || self.new.find(place(print), |known| *known == print).is_some()
    }

    /// How many users the mirror has.
    pub(super) fn len(&self) -> usize {
        self.users.len() + self.without_id.len()
    }

    /// The listing begins again.
    pub(super) fn forget(&mut self) {
        self.new.clear();
        for known in &mut self.users {
            known.met = Met::Not;
        }
    }

    /// Users of the mirror that were not listed as it has them.
    pub(super) fn unseen(&self) -> Vec<i64> {
        let unseen = self.users.iter().filter(|known| known.met != Met::Same).map(|known| known.user_id);
        unseen.chain(self.without_id.iter().copied()).collect()
    }

    /// Whether the mirror has users whom the listing has not met.
    pub(super) fn misses_any(&self) -> bool {
        self.users.iter().any(|known| known.met == Met::Not)
    }
}

/// What is known of the groups of a directory, by the directory's id of the group.
pub(super) type KnownDigests = HashMap<String, KnownDigest>;

/// A group that has a digest.
#[derive(Debug, Clone, Copy)]
pub(super) struct KnownDigest {
    pub(super) digest: [u8; 32],
    /// Memberships of all kinds that the mirror has of the group.
    pub(super) members: i64,
}

/// Reads the digests.
pub(super) async fn load_digests(pool: &PgPool, directory_id: i32) -> Result<KnownDigests, Error> {
    let mut known = HashMap::new();
    let mut rows = sqlx::query!(
        r#"
        select g.external_id as "external_id!", d.digest, d.members
        from authz.group_digests d
        join authz.groups g on g.group_id = d.group_id
        where g.directory_id = $1 and g.external_id is not null and g.status <> 'deleted'
        "#,
        directory_id,
    )
    .fetch(pool);
    while let Some(row) = rows.try_next().await? {
        if let Ok(digest) = row.digest.try_into() {
            known.insert(row.external_id, KnownDigest { digest, members: row.members });
        }
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user<'a>(id: &'a str, name: &'a str, display_name: &'a str, suspended: bool) -> ListedUser<'a> {
        ListedUser { external_id: id, name: Some(name), display_name, suspended }
    }

    fn known(users: &[(i64, &str, &str)]) -> KnownUsers {
        let mut known = KnownUsers::default();
        for (user_id, id, status) in users {
            known.add(*user_id, id, &format!("{id}@example.com"), "", status);
        }
        known
    }

    #[test]
    fn only_a_user_that_is_the_same_in_all_is_seen() {
        let mut known = known(&[(1, "a", "active"), (2, "b", "suspended"), (3, "c", "active")]);
        let [a, b, c] = ["a@example.com", "b@example.com", "c@example.com"];
        let without_name = ListedUser { name: None, ..user("c", c, "", false) };
        for other in
            [user("c", c, "other", false), user("c", c, "", true), user("c", a, "", false), without_name]
        {
            assert_eq!(known.sees(&user("a", a, "", false)), Sight::Same);
            assert_eq!(known.sees(&user("b", b, "", true)), Sight::Same);
            assert_eq!(known.sees(&user("d", c, "", false)), Sight::Differs);
            assert!(known.misses_any());
            assert_eq!(known.sees(&other), Sight::Differs);
            assert!(!known.misses_any());
            assert_eq!(known.unseen(), [3]);
            // Who was met is met once.
            for again in [user("a", a, "", false), user("b", c, "", false), user("c", c, "", false)] {
                assert_eq!(known.sees(&again), Sight::Again);
            }
            assert_eq!(known.unseen(), [3]);
            known.forget();
            let mut unseen = known.unseen();
            unseen.sort_unstable();
            assert_eq!(unseen, [1, 2, 3]);
        }
    }
}
