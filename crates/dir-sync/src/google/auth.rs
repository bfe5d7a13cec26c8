//! Signing in, with a service-account key or without one: reading what there is, and one shared token.

use std::path::Path;
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use yup_oauth2::authenticator::Authenticator;
use yup_oauth2::{
    AccessToken, CustomHyperClientBuilder, Error as OauthError, ServiceAccountAuthenticator,
    ServiceAccountKey,
};

use super::keyless::{Granted, KeylessSignIn, StepError};
use super::retry::{Attempts, RetryPolicy};
use super::{DELEGATION_PAGE, GROUP_SCOPE, GoogleConfig, HttpsConnector, USER_SCOPE};
use crate::source::{Cause, SourceError};

const SCOPES: [&str; 2] = [USER_SCOPE, GROUP_SCOPE];
const WHERE_KEYS_COME_FROM: &str = "expected the JSON key of a service account, from the Google Cloud console under IAM & Admin > Service Accounts > Keys";

/// Reads the file, once since a pipe gives it once, in a thread that the program does not wait for when it ends: a file
/// that does not come would keep it from seeing a signal.
async fn read(path: &Path) -> Result<Vec<u8>, SourceError> {
    let (done, read) = tokio::sync::oneshot::channel();
    let reading = path.to_owned();
    std::thread::spawn(move || {
        let _ = done.send(std::fs::read(reading)); // nobody waits any more
    });
    let unread = |_| Err(std::io::Error::other("it was not read to its end"));
    let content = read.await.unwrap_or_else(unread);
    content.map_err(|error| unusable(path, "cannot be read", Some(error.into())))
}

fn unusable(path: &Path, problem: &str, cause: Option<Cause>) -> SourceError {
    let shown = path.display();
    SourceError::Credentials {
        message: format!("credentials file `{shown}` {problem}; {WHERE_KEYS_COME_FROM}"),
        cause,
    }
}

/// The service-account key that the file holds, if it can be used, so that a wrong file is named before the first call.
///
/// # Errors
/// [`SourceError::Credentials`] naming the file and what is wrong with it, without any of its content.
fn parse_key(path: &Path, content: &[u8]) -> Result<ServiceAccountKey, SourceError> {
    let problem = |problem: String, cause: Option<Cause>| unusable(path, &problem, cause);
    let value: Value = serde_json::from_slice(content)
        .map_err(|error| problem("is not JSON".to_owned(), Some(error.into())))?;
    let Value::Object(fields) = &value else {
        return Err(problem("is no JSON object".to_owned(), None));
    };
    match fields.get("type").and_then(Value::as_str) {
        Some("service_account") => {}
        Some(other) => {
            return Err(problem(
                format!("is of type `{other}`, neither `service_account` nor `external_account`"),
                None,
            ));
        }
        None => return Err(problem("has no `type`".to_owned(), None)),
    }
    for field in ["client_email", "private_key", "token_uri"] {
        if fields.get(field).and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(problem(format!("has no `{field}`"), None));
        }
    }
    let key = yup_oauth2::parse_service_account_key(content)
        .map_err(|_| problem("has a field of the wrong type".to_owned(), None))?;
    // The library takes the address for granted.
    let usable = url::Url::parse(&key.token_uri).is_ok_and(|url| matches!(url.scheme(), "https" | "http"));
    if !usable || key.token_uri.parse::<hyper::Uri>().is_err() {
        return Err(problem("has a `token_uri` that is no web address".to_owned(), None));
    }
    Ok(key)
}

/// How to come to a token.
enum Way {
    Key { authenticator: Authenticator<HttpsConnector>, email: String, client_id: String, token_uri: String },
    Keyless(Box<KeylessSignIn>),
}

/// A token, and until when it may be used if it is we who have to know.
struct Kept {
    token: String,
    good_until: Option<Instant>,
}

/// One sign-in, shared by all calls.
pub(super) struct SignIn {
    way: Way,
    // The library would post once for each caller that finds no token; behind the lock, one posts and the others wait.
    last: Mutex<Option<Kept>>,
    retry: RetryPolicy,
    request_timeout: Duration,
    subject: Option<String>,
}

/// A token is renewed so long before it ends.
const MARGIN: Duration = Duration::from_mins(1);

