//! Signing in with a service-account key: reading the key, and one shared token.

use std::path::Path;
use std::time::Duration;

use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use yup_oauth2::authenticator::Authenticator;
use yup_oauth2::error::AuthErrorCode;
use yup_oauth2::{
    AccessToken, CustomHyperClientBuilder, Error as OauthError, ServiceAccountAuthenticator,
    ServiceAccountKey,
};

use super::retry::{Attempts, RetryPolicy};
use super::{DELEGATION_PAGE, GROUP_SCOPE, HttpsConnector, USER_SCOPE};
use crate::source::{Cause, SourceError};

const SCOPES: [&str; 2] = [USER_SCOPE, GROUP_SCOPE];
const WHERE_KEYS_COME_FROM: &str = "expected the JSON key of a service account, from the Google Cloud console under IAM & Admin > Service Accounts > Keys";

/// Reads a service-account key and checks that it can be used, so that a wrong file is named before the first call.
///
/// # Errors
/// [`SourceError::Credentials`] naming the file and what is wrong with it, without any of its content.
pub(super) fn read_key(path: &Path) -> Result<ServiceAccountKey, SourceError> {
    let shown = path.display();
    let problem = |problem: String, cause: Option<Cause>| SourceError::Credentials {
        message: format!("credentials file `{shown}` {problem}; {WHERE_KEYS_COME_FROM}"),
        cause,
    };
    let bytes =
        std::fs::read(path).map_err(|error| problem("cannot be read".to_owned(), Some(error.into())))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| problem("is not JSON".to_owned(), Some(error.into())))?;
    let Value::Object(fields) = &value else {
        return Err(problem("is no JSON object".to_owned(), None));
    };
    match fields.get("type").and_then(Value::as_str) {
        Some("service_account") => {}
        Some(other) => return Err(problem(format!("is of type `{other}`, not `service_account`"), None)),
        None => return Err(problem("has no `type`".to_owned(), None)),
    }
    for field in ["client_email", "private_key", "token_uri"] {
        if fields.get(field).and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(problem(format!("has no `{field}`"), None));
        }
    }
    let key = yup_oauth2::parse_service_account_key(&bytes)
        .map_err(|_| problem("has a field of the wrong type".to_owned(), None))?;
    // The library takes the address for granted.
    let usable = url::Url::parse(&key.token_uri).is_ok_and(|url| matches!(url.scheme(), "https" | "http"));
    if !usable || key.token_uri.parse::<hyper::Uri>().is_err() {
        return Err(problem("has a `token_uri` that is no web address".to_owned(), None));
    }
    Ok(key)
}

/// One sign-in, shared by all calls.
pub(super) struct SignIn {
    authenticator: Authenticator<HttpsConnector>,
    // The library would post once for each caller that finds no token; behind the lock, one posts and the others wait.
    last: Mutex<Option<String>>,
    retry: RetryPolicy,
    request_timeout: Duration,
    key_email: String,
    client_id: String,
    subject: Option<String>,
    token_uri: String,
}

impl SignIn {
    /// Prepares to sign in, as `subject` if there is one; sends nothing yet.
    pub(super) async fn new(
        path: &Path,
        subject: Option<String>,
        connector: HttpsConnector,
        retry: RetryPolicy,
        request_timeout: Duration,
    ) -> Result<Self, SourceError> {
        let key = read_key(path)?;
        let (key_email, token_uri) = (key.client_email.clone(), key.token_uri.clone());
        let client_id = key.client_id.clone().unwrap_or_else(|| format!("of {key_email}"));
        let client = Client::builder(TokioExecutor::new()).build::<_, String>(connector);
        let mut builder =
            ServiceAccountAuthenticator::with_client(key, CustomHyperClientBuilder::from(client));
        if let Some(subject) = &subject {
            builder = builder.subject(subject);
        }
        let authenticator = builder.build().await.map_err(|error| SourceError::Credentials {
            message: format!(
                "the `private_key` in credentials file `{}` is not a readable RSA key; {WHERE_KEYS_COME_FROM}",
                path.display()
            ),
            cause: Some(error.into()),
        })?;
        let last = Mutex::new(None);
        Ok(Self { authenticator, last, retry, request_timeout, key_email, client_id, subject, token_uri })
    }

