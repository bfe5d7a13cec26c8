//! Permits: proof, in the type system, that a user may do an action.
//!
//! A service function that takes `&Permit<WorkersScale>` cannot be called before the question was asked, nor
//! with the answer to another question:
//!
//! ```
//! use authz::{Authz, On, Permit, Refusal, UserName};
//!
//! authz::actions! {
//!     /// All that this service can do; `authz::action::register(&pool, ACTIONS, &me)` when it starts.
//!     pub const ACTIONS;
//!
//!     /// Look at the queue.
//!     pub QueueRead = "queue.read";
//!     /// Set a role's number of workers.
//!     pub WorkersScale = "workers.scale";
//! }
//!
//! fn read_queue(permit: &Permit<QueueRead>) -> String {
//!     format!("nothing to do, {}", permit.user())
//! }
//!
//! // The role comes out of the permit, so it cannot be another one than was asked about.
//! fn scale(permit: &Permit<On<WorkersScale>>, workers: u32) -> String {
//!     format!("{} has {workers} workers", permit.resource())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use authz::{ActionPattern, audit::Actor, grant::{self, Grant}};
//! # let database = testdb::Database::empty().await?;
//! # let pool = sqlx::PgPool::connect(database.url()).await?;
//! # authz::migrate(&pool).await?;
//! # let me = Actor::new("ops-dashboard", "ops-dashboard");
//! # let ada = UserName::parse("ada@example.com")?;
//! authz::action::register(&pool, ACTIONS, &me).await?;
//! # let role = authz::ActionName::parse("workers.scale.web")?;
//! # authz::action::register(&pool, &[(role, "Scale role web")], &me).await?;
//! # authz::user::create(&pool, &ada, "Ada", &me).await?;
//! # grant::to_user(&pool, &ada, &Grant::new(ActionPattern::parse("workers.*")?, ""), &me).await?;
//! let authz = Authz::new(pool);
//! let permit = authz.authorize_on::<WorkersScale>(&ada, "web").await?; // asks about `workers.scale.web`
//! assert_eq!(scale(&permit, 4), "web has 4 workers");
//!
//! match authz.authorize::<QueueRead>(&ada).await {
//!     Ok(permit) => println!("{}", read_queue(&permit)),
//!     Err(Refusal::Denied(denied)) => println!("no: {denied}"),
//!     Err(refusal) => return Err(refusal.into()), // nobody could tell
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The user is named by a [`UserName`] or by the [`Sub`](crate::Sub) of a login; [`Permit::user`] is the name either way.
//!
//! A permit is true of the moment of the decision (see [`Permit::revision`]) and does not expire by itself: ask
//! for one, use it, drop it. [`authorize`] inside the transaction that makes the change decides on what that transaction
//! sees. In `read committed` the next statement may already see a revoke that the decision did not; in
//! `repeatable read` decision and change are of one state.
//!
//! # Resources
//! A resource is written as trailing segments of the action's name, and the user must hold that exact name or a
//! pattern above it: who may do `workers.scale` may not thereby do `workers.scale.web`. Do not give a resource
//! the name of an action below (`workers.scale.force`): to a grant the two are one. As every action, one with
//! its resource must be registered; one that is not is denied.

use std::fmt;
use std::marker::PhantomData;

use serde::{Serialize, Serializer};
use sqlx::PgExecutor;

use crate::decision::{Allow, Decision, Denial, Deny, MatchedGrant, Revision, Verdict};
use crate::error::Error;
use crate::name::{ActionName, NameError, Principal, UserKey, UserName};
use crate::snapshot::Snapshot;

/// An action that is known when the program is compiled; [`actions!`](crate::actions!) makes them.
pub trait Action: Send + Sync + 'static {
    /// Its name.
    const NAME: ActionName;
    /// What it does, for people who grant it.
    const DESCRIPTION: &'static str;
}

