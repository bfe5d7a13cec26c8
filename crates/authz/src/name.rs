//! Names, parsed once at the edge: users, groups, directories, actions and the patterns that grants use.

mod hashed;

use std::borrow::{Borrow, Cow};
use std::fmt;

use serde::{Deserialize, Serialize};

use self::hashed::Hashed;
pub(crate) use self::hashed::hash_of;

/// Longest name of a user or group, in bytes (an e-mail address has at most 254, see RFC 5321).
pub const MAX_NAME_BYTES: usize = 320;
/// Longest name of an action or pattern, in bytes.
pub const MAX_ACTION_BYTES: usize = 255;

/// Longest `sub`, in bytes: OpenID Connect allows 255 characters of ASCII.
pub(crate) const MAX_SUB_BYTES: usize = 255;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing is left after trimming.
    #[error("a {kind} name is empty; give at least one character")]
    Empty {
        /// What was to be named.
        kind: &'static str,
    },
    /// More bytes than the database takes.
    #[error("the {kind} name of {length} bytes is too long; at most {limit} are allowed")]
    TooLong {
        /// What was to be named.
        kind: &'static str,
        /// Bytes given.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// White space or a control character inside a user or group name.
    #[error("`{text}` is not a {kind} name; it must not contain spaces or control characters")]
    Space {
        /// What was to be named.
        kind: &'static str,
        /// The text, with control characters escaped.
        text: String,
    },
    /// Not a directory name.
    #[error(
        "`{text}` is not a directory name; use lower-case letters, digits, `.`, `_` and `-`, at most 63, a letter or digit first"
    )]
    Directory {
        /// The text.
        text: String,
    },
    /// Not an action name.
    #[error(
        "`{text}` is not an action name; use dot-separated segments of lower-case letters, digits, `_` and `-`, such as `workers.scale`"
    )]
    Action {
        /// The text.
        text: String,
    },
    /// Neither an action name nor a pattern.
    #[error(
        "`{text}` cannot be granted; name an action such as `workers.scale`, all below one with `workers.*`, or everything with `*`"
    )]
    Pattern {
        /// The text.
        text: String,
    },
}

fn canonical(kind: &'static str, text: Cow<'_, str>) -> Result<String, NameError> {
    // Nearly every name of a directory, without a branch for each of its bytes.
    let odd = text
        .bytes()
        .fold(0, |odd, b| odd | u8::from(b <= b' ') | u8::from(b >= 0x7f) | u8::from(b.is_ascii_uppercase()));
    if odd == 0 && (1..=MAX_NAME_BYTES).contains(&text.len()) {
        return Ok(text.into_owned());
    }
    let name = text.trim_ascii().to_ascii_lowercase();
    if name.is_empty() {
        return Err(NameError::Empty { kind });
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong { kind, length: name.len(), limit: MAX_NAME_BYTES });
    }
    let spaced = if name.is_ascii() {
        name.bytes().any(|byte| byte <= b' ' || byte == 0x7f)
    } else {
        name.chars().any(|c| c.is_whitespace() || c.is_control())
    };
    if spaced {
        return Err(NameError::Space { kind, text: text.escape_debug().to_string() });
    }
    Ok(name)
}

macro_rules! text_newtype {
    ($name:ident) => {
        text_newtype!($name, |text: String| $name::parse(&text));
    };
    ($name:ident, $from_string:expr) => {
        impl $name {
            /// The name as the database holds it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// A name read from the database, which holds canonical names only.
            #[allow(dead_code, reason = "not every name is read back")]
            pub(crate) fn stored(text: String) -> Self {
                Self(text.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                $from_string(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.into()
            }
        }
    };
}

/// The name of a user, an e-mail address as a rule: trimmed, ASCII letters in lower case.
///
/// ```
/// # use authz::UserName;
/// assert_eq!(UserName::parse(" Ada@Example.com ")?.as_str(), "ada@example.com");
/// assert!(UserName::parse("ada lovelace").is_err());
/// # Ok::<(), authz::NameError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserName(Hashed);

impl UserName {
    /// The hash by which a snapshot finds the user.
    #[inline]
    pub(crate) fn hash_code(&self) -> u64 {
        self.0.hash_code()
    }

    /// Parses a user name.
    ///
    /// # Errors
    /// [`NameError`] if nothing is left after trimming, if it is longer than [`MAX_NAME_BYTES`], or if it
    /// holds white space or control characters.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        canonical("user", text.into()).map(Self::stored)
    }
}
text_newtype!(UserName, |text: String| canonical("user", text.into()).map(UserName::stored));

/// The name of a group, an e-mail address as a rule: trimmed, ASCII letters in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupName(String);

impl GroupName {
    /// Parses a group name.
    ///
    /// # Errors
    /// [`NameError`], under the same conditions as [`UserName::parse`].
    pub fn parse(text: &str) -> Result<Self, NameError> {
        canonical("group", text.into()).map(Self)
    }
}
text_newtype!(GroupName, |text: String| canonical("group", text.into()).map(GroupName));

/// The `sub` of an OpenID Connect login: the directory's immutable id of a user, compared byte by byte
/// ([OpenID Connect Core, section 2](https://openid.net/specs/openid-connect-core-1_0.html#IDToken)).
///
/// Unlike the e-mail address it never passes to another person, so prefer it where a login gives it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sub(String);

impl Sub {
    /// Parses a `sub`. Nothing is trimmed or lower-cased: it is case-sensitive.
    ///
    /// # Errors
    /// [`NameError`] if it is empty, longer than 255 bytes, or holds white space or control characters.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        const LIMIT: usize = MAX_SUB_BYTES;
        if text.is_empty() {
            return Err(NameError::Empty { kind: "sub" });
        }
        if text.len() > LIMIT {
            return Err(NameError::TooLong { kind: "sub", length: text.len(), limit: LIMIT });
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(NameError::Space { kind: "sub", text: text.escape_debug().to_string() });
        }
        Ok(Self(text.to_owned()))
    }
}
text_newtype!(Sub);

