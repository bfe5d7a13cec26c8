//! Permits: who gets one, what it says, and that a "no" and a "could not tell" stay apart.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use authz::grant::{self, Grant};
use authz::{
    Action, Authz, Denial, DenyReason, Error, Named, On, Permit, Principal, Refusal, Sub, action, user,
};
use sqlx::PgPool;
use support::{action as a, admin, pattern as p, user as u};

authz::actions! {
    const ACTIONS;

    /// Set a role's
    /// number of workers.
    WorkersScale = "workers.scale";
    /// Look at the queue.
    QueueRead = "queue.read";
}

async fn world() -> (testdb::Database, PgPool) {
    let (database, pool) = support::database().await;
    action::register(&pool, ACTIONS, &admin()).await.unwrap();
    action::register(&pool, &[(a("workers.scale.ads-team"), "")], &admin()).await.unwrap();
    user::create(&pool, &u("ada@example.com"), "Ada", &admin()).await.unwrap();
    (database, pool)
}

async fn grant(pool: &PgPool, pattern: &str) {
    let grant = Grant::new(p(pattern), "");
    grant::to_user(pool, &u("ada@example.com"), &grant, &admin()).await.unwrap();
}

fn reason<T>(refused: Result<T, Refusal>) -> DenyReason {
    let denied = refused.err().and_then(|refusal| match refusal {
        Refusal::Denied(denied) => Some(denied),
        _ => None,
    });
    denied.expect("a deny").deny.expect("the database says").reason
}

#[tokio::test]
async fn the_list_registers_each_action_with_its_documentation() {
    let (_database, pool) = world().await;
    let registered = action::list(&pool).await.unwrap();
    let said = |name: &str| registered.iter().find(|one| one.name == a(name)).unwrap().description.clone();
    assert_eq!(said("workers.scale"), "Set a role's number of workers.");
    assert_eq!(said("queue.read"), "Look at the queue.");
}

#[tokio::test]
async fn permit_says_what_was_decided() {
    let (_database, pool) = world().await;
    grant(&pool, "workers.*").await;
    let authz = Authz::new(pool.clone());
    let permit = authz.authorize::<WorkersScale>(&u("ada@example.com")).await.unwrap();
    assert_eq!((permit.user(), permit.action()), (&u("ada@example.com"), &WorkersScale::NAME));
    assert_eq!(permit.grant().unwrap().pattern, p("workers.*"));
    let decision = authz.check(&u("ada@example.com"), &WorkersScale::NAME).await.unwrap();
    assert_eq!(permit.decision(), Some(decision));
    let json = serde_json::to_value(&permit).unwrap();
    assert_eq!(json["user"], "ada@example.com");
    assert_eq!(json["action"], "workers.scale");
    assert!(format!("{permit:?}").contains("workers.scale"), "{permit:?}");
}

#[tokio::test]
async fn deny_gives_no_permit_and_its_reason() {
    let (_database, pool) = world().await;
    let authz = Authz::new(pool.clone());
    let refused = authz.authorize::<WorkersScale>(&u("ada@example.com")).await;
    let text = refused.as_ref().unwrap_err().to_string();
    assert_eq!(text, "`ada@example.com` may not do `workers.scale`: no grant covers it");
    assert_eq!(reason(refused), DenyReason::NoGrant);
    assert_eq!(reason(authz.authorize::<QueueRead>(&u("bob@example.com")).await), DenyReason::UnknownUser);
    let unknown = authz.authorize_named(&u("ada@example.com"), &a("none.such")).await;
    assert_eq!(reason(unknown), DenyReason::UnknownAction);
}