/// Makes a type for each action of a service, and the list that registers them all.
///
/// The documentation of an action is the description that people who grant it read, so it must be there; a name
/// that is none is an error of the compiler.
/// The list is made from the same lines, so none can be forgotten in it; declared without `pub`, the compiler
/// warns if it is never used, that is, if nothing was registered.
///
/// ```
/// use authz::Action;
///
/// authz::actions! {
///     const ACTIONS;
///
///     /// Set a role's number of workers.
///     pub WorkersScale = "workers.scale";
///     /// Look at the queue.
///     pub(crate) QueueRead = "queue.read";
/// }
///
/// assert_eq!(WorkersScale::NAME.as_str(), "workers.scale");
/// assert_eq!(QueueRead::DESCRIPTION, "Look at the queue.");
/// assert_eq!(ACTIONS.len(), 2); // authz::action::register(&pool, ACTIONS, &me)
/// ```
///
/// ```compile_fail,E0080
/// authz::actions! {
///     pub const ACTIONS;
///     /// Set a role's number of workers.
///     pub WorkersScale = "Workers Scale";
/// }
/// # fn main() { let _ = ACTIONS; }
/// ```
#[macro_export]
macro_rules! actions {
    (
        $(#[$list_attribute:meta])*
        $list_visibility:vis const $list:ident;
        $($(#[doc = $doc:literal])+ $visibility:vis $action:ident = $name:literal;)+
    ) => {
        $(
            $(#[doc = $doc])+
            #[derive(Debug)]
            $visibility struct $action;

            impl $crate::Action for $action {
                const NAME: $crate::ActionName = $crate::ActionName::constant($name);
                const DESCRIPTION: &'static str = ::core::concat!($($doc),+).trim_ascii();
            }
        )+

        $(#[$list_attribute])*
        $list_visibility const $list: &[($crate::ActionName, &str)] =
            &[$((<$action as $crate::Action>::NAME, <$action as $crate::Action>::DESCRIPTION)),+];
    };
}

/// In `Permit<On<A>>`: the action on one resource. Only ever a parameter of a type, never a value.
#[derive(Debug)]
pub struct On<A> {
    _action: PhantomData<fn() -> A>,
}

/// In `Permit<Named>`: an action whose name was only known at run time.
#[derive(Debug)]
pub enum Named {}

/// Proof that [`user`](Permit::user) may do `A`: made by [`authorize`] and its kin, and in no other way.
///
/// `A` is an [`Action`], or [`On<A>`](On) for an action on one resource, or [`Named`]. Neither stands in for
/// another. `Debug` and `Serialize` say what was decided, for logs and the audit trail; there is no way back.
///
/// It cannot be forged:
///
/// ```compile_fail,E0451
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; }
/// # fn main() {}
/// fn forged(real: authz::Permit<QueueRead>) -> authz::Permit<QueueRead> {
///     authz::Permit { says: todo!(), action: std::marker::PhantomData }
/// }
/// ```
///
/// ```compile_fail,E0624
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; }
/// # fn main() {}
/// fn forged(user: authz::UserName) -> authz::Permit<QueueRead> {
///     authz::Permit::granted(user, <QueueRead as authz::Action>::NAME, None, None, authz::Revision(1))
/// }
/// ```
///
/// ```compile_fail,E0277
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; }
/// # fn main() {}
/// fn forged(json: &str) -> Option<authz::Permit<QueueRead>> {
///     serde_json::from_str(json).ok()
/// }
/// ```
///
/// ```compile_fail,E0277
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; }
/// # fn main() {}
/// fn forged() -> authz::Permit<QueueRead> {
///     Default::default()
/// }
/// ```
///
/// Nor copied:
///
/// ```compile_fail,E0277
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; }
/// # fn main() {}
/// fn twice<T: Clone>(one: &T) -> [T; 2] { [one.clone(), one.clone()] }
/// fn copied(permit: authz::Permit<QueueRead>) { twice(&permit); }
/// ```
///
/// Nor used for another action:
///
/// ```compile_fail,E0308
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; /// Set a role's number of workers.
/// #     pub WorkersScale = "workers.scale"; }
/// # fn main() {}
/// fn scale(permit: &authz::Permit<WorkersScale>) {}
/// fn other(permit: &authz::Permit<QueueRead>) { scale(permit); }
/// ```
///
/// ```compile_fail,E0277
/// # authz::actions! { pub const ACTIONS; /// Look.
/// #     pub QueueRead = "queue.read"; /// Set a role's number of workers.
/// #     pub WorkersScale = "workers.scale"; }
/// # fn main() {}
/// fn other(permit: authz::Permit<QueueRead>) -> authz::Permit<WorkersScale> { permit.into() }
/// ```
///
/// Nor one resource's permit for all of them, or the other way round:
///
/// ```compile_fail,E0308
/// # authz::actions! { pub const ACTIONS; /// Set a role's number of workers.
/// #     pub WorkersScale = "workers.scale"; }
/// # fn main() {}
/// fn scale_all(permit: &authz::Permit<WorkersScale>) {}
/// fn other(permit: &authz::Permit<authz::On<WorkersScale>>) { scale_all(permit); }
/// ```
///
/// ```compile_fail,E0308
/// # authz::actions! { pub const ACTIONS; /// Set a role's number of workers.
/// #     pub WorkersScale = "workers.scale"; }
/// # fn main() {}
/// fn scale_one(permit: &authz::Permit<authz::On<WorkersScale>>) {}
/// fn other(permit: &authz::Permit<WorkersScale>) { scale_one(permit); }
/// ```
///
/// ```compile_fail,E0117
/// # authz::actions! { pub const ACTIONS; /// Set a role's number of workers.
/// #     pub WorkersScale = "workers.scale"; }
/// # fn main() {}
/// impl authz::Action for authz::On<WorkersScale> {
///     const NAME: authz::ActionName = authz::ActionName::constant("harmless");
///     const DESCRIPTION: &'static str = "";
/// }
/// ```
// INVARIANT: only `Permit::granted` makes one, and only an allow leads there; the examples above and
// `tests/permit.rs` hold it.
#[must_use = "a permit that nobody demands protects nothing"]
pub struct Permit<A> {
    says: Says,
    action: PhantomData<fn() -> A>,
}

