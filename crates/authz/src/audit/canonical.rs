//! A record as bytes, always the same ones, whatever the session's settings, the server or the way they came.
//!
//! The columns in the order of [`copy_range`](super::seal::copy_range); each as the length of its value (four bytes, big-endian; all ones for
//! null) and the value: a number as eight bytes, big-endian; a time as such a number, microseconds since
//! 2000-01-01 UTC; a text as UTF-8; JSON as the text that Postgres gives for `jsonb`, which is the same for the same
//! value; what is true or false as one byte. So two different records never give the same bytes. A digest begins with a
//! word for what it is a digest of, and in which [`Form`].

use ring::digest::{Context, SHA256, digest};

use crate::error::Error;
use crate::snapshot::copy::Field;

/// How many columns a record has.
pub(crate) const COLUMNS: usize = 15;
/// The length of one entry of a seal.
pub(crate) const ENTRY: usize = 48;

const NULL: [u8; 4] = [0xff; 4];

/// What of a record is in its digest: the form of its seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// All columns but `by_database`.
    One,
    /// All of them.
    Two,
}

impl Form {
    /// The one that seals are written in.
    pub(crate) const NEWEST: Self = Self::Two;

    /// By its number in a seal; `None` if it is of a later version than this.
    pub(crate) const fn of(format: i16) -> Option<Self> {
        match format {
            1 => Some(Self::One),
            2 => Some(Self::Two),
            _ => None,
        }
    }

    /// The reverse.
    pub(crate) const fn format(self) -> i16 {
        match self {
            Self::One => 1,
            Self::Two => 2,
        }
    }

    const fn word(self) -> &'static [u8] {
        match self {
            Self::One => b"authz audit record 1\n",
            Self::Two => b"authz audit record 2\n",
        }
    }
}

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub(crate) [u8; 32]);

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        from_hex(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| Error::NotADigest(text.to_owned()))
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Digest {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self::from_ring(&digest(&SHA256, bytes))
    }

    fn from_ring(digest: &ring::digest::Digest) -> Self {
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        Self(bytes)
    }

    pub(crate) fn from_slice(bytes: &[u8]) -> Result<Self, Error> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| Error::Unreadable { what: "a digest of another length".to_owned() })
    }
}

/// Digests what comes piece by piece.
pub(crate) struct Hasher(Context);

impl Hasher {
    pub(crate) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> Digest {
        Digest::from_ring(&self.0.finish())
    }
}

/// What a seal says of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) audit_id: i64,
    /// Microseconds since 2000-01-01 UTC.
    pub(crate) recorded_at: i64,
    pub(crate) digest: Digest,
}

impl Entry {
    pub(crate) fn all_from_bytes(bytes: &[u8]) -> impl Iterator<Item = Self> + '_ {
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        entries.iter().filter_map(|entry| {
            let (audit_id, rest) = entry.split_first_chunk::<8>()?;
            let (recorded_at, rest) = rest.split_first_chunk::<8>()?;
            Some(Self {
                audit_id: i64::from_be_bytes(*audit_id),
                recorded_at: i64::from_be_bytes(*recorded_at),
                digest: Digest(rest.try_into().ok()?),
            })
        })
    }
}

/// A record as a seal and a verifier need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sealable {
    pub(crate) entry: Entry,
    pub(crate) transaction_id: u64,
    /// Of the digest.
    pub(crate) form: Form,
}

/// The entries of these records, as a seal holds them.
pub(crate) fn entries(records: &[Sealable]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(records.len() * ENTRY);
    for Sealable { entry, .. } in records {
        bytes.extend_from_slice(&entry.audit_id.to_be_bytes());
        bytes.extend_from_slice(&entry.recorded_at.to_be_bytes());
        bytes.extend_from_slice(&entry.digest.0);
    }
    bytes
}

impl Sealable {
    /// Where it stands in the order of the chain within its era.
    pub(crate) const fn place(&self) -> Place {
        Place { transaction_id: self.transaction_id, audit_id: self.entry.audit_id }
    }
}

/// A place in the order of the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) transaction_id: u64,
    pub(crate) audit_id: i64,
}

impl Place {
    /// Before every record.
    pub(crate) const START: Self = Self { transaction_id: 0, audit_id: i64::MIN };
    /// After every record.
    pub(crate) const END: Self = Self { transaction_id: i64::MAX.unsigned_abs(), audit_id: i64::MAX };

    /// Before every record of that transaction.
    pub(crate) const fn before(transaction_id: u64) -> Self {
        Self { transaction_id, audit_id: i64::MIN }
    }

    /// Right after a record.
    pub(crate) const fn after(self) -> Self {
        match self.audit_id.checked_add(1) {
            Some(audit_id) => Self { transaction_id: self.transaction_id, audit_id },
            None => Self { transaction_id: self.transaction_id + 1, audit_id: i64::MIN },
        }
    }
}

/// Makes the bytes of one record after the other, in one place.
pub(crate) struct Encoder(Vec<u8>);

impl Encoder {
    pub(crate) fn new() -> Self {
        Self(Vec::with_capacity(1024))
    }

    /// Begins a record.
    pub(crate) fn begin(&mut self, form: Form) {
        self.0.clear();
        self.0.extend_from_slice(form.word());
    }

    pub(crate) fn value(&mut self, value: Option<&[u8]>) {
        match value {
            // Postgres holds no value of 1 GiB or more; one that pretends to is not taken for null.
            Some(value) => match u32::try_from(value.len()) {
                Ok(length) if length < u32::MAX => {
                    self.0.extend_from_slice(&length.to_be_bytes());
                    self.0.extend_from_slice(value);
                }
                _ => self.0.extend_from_slice(&(u32::MAX - 1).to_be_bytes()),
            },
            None => self.0.extend_from_slice(&NULL),
        }
    }

    pub(crate) fn number(&mut self, number: i64) {
        self.value(Some(&number.to_be_bytes()));
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.0)
    }

    /// The record that a row of `COPY … (format binary)` over the columns holds, in the form that its place calls for.
    pub(crate) fn row(
        &mut self,
        row: &[Field<'_>; COLUMNS],
        form: impl FnOnce(Place) -> Form,
    ) -> Result<Sealable, Error> {
        let [rest @ .., by_database] = row;
        let [audit_id, recorded_at, .., transaction_id, _operation_id] = rest;
        let (audit_id, recorded_at) = (audit_id.int8()?, recorded_at.int8()?);
        let transaction_id = transaction_id.int8()?.cast_unsigned();
        let form = form(Place { transaction_id, audit_id });
        self.begin(form);
        for field in rest {
            self.value(field.bytes());
        }
        match form {
            Form::One => {}
            Form::Two => self.value(by_database.bytes()),
        }
        Ok(Sealable { entry: Entry { audit_id, recorded_at, digest: self.digest() }, transaction_id, form })
    }
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| DIGITS.get(usize::from(half)).copied().map_or('?', char::from);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// In the form of [`to_hex`] and no other, so that a line of an export can be written in one way only.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let half = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some(half(*high)? << 4 | half(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_is_written_in_one_way() {
        let digest = Digest::of(b"a record");
        let text = digest.to_string();
        assert_eq!(text.parse::<Digest>().unwrap(), digest);
        assert!(text.contains(|c: char| c.is_ascii_lowercase()));
        for bad in
            [text.to_uppercase(), text[1..].to_owned(), format!("{text} "), "é".repeat(32), String::new()]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
