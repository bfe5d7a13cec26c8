//! Lists, many checks at once, `sub`, what is missing, freshness of directories, and how Postgres plans a check.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::grant::{self, Grant};
use authz::{Authz, Decision, DenyReason, Error, Fact, Sub};
use sqlx::{Connection, PgConnection, PgPool};
use support::{action, admin, group, pattern, user};

async fn sql(pool: &PgPool, statements: &'static str) {
    sqlx::raw_sql(statements).execute(pool).await.unwrap();
}

/// ada is in `team`, which is in `ops`; `ops` may `workers.*`; bob is suspended, eve has nothing.
async fn small_world(pool: &PgPool) {
    sql(
        pool,
        "insert into authz.actions values ('workers.scale'), ('workers.stop'), ('queue.read');
         insert into authz.directories (directory_id, directory_name, last_complete_sync_at) values (1, 'corp', now());
         insert into authz.users (user_id, user_name, status, external_id, directory_id) values
             (1, 'ada', 'active', 'Sub-1', 1), (2, 'bob', 'suspended', null, 0), (3, 'eve', 'active', null, 0),
             (4, 'old', 'deleted', 'sub-4', 1);
         insert into authz.groups (group_id, group_name) values (1, 'ops'), (2, 'team');
         insert into authz.group_groups values (1, 2);
         insert into authz.group_users values (2, 1), (2, 2);
         insert into authz.group_actions (group_id, action_name) values (1, 'workers.*')",
    )
    .await;
}

#[tokio::test]
async fn many_checks_answer_in_order_with_repeats_and_unknown_names() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let questions = [
        ("ada", "workers.scale"),
        ("eve", "workers.scale"),
        ("nobody", "workers.scale"),
        ("ada", "no.such"),
        ("ada", "workers.scale"),
        ("bob", "workers.stop"),
        ("ada", "queue.read"),
    ]
    .map(|(u, a)| (user(u), action(a)));
    let many = authz::check_many(&pool, &questions).await.unwrap();
    for ((user, action), decision) in questions.iter().zip(&many) {
        assert_eq!(*decision, authz::check(&pool, user, action).await.unwrap(), "{user} {action}");
    }
    assert_eq!(many.len(), questions.len());
    assert_eq!(authz::check_many(&pool, &[]).await.unwrap(), []);
}

#[tokio::test]
async fn a_user_is_found_by_sub_byte_by_byte_and_not_once_deleted() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let scale = action("workers.scale");
    let by_name = authz::check(&pool, &user("ada"), &scale).await.unwrap();
    let sub = Sub::parse("Sub-1").unwrap();
    assert!(by_name.is_allow());
    assert_eq!(authz::check(&pool, &sub, &scale).await.unwrap(), by_name);
    assert_eq!(authz::explain(&pool, &sub, &scale).await.unwrap().decision, by_name);
    assert_eq!(
        authz::actions_of(&pool, &sub).await.unwrap(),
        [action("workers.scale"), action("workers.stop")]
    );
    let many = ["Sub-1", "sub-1", "Sub-1", "sub-4"].map(|sub| (Sub::parse(sub).unwrap(), scale.clone()));
    let many = authz::check_many_by_sub(&pool, &many).await.unwrap();
    assert_eq!(many.iter().map(Decision::is_allow).collect::<Vec<_>>(), [true, false, true, false]);
    assert_eq!((&many[0], authz::check_many_by_sub(&pool, &[]).await.unwrap()), (&by_name, vec![]));
    for other in ["sub-1", "sub-4", "ada"] {
        let decision = authz::check(&pool, &Sub::parse(other).unwrap(), &scale).await.unwrap();
        assert!(
            matches!(&decision, Decision::Deny(d) if d.reason == DenyReason::UnknownUser),
            "{other}: {decision}"
        );
    }
}

#[tokio::test]
async fn a_list_of_users_comes_in_pages_that_miss_and_repeat_nobody() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    sql(
        &pool,
        "insert into authz.users (user_id, user_name) select n, format('user%s', n) from generate_series(100, 110) n;
         insert into authz.group_users select 2, n from generate_series(100, 110) n;
         insert into authz.group_directories values (1, 1);
         insert into authz.user_actions (user_id, action_name) values (3, '*'), (100, '*')",
    )
    .await;
    let scale = action("workers.scale");
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let page = authz::users_who_can(&pool, &scale, after.as_ref(), 4).await.unwrap();
        assert!(page.users.len() <= 4);
        all.extend(page.users);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let mut names: Vec<String> = (100..=110).map(|n| format!("user{n}")).collect();
    names.extend(["ada".to_owned(), "eve".to_owned()]);
    names.sort();
    assert_eq!(all.iter().map(ToString::to_string).collect::<Vec<_>>(), names);
    let none = authz::users_who_can(&pool, &action("no.such"), None, 10).await.unwrap();
    assert_eq!((none.users.len(), none.next), (0, None));
}

