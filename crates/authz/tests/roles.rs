//! The database roles of `deploy/sql/roles.sql`: each can do its work, and nothing beside it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

#[path = "support/roles.rs"]
mod roles;
mod support;

use authz::audit::{self, Outcome, Record};
use authz::grant::{self, Grant};
use authz::{Decision, Snapshot, check};
use sqlx::PgPool;
use testdb::Database;

use self::roles::*;
use self::support::*;

/// A database with a user who is in a group that may scale workers, and the roles.
async fn world() -> (Database, PgPool) {
    let (database, pool) = database().await;
    sqlx::raw_sql(ROLES).execute(&pool).await.unwrap();
    sqlx::raw_sql(ROLES).execute(&pool).await.expect("it may run any number of times");
    sqlx::raw_sql(
        "insert into authz.users (user_name) values ('ada');
         insert into authz.groups (group_name) values ('ops');
         insert into authz.group_users (group_id, user_id) select group_id, user_id from authz.groups, authz.users;
         insert into authz.actions (action_name) values ('workers.scale');
         insert into authz.group_actions (group_id, action_name) select group_id, 'workers.*' from authz.groups;",
    )
    .execute(&pool)
    .await
    .unwrap();
    (database, pool)
}

const GRANTS: [&str; 6] = [
    "insert into authz.user_actions (user_id, action_name) select user_id, '*' from authz.users",
    "insert into authz.group_actions (group_id, action_name) select group_id, '*' from authz.groups",
    "update authz.group_actions set action_name = '*'",
    "update authz.group_actions set expires_at = null",
    "delete from authz.group_actions",
    "truncate authz.group_actions",
];
const MEMBERSHIPS: [&str; 5] = [
    "insert into authz.group_users (group_id, user_id) select group_id, user_id from authz.groups, authz.users",
    "delete from authz.group_users",
    "insert into authz.group_groups select group_id, group_id + 1 from authz.groups",
    "insert into authz.group_directories select group_id, 0 from authz.groups",
    "truncate authz.group_users",
];
const PEOPLE: [&str; 4] = [
    "insert into authz.users (user_name) values ('eve')",
    "update authz.users set status = 'active'",
    "update authz.groups set status = 'active'",
    "delete from authz.users",
];
const INNER: [&str; 7] = [
    "update authz.revision set revision = 1",
    "delete from authz.changes",
    "insert into authz.group_reach (group_id, action_name, holder_id, depth) values (1, '*', 1, 0)",
    "insert into authz.group_ancestors (group_id, ancestor_id, depth) values (1, 2, 1)",
    "select authz.close_below(array[1])",
    "create table authz.mine (a int)",
    "alter table authz.users disable trigger all",
];
const AUDIT: [&str; 8] = [
    "update authz.audit_log set actor = 'nobody'",
    "delete from authz.audit_log",
    "truncate authz.audit_log",
    "alter table authz.audit_log disable trigger all",
    "drop table authz.audit_log",
    "update authz.audit_seals set records = 0",
    "delete from authz.audit_seals",
    "insert into authz.audit_log (service, actor, action, outcome, database_user) values ('s', 'a', 'x', 'denied', 'eve')",
];

#[tokio::test]
async fn nobody_touches_audit_records_or_what_triggers_keep() {
    let (database, pool) = world().await;
    for role in ALL {
        let as_role = as_role(database.url(), role).await;
        for sql in AUDIT.iter().chain(&INNER) {
            assert_forbidden(&as_role, role, sql).await;
        }
    }
    // The owner has the right and is stopped nonetheless.
    for sql in [
        "update authz.audit_log set actor = 'nobody'",
        "delete from authz.audit_log",
        "truncate authz.audit_log",
    ] {
        let error = sqlx::query(sql).execute(&pool).await.expect_err(sql);
        assert!(error.to_string().contains("append-only"), "{error}");
    }
}

