//! Requests: a [`Gate`] finds out who asks, decides, and lets the request pass with its permit or answers it.
//!
//! Feature `tower` has the [layer](GateLayer), for any server on the types of the `http` crate; feature `axum` an
//! extractor as well. Who the user is, only the host knows: by a verified token, a session, or a header that a
//! trusted proxy sets, and strips from what comes from outside.
//!
//! | answer | when |
//! |---|---|
//! | 401 | there is no user; with `WWW-Authenticate` (see [`Gate::challenge`]) |
//! | 403 | the user may not; with the reason only if asked for (see [`Gate::reveal_reason`]) |
//! | 404 | the resource that the request names cannot be one, so that nobody was ever granted anything on it |
//! | 503 | nobody could tell; with `Retry-After`, and the cause in the log alone |
//!
//! Bodies are `application/problem+json` (RFC 9457), and caches are told not to keep them.
//!
//! - A permit travels in the request's extensions, which exist in this process only: nothing that a client sends
//!   gets there. Whoever can put one there has been given it by this crate.
//! - A gate records nothing: what it refuses is in no audit trail. Where a denial must be, ask the gate for the [user](Gate::user)
//!   alone, have an [operation](Authz::operation) decide, which records a denial, and let the gate [answer](Gate::refused) it.
//! - No method is special. A browser's preflight (`OPTIONS`) has no user and would get a 401, so a CORS layer
//!   belongs outside the gate; so does what finds out the user, if the gate only reads its result.

#[cfg(feature = "axum")]
mod axum;
mod tower;

use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::header::{CACHE_CONTROL, CONTENT_TYPE, InvalidHeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::request::Parts;
use http::{HeaderValue, Response, StatusCode};
use serde_json::json;

#[cfg(feature = "axum")]
pub use self::axum::Authorized;
pub use self::tower::{GateLayer, Gated};
use crate::name::Principal;
use crate::permit::{Action, On, Permit, Question, Refusal};
use crate::service::Authz;
use crate::snapshot::Snapshot;

/// How often the log is told that nobody can decide.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// An error of the host's own.
type Cause = Box<dyn StdError + Send + Sync>;

/// The host's way from a request to its user.
type FindUser = dyn Fn(&Parts) -> Result<Option<Principal>, Cause> + Send + Sync;

/// After how many seconds to try again when nobody could tell.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("5");

/// What a gate asks.
#[derive(Debug, Clone)]
pub struct Decider(Source);

#[derive(Debug, Clone)]
enum Source {
    Database(Authz),
    Memory(Snapshot),
}

impl Decider {
    async fn ask<A>(&self, question: Question<A>, user: &Principal) -> Result<Permit<A>, Refusal> {
        match &self.0 {
            Source::Database(authz) => authz.permit(question, user.into()).await,
            Source::Memory(snapshot) => question.ask_snapshot(snapshot, user.into()),
        }
    }
}

impl From<Authz> for Decider {
    fn from(authz: Authz) -> Self {
        Self(Source::Database(authz))
    }
}

impl From<Snapshot> for Decider {
    fn from(snapshot: Snapshot) -> Self {
        Self(Source::Memory(snapshot))
    }
}

/// What a host answers when asked for a request's user: an `Option` of a [`UserName`](crate::UserName), of the
/// [`Sub`](crate::Sub) of its login or of a [`Principal`], or a `Result` of it where finding out can fail.
///
/// A gate that asks a [`Snapshot`] by `sub` needs one with [`by_sub`](crate::snapshot::Options::by_sub); else the
/// answer is 503.
pub trait Identified {
    /// `None` if nobody is logged in (or the token is not valid): that is a 401.
    ///
    /// # Errors
    /// If it could not be found out: that is a 503.
    fn identified(self) -> Result<Option<Principal>, Cause>;
}

impl<P: Into<Principal>> Identified for Option<P> {
    fn identified(self) -> Result<Option<Principal>, Cause> {
        Ok(self.map(Into::into))
    }
}

impl<P: Into<Principal>, E: Into<Cause>> Identified for Result<Option<P>, E> {
    fn identified(self) -> Result<Option<Principal>, Cause> {
        self.map(|user| user.map(Into::into)).map_err(Into::into)
    }
}

/// Lets requests pass by their user's permits; cheap to clone.
#[derive(Clone)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    decider: Decider,
    user: Arc<FindUser>,
    reveal_reason: bool,
    challenge: HeaderValue,
    /// When the log was last told of an outage.
    told: Arc<Mutex<Option<Instant>>>,
}

