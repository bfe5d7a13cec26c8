//! Seals: the chain that shows whether a record was changed.
//!
//! Records are written unchained, so that writers do not wait for each other. From time to time a sealer takes the
//! records whose transactions, and all those before, have ended (the commit horizon: `pg_snapshot_xmin`, but for what
//! other databases of the server are at), in the order (`transaction_id`,
//! `audit_id`), and writes a *seal*: a digest for each of them, and one over those digests, over what the seal says of
//! itself and over the digest of the seal before. Nobody can then change, remove, add or move a sealed record without
//! changing every seal after it; and a copy of one digest outside the database, a [`Checkpoint`], shows that too.
//!
//! Seals of `format` 1, from before records were marked as the database's own, do not cover that mark (`by_database`);
//! those of format 2 do. Both may stand in one chain, as where an older sealer works beside a newer one.
//!
//! **Which records belong to a seal** follows from the seals alone: those of its era whose place in the order lies
//! between where the seal before ended and where it ends. That is safe because a transaction below the horizon cannot
//! write any more. Transactions are counted per cluster, though, and a trail that was dumped and restored elsewhere
//! goes on under another count. So the sealer compares the cluster's identity with that of the last seal. If it is
//! another one, it ends the *era*: it stops writers for a moment, notes the highest `audit_id` given so far, and seals
//! what is left up to there in `closing` seals. The next era has the records above that number, and places of its own.
//! A record written after a restore has a higher number than any that an earlier seal knew of (the sequence is part
//! of the dump), which is how the closing seals tell such records from sealed ones.

mod sealer;
mod step;

use chrono::{DateTime, TimeDelta, Utc};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use sqlx::PgExecutor;

pub use sealer::{DEFAULT_INTERVAL, Sealer};
pub(crate) use step::{Range, copy_range, normal_end};
pub use step::{Sealed, seal};

use super::canonical::{Digest, Form, Hasher, Place, from_hex, to_hex};
use crate::error::Error;

const SEAL: &[u8] = b"authz audit seal 1\n";
const SIGNATURE: &[u8] = b"authz audit seal signature 1\n";
/// 2000-01-01 UTC, from which the database counts microseconds, in microseconds since 1970.
const EPOCH: i64 = 946_684_800_000_000;

/// A moment as the database counts: microseconds since 2000-01-01 UTC.
pub(crate) fn moment(micros: i64) -> Option<DateTime<Utc>> {
    micros.checked_add(EPOCH).and_then(DateTime::from_timestamp_micros)
}

/// The reverse of [`moment`].
pub(crate) const fn micros(moment: DateTime<Utc>) -> i64 {
    moment.timestamp_micros() - EPOCH
}

/// What to keep outside the database: a seal's number and digest. Written as `SEAL:DIGEST`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Checkpoint {
    /// The seal's number.
    pub seal_id: i64,
    /// Its digest, which stands for all records up to it.
    pub digest: Digest,
}

impl std::fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.seal_id, self.digest)
    }
}

impl std::str::FromStr for Checkpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::NotACheckpoint(text.to_owned());
        let (seal_id, digest) = text.trim().split_once(':').ok_or_else(bad)?;
        Ok(Self { seal_id: seal_id.parse().map_err(|_| bad())?, digest: digest.parse().map_err(|_| bad())? })
    }
}

/// The newest seal's checkpoint; `None` as long as nothing is sealed.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn checkpoint(executor: impl PgExecutor<'_>) -> Result<Option<Checkpoint>, Error> {
    let row = sqlx::query!("select seal_id, digest from authz.audit_seals order by seal_id desc limit 1")
        .fetch_optional(executor)
        .await?;
    row.map(|row| Ok(Checkpoint { seal_id: row.seal_id, digest: Digest::from_slice(&row.digest)? }))
        .transpose()
}

/// Signs seals: an Ed25519 key. Keep it outside the database.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    seed: [u8; 32],
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", self.public().key_id())
    }
}

impl SigningKey {
    /// A new key.
    ///
    /// # Errors
    /// [`Error::NotAKey`] if the system gives no random numbers.
    pub fn generate() -> Result<Self, Error> {
        let mut seed = [0; 32];
        SystemRandom::new()
            .fill(&mut seed)
            .map_err(|_| Error::NotAKey("the system gives no random numbers"))?;
        Self::from_seed(seed)
    }