/// What was decided.
#[derive(Debug, Serialize)]
struct Says {
    user: UserName,
    action: ActionName,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grant: Option<MatchedGrant>,
    revision: Revision,
}

impl<A> Permit<A> {
    /// The one constructor. The caller answers for it that `user` was just allowed `action` (resource included).
    pub(crate) const fn granted(
        user: UserName,
        action: ActionName,
        resource: Option<String>,
        grant: Option<MatchedGrant>,
        revision: Revision,
    ) -> Self {
        Self { says: Says { user, action, resource, grant, revision }, action: PhantomData }
    }

    /// Who may.
    #[must_use]
    pub const fn user(&self) -> &UserName {
        &self.says.user
    }

    /// What was asked about: the action's full name, a resource included.
    #[must_use]
    pub const fn action(&self) -> &ActionName {
        &self.says.action
    }

    /// The grant that allowed it, where the database decided; a snapshot does not say.
    #[must_use]
    pub const fn grant(&self) -> Option<&MatchedGrant> {
        self.says.grant.as_ref()
    }

    /// The state of the database that the decision is true of.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.says.revision
    }

    /// The resource, if it is for one.
    pub(crate) fn on(&self) -> Option<&str> {
        self.says.resource.as_deref()
    }

    /// The decision, where it is known with its grant, for [`Record::decision`](crate::audit::Record::decision).
    #[must_use]
    pub fn decision(&self) -> Option<Decision> {
        let grant = self.says.grant.clone()?;
        Some(Decision::Allow(Allow { grant, revision: self.says.revision }))
    }
}

impl<A: Action> Permit<On<A>> {
    /// The resource that this is for, one or more segments.
    ///
    /// A function does best to take the resource from here and have no parameter for it.
    #[must_use]
    pub fn resource(&self) -> &str {
        // Never absent: `authorize_on` and the web layer's `layer_on` are the only ways here. Empty names none.
        self.says.resource.as_deref().unwrap_or_default()
    }

    /// This permit, if it is for `resource`: where the resource comes from elsewhere as well.
    ///
    /// # Errors
    /// [`WrongPermit`] if it is for another one.
    pub fn for_resource(&self, resource: &str) -> Result<&Self, WrongPermit> {
        if self.says.resource.as_deref() == Some(resource) {
            Ok(self)
        } else {
            let wanted = format!("{}.{}", A::NAME, resource.escape_debug());
            Err(WrongPermit { permitted: self.says.action.clone(), wanted })
        }
    }
}

