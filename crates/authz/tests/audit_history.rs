//! Time travel: what the trail says of the past is what checks answered then.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use authz::audit::{self, Moment, Outcome, Record};
use authz::grant::{self, Grant};
use authz::group::Role;
use authz::{Error, action, group as groups, user as users};
use chrono::{DateTime, TimeDelta, Utc};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use sqlx::{AssertSqlSafe, PgPool};
use support::{action as a, admin, group as g, pattern as p, user as u};

const ACTIONS: [&str; 3] = ["workers.scale", "workers.stop", "queue.read"];
const PATTERNS: [&str; 5] = ["workers.scale", "workers.stop", "queue.read", "workers.*", "*"];

async fn sql(pool: &PgPool, script: String) {
    sqlx::raw_sql(AssertSqlSafe(script)).execute(pool).await.unwrap();
}

/// One transaction, as a sync makes it.
async fn sync(pool: &PgPool, script: &str) {
    sql(pool, format!("begin; set local authz.sync_run = '1'; {script}; commit")).await;
}

async fn now(pool: &PgPool) -> DateTime<Utc> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(pool).await.unwrap()
}

async fn names(pool: &PgPool, query: &'static str) -> Vec<String> {
    sqlx::query_scalar(query).fetch_all(pool).await.unwrap()
}

/// Something changes. What the change does not apply to does nothing.
async fn change(pool: &PgPool, rng: &mut SmallRng, step: usize) {
    let me = admin();
    let all = names(pool, "select user_name from authz.users where status <> 'deleted' order by 1").await;
    let local = names(
        pool,
        "select group_name from authz.groups where directory_id = 0 and status = 'active' order by 1",
    )
    .await;
    let mirrored = names(
        pool,
        "select group_name from authz.groups where directory_id = 1 and status = 'active' order by 1",
    )
    .await;
    let any: Vec<_> = local.iter().chain(&mirrored).cloned().collect();
    let pick =
        |rng: &mut SmallRng, from: &[String]| from.choose(rng).cloned().unwrap_or_else(|| "none".to_owned());
    let (who, where_to, inner, theirs) =
        (pick(rng, &all), pick(rng, &local), pick(rng, &any), pick(rng, &mirrored));
    let what = p(PATTERNS.choose(rng).unwrap());
    let grant = Grant::new(what.clone(), format!("step {step}"));
    let hour = TimeDelta::hours(1);
    let grant = match rng.random_range(0..5) {
        0 => grant.until(now(pool).await - hour),
        1 => grant.until(now(pool).await + hour),
        _ => grant,
    };
    let other =
        names(pool, "select group_name from authz.groups where directory_id = 1 order by random()").await;
    let other = other.first().cloned().unwrap_or_default();
    match rng.random_range(0..24) {
        0 | 1 => drop(users::create(pool, &u(&format!("user{step}")), "", &me).await),
        2 => drop(users::set_suspended(pool, &u(&who), rng.random(), &me).await),
        3 if rng.random_bool(0.3) => drop(users::delete(pool, &u(&who), &me).await),
        4 => drop(groups::create(pool, &g(&format!("group{step}")), "", &me).await),
        5 if rng.random_bool(0.3) => drop(groups::delete(pool, &g(&where_to), &me).await),
        6 | 7 => drop(groups::add_user(pool, &g(&where_to), &u(&who), Role::Member, &me).await),
        8 => drop(groups::remove_user(pool, &g(&where_to), &u(&who), &me).await),
        9 => drop(groups::add_group(pool, &g(&where_to), &g(&inner), &me).await),
        10 => drop(groups::remove_group(pool, &g(&where_to), &g(&inner), &me).await),
        11 | 12 => drop(grant::to_user(pool, &u(&who), &grant, &me).await),
        13 | 14 => drop(grant::to_group(pool, &g(&inner), &grant, &me).await),
        15 => drop(grant::revoke_from_user(pool, &u(&who), &what, &me).await),
        16 => drop(grant::revoke_from_group(pool, &g(&inner), &what, &me).await),
        17 => {
            sync(pool, &format!(
                "insert into authz.users (user_name, directory_id, external_id) values ('corp{step}', 1, 'u{step}');
                 insert into authz.groups (group_name, directory_id, external_id) values ('team{step}', 1, 'g{step}');
                 insert into authz.group_users (group_id, user_id)
                     select g.group_id, u.user_id from authz.groups g, authz.users u
                     where g.group_name = '{theirs}' and u.directory_id = 1 and u.status <> 'deleted'
                     on conflict (group_id, user_id) do update set role = 'owner'"
            ))
            .await;
        }
        18 => {
            sync(pool, &format!(
                "insert into authz.group_groups (parent_group_id, child_group_id)
                     select p.group_id, c.group_id from authz.groups p, authz.groups c
                     where p.group_name = '{theirs}' and c.group_name = '{inner}' and p.group_id <> c.group_id
                       and not exists (select from authz.group_ancestors an
                                       where an.group_id = p.group_id and an.ancestor_id = c.group_id)
                     on conflict do nothing;
                 insert into authz.group_directories select group_id, 1 from authz.groups
                     where group_name = '{theirs}' and group_id % 2 = 0 on conflict do nothing"
            ))
            .await;
        }
        19 => {
            sync(pool, &format!(
                "update authz.users set user_name = 'renamed' || user_id, status = 'suspended'
                     where directory_id = 1 and user_id % 3 = {step} % 3 and status = 'active';
                 update authz.users set status = 'active'
                     where directory_id = 1 and user_id % 3 = ({step} + 1) % 3 and status = 'suspended';
                 delete from authz.group_users m using authz.groups g
                     where g.group_id = m.group_id and g.directory_id = 1 and m.user_id % 4 = {step} % 4"
            ))
            .await;
        }
        20 => {
            sync(pool, &format!(
                "update authz.groups set status = case status when 'deleted' then 'active' else 'deleted' end
                     where group_name = '{other}';
                 update authz.groups set group_name = 'moved{step}' where group_name = '{theirs}'"
            ))
            .await;
        }
        21 => sql(pool, format!("update authz.user_actions set expires_at = null, reason = 'by hand' where action_name = '{what}'")).await,
        22 if rng.random_bool(0.2) => sql(pool, "truncate authz.group_users".to_owned()).await,
        _ => {
            let name = ACTIONS.choose(rng).unwrap();
            if action::unregister(pool, &a(name), &me).await.is_err() {
                action::register(pool, &[(a(name), "")], &me).await.unwrap();
            }
        }
    }
}