    /// From its seed, 64 hexadecimal digits: what [`to_secret_text`](Self::to_secret_text) gives.
    ///
    /// # Errors
    /// [`Error::NotAKey`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let seed = from_hex(&text.trim().to_ascii_lowercase()).and_then(|bytes| bytes.try_into().ok());
        Self::from_seed(seed.ok_or(Error::NotAKey("a signing key is 64 hexadecimal digits"))?)
    }

    fn from_seed(seed: [u8; 32]) -> Result<Self, Error> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|_| Error::NotAKey("a signing key is 64 hexadecimal digits"))?;
        Ok(Self { pair, seed })
    }

    /// The secret, to be kept in a file that only the sealer reads.
    #[must_use]
    pub fn to_secret_text(&self) -> String {
        to_hex(&self.seed)
    }

    /// The half that verifies.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().zip(self.pair.public_key().as_ref()) {
            *to = *from;
        }
        PublicKey(bytes)
    }

    fn sign(&self, digest: Digest) -> Vec<u8> {
        self.pair.sign(&[SIGNATURE, &digest.0].concat()).as_ref().to_vec()
    }
}

/// Verifies signatures of seals. Written as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The name under which seals refer to it: the beginning of its SHA-256.
    #[must_use]
    pub fn key_id(&self) -> String {
        to_hex(Digest::of(&self.0).0.get(..8).unwrap_or_default())
    }

    pub(crate) fn verifies(&self, digest: Digest, signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(&[SIGNATURE, &digest.0].concat(), signature).is_ok()
    }
}

impl std::fmt::Display for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl std::str::FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        from_hex(&text.trim().to_ascii_lowercase())
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or(Error::NotAKey("a public key is 64 hexadecimal digits"))
    }
}

/// A seal as it stands in `audit_seals` and in an export, but for its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_field_names, reason = "they are named as the columns are")]
pub(crate) struct Seal {
    pub(crate) seal_id: i64,
    /// Microseconds since 2000-01-01 UTC.
    pub(crate) sealed_at: i64,
    /// That of a [`Form`].
    pub(crate) format: i16,
    pub(crate) era: i32,
    pub(crate) cluster_id: i64,
    pub(crate) base_audit_id: i64,
    pub(crate) last_audit_id: i64,
    pub(crate) horizon: u64,
    pub(crate) next_transaction_id: u64,
    pub(crate) closing: bool,
    pub(crate) until_transaction_id: u64,
    pub(crate) until_audit_id: i64,
    pub(crate) records: i64,
    pub(crate) records_digest: Digest,
    pub(crate) previous_digest: Option<Digest>,
    pub(crate) digest: Digest,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_id: Option<String>,
    /// Hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) signature: Option<String>,
}

impl Seal {
    /// Over all that the seal says, and the digest before; not over its own digest, of course, nor the signature.
    pub(crate) fn computed_digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        hasher.update(SEAL);
        for number in [
            self.seal_id,
            self.sealed_at,
            i64::from(self.format),
            i64::from(self.era),
            self.cluster_id,
            self.base_audit_id,
            self.last_audit_id,
            self.horizon.cast_signed(),
            self.next_transaction_id.cast_signed(),
            i64::from(self.closing),
            self.until_transaction_id.cast_signed(),
            self.until_audit_id,
            self.records,
            i64::from(self.previous_digest.is_some()),
        ] {
            hasher.update(&number.to_be_bytes());
        }
        hasher.update(&self.records_digest.0);
        hasher.update(&self.previous_digest.map_or([0; 32], |digest| digest.0));
        hasher.finish()
    }

    fn complete(&mut self, key: Option<&SigningKey>) {
        self.digest = self.computed_digest();
        self.key_id = key.map(|key| key.public().key_id());
        self.signature = key.map(|key| to_hex(&key.sign(self.digest)));
    }

    /// The form of its records; `None` if it is of a later version than this.
    pub(crate) const fn form(&self) -> Option<Form> {
        Form::of(self.format)
    }

    pub(crate) const fn until(&self) -> Place {
        Place { transaction_id: self.until_transaction_id, audit_id: self.until_audit_id }
    }

    /// Where the seal after it begins, and in which era.
    pub(crate) fn next_place(&self) -> (i32, Place) {
        if self.ends_era() { (self.era.saturating_add(1), Place::START) } else { (self.era, self.until()) }
    }

    /// Whether nothing of its era is left.
    pub(crate) fn ends_era(&self) -> bool {
        self.closing && self.until() == Place::END
    }

    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { seal_id: self.seal_id, digest: self.digest }
    }

    /// Whether a record of that time may have been written before that seal: not more than `tolerance` after it.
    pub(crate) fn could_hold(&self, recorded_at: i64, tolerance: TimeDelta) -> bool {
        recorded_at <= self.sealed_at.saturating_add(tolerance.num_microseconds().unwrap_or(i64::MAX))
    }
}

