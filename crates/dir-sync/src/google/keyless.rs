//! Signing in without a key: the machine or the cluster vouches for us, Google signs for the service account, and what
//! it signed is exchanged for a token of the directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use url::Url;
use url::form_urlencoded::Serializer;

use super::HttpsConnector;
use crate::source::{Cause, SourceError};

const CLOUD_SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
/// What a signature is good for, in seconds; Google takes no more than an hour.
const SIGNATURE_LASTS: u64 = 3_600;
const MAX_ANSWER: usize = 1024 * 1024;

/// Where to sign in without a key.
#[derive(Debug, Clone)]
pub struct Keyless {
    /// The service account to sign as; by default the one that the machine or the file names.
    pub service_account: Option<String>,
    /// The metadata server of a Google machine or cluster.
    pub metadata_url: String,
    /// The API that signs for service accounts.
    pub iam_url: String,
    /// Where a signature is exchanged for a token.
    pub token_url: String,
}

impl Default for Keyless {
    fn default() -> Self {
        Self {
            service_account: None,
            metadata_url: "http://metadata.google.internal/".to_owned(),
            iam_url: "https://iamcredentials.googleapis.com/".to_owned(),
            token_url: "https://oauth2.googleapis.com/token".to_owned(),
        }
    }
}

/// Who vouches for us.
enum Identity {
    Machine,
    Federated(Box<ExternalAccount>),
}

/// A file of workload identity federation.
#[derive(Deserialize)]
struct ExternalAccount {
    audience: String,
    subject_token_type: String,
    token_url: String,
    service_account_impersonation_url: Option<String>,
    credential_source: CredentialSource,
}

#[derive(Deserialize)]
struct CredentialSource {
    file: Option<PathBuf>,
    url: Option<String>,
    #[serde(default)]
    headers: std::collections::BTreeMap<String, String>,
    format: Option<SourceFormat>,
}

#[derive(Deserialize)]
struct SourceFormat {
    #[serde(rename = "type")]
    kind: String,
    subject_token_field_name: Option<String>,
}

/// A step that failed: for good, or perhaps only now.
pub(super) enum StepError {
    Final(SourceError),
    Passing(Cause),
}

/// A token of the directory, and for how long it is good.
pub(super) struct Granted {
    pub(super) token: String,
    pub(super) lasts: Duration,
}

/// The way to a token without a key.
pub(super) struct KeylessSignIn {
    settings: Keyless,
    identity: Identity,
    http: Client<HttpsConnector, Full<Bytes>>,
    account: OnceCell<String>,
}

/// A refusal of the token endpoint, as the caller words it.
pub(super) type Refused<'a> = &'a (dyn Fn(&str, Option<&str>) -> SourceError + Send + Sync);

impl KeylessSignIn {
    /// With the path and the content of the file, if it is a file that vouches for us; sends nothing yet.
    pub(super) fn new(
        settings: Keyless,
        file: Option<(&Path, &[u8])>,
        http: Client<HttpsConnector, Full<Bytes>>,
    ) -> Result<Self, SourceError> {
        for (option, url) in [
            ("--google-metadata-url", &settings.metadata_url),
            ("--google-iam-url", &settings.iam_url),
            ("--google-token-url", &settings.token_url),
        ] {
            if !is_web_address(url) {
                return Err(SourceError::Setting {
                    message: format!("`{url}` ({option}) is no web address"),
                });
            }
        }
        let identity = match file {
            Some((path, content)) => Identity::Federated(Box::new(parse_external_account(path, content)?)),
            None => Identity::Machine,
        };
        Ok(Self { settings, identity, http, account: OnceCell::new() })
    }

    pub(super) fn token_url(&self) -> &str {
        &self.settings.token_url
    }

    /// Who vouches for us, in words.
    pub(super) fn describe(&self) -> String {
        match &self.identity {
            Identity::Machine => format!("the metadata server at {}", self.settings.metadata_url),
            Identity::Federated(file) => format!("workload identity federation at {}", file.token_url),
        }
    }

    /// The address of the service account to sign as.
    pub(super) async fn account(&self) -> Result<&str, StepError> {
        let asked = || async {
            if let Some(account) = &self.settings.service_account {
                return Ok(account.clone());
            }
            match &self.identity {
                Identity::Machine => {
                    let account = self.metadata("email").await?.trim().to_owned();
                    if account.contains('@') {
                        Ok(account)
                    } else {
                        Err(setting(
                            "the metadata server names no service account; name it with --google-service-account",
                        ))
                    }
                }
                Identity::Federated(file) => file
                    .service_account_impersonation_url
                    .as_deref()
                    .and_then(|url| url.rsplit('/').next())
                    .and_then(|last| last.split(':').next())
                    .filter(|account| account.contains('@'))
                    .map(str::to_owned)
                    .ok_or_else(|| {
                        setting("the file names no service account; name it with --google-service-account")
                    }),
            }
        };
        self.account.get_or_try_init(asked).await.map(String::as_str)
    }

