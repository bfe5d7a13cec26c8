//! Which groups of a directory are mirrored, by patterns of their addresses.

use std::fmt;
use std::str::FromStr;

/// A pattern of a whole address, without regard to case: `*` stands for any text, `?` for one character.
///
/// ```
/// use dir_sync::filter::Pattern;
///
/// let pattern: Pattern = "ops-*@example.com".parse()?;
/// assert!(pattern.matches("Ops-Europe@example.com"));
/// assert!(!pattern.matches("my-ops-europe@example.com"));
/// # Ok::<(), dir_sync::filter::PatternError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no pattern of an address; write one such as `ops-*@example.com`, without spaces or commas")]
pub struct PatternError(String);

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let pattern = text.trim();
        if pattern.is_empty() || pattern.contains(|c: char| c.is_whitespace() || c == ',') {
            return Err(PatternError(text.to_owned()));
        }
        Ok(Self(pattern.to_ascii_lowercase()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Pattern {
    /// Whether the address is of this pattern.
    #[must_use]
    pub fn matches(&self, address: &str) -> bool {
        let address = address.to_ascii_lowercase();
        let (mut rest, mut pattern) = (address.as_str(), self.0.as_str());
        // Where to go on when what follows the last `*` does not fit: one character further.
        let mut again: Option<(&str, &str)> = None;
        loop {
            let mut after = pattern.chars();
            match (after.next(), rest.chars().next()) {
                (Some('*'), _) => {
                    pattern = after.as_str();
                    again = Some((rest, pattern));
                }
                (Some(wanted), Some(found)) if wanted == '?' || wanted == found => {
                    pattern = after.as_str();
                    rest = rest.split_at(found.len_utf8()).1;
                }
                (None, None) => return true,
                _ => {
                    let Some((from, behind_star)) = again else { return false };
                    let mut further = from.chars();
                    if further.next().is_none() {
                        return false;
                    }
                    (rest, pattern) = (further.as_str(), behind_star);
                    again = Some((rest, pattern));
                }
            }
        }
    }
}

/// Groups that are mirrored: those of any pattern of the first kind, or all if there is none, but for those of a pattern of
/// the second kind.
///
/// A group that is left out is one that the directory does not list: its members are not asked for, what the mirror has of
/// it goes (the guard counts it), and where it is a member it counts as external, so nobody has anything through it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupFilter {
    /// Patterns of the groups to mirror; none stands for all.
    pub include: Vec<Pattern>,
    /// Patterns of the groups to leave out.
    pub exclude: Vec<Pattern>,
}

impl GroupFilter {
    /// Whether the group of this address is mirrored.
    #[must_use]
    pub fn keeps(&self, address: &str) -> bool {
        let is_of = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(address));
        (self.include.is_empty() || is_of(&self.include)) && !is_of(&self.exclude)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_is_of_the_whole_address() {
        for (pattern, address, fits) in [
            ("a@b.c", "A@b.c", true),
            ("a@b.c", "aa@b.c", false),
            ("*", "", true),
            ("*@b.c", "x@y@b.c", true),
            ("*a*b*", "xxaxxaxbx", true),
            ("*a*b*", "xxbxxa", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a?c", "aöc", true),
            ("*ö*", "löwe", true),
            ("**a", "ba", true),
            ("a*", "ba", false),
            ("*aab", "aaab", true),
        ] {
            assert_eq!(pattern.parse::<Pattern>().unwrap().matches(address), fits, "{pattern} {address}");
        }
        for bad in ["", " ", "a b", "a,b"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn exclusion_comes_after_inclusion() {
        let patterns =
            |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<Pattern>>();
        let all = GroupFilter::default();
        assert!(all.keeps("any@example.com"));
        let some = GroupFilter { include: patterns(&["ops-*", "dev-*"]), exclude: patterns(&["*-old@*"]) };
        assert!(some.keeps("ops-eu@example.com") && some.keeps("dev-eu@example.com"));
        assert!(!some.keeps("hr@example.com") && !some.keeps("ops-old@example.com"));
    }
}