    /// A token for a call; fetched if there is none or if it expires within a minute.
    pub(super) async fn token(&self) -> Result<String, SourceError> {
        let mut last = self.last.lock().await;
        let token = self.fetch(false).await?;
        *last = Some(token.clone());
        Ok(token)
    }

    /// A token other than the one that was not accepted; fetched once, whoever asks for it.
    pub(super) async fn token_after(&self, refused: &str) -> Result<String, SourceError> {
        let mut last = self.last.lock().await;
        if let Some(token) = last.as_deref().filter(|token| *token != refused) {
            return Ok(token.to_owned());
        }
        let token = self.fetch(true).await?;
        *last = Some(token.clone());
        Ok(token)
    }

    async fn fetch(&self, mut afresh: bool) -> Result<String, SourceError> {
        let mut attempts = Attempts::new(&self.retry);
        loop {
            let request = async {
                if afresh {
                    self.authenticator.force_refreshed_token(&SCOPES).await
                } else {
                    self.authenticator.token(&SCOPES).await
                }
            };
            let cause: Cause = match timeout(self.request_timeout, request).await {
                Ok(Ok(token)) => match AccessToken::token(&token) {
                    Some(token) => return Ok(token.to_owned()),
                    None => "the answer has no token".into(),
                },
                Ok(Err(OauthError::AuthError(error))) if !passes(&error.error) => {
                    return Err(self.refused(&error.error, error.error_description.as_deref()));
                }
                Ok(Err(error)) => error.into(),
                Err(elapsed) => elapsed.into(),
            };
            // An answer without a token has been kept by the library as if it were one.
            afresh = true;
            let Some(pause) = attempts.failed(false, None) else {
                let what = format!("sign-in at {}", self.token_uri);
                return Err(SourceError::Credentials {
                    message: format!(
                        "no usable answer for the {what} in {} attempts; try again later",
                        attempts.made()
                    ),
                    cause: Some(cause),
                });
            };
            tracing::warn!(
                attempt = attempts.made(),
                pause_ms = pause.as_millis(),
                "sign-in failed, trying again"
            );
            sleep(pause).await;
        }
    }

    fn refused(&self, code: &AuthErrorCode, description: Option<&str>) -> SourceError {
        let code = code.as_str();
        let said =
            description.map_or_else(|| code.to_owned(), |description| format!("{code}: {description}"));
        let Self { key_email, client_id, .. } = self;
        let message = match (code, self.subject.as_deref()) {
            ("unauthorized_client" | "access_denied", subject) => {
                let role = if subject.is_some() {
                    ""
                } else {
                    ", or name the administrator to act as (`--google-subject`)"
                };
                format!(
                    "domain-wide delegation is missing for client id `{client_id}` (service account `{key_email}`): in the \
                     Admin console under {DELEGATION_PAGE}, authorise that client id for the scopes \
                     `{USER_SCOPE},{GROUP_SCOPE}`{role} ({said})"
                )
            }
            ("invalid_grant", Some(subject)) => format!(
                "service account `{key_email}` cannot sign in as `{subject}` ({said}); check that the subject \
                 (`--google-subject`) is an active administrator of this Workspace, that the key was not deleted, and this \
                 machine's clock"
            ),
            ("invalid_grant", None) => format!(
                "service account `{key_email}` cannot sign in ({said}); check that the key and the account were not deleted, \
                 and this machine's clock"
            ),
            ("invalid_scope", _) => format!(
                "the scopes `{USER_SCOPE}` and `{GROUP_SCOPE}` were not accepted for service account `{key_email}` ({said}); \
                 check {DELEGATION_PAGE} in the Admin console"
            ),
            _ => format!(
                "service account `{key_email}` cannot sign in ({said}); check the key in the Google Cloud console"
            ),
        };
        SourceError::Credentials { message, cause: None }
    }
}

// Whether the token endpoint may answer differently in a moment.
fn passes(code: &AuthErrorCode) -> bool {
    let AuthErrorCode::Other(code) = code else { return false };
    matches!(
        code.as_str(),
        "internal_failure"
            | "server_error"
            | "temporarily_unavailable"
            | "backend_error"
            | "rate_limit_exceeded"
    )
}