impl Gate {
    /// Decides by `decider` (an [`Authz`] or a [`Snapshot`]) for the user that `user` finds in a request.
    ///
    /// `user` must believe nothing that a client can write as it likes.
    #[must_use]
    pub fn new<I: Identified>(
        decider: impl Into<Decider>,
        user: impl Fn(&Parts) -> I + Send + Sync + 'static,
    ) -> Self {
        let inner = Inner {
            decider: decider.into(),
            user: Arc::new(move |parts| user(parts).identified()),
            reveal_reason: false,
            challenge: HeaderValue::from_static("Bearer"),
            told: Arc::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Whether a 403 says who may not do what, and why. Not by default: the reason can name groups.
    #[must_use]
    pub fn reveal_reason(mut self, reveal: bool) -> Self {
        Arc::make_mut(&mut self.inner).reveal_reason = reveal;
        self
    }

    /// The `WWW-Authenticate` of a 401, `Bearer realm="ops"` for example; `Bearer` if not set.
    ///
    /// # Errors
    /// If it cannot stand in a header.
    pub fn challenge(mut self, challenge: &str) -> Result<Self, InvalidHeaderValue> {
        Arc::make_mut(&mut self.inner).challenge = HeaderValue::from_str(challenge)?;
        Ok(self)
    }

    /// A permit for `A`, if the request's user may do it now.
    ///
    /// # Errors
    /// The answer to give instead.
    pub async fn authorize<A: Action>(&self, parts: &Parts) -> Result<Permit<A>, Rejection> {
        let user = self.user(parts)?;
        self.ask(Question::about(), &user).await
    }

    /// A permit for `A` on one resource, if the request's user may do it now: where the resource is only known
    /// in the handler, as a parameter of the path for example.
    ///
    /// # Errors
    /// The answer to give instead.
    pub async fn authorize_on<A: Action>(
        &self,
        parts: &Parts,
        resource: &str,
    ) -> Result<Permit<On<A>>, Rejection> {
        let user = self.user(parts)?; // a stranger learns nothing about which resources there can be
        let question = Question::on(resource).map_err(|refusal| self.refused(refusal))?;
        self.ask(question, &user).await
    }

    /// Who asks, undecided: for an [operation](Authz::operation), which decides and records what it decides.
    ///
    /// # Errors
    /// The answer to give instead.
    pub fn user(&self, parts: &Parts) -> Result<Principal, Rejection> {
        match (self.inner.user)(parts) {
            Ok(Some(user)) => Ok(user),
            Ok(None) => Err(Rejection(Answer::NoUser { challenge: self.inner.challenge.clone() })),
            Err(error) => {
                self.tell(&*error, "a request's user could not be found out, so it was refused");
                Err(Rejection(Answer::Undecided))
            }
        }
    }

    async fn ask<A>(&self, question: Question<A>, user: &Principal) -> Result<Permit<A>, Rejection> {
        self.inner.decider.ask(question, user).await.map_err(|refusal| self.refused(refusal))
    }

    /// An outage is an error in the log once in a while, not once per request.
    fn tell(&self, error: &(dyn StdError + 'static), what: &'static str) {
        let now = Instant::now();
        let is_due = self.inner.told.try_lock().is_ok_and(|mut told| {
            let is_due = told.is_none_or(|told| now.saturating_duration_since(told) >= TELL_EVERY);
            if is_due {
                *told = Some(now);
            }
            is_due
        });
        if is_due {
            tracing::error!(error, "{what}; more of the kind are logged at debug level for {TELL_EVERY:?}");
        } else {
            tracing::debug!(error, "{what}");
        }
    }

    /// The answer to give where an operation was refused.
    #[must_use]
    pub fn refused(&self, refusal: Refusal) -> Rejection {
        Rejection(match refusal {
            Refusal::Denied(denied) => {
                tracing::debug!(user = %denied.user, action = %denied.action, reason = %denied.reason, "denied");
                Answer::Denied { reason: self.inner.reveal_reason.then(|| denied.to_string()) }
            }
            Refusal::NotAResource { .. } => Answer::NoResource,
            Refusal::Undecided(error) | Refusal::Unrecorded(error) => {
                self.tell(&error, "a request could not be decided, so it was refused");
                Answer::Undecided
            }
        })
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("decider", &self.inner.decider)
            .field("reveal_reason", &self.inner.reveal_reason)
            .field("challenge", &self.inner.challenge)
            .finish_non_exhaustive()
    }
}

/// The answer to a request that may not pass.
#[derive(Debug)]
pub struct Rejection(Answer);

#[derive(Debug)]
enum Answer {
    NoUser { challenge: HeaderValue },
    Denied { reason: Option<String> },
    NoResource,
    Undecided,
}

impl Rejection {
    /// Its status: 401, 403, 404 or 503.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        match self.0 {
            Answer::NoUser { .. } => StatusCode::UNAUTHORIZED,
            Answer::Denied { .. } => StatusCode::FORBIDDEN,
            Answer::NoResource => StatusCode::NOT_FOUND,
            Answer::Undecided => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// As a response, with a body of the server's kind.
    #[must_use]
    pub fn into_response<B: From<String>>(self) -> Response<B> {
        let status = self.status();
        let mut problem = json!({
            "title": status.canonical_reason().unwrap_or_default(),
            "status": status.as_u16(),
        });
        let detail = match &self.0 {
            Answer::NoUser { .. } => Some("say who you are and try again"),
            Answer::Denied { reason } => reason.as_deref(),
            Answer::NoResource => Some("there can be no resource of that name"),
            Answer::Undecided => Some("whether you may could not be found out; try again later"),
        };
        if let (Some(problem), Some(detail)) = (problem.as_object_mut(), detail) {
            problem.insert("detail".to_owned(), detail.into());
        }
        let mut response = Response::new(B::from(problem.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        match self.0 {
            Answer::NoUser { challenge } => {
                headers.insert(WWW_AUTHENTICATE, challenge);
            }
            Answer::Undecided => {
                headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
            }
            Answer::Denied { .. } | Answer::NoResource => {}
        }
        response
    }
}
