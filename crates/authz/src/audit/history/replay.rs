//! The world, as the records up to some moment tell it.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use serde_json::Value;

use crate::name::GroupName;

pub(super) struct User {
    pub(super) name: String,
    status: String,
    pub(super) directory_id: Option<i64>,
}

impl User {
    /// Whether checks were answered by the grants.
    pub(super) fn counts(&self) -> bool {
        matches!(self.status.as_str(), "active" | "external")
    }
}

pub(super) struct Group {
    name: String,
    pub(super) active: bool,
}

/// A grant.
pub(super) struct Given {
    pub(super) granted_by: String,
    pub(super) granted_at: Option<DateTime<Utc>>,
    pub(super) expires_at: Option<DateTime<Utc>>,
    pub(super) reason: String,
    pub(super) record: i64,
}

/// Everything by its numbers; memberships with the record that tells of them.
pub(super) struct World {
    /// Only grants of these patterns are of interest.
    patterns: Vec<String>,
    pub(super) users: HashMap<i64, User>,
    pub(super) groups: HashMap<i64, Group>,
    pub(super) actions: HashSet<String>,
    pub(super) user_grants: HashMap<(i64, String), Given>,
    pub(super) group_grants: HashMap<(i64, String), Given>,
    pub(super) members: HashMap<(i64, i64), i64>,
    pub(super) edges: HashMap<(i64, i64), i64>,
    pub(super) everyone: HashMap<(i64, i64), i64>,
}

impl World {
    pub(super) fn new(patterns: Vec<String>) -> Self {
        Self {
            patterns,
            users: HashMap::new(),
            groups: HashMap::new(),
            actions: HashSet::new(),
            user_grants: HashMap::new(),
            group_grants: HashMap::new(),
            members: HashMap::new(),
            edges: HashMap::new(),
            everyone: HashMap::new(),
        }
    }

    pub(super) fn group_name(&self, group_id: i64) -> GroupName {
        GroupName::stored(
            self.groups.get(&group_id).map_or_else(|| group_id.to_string(), |group| group.name.clone()),
        )
    }

    /// Takes over what a record tells; `None` if it is not understood.
    pub(super) fn take(
        &mut self,
        record: i64,
        recorded_at: DateTime<Utc>,
        action: &str,
        detail: &Value,
    ) -> Option<()> {
        if let Some(table) = detail.get("emptied") {
            return self.empty(table.as_str()?);
        }
        match action {
            "state.users" => {
                for row in detail.get("users")?.as_array()? {
                    let user = User {
                        name: row.get(1)?.as_str()?.to_owned(),
                        status: row.get(2)?.as_str()?.to_owned(),
                        directory_id: row.get(3)?.as_i64(),
                    };
                    self.users.insert(row.get(0)?.as_i64()?, user);
                }
            }
            "state.groups" => {
                for row in detail.get("groups")?.as_array()? {
                    let (name, status) = (row.get(1)?.as_str()?, row.get(2)?.as_str()?);
                    let group = Group { name: name.to_owned(), active: status == "active" };
                    self.groups.insert(row.get(0)?.as_i64()?, group);
                }
            }
            "state.actions" => {
                for name in list(detail, "added") {
                    self.actions.insert(name.as_str()?.to_owned());
                }
                for name in list(detail, "removed") {
                    self.actions.remove(name.as_str()?);
                }
            }
            "state.members" => {
                let group_id = detail.get("group_id")?.as_i64()?;
                let memberships = self.memberships(detail.get("table")?.as_str()?)?;
                for member in list(detail, "added") {
                    memberships.entry((group_id, member.as_i64()?)).or_insert(record);
                }
                for member in list(detail, "removed") {
                    memberships.remove(&(group_id, member.as_i64()?));
                }
            }
            "audit.baseline" => {
                for row in detail.get("rows")?.as_array()? {
                    let (table, detail) = (row.get("table")?.as_str()?, row.get("detail")?);
                    if table.ends_with("_actions") {
                        self.grant(record, None, detail, false)?;
                    } else {
                        self.membership(record, detail, false)?;
                    }
                }
            }
            "grant.add" | "grant.change" => self.grant(record, Some(recorded_at), detail, false)?,
            "grant.remove" => self.grant(record, None, detail, true)?,
            "membership.add" | "membership.change" => self.membership(record, detail, false)?,
            "membership.remove" => self.membership(record, detail, true)?,
            _ => return None,
        }
        Some(())
    }

    fn empty(&mut self, table: &str) -> Option<()> {
        match table {
            "users" => self.users.clear(),
            "groups" => self.groups.clear(),
            "actions" => self.actions.clear(),
            "user_actions" => self.user_grants.clear(),
            "group_actions" => self.group_grants.clear(),
            table => self.memberships(table)?.clear(),
        }
        Some(())
    }

