//! The layer and the extractor: who passes, what the others are told, and that nobody passes unasked.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use authz::audit::operation::OperationError;
use authz::grant::{self, Grant};
use authz::web::{Authorized, Gate, Rejection};
use authz::{Authz, On, Permit, Sub, UserName, action, user};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::get;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use sqlx::PgPool;
use support::{action as a, admin, pattern as p, user as u};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

authz::actions! {
    const ACTIONS;

    /// Look at the queue.
    QueueRead = "queue.read";
    /// Set a role's number of workers.
    WorkersScale = "workers.scale";
}

const ADA: &str = "ada@example.com";
const BOB: &str = "bob@example.com";

/// Ada may read the queue and scale role web; Bob may do nothing.
async fn world() -> (testdb::Database, PgPool) {
    let (database, pool) = support::database().await;
    action::register(&pool, ACTIONS, &admin()).await.unwrap();
    let roles = [(a("workers.scale.web"), ""), (a("workers.scale.ads"), "")];
    action::register(&pool, &roles, &admin()).await.unwrap();
    for name in [ADA, BOB] {
        user::create(&pool, &u(name), "", &admin()).await.unwrap();
    }
    for pattern in ["queue.read", "workers.scale.web"] {
        grant::to_user(&pool, &u(ADA), &Grant::new(p(pattern), ""), &admin()).await.unwrap();
    }
    (database, pool)
}

fn gate(pool: &PgPool) -> Gate {
    Gate::new(Authz::new(pool.clone()), |parts| named(parts, "x-user"))
}

fn named(parts: &Parts, header: &str) -> Option<UserName> {
    UserName::parse(parts.headers.get(header)?.to_str().ok()?).ok()
}

fn request(path: &str, user: Option<&str>) -> Request {
    let builder = Request::builder().uri(path);
    let builder = match user {
        Some(user) => builder.header("x-user", user),
        None => builder,
    };
    builder.body(Body::empty()).unwrap()
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn problem(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/problem+json");
        assert_eq!(self.headers["cache-control"], "no-store");
        serde_json::from_str(&self.body).unwrap()
    }
}

async fn send<S>(service: S, request: Request) -> Answer
where
    S: Service<Request, Response = Response<Body>, Error = Infallible>,
{
    let (parts, body) = service.oneshot(request).await.unwrap().into_parts();
    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    Answer { status: parts.status, headers: parts.headers, body }
}

#[tokio::test]
async fn operation_behind_a_gate_records_who_may_not() {
    let (_database, pool) = world().await;
    let (gate, authz) = (gate(&pool), Authz::new(pool.clone()).service("dashboard"));
    let handler = async move |parts: Parts| {
        let user = gate.user(&parts)?;
        match authz.operation::<QueueRead>(&user).run(async |_| Ok::<_, Infallible>("seen")).await {
            Ok(seen) => Ok(seen),
            Err(OperationError::Refused(refusal)) => Err(gate.refused(refusal)),
            Err(other) => panic!("{other}"),
        }
    };
    for (user, status) in [(Some(ADA), 200), (Some(BOB), 403), (None, 401)] {
        let (parts, _) = request("/queue", user).into_parts();
        let answer = handler(parts).await.map_or_else(|rejection| rejection.status(), |_| StatusCode::OK);
        assert_eq!(answer.as_u16(), status, "{user:?}");
    }
    let denied = "select actor from authz.audit_log where outcome = 'denied'";
    assert_eq!(sqlx::query_scalar::<_, String>(denied).fetch_all(&pool).await.unwrap(), [BOB]);
}

/// Behind the layer, whose permit is shared, and behind the extractor alone.
#[tokio::test]
async fn permit_of_a_gate_is_that_of_an_operation() {
    let (_database, pool) = world().await;
    let gate = gate(&pool);
    let authz = Authz::new(pool.clone()).service("dashboard");
    // The parts still hold the layer's permit.
    let handler = async move |_parts: Parts, permit: Authorized<QueueRead>| {
        let looking = authz.operation_permitted(permit).target("the queue");
        let seen = looking.run(async |permit| Ok::<_, Infallible>(permit.user().to_string()));
        seen.await.map_err(|error| error.to_string())
    };
    let extracted = Router::new().route("/queue", get(handler)).with_state(gate.clone());
    let layered = extracted.clone().layer(gate.layer::<QueueRead>());
    for app in [extracted, layered] {
        let answer = send(app, request("/queue", Some(ADA))).await;
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, ADA));
    }
    let recorded = "select actor, action, target, outcome from authz.audit_log where service = 'dashboard' order by audit_id";
    let recorded: Vec<(String, String, String, String)> =
        sqlx::query_as(recorded).fetch_all(&pool).await.unwrap();
    let outcomes = ["started", "succeeded"].iter().cycle();
    let wanted = outcomes.map(|outcome| [ADA, "queue.read", "the queue", outcome].map(str::to_owned).into());
    assert_eq!(recorded, wanted.take(4).collect::<Vec<_>>());
}

