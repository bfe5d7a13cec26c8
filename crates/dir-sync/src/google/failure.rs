//! What a failed API call means: try again, sign in again, start the listing again, or stop.

use std::time::Duration;

use chrono::DateTime;
use hyper::StatusCode;
use hyper::header::{DATE, HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use crate::source::Cause;

/// What was asked for; decides what an error about it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    /// The request was about one group rather than the whole directory.
    pub(super) one_group: bool,
    /// The request was about one member of that group.
    pub(super) one_member: bool,
    /// The request carried a page token.
    pub(super) page_token: bool,
}

/// A failed call by what is to be done about it.
#[derive(Debug)]
pub(super) enum Failure {
    /// The quota is used up: wait, all calls together.
    RateLimited { retry_after: Option<Duration>, cause: Cause },
    /// It may well work next time.
    Transient { retry_after: Option<Duration>, cause: Cause },
    /// The token is not accepted.
    Unauthorised { answer: String },
    /// The listing restarts from its first page.
    StalePageToken,
    /// The one group is gone.
    GroupVanished,
    /// The group has no such member.
    NoSuchMember,
    /// This request is wrong; others may be fine.
    Rejected { answer: String },
    /// Someone has to change a setting first.
    Refused { message: String },
    /// The one group may not be read; if none may be, `message` says what to change.
    GroupForbidden { answer: String, message: String },
    /// An answer of another shape.
    Malformed { problem: String },
}

impl Failure {
    /// A failure that is worth another try, without advice when.
    pub(super) fn transient(cause: impl Into<Cause>) -> Self {
        Self::Transient { retry_after: None, cause: cause.into() }
    }
}

#[derive(Debug, Default, Deserialize)]
struct Envelope {
    #[serde(default)]
    error: ApiError,
}

#[derive(Debug, Default, Deserialize)]
struct ApiError {
    #[serde(default)]
    message: String,
    #[serde(default)]
    errors: Vec<Detail>,
    #[serde(default)]
    status: String,
}

#[derive(Debug, Default, Deserialize)]
struct Detail {
    #[serde(default)]
    domain: String,
    #[serde(default)]
    reason: String,
}

impl ApiError {
    fn has_reason(&self, reasons: &[&str]) -> bool {
        self.errors.iter().any(|detail| reasons.contains(&detail.reason.as_str()))
    }

    // The answer in one line: `403 forbidden: Not Authorized to access this resource/api`.
    fn line(&self, status: StatusCode) -> String {
        let reason = self.errors.first().map_or("", |detail| detail.reason.as_str());
        match (reason, self.message.as_str()) {
            ("", "") => format!("status {status}"),
            ("", message) => format!("status {}: {message}", status.as_u16()),
            (reason, "") => format!("status {} {reason}", status.as_u16()),
            (reason, message) => format!("status {} {reason}: {message}", status.as_u16()),
        }
    }
}

const RATE_REASONS: &[&str] = &["userRateLimitExceeded", "rateLimitExceeded", "quotaExceeded"];
const DISABLED_REASONS: &[&str] = &["accessNotConfigured", "SERVICE_DISABLED"];

/// Says what an answer other than 200 means.
pub(super) fn classify(status: StatusCode, headers: &HeaderMap, body: &[u8], asked: Asked) -> Failure {
    let error = serde_json::from_slice::<Envelope>(body).unwrap_or_default().error;
    let answer = error.line(status);
    let retry_after = retry_after(headers);
    match status.as_u16() {
        429 => Failure::RateLimited { retry_after, cause: answer.into() },
        403 if error.has_reason(DISABLED_REASONS) => Failure::Refused { message: api_disabled(&answer) },
        403 if error.has_reason(RATE_REASONS)
            || error.status == "RESOURCE_EXHAUSTED"
            || error.errors.iter().any(|detail| detail.domain == "usageLimits") =>
        {
            Failure::RateLimited { retry_after, cause: answer.into() }
        }
        403 => forbidden(&error, &answer, asked),
        401 => Failure::Unauthorised { answer },
        408 | 500..=599 => Failure::Transient { retry_after, cause: answer.into() },
        400 if asked.page_token && error.has_reason(&["invalid", "badRequest"]) => Failure::StalePageToken,
        // Any other 404, of the group or of something in between, is no answer about the member.
        404 if asked.one_member && error.message.contains("memberKey") => Failure::NoSuchMember,
        404 | 412 if asked.one_group => Failure::GroupVanished,
        404 => Failure::Refused {
            message: format!(
                "the directory was not found ({answer}); check the customer id (`--google-customer`) and the address \
                 of the API (`--google-url`)"
            ),
        },
        300..=399 => Failure::Refused {
            message: format!("the API redirects elsewhere ({answer}); check its address (`--google-url`)"),
        },
        400 if !asked.one_group && !asked.page_token => {
            Failure::Rejected { answer: format!("{answer}; check the customer id (`--google-customer`)") }
        }
        _ => Failure::Rejected { answer },
    }
}

fn api_disabled(answer: &str) -> String {
    format!(
        "the Admin SDK API is not enabled in the project of the service account; enable it in the Google Cloud console \
         under APIs & Services > Library > Admin SDK API ({answer})"
    )
}