impl Permit<Named> {
    /// This permit, if it is for `action`.
    ///
    /// # Errors
    /// [`WrongPermit`] if it is for another one.
    pub fn for_action(&self, action: &ActionName) -> Result<&Self, WrongPermit> {
        if self.says.action == *action {
            Ok(self)
        } else {
            Err(WrongPermit { permitted: self.says.action.clone(), wanted: action.to_string() })
        }
    }
}

impl<A> fmt::Debug for Permit<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Says { user, action, resource, grant, revision } = &self.says;
        f.debug_struct("Permit")
            .field("user", user)
            .field("action", action)
            .field("resource", resource)
            .field("grant", grant)
            .field("revision", revision)
            .finish()
    }
}

impl<A> Serialize for Permit<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.says.serialize(serializer)
    }
}

/// A permit was given where one for something else is needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the permit is for `{permitted}`, and `{wanted}` needs one of its own; authorize that first")]
#[non_exhaustive]
pub struct WrongPermit {
    /// What the permit is for.
    pub permitted: ActionName,
    /// What it was to be used for.
    pub wanted: String,
}

/// Why there is no permit. Only [`Denied`](Refusal::Denied) is a "no".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The user may not.
    #[error(transparent)]
    Denied(#[from] Box<Denied>),
    /// The resource is not one or more segments of an action's name, so nobody can be granted anything on it.
    #[error(
        "`{resource}` cannot be a resource of `{action}`; a resource is one or more segments of an action name"
    )]
    NotAResource {
        /// The action.
        action: ActionName,
        /// The text, with control characters escaped.
        resource: String,
        /// What is wrong with the two together.
        #[source]
        source: NameError,
    },
    /// Nobody could tell.
    #[error(
        "whether the user may do it could not be decided; refuse for now, and try again once the cause is mended"
    )]
    Undecided(#[from] Error),
    /// It could not be recorded in the audit trail, so it was not done, whether or not the user may do it.
    #[error(
        "it could not be recorded in the audit trail, so it was not done; try again once the cause is mended"
    )]
    Unrecorded(#[source] Error),
}

/// A deny, with its question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("`{user}` may not do `{action}`: {}", self.why())]
#[non_exhaustive]
pub struct Denied {
    /// Who asked: by name, or by the `sub` that nobody is known by.
    pub user: Principal,
    /// For what, a resource included.
    pub action: ActionName,
    /// Why not.
    pub reason: Denial,
    /// The same with the grant that has ended, if that is why; a snapshot does not say.
    pub deny: Option<Deny>,
    /// The state of the database that the decision is true of.
    pub revision: Revision,
}

impl Denied {
    fn why(&self) -> &dyn fmt::Display {
        self.deny.as_ref().map_or(&self.reason as &dyn fmt::Display, |deny| &deny.reason)
    }
}

/// A permit for `A`, if `user` may do it now; decided as [`check`](crate::check()) decides.
///
/// The user is a [`UserName`] or the [`Sub`](crate::Sub) of a login; the permit has the name either way. Pass a pool, or
/// `&mut *transaction` to decide on what the transaction sees.
///
/// # Errors
/// [`Refusal::Denied`] if the user may not, [`Refusal::Undecided`] if the database does not answer.
pub async fn authorize<'u, A: Action>(
    executor: impl PgExecutor<'_>,
    user: impl Into<UserKey<'u>>,
) -> Result<Permit<A>, Refusal> {
    Question::about().ask(executor, user.into()).await
}

/// A permit for `A` on `resource`, if `user` may do it now: asks about `A`'s name with the resource as its last
/// segments.
///
/// # Errors
/// As [`authorize`], and [`Refusal::NotAResource`] if no action can be named so; nothing is trimmed or lower-cased.
pub async fn authorize_on<'u, A: Action>(
    executor: impl PgExecutor<'_>,
    user: impl Into<UserKey<'u>>,
    resource: &str,
) -> Result<Permit<On<A>>, Refusal> {
    Question::on(resource)?.ask(executor, user.into()).await
}

