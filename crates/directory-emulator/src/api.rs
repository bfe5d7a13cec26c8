use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Extension, State};
use axum::http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH,
    USER_AGENT, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use flate2::Compression;
use flate2::write::GzEncoder;
use percent_encoding::percent_decode_str;
use ring::digest::{SHA256, digest};
use serde_json::Value;

use crate::error_body::ApiError;
use crate::fields::{Schema, Selection};
use crate::parameters::Parameters;
use crate::quota::Exceeded;
use crate::server::{Shaping, Shared};
use crate::{clock, groups, members, users};

const USER_SCOPES: [&str; 2] = [
    "https://www.googleapis.com/auth/admin.directory.user",
    "https://www.googleapis.com/auth/admin.directory.user.readonly",
];
const GROUP_SCOPES: [&str; 2] = [
    "https://www.googleapis.com/auth/admin.directory.group",
    "https://www.googleapis.com/auth/admin.directory.group.readonly",
];
const MEMBER_SCOPES: [&str; 4] = [
    "https://www.googleapis.com/auth/admin.directory.group",
    "https://www.googleapis.com/auth/admin.directory.group.readonly",
    "https://www.googleapis.com/auth/admin.directory.group.member",
    "https://www.googleapis.com/auth/admin.directory.group.member.readonly",
];

/// Which call a path stands for, with its keys decoded.
enum Route {
    Users,
    User(String),
    Groups,
    Group(String),
    Members(String),
    Member(String, String),
    HasMember(String, String),
}

impl Route {
    /// A slash inside a key arrives as `%2F`, so the path is taken apart before it is decoded.
    fn of(path: &str) -> Option<Self> {
        let rest = path.strip_prefix("/admin/directory/v1/")?;
        let segments: Vec<String> = rest
            .split('/')
            .map(|segment| percent_decode_str(segment).decode_utf8().ok().map(String::from))
            .collect::<Option<_>>()?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        if segments.contains(&"") {
            return None;
        }
        match segments.as_slice() {
            ["users"] => Some(Self::Users),
            ["users", user] => Some(Self::User((*user).to_owned())),
            ["groups"] => Some(Self::Groups),
            ["groups", group] => Some(Self::Group((*group).to_owned())),
            ["groups", group, "members"] => Some(Self::Members((*group).to_owned())),
            ["groups", group, "members", member] => {
                Some(Self::Member((*group).to_owned(), (*member).to_owned()))
            }
            ["groups", group, "hasMember", member] => {
                Some(Self::HasMember((*group).to_owned(), (*member).to_owned()))
            }
            _ => None,
        }
    }

    fn scopes(&self) -> &'static [&'static str] {
        match self {
            Self::Users | Self::User(_) => &USER_SCOPES,
            Self::Groups | Self::Group(_) => &GROUP_SCOPES,
            Self::Members(_) | Self::Member(..) | Self::HasMember(..) => &MEMBER_SCOPES,
        }
    }

    fn schema(&self) -> Schema {
        match self {
            Self::Users => Schema::Users,
            Self::User(_) => Schema::User,
            Self::Groups => Schema::Groups,
            Self::Group(_) => Schema::Group,
            Self::Members(_) => Schema::Members,
            Self::Member(..) => Schema::Member,
            Self::HasMember(..) => Schema::HasMember,
        }
    }
}

/// Every call but that of the token endpoint.
pub(crate) async fn answer(
    State(shared): State<Arc<Shared>>,
    Extension(shaping): Extension<Shaping>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let response =
        call(&shared, shaping, &method, &uri, &headers).unwrap_or_else(IntoResponse::into_response);
    // Holds for errors too: what is written depends on these headers.
    with_header(response, VARY, "Accept-Encoding, User-Agent")
}

