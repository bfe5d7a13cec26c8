//! The trail as lines of JSON, to be kept and verified without the database.
//!
//! The first line says where the chain goes on from; then come the records of a seal, one a line, and the seal with its
//! entries; so on; the last line counts them. A column that is null is left out. Times are in UTC to the microsecond.
//! `by_database` is there, as null if need be, where the seal covers it, and nowhere else.

use std::borrow::Cow;
use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use sqlx::{PgConnection, PgPool};

use super::canonical::{COLUMNS, Digest, Encoder, Entry, Form, Sealable};
use super::reading::begin_reading;
use super::seal::{Checkpoint, Forms, Seal, copy_range, micros, moment};
use super::verify::walk::next_group;
use super::verify::{Chain, Finding, Mismatch, Problem, Pruned, Trust, entries_of, locate, pruned};
use crate::error::Error;
use crate::lent::Lent;
use crate::snapshot::copy::Field;

/// The form of an export. The first had no records with `by_database`.
pub(crate) const EXPORT: i16 = 2;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Exported {
    /// How many seals.
    pub seals: u64,
    /// How many records.
    pub records: u64,
    /// The first seal.
    pub first_seal: i64,
    /// The last one.
    pub checkpoint: Option<Checkpoint>,
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Head {
    pub(crate) export: HeadOf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HeadOf {
    pub(crate) format: i16,
    pub(crate) first_seal: i64,
    pub(crate) previous_digest: Option<Digest>,
    /// What retention had removed when this was written, so that it is not in it.
    pub(crate) pruned: Option<Pruned>,
}

/// A seal's line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SealLine<'a> {
    pub(crate) seal: Seal,
    /// Base64.
    #[serde(borrow)]
    pub(crate) entries: Cow<'a, str>,
}

/// The last line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct End {
    pub(crate) end: EndOf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EndOf {
    pub(crate) seals: u64,
    pub(crate) records: u64,
}

/// A text that needs no copy unless it was escaped.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Text<'_> {
    fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// A record's line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecordLine<'a> {
    audit_id: i64,
    #[serde(borrow)]
    recorded_at: Text<'a>,
    #[serde(borrow)]
    service: Text<'a>,
    #[serde(borrow)]
    actor: Text<'a>,
    #[serde(borrow)]
    action: Text<'a>,
    #[serde(borrow)]
    outcome: Text<'a>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    target: Option<Text<'a>>,
    #[serde(borrow)]
    detail: &'a RawValue,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    request_id: Option<Text<'a>>,
    // JSON has a null of its own, so the column's null is the missing field only.
    #[serde(borrow, default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    decision: Option<&'a RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revision: Option<i64>,
    #[serde(borrow)]
    database_user: Text<'a>,
    transaction_id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    operation_id: Option<i64>,
    /// Missing in a record of the first form.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[expect(clippy::option_option, reason = "the column may be null, and the field may be missing")]
    by_database: Option<Option<bool>>,
}

fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

