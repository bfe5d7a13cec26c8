//! A record as it will be written: bounded, without what Postgres cannot hold, and redacted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Actor, Outcome, Record};
use crate::error::Error;

/// A record's detail has at most so many bytes as JSON.
pub const DETAIL_LIMIT: usize = 16 * 1024;
/// Each of a record's texts (actor, service, action, target, request id) has at most so many bytes.
pub const TEXT_LIMIT: usize = 1024;
/// A detail has at most so many arrays and objects within each other; what is deeper becomes a text. Readers of JSON take 127.
const DEPTH_LIMIT: usize = 64;
/// A number of this size or more, or that near to zero, becomes a text: the database writes all of its digits.
const LONG_NUMBERS: f64 = 1e33;
/// Of an error's text so many bytes are recorded.
pub(crate) const ERROR_LIMIT: usize = 4 * 1024;

/// What takes secrets out of a detail: the action's name, and the detail to change.
pub(crate) type Redact = Arc<dyn Fn(&str, &mut Value) + Send + Sync>;

/// A hook for [`Authz::redact`](crate::Authz::redact): replaces the values of these keys, at any depth and in any case,
/// by `"[redacted]"`.
pub fn redact_keys(keys: &'static [&'static str]) -> impl Fn(&str, &mut Value) + Send + Sync + 'static {
    fn walk(keys: &[&str], value: &mut Value) {
        match value {
            Value::Object(object) => {
                for (key, value) in object.iter_mut() {
                    if keys.iter().any(|secret| secret.eq_ignore_ascii_case(key)) {
                        *value = json!("[redacted]");
                    } else {
                        walk(keys, value);
                    }
                }
            }
            Value::Array(array) => array.iter_mut().for_each(|value| walk(keys, value)),
            _ => {}
        }
    }
    move |_, detail| walk(keys, detail)
}

/// A record, ready to be written.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// `None` for the connection's application name.
    pub(crate) service: Option<String>,
    pub(crate) actor: String,
    pub(crate) action: String,
    pub(crate) outcome: Outcome,
    pub(crate) target: Option<String>,
    pub(crate) detail: String,
    pub(crate) request_id: Option<String>,
    pub(crate) decision: Option<String>,
    pub(crate) revision: Option<i64>,
    pub(crate) operation_id: Option<i64>,
}

impl Line {
    /// A record of the caller's, checked.
    pub(crate) fn of(actor: &Actor, record: &Record<'_>) -> Result<Self, Error> {
        Ok(Self {
            service: Some(text("service", &actor.service)?),
            actor: text("actor", &actor.name)?,
            action: text("action", record.action)?,
            outcome: record.outcome,
            target: record.target.map(|target| text("target", target)).transpose()?,
            detail: detail(&record.detail)?,
            request_id: actor.request_id.as_deref().map(|id| text("request id", id)).transpose()?,
            decision: record.decision.map(json_text).transpose()?,
            revision: record.decision.map(|decision| decision.revision().0),
            operation_id: None,
        })
    }
}

/// A text that Postgres can hold, if it is short enough.
pub(super) fn text(what: &'static str, text: &str) -> Result<String, Error> {
    bounded(what, text.len(), TEXT_LIMIT)?;
    Ok(without_nul(text))
}

/// A detail as JSON, if it is short enough.
pub(super) fn detail(value: &Value) -> Result<String, Error> {
    let text = if is_plain(value, DEPTH_LIMIT) {
        json_text(value)?
    } else {
        json_text(&plain(value, DEPTH_LIMIT)?)?
    };
    bounded("detail", text.len(), DETAIL_LIMIT)?;
    if !text.contains("\\u0000") {
        return Ok(text);
    }
    let mut value = plain(value, DEPTH_LIMIT)?;
    remove_nul(&mut value);
    json_text(&value)
}

/// The same for what must be recorded whatever it is: what is too long is left out, with its size.
pub(super) fn detail_in_any_case(value: &Value) -> Result<String, Error> {
    match detail(value) {
        Err(Error::RecordTooLarge { bytes, .. }) => {
            json_text(&json!({ "left_out": format!("{bytes} bytes") }))
        }
        done => done,
    }
}

/// And for a text: what is too long is shortened.
pub(super) fn text_in_any_case(text: &str) -> String {
    if text.len() <= TEXT_LIMIT { without_nul(text) } else { without_nul(&shorten(text, TEXT_LIMIT - 64)) }
}

/// Whether every reader takes it, and the database makes it little longer.
fn is_plain(value: &Value, depth: usize) -> bool {
    match value {
        Value::Array(array) => depth > 0 && array.iter().all(|value| is_plain(value, depth - 1)),
        Value::Object(object) => depth > 0 && object.values().all(|value| is_plain(value, depth - 1)),
        Value::Number(number) => !is_long(number),
        _ => true,
    }
}

fn is_long(number: &serde_json::Number) -> bool {
    number.is_f64()
        && number.as_f64().is_some_and(|number| {
            number != 0.0 && !(LONG_NUMBERS.recip()..LONG_NUMBERS).contains(&number.abs())
        })
}