/// Who may do what at this moment, as the live tables say: the action, the user, the ways without what lies between
/// their ends.
async fn present(pool: &PgPool) -> Vec<(String, String, Vec<String>)> {
    let mut all = Vec::new();
    for name in ACTIONS {
        let page = authz::users_who_can(pool, &a(name), None, 1000).await.unwrap();
        for user in page.users {
            let explained = authz::explain(pool, &user, &a(name)).await.unwrap();
            let mut ways: Vec<_> = explained
                .paths
                .iter()
                .map(|way| {
                    let ends = (way.groups.first(), way.groups.last(), way.groups.len(), way.everyone);
                    format!("{ends:?} {} {} {} {:?}", way.pattern, way.granted_by, way.reason, way.expires_at)
                })
                .collect();
            ways.sort();
            all.push((name.to_owned(), user.to_string(), ways));
        }
    }
    all
}

async fn past(pool: &PgPool, moment: Moment) -> Vec<(String, String, Vec<String>)> {
    let mut all = Vec::new();
    for name in ACTIONS {
        for access in audit::who_could(pool, &a(name), moment).await.unwrap() {
            let mut ways: Vec<_> = access
                .ways
                .iter()
                .map(|way| {
                    let ends = (way.groups.first(), way.groups.last(), way.groups.len(), way.everyone);
                    format!("{ends:?} {} {} {} {:?}", way.pattern, way.granted_by, way.reason, way.expires_at)
                })
                .collect();
            ways.sort();
            all.push((name.to_owned(), access.user.to_string(), ways));
        }
    }
    all
}