impl<'a> RecordLine<'a> {
    fn from_row(row: &[Field<'a>; COLUMNS], form: Form) -> Result<Self, Error> {
        let [
            audit_id,
            recorded_at,
            service,
            actor,
            action,
            outcome,
            target,
            detail,
            request_id,
            decision,
            revision,
            database_user,
            transaction_id,
            operation_id,
            by_database,
        ] = *row;
        let text = |field: Field<'a>| field.text().map(|text| Text(Cow::Borrowed(text)));
        let maybe = |field: Field<'a>| -> Result<Option<Text<'a>>, Error> {
            Ok(field.text_or_null()?.map(|text| Text(Cow::Borrowed(text))))
        };
        let json =
            |text: &'a str| serde_json::from_str::<&RawValue>(text).map_err(|e| Error::Export(e.into()));
        let number = |field: Field<'a>| field.bytes().map(|_| field.int8()).transpose();
        Ok(Self {
            audit_id: audit_id.int8()?,
            recorded_at: Text(Cow::Owned(time_text(recorded_at.int8()?)?)),
            service: text(service)?,
            actor: text(actor)?,
            action: text(action)?,
            outcome: text(outcome)?,
            target: maybe(target)?,
            detail: json(detail.text()?)?,
            request_id: maybe(request_id)?,
            decision: decision.text_or_null()?.map(json).transpose()?,
            revision: number(revision)?,
            database_user: text(database_user)?,
            transaction_id: transaction_id.int8()?.cast_unsigned(),
            operation_id: number(operation_id)?,
            by_database: match form {
                Form::One => None,
                Form::Two => Some(by_database.bool_or_null()?),
            },
        })
    }

    /// The record as a verifier needs it; `None` if its time is none.
    pub(crate) fn sealable(&self, encoder: &mut Encoder) -> Option<Sealable> {
        let recorded_at = time(&self.recorded_at.0)?;
        let form = if self.by_database.is_some() { Form::Two } else { Form::One };
        encoder.begin(form);
        encoder.number(self.audit_id);
        encoder.number(recorded_at);
        for text in [&self.service, &self.actor, &self.action, &self.outcome] {
            encoder.value(Some(text.bytes()));
        }
        encoder.value(self.target.as_ref().map(Text::bytes));
        encoder.value(Some(self.detail.get().as_bytes()));
        encoder.value(self.request_id.as_ref().map(Text::bytes));
        encoder.value(self.decision.map(|json| json.get().as_bytes()));
        encoder.value(self.revision.map(i64::to_be_bytes).as_ref().map(<[u8; 8]>::as_slice));
        encoder.value(Some(self.database_user.bytes()));
        encoder.number(self.transaction_id.cast_signed());
        encoder.value(self.operation_id.map(i64::to_be_bytes).as_ref().map(<[u8; 8]>::as_slice));
        if let Some(by_database) = self.by_database {
            encoder.value(by_database.map(|yes| [u8::from(yes)]).as_ref().map(<[u8; 1]>::as_slice));
        }
        Some(Sealable {
            entry: Entry { audit_id: self.audit_id, recorded_at, digest: encoder.digest() },
            transaction_id: self.transaction_id,
            form,
        })
    }
}

/// `2026-11-21T16:15:46.363870Z`.
fn time_text(micros: i64) -> Result<String, Error> {
    let moment =
        moment(micros).ok_or_else(|| Error::Unreadable { what: "a time beyond all dates".to_owned() })?;
    Ok(moment.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string())
}

/// The reverse; fast for the form that it writes, and for nothing else.
fn time(text: &str) -> Option<i64> {
    fn number(digits: &[u8]) -> Option<u32> {
        digits.iter().try_fold(0_u32, |sum, digit| {
            digit.is_ascii_digit().then(|| sum.wrapping_mul(10).wrapping_add(u32::from(digit - b'0')))
        })
    }
    if let [
        y @ ..,
        b'-',
        m1,
        m2,
        b'-',
        d1,
        d2,
        b'T',
        h1,
        h2,
        b':',
        i1,
        i2,
        b':',
        s1,
        s2,
        b'.',
        f1,
        f2,
        f3,
        f4,
        f5,
        f6,
        b'Z',
    ] = text.as_bytes()
        && y.len() == 4
    {
        let day = NaiveDate::from_ymd_opt(
            i32::try_from(number(y)?).ok()?,
            number(&[*m1, *m2])?,
            number(&[*d1, *d2])?,
        )?;
        let micro = number(&[*f1, *f2, *f3, *f4, *f5, *f6])?;
        let moment =
            day.and_hms_micro_opt(number(&[*h1, *h2])?, number(&[*i1, *i2])?, number(&[*s1, *s2])?, micro)?;
        return Some(micros(moment.and_utc()));
    }
    // A year before 0 or after 9999.
    let moment = DateTime::parse_from_rfc3339(text).ok()?.with_timezone(&Utc);
    (time_text(micros(moment)).ok()? == text).then(|| micros(moment))
}

/// Writes the seals from `first_seal` to `last_seal` (to the newest if `None`) with their records, and verifies them
/// on the way. Works in one snapshot of the database; records that are not sealed are not part of it. Writes while it
/// reads, so give it a file or memory, not something that may block for long.
///
/// # Errors
/// [`Error::TrailAltered`] if something does not fit, [`Error::Export`] if `out` fails, [`Error::Database`].
pub async fn export(
    pool: &PgPool,
    first_seal: i64,
    last_seal: Option<i64>,
    out: &mut (impl Write + Send),
) -> Result<Exported, Error> {
    let mut connection = Lent::from(pool).await?;
    let mut tx = begin_reading(&mut connection).await?;
    let exported = export_in(&mut tx, first_seal, last_seal, out).await?;
    tx.rollback().await?;
    connection.give_back();
    Ok(exported)
}

/// The same within a transaction that sees one snapshot.
pub(crate) async fn export_in(
    connection: &mut PgConnection,
    first_seal: i64,
    last_seal: Option<i64>,
    out: &mut (impl Write + Send),
) -> Result<Exported, Error> {
    let pruned = pruned(connection).await?;
    let mut previous = super::seal::seals_after(&mut *connection, first_seal.saturating_sub(2), 1)
        .await?
        .pop()
        .filter(|seal| seal.seal_id == first_seal.saturating_sub(1));
    let head = HeadOf {
        format: EXPORT,
        first_seal,
        previous_digest: previous.as_ref().map(|seal| seal.digest),
        pruned,
    };
    write_line(out, &Head { export: head })?;
    let mut trust = Trust::new();
    if let Some(previous) = &previous {
        trust = trust.checkpoint(previous.checkpoint());
    }
    let mut chain = Chain::new(trust);
    chain.begins_at(first_seal);
    let mut encoder = Encoder::new();
    'groups: while let Some((seals, range)) = next_group(connection, previous.as_ref()).await? {
        let ids = seals.first().map_or(0, |seal| seal.seal_id)..=seals.last().map_or(0, |seal| seal.seal_id);
        let entries = entries_of(connection, ids).await?;
        let mut rows: Vec<(Sealable, Vec<u8>)> = Vec::new();
        let mut forms = Forms::of(&seals);
        copy_range(connection, &range, |row| {
            let record = encoder.row(row, |place| forms.at(place))?;
            let line = RecordLine::from_row(row, record.form)?;
            let mut line = serde_json::to_vec(&line).map_err(|e| Error::Export(e.into()))?;
            line.push(b'\n');
            rows.push((record, line));
            Ok(())
        })
        .await?;
        let mut rest = rows.as_slice();
        for (seal, entries) in seals.iter().zip(&entries) {
            if last_seal.is_some_and(|last| seal.seal_id > last) {
                break 'groups;
            }
            let (mine, left) =
                rest.split_at(rest.partition_point(|(record, _)| record.place() < seal.until()));
            rest = left;
            let records: Vec<Sealable> = mine.iter().map(|(record, _)| *record).collect();
            fits(&mut chain, seal, &records, entries, pruned).map_err(Error::TrailAltered)?;
            for (_, line) in mine {
                out.write_all(line).map_err(Error::Export)?;
            }
            write_line(out, &SealLine { seal: seal.clone(), entries: Cow::Owned(STANDARD.encode(entries)) })?;
        }
        previous = seals.last().cloned();
    }
    let report = chain.report;
    write_line(out, &End { end: EndOf { seals: report.seals, records: report.records } })?;
    out.flush().map_err(Error::Export)?;
    Ok(Exported { seals: report.seals, records: report.records, first_seal, checkpoint: report.checkpoint })
}

