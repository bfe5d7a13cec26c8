use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Form;
use axum::extract::State;
use axum::extract::rejection::FormRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error_body::{TokenRefusal, json_response, no_store};
use crate::server::Shared;
use crate::{assertion, clock};

const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";

/// The scopes that the organisation has delegated to the service account.
const DELEGATED_SCOPES: [&str; 6] = [
    "https://www.googleapis.com/auth/admin.directory.user",
    "https://www.googleapis.com/auth/admin.directory.user.readonly",
    "https://www.googleapis.com/auth/admin.directory.group",
    "https://www.googleapis.com/auth/admin.directory.group.readonly",
    "https://www.googleapis.com/auth/admin.directory.group.member",
    "https://www.googleapis.com/auth/admin.directory.group.member.readonly",
];

/// Whom a token speaks for, and what it may be used for.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    /// `None` for the service account itself.
    pub(crate) subject: Option<String>,
    pub(crate) scopes: Vec<String>,
    expires_at: u64,
}

/// The access tokens given out.
#[derive(Debug)]
pub(crate) struct Tokens {
    lifetime: Duration,
    by_text: Mutex<HashMap<String, Access>>,
}

impl Tokens {
    pub(crate) fn new(lifetime: Duration) -> Self {
        Self { lifetime, by_text: Mutex::default() }
    }

    /// What this token gives at this time, if it was given out and is not over.
    pub(crate) fn access(&self, token: &str, now: u64) -> Option<Access> {
        self.lock().get(token).filter(|access| access.expires_at > now).cloned()
    }

    /// All that are good, whatever for.
    pub(crate) fn texts(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    /// A new token; `None` when the system has no randomness to give.
    fn issue(&self, subject: Option<String>, scopes: Vec<String>, now: u64) -> Option<String> {
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).ok()?;
        let token = format!("ya29.{}", URL_SAFE_NO_PAD.encode(random));
        let mut by_text = self.lock();
        by_text.retain(|_, access| access.expires_at > now);
        let expires_at = now.saturating_add(self.lifetime.as_secs());
        by_text.insert(token.clone(), Access { subject, scopes, expires_at });
        Some(token)
    }

    /// The answer that gives a new token.
    pub(crate) fn grant(
        &self,
        subject: Option<String>,
        scopes: Vec<String>,
        now: u64,
    ) -> Result<Value, TokenRefusal> {
        let token = self.issue(subject, scopes, now).ok_or_else(|| {
            TokenRefusal::bad_request("internal_failure", "The system gave no random bytes for a token.")
        })?;
        let expires_in = self.lifetime.as_secs();
        Ok(json!({"access_token": token, "expires_in": expires_in, "token_type": "Bearer"}))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Access>> {
        self.by_text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Deserialize)]
pub(crate) struct TokenRequest {
    grant_type: Option<String>,
    assertion: Option<String>,
}

/// `POST /token`
pub(crate) async fn token(
    State(shared): State<Arc<Shared>>,
    request: Result<Form<TokenRequest>, FormRejection>,
) -> Response {
    let granted = match request {
        Ok(Form(request)) => grant(&shared, &request, clock::unix_now()),
        Err(_) => Err(TokenRefusal::bad_request(
            "invalid_request",
            "The body must be application/x-www-form-urlencoded.",
        )),
    };
    match granted {
        Ok(body) => no_store(json_response(StatusCode::OK, &body)),
        Err(refusal) => refusal.into_response(),
    }
}

fn grant(shared: &Shared, request: &TokenRequest, now: u64) -> Result<Value, TokenRefusal> {
    if request.grant_type.as_deref() != Some(JWT_BEARER) {
        return Err(TokenRefusal::bad_request("unsupported_grant_type", "Invalid grant_type"));
    }
    let Some(assertion) = request.assertion.as_deref() else {
        return Err(TokenRefusal::bad_request("invalid_request", "Missing required parameter: assertion"));
    };
    let claims = assertion::verify(assertion, &shared.account, &shared.token_uri, now)?;

    let scopes: Vec<String> = claims.scope.split_whitespace().map(str::to_owned).collect();
    if scopes.is_empty() {
        return Err(TokenRefusal::bad_request("invalid_scope", "Empty or missing scope not allowed."));
    }
    let delegated =
        |scope: &String| DELEGATED_SCOPES.contains(&scope.as_str()) && !shared.not_delegated.contains(scope);
    if !scopes.iter().all(delegated) {
        return Err(TokenRefusal::unauthorized_client());
    }
    if let Some(subject) = claims.sub.as_deref()
        && !shared.is_subject(subject)
        && shared.directory().user(subject).is_none()
    {
        return Err(TokenRefusal::invalid_grant("Invalid email or User ID"));
    }

    shared.tokens.grant(claims.sub, scopes, now)
}
