//! Casbin with roles: a user's groups and a group's parent are its roles, a grant is a policy line.

use std::fmt::Write;

use ::casbin::{CachedEnforcer, CoreApi, DefaultModel, Enforcer, StringAdapter};

use crate::world::{Holder, Question, World, group_name, is_suspended, parent, user_name};

/// The action first, because comparing it is cheaper than walking the roles.
const MODEL: &str = "
[request_definition]
r = sub, act

[policy_definition]
p = sub, act

[role_definition]
g = _, _

[policy_effect]
e = some(where (p.eft == allow))

[matchers]
m = keyMatch(r.act, p.act) && g(r.sub, p.sub)
";

pub(crate) async fn load(world: &World) -> Enforcer {
    Enforcer::new(DefaultModel::from_str(MODEL).await.unwrap(), StringAdapter::new(policy(world)))
        .await
        .unwrap()
}

pub(crate) async fn load_cached(world: &World) -> CachedEnforcer {
    let model = DefaultModel::from_str(MODEL).await.unwrap();
    CachedEnforcer::new(model, StringAdapter::new(policy(world))).await.unwrap()
}

pub(crate) fn allows(enforcer: &impl CoreApi, question: &Question) -> bool {
    enforcer.enforce((question.user.as_str(), question.action.as_str())).unwrap()
}

/// Suspended users hold no grant and one role without any. Without that role casbin would look for their name in
/// every node of its graph.
fn policy(world: &World) -> String {
    let mut policy = String::new();
    for grant in world.live_grants() {
        let holder = match grant.holder {
            Holder::User(user) if is_suspended(user) => continue,
            Holder::User(user) => user_name(user),
            Holder::Group(group) => group_name(group),
        };
        writeln!(policy, "p, {holder}, {}", grant.granted.name()).unwrap();
    }
    for group in 1..=world.shape.groups {
        if let Some(parent) = parent(group) {
            writeln!(policy, "g, {}, {}", group_name(group), group_name(parent)).unwrap();
        }
    }
    for (user, group) in &world.memberships {
        if !is_suspended(*user) {
            writeln!(policy, "g, {}, {}", user_name(*user), group_name(*group)).unwrap();
        }
    }
    for user in (1..=world.shape.users).filter(|user| is_suspended(*user)) {
        writeln!(policy, "g, {}, suspended", user_name(user)).unwrap();
    }
    policy
}
