//! The extractor: a handler that has a permit among its parameters runs only for who may.

use std::ops::Deref;
use std::sync::Arc;

use axum_core::body::Body;
use axum_core::extract::{FromRef, FromRequestParts};
use axum_core::response::{IntoResponse, Response};
use http::request::Parts;

use crate::permit::{Action, Permit, Question};
use crate::web::{Gate, Rejection};

/// A permit for `A`, as a parameter of an axum handler; the state must have a [`Gate`].
///
/// Where [`Gate::layer`] of the same gate let the request of the same user pass for the same action, its permit
/// is taken; otherwise the extractor decides. For an action on a resource, [`Gate::authorize_on`] decides in
/// the handler; behind [`Gate::layer_on`], `Extension<Arc<Permit<On<A>>>>` has the permit.
///
/// ```
/// use authz::web::{Authorized, Gate, Rejection};
/// use authz::{Authz, On, Permit, UserName};
/// use axum::Router;
/// use axum::extract::{Path, State};
/// use axum::http::request::Parts;
/// use axum::routing::{get, post};
///
/// authz::actions! {
///     pub const ACTIONS;
///     /// Look at the queue.
///     pub QueueRead = "queue.read";
///     /// Set a role's number of workers.
///     pub WorkersScale = "workers.scale";
/// }
///
/// async fn queue(Authorized(permit): Authorized<QueueRead>) -> String {
///     format!("nothing to do, {}", permit.user())
/// }
///
/// async fn scale(State(gate): State<Gate>, Path(role): Path<String>, parts: Parts) -> Result<String, Rejection> {
///     let permit: Permit<On<WorkersScale>> = gate.authorize_on(&parts, &role).await?;
///     Ok(format!("{} is scaled", permit.resource()))
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = sqlx::PgPool::connect_lazy("postgres://localhost/ops")?;
/// // The proxy in front sets this header after log-in, and takes it off what comes from outside.
/// let gate = Gate::new(Authz::new(pool), |parts| {
///     UserName::parse(parts.headers.get("x-forwarded-user")?.to_str().ok()?).ok()
/// });
/// let app: Router =
///     Router::new().route("/queue", get(queue)).route("/workers/{role}", post(scale)).with_state(gate);
/// # use tower::ServiceExt;
/// # let request = axum::http::Request::new(axum::body::Body::empty());
/// # assert_eq!(app.oneshot(request).await?.status(), 404);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a permit that nobody demands protects nothing"]
pub struct Authorized<A>(pub Arc<Permit<A>>);

impl<A> Deref for Authorized<A> {
    type Target = Permit<A>;

    fn deref(&self) -> &Permit<A> {
        &self.0
    }
}

/// For [`Authz::operation_permitted`](crate::Authz::operation_permitted).
impl<A> From<Authorized<A>> for Arc<Permit<A>> {
    fn from(Authorized(permit): Authorized<A>) -> Self {
        permit
    }
}

impl<A, S> FromRequestParts<S> for Authorized<A>
where
    A: Action,
    S: Send + Sync,
    Gate: FromRef<S>,
{
    type Rejection = Rejection;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Rejection> {
        let gate = Gate::from_ref(state);
        let user = gate.user(parts)?;
        // INVARIANT: a permit is taken over only from this gate, for this action and for the user whom the
        // request names now; `extractor_takes_no_other_users_permit` and `extractor_takes_no_other_gates_permit`
        // hold it.
        match gate.passed::<A>(parts, &user) {
            Some(permit) => Ok(Self(permit)),
            None => Ok(Self(Arc::new(gate.ask(Question::about(), &user).await?))),
        }
    }
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        Self::into_response::<Body>(self)
    }
}
