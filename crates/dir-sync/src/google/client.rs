//! One API call: signed in, held to the quota, bounded in time, tried again where that helps.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use flate2::read::MultiGzDecoder;
use google_apis_common::url::Params;
use google_apis_common::{Body, Client};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, USER_AGENT};
use hyper::{Request, StatusCode, Uri};
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};
use url::Url;

use super::HttpsConnector;
use super::auth::SignIn;
use super::breaker::{Admitted, Breaker};
use super::failure::{Asked, Failure, classify};
use super::limiter::Limiter;
use super::retry::{Attempts, RetryPolicy};
use super::throttle::Throttle;
use crate::source::SourceError;

// Google compresses only for clients that have the word in both places.
const AGENT: &str = concat!("dir-sync/", env!("CARGO_PKG_VERSION"), " (gzip)");
// A page of 500 users is a fraction of this; it bounds what a wrong server can make us hold.
const MAX_BODY: usize = 64 * 1024 * 1024;
const STOPPED_ANSWERING: &str = "the directory has stopped answering, so it was not asked again";
const OUT_OF_QUOTA: &str = "the quota has been used up for as long as a call may wait, for several in a row, so it was not asked again";
const LEFT_ALONE: &str =
    "the directory wants to be left alone for longer than a call may wait, so it was not asked again";

/// Groups that may not be read, before one was, after which it is taken for granted that none may be.
const FORBIDDEN_GROUPS: u32 = 16;

/// What one call is for.
pub(super) struct Call<'a> {
    /// The path below the base address, keys already percent-encoded.
    pub(super) path: String,
    /// The query.
    pub(super) params: Params<'a>,
    /// The listing in words: ``members of group `ops@example.com` ``.
    pub(super) what: String,
    /// The group the call is about, if it is about one.
    pub(super) group: Option<&'a str>,
    /// Whether it is about one member of that group.
    pub(super) one_member: bool,
}

/// Sends calls.
pub(super) struct ApiClient {
    http: Client<HttpsConnector>,
    sign_in: SignIn,
    base: Url,
    limiter: Limiter,
    throttle: Throttle,
    breaker: Breaker,
    read_a_group: AtomicBool,
    forbidden_groups: AtomicU32,
    retry: RetryPolicy,
    request_timeout: Duration,
    calls: AtomicU64,
}

impl ApiClient {
    pub(super) fn new(
        http: Client<HttpsConnector>,
        sign_in: SignIn,
        base: Url,
        limiter: Limiter,
        throttle: Throttle,
        retry: RetryPolicy,
        request_timeout: Duration,
    ) -> Self {
        Self {
            http,
            sign_in,
            base,
            limiter,
            throttle,
            breaker: Breaker::default(),
            read_a_group: AtomicBool::new(false),
            forbidden_groups: AtomicU32::new(0),
            retry,
            request_timeout,
            calls: AtomicU64::new(0),
        }
    }

