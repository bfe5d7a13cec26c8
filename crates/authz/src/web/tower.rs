//! The layer: decides before the inner service sees the request.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::request::Parts;
use http::{Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use crate::name::Principal;
use crate::permit::{Action, On, Permit, Question};
use crate::web::{Answer, Gate, Rejection};

/// How a request becomes a question. The types keep the action's name and the permit's type together.
type Ask<A> = Arc<dyn Fn(&Gate, &Parts) -> Result<Question<A>, Rejection> + Send + Sync>;

impl Gate {
    /// Lets pass who may do `A`; see [`GateLayer`].
    #[must_use]
    pub fn layer<A: Action>(&self) -> GateLayer<A> {
        GateLayer { gate: self.clone(), ask: Arc::new(|_, _| Ok(Question::about())) }
    }

    /// Lets pass who may do `A` on the resource that `resource` finds in the request; see [`GateLayer`].
    ///
    /// Where it finds none, or what cannot be one, the answer is 404 to every user. It is never taken for the
    /// action as a whole. Handlers take the resource from [`Permit::resource`](crate::Permit::resource): who
    /// reads the request a second time may read it otherwise.
    #[must_use]
    pub fn layer_on<A: Action>(
        &self,
        resource: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static,
    ) -> GateLayer<On<A>> {
        let ask: Ask<On<A>> = Arc::new(move |gate, parts| {
            let resource = resource(parts).ok_or(Rejection(Answer::NoResource))?;
            Question::on(&resource).map_err(|refusal| gate.refused(refusal))
        });
        GateLayer { gate: self.clone(), ask }
    }

    /// A permit that this very gate gave this request before, for this user.
    #[cfg(feature = "axum")]
    pub(super) fn passed<A: 'static>(&self, parts: &Parts, user: &Principal) -> Option<Arc<Permit<A>>> {
        let passed = parts.extensions.get::<Passed<A>>()?;
        let same = Arc::ptr_eq(&passed.gate.inner, &self.inner) && passed.user == *user;
        same.then(|| Arc::clone(&passed.permit))
    }

    async fn pass<A: 'static>(&self, ask: &Ask<A>, parts: &mut Parts) -> Result<(), Rejection> {
        let user = self.user(parts)?;
        let question = ask(self, parts)?;
        let permit = Arc::new(self.ask(question, &user).await?);
        parts.extensions.insert(Passed { gate: self.clone(), user, permit: Arc::clone(&permit) });
        parts.extensions.insert(permit);
        Ok(())
    }
}

/// What the extractor finds: a permit, whom it was asked for, and the gate that gave it, since another gate may ask
/// another database.
struct Passed<A> {
    gate: Gate,
    user: Principal,
    permit: Arc<Permit<A>>,
}

impl<A> Clone for Passed<A> {
    fn clone(&self) -> Self {
        Self { gate: self.gate.clone(), user: self.user.clone(), permit: Arc::clone(&self.permit) }
    }
}

/// A layer that lets a request pass only with a permit, which it puts into the request's extensions as
/// `Arc<Permit<A>>` (from [`Gate::layer_on`], `Arc<Permit<On<A>>>`). Any other request gets a [`Rejection`] for
/// an answer and the inner service does not see it.
///
/// Response bodies are of any type that is made from a `String`, such as `axum::body::Body` or
/// `http_body_util::Full<Bytes>`.
///
/// ```
/// # use std::{convert::Infallible, sync::Arc};
/// # use authz::{Authz, Permit, UserName, web::Gate};
/// # use http::{Request, Response};
/// # use tower::{Service, ServiceBuilder, ServiceExt};
/// authz::actions! {
///     pub const ACTIONS;
///     /// Look at the queue.
///     pub QueueRead = "queue.read";
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pool = sqlx::PgPool::connect_lazy("postgres://localhost/ops")?;
/// // `Login` was put there by the host's own layer, further out, after it verified the session.
/// #[derive(Clone)]
/// struct Login(UserName);
/// let gate = Gate::new(Authz::new(pool), |parts| parts.extensions.get::<Login>().map(|login| login.0.clone()));
///
/// let service = ServiceBuilder::new().layer(gate.layer::<QueueRead>()).service_fn(
///     async |request: Request<String>| {
///         let permit = request.extensions().get::<Arc<Permit<QueueRead>>>();
///         Ok::<_, Infallible>(Response::new(format!("{permit:?}")))
///     },
/// );
/// let answer = service.oneshot(Request::new(String::new())).await?;
/// assert_eq!(answer.status(), 401);
/// # Ok(())
/// # }
/// ```
pub struct GateLayer<A> {
    gate: Gate,
    ask: Ask<A>,
}

impl<A> Clone for GateLayer<A> {
    fn clone(&self) -> Self {
        Self { gate: self.gate.clone(), ask: Arc::clone(&self.ask) }
    }
}

impl<A> fmt::Debug for GateLayer<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GateLayer").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl<S, A> Layer<S> for GateLayer<A> {
    type Service = Gated<S, A>;

    fn layer(&self, inner: S) -> Gated<S, A> {
        Gated { inner, layer: self.clone() }
    }
}

/// A service behind a gate; [`GateLayer`] makes it.
pub struct Gated<S, A> {
    inner: S,
    layer: GateLayer<A>,
}

impl<S: Clone, A> Clone for Gated<S, A> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S: fmt::Debug, A> fmt::Debug for Gated<S, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gated").field("inner", &self.inner).field("layer", &self.layer).finish()
    }
}

impl<S, A, In, Out> Service<Request<In>> for Gated<S, A>
where
    S: Service<Request<In>, Response = Response<Out>> + Clone + Send + 'static,
    S::Future: Send,
    A: 'static,
    In: Send + 'static,
    Out: From<String>,
{
    type Response = Response<Out>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    // INVARIANT: the inner service is called only after a permit was given, and it is the one that was ready: a
    // clone need not be. `refused_requests_do_not_reach_the_handler` and `ready_service_is_the_one_called` hold it.
    fn call(&mut self, request: Request<In>) -> Self::Future {
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let GateLayer { gate, ask } = self.layer.clone();
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            match gate.pass(&ask, &mut parts).await {
                Ok(()) => inner.call(Request::from_parts(parts, body)).await,
                Err(rejection) => Ok(rejection.into_response()),
            }
        })
    }
}