impl SignIn {
    /// Prepares to sign in, as `subject` if there is one; sends nothing yet.
    pub(super) async fn new(config: &GoogleConfig, connector: HttpsConnector) -> Result<Self, SourceError> {
        let file = match config.credentials.as_deref() {
            Some(path) => Some((path, read(path).await?)),
            None => None,
        };
        let file = file.as_ref().map(|(path, content)| (*path, content.as_slice()));
        let way = match file {
            Some((path, content)) if !is_external_account(content) => {
                if config.keyless.service_account.is_some() {
                    return Err(SourceError::Setting {
                        message: "--google-service-account is for signing in without a key; the key names its account itself"
                            .to_owned(),
                    });
                }
                key_way(path, content, config.subject.as_deref(), connector).await?
            }
            _ => {
                let http = Client::builder(TokioExecutor::new()).build(connector);
                Way::Keyless(Box::new(KeylessSignIn::new(config.keyless.clone(), file, http)?))
            }
        };
        Ok(Self {
            way,
            last: Mutex::new(None),
            retry: config.retry.clone(),
            request_timeout: config.request_timeout,
            subject: config.subject.clone(),
        })
    }

    /// A token for a call; fetched if there is none or if it expires within a minute.
    pub(super) async fn token(&self) -> Result<String, SourceError> {
        let mut last = self.last.lock().await;
        if let Some(Kept { token, good_until: Some(end) }) = &*last
            && Instant::now() < *end
        {
            return Ok(token.clone());
        }
        let kept = self.fetch(&SCOPES, false).await?;
        Ok(last.insert(kept).token.clone())
    }

    /// A token other than the one that was not accepted; fetched once, whoever asks for it.
    pub(super) async fn token_after(&self, refused: &str) -> Result<String, SourceError> {
        let mut last = self.last.lock().await;
        if let Some(kept) = last.as_ref().filter(|kept| kept.token != refused) {
            return Ok(kept.token.clone());
        }
        let kept = self.fetch(&SCOPES, true).await?;
        Ok(last.insert(kept).token.clone())
    }

    /// Signs in for one scope alone, to find out which one is missing.
    pub(super) async fn try_scope(&self, scope: &str) -> Result<(), SourceError> {
        self.fetch(&[scope], true).await.map(|_| ())
    }

    /// What is signed in with, in words.
    pub(super) fn describe(&self) -> String {
        match &self.way {
            Way::Key { email, .. } => format!("key of service account `{email}`"),
            Way::Keyless(way) => format!("no key; {} vouches", way.describe()),
        }
    }

    /// Whether this is done without a key, so that there are the steps of [`Self::try_own_token`] and
    /// [`Self::try_signature`].
    pub(super) fn is_keyless(&self) -> bool {
        matches!(self.way, Way::Keyless(_))
    }

    /// Whether the machine or the cluster vouches for us; for which service account.
    pub(super) async fn try_own_token(&self) -> Result<String, SourceError> {
        let Way::Keyless(way) = &self.way else { return Ok(self.describe()) };
        self.bounded(|| {
            Box::pin(async {
                way.own_token().await?;
                way.account().await.map(|account| format!("vouches for us; to sign as `{account}`"))
            })
        })
        .await
    }

    /// Whether Google signs for the service account.
    pub(super) async fn try_signature(&self) -> Result<String, SourceError> {
        let Way::Keyless(way) = &self.way else { return Ok(self.describe()) };
        self.bounded(|| {
            Box::pin(async {
                let own = way.own_token().await?;
                way.sign(&own, self.subject.as_deref(), &SCOPES).await?;
                Ok("Google signs for it".to_owned())
            })
        })
        .await
    }

    async fn fetch(&self, scopes: &[&str], afresh: bool) -> Result<Kept, SourceError> {
        let mut again = afresh;
        self.bounded(|| {
            // An answer without a token has been kept by the library as if it were one.
            let afresh = std::mem::replace(&mut again, true);
            Box::pin(async move {
                match &self.way {
                    Way::Key { authenticator, .. } => self.by_key(authenticator, scopes, afresh).await,
                    Way::Keyless(way) => self.without_key(way, scopes).await,
                }
            })
        })
        .await
    }