/// The same action behind the layer and behind the extractor, which must answer alike.
fn both(gate: &Gate, ran: &Arc<AtomicUsize>) -> [Router; 2] {
    let (one, two) = (Arc::clone(ran), Arc::clone(ran));
    let layered = Router::new()
        .route(
            "/queue",
            get(async move |request: Request| {
                one.fetch_add(1, Ordering::SeqCst);
                let permit = request.extensions().get::<Arc<Permit<QueueRead>>>().unwrap();
                format!("{} may {}", permit.user(), permit.action())
            }),
        )
        .layer(gate.layer::<QueueRead>());
    let extracted = Router::new()
        .route(
            "/queue",
            get(async move |permit: Authorized<QueueRead>| {
                two.fetch_add(1, Ordering::SeqCst);
                format!("{} may {}", permit.user(), permit.action())
            }),
        )
        .with_state(gate.clone());
    [layered, extracted]
}

#[tokio::test]
async fn permit_reaches_the_handler() {
    let (_database, pool) = world().await;
    let ran = Arc::default();
    for app in both(&gate(&pool), &ran) {
        let answer = send(app, request("/queue", Some(ADA))).await;
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "ada@example.com may queue.read"));
    }
    assert_eq!(ran.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn refused_requests_do_not_reach_the_handler() {
    let (_database, pool) = world().await;
    let ran = Arc::default();
    let gate = gate(&pool).challenge("Bearer realm=\"ops\"").unwrap();
    for app in both(&gate, &ran) {
        for user in [None, Some(""), Some("not a name")] {
            let answer = send(app.clone(), request("/queue", user)).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
            assert_eq!(answer.headers["www-authenticate"], "Bearer realm=\"ops\"");
            assert_eq!(answer.problem()["status"], 401);
        }
        let answer = send(app.clone(), request("/queue", Some(BOB))).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN);
        assert_eq!(answer.problem(), json!({"title": "Forbidden", "status": 403}));
        let answer = send(app, request("/queue", Some("nobody@example.com"))).await;
        assert_eq!(answer.problem(), json!({"title": "Forbidden", "status": 403}));
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn reason_is_told_only_if_asked_for() {
    let (_database, pool) = world().await;
    for app in both(&gate(&pool).reveal_reason(true), &Arc::default()) {
        let answer = send(app, request("/queue", Some(BOB))).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN);
        assert_eq!(
            answer.problem()["detail"],
            "`bob@example.com` may not do `queue.read`: no grant covers it"
        );
    }
}

#[tokio::test]
async fn suspended_user_is_refused() {
    let (_database, pool) = world().await;
    sqlx::query("update authz.users set status = 'suspended' where user_name = $1")
        .bind(ADA)
        .execute(&pool)
        .await
        .unwrap();
    for app in both(&gate(&pool), &Arc::default()) {
        assert_eq!(send(app, request("/queue", Some(ADA))).await.status, StatusCode::FORBIDDEN);
    }
}

#[tokio::test]
async fn undecided_is_unavailable_and_tells_no_cause() {
    let (_database, pool) = world().await;
    pool.close().await;
    let ran = Arc::default();
    let unknown =
        Gate::new(Authz::new(pool.clone()), |_| Err::<Option<UserName>, _>("secret: login is down"));
    for gate in [gate(&pool).reveal_reason(true), unknown] {
        for app in both(&gate, &ran) {
            let answer = send(app, request("/queue", Some(ADA))).await;
            assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(answer.headers["retry-after"], "5");
            let detail = "whether you may could not be found out; try again later";
            let problem = json!({"title": "Service Unavailable", "status": 503, "detail": detail});
            assert_eq!(answer.problem(), problem);
        }
    }
    assert_eq!(ran.load(Ordering::SeqCst), 0);
}

/// Behind the layer, and asked for in the handler.
fn both_on_role(gate: &Gate) -> [Router; 2] {
    let role = |parts: &Parts| parts.uri.path().strip_prefix("/workers/").map(ToOwned::to_owned);
    let layered = Router::new()
        .fallback(async |request: Request| {
            request.extensions().get::<Arc<Permit<On<WorkersScale>>>>().unwrap().resource().to_owned()
        })
        .layer(gate.layer_on::<WorkersScale>(role));
    let asked = Router::new().route("/workers/{role}", get(scale)).with_state(gate.clone());
    [layered, asked]
}

async fn scale(
    State(gate): State<Gate>,
    Path(role): Path<String>,
    parts: Parts,
) -> Result<String, Rejection> {
    let permit = gate.authorize_on::<WorkersScale>(&parts, &role).await?;
    Ok(permit.resource().to_owned())
}

#[tokio::test]
async fn resource_is_part_of_the_question() {
    let (_database, pool) = world().await;
    for app in both_on_role(&gate(&pool)) {
        let answer = send(app.clone(), request("/workers/web", Some(ADA))).await;
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::OK, "web"));
        for other in ["/workers/ads", "/workers/web.x", "/workers/none"] {
            assert_eq!(send(app.clone(), request(other, Some(ADA))).await.status, StatusCode::FORBIDDEN);
        }
    }
}