#[tokio::test]
async fn trail_tells_of_every_moment_what_was_so_then() {
    let mut allowed = 0;
    for seed in 0..2 {
        let (_database, pool) = support::database().await;
        let mut rng = SmallRng::seed_from_u64(seed);
        sql(
            &pool,
            "insert into authz.directories (directory_id, directory_name) values (1, 'corp')".to_owned(),
        )
        .await;
        for name in ACTIONS {
            action::register(&pool, &[(a(name), "")], &admin()).await.unwrap();
        }
        let mut moments = Vec::new();
        for step in 0..80 {
            change(&pool, &mut rng, step).await;
            let said = present(&pool).await;
            allowed += said.len();
            let decision = authz::check(&pool, &u("nobody"), &a("queue.read")).await.unwrap();
            let record = Record::new("queue.read", Outcome::Denied).decision(&decision);
            let record = audit::record(&pool, &admin(), &record).await.unwrap();
            moments.push((step, now(&pool).await, record, said));
        }
        for (step, at, record, said) in &moments {
            assert_eq!(&past(&pool, Moment::At(*at)).await, said, "seed {seed}, after step {step}");
            assert_eq!(
                &past(&pool, Moment::Record(*record)).await,
                said,
                "seed {seed}, record of step {step}"
            );
        }
    }
    assert!(allowed > 300, "the worlds allow too little to tell: {allowed}");
}

#[tokio::test]
async fn way_names_who_granted_it_why_and_the_records_that_tell() {
    let (_database, pool) = support::database().await;
    let me = admin();
    users::create(&pool, &u("ada"), "", &me).await.unwrap();
    action::register(&pool, &[(a("queue.read"), "")], &me).await.unwrap();
    groups::create(&pool, &g("ops"), "", &me).await.unwrap();
    groups::create(&pool, &g("web"), "", &me).await.unwrap();
    groups::add_group(&pool, &g("ops"), &g("web"), &me).await.unwrap();
    groups::add_user(&pool, &g("web"), &u("ada"), Role::Member, &me).await.unwrap();
    let before = now(&pool).await;
    grant::to_group(&pool, &g("ops"), &Grant::new(p("queue.*"), "they are on call"), &me).await.unwrap();
    let during = now(&pool).await;
    grant::revoke_from_group(&pool, &g("ops"), &p("queue.*"), &me).await.unwrap();
    let after = now(&pool).await;

    let could = async |at| audit::could(&pool, &u("ada"), &a("queue.read"), Moment::At(at)).await.unwrap();
    assert_eq!(could(before).await, []);
    assert_eq!(could(after).await, []);
    let ways = could(during).await;
    let [way] = &ways[..] else { panic!("{ways:?}") };
    assert_eq!(way.to_string(), "user → web → ops: queue.*");
    assert_eq!((way.granted_by.as_str(), way.reason.as_str()), ("admin@example.com", "they are on call"));
    let said = audit::latest(&pool, 100).await.unwrap();
    let entry = |id| said.iter().find(|entry| entry.audit_id == id).unwrap();
    assert_eq!(entry(way.grant_record).action, "grant.add");
    assert_eq!(way.granted_at, Some(entry(way.grant_record).recorded_at));
    let membership = entry(way.membership_record.unwrap());
    assert_eq!(
        (membership.action.as_str(), membership.target.as_deref()),
        ("membership.add", Some("group web"))
    );
}