    /// A token of the machine or the cluster itself, good for asking for signatures and nothing in the directory.
    pub(super) async fn own_token(&self) -> Result<String, StepError> {
        match &self.identity {
            Identity::Machine => {
                let answer = self.metadata("token").await?;
                access_token(answer.as_bytes(), "access_token", "the metadata server")
                    .map(|granted| granted.token)
            }
            Identity::Federated(file) => self.federated_token(file).await,
        }
    }

    async fn federated_token(&self, file: &ExternalAccount) -> Result<String, StepError> {
        let subject_token = self.subject_token(&file.credential_source).await?;
        let form = Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
            .append_pair("requested_token_type", "urn:ietf:params:oauth:token-type:access_token")
            .append_pair("audience", &file.audience)
            .append_pair("subject_token_type", &file.subject_token_type)
            .append_pair("subject_token", subject_token.trim())
            .append_pair("scope", CLOUD_SCOPE)
            .finish();
        let (status, body) = self.post_form(&file.token_url, form).await?;
        if status != StatusCode::OK {
            return Err(refusal(status, &body, |said| {
                format!(
                    "workload identity federation refused the token of this workload ({said}); check the pool, its provider \
                     and its attribute condition in the Google Cloud console under IAM & Admin > Workload Identity Federation"
                )
            }));
        }
        let token = access_token(&body, "access_token", "workload identity federation")?.token;
        let Some(url) = &file.service_account_impersonation_url else { return Ok(token) };
        let asked = json!({"scope": [CLOUD_SCOPE]});
        let (status, body) = self.post_json(url, &token, &asked).await?;
        if status != StatusCode::OK {
            return Err(refusal(status, &body, |said| {
                format!(
                    "this workload may not act for the service account ({said}); give its principal the role Workload Identity \
                     User (roles/iam.workloadIdentityUser) on the service account"
                )
            }));
        }
        access_token(&body, "accessToken", "the credentials API").map(|granted| granted.token)
    }