/// A permit for an action whose name is only known at run time. Functions that take one call
/// [`Permit::for_action`], or do what [`Permit::action`] says and have no parameter for it.
///
/// # Errors
/// As [`authorize`].
pub async fn authorize_named<'u>(
    executor: impl PgExecutor<'_>,
    user: impl Into<UserKey<'u>>,
    action: &ActionName,
) -> Result<Permit<Named>, Refusal> {
    Question::named(action).ask(executor, user.into()).await
}

/// What a `Permit<A>` is asked for with; keeps name and type together on their way to the decision.
pub(crate) struct Question<A> {
    action: ActionName,
    resource: Option<String>,
    kind: PhantomData<fn() -> A>,
}

impl<A: Action> Question<A> {
    pub(crate) const fn about() -> Self {
        Self { action: A::NAME, resource: None, kind: PhantomData }
    }
}

impl Question<Named> {
    pub(crate) fn named(action: &ActionName) -> Self {
        Self { action: action.clone(), resource: None, kind: PhantomData }
    }
}

impl<A: Action> Question<On<A>> {
    pub(crate) fn on(resource: &str) -> Result<Self, Refusal> {
        match ActionName::parse(&format!("{}.{resource}", A::NAME)) {
            Ok(action) => Ok(Self { action, resource: Some(resource.to_owned()), kind: PhantomData }),
            Err(source) => {
                let resource = resource.escape_debug().to_string();
                Err(Refusal::NotAResource { action: A::NAME, resource, source })
            }
        }
    }
}

impl<A> Question<A> {
    pub(crate) const fn action(&self) -> &ActionName {
        &self.action
    }

    /// The resource, if it is about one.
    pub(crate) fn resource(&self) -> Option<&str> {
        self.resource.as_deref()
    }

    pub(crate) async fn ask(
        self,
        executor: impl PgExecutor<'_>,
        user: UserKey<'_>,
    ) -> Result<Permit<A>, Refusal> {
        let (decision, name) = crate::check::ask(executor, user, &self.action).await?;
        self.decided(user, name, decision)
    }

    pub(crate) fn ask_snapshot(self, snapshot: &Snapshot, user: UserKey<'_>) -> Result<Permit<A>, Refusal> {
        let (verdict, name) = snapshot.ask(user, &self.action)?;
        self.judged(user, name, verdict)
    }

    /// As the database has decided this question.
    pub(crate) fn decided(
        self,
        user: UserKey<'_>,
        name: Option<UserName>,
        decision: Decision,
    ) -> Result<Permit<A>, Refusal> {
        match decision {
            Decision::Allow(Allow { grant, revision, .. }) => self.permit(user, name, Some(grant), revision),
            Decision::Deny(deny) => {
                let (reason, revision) = (Denial::from(&deny.reason), deny.revision);
                Err(self.denial(user, name, reason, Some(deny), revision))
            }
        }
    }

    /// As a snapshot has judged it.
    pub(crate) fn judged(
        self,
        user: UserKey<'_>,
        name: Option<UserName>,
        verdict: Verdict,
    ) -> Result<Permit<A>, Refusal> {
        match verdict {
            Verdict::Allow { revision } => self.permit(user, name, None, revision),
            Verdict::Deny { reason, revision } => Err(self.denial(user, name, reason, None, revision)),
        }
    }

    /// The caller answers for it that this was just allowed to `user`, whose name is `name` where it was found by `sub`.
    fn permit(
        self,
        user: UserKey<'_>,
        name: Option<UserName>,
        grant: Option<MatchedGrant>,
        revision: Revision,
    ) -> Result<Permit<A>, Refusal> {
        let name = match user {
            UserKey::Name(name) => name.clone(),
            UserKey::Sub(_) => {
                name.ok_or_else(|| Error::Unreadable { what: "a user without a name".to_owned() })?
            }
        };
        Ok(Permit::granted(name, self.action, self.resource, grant, revision))
    }

    fn denial(
        self,
        user: UserKey<'_>,
        name: Option<UserName>,
        reason: Denial,
        deny: Option<Deny>,
        revision: Revision,
    ) -> Refusal {
        let user = name.map_or_else(|| user.into(), Principal::Name);
        Box::new(Denied { user, action: self.action, reason, deny, revision }).into()
    }
}
