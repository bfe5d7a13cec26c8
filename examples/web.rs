//! An axum service whose routes demand permits, and what it answers to whom.
//!
//! `cargo run --example web`; nothing has to be set up.

use std::error::Error;
use std::net::SocketAddr;

use authz::audit::Actor;
use authz::grant::{self, Grant};
use authz::web::{Authorized, Gate, Rejection};
use authz::{ActionName, ActionPattern, Authz, On, Permit, UserName, action, user};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::request::Parts;
use axum::routing::{get, post};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type Failure = Box<dyn Error + Send + Sync>;

authz::actions! {
    const ACTIONS;

    /// Look at the queue.
    pub QueueRead = "queue.read";
    /// Set a role's number of workers.
    pub WorkersScale = "workers.scale";
}

/// What the service does. Nobody can call these functions without the permit of just that action.
mod operations {
    use super::{On, Permit, QueueRead, WorkersScale};

    pub(crate) fn read_queue(permit: &Permit<QueueRead>) -> String {
        format!("the queue is empty, {}", permit.user())
    }

    /// The role is the permit's: there is no parameter that could name another.
    pub(crate) fn scale(permit: &Permit<On<WorkersScale>>) -> String {
        format!("{} scaled {}", permit.user(), permit.resource())
    }
}

async fn queue(Authorized(permit): Authorized<QueueRead>) -> String {
    operations::read_queue(&permit)
}

async fn scale(
    State(gate): State<Gate>,
    Path(role): Path<String>,
    parts: Parts,
) -> Result<String, Rejection> {
    let permit = gate.authorize_on(&parts, &role).await?;
    Ok(operations::scale(&permit))
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let database = testdb::Database::empty().await?;
    let pool = PgPool::connect(database.url()).await?;
    seed(&pool).await?;

    // The proxy in front would set this header after log-in, and strip it from what comes from outside.
    let gate = Gate::new(Authz::new(pool.clone()), |parts| {
        UserName::parse(parts.headers.get("x-forwarded-user")?.to_str().ok()?).ok()
    })
    .reveal_reason(true);
    let app =
        Router::new().route("/queue", get(queue)).route("/workers/{role}", post(scale)).with_state(gate);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let server = tokio::spawn(async move { axum::serve(listener, app).await });

    ask(address, "GET", "/queue", None).await?; // 401
    ask(address, "GET", "/queue", Some("ada@example.com")).await?; // 200
    ask(address, "POST", "/workers/web", Some("ada@example.com")).await?; // 200
    ask(address, "POST", "/workers/ads-team", Some("ada@example.com")).await?; // 403: not her role
    ask(address, "POST", "/workers/No%20Role", Some("ada@example.com")).await?; // 404
    pool.close().await;
    ask(address, "GET", "/queue", Some("ada@example.com")).await?; // 503: nobody can tell
    server.abort();
    Ok(())
}

/// Tables, actions, and Ada with two rights. A resource's action is registered when the resource is made.
async fn seed(pool: &PgPool) -> Result<(), Failure> {
    let me = Actor::new("ops-dashboard", "ops-dashboard");
    let ada = UserName::parse("ada@example.com")?;
    authz::migrate(pool).await?;
    action::register(pool, ACTIONS, &me).await?;
    let roles = [
        (ActionName::parse("workers.scale.web")?, "Scale role web"),
        (ActionName::parse("workers.scale.ads-team")?, "Scale role ads-team"),
    ];
    action::register(pool, &roles, &me).await?;
    user::create(pool, &ada, "Ada Lovelace", &me).await?;
    for pattern in ["queue.*", "workers.scale.web"] {
        let grant = Grant::new(ActionPattern::parse(pattern)?, "she is on call");
        grant::to_user(pool, &ada, &grant, &me).await?;
    }
    Ok(())
}

/// One request by hand, and its answer.
async fn ask(address: SocketAddr, method: &str, path: &str, user: Option<&str>) -> Result<(), Failure> {
    let login = user.map(|user| format!("x-forwarded-user: {user}\r\n")).unwrap_or_default();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: 0\r\n{login}\r\n"
    );
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the answer has no end of its head")?;
    let status = head.lines().next().unwrap_or_default();
    println!("{method:<4} {path:<20} {:<16} {status}\n     {body}", user.unwrap_or("nobody"));
    Ok(())
}