#[tokio::test]
async fn what_is_missing_turns_the_deny_into_an_allow() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let missing =
        async |who: &str, what: &str| authz::explain(&pool, &user(who), &action(what)).await.unwrap().missing;
    // Suspended, with a path: being active is enough.
    let bob = missing("bob", "workers.scale").await;
    assert_eq!((bob.required, bob.one_of), (vec![Fact::UserIsActive], vec![]));
    // Unregistered, with a wildcard: registering is enough.
    let unregistered = missing("ada", "workers.new").await;
    assert_eq!(
        (unregistered.required, unregistered.one_of),
        (vec![Fact::ActionIsRegistered(action("workers.new"))], vec![])
    );
    // No grant: a group that has one, or a grant.
    let eve = missing("eve", "workers.scale").await;
    assert_eq!(eve.required, []);
    assert_eq!(eve.one_of, [Fact::MemberOf(group("ops")), Fact::Granted(action("workers.scale"))]);
    let nobody = missing("nobody", "workers.scale").await;
    assert_eq!(nobody.required, [Fact::UserExists]);
    // Ended: renewing it.
    let ended = Grant::new(pattern("queue.read"), "for a day").until(chrono::DateTime::UNIX_EPOCH);
    grant::to_user(&pool, &user("eve"), &ended, &admin()).await.unwrap();
    let expired = missing("eve", "queue.read").await;
    assert!(
        matches!(&expired.one_of[..], [Fact::GrantIsRenewed(path), Fact::Granted(_)] if path.groups.is_empty())
    );
    // An allow misses nothing.
    let allowed = missing("ada", "workers.scale").await;
    assert_eq!((allowed.required, allowed.one_of), (vec![], vec![]));
}

#[tokio::test]
async fn a_stale_directory_is_an_error_and_no_answer() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    let authz = Authz::new(pool.clone()).max_directory_age(Duration::from_hours(1));
    let ask = async || authz.check(&user("ada"), &action("workers.scale")).await;
    assert!(ask().await.unwrap().is_allow());
    sql(&pool, "update authz.directories set last_complete_sync_at = now() - interval '2 hours' where directory_id = 1")
        .await;
    let error = ask().await.unwrap_err();
    assert!(
        matches!(&error, Error::DirectoryStale { age: Some(age), .. } if age.as_secs() >= 7200),
        "{error}"
    );
    assert!(matches!(authz.actions_of(&user("ada")).await, Err(Error::DirectoryStale { .. })));
    sql(&pool, "update authz.directories set last_complete_sync_at = null where directory_id = 1").await;
    let error = ask().await.unwrap_err();
    assert!(error.to_string().contains("never synced completely"), "{error}");
    assert_eq!(authz::directory::age(&pool).await.unwrap(), None);
    // What is kept by hand has no sync to be late.
    sql(
        &pool,
        "update authz.users set directory_id = 0; delete from authz.directories where directory_id = 1",
    )
    .await;
    assert!(ask().await.is_ok());
}