#[tokio::test]
async fn reader_asks_and_writes_nothing() {
    let (database, _pool) = world().await;
    let role = "authz_reader";
    let reader = as_role(database.url(), role).await;
    assert!(matches!(
        check(&reader, &user("ada"), &action("workers.scale")).await.unwrap(),
        Decision::Allow(_)
    ));
    let can: bool =
        sqlx::query_scalar("select authz.can('ada', 'workers.scale')").fetch_one(&reader).await.unwrap();
    assert!(can);
    let snapshot = Snapshot::options().start(reader.clone()).await.unwrap();
    assert!(snapshot.check(&user("ada"), &action("workers.scale")).unwrap().is_allow());
    for sql in GRANTS.iter().chain(&MEMBERSHIPS).chain(&PEOPLE) {
        assert_forbidden(&reader, role, sql).await;
    }
    for sql in ["select * from authz.audit_log", "insert into authz.actions (action_name) values ('x')"] {
        assert_forbidden(&reader, role, sql).await;
    }
}

#[tokio::test]
async fn service_asks_registers_and_records_and_cannot_change_who_may_what() {
    let (database, pool) = world().await;
    let role = "authz_service";
    let service = as_role(database.url(), role).await;
    authz::action::register(&service, &[(action("workers.stop"), "stop them")], &admin()).await.unwrap();
    authz::action::register(&service, &[(action("workers.stop"), "stop them all")], &admin()).await.unwrap();
    let decision = check(&service, &user("ada"), &action("workers.stop")).await.unwrap();
    assert!(matches!(decision, Decision::Allow(_)), "{decision}");
    let record = Record::new("workers.stop", Outcome::Started).target("role web").decision(&decision);
    let written = audit::record(&service, &admin(), &record).await.unwrap();
    let newest = audit::latest(&pool, 1).await.unwrap();
    assert_eq!(newest[0].audit_id, written);
    for sql in GRANTS.iter().chain(&MEMBERSHIPS).chain(&PEOPLE) {
        assert_forbidden(&service, role, sql).await;
    }
    for sql in [
        "delete from authz.actions",
        "update authz.actions set action_name = 'x'",
        "select * from authz.audit_log",
        "select authz.hold_revision()",
        "insert into authz.sync_leases values (0, 1, now(), now())",
    ] {
        assert_forbidden(&service, role, sql).await;
    }
}