fn call(
    shared: &Shared,
    shaping: Shaping,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let route = Route::of(uri.path()).ok_or_else(ApiError::no_such_path)?;
    authorise(shared, headers, route.scopes())?;
    if method != Method::GET {
        return Err(ApiError::read_only());
    }
    let parameters = Parameters::of(uri)?;
    parameters.one_of("alt", &["json"])?;
    let selection =
        parameters.get("fields").map(|fields| Selection::parse(fields, route.schema())).transpose()?;

    let directory = shared.directory();
    let path = uri.path();
    let body = match &route {
        Route::Users => users::list(&directory, &shared.subject, path, &parameters, shaping)?,
        Route::User(key) => users::get(&directory, key, &parameters)?,
        Route::Groups => groups::list(&directory, &shared.subject, path, &parameters, shaping)?,
        Route::Group(key) => groups::get(&directory, key)?,
        Route::Members(group) => members::list(&directory, group, path, &parameters, shaping)?,
        Route::Member(group, member) => members::get(&directory, group, member)?,
        Route::HasMember(group, member) => members::has_member(&directory, group, member)?,
    };

    let etag = body.get("etag").and_then(Value::as_str).map(str::to_owned);
    let body = match selection {
        Some(selection) => selection.apply(body),
        None => body,
    };
    let pretty = parameters.flag("prettyPrint")?;
    let text = if pretty { format!("{body:#}") } else { body.to_string() };
    let etag =
        etag.unwrap_or_else(|| format!("\"{}\"", URL_SAFE_NO_PAD.encode(digest(&SHA256, text.as_bytes()))));
    Ok(written(text, &etag, headers))
}

/// Refuses a call without a good token, without the scope, over the quota or by one who is no administrator.
fn authorise(shared: &Shared, headers: &HeaderMap, scopes: &[&str]) -> Result<(), ApiError> {
    let access = bearer_token_of(headers)
        .and_then(|token| shared.tokens.access(token, clock::unix_now()))
        .ok_or_else(ApiError::unauthenticated)?;
    if !access.scopes.iter().any(|scope| scopes.contains(&scope.as_str())) {
        return Err(ApiError::insufficient_scopes(scopes));
    }
    let counted = shared.quota().take(access.subject.as_deref(), Instant::now());
    counted.map_err(|exceeded| match exceeded {
        Exceeded::User => ApiError::quota_exceeded(),
        Exceeded::Account(remaining) => ApiError::account_rate_exceeded(remaining.as_secs().max(1)),
    })?;
    let Some(subject) = access.subject else {
        return if shared.account_is_admin { Ok(()) } else { Err(ApiError::forbidden()) };
    };
    let directory = shared.directory();
    let is_admin =
        || directory.user(&subject).and_then(|user| user.get("isAdmin")) == Some(&Value::Bool(true));
    if shared.is_subject(&subject) || is_admin() { Ok(()) } else { Err(ApiError::forbidden()) }
}

pub(crate) fn bearer_token_of(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(bearer_token)
}

fn bearer_token(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn written(text: String, etag: &str, headers: &HeaderMap) -> Response {
    if says(headers, &IF_NONE_MATCH, |known| {
        known == "*" || known.split(',').any(|known| known.trim() == etag)
    }) {
        return with_header(StatusCode::NOT_MODIFIED.into_response(), ETAG, etag);
    }
    let gzip = |value: &str| value.to_ascii_lowercase().contains("gzip");
    // Google packs only for clients that say it twice.
    let packed = if says(headers, &ACCEPT_ENCODING, gzip) && says(headers, &USER_AGENT, gzip) {
        packed(text.as_bytes())
    } else {
        None
    };
    let response = match packed {
        Some(bytes) => with_header(bytes.into_response(), CONTENT_ENCODING, "gzip"),
        None => text.into_response(),
    };
    with_header(with_header(response, CONTENT_TYPE, "application/json; charset=UTF-8"), ETAG, etag)
}

fn packed(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).ok()?;
    encoder.finish().ok()
}

fn says(headers: &HeaderMap, name: &HeaderName, test: impl Fn(&str) -> bool) -> bool {
    headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(test)
}

fn with_header(mut response: Response, name: HeaderName, value: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}