/// How a user is found: by name, or by the `sub` of a login.
///
/// Functions take `impl Into<UserKey>`, so pass a `&UserName`, a `&Sub`, or a `&Principal` that is one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UserKey<'a> {
    /// By name.
    Name(&'a UserName),
    /// By the directory's immutable id.
    Sub(&'a Sub),
}

impl<'a> UserKey<'a> {
    pub(crate) fn name(self) -> Option<&'a str> {
        match self {
            Self::Name(name) => Some(name.as_str()),
            Self::Sub(_) => None,
        }
    }

    pub(crate) fn sub(self) -> Option<&'a str> {
        match self {
            Self::Name(_) => None,
            Self::Sub(sub) => Some(sub.as_str()),
        }
    }
}

impl<'a> From<&'a Principal> for UserKey<'a> {
    fn from(principal: &'a Principal) -> Self {
        match principal {
            Principal::Name(name) => Self::Name(name),
            Principal::Sub(sub) => Self::Sub(sub),
        }
    }
}

/// Who asks: a user by name, or by the `sub` of a login as long as the name is not known.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Principal {
    /// By name.
    Name(UserName),
    /// By the directory's immutable id.
    Sub(Sub),
}

impl From<UserName> for Principal {
    fn from(name: UserName) -> Self {
        Self::Name(name)
    }
}

impl From<Sub> for Principal {
    fn from(sub: Sub) -> Self {
        Self::Sub(sub)
    }
}

impl From<UserKey<'_>> for Principal {
    fn from(key: UserKey<'_>) -> Self {
        match key {
            UserKey::Name(name) => Self::Name(name.clone()),
            UserKey::Sub(sub) => Self::Sub(sub.clone()),
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        UserKey::from(self).fmt(f)
    }
}

/// As it is shown: the name, or `sub` and the id.
impl Serialize for Principal {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'a> From<&'a UserName> for UserKey<'a> {
    fn from(name: &'a UserName) -> Self {
        Self::Name(name)
    }
}

impl<'a> From<&'a Sub> for UserKey<'a> {
    fn from(sub: &'a Sub) -> Self {
        Self::Sub(sub)
    }
}

impl fmt::Display for UserKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Sub(sub) => write!(f, "sub {sub}"),
        }
    }
}

/// The name of a directory: `local`, or what `dir-sync --directory` is given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DirectoryName(String);

impl DirectoryName {
    /// Parses a directory name.
    ///
    /// # Errors
    /// [`NameError::Directory`] unless it is 1 to 63 of `a-z0-9._-`, the first a letter or digit.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let first = text.bytes().next().is_some_and(known);
        if first && text.len() <= 63 && text.bytes().all(|b| known(b) || b"._-".contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Directory { text: text.escape_debug().to_string() })
        }
    }

    /// Whether this is the directory of what is kept by hand.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.0 == "local"
    }
}
text_newtype!(DirectoryName);

/// The exact name of an action: dot-separated lower-case segments, resources as trailing ones.
///
/// ```
/// use authz::ActionName;
///
/// const SCALE: ActionName = ActionName::constant("workers.scale.ads-team"); // checked by the compiler
/// assert_eq!(ActionName::parse("workers.scale.ads-team")?, SCALE);
/// assert!(ActionName::parse("Workers Scale").is_err());
/// # Ok::<(), authz::NameError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ActionName(Hashed<Cow<'static, str>>);

