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
    let text = json_text(value)?;
    bounded("detail", text.len(), DETAIL_LIMIT)?;
    if !text.contains("\\u0000") {
        return Ok(text);
    }
    let mut value = value.clone();
    remove_nul(&mut value);
    json_text(&value)
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
    fn error_text_is_shortened_between_characters() {
        assert_eq!(shorten("äöü", 6), "äöü");
        assert_eq!(shorten("äöü", 5), "äö … (shortened, 6 bytes in all)");
    }
}
