use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::call_log::CallLog;
use crate::error_body::{ApiError, json_response, no_store};
use crate::fault::{Effect, Faults, Framing};
use crate::quota::Quota;
use crate::service_account::ServiceAccount;
use crate::token::Tokens;
use crate::{Directory, Options, api, keyless, token};

/// What all connections see.
#[derive(Debug)]
pub(crate) struct Shared {
    directory: RwLock<Arc<Directory>>,
    pub(crate) account: ServiceAccount,
    pub(crate) subject: String,
    pub(crate) token_uri: String,
    pub(crate) tokens: Tokens,
    pub(crate) faults: Faults,
    pub(crate) api_calls: CallLog,
    pub(crate) token_calls: CallLog,
    pub(crate) not_delegated: Vec<String>,
    pub(crate) account_is_admin: bool,
    quota: Mutex<Quota>,
}

impl Shared {
    pub(crate) fn new(
        directory: Directory,
        account: ServiceAccount,
        subject: String,
        token_uri: String,
        options: &Options,
    ) -> Self {
        Self {
            directory: RwLock::new(Arc::new(directory)),
            account,
            subject,
            token_uri,
            tokens: Tokens::new(options.token_lifetime),
            faults: Faults::default(),
            api_calls: CallLog::default(),
            token_calls: CallLog::default(),
            not_delegated: options.not_delegated.clone(),
            account_is_admin: options.account_is_admin,
            quota: Mutex::new(Quota::new(options.user_quota_per_minute, options.account_quota_per_minute)),
        }
    }

    /// The directory of this moment; a call keeps the one it started with.
    pub(crate) fn directory(&self) -> Arc<Directory> {
        Arc::clone(&self.directory.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn replace_directory(&self, directory: Arc<Directory>) {
        *self.directory.write().unwrap_or_else(PoisonError::into_inner) = directory;
    }

    pub(crate) fn quota(&self) -> MutexGuard<'_, Quota> {
        self.quota.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_subject(&self, email: &str) -> bool {
        self.subject.eq_ignore_ascii_case(email)
    }
}

/// What a fault does to a listing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shaping {
    pub(crate) empty: bool,
    pub(crate) repeat_page_token: bool,
}

/// A response with this mark is not sent; the connection is closed in its place.
#[derive(Clone, Copy, Debug)]
struct CloseConnection;

#[derive(Debug, thiserror::Error)]
#[error("a fault closes this connection")]
struct ClosedByFault;

/// Takes connections until the task is aborted, and all connections with it.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let router = Router::new()
        .route("/token", post(token::token))
        .route("/computeMetadata/v1/instance/service-accounts/default/{what}", get(keyless::metadata))
        .route("/v1/projects/-/serviceAccounts/{account}", post(keyless::credentials))
        .route("/v1/token", post(keyless::exchange))
        .fallback(api::answer)
        .layer(from_fn_with_state(Arc::clone(&shared), observe))
        .with_state(shared);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => { connections.spawn(serve_connection(stream, router.clone())); }
                // Out of file handles, most likely: leave the others time to end.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_connection(stream: TcpStream, router: Router) {
    // Without this, small answers wait for an acknowledgement.
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let closing = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
        let answer = service.call(request);
        async move {
            let response = answer.await.unwrap_or_else(|never: Infallible| match never {});
            match response.extensions().get::<CloseConnection>() {
                Some(CloseConnection) => Err(ClosedByFault),
                None => Ok(response),
            }
        }
    });
    // A client that goes away is its own affair, and a closed connection is an effect asked for.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), closing).await;
}

/// Notes the call and lets the faults strike it.
async fn observe(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let is_token = request.uri().path() == "/token";
    let path = request.uri().path();
    let is_sign_in = is_token || keyless::is_keyless_path(path);
    let log = if is_sign_in { &shared.token_calls } else { &shared.api_calls };
    let number = log.begin(request.method().as_str(), path, request.uri().query().unwrap_or_default());

    let mut shaping = Shaping::default();
    let mut instead = None;
    let mut cut = None;
    for effect in shared.faults.strike(path, &shared.directory()) {
        match effect {
            Effect::Delay(duration) => tokio::time::sleep(duration).await,
            Effect::Hold(gate) => gate.pass().await,
            Effect::ReplaceDirectory(directory) => shared.replace_directory(directory),
            Effect::EmptyListing => shaping.empty = true,
            Effect::RepeatPageToken => shaping.repeat_page_token = true,
            Effect::CutShort(framing) => cut = cut.or(Some(framing)),
            Effect::CloseConnection => {
                instead.get_or_insert_with(|| Extended(CloseConnection).into_response());
            }
            Effect::Status { status, reason, retry_after_seconds } => {
                instead.get_or_insert_with(|| scripted(is_token, status, &reason, retry_after_seconds));
            }
        }
    }

    request.extensions_mut().insert(shaping);
    let mut response = match instead {
        Some(response) => response,
        None => next.run(request).await,
    };
    if let Some(framing) = cut {
        response = cut_short(response, framing).await;
    }
    if response.extensions().get::<CloseConnection>().is_none() {
        log.finish(number, response.status().as_u16());
    }
    response
}

struct Extended(CloseConnection);

impl IntoResponse for Extended {
    fn into_response(self) -> Response {
        let mut response = StatusCode::OK.into_response();
        response.extensions_mut().insert(self.0);
        response
    }
}

fn scripted(is_token: bool, status: u16, reason: &str, retry_after_seconds: Option<u64>) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if is_token {
        return no_store(json_response(status, &json!({"error": reason, "error_description": reason})));
    }
    ApiError::scripted(status, reason, retry_after_seconds).into_response()
}

/// Sends the first half of the body, then breaks the connection.
async fn cut_short(response: Response, framing: Framing) -> Response {
    let (mut parts, body) = response.into_parts();
    let Ok(whole) = to_bytes(body, usize::MAX).await else {
        return Extended(CloseConnection).into_response();
    };
    parts.headers.remove(CONTENT_LENGTH);
    if framing == Framing::ContentLength {
        parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(whole.len()));
    }
    let half = whole.slice(..whole.len() / 2);
    let breaking = stream::unfold(Some(half), |half| async move {
        if let Some(half) = half {
            return Some((Ok::<Bytes, io::Error>(half), None));
        }
        // Without a pause the half would be thrown away with the connection.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Some((Err(io::Error::other("a fault cuts this answer short")), None))
    });
    Response::from_parts(parts, Body::from_stream(breaking))
}