#[tokio::test]
async fn right_to_the_action_is_none_to_its_resources_nor_the_other_way_round() {
    let (_database, pool) = world().await;
    let (authz, ada) = (Authz::new(pool.clone()), u("ada@example.com"));
    grant(&pool, "workers.scale").await;
    let _all = authz.authorize::<WorkersScale>(&ada).await.unwrap();
    assert_eq!(reason(authz.authorize_on::<WorkersScale>(&ada, "ads-team").await), DenyReason::NoGrant);
    grant::revoke_from_user(&pool, &ada, &p("workers.scale"), &admin()).await.unwrap();
    grant(&pool, "workers.scale.ads-team").await;
    assert_eq!(reason(authz.authorize::<WorkersScale>(&ada).await), DenyReason::NoGrant);
    let permit: Permit<On<WorkersScale>> = authz.authorize_on(&ada, "ads-team").await.unwrap();
    assert_eq!(permit.resource(), "ads-team");
    assert_eq!(permit.action(), &a("workers.scale.ads-team"));
    assert!(permit.for_resource("ads-team").is_ok());
    for other in ["", "ads", "ads-team.x", "web"] {
        let wrong = permit.for_resource(other).unwrap_err();
        assert_eq!(wrong.permitted, a("workers.scale.ads-team"), "{other}");
    }
}

#[tokio::test]
async fn text_that_is_no_resource_is_refused_also_to_who_may_do_everything() {
    let (_database, pool) = world().await;
    grant(&pool, "*").await;
    let authz = Authz::new(pool);
    for bad in
        ["", ".", "*", "a.*", "a.", ".a", "a..b", "Ads-Team", " ads-team", "a/b", "a\0", &"a".repeat(300)]
    {
        let refused = authz.authorize_on::<WorkersScale>(&u("ada@example.com"), bad).await;
        assert!(matches!(refused, Err(Refusal::NotAResource { .. })), "{bad:?}: {refused:?}");
    }
}

#[tokio::test]
async fn permit_for_a_name_is_for_that_name() {
    let (_database, pool) = world().await;
    grant(&pool, "queue.*").await;
    let permit: Permit<Named> =
        authz::authorize_named(&pool, &u("ada@example.com"), &a("queue.read")).await.unwrap();
    assert!(permit.for_action(&a("queue.read")).is_ok());
    assert_eq!(
        permit.for_action(&a("workers.scale")).unwrap_err().to_string(),
        "the permit is for `queue.read`, and `workers.scale` needs one of its own; authorize that first"
    );
}

#[tokio::test]
async fn transaction_authorizes_on_what_it_sees() {
    let (_database, pool) = world().await;
    let ada = u("ada@example.com");
    let mut tx = pool.begin().await.unwrap();
    grant::to_user(&mut *tx, &ada, &Grant::new(p("workers.scale"), ""), &admin()).await.unwrap();
    let _permit: Permit<WorkersScale> = authz::authorize(&mut *tx, &ada).await.unwrap();
    assert_eq!(reason(authz::authorize::<WorkersScale>(&pool, &ada).await), DenyReason::NoGrant);
    tx.rollback().await.unwrap();
}

#[tokio::test]
async fn database_that_does_not_answer_is_neither_permit_nor_deny() {
    let (_database, pool) = world().await;
    grant(&pool, "*").await;
    pool.close().await;
    let refused = Authz::new(pool).authorize::<WorkersScale>(&u("ada@example.com")).await;
    assert!(matches!(refused, Err(Refusal::Undecided(Error::Database(_)))), "{refused:?}");
}

#[test]
fn permits_cross_threads() {
    fn crosses<T: Send + Sync + 'static>() {}
    crosses::<Permit<WorkersScale>>();
    crosses::<Permit<On<WorkersScale>>>();
    crosses::<Permit<Named>>();
}

#[tokio::test]
async fn snapshot_gives_a_permit_to_who_may_and_to_nobody_else() {
    let (_database, pool) = world().await;
    grant(&pool, "workers.scale.ads-team").await;
    let snapshot = authz::Snapshot::options().start(pool.clone()).await.unwrap();
    let ada = u("ada@example.com");
    let permit = snapshot.authorize_on::<WorkersScale>(&ada, "ads-team").unwrap();
    assert_eq!((permit.user(), permit.action()), (&ada, &a("workers.scale.ads-team")));
    let permit = snapshot.authorize_named(&ada, &a("workers.scale.ads-team")).unwrap();
    assert_eq!(permit.action(), &a("workers.scale.ads-team"));
    for (user, what) in [(&ada, "no grant"), (&u("eve@example.com"), "a stranger")] {
        let refused = snapshot.authorize::<WorkersScale>(user).unwrap_err();
        assert!(
            matches!(&refused, Refusal::Denied(denied) if denied.user == user.clone().into()),
            "{what}: {refused:?}"
        );
    }
    assert!(matches!(
        snapshot.authorize_on::<WorkersScale>(&ada, "../etc"),
        Err(Refusal::NotAResource { .. })
    ));
    snapshot.shutdown().await;
    let refused = snapshot.authorize_on::<WorkersScale>(&ada, "ads-team").unwrap_err();
    assert!(matches!(refused, Refusal::Undecided(Error::SnapshotClosed)), "{refused:?}");
}

