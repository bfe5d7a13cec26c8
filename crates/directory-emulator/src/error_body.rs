use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// An answer of the API that is no success, in the shape that Google gives it.
#[derive(Clone, Debug)]
pub(crate) struct ApiError(Box<Details>);

#[derive(Clone, Debug)]
struct Details {
    status: StatusCode,
    reason: String,
    message: String,
    /// The message of the inner error, where Google words it differently.
    detail: Option<&'static str>,
    domain: &'static str,
    location: Option<(&'static str, String)>,
    canonical: Option<&'static str>,
    headers: Vec<(HeaderName, String)>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self(Box::new(Details {
            status,
            reason: reason.into(),
            message: message.into(),
            detail: None,
            domain: "global",
            location: None,
            canonical: None,
            headers: Vec::new(),
        }))
    }

    /// What a fault answers: the domain and the message that Google uses with this reason.
    pub(crate) fn scripted(status: StatusCode, reason: &str, retry_after_seconds: Option<u64>) -> Self {
        let mut error = Self::new(status, reason, scripted_message(reason));
        if matches!(
            reason,
            "userRateLimitExceeded" | "rateLimitExceeded" | "quotaExceeded" | "dailyLimitExceeded"
        ) {
            error.0.domain = "usageLimits";
        }
        error.0.headers.extend(retry_after_seconds.map(|seconds| (RETRY_AFTER, seconds.to_string())));
        error
    }

    /// A parameter or key whose value the API does not take.
    pub(crate) fn invalid_input(name: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", format!("Invalid Input: {name}"))
    }

    /// A parameter that breaks the rules of the discovery document.
    pub(crate) fn invalid_parameter(name: &str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalidParameter", message);
        error.0.location = Some(("parameter", name.to_owned()));
        error
    }

    pub(crate) fn bad_request() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "badRequest", "Bad Request")
    }

    /// No object has the key that was given as this part of the path or this parameter.
    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "notFound", format!("Resource Not Found: {what}"))
    }

    pub(crate) fn domain_not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "notFound", "Domain not found.")
    }

    pub(crate) fn no_such_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, "notFound", "Not Found")
    }

    pub(crate) fn read_only() -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "httpMethodNotAllowed",
            "The directory emulator answers GET only; change the directory with replace_directory.",
        )
    }

    pub(crate) fn forbidden() -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", "Not Authorized to access this resource/api")
    }

    pub(crate) fn quota_exceeded() -> Self {
        Self::scripted(StatusCode::FORBIDDEN, "quotaExceeded", None)
    }

    pub(crate) fn account_rate_exceeded(retry_after_seconds: u64) -> Self {
        Self::scripted(StatusCode::TOO_MANY_REQUESTS, "rateLimitExceeded", Some(retry_after_seconds))
    }

    pub(crate) fn unauthenticated() -> Self {
        let mut error = Self::new(
            StatusCode::UNAUTHORIZED,
            "authError",
            "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or \
             other valid authentication credential. See \
             https://developers.google.com/identity/sign-in/web/devconsole-project.",
        );
        error.0.detail = Some("Invalid Credentials");
        error.0.location = Some(("header", "Authorization".to_owned()));
        error.0.canonical = Some("UNAUTHENTICATED");
        error.0.headers.push((
            WWW_AUTHENTICATE,
            r#"Bearer realm="https://accounts.google.com/", error="invalid_token""#.to_owned(),
        ));
        error
    }

    pub(crate) fn insufficient_scopes(accepted: &[&str]) -> Self {
        let mut error = Self::new(
            StatusCode::FORBIDDEN,
            "insufficientPermissions",
            "Request had insufficient authentication scopes.",
        );
        error.0.detail = Some("Insufficient Permission");
        error.0.canonical = Some("PERMISSION_DENIED");
        error.0.headers.push((
            WWW_AUTHENTICATE,
            format!(
                r#"Bearer realm="https://accounts.google.com/", error="insufficient_scope", scope="{}""#,
                accepted.join(" ")
            ),
        ));
        error
    }

    fn body(&self) -> Value {
        let error = &self.0;
        let mut inner = json!({
            "message": error.detail.unwrap_or(&error.message),
            "domain": error.domain,
            "reason": error.reason,
        });
        if let (Some((kind, location)), Some(inner)) = (&error.location, inner.as_object_mut()) {
            inner.insert("location".to_owned(), json!(location));
            inner.insert("locationType".to_owned(), json!(kind));
        }
        let mut outer = json!({"code": error.status.as_u16(), "message": error.message, "errors": [inner]});
        if let (Some(canonical), Some(outer)) = (error.canonical, outer.as_object_mut()) {
            outer.insert("status".to_owned(), json!(canonical));
        }
        json!({"error": outer})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.0.status, &self.body());
        for (name, value) in self.0.headers {
            if let Ok(value) = HeaderValue::try_from(value) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

/// Why the token endpoint gives no token, in the shape of OAuth 2.
#[derive(Clone, Debug)]
pub(crate) struct TokenRefusal {
    status: StatusCode,
    error: &'static str,
    description: &'static str,
}

impl TokenRefusal {
    pub(crate) fn bad_request(error: &'static str, description: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, error, description }
    }

    pub(crate) fn invalid_grant(description: &'static str) -> Self {
        Self::bad_request("invalid_grant", description)
    }

    pub(crate) fn unauthorized_client() -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            error: "unauthorized_client",
            description: "Client is unauthorized to retrieve access tokens using this method, or client not \
                          authorized for any of the scopes requested.",
        }
    }
}

impl IntoResponse for TokenRefusal {
    fn into_response(self) -> Response {
        no_store(json_response(
            self.status,
            &json!({"error": self.error, "error_description": self.description}),
        ))
    }
}

/// Marks an answer of the token endpoint as one that no cache may keep.
pub(crate) fn no_store(mut response: Response) -> Response {
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response {
    let content_type = HeaderValue::from_static("application/json; charset=UTF-8");
    (status, [(CONTENT_TYPE, content_type)], body.to_string()).into_response()
}

fn scripted_message(reason: &str) -> &str {
    match reason {
        "quotaExceeded" => {
            "Quota exceeded for quota metric 'Queries' and limit 'Queries per minute per user' of service \
             'admin.googleapis.com' for consumer 'project_number:100000000000'."
        }
        "rateLimitExceeded" => "Rate Limit Exceeded",
        "userRateLimitExceeded" => "User Rate Limit Exceeded",
        "backendError" => "Service unavailable. Please try again",
        "internalError" => "Internal error encountered.",
        "forbidden" => "Not Authorized to access this resource/api",
        "domainCannotUseApis" => "Domain cannot use apis.",
        "insufficientPermissions" => "Request had insufficient authentication scopes.",
        "notFound" => "Resource Not Found: groupKey",
        "conditionNotMet" => "User is deleted.",
        "authError" => "Invalid Credentials",
        other => other,
    }
}
