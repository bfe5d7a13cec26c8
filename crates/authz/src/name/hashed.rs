//! A text beside its hash: a name is hashed once, when it is parsed, and not by each check that looks it up.

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

/// Behaves as the text does.
#[derive(Clone)]
pub(crate) struct Hashed {
    text: String,
    hash: u64,
}

impl Hashed {
    /// The same as [`hash_of`] the text.
    #[inline]
    pub(crate) fn hash_code(&self) -> u64 {
        self.hash
    }
}

impl From<String> for Hashed {
    fn from(text: String) -> Self {
        Self { hash: hash_of(text.as_bytes()), text }
    }
}

impl From<Hashed> for String {
    fn from(hashed: Hashed) -> Self {
        hashed.text
    }
}

impl Deref for Hashed {
    type Target = str;

    #[inline]
    fn deref(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for Hashed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

impl PartialEq for Hashed {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Hashed {}

impl PartialOrd for Hashed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Hashed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

// As the text's, which a name is borrowed as.
impl Hash for Hashed {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::hash_of;
    use crate::name::UserName;

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
}