    async fn by_key(
        &self,
        authenticator: &Authenticator<HttpsConnector>,
        scopes: &[&str],
        afresh: bool,
    ) -> Result<Kept, StepError> {
        let answered = if afresh {
            authenticator.force_refreshed_token(scopes).await
        } else {
            authenticator.token(scopes).await
        };
        match answered {
            Ok(token) => match AccessToken::token(&token) {
                Some(token) => Ok(Kept { token: token.to_owned(), good_until: None }),
                None => Err(StepError::Passing("the answer has no token".into())),
            },
            Err(OauthError::AuthError(error)) if !code_passes(error.error.as_str()) => {
                Err(StepError::Final(self.refused(error.error.as_str(), error.error_description.as_deref())))
            }
            Err(error) => Err(StepError::Passing(error.into())),
        }
    }

    async fn without_key(&self, way: &KeylessSignIn, scopes: &[&str]) -> Result<Kept, StepError> {
        let own = way.own_token().await?;
        let signed = way.sign(&own, self.subject.as_deref(), scopes).await?;
        let account = way.account().await?.to_owned();
        let refused = |code: &str, said: Option<&str>| self.refused_for(&account, None, code, said);
        let Granted { token, lasts } = way.exchange(&signed, &refused).await?;
        Ok(Kept { token, good_until: Some(Instant::now() + lasts.saturating_sub(MARGIN)) })
    }

    /// Tries until it works, fails for good, or has failed often enough.
    async fn bounded<'a, T>(
        &self,
        mut step: impl FnMut() -> BoxFuture<'a, Result<T, StepError>> + Send,
    ) -> Result<T, SourceError> {
        let mut attempts = Attempts::new(&self.retry);
        loop {
            let cause: Cause = match timeout(self.request_timeout, step()).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(StepError::Final(error))) => return Err(error),
                Ok(Err(StepError::Passing(cause))) => cause,
                Err(elapsed) => elapsed.into(),
            };
            let Some(pause) = attempts.failed(false, None) else {
                return Err(SourceError::Credentials {
                    message: format!(
                        "no usable answer for the sign-in at {} in {} attempts; try again later",
                        self.place(),
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

    fn place(&self) -> String {
        match &self.way {
            Way::Key { token_uri, .. } => token_uri.clone(),
            Way::Keyless(way) => format!("{} (by {})", way.token_url(), way.describe()),
        }
    }

    fn refused(&self, code: &str, description: Option<&str>) -> SourceError {
        match &self.way {
            Way::Key { email, client_id, .. } => self.refused_for(email, Some(client_id), code, description),
            Way::Keyless(_) => self.refused_for("", None, code, description),
        }
    }

    fn refused_for(
        &self,
        key_email: &str,
        client_id: Option<&str>,
        code: &str,
        description: Option<&str>,
    ) -> SourceError {
        let said =
            description.map_or_else(|| code.to_owned(), |description| format!("{code}: {description}"));
        let client_id = client_id.map_or_else(|| format!("of {key_email}"), str::to_owned);
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

/// Whether the token endpoint may answer differently in a moment.
pub(super) fn code_passes(code: &str) -> bool {
    matches!(
        code,
        "internal_failure"
            | "server_error"
            | "temporarily_unavailable"
            | "backend_error"
            | "rate_limit_exceeded"
    )
}

/// Whether the file is one of workload identity federation; what is wrong with another is said when it is used.
fn is_external_account(content: &[u8]) -> bool {
    serde_json::from_slice::<Value>(content)
        .is_ok_and(|value| value.get("type").and_then(Value::as_str) == Some("external_account"))
}

async fn key_way(
    path: &Path,
    content: &[u8],
    subject: Option<&str>,
    connector: HttpsConnector,
) -> Result<Way, SourceError> {
    let key = parse_key(path, content)?;
    let (email, token_uri) = (key.client_email.clone(), key.token_uri.clone());
    let client_id = key.client_id.clone().unwrap_or_else(|| format!("of {email}"));
    let client = Client::builder(TokioExecutor::new()).build::<_, String>(connector);
    let mut builder = ServiceAccountAuthenticator::with_client(key, CustomHyperClientBuilder::from(client));
    if let Some(subject) = subject {
        builder = builder.subject(subject);
    }
    let authenticator = builder.build().await.map_err(|error| SourceError::Credentials {
        message: format!(
            "the `private_key` in credentials file `{}` is not a readable RSA key; {WHERE_KEYS_COME_FROM}",
            path.display()
        ),
        cause: Some(error.into()),
    })?;
    Ok(Way::Key { authenticator, email, client_id, token_uri })
}