impl ActionName {
    /// Parses an action name. Nothing is trimmed or lower-cased: an action is named in code, so a
    /// difference is a mistake.
    ///
    /// # Errors
    /// [`NameError::Action`] or [`NameError::TooLong`].
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.len() > MAX_ACTION_BYTES {
            return Err(NameError::TooLong { kind: "action", length: text.len(), limit: MAX_ACTION_BYTES });
        }
        if is_action(text.as_bytes()) {
            Ok(Self::stored(text.to_owned()))
        } else {
            Err(NameError::Action { text: text.escape_debug().to_string() })
        }
    }

    /// An action name known when the program is compiled.
    ///
    /// # Panics
    /// If it is not an action name; in a `const` the compiler says so.
    ///
    /// ```compile_fail
    /// const WRONG: authz::ActionName = authz::ActionName::constant("Workers Scale");
    /// ```
    #[must_use]
    #[expect(
        clippy::panic,
        clippy::manual_assert,
        reason = "in a constant this is a compile error, which is the point"
    )]
    pub const fn constant(text: &'static str) -> Self {
        if !is_action(text.as_bytes()) || text.len() > MAX_ACTION_BYTES {
            panic!(
                "not an action name: use dot-separated segments of lower-case letters, digits, `_` and `-`"
            );
        }
        Self(Hashed::constant(text))
    }

    /// The hash by which a snapshot finds the action.
    #[inline]
    pub(crate) fn hash_code(&self) -> u64 {
        self.0.hash_code()
    }

    /// What a grant may be called to cover this action: itself, `*`, and each prefix with `.*`.
    pub(crate) fn covering(&self) -> Vec<String> {
        let below = self.0.match_indices('.').map(|(dot, _)| format!("{}.*", self.0.split_at(dot).0));
        [self.0.to_string(), EVERYTHING.to_owned()].into_iter().chain(below).collect()
    }
}
text_newtype!(ActionName);

/// The pattern that covers every action.
pub(crate) const EVERYTHING: &str = "*";

/// What a grant names: an action, all actions below one (`workers.*`), or every action (`*`).
///
/// ```
/// use authz::{ActionName, ActionPattern};
///
/// let pattern = ActionPattern::parse("workers.*")?;
/// assert!(pattern.covers(&ActionName::parse("workers.scale.ads-team")?));
/// assert!(!pattern.covers(&ActionName::parse("workers")?)); // below, not the name itself
/// # Ok::<(), authz::NameError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ActionPattern(Cow<'static, str>);

impl ActionPattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// [`NameError::Pattern`] or [`NameError::TooLong`].
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.len() > MAX_ACTION_BYTES {
            return Err(NameError::TooLong { kind: "action", length: text.len(), limit: MAX_ACTION_BYTES });
        }
        let stem = text.strip_suffix(".*").unwrap_or(text);
        if text == EVERYTHING || is_action(stem.as_bytes()) {
            Ok(Self(Cow::Owned(text.to_owned())))
        } else {
            Err(NameError::Pattern { text: text.escape_debug().to_string() })
        }
    }

    /// Whether a grant of this pattern allows the action.
    #[must_use]
    pub fn covers(&self, action: &ActionName) -> bool {
        match self.0.strip_suffix('*') {
            Some(prefix) => action.0.starts_with(prefix), // "" for `*`, "workers." for `workers.*`
            None => *self.0 == *action.0,
        }
    }
}
text_newtype!(ActionPattern);

impl From<ActionName> for ActionPattern {
    fn from(action: ActionName) -> Self {
        Self(action.0.into_text())
    }
}

const fn is_action(text: &[u8]) -> bool {
    let mut rest = text;
    let mut segment_is_empty = true;
    while let [byte, tail @ ..] = rest {
        match *byte {
            b'.' if segment_is_empty => return false,
            b'.' => segment_is_empty = true,
            b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => segment_is_empty = false,
            _ => return false,
        }
        rest = tail;
    }
    !segment_is_empty
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_names_are_trimmed_and_ascii_lower_cased() {
        assert_eq!(UserName::parse("\tÄda@Example.COM\n").unwrap().as_str(), "Äda@example.com");
    }

    #[test]
    fn a_sub_is_taken_as_it_is() {
        assert_eq!(Sub::parse("1AbC").unwrap().as_str(), "1AbC");
        for text in ["", " 1", "1\n", &"1".repeat(256)] {
            assert!(Sub::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn names_with_spaces_or_controls_are_refused() {
        for text in ["a b", "a\u{a0}b", "a\0b", "a\u{7f}", "", "   "] {
            assert!(UserName::parse(text).is_err(), "{text:?}");
            assert!(GroupName::parse(text).is_err(), "{text:?}");
        }
        assert!(UserName::parse(&"a".repeat(320)).is_ok());
        assert!(UserName::parse(&"a".repeat(321)).is_err());
    }

    #[test]
    fn action_names_are_lower_case_dotted_segments() {
        for good in ["a", "workers.scale", "workers.scale.ads-team", "a_1.b-2"] {
            assert!(ActionName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "A", "a b", " a", "a.*", "*", "ä", "a/b"] {
            assert!(ActionName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_end_in_a_star_segment_or_are_exact() {
        for good in ["*", "a.*", "a.b.*", "a.b"] {
            assert!(ActionPattern::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "a*", "*.a", "a.*.b", "**", ".*", "a.**", "A.*"] {
            assert!(ActionPattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn covering_lists_just_the_patterns_that_cover() {
        let action = ActionName::parse("a.b.c").unwrap();
        let covering = action.covering();
        assert_eq!(covering, ["a.b.c", "*", "a.*", "a.b.*"]);
        assert!(covering.iter().all(|p| ActionPattern::parse(p).unwrap().covers(&action)));
        for other in ["a.b", "a.b.c.*", "a.b.cc", "b.*", "a.bb.*"] {
            assert!(!ActionPattern::parse(other).unwrap().covers(&action), "{other}");
        }
    }
}