#[tokio::test]
async fn unreadable_resource_is_not_taken_for_the_action_as_a_whole() {
    let (_database, pool) = world().await;
    grant::to_user(&pool, &u(ADA), &Grant::new(p("*"), ""), &admin()).await.unwrap();
    for app in both_on_role(&gate(&pool)) {
        for path in ["/workers/", "/workers/WEB", "/workers/*", "/workers/web.", "/workers/%2e", "/elsewhere"]
        {
            let answer = send(app.clone(), request(path, Some(ADA))).await;
            assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        }
        let stranger = send(app, request("/workers/WEB", None)).await;
        assert_eq!(stranger.status, StatusCode::UNAUTHORIZED);
    }
}

/// A handler with the extractor, behind a layer of another gate or one that read another user.
async fn behind(layer: &Gate, extractor: &Gate, alias: &str) -> StatusCode {
    let app = Router::new()
        .route("/queue", get(async |_: Authorized<QueueRead>| "read"))
        .with_state(extractor.clone())
        .layer(ServiceBuilder::new().layer(layer.layer::<QueueRead>()).map_request({
            let alias = alias.to_owned();
            move |mut request: Request| {
                request.headers_mut().insert("x-user", alias.parse().unwrap());
                request
            }
        }));
    send(app, request("/queue", Some(ADA))).await.status
}

#[tokio::test]
async fn extractor_takes_the_layers_permit_without_asking_again() {
    let (_database, pool) = world().await;
    let gate = gate(&pool);
    let closing = pool.clone();
    let app = Router::new()
        .route("/queue", get(async |_: Authorized<QueueRead>| "read"))
        .with_state(gate.clone())
        .layer(axum::middleware::from_fn(move |request: Request, next: axum::middleware::Next| {
            let closing = closing.clone();
            async move {
                closing.close().await; // whoever asks from here on gets a 503
                next.run(request).await
            }
        }))
        .layer(gate.layer::<QueueRead>());
    assert_eq!(send(app, request("/queue", Some(ADA))).await.status, StatusCode::OK);
}