#[tokio::test]
async fn a_check_is_planned_once_and_never_compiled() {
    async fn assert_planned_once(url: &str) {
        let mut connection = PgConnection::connect(url).await.unwrap();
        for n in 0..30 {
            let _ = authz::check(&mut connection, &user(&format!("u{}", 1000 + n)), &action("a7.b"))
                .await
                .unwrap();
        }
        let (name, generic, custom): (String, i64, i64) = sqlx::query_as(
            "select name, generic_plans, custom_plans from pg_prepared_statements
             where statement like '%authz.group_reach%'",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        assert!(custom <= 5 && generic >= 25, "{custom} custom plans, {generic} generic ones");
        let explain =
            format!("explain (format json) execute \"{name}\" ('u1000', 'a7.b', '{{a7.b,a7.*,*}}')");
        let plan: serde_json::Value =
            sqlx::query_scalar(sqlx::AssertSqlSafe(explain)).fetch_one(&mut connection).await.unwrap();
        let cost = plan[0]["Plan"]["Total Cost"].as_f64().unwrap();
        // A hundredth of the default of `jit_above_cost`.
        assert!(cost < 1_000.0, "{plan:#}");
    }

    let (database, pool) = support::database().await;
    small_world(&pool).await;
    // Without statistics, as a new database is.
    assert_planned_once(database.url()).await;
    // Enough rows that the choice is one, with statistics.
    sql(
        &pool,
        "insert into authz.users (user_id, user_name) select n, format('u%s', n) from generate_series(1000, 6000) n;
         insert into authz.groups (group_id, group_name) select n, format('g%s', n) from generate_series(100, 400) n;
         insert into authz.group_users select 100 + (n * 7 + k * 31) % 300, n from generate_series(1000, 6000) n, generate_series(1, 10) k
             on conflict do nothing;
         insert into authz.actions select format('a%s.b', n) from generate_series(1, 200) n;
         insert into authz.group_actions (group_id, action_name) select 100 + n % 300, format('a%s.b', 1 + n % 199) from generate_series(1, 20000) n
             on conflict do nothing;
         analyze",
    )
    .await;
    assert_planned_once(database.url()).await;
}

#[tokio::test]
async fn reach_is_the_closure_joined_with_the_grants() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    for statement in [
        "insert into authz.groups (group_id, group_name) select n, format('g%s', n) from generate_series(10, 30) n",
        "insert into authz.group_groups select n / 3 + 8, n from generate_series(10, 30) n where n / 3 + 8 <> n on conflict do nothing",
        "insert into authz.group_actions (group_id, action_name) select n, 'queue.read' from generate_series(10, 30, 2) n",
        "update authz.group_actions set action_name = 'queue.*' where group_id = 12",
        "update authz.group_actions set expires_at = now() where group_id = 14",
        "update authz.group_groups set parent_group_id = 30 where child_group_id = 13",
        "delete from authz.group_groups where child_group_id in (12, 15)",
        "update authz.groups set status = 'deleted' where group_id = 14",
        "delete from authz.group_actions where group_id = 16",
        "update authz.group_actions set group_id = 11 where group_id = 18",
        "truncate authz.group_groups",
        "insert into authz.group_groups values (10, 11), (11, 12), (12, 10)",
        "truncate authz.group_actions",
        // A grant taken and given again by one statement, whose parts do not end in the order of their rows.
        "insert into authz.group_actions (group_id, action_name) values (11, 'queue.read'), (12, 'queue.read')",
        "with taken as (delete from authz.group_actions where action_name = 'queue.read' returning group_id)
         insert into authz.group_actions (group_id, action_name, reason) select group_id, 'queue.read', 'again' from taken limit 1",
        "with moved as (update authz.group_actions set action_name = 'queue.*' where action_name = 'queue.read' returning group_id)
         insert into authz.group_actions (group_id, action_name) select group_id, 'queue.read' from moved limit 1",
    ] {
        sql(&pool, statement).await;
        let differing: i64 = sqlx::query_scalar(
            "select count(*) from (
                 (select group_id, action_name collate \"C\", holder_id, depth from authz.group_reach
                  except select an.group_id, ga.action_name, an.ancestor_id, an.depth
                  from authz.group_ancestors an join authz.group_actions ga on ga.group_id = an.ancestor_id)
                 union all
                 (select an.group_id, ga.action_name collate \"C\", an.ancestor_id, an.depth
                  from authz.group_ancestors an join authz.group_actions ga on ga.group_id = an.ancestor_id
                  except select group_id, action_name, holder_id, depth from authz.group_reach)) d",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        assert_eq!(differing, 0, "after: {statement}");
    }
}

#[tokio::test]
async fn a_group_named_by_hand_with_what_nobody_can_type_is_explained_like_any_other() {
    let (_database, pool) = support::database().await;
    small_world(&pool).await;
    sql(
        &pool,
        "insert into authz.users (user_id, user_name) values (900, 'odd');
         insert into authz.groups (group_id, group_name) values (900, E'no\\u00a0break'), (901, E'no\\u00a0break\\u00a0above');
         insert into authz.group_groups values (901, 900);
         insert into authz.group_users values (900, 900);
         insert into authz.actions values ('odd.one'), ('odd.two');
         insert into authz.group_actions (group_id, action_name) values (901, 'odd.one'), (900, 'odd.two')",
    )
    .await;
    let allowed = authz::explain(&pool, &user("odd"), &action("odd.one")).await.unwrap();
    let groups: Vec<_> = allowed.paths[0].groups.iter().map(ToString::to_string).collect();
    assert_eq!(groups, ["no\u{a0}break", "no\u{a0}break\u{a0}above"]);
    let denied = authz::explain(&pool, &user("u1"), &action("odd.two")).await.unwrap();
    assert_eq!(denied.would_allow[0].to_string(), "no\u{a0}break");
}