/// Finds the form of record after record, in their order, by the seals that hold them.
pub(crate) struct Forms<'s>(&'s [Seal]);

impl<'s> Forms<'s> {
    /// Of seals that follow each other.
    pub(crate) const fn of(seals: &'s [Seal]) -> Self {
        Self(seals)
    }

    /// That of the record at a place, which is not before the last one asked for.
    pub(crate) fn at(&mut self, place: Place) -> Form {
        while let [first, rest @ ..] = self.0
            && !rest.is_empty()
            && place >= first.until()
        {
            self.0 = rest;
        }
        // A seal of another form does not fit, whatever its records are taken for.
        self.0.first().and_then(Seal::form).unwrap_or(Form::NEWEST)
    }
}

#[derive(Debug)]
struct SealRow {
    seal_id: i64,
    sealed_at: i64,
    format: i16,
    era: i32,
    cluster_id: i64,
    base_audit_id: i64,
    last_audit_id: i64,
    horizon: i64,
    next_transaction_id: i64,
    closing: bool,
    until_transaction_id: i64,
    until_audit_id: i64,
    records: i64,
    records_digest: Vec<u8>,
    previous_digest: Option<Vec<u8>>,
    digest: Vec<u8>,
    key_id: Option<String>,
    signature: Option<String>,
}

impl TryFrom<SealRow> for Seal {
    type Error = Error;

    fn try_from(row: SealRow) -> Result<Self, Error> {
        Ok(Self {
            seal_id: row.seal_id,
            sealed_at: row.sealed_at,
            format: row.format,
            era: row.era,
            cluster_id: row.cluster_id,
            base_audit_id: row.base_audit_id,
            last_audit_id: row.last_audit_id,
            horizon: row.horizon.cast_unsigned(),
            next_transaction_id: row.next_transaction_id.cast_unsigned(),
            closing: row.closing,
            until_transaction_id: row.until_transaction_id.cast_unsigned(),
            until_audit_id: row.until_audit_id,
            records: row.records,
            records_digest: Digest::from_slice(&row.records_digest)?,
            previous_digest: row.previous_digest.as_deref().map(Digest::from_slice).transpose()?,
            digest: Digest::from_slice(&row.digest)?,
            key_id: row.key_id,
            signature: row.signature,
        })
    }
}

/// The seals after that one, in order, at most `limit`.
pub(crate) async fn seals_after(
    executor: impl PgExecutor<'_>,
    seal_id: i64,
    limit: i64,
) -> Result<Vec<Seal>, Error> {
    let rows = sqlx::query_as!(
        SealRow,
        r#"
        select seal_id, (extract(epoch from sealed_at) * 1000000 - 946684800000000)::bigint as "sealed_at!", format, era,
               cluster_id, base_audit_id, last_audit_id, horizon::text::bigint as "horizon!",
               next_transaction_id::text::bigint as "next_transaction_id!", closing,
               until_transaction_id::text::bigint as "until_transaction_id!", until_audit_id, records, records_digest,
               previous_digest, digest, key_id, encode(signature, 'hex') as signature
        from authz.audit_seals
        where seal_id > $1
        order by seal_id
        limit $2
        "#,
        seal_id,
        limit,
    )
    .fetch_all(executor)
    .await?;
    rows.into_iter().map(Seal::try_from).collect()
}

/// The newest seal.
pub(crate) async fn last_seal(executor: impl PgExecutor<'_>) -> Result<Option<Seal>, Error> {
    let row = sqlx::query_as!(
        SealRow,
        r#"
        select seal_id, (extract(epoch from sealed_at) * 1000000 - 946684800000000)::bigint as "sealed_at!", format, era,
               cluster_id, base_audit_id, last_audit_id, horizon::text::bigint as "horizon!",
               next_transaction_id::text::bigint as "next_transaction_id!", closing,
               until_transaction_id::text::bigint as "until_transaction_id!", until_audit_id, records, records_digest,
               previous_digest, digest, key_id, encode(signature, 'hex') as signature
        from authz.audit_seals
        order by seal_id desc
        limit 1
        "#,
    )
    .fetch_optional(executor)
    .await?;
    row.map(Seal::try_from).transpose()
}
