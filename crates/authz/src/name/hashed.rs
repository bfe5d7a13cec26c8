//! A text beside its hash: a name is hashed once, when it is parsed, and not by each check that looks it up.
//!
//! The compiler cannot hash a constant with a seed that is drawn when the process starts, so that is hashed where it is used.

use std::borrow::Cow;
use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::LazyLock;

use foldhash::quality::RandomState;

/// Seeded anew in each process, so nobody outside can prepare names of one hash.
static STATE: LazyLock<RandomState> = LazyLock::new(RandomState::default);

/// The hash of a text in this process.
pub(crate) fn hash_of(text: &[u8]) -> u64 {
    let mut state = STATE.build_hasher();
    state.write(text);
    state.finish()
}

/// In place of the hash of a constant.
const UNKNOWN: u64 = 0;

/// Behaves as the text does.
#[derive(Clone)]
pub(crate) struct Hashed<T = String> {
    text: T,
    hash: u64,
}

impl<T: Deref<Target = str>> Hashed<T> {
    /// The same as [`hash_of`] the text.
    #[inline]
    pub(crate) fn hash_code(&self) -> u64 {
        if self.hash == UNKNOWN { hash_of(self.text.as_bytes()) } else { self.hash }
    }

    pub(crate) fn into_text(self) -> T {
        self.text
    }
}

impl Hashed<Cow<'static, str>> {
    pub(crate) const fn constant(text: &'static str) -> Self {
        Self { text: Cow::Borrowed(text), hash: UNKNOWN }
    }
}

impl<T: From<String>> From<String> for Hashed<T> {
    fn from(text: String) -> Self {
        Self { hash: hash_of(text.as_bytes()), text: text.into() }
    }
}

impl<T: Into<String>> From<Hashed<T>> for String {
    fn from(hashed: Hashed<T>) -> Self {
        hashed.text.into()
    }
}

impl<T: Deref<Target = str>> Deref for Hashed<T> {
    type Target = str;

    #[inline]
    fn deref(&self) -> &str {
        &self.text
    }
}

impl<T: fmt::Debug> fmt::Debug for Hashed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl<T: PartialEq> PartialEq for Hashed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl<T: Eq> Eq for Hashed<T> {}

impl<T: Ord> PartialOrd for Hashed<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: Ord> Ord for Hashed<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

// As the text's, which a name is borrowed as.
impl<T: Hash> Hash for Hashed<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::hash_of;
    use crate::name::{ActionName, UserName};

    #[test]
    fn name_is_found_as_its_text_is_and_has_the_hash_of_it() {
        let [ada, bob] = ["ada@example.com", "bob@example.com"].map(|name| UserName::parse(name).unwrap());
        let ages = HashMap::from([(ada.clone(), 36), (bob.clone(), 40)]);
        assert_eq!((ages.get("ada@example.com"), ages.get("eve@example.com")), (Some(&36), None));
        assert!(ada < bob && ada == UserName::parse(" ADA@example.com").unwrap());
        assert_eq!(format!("{ada:?} {ada}"), r#"UserName("ada@example.com") ada@example.com"#);
        for name in [UserName::stored("ada@example.com".to_owned()), ada.clone()] {
            assert_eq!(name.hash_code(), hash_of(b"ada@example.com"));
        }
        assert_ne!(ada.hash_code(), bob.hash_code());
    }

    #[test]
    fn constant_has_the_hash_of_its_text_and_equals_it() {
        const SCALE: ActionName = ActionName::constant("workers.scale");
        let parsed = ActionName::parse("workers.scale").unwrap();
        assert_eq!(
            (SCALE.hash_code(), parsed.hash_code()),
            (hash_of(b"workers.scale"), hash_of(b"workers.scale"))
        );
        assert!(SCALE == parsed && HashMap::from([(SCALE, 1)]).contains_key(&parsed));
    }
}
