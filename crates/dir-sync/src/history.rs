//! The runs so far and the freshness of the directories, for people.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use authz::mirror::{Freshness, RunRecord};
use chrono::{DateTime, SecondsFormat, Utc};

/// A span of time as people write it: `90s`, `30m`, `2h`, `1d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Age(pub Duration);

/// Why a text is no span of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no span of time; write one such as `90s`, `30m`, `2h` or `1d`")]
pub struct AgeError(String);

impl FromStr for Age {
    type Err = AgeError;

    fn from_str(text: &str) -> Result<Self, AgeError> {
        let trimmed = text.trim();
        let unit = |unit| match unit {
            's' => Some(1),
            'm' => Some(60),
            'h' => Some(3_600),
            'd' => Some(86_400),
            _ => None,
        };
        let parsed = trimmed.chars().last().and_then(unit).and_then(|seconds: u64| {
            let number: u64 = trimmed.get(..trimmed.len() - 1)?.trim_end().parse().ok()?;
            number.checked_mul(seconds)
        });
        parsed.map(|seconds| Self(Duration::from_secs(seconds))).ok_or_else(|| AgeError(text.to_owned()))
    }
}

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0..60 => write!(f, "{seconds} s"),
            60..3_600 => write!(f, "{} min", seconds / 60),
            3_600..172_800 => write!(f, "{} h {} min", seconds / 3_600, seconds % 3_600 / 60),
            _ => write!(f, "{} d {} h", seconds / 86_400, seconds % 86_400 / 3_600),
        }
    }
}

/// Whether the directory is older than it may be; one that was never complete always is.
#[must_use]
pub fn is_stale(freshness: &Freshness, max: Age) -> bool {
    freshness.age_seconds.is_none_or(|age| age > max.0.as_secs_f64())
}

/// Displays runs, one in a line, the newest first.
#[derive(Debug)]
pub struct Runs<'a>(pub &'a [RunRecord]);

impl fmt::Display for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>8}  {:<20}  {:>6}  {:<10}  {:<16}  what",
            "run", "started", "took", "status", "directory"
        )?;
        for run in self.0 {
            let took = run.finished_at.map_or_else(
                || "-".to_owned(),
                |end| format!("{} s", (end - run.started_at).num_seconds().max(0)),
            );
            let approvable = run.plan_hash.as_ref().filter(|_| run.status == "refused");
            let plan = approvable.map(|hash| format!("plan {hash}: ")).unwrap_or_default();
            let what = run.message.clone().or_else(|| run.counts.as_ref().map(changes)).unwrap_or_default();
            writeln!(
                f,
                "{:>8}  {:<20}  {took:>6}  {:<10}  {:<16}  {plan}{}",
                run.run_id,
                time(run.started_at),
                run.status,
                run.directory,
                first_line(&what)
            )?;
        }
        Ok(())
    }
}

/// Displays how fresh directories are, one in a line.
#[derive(Debug)]
pub struct Statuses<'a> {
    /// What is shown.
    pub directories: &'a [Freshness],
    /// How old they may be.
    pub max_age: Option<Age>,
}

impl fmt::Display for Statuses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.directories.is_empty() {
            return writeln!(f, "no directory was synced yet; `dir-sync run` makes one");
        }
        for directory in self.directories {
            let age = directory.age_seconds.map_or_else(
                || "never complete".to_owned(),
                |age| format!("{} old", Age(Duration::try_from_secs_f64(age).unwrap_or_default())),
            );
            let stale = match self.max_age {
                Some(max) if is_stale(directory, max) => format!(", which is more than {max}"),
                _ => String::new(),
            };
            let last = match (directory.last_run_id, &directory.last_status) {
                (Some(run), Some(status)) => format!("; run {run} is the newest: {status}"),
                _ => String::new(),
            };
            writeln!(f, "{:<16}  {age}{stale}{last}", directory.directory)?;
        }
        Ok(())
    }
}

fn time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn changes(counts: &serde_json::Value) -> String {
    let of = |kind: &str| {
        let count = |change: &str| {
            counts.get(kind).and_then(|tally| tally.get(change)).and_then(serde_json::Value::as_u64)
        };
        let [added, removed, changed] =
            ["added", "removed", "changed"].map(|change| count(change).unwrap_or_default());
        (added + removed + changed > 0).then(|| format!("{kind} +{added} -{removed} ~{changed}"))
    };
    let parts: Vec<_> = ["users", "groups", "memberships"].into_iter().filter_map(of).collect();
    if parts.is_empty() { "no change".to_owned() } else { parts.join(", ") }
}

/// A message may be long; the whole of it is in `--output json`.
fn first_line(text: &str) -> String {
    const MOST: usize = 100;
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= MOST {
        line.to_owned()
    } else {
        line.chars().take(MOST - 1).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_is_a_number_and_a_unit() {
        let seconds = |text: &str| text.parse::<Age>().map(|age| age.0.as_secs());
        assert_eq!(
            ["90s", "30m", " 2 h", "1d"].map(|text| seconds(text).unwrap()),
            [90, 1_800, 7_200, 86_400]
        );
        for bad in ["", "5", "h", "-1h", "1.5h", "1w", "1é", "99999999999999999999d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