    /// Calls sent so far.
    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Gets an answer.
    pub(super) async fn get<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, SourceError> {
        let uri = self.uri(call)?;
        let asked = Asked {
            one_group: call.group.is_some(),
            one_member: call.one_member,
            page_token: call.params.get("pageToken").is_some(),
        };
        let mut attempts = Attempts::new(&self.retry);
        let mut token = self.sign_in.token().await?;
        let mut refreshed = false;
        let mut probing = false;
        let mut _probe = None;
        loop {
            if !probing {
                match self.breaker.admit().await {
                    Admitted::Sound => {}
                    Admitted::Probing(probe) => (probing, _probe) = (true, Some(probe)),
                    Admitted::Dead => return Err(not_asked(call, attempts.made(), STOPPED_ANSWERING)),
                    Admitted::OutOfQuota => return Err(not_asked(call, attempts.made(), OUT_OF_QUOTA)),
                    Admitted::Resting => return Err(not_asked(call, attempts.made(), LEFT_ALONE)),
                }
            }
            let answered = {
                let _place = self.throttle.enter().await;
                self.limiter.start().await;
                self.calls.fetch_add(1, Ordering::Relaxed);
                timeout(self.request_timeout, self.send(&uri, &token, asked)).await
            };
            let failure = match answered {
                Ok(Ok(answer)) => {
                    self.breaker.answered();
                    self.throttle.answered();
                    if asked.one_group {
                        self.read_a_group.store(true, Ordering::Relaxed);
                    }
                    return Ok(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::transient(format!("no complete answer within {:?}", self.request_timeout)),
            };
            let (rate_limited, retry_after, cause) = match failure {
                Failure::RateLimited { retry_after, cause } => (true, retry_after, cause),
                Failure::Transient { retry_after, cause } => (false, retry_after, cause),
                Failure::Unauthorised { .. } if !refreshed => {
                    refreshed = true;
                    token = self.sign_in.token_after(&token).await?;
                    continue;
                }
                Failure::GroupForbidden { answer, message } => {
                    self.breaker.answered();
                    let before = self.forbidden_groups.fetch_add(1, Ordering::Relaxed);
                    let some = self.read_a_group.load(Ordering::Relaxed);
                    return Err(if some || before + 1 < FORBIDDEN_GROUPS {
                        SourceError::Rejected { what: call.what.clone(), answer }
                    } else {
                        SourceError::Refused { message }
                    });
                }
                other => {
                    self.breaker.answered();
                    return Err(final_error(other, call));
                }
            };
            if rate_limited {
                self.throttle.rate_limited();
            } else {
                self.breaker.failed();
            }
            let Some(pause) = attempts.failed(rate_limited, retry_after) else {
                if rate_limited {
                    self.breaker.out_of_quota();
                } else {
                    self.breaker.used_up();
                }
                match retry_after {
                    Some(advice) if advice > self.retry.total => self.breaker.rest(advice),
                    // The others can wait for so long, though this call cannot.
                    Some(advice) if rate_limited => self.limiter.hold_for(advice),
                    _ => {}
                }
                return Err(SourceError::Unavailable {
                    what: call.what.clone(),
                    attempts: attempts.made(),
                    cause,
                });
            };
            tracing::info!(
                listing = call.what, attempt = attempts.made(), pause_ms = pause.as_millis(), reason = %cause,
                "call failed, trying again"
            );
            if rate_limited {
                self.limiter.hold_for(pause);
            }
            sleep(pause).await;
            // A long pause may have outlived the token.
            token = self.sign_in.token().await?;
        }
    }

    fn uri(&self, call: &Call<'_>) -> Result<Uri, SourceError> {
        let wrong = |problem: String| SourceError::Setting {
            message: format!("`{}` is no usable address of the API: {problem}", self.base),
        };
        let url = self.base.join(&call.path).map_err(|error| wrong(error.to_string()))?;
        call.params
            .parse_with_url(url.as_str())
            .as_str()
            .parse()
            .map_err(|error: hyper::http::uri::InvalidUri| wrong(error.to_string()))
    }

    async fn send<T: DeserializeOwned>(&self, uri: &Uri, token: &str, asked: Asked) -> Result<T, Failure> {
        let request = Request::get(uri)
            .header(AUTHORIZATION, format!("Bearer {token}"))
            .header(ACCEPT, "application/json")
            .header(ACCEPT_ENCODING, "gzip")
            .header(USER_AGENT, AGENT)
            .body(Body::new(Empty::<Bytes>::new().map_err(|never| match never {})))
            .map_err(|error| Failure::Rejected { answer: error.to_string() })?;
        let response = self.http.request(request).await.map_err(Failure::transient)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(Failure::transient)?.to_bytes();
        let zipped = head
            .headers
            .get(CONTENT_ENCODING)
            .is_some_and(|encoding| encoding.as_bytes().eq_ignore_ascii_case(b"gzip"));
        let body = if zipped { gunzip(&body).map_err(Failure::transient)? } else { body };
        if head.status != StatusCode::OK {
            return Err(classify(head.status, &head.headers, &body, asked));
        }
        serde_json::from_slice(&body).map_err(|error| {
            // A body that ends too early was cut on its way; any other text is an answer of something else.
            if error.is_eof() {
                Failure::transient(error)
            } else {
                let problem = if error.is_data() { "is of another shape" } else { "is not JSON" };
                Failure::Malformed {
                    problem: format!("it {problem} ({error}); check the address of the API (`--google-url`)"),
                }
            }
        })
    }
}

fn gunzip(zipped: &[u8]) -> std::io::Result<Bytes> {
    let limit = u64::try_from(MAX_BODY).unwrap_or(u64::MAX);
    let mut plain = Vec::new();
    MultiGzDecoder::new(zipped).take(limit + 1).read_to_end(&mut plain)?;
    if plain.len() > MAX_BODY {
        return Err(std::io::Error::other("the unpacked answer is too large"));
    }
    Ok(plain.into())
}

fn not_asked(call: &Call<'_>, attempts: u32, why: &'static str) -> SourceError {
    SourceError::Unavailable { what: call.what.clone(), attempts, cause: why.into() }
}

fn final_error(failure: Failure, call: &Call<'_>) -> SourceError {
    let what = call.what.clone();
    match failure {
        Failure::Unauthorised { answer } => SourceError::Credentials {
            message: format!(
                "the API does not accept the token, not even a new one ({answer}); check that the key's `token_uri` and the \
                 address of the API (`--google-url`) belong together"
            ),
            cause: None,
        },
        Failure::StalePageToken => SourceError::StalePageToken { what },
        Failure::GroupVanished => {
            SourceError::GroupVanished { group: call.group.unwrap_or_default().to_owned() }
        }
        Failure::NoSuchMember => SourceError::NoSuchMember { what },
        Failure::Rejected { answer } | Failure::GroupForbidden { answer, .. } => {
            SourceError::Rejected { what, answer }
        }
        Failure::Refused { message } => SourceError::Refused { message },
        Failure::Malformed { problem } => SourceError::Malformed { what, problem },
        // `get` keeps these two for itself while attempts are left.
        Failure::RateLimited { cause, .. } | Failure::Transient { cause, .. } => {
            SourceError::Unavailable { what, attempts: 1, cause }
        }
    }
}