/// Whether a seal is the next of the chain and has these records, but for those that retention removed.
pub(crate) fn fits(
    chain: &mut Chain,
    seal: &Seal,
    records: &[Sealable],
    entries: &[u8],
    pruned: Option<Pruned>,
) -> Result<(), Finding> {
    chain.link(seal)?;
    match Chain::records(seal, records) {
        Ok(found) if found == entries => {}
        Ok(_) => return Err(Finding::seal(Problem::RecordsAltered, seal.seal_id)),
        Err(Mismatch) => locate(seal, records, entries, pruned)?,
    }
    chain.removed.see(seal, records, entries, pruned)?;
    chain.times(seal, records)?;
    chain.done(seal, records.len());
    Ok(())
}

fn write_line(out: &mut impl Write, line: &impl Serialize) -> Result<(), Error> {
    serde_json::to_writer(&mut *out, line).map_err(|e| Error::Export(e.into()))?;
    out.write_all(b"\n").map_err(Error::Export)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_as_it_was_written_and_in_no_other_form() {
        for micros in [
            0,
            -1,
            1,
            848_592_946_363_870,
            252_455_615_999_999_999,
            -63_113_904_000_000_000,
            -946_684_800_000_000,
        ] {
            let text = time_text(micros).unwrap();
            assert_eq!(time(&text), Some(micros), "{text}");
        }
        for bad in [
            "2026-11-21T16:15:46.36387Z",
            "2026-11-21T16:15:46.363870+00:00",
            "2026-11-21 16:15:46.363870Z",
            "",
            "x",
        ] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    #[test]
    fn nulls_of_json_and_of_the_column_stay_apart() {
        let line = |decision: &str| {
            format!(
                r#"{{"audit_id":1,"recorded_at":"2026-11-21T16:15:46.363870Z","service":"s","actor":"a","action":"x","outcome":"denied","detail":{{}}{decision},"database_user":"u","transaction_id":3}}"#
            )
        };
        let digest = |decision: &str| {
            let line = line(decision);
            let read: RecordLine<'_> = serde_json::from_str(&line).unwrap();
            read.sealable(&mut Encoder::new()).unwrap().entry.digest
        };
        assert_ne!(digest(""), digest(r#","decision":null"#));
        assert_ne!(digest(r#","decision":{"a": 1}"#), digest(r#","decision":{"a":1}"#));
    }
}