    /// What the cluster says of us.
    async fn subject_token(&self, source: &CredentialSource) -> Result<String, StepError> {
        let text = match (&source.file, &source.url) {
            (Some(file), _) => tokio::fs::read_to_string(file).await.map_err(|error| {
                StepError::Final(SourceError::Credentials {
                    message: format!(
                        "the token of this workload cannot be read from `{}`; check that it is mounted",
                        file.display()
                    ),
                    cause: Some(error.into()),
                })
            })?,
            (None, Some(url)) => {
                let mut request = Request::builder().method(Method::GET).uri(url);
                for (name, value) in &source.headers {
                    request = request.header(name, value);
                }
                let (status, body) = self.send(request.body(Full::default())).await?;
                if status != StatusCode::OK {
                    return Err(refusal(status, &body, |said| {
                        format!("`{url}` does not give the token of this workload ({said})")
                    }));
                }
                String::from_utf8_lossy(&body).into_owned()
            }
            (None, None) => {
                return Err(setting(
                    "the file has a `credential_source` of a kind that is not supported: use a file or a URL",
                ));
            }
        };
        let Some(format) = source.format.as_ref().filter(|format| format.kind == "json") else {
            return Ok(text);
        };
        let field = format.subject_token_field_name.as_deref().unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        value.get(field).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
            setting("the token of this workload is not in the field that `subject_token_field_name` names")
        })
    }

    /// Has Google sign that the service account, for `subject` if there is one, asks for these scopes.
    pub(super) async fn sign(
        &self,
        own_token: &str,
        subject: Option<&str>,
        scopes: &[&str],
    ) -> Result<String, StepError> {
        let account = self.account().await?;
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_err(|_| setting("this machine's clock is before 1970"))?
            .as_secs();
        let mut claims = json!({
            "iss": account, "scope": scopes.join(" "), "aud": self.settings.token_url,
            "iat": now, "exp": now + SIGNATURE_LASTS,
        });
        if let (Some(subject), Some(claims)) = (subject, claims.as_object_mut()) {
            claims.insert("sub".to_owned(), json!(subject));
        }
        let base = self.settings.iam_url.trim_end_matches('/');
        let url = format!("{base}/v1/projects/-/serviceAccounts/{account}:signJwt");
        let (status, body) = self.post_json(&url, own_token, &json!({"payload": claims.to_string()})).await?;
        if status != StatusCode::OK {
            return Err(refusal(status, &body, |said| {
                format!(
                    "Google does not sign for service account `{account}` ({said}); enable the IAM Service Account Credentials \
                     API in its project, and give whoever runs this (the account itself included) the role Service Account \
                     Token Creator (roles/iam.serviceAccountTokenCreator, permission iam.serviceAccounts.signJwt) on it"
                )
            }));
        }
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        let signed = answer.get("signedJwt").and_then(Value::as_str);
        signed.map(str::to_owned).ok_or_else(|| StepError::Passing("the answer has no signature".into()))
    }

    /// Exchanges what was signed for a token.
    pub(super) async fn exchange(&self, signed: &str, refused: Refused<'_>) -> Result<Granted, StepError> {
        let form = Serializer::new(String::new())
            .append_pair("grant_type", JWT_BEARER)
            .append_pair("assertion", signed)
            .finish();
        let (status, body) = self.post_form(&self.settings.token_url, form).await?;
        if status == StatusCode::OK {
            return access_token(&body, "access_token", "the token endpoint");
        }
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        match answer.get("error").and_then(Value::as_str) {
            Some(code) if !status.is_server_error() && !super::auth::code_passes(code) => {
                Err(StepError::Final(refused(code, answer.get("error_description").and_then(Value::as_str))))
            }
            _ => Err(StepError::Passing(
                format!("the token endpoint answered with status {}", status.as_u16()).into(),
            )),
        }
    }

    async fn metadata(&self, what: &str) -> Result<String, StepError> {
        let base = self.settings.metadata_url.trim_end_matches('/');
        let url = format!("{base}/computeMetadata/v1/instance/service-accounts/default/{what}");
        let request = Request::builder().method(Method::GET).uri(url).header("Metadata-Flavor", "Google");
        let (status, body) = self.send(request.body(Full::default())).await?;
        if status != StatusCode::OK {
            return Err(refusal(status, &body, |said| {
                format!(
                    "the metadata server at {base} knows no service account for us ({said}); on GKE check that the \
                     Kubernetes service account is bound to a Google one (Workload Identity)"
                )
            }));
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn post_form(&self, url: &str, form: String) -> Result<(StatusCode, Bytes), StepError> {
        let request = Request::post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        self.send(request.body(Full::new(form.into()))).await
    }

    async fn post_json(
        &self,
        url: &str,
        token: &str,
        body: &Value,
    ) -> Result<(StatusCode, Bytes), StepError> {
        let request = Request::post(url)
            .header(CONTENT_TYPE, "application/json")
            .header(AUTHORIZATION, format!("Bearer {token}"));
        self.send(request.body(Full::new(body.to_string().into()))).await
    }

    async fn send(
        &self,
        request: Result<Request<Full<Bytes>>, hyper::http::Error>,
    ) -> Result<(StatusCode, Bytes), StepError> {
        let request = request.map_err(|_| setting("an address for signing in cannot be used"))?;
        let answer = self.http.request(request).await.map_err(|error| StepError::Passing(error.into()))?;
        let status = answer.status();
        let body =
            Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(StepError::Passing)?;
        Ok((status, body.to_bytes()))
    }
}

fn parse_external_account(path: &Path, content: &[u8]) -> Result<ExternalAccount, SourceError> {
    let problem = |problem: &str, cause: Option<Cause>| SourceError::Credentials {
        message: format!(
            "credentials file `{}` {problem}; expected the configuration that `gcloud iam workload-identity-pools \
             create-cred-config` writes",
            path.display()
        ),
        cause,
    };
    let file: ExternalAccount = serde_json::from_slice(content)
        .map_err(|error| problem("is not one of workload identity federation", Some(error.into())))?;
    let addresses = [
        Some(&file.token_url),
        file.service_account_impersonation_url.as_ref(),
        file.credential_source.url.as_ref(),
    ];
    if addresses.into_iter().flatten().all(|url| is_web_address(url)) {
        Ok(file)
    } else {
        Err(problem("has an address that is none", None))
    }
}

fn is_web_address(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "https" | "http") && url.has_host())
        && text.parse::<hyper::Uri>().is_ok()
}

fn setting(message: &str) -> StepError {
    StepError::Final(SourceError::Setting { message: message.to_owned() })
}

/// An answer other than 200: worth another try, or for good and then with what to do about it.
fn refusal(status: StatusCode, body: &[u8], message: impl FnOnce(&str) -> String) -> StepError {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = answer.get("error");
    let said = error
        .and_then(|error| error.get("message").or(answer.get("error_description")).or(Some(error)))
        .and_then(Value::as_str)
        .map_or_else(
            || format!("status {}", status.as_u16()),
            |said| format!("status {}: {said}", status.as_u16()),
        );
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        StepError::Passing(said.into())
    } else {
        StepError::Final(SourceError::Credentials { message: message(&said), cause: None })
    }
}

fn access_token(body: &[u8], field: &str, who: &str) -> Result<Granted, StepError> {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let token = answer.get(field).and_then(Value::as_str).filter(|token| !token.is_empty());
    let lasts = answer.get("expires_in").and_then(Value::as_u64).unwrap_or_default();
    token
        .map(|token| Granted { token: token.to_owned(), lasts: Duration::from_secs(lasts) })
        .ok_or_else(|| StepError::Passing(format!("the answer of {who} has no token").into()))
}