/// With what is not plain as texts.
fn plain(value: &Value, depth: usize) -> Result<Value, Error> {
    Ok(match value {
        Value::Array(_) | Value::Object(_) if depth == 0 => Value::String(json_text(value)?),
        Value::Array(array) => array.iter().map(|value| plain(value, depth - 1)).collect::<Result<_, _>>()?,
        Value::Object(object) => object
            .iter()
            .map(|(key, value)| Ok((key.clone(), plain(value, depth - 1)?)))
            .collect::<Result<_, Error>>()?,
        Value::Number(number) if is_long(number) => Value::String(number.to_string()),
        _ => value.clone(),
    })
}

/// The detail of a failure. It is shortened rather than refused, since what it tells of has happened.
pub(super) fn failure(key: &'static str, message: &str) -> Value {
    json!({ key: shorten(message, ERROR_LIMIT) })
}

/// The detail after the host's hook. A hook that panics has redacted nothing for certain, so all of it goes.
pub(super) fn redacted(redact: Option<&Redact>, action: &str, mut value: Value) -> Value {
    let Some(redact) = redact else { return value };
    if catch_unwind(AssertUnwindSafe(|| redact(action, &mut value))).is_ok() {
        return value;
    }
    tracing::error!(action, "the hook that redacts audit records panicked; the detail is left out");
    json!({ "redaction": "failed, so the detail is left out" })
}

pub(super) fn json_text(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Database(sqlx::Error::Encode(Box::new(error))))
}

/// At most `limit` bytes of the text, and how many there were.
pub(crate) fn shorten(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let end = (0..=limit).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    let beginning = text.get(..end).unwrap_or_default();
    format!("{beginning} … (shortened, {} bytes in all)", text.len())
}

const fn bounded(what: &'static str, bytes: usize, limit: usize) -> Result<(), Error> {
    if bytes > limit { Err(Error::RecordTooLarge { what, bytes, limit }) } else { Ok(()) }
}

/// Postgres holds every character but this one.
fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

fn remove_nul(value: &mut Value) {
    match value {
        Value::String(text) => *text = without_nul(text),
        Value::Array(array) => array.iter_mut().for_each(remove_nul),
        Value::Object(object) => {
            *object = std::mem::take(object)
                .into_iter()
                .map(|(key, mut value)| {
                    remove_nul(&mut value);
                    (without_nul(&key), value)
                })
                .collect();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_redacted_at_any_depth() {
        let mut detail = json!({ "a": [{ "Token": "x", "b": { "password": [1, 2] } }], "token2": "kept" });
        redact_keys(&["token", "password"])("workers.scale", &mut detail);
        let expected =
            json!({ "a": [{ "Token": "[redacted]", "b": { "password": "[redacted]" } }], "token2": "kept" });
        assert_eq!(detail, expected);
    }

    #[test]
    fn hook_that_panics_lets_nothing_through() {
        let hook: Redact = Arc::new(|_, _| panic!("a bug in the hook"));
        let detail = redacted(Some(&hook), "workers.scale", json!({ "token": "secret" }));
        assert!(!detail.to_string().contains("secret"), "{detail}");
    }

    #[test]
    fn zero_characters_are_replaced_and_their_escapes_kept() {
        let text = detail(&json!({ "a\0": ["\0", "\\u0000"] })).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            json!({ "a\u{fffd}": ["\u{fffd}", "\\u0000"] })
        );
    }

    #[test]
    fn what_is_deep_or_has_many_digits_becomes_a_text() {
        let nested = |levels: usize| (0..levels).fold(json!("x"), |value, _| json!([value]));
        assert_eq!(detail(&nested(64)).unwrap(), nested(64).to_string());
        let read: Value = serde_json::from_str(&detail(&nested(500)).unwrap()).unwrap();
        let innermost = (0..64).fold(&read, |value, _| &value[0]);
        assert_eq!(innermost.as_str().unwrap(), nested(500 - 64).to_string());
        let numbers = json!([1e30, 1e308, -1e300, 1e-300, 0.0, -0.5, u64::MAX, i64::MIN, "\0"]);
        let expected =
            json!([1e30, "1e+308", "-1e+300", "1e-300", 0.0, -0.5, u64::MAX, i64::MIN, "\u{fffd}"]);
        assert_eq!(serde_json::from_str::<Value>(&detail(&numbers).unwrap()).unwrap(), expected);
    }

    #[test]
    fn what_must_be_recorded_is_shortened() {
        assert_eq!(text_in_any_case(&"x".repeat(TEXT_LIMIT)).len(), TEXT_LIMIT);
        assert!(text_in_any_case(&"x".repeat(5_000)).ends_with("x … (shortened, 5000 bytes in all)"));
        let long = json!({ "a": "x".repeat(20_000) });
        assert!(detail(&long).is_err());
        assert_eq!(detail_in_any_case(&long).unwrap(), r#"{"left_out":"20008 bytes"}"#);
    }

    #[test]
    fn error_text_is_shortened_between_characters() {
        assert_eq!(shorten("äöü", 6), "äöü");
        assert_eq!(shorten("äöü", 5), "äö … (shortened, 6 bytes in all)");
    }
}
