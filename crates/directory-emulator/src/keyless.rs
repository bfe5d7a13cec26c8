use std::path::Path;
use std::sync::Arc;

use axum::Form;
use axum::Json;
use axum::extract::rejection::{FormRejection, JsonRejection};
use axum::extract::{Path as PathParameter, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::bearer_token_of;
use crate::clock;
use crate::error_body::{ApiError, TokenRefusal, json_response, no_store};
use crate::server::Shared;
use crate::service_account::CLIENT_EMAIL;

/// What the tokens of a machine or a federated identity are for: everything in the cloud, nothing in the directory.
const CLOUD_SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";

/// Paths of the metadata server, the credentials API and the token exchange, which are no calls of the directory API.
pub(crate) fn is_keyless_path(path: &str) -> bool {
    path.starts_with("/computeMetadata/") || path.starts_with("/v1/projects/") || path == "/v1/token"
}

/// `GET /computeMetadata/v1/instance/service-accounts/default/{what}`
pub(crate) async fn metadata(
    State(shared): State<Arc<Shared>>,
    PathParameter(what): PathParameter<String>,
    headers: HeaderMap,
) -> Response {
    // Without this header the request may have been tricked out of a browser.
    if headers.get("metadata-flavor").is_none_or(|flavor| flavor != "Google") {
        return (StatusCode::FORBIDDEN, "Missing required header \"Metadata-Flavor\": \"Google\".")
            .into_response();
    }
    match what.as_str() {
        "email" => CLIENT_EMAIL.into_response(),
        "token" => match cloud_token(&shared) {
            Ok(body) => no_store(json_response(StatusCode::OK, &body)),
            Err(refusal) => refusal.into_response(),
        },
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

#[derive(Deserialize)]
pub(crate) struct Exchange {
    grant_type: Option<String>,
    audience: Option<String>,
    subject_token: Option<String>,
    scope: Option<String>,
}

/// `POST /v1/token`: any subject token will do.
pub(crate) async fn exchange(
    State(shared): State<Arc<Shared>>,
    request: Result<Form<Exchange>, FormRejection>,
) -> Response {
    let answered = match request {
        Ok(Form(asked))
            if asked.grant_type.as_deref() == Some("urn:ietf:params:oauth:grant-type:token-exchange")
                && asked.audience.as_deref().is_some_and(|audience| !audience.is_empty())
                && asked.subject_token.as_deref().is_some_and(|token| !token.trim().is_empty())
                && asked.scope.as_deref() == Some(CLOUD_SCOPE) =>
        {
            cloud_token(&shared)
        }
        _ => Err(TokenRefusal::bad_request(
            "invalid_request",
            "This is no token exchange for the cloud-platform scope.",
        )),
    };
    match answered {
        Ok(body) => no_store(json_response(StatusCode::OK, &body)),
        Err(refusal) => refusal.into_response(),
    }
}

/// `POST /v1/projects/-/serviceAccounts/{account}:signJwt` and `:generateAccessToken`
pub(crate) async fn credentials(
    State(shared): State<Arc<Shared>>,
    PathParameter(account): PathParameter<String>,
    headers: HeaderMap,
    body: Result<Json<Value>, JsonRejection>,
) -> Response {
    let answered = body
        .map_err(|_| ApiError::bad_request())
        .and_then(|Json(body)| for_account(&shared, &account, &headers, &body));
    match answered {
        Ok(body) => no_store(json_response(StatusCode::OK, &body)),
        Err(error) => error.into_response(),
    }
}

fn for_account(shared: &Shared, account: &str, headers: &HeaderMap, body: &Value) -> Result<Value, ApiError> {
    let access = bearer_token_of(headers)
        .and_then(|token| shared.tokens.access(token, clock::unix_now()))
        .ok_or_else(ApiError::unauthenticated)?;
    if !access.scopes.iter().any(|scope| scope == CLOUD_SCOPE) {
        return Err(ApiError::insufficient_scopes(&[CLOUD_SCOPE]));
    }
    match account.rsplit_once(':') {
        Some((CLIENT_EMAIL, "signJwt")) => {
            let claims = body.get("payload").and_then(Value::as_str).ok_or_else(ApiError::bad_request)?;
            let (key_id, signed) = shared.account.sign(claims).ok_or_else(ApiError::bad_request)?;
            Ok(json!({"keyId": key_id, "signedJwt": signed}))
        }
        Some((CLIENT_EMAIL, "generateAccessToken")) => {
            let granted = cloud_token(shared).map_err(|_| ApiError::bad_request())?;
            Ok(json!({"accessToken": granted.get("access_token"), "expireTime": "2100-01-01T00:00:00Z"}))
        }
        Some((_, "signJwt" | "generateAccessToken")) => {
            Err(ApiError::new(StatusCode::NOT_FOUND, "notFound", "Not found; Gaia id not found for email"))
        }
        _ => Err(ApiError::no_such_path()),
    }
}

fn cloud_token(shared: &Shared) -> Result<Value, TokenRefusal> {
    shared.tokens.grant(None, vec![CLOUD_SCOPE.to_owned()], clock::unix_now())
}

/// The text of a file with which a workload outside of Google's cloud signs in, by the token in this other file.
pub(crate) fn external_account_file(url: &str, subject_token: &Path, impersonate: bool) -> String {
    let mut file = json!({
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/cluster/providers/cluster",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": format!("{url}v1/token"),
        "credential_source": {"file": subject_token},
    });
    if impersonate && let Some(fields) = file.as_object_mut() {
        let path = format!("{url}v1/projects/-/serviceAccounts/{CLIENT_EMAIL}:generateAccessToken");
        fields.insert("service_account_impersonation_url".to_owned(), json!(path));
    }
    format!("{file:#}\n")
}