#[tokio::test]
async fn service_runs_operations_and_the_auditor_keeps_their_trail() {
    let (database, pool) = world().await;
    let service = authz::Authz::new(as_role(database.url(), "authz_service").await).service("ops-dashboard");
    let scaled = service
        .operation_named(&user("ada"), &action("workers.scale"))
        .run(async |_| Ok::<_, String>(7))
        .await;
    assert_eq!(scaled.unwrap(), 7);
    let failed = service
        .operation_named(&user("ada"), &action("workers.scale"))
        .run(async |_| Err::<(), _>("no".to_owned()))
        .await;
    assert!(failed.is_err());
    let denied = service
        .operation_named(&user("eve"), &action("workers.scale"))
        .run(async |_| Ok::<_, String>(()))
        .await;
    assert!(denied.is_err());
    let changed = service
        .operation_named(&user("ada"), &action("workers.scale"))
        .transact(async |_, _| Ok::<_, std::convert::Infallible>(()))
        .await;
    changed.unwrap();
    service.shutdown().await;

    let auditor = as_role(database.url(), "authz_auditor").await;
    audit::sweep(&auditor, std::time::Duration::ZERO).await.unwrap();
    audit::retention::make_partitions(&auditor, 2).await.unwrap();
    let outcomes: Vec<String> = sqlx::query_scalar(
        "select outcome from authz.audit_log where service = 'ops-dashboard' order by audit_id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(outcomes.iter().filter(|outcome| *outcome == "succeeded").count(), 2, "{outcomes:?}");
    for wanted in ["started", "failed", "denied"] {
        assert!(outcomes.iter().any(|outcome| outcome == wanted), "{wanted}: {outcomes:?}");
    }
    audit::seal(&auditor, None).await.unwrap();
    let records: i64 = sqlx::query_scalar("select sum(records)::bigint from authz.audit_seals")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(records > 0);
    for sql in GRANTS.iter().chain(&MEMBERSHIPS).chain(&PEOPLE) {
        assert_forbidden(&auditor, "authz_auditor", sql).await;
    }
}

#[tokio::test]
async fn sync_cannot_grant() {
    let (database, _pool) = world().await;
    let role = "authz_sync";
    let sync = as_role(database.url(), role).await;
    assert_eq!(authz::mirror::missing_privileges(&sync).await.unwrap(), [""; 0]);
    for sql in GRANTS {
        assert_forbidden(&sync, role, sql).await;
    }
    for sql in [
        "insert into authz.actions (action_name) values ('x')",
        "update authz.actions set description = ''",
        "delete from authz.users",
        "delete from authz.groups",
        "select * from authz.audit_log",
        "update authz.directories set directory_name = 'x'",
    ] {
        assert_forbidden(&sync, role, sql).await;
    }
}

#[tokio::test]
async fn admin_keeps_people_and_grants_and_reads_the_trail() {
    let (database, _pool) = world().await;
    let role = "authz_admin";
    let pool = as_role(database.url(), role).await;
    let (bo, web) = (user("bo"), group("web"));
    authz::user::create(&pool, &bo, "Bo", &admin()).await.unwrap();
    authz::group::create(&pool, &web, "Web", &admin()).await.unwrap();
    authz::group::add_user(&pool, &web, &bo, authz::group::Role::Member, &admin()).await.unwrap();
    authz::group::add_group(&pool, &group("ops"), &web, &admin()).await.unwrap();
    grant::to_user(&pool, &bo, &Grant::new(pattern("workers.scale"), "they asked"), &admin()).await.unwrap();
    assert!(matches!(check(&pool, &bo, &action("workers.scale")).await.unwrap(), Decision::Allow(_)));
    let trail = audit::latest(&pool, 10).await.unwrap();
    assert_eq!(trail[0].action, "grant.add");
    authz::user::delete(&pool, &bo, &admin()).await.unwrap();
    for sql in [
        "insert into authz.sync_leases values (0, 1, now(), now())",
        "update authz.sync_runs set status = 'applied'",
        "update authz.directories set last_complete_sync_at = now()",
        "delete from authz.users",
    ] {
        assert_forbidden(&pool, role, sql).await;
    }
}

#[tokio::test]
async fn nobody_can_say_what_the_database_did() {
    let (database, pool) = world().await;
    let all = sqlx::query_scalar::<_, i64>("select count(*) from authz.audit_log where by_database");
    let before = all.fetch_one(&pool).await.unwrap();
    for role in ["authz_service", "authz_sync", "authz_auditor", "authz_admin"] {
        let as_role = as_role(database.url(), role).await;
        let forged = "insert into authz.audit_log (service, actor, action, outcome, detail, by_database)
                      values ('s', 'a', 'audit.prune', 'succeeded', '{}', true)";
        assert_forbidden(&as_role, role, forged).await;
        // With the setting of a baseline, and from a trigger.
        sqlx::raw_sql(
            "set authz.writes_itself = 'yes';
             insert into authz.audit_log (service, actor, action, outcome, detail)
                 values ('s', 'a', 'audit.prune', 'succeeded', '{\"through_seal\": 100, \"before_micros\": 0}'),
                        ('s', 'a', 'grant.add', 'succeeded', '{\"user_id\": 1, \"grant\": \"*\"}'),
                        ('s', 'a', 'audit.baseline', 'succeeded', '{\"rows\": []}');
             create temp table mine (n integer);
             create function pg_temp.tell() returns trigger language plpgsql as $$ begin
                 insert into authz.audit_log (service, actor, action, outcome, detail)
                     values ('s', 'a', 'grant.remove', 'succeeded', '{\"user_id\": 1, \"grant\": \"*\"}');
                 return null;
             end $$;
             create trigger tell after insert on mine for each row execute function pg_temp.tell();
             insert into mine values (1)",
        )
        .execute(&as_role)
        .await
        .unwrap();
    }
    // What a sweep writes comes from the database, and says what somebody else said.
    let service = as_role(database.url(), "authz_service").await;
    sqlx::raw_sql(
        "set authz.writes_itself = 'yes';
         with planted as (
             insert into authz.audit_log (service, actor, action, outcome)
             values ('s', 'a', 'audit.baseline', 'started'), ('s', 'a', 'state.baseline', 'started')
             returning audit_id, recorded_at
         )
         insert into authz.open_operations (audit_id, recorded_at, owner_id, number)
             select audit_id, recorded_at, 7, audit_id from planted;
         select authz.sweep_operations('0');
         insert into authz.open_operations (audit_id, recorded_at, owner_id, number)
             select audit_id, recorded_at, 7, audit_id from authz.audit_log where outcome = 'started' order by 1 desc limit 1;
         select * from authz.disown_operations(7, array(select audit_id from authz.audit_log where outcome = 'started'))",
    )
    .execute(&service)
    .await
    .unwrap();
    let told = "select count(*) from authz.audit_log where by_database";
    assert_eq!(sqlx::query_scalar::<_, i64>(told).fetch_one(&pool).await.unwrap(), before);
    assert!(before > 0);
    assert_eq!(audit::verify_state(&pool).await.unwrap(), []);
    assert_eq!(audit::verify(&pool, &audit::Trust::new()).await.unwrap().pruned_before, None);
    let now = sqlx::query_scalar("select clock_timestamp()").fetch_one(&pool).await.unwrap();
    let could = audit::who_could(&pool, &action("workers.scale"), audit::Moment::At(now)).await;
    assert!(could.is_ok(), "{could:?}");
}

#[tokio::test]
async fn an_operator_that_somebody_makes_in_public_decides_nothing() {
    let (database, pool) = world().await;
    sqlx::raw_sql(
        "insert into authz.users (user_name) values ('eve');
         insert into authz.actions (action_name) values ('tea.make');
         insert into authz.user_actions (user_id, action_name) select user_id, 'tea.make' from authz.users where user_name = 'eve';
         create function public.append(text[], text) returns text[] language sql as 'select array[''tea.make'']';
         create operator public.|| (leftarg = text[], rightarg = text, function = public.append)",
    )
    .execute(&pool)
    .await
    .unwrap();
    let service = as_role(database.url(), "authz_service").await;
    let hijacked: Vec<String> =
        sqlx::query_scalar("select array['a'] || 'b'::text").fetch_one(&service).await.unwrap();
    assert_eq!(hijacked, ["tea.make"], "the operator is found by whoever does not protect himself");
    for (name, may) in [("eve", false), ("ada", true)] {
        let can: bool = sqlx::query_scalar("select authz.can($1, 'workers.scale')")
            .bind(name)
            .fetch_one(&service)
            .await
            .unwrap();
        assert_eq!(can, may, "{name}");
        let covering: Vec<String> =
            sqlx::query_scalar("select authz.covering('workers.scale')").fetch_one(&service).await.unwrap();
        assert_eq!(covering, ["workers.scale", "*", "workers.*"]);
    }
}

#[tokio::test]
async fn an_aggregate_that_somebody_makes_in_public_is_not_loaded() {
    let (database, pool) = world().await;
    sqlx::raw_sql(
        "insert into authz.users (user_name) values ('eve');
         insert into authz.groups (group_name) values ('tea');
         insert into authz.group_users (group_id, user_id) select g.group_id, u.user_id
             from authz.groups g, authz.users u where g.group_name = 'tea' and u.user_name = 'eve';
         insert into authz.group_actions (group_id, action_name) select group_id, 'tea.*' from authz.groups where group_name = 'tea';
         create function public.to_ops(bigint[], bigint) returns bigint[] language sql as
             $$ select array[group_id] from authz.groups where group_name = 'ops' $$;
         create aggregate public.array_agg(bigint) (sfunc = public.to_ops, stype = bigint[])",
    )
    .execute(&pool)
    .await
    .unwrap();
    let reader = as_role(database.url(), "authz_reader").await;
    let snapshot = Snapshot::options().start(reader).await.unwrap();
    for (name, may) in [("eve", false), ("ada", true)] {
        assert_eq!(snapshot.check(&user(name), &action("workers.scale")).unwrap().is_allow(), may, "{name}");
    }
}