fn forbidden(error: &ApiError, answer: &str, asked: Asked) -> Failure {
    let scope_missing = error.has_reason(&["insufficientPermissions", "ACCESS_TOKEN_SCOPE_INSUFFICIENT"])
        || error.message.contains("scope");
    if scope_missing {
        let message = format!(
            "the sign-in lacks a scope ({answer}); authorise the service account's client id for `{}` and `{}` in the \
             Admin console under {}",
            super::USER_SCOPE,
            super::GROUP_SCOPE,
            super::DELEGATION_PAGE
        );
        return Failure::Refused { message };
    }
    if error.has_reason(&["domainCannotUseApis"]) {
        let message = format!(
            "the domain does not allow the API ({answer}); turn on API access in the Admin console under Security > \
             Access and data control > API controls"
        );
        return Failure::Refused { message };
    }
    let message = format!(
        "the directory may not be read ({answer}); give the subject (`--google-subject`), or the service account if there \
         is none, an admin role with the rights Users > Read and Groups > Read in the Admin console under Account > Admin \
         roles"
    );
    if !asked.one_group {
        return Failure::Refused { message };
    }
    Failure::GroupForbidden { answer: format!("{answer}; the admin role may not read this group"), message }
}

/// The pause an answer asks for: seconds, or a date that is read against the answer's own `Date`.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok();
    let wanted = text(RETRY_AFTER)?.trim();
    if let Ok(seconds) = wanted.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = DateTime::parse_from_rfc2822(wanted).ok()?;
    let sent = DateTime::parse_from_rfc2822(text(DATE)?).ok()?;
    (until - sent).to_std().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LISTING: Asked = Asked { one_group: false, one_member: false, page_token: false };

    fn refusal(status: u16, reason: &str, asked: Asked) -> Failure {
        let body = json!({"error": {"code": status, "message": "said", "errors": [{"reason": reason, "domain": "global"}]}});
        classify(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body.to_string().as_bytes(), asked)
    }

    #[test]
    fn forbidden_with_a_rate_reason_is_a_rate_limit() {
        for reason in ["userRateLimitExceeded", "rateLimitExceeded", "quotaExceeded"] {
            assert!(matches!(refusal(403, reason, LISTING), Failure::RateLimited { .. }), "{reason}");
        }
    }

    #[test]
    fn forbidden_without_a_rate_reason_says_what_to_change() {
        for (reason, hint) in [
            ("forbidden", "admin role"),
            ("insufficientPermissions", "admin.directory.group.readonly"),
            ("domainCannotUseApis", "API access"),
            ("accessNotConfigured", "Admin SDK API"),
        ] {
            let Failure::Refused { message } = refusal(403, reason, LISTING) else { panic!("{reason}") };
            assert!(message.contains(hint), "{message}");
        }
    }

    #[test]
    fn forbidden_is_about_the_group_unless_it_is_about_the_sign_in() {
        let group = Asked { one_group: true, ..LISTING };
        let Failure::GroupForbidden { answer, message } = refusal(403, "forbidden", group) else { panic!() };
        assert!(answer.contains("403") && message.contains("admin role"), "{answer} {message}");
        for reason in ["insufficientPermissions", "domainCannotUseApis", "accessNotConfigured"] {
            assert!(matches!(refusal(403, reason, group), Failure::Refused { .. }), "{reason}");
        }
    }

    #[test]
    fn not_found_is_a_vanished_group_only_for_a_group() {
        assert!(matches!(
            refusal(404, "notFound", Asked { one_group: true, ..LISTING }),
            Failure::GroupVanished
        ));
        assert!(matches!(refusal(404, "notFound", LISTING), Failure::Refused { .. }));
    }

    #[test]
    fn only_what_names_the_member_says_that_there_is_none() {
        let asked = Asked { one_group: true, one_member: true, ..LISTING };
        let of = |body: &str| classify(StatusCode::NOT_FOUND, &HeaderMap::new(), body.as_bytes(), asked);
        let not_found = |key: &str| {
            let message = format!("Resource Not Found: {key}");
            of(&json!({"error": {"code": 404, "message": message, "errors": [{"reason": "notFound"}]}})
                .to_string())
        };
        assert!(matches!(not_found("memberKey"), Failure::NoSuchMember));
        assert!(matches!(not_found("groupKey"), Failure::GroupVanished));
        assert!(matches!(of("<html>no such page</html>"), Failure::GroupVanished));
    }

    #[test]
    fn invalid_is_a_stale_token_only_where_a_token_was_sent() {
        assert!(matches!(
            refusal(400, "invalid", Asked { page_token: true, ..LISTING }),
            Failure::StalePageToken
        ));
        assert!(matches!(refusal(400, "invalid", LISTING), Failure::Rejected { .. }));
    }

    #[test]
    fn server_error_without_a_body_is_transient() {
        let failure = classify(StatusCode::BAD_GATEWAY, &HeaderMap::new(), b"<html>", LISTING);
        assert!(matches!(failure, Failure::Transient { .. }));
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, "7".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(7)));
        headers.insert(RETRY_AFTER, "Wed, 21 Oct 2026 07:28:30 GMT".parse().unwrap());
        assert_eq!(retry_after(&headers), None);
        headers.insert(DATE, "Wed, 21 Oct 2026 07:28:00 GMT".parse().unwrap());
        assert_eq!(retry_after(&headers), Some(Duration::from_secs(30)));
    }
}