#[tokio::test]
async fn extractor_takes_no_other_users_permit() {
    let (_database, pool) = world().await;
    let gate = gate(&pool);
    assert_eq!(behind(&gate, &gate, ADA).await, StatusCode::OK);
    assert_eq!(behind(&gate, &gate, BOB).await, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn extractor_takes_no_other_gates_permit() {
    let (_database, pool) = world().await;
    let (_other_database, other_pool) = support::database().await; // knows nobody
    assert_eq!(behind(&gate(&pool), &gate(&other_pool), ADA).await, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn extractor_takes_no_other_actions_permit() {
    let (_database, pool) = world().await;
    let gate = gate(&pool);
    let app = Router::new()
        .route("/queue", get(async |_: Authorized<WorkersScale>| "scaled"))
        .with_state(gate.clone())
        .layer(gate.layer::<QueueRead>());
    assert_eq!(send(app, request("/queue", Some(ADA))).await.status, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn what_finds_the_user_belongs_outside_the_gate() {
    #[derive(Clone)]
    struct Login(UserName);
    let (_database, pool) = world().await;
    let gate =
        Gate::new(Authz::new(pool), |parts| parts.extensions.get::<Login>().map(|login| login.0.clone()));
    let login = tower::util::MapRequestLayer::new(|mut request: Request| {
        request.extensions_mut().insert(Login(u(ADA)));
        request
    });
    let app = Router::new().route("/queue", get(async || "read"));
    let outside = app.clone().layer(gate.layer::<QueueRead>()).layer(login.clone());
    let inside = app.layer(login).layer(gate.layer::<QueueRead>());
    assert_eq!(send(outside, request("/queue", None)).await.status, StatusCode::OK);
    assert_eq!(send(inside, request("/queue", None)).await.status, StatusCode::UNAUTHORIZED);
}

/// Ready only in the instance that was polled, as a service with a concurrency limit is.
#[derive(Default)]
struct Picky {
    ready: bool,
}

impl Clone for Picky {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Service<Request> for Picky {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request) -> Self::Future {
        assert!(self.ready, "called a service that was not ready");
        self.ready = false;
        std::future::ready(Ok(Response::new(Body::empty())))
    }
}

#[tokio::test]
async fn ready_service_is_the_one_called() {
    let (_database, pool) = world().await;
    let mut service = gate(&pool).layer::<QueueRead>().layer(Picky::default());
    for _ in 0..2 {
        let answer = service.ready().await.unwrap().call(request("/queue", Some(ADA))).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn concurrent_requests_get_their_own_answers() {
    let (_database, pool) = world().await;
    let [app, _] = both(&gate(&pool), &Arc::default());
    let asked = (0..60).map(|n| {
        let (app, user) = (app.clone(), [Some(ADA), Some(BOB), None][n % 3]);
        tokio::spawn(async move { (n, send(app, request("/queue", user)).await) })
    });
    for answer in asked.collect::<Vec<_>>() {
        let (n, answer) = answer.await.unwrap();
        let expected = [StatusCode::OK, StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED][n % 3];
        assert_eq!(answer.status, expected, "request {n}");
    }
}

#[tokio::test]
async fn gate_on_a_snapshot_answers_as_one_on_the_database() {
    let (_database, pool) = world().await;
    let snapshot = authz::Snapshot::options().start(pool.clone()).await.unwrap();
    let gate = Gate::new(snapshot.clone(), |parts| named(parts, "x-user"));
    let ran = Arc::new(AtomicUsize::new(0));
    for router in both(&gate, &ran) {
        for (user, status) in
            [(Some(ADA), 200), (Some(BOB), 403), (Some("eve@example.com"), 403), (None, 401)]
        {
            assert_eq!(
                send(router.clone(), request("/queue", user)).await.status.as_u16(),
                status,
                "{user:?}"
            );
        }
    }
    assert_eq!(ran.load(Ordering::SeqCst), 2, "for ada alone");
    snapshot.shutdown().await;
    for router in both(&gate, &ran) {
        assert_eq!(send(router, request("/queue", Some(ADA))).await.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert_eq!(ran.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn gate_takes_the_sub_of_a_login() {
    let (_database, pool) = world().await;
    sqlx::query("update authz.users set external_id = 'sub-of-' || split_part(user_name, '@', 1)")
        .execute(&pool)
        .await
        .unwrap();
    let found = |parts: &Parts| Sub::parse(parts.headers.get("x-user")?.to_str().ok()?).ok();
    let by_sub = authz::Snapshot::options().by_sub(true).start(pool.clone()).await.unwrap();
    let without = authz::Snapshot::options().start(pool.clone()).await.unwrap();
    let ran = Arc::new(AtomicUsize::new(0));
    for gate in [Gate::new(Authz::new(pool.clone()), found), Gate::new(by_sub, found)] {
        for router in both(&gate.reveal_reason(true), &ran) {
            let answer = send(router.clone(), request("/queue", Some("sub-of-ada"))).await;
            assert_eq!(
                (answer.status, answer.body.as_str()),
                (StatusCode::OK, "ada@example.com may queue.read")
            );
            for (user, who) in [("sub-of-bob", "`bob@example.com`"), ("sub-of-eve", "`sub sub-of-eve`")] {
                let answer = send(router.clone(), request("/queue", Some(user))).await;
                assert_eq!(answer.status, StatusCode::FORBIDDEN);
                assert!(answer.body.contains(who), "{}", answer.body);
            }
            assert_eq!(send(router, request("/queue", None)).await.status, StatusCode::UNAUTHORIZED);
        }
    }
    assert_eq!(ran.load(Ordering::SeqCst), 4, "for ada alone");
    for router in both(&Gate::new(without, found), &ran) {
        let answer = send(router, request("/queue", Some("sub-of-ada"))).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert_eq!(ran.load(Ordering::SeqCst), 4);
}