    fn memberships(&mut self, table: &str) -> Option<&mut HashMap<(i64, i64), i64>> {
        match table {
            "group_users" => Some(&mut self.members),
            "group_groups" => Some(&mut self.edges),
            "group_directories" => Some(&mut self.everyone),
            _ => None,
        }
    }

    fn membership(&mut self, record: i64, detail: &Value, removed: bool) -> Option<()> {
        let number = |key| detail.get(key).and_then(Value::as_i64);
        let (memberships, member) = if let Some(child) = number("member_group_id") {
            (&mut self.edges, child)
        } else if let Some(directory_id) = number("directory_id") {
            (&mut self.everyone, directory_id)
        } else if let Some(user_id) = number("user_id") {
            (&mut self.members, user_id)
        } else {
            // From before records named rows by number; a baseline follows it.
            return Some(());
        };
        let key = (number("group_id")?, member);
        if removed {
            memberships.remove(&key);
        } else {
            // A change of a role does not make the membership anew.
            memberships.entry(key).or_insert(record);
        }
        Some(())
    }

    fn grant(
        &mut self,
        record: i64,
        granted_at: Option<DateTime<Utc>>,
        detail: &Value,
        removed: bool,
    ) -> Option<()> {
        let pattern = detail.get("grant")?.as_str()?;
        if !self.patterns.iter().any(|one| one == pattern) {
            return Some(());
        }
        let number = |key| detail.get(key).and_then(Value::as_i64);
        let (grants, holder) = match (number("user_id"), number("group_id")) {
            (Some(user_id), _) => (&mut self.user_grants, user_id),
            (None, Some(group_id)) => (&mut self.group_grants, group_id),
            (None, None) => return Some(()),
        };
        let key = (holder, pattern.to_owned());
        if removed {
            grants.remove(&key);
            return Some(());
        }
        let expires_at = match detail.get("expires_at") {
            None | Some(Value::Null) => None,
            Some(end) => Some(moment(end.as_str()?)?),
        };
        let text = |key| detail.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        // A baseline says again what is known; the record that told of it says more.
        let same = grants.get(&key).is_some_and(|known| known.expires_at == expires_at);
        if granted_at.is_none() && same {
            return Some(());
        }
        grants.insert(
            key,
            Given { granted_by: text("granted_by"), granted_at, expires_at, reason: text("reason"), record },
        );
        Some(())
    }
}

/// A time as PostgreSQL writes it into JSON: in the time zone of the session, so in the last hours of 9999 it may be of the year
/// 10000; with seconds in the offset, where that zone had some then; before Christ with `BC`.
fn moment(text: &str) -> Option<DateTime<Utc>> {
    if let Ok(moment) = text.parse() {
        return Some(moment);
    }
    let (text, before_christ) = text.strip_suffix(" BC").map_or((text, false), |text| (text, true));
    let day = text.find('T')?;
    let (local, offset) = text.split_at(day + text.get(day..)?.find(['+', '-'])?);
    let (year, rest) = local.split_once('-')?;
    let year: i32 = year.parse().ok()?;
    // A year of five digits is read with its sign only; the one before the first is the year 0.
    let year = if before_christ { 1_i32.checked_sub(year)? } else { year };
    let local: NaiveDateTime = format!("{year:+05}-{rest}").parse().ok()?;
    let mut seconds = 0;
    let mut parts = offset.get(1..)?.split(':');
    for unit in [3600, 60, 1] {
        seconds += unit * parts.next().map_or(Some(0), |part| part.parse::<u32>().ok())?;
    }
    let ahead =
        TimeDelta::seconds(if offset.starts_with('-') { -i64::from(seconds) } else { seconds.into() });
    Some(local.checked_sub_signed(ahead)?.and_utc())
}

fn list<'d>(detail: &'d Value, key: &str) -> &'d [Value] {
    detail.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_postgres_writes_them() {
        for (written, meant) in [
            ("2026-11-26T12:00:00.5+01:00", "2026-11-26T11:00:00.5Z"),
            ("10000-01-01T00:59:59+01:00", "9999-12-31T23:59:59Z"),
            ("1971-06-01T00:00:00.25-00:44:30", "1971-06-01T00:44:30.25Z"),
            ("0044-03-15T12:00:00+00:53:28 BC", "-0043-03-15T11:06:32Z"),
            ("0001-02-29T00:00:00+00 BC", "+0000-02-29T00:00:00Z"),
        ] {
            assert_eq!(moment(written), meant.parse().ok(), "{written}");
        }
        for unread in ["", "infinity", "2026-11-26", "2026-11-26T12:00:00", "10000-13-01T00:00:00+01:00"] {
            assert_eq!(moment(unread), None, "{unread}");
        }
    }
}