#[tokio::test]
async fn question_about_a_time_before_the_trail_is_an_error() {
    let (_database, pool) = support::database().await;
    let me = admin();
    users::create(&pool, &u("ada"), "", &me).await.unwrap();
    action::register(&pool, &[(a("queue.read"), "")], &me).await.unwrap();
    grant::to_user(&pool, &u("ada"), &Grant::new(p("*"), "she does all"), &me).await.unwrap();
    let before = now(&pool).await;
    // As when old months are removed.
    sql(&pool, "begin;
         alter table authz.audit_log disable trigger append_only;
         do $$ declare t text; begin for t in select inhrelid::regclass::text from pg_inherits
             where inhparent = 'authz.audit_log'::regclass loop
             execute format('alter table %s disable trigger append_only; delete from %1$s', t); end loop; end $$;
         select authz.write_audit_baseline();
         commit".to_owned()).await;
    let refused = audit::who_could(&pool, &a("queue.read"), Moment::At(before)).await;
    assert!(matches!(refused, Err(Error::BeforeTrail { .. })), "{refused:?}");
    let ways = audit::could(&pool, &u("ada"), &a("queue.read"), Moment::At(now(&pool).await)).await.unwrap();
    assert_eq!((ways.len(), ways[0].granted_at, ways[0].reason.as_str()), (1, None, "she does all"));
    let unknown = audit::who_could(&pool, &a("queue.read"), Moment::Record(i64::MAX)).await;
    assert!(matches!(unknown, Err(Error::UnknownRecord(i64::MAX))), "{unknown:?}");
}

/// An admin console has actions of its own, whatever the trail calls what became of grants.
#[tokio::test]
async fn operations_named_as_what_the_database_records_change_no_history() {
    let (_database, pool) = support::database().await;
    action::register(&pool, &[(a("grant.add"), ""), (a("queue.read"), "")], &admin()).await.unwrap();
    users::create(&pool, &u("ada"), "", &admin()).await.unwrap();
    let grant = Grant::new(p("grant.*"), "they administer");
    grant::to_user(&pool, &u("ada"), &grant, &admin()).await.unwrap();
    let authz = authz::Authz::new(pool.clone());
    let done = authz.operation_named(&u("ada"), &a("grant.add"));
    done.transact(async |_, _| Ok::<_, std::convert::Infallible>(())).await.unwrap();
    let detail = serde_json::json!({ "user_id": 1, "grant": "*", "granted_by": "nobody", "reason": "" });
    for name in ["grant.add", "audit.baseline", "state.baseline", "state.users", "membership.add"] {
        let record = Record::new(name, Outcome::Succeeded).detail(detail.clone());
        audit::record(&pool, &admin(), &record).await.unwrap();
    }
    authz.shutdown().await;
    let at = Moment::At(now(&pool).await);
    assert!(audit::who_could(&pool, &a("queue.read"), at).await.unwrap().is_empty());
    let could = audit::could(&pool, &u("ada"), &a("grant.add"), at).await.unwrap();
    assert_eq!(could.iter().map(|way| way.reason.as_str()).collect::<Vec<_>>(), ["they administer"]);
    assert_eq!(audit::verify_state(&pool).await.unwrap(), []);
}

/// East of UTC the end of 9999 is in the year 10000, which other programs do not read.
#[tokio::test]
async fn grant_until_the_end_of_9999_is_read_whatever_the_time_zone() {
    let (_database, pool) = support::database().await;
    action::register(&pool, &[(a("queue.read"), "")], &admin()).await.unwrap();
    let end: DateTime<Utc> = "9999-12-31T23:59:59Z".parse().unwrap();
    let by_hand = async |name: &str, zone: &str| {
        users::create(&pool, &u(name), "", &admin()).await.unwrap();
        sql(&pool, format!(
            "begin; set local timezone = '{zone}';
             insert into authz.user_actions (user_id, action_name, granted_by, expires_at)
                 select user_id, 'queue.read', 'dba', '9999-12-31 23:59:59+00' from authz.users where user_name = '{name}';
             commit"
        ))
        .await;
    };
    let told = async || {
        names(
            &pool,
            "select distinct coalesce(row_of -> 'detail', detail) ->> 'expires_at' from authz.audit_log
             left join jsonb_array_elements(detail -> 'rows') row_of on action = 'audit.baseline'
             where coalesce(row_of -> 'detail', detail) ? 'expires_at' order by 1",
        )
        .await
    };
    by_hand("ada", "Europe/Berlin").await;
    sql(
        &pool,
        "begin; set local timezone = 'Asia/Tokyo'; select authz.write_audit_baseline(); commit".to_owned(),
    )
    .await;
    assert_eq!(told().await, ["9999-12-31T23:59:59+00:00"]);

    // As records were written before.
    sql(&pool, "alter function authz.audit_changes() reset timezone".to_owned()).await;
    by_hand("bob", "Europe/Berlin").await;
    by_hand("eve", "Asia/Tokyo").await;
    assert_eq!(
        told().await,
        ["10000-01-01T00:59:59+01:00", "10000-01-01T08:59:59+09:00", "9999-12-31T23:59:59+00:00"]
    );
    let access = audit::who_could(&pool, &a("queue.read"), Moment::At(now(&pool).await)).await.unwrap();
    let ends: Vec<_> =
        access.iter().map(|access| (access.user.as_str(), access.ways[0].expires_at)).collect();
    assert_eq!(ends, [("ada", Some(end)), ("bob", Some(end)), ("eve", Some(end))]);
}