/// Ada, known by a `sub`, and bob, who is suspended.
async fn world_with_subs() -> (testdb::Database, PgPool) {
    let (database, pool) = world().await;
    for statement in [
        "update authz.users set external_id = 'Sub-Ada' where user_name = 'ada@example.com'",
        "insert into authz.users (user_name, external_id, status) values ('bob@example.com', 'Sub-Bob', 'suspended')",
    ] {
        sqlx::query(statement).execute(&pool).await.unwrap();
    }
    grant(&pool, "workers.*").await;
    (database, pool)
}

/// What became of a question by `sub`: the user's name, or who was denied and why.
fn outcome<A>(asked: Result<Permit<A>, Refusal>) -> Result<String, (Principal, Denial)> {
    asked.map(|permit| permit.user().to_string()).map_err(|refusal| match refusal {
        Refusal::Denied(denied) => (denied.user, denied.reason),
        refusal => unreachable!("{refusal}"),
    })
}

#[tokio::test]
async fn permit_by_sub_names_the_user() {
    let (_database, pool) = world_with_subs().await;
    let snapshot = authz::Snapshot::options().by_sub(true).start(pool.clone()).await.unwrap();
    let authz = Authz::new(pool.clone());
    let named = |name: &str| Principal::from(u(name));
    let stranger = Sub::parse("sub-ada").unwrap(); // compared byte by byte
    for (sub, wanted) in [
        (Sub::parse("Sub-Ada").unwrap(), Ok("ada@example.com".to_owned())),
        (Sub::parse("Sub-Bob").unwrap(), Err((named("bob@example.com"), Denial::Suspended))),
        (stranger.clone(), Err((Principal::from(stranger.clone()), Denial::UnknownUser))),
    ] {
        assert_eq!(outcome(authz.authorize::<WorkersScale>(&sub).await), wanted);
        assert_eq!(outcome(authz.authorize_on::<WorkersScale>(&sub, "ads-team").await), wanted);
        assert_eq!(outcome(authz.authorize_named(&sub, &WorkersScale::NAME).await), wanted);
        assert_eq!(outcome(snapshot.authorize_on::<WorkersScale>(&sub, "ads-team")), wanted);
        assert_eq!(outcome(authz.authorize::<WorkersScale>(&Principal::from(sub)).await), wanted);
    }
    let refused = authz.authorize::<QueueRead>(&Sub::parse("Sub-Ada").unwrap()).await;
    assert_eq!(outcome(refused), Err((named("ada@example.com"), Denial::NoGrant)));
    // The name is that of now, in the snapshot as well.
    sqlx::query("update authz.users set user_name = 'eve@example.com' where external_id = 'Sub-Ada'")
        .execute(&pool)
        .await
        .unwrap();
    snapshot.at_least(authz::revision::current(&pool).await.unwrap()).await.unwrap();
    let sub = Sub::parse("Sub-Ada").unwrap();
    for asked in [authz.authorize::<WorkersScale>(&sub).await, snapshot.authorize::<WorkersScale>(&sub)] {
        assert_eq!(outcome(asked), Ok("eve@example.com".to_owned()));
    }
    snapshot.shutdown().await;
    let without = authz::Snapshot::options().start(pool).await.unwrap();
    let refused = without.authorize::<WorkersScale>(&sub);
    assert!(matches!(refused, Err(Refusal::Undecided(Error::Unindexed))), "{refused:?}");
    without.shutdown().await;
}
