//! A plan in a few lines, for people.

use std::fmt;

use authz::mirror::{ActionChange, Change, Plan, Tally, Totals};

/// Bytes of names in a line, unless the first one is longer.
const LINE: usize = 80;
/// Users shown whose rights change, and actions shown for each.
const USERS: usize = 6;
const ACTIONS: usize = 3;
/// Conflicts shown before "and n more".
const CONFLICTS: usize = 4;

/// Displays a plan in at most thirty lines: counts in a table, then who goes, comes, is renamed or suspended, and who
/// loses or gains which actions.
#[derive(Debug)]
pub struct Summary<'a>(pub &'a Plan);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.0;
        writeln!(f, "{:<13}{:>9}{:>9}{:>9}{:>9}", "", "now", "added", "removed", "changed")?;
        let rows = [
            ("users", plan.before.users, plan.counts.users),
            ("groups", plan.before.groups, plan.counts.groups),
            ("memberships", plan.before.memberships, plan.counts.memberships),
        ];
        for (kind, now, Tally { added, removed, changed }) in rows {
            writeln!(f, "{kind:<13}{now:>9}{added:>9}{removed:>9}{changed:>9}")?;
        }
        let users = &plan.counts.users;
        names(
            f,
            "users gone",
            users.removed,
            plan.users.iter().filter_map(|u| match u.change {
                Change::Remove => u.old_name.clone(),
                _ => None,
            }),
        )?;
        names(
            f,
            "users new",
            users.added,
            plan.users.iter().filter_map(|u| match u.change {
                Change::Add => u.new_name.clone(),
                _ => None,
            }),
        )?;
        let moved: Vec<_> = plan
            .users
            .iter()
            .filter(|u| u.change == Change::Change)
            .filter_map(|u| renamed(u.old_name.as_deref(), u.new_name.as_deref()))
            .collect();
        names(f, "users renamed", moved.len() as u64, moved.into_iter())?;
        names(
            f,
            "suspended",
            plan.newly_suspended,
            plan.users.iter().filter_map(|u| {
                match (u.change, u.old_status.as_deref(), u.new_status.as_deref()) {
                    (Change::Change, Some(old), Some("suspended")) if old != "suspended" => {
                        u.new_name.clone()
                    }
                    _ => None,
                }
            }),
        )?;
        names(
            f,
            "now external",
            plan.newly_external,
            plan.users.iter().filter_map(|u| {
                match (u.change, u.old_status.as_deref(), u.new_status.as_deref()) {
                    (Change::Change, Some(old), Some("external")) if old != "external" => u.new_name.clone(),
                    _ => None,
                }
            }),
        )?;
        names(
            f,
            "groups gone",
            plan.counts.groups.removed,
            plan.groups.iter().filter_map(|g| match g.change {
                Change::Remove => g.old_name.clone(),
                _ => None,
            }),
        )?;
        let moved: Vec<_> = plan
            .groups
            .iter()
            .filter(|g| g.change == Change::Change)
            .filter_map(|g| renamed(g.old_name.as_deref(), g.new_name.as_deref()))
            .collect();
        names(f, "groups renamed", moved.len() as u64, moved.into_iter())?;
        names(f, "not listed", plan.incomplete_groups.len() as u64, plan.incomplete_groups.iter().cloned())?;
        rights(f, "lose actions", plan.actions.users_losing, &plan.actions.losing)?;
        rights(f, "gain actions", plan.actions.users_gaining, &plan.actions.gaining)?;
        withheld(f, plan.withheld)?;
        if plan.external_users + plan.external_groups > 0 {
            writeln!(
                f,
                "{:<15}{} users, {} groups (members that the directory does not list)",
                "external", plan.external_users, plan.external_groups
            )?;
        }
        for conflict in plan.conflicts.iter().take(CONFLICTS) {
            writeln!(f, "{:<15}{} `{}`: {}", "conflict", conflict.kind, conflict.name, conflict.reason)?;
        }
        if plan.conflicts.len() > CONFLICTS {
            writeln!(f, "{:<15}and {} more", "", plan.conflicts.len() - CONFLICTS)?;
        }
        Ok(())
    }
}

fn renamed(old: Option<&str>, new: Option<&str>) -> Option<String> {
    match (old, new) {
        (Some(old), Some(new)) if old != new => Some(format!("{old} → {new}")),
        _ => None,
    }
}

fn withheld(f: &mut fmt::Formatter<'_>, kept: Totals) -> fmt::Result {
    if kept == Totals::default() {
        return Ok(());
    }
    let Totals { users, groups, memberships } = kept;
    writeln!(
        f,
        "{:<15}{users} users, {groups} groups, {memberships} memberships stay because of --no-remove",
        "not removed"
    )
}

/// A line for each of a few users: how many actions, and the first of them.
fn rights(f: &mut fmt::Formatter<'_>, label: &str, users: u64, changes: &[ActionChange]) -> fmt::Result {
    for (n, change) in changes.iter().take(USERS).enumerate() {
        let label = if n == 0 { label } else { "" };
        let named = change.actions.get(..ACTIONS).unwrap_or(&change.actions);
        write!(f, "{label:<15}{}: {}", change.user, named.join(", "))?;
        match change.count.saturating_sub(named.len() as u64) {
            0 => writeln!(f)?,
            more => writeln!(f, " and {more} more")?,
        }
    }
    match users.saturating_sub(changes.len().min(USERS) as u64) {
        0 => Ok(()),
        more => writeln!(f, "{:<15}and {more} more users", ""),
    }
}

/// As many names as fit into the line, at least one, and how many more there are.
fn names(
    f: &mut fmt::Formatter<'_>,
    label: &str,
    count: u64,
    all: impl Iterator<Item = String>,
) -> fmt::Result {
    if count == 0 {
        return Ok(());
    }
    let mut line = String::new();
    let mut shown = 0;
    for name in all {
        if shown > 0 && line.len() + name.len() > LINE {
            break;
        }
        line = if shown == 0 { name } else { format!("{line}, {name}") };
        shown += 1;
    }
    write!(f, "{label:<15}{line}")?;
    match count.saturating_sub(shown) {
        0 => writeln!(f),
        more => writeln!(f, " and {more} more"),
    }
}
