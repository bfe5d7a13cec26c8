//! Operations: what is run, what is not, and what the trail then says.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use authz::audit::operation::OperationError;
use authz::audit::{self, Entry, Outcome};
use authz::grant::{self, Grant};
use authz::{ActionName, Authz, Error, Permit, Refusal, Sub, action, group, user};
use serde_json::json;
use sqlx::PgPool;
use support::{action as a, admin, group as g, pattern as p, user as u};

authz::actions! {
    const ACTIONS;

    /// Set a role's number of workers.
    WorkersScale = "workers.scale";
    /// Look at the queue.
    QueueRead = "queue.read";
}

/// ada may scale workers.
async fn world() -> (testdb::Database, PgPool, Authz) {
    let (database, pool) = support::database().await;
    action::register(&pool, ACTIONS, &admin()).await.unwrap();
    action::register(&pool, &[(a("workers.scale.web"), "")], &admin()).await.unwrap();
    user::create(&pool, &u("ada"), "Ada", &admin()).await.unwrap();
    grant::to_user(&pool, &u("ada"), &Grant::new(p("workers.*"), "she runs them"), &admin()).await.unwrap();
    grant::to_user(&pool, &u("ada"), &Grant::new(p("workers.scale"), ""), &admin()).await.unwrap();
    sqlx::query("create table roles (role_name text primary key)").execute(&pool).await.unwrap();
    let authz = Authz::new(pool.clone()).service("ops-dashboard");
    (database, pool, authz)
}

/// What operations have left, in order.
async fn trail(pool: &PgPool) -> Vec<Entry> {
    let mut entries = audit::latest(pool, 1000).await.unwrap();
    entries.retain(|entry| entry.service == "ops-dashboard" && !entry.action.starts_with("audit."));
    entries.reverse();
    entries
}

fn outcomes(trail: &[Entry]) -> Vec<Outcome> {
    trail.iter().map(|entry| entry.outcome).collect()
}

/// The trail, once it has so many records of operations.
async fn trail_of(pool: &PgPool, records: usize) -> Vec<Entry> {
    let waiting = async {
        loop {
            let trail = trail(pool).await;
            if trail.len() >= records {
                return trail;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), waiting).await.expect("the records")
}

async fn open_operations(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from authz.open_operations").fetch_one(pool).await.unwrap()
}

async fn roles(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from roles").fetch_one(pool).await.unwrap()
}

#[tokio::test]
async fn operation_records_who_what_and_why_before_it_runs_and_its_end_after() {
    let (_database, pool, authz) = world().await;
    let seen = authz
        .operation::<WorkersScale>(&u("ada"))
        .target("role web")
        .detail(json!({ "workers": 4 }))
        .request("req-7")
        .run(|permit: Arc<Permit<WorkersScale>>| {
            let pool = pool.clone();
            async move {
                assert_eq!(permit.user(), &u("ada"));
                Ok::<_, Infallible>(trail(&pool).await)
            }
        })
        .await
        .unwrap();
    let [started] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(
        (started.actor.as_str(), started.action.as_str(), started.outcome, started.target.as_deref()),
        ("ada", "workers.scale", Outcome::Started, Some("role web"))
    );
    assert_eq!((&started.detail, started.request_id.as_deref()), (&json!({ "workers": 4 }), Some("req-7")));
    let decision = authz.check(&u("ada"), &a("workers.scale")).await.unwrap();
    assert_eq!(started.decision, Some(serde_json::to_value(&decision).unwrap()));
    assert_eq!(started.revision, Some(decision.revision().0));
    let after = trail(&pool).await;
    assert_eq!(outcomes(&after), [Outcome::Started, Outcome::Succeeded]);
    assert_eq!(after[1].operation_id, Some(started.audit_id));
    assert_eq!((&after[1].request_id, &after[1].target), (&started.request_id, &started.target));
    assert_eq!(open_operations(&pool).await, 0);
}

#[tokio::test]
async fn operation_by_sub_is_recorded_under_the_users_name() {
    let (_database, pool, authz) = world().await;
    sqlx::query("update authz.users set external_id = 'Sub-Ada'").execute(&pool).await.unwrap();
    let ada = Sub::parse("Sub-Ada").unwrap();
    authz.operation::<WorkersScale>(&ada).run(async |_| Ok::<_, Infallible>(())).await.unwrap();
    authz
        .operation::<WorkersScale>(&ada)
        .transact(async |permit, connection| {
            assert_eq!(permit.user(), &u("ada"));
            sqlx::raw_sql(
                "insert into authz.groups (group_name) values ('g');
                 insert into authz.group_users select group_id, user_id from authz.groups, authz.users",
            )
            .execute(connection)
            .await
        })
        .await
        .unwrap();
    for (sub, action) in [(&ada, "queue.write"), (&Sub::parse("Sub-Eve").unwrap(), "workers.scale")] {
        let refused = authz.operation_named(sub, &a(action)).run(async |_| Ok::<_, Infallible>(())).await;
        assert!(matches!(refused, Err(OperationError::Refused(Refusal::Denied(_)))), "{refused:?}");
    }
    let recorded: Vec<(String, String)> = sqlx::query_as(
        "select actor, outcome from authz.audit_log where service = 'ops-dashboard' order by audit_id",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let recorded: Vec<_> =
        recorded.iter().map(|(actor, outcome)| (actor.as_str(), outcome.as_str())).collect();
    assert_eq!(
        recorded,
        [
            ("ada", "started"),
            ("ada", "succeeded"),
            ("ada", "succeeded"), // the group
            ("ada", "succeeded"), // the membership
            ("ada", "succeeded"),
            ("ada", "denied"),
            ("sub Sub-Eve", "denied"),
        ]
    );
}

#[tokio::test]
async fn resource_is_the_target_unless_another_is_given() {
    let (_database, pool, authz) = world().await;
    authz
        .operation_on::<WorkersScale>(&u("ada"), "web")
        .run(async |_| Ok::<_, Infallible>(()))
        .await
        .unwrap();
    let first = &trail(&pool).await[0];
    assert_eq!((first.action.as_str(), first.target.as_deref()), ("workers.scale.web", Some("web")));
}

#[tokio::test]
async fn denied_operation_is_not_run_and_recorded_with_its_reason() {
    let (_database, pool, authz) = world().await;
    let ran = AtomicBool::new(false);
    let refused = authz
        .operation::<QueueRead>(&u("ada"))
        .run(async |_| {
            ran.store(true, Ordering::Relaxed);
            Ok::<_, Infallible>(())
        })
        .await;
    assert!(matches!(refused, Err(OperationError::Refused(Refusal::Denied(_)))), "{refused:?}");
    assert!(!ran.into_inner());
    let refused =
        authz.operation::<QueueRead>(&u("ada")).transact(async |_, _| Ok::<_, Infallible>(())).await;
    assert!(matches!(refused, Err(OperationError::Refused(Refusal::Denied(_)))), "{refused:?}");
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Denied, Outcome::Denied]);
    assert_eq!(trail[0].decision.as_ref().unwrap()["deny"]["reason"], "no_grant");
}

#[tokio::test]
async fn text_that_is_no_resource_is_recorded_as_denied() {
    let (_database, pool, authz) = world().await;
    let refused = authz
        .operation_on::<WorkersScale>(&u("ada"), "../etc\0")
        .run(async |_| Ok::<_, Infallible>(()))
        .await;
    assert!(matches!(refused, Err(OperationError::Refused(Refusal::NotAResource { .. }))), "{refused:?}");
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Denied]);
    assert!(trail[0].detail["refusal"].as_str().unwrap().contains("etc"), "{trail:?}");
}

#[tokio::test]
async fn denial_survives_the_rollback_of_the_caller_who_uses_up_the_pool() {
    let (database, _pool, _) = world().await;
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(2).connect(database.url()).await.unwrap();
    let authz = Authz::new(pool.clone()).service("ops-dashboard");
    let tx = pool.begin().await.unwrap();
    let refused = authz.operation::<QueueRead>(&u("ada")).begin().await;
    assert!(matches!(refused, Err(Refusal::Denied(_))), "{refused:?}");
    tx.rollback().await.unwrap();
    assert_eq!(outcomes(&trail(&pool).await), [Outcome::Denied]);
}

#[tokio::test]
async fn failed_operation_keeps_the_text_of_its_error() {
    let (_database, pool, authz) = world().await;
    let failed =
        authz.operation::<WorkersScale>(&u("ada")).run(async |_| Err::<(), _>("the scheduler said no")).await;
    assert!(matches!(failed, Err(OperationError::Failed("the scheduler said no"))), "{failed:?}");
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Started, Outcome::Failed]);
    assert_eq!(trail[1].detail, json!({ "error": "the scheduler said no" }));
}

#[tokio::test]
async fn panic_and_cancelled_future_are_abandoned_by_themselves() {
    let (_database, pool, authz) = world().await;
    let task = tokio::spawn({
        let authz = authz.clone();
        async move {
            authz
                .operation::<WorkersScale>(&u("ada"))
                .run(async |_| -> Result<(), Infallible> { panic!("a bug") })
                .await
        }
    });
    assert!(task.await.unwrap_err().is_panic());
    let after = trail_of(&pool, 2).await;
    assert_eq!(outcomes(&after), [Outcome::Started, Outcome::Abandoned]);
    assert_eq!(after[1].detail, json!({ "reason": "the task that ran it panicked" }));

    let never = authz
        .operation::<WorkersScale>(&u("ada"))
        .run(async |_| std::future::pending::<Result<(), Infallible>>().await);
    assert!(tokio::time::timeout(Duration::from_millis(200), never).await.is_err());
    let after = trail_of(&pool, 4).await;
    assert_eq!(outcomes(&after)[2..], [Outcome::Started, Outcome::Abandoned]);
    assert_eq!(after[3].operation_id, Some(after[2].audit_id));
    authz.shutdown().await;
    assert_eq!(open_operations(&pool).await, 0);
}

#[tokio::test]
async fn operation_whose_start_nobody_waited_for_is_abandoned() {
    let (_database, pool, authz) = world().await;
    // Holds the writer's statement back, so that its caller goes before the answer comes.
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("lock table authz.audit_log in exclusive mode").execute(&mut *lock).await.unwrap();
    let start = authz.operation::<WorkersScale>(&u("ada")).start();
    assert!(tokio::time::timeout(Duration::from_millis(300), start).await.is_err());
    lock.rollback().await.unwrap();
    let after = trail_of(&pool, 2).await;
    assert_eq!(outcomes(&after), [Outcome::Started, Outcome::Abandoned]);
    authz.shutdown().await;
    assert_eq!(open_operations(&pool).await, 0);
}

#[tokio::test]
async fn nothing_is_run_that_cannot_be_recorded() {
    let (_database, pool, authz) = world().await;
    let ran = AtomicBool::new(false);
    let run = async || {
        authz
            .operation::<WorkersScale>(&u("ada"))
            .run(async |_| {
                ran.store(true, Ordering::Relaxed);
                Ok::<_, Infallible>(())
            })
            .await
    };
    sqlx::query("alter table authz.audit_log add constraint full_up check (false) not valid")
        .execute(&pool)
        .await
        .unwrap();
    let refused = run().await;
    assert!(
        matches!(refused, Err(OperationError::Refused(Refusal::Unrecorded(Error::NotRecorded(_))))),
        "{refused:?}"
    );
    let changed = authz
        .operation::<WorkersScale>(&u("ada"))
        .transact(async |_, c| sqlx::query("insert into roles values ('web')").execute(c).await)
        .await;
    assert!(matches!(changed, Err(OperationError::RolledBack(_))), "{changed:?}");
    assert!(!ran.load(Ordering::Relaxed));
    assert_eq!(roles(&pool).await, 0);
    sqlx::query("alter table authz.audit_log drop constraint full_up").execute(&pool).await.unwrap();
    run().await.unwrap();
    assert!(ran.load(Ordering::Relaxed));
    // That the change failed is known by now; the operation that was refused left nothing.
    authz.shutdown().await;
    let mut said = outcomes(&trail(&pool).await);
    said.sort_by_key(|outcome| outcome.as_str());
    assert_eq!(said, [Outcome::Failed, Outcome::Started, Outcome::Succeeded]);
}

#[tokio::test]
async fn detail_that_is_too_large_is_an_error_and_nothing_is_run() {
    let (_database, pool, authz) = world().await;
    let refused = authz
        .operation::<WorkersScale>(&u("ada"))
        .detail(json!({ "text": "x".repeat(audit::DETAIL_LIMIT) }))
        .run(async |_| -> Result<(), Infallible> { panic!("it was run") })
        .await;
    let Err(OperationError::Refused(Refusal::Unrecorded(error))) = refused else { panic!("{refused:?}") };
    assert_eq!(
        error.to_string(),
        "the detail of an audit record has 16395 bytes, and at most 16384 are recorded; make it shorter"
    );
    assert_eq!(trail(&pool).await, []);
}

#[tokio::test]
async fn denial_is_recorded_however_long_its_texts_are() {
    let (_database, pool, authz) = world().await;
    let long = "x".repeat(30_000);
    let asked = || {
        authz
            .operation::<QueueRead>(&u("ada"))
            .target(&long)
            .request(&long)
            .detail(json!({ "body": long, "deep": (0..500).fold(json!(1), |deep, _| json!([deep])) }))
    };
    let run = asked().run(|_| async { Ok::<_, Infallible>(()) }).await;
    let change = asked().transact(async |_, _| Ok::<_, Infallible>(())).await;
    for refused in [run, change] {
        assert!(matches!(refused, Err(OperationError::Refused(Refusal::Denied(_)))), "{refused:?}");
    }
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Denied, Outcome::Denied]);
    for entry in &trail {
        assert!(entry.detail["left_out"].as_str().unwrap().ends_with(" bytes"), "{}", entry.detail);
        for text in [&entry.target, &entry.request_id] {
            assert!(text.as_ref().unwrap().ends_with("(shortened, 30000 bytes in all)"));
        }
    }
    // Who may do it is told to make it shorter, and nothing is run.
    let asked = authz.operation::<WorkersScale>(&u("ada")).target(&long);
    let refused = asked.transact(async |_, _| Ok::<_, Infallible>(())).await;
    let Err(OperationError::Refused(Refusal::Unrecorded(error))) = refused else { panic!("{refused:?}") };
    assert!(matches!(error, Error::RecordTooLarge { .. }), "{error}");
}

#[tokio::test]
async fn record_that_is_nested_deep_is_read_with_the_others() {
    let (_database, pool, authz) = world().await;
    let deep = (0..500).fold(json!("innermost"), |deep, _| json!({ "a": deep }));
    let ran = authz.operation::<WorkersScale>(&u("ada")).detail(deep);
    ran.run(|_| async { Ok::<_, Infallible>(()) }).await.unwrap();
    // And by hand, as records from before may be.
    let deep = format!("{}{}", "[".repeat(1_000), "]".repeat(1_000));
    sqlx::query(
        "insert into authz.audit_log (service, actor, action, outcome, detail, decision)
         values ('ops-dashboard', 'a', 'x', 'succeeded', $1::text::jsonb, $1::text::jsonb)",
    )
    .bind(&deep)
    .execute(&pool)
    .await
    .unwrap();
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Started, Outcome::Succeeded, Outcome::Succeeded]);
    assert!(trail[0].detail.to_string().contains("innermost"));
    assert_eq!(trail[2].detail, json!(deep));
    assert_eq!(trail[2].decision, Some(json!(deep)));
    let page = audit::Query::new().page(&pool, None, 1_000).await.unwrap();
    assert!(page.entries.iter().any(|entry| entry.detail == json!(deep)));
}

#[tokio::test]
async fn work_that_ends_the_transaction_by_itself_is_not_recorded_as_done() {
    let (_database, pool, authz) = world().await;
    for end in ["rollback", "rollback; begin", "commit", "commit and chain"] {
        let done = authz
            .operation::<WorkersScale>(&u("ada"))
            .transact(async |_, connection| {
                sqlx::query("insert into roles values ('web') on conflict do nothing")
                    .execute(&mut *connection)
                    .await?;
                sqlx::raw_sql(end).execute(&mut *connection).await
            })
            .await;
        if end.starts_with("commit") {
            assert!(matches!(done, Err(OperationError::Unknown(_))), "{end}: {done:?}");
        } else {
            assert!(matches!(done, Err(OperationError::RolledBack(_))), "{end}: {done:?}");
        }
        let trail = trail(&pool).await;
        let last = trail.last().unwrap();
        assert_eq!(last.outcome, Outcome::Failed, "{end}");
        assert!(
            last.detail.to_string().contains("ended the transaction by SQL of its own"),
            "{}",
            last.detail
        );
        assert!(trail.iter().all(|entry| entry.outcome == Outcome::Failed));
    }
}

#[tokio::test]
async fn commit_that_fails_is_recorded_with_its_cause() {
    let (_database, pool, authz) = world().await;
    sqlx::raw_sql("create table later (n integer unique deferrable initially deferred)")
        .execute(&pool)
        .await
        .unwrap();
    let work = async |_: &Permit<WorkersScale>, c: &mut sqlx::PgConnection| {
        sqlx::raw_sql("insert into later values (1), (1)").execute(c).await
    };
    authz.operation::<WorkersScale>(&u("ada")).transact(work).await.unwrap_err();
    let work = async |_: &Permit<WorkersScale>, c: &mut sqlx::PgConnection| {
        let _ = sqlx::query("insert into nowhere values (1)").execute(c).await;
        Ok::<_, String>(())
    };
    authz.operation::<WorkersScale>(&u("ada")).transact(work).await.unwrap_err();
    let trail = trail(&pool).await;
    for (entry, cause) in trail.iter().zip(["duplicate key value", "current transaction is aborted"]) {
        assert_eq!(entry.outcome, Outcome::Failed);
        assert!(entry.detail["error"].as_str().unwrap().contains(cause), "{}", entry.detail);
    }
    assert_eq!(trail.len(), 2);
}

#[tokio::test]
async fn secrets_are_redacted_in_details_and_errors() {
    let (_database, pool, authz) = world().await;
    let authz = authz.redact(|action, detail| {
        assert_eq!(action, "workers.scale");
        audit::redact_keys(&["token"])(action, detail);
        if let Some(text) = detail["error"].as_str() {
            detail["error"] = text.replace("hunter2", "…").into();
        }
    });
    let _ = authz
        .operation::<WorkersScale>(&u("ada"))
        .detail(json!({ "token": "hunter2" }))
        .run(async |_| Err::<(), _>("the password hunter2 is wrong"))
        .await;
    let _ = authz
        .operation::<WorkersScale>(&u("ada"))
        .detail(json!({ "token": "hunter2" }))
        .transact(async |_, _| Err::<(), _>("the password hunter2 is wrong"))
        .await;
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Started, Outcome::Failed, Outcome::Failed]);
    assert_eq!(trail[2].detail, json!({ "token": "[redacted]", "error": "the password … is wrong" }));
    assert!(!serde_json::to_string(&trail).unwrap().contains("hunter2"), "{trail:?}");
}

#[tokio::test]
async fn step_that_was_given_up_takes_its_operation_along() {
    let (_database, pool, authz) = world().await;
    let done = authz
        .operation::<WorkersScale>(&u("ada"))
        .transact(async |_, connection| {
            sqlx::query("insert into roles values ('web')").execute(&mut *connection).await?;
            assert!(sqlx::query("select 1 / 0").execute(&mut *connection).await.is_err());
            // Its savepoint cannot begin, and nobody looks.
            assert!(group::create(&mut *connection, &g("ops"), "", &admin()).await.is_err());
            sqlx::query("insert into roles values ('db')").execute(connection).await
        })
        .await;
    assert!(matches!(done, Err(OperationError::RolledBack(_))), "{done:?}");
    let web = "select count(*) from roles where role_name = 'web'";
    assert_eq!(sqlx::query_scalar::<_, i64>(web).fetch_one(&pool).await.unwrap(), 0);
    assert_eq!(outcomes(&trail(&pool).await), [Outcome::Failed]);
}

#[tokio::test]
async fn change_and_record_commit_together() {
    let (_database, pool, authz) = world().await;
    authz
        .operation::<WorkersScale>(&u("ada"))
        .target("role web")
        .request("req-8")
        .transact(async |permit, connection| {
            assert_eq!(permit.user(), &u("ada"));
            sqlx::query("insert into roles values ('web')").execute(&mut *connection).await?;
            // What triggers record says who acts, too.
            sqlx::query("insert into authz.groups (group_name) values ('g')")
                .execute(&mut *connection)
                .await?;
            sqlx::query(
                "insert into authz.group_users select group_id, user_id from authz.groups, authz.users",
            )
            .execute(connection)
            .await
        })
        .await
        .unwrap();
    let same: (i64, i64) = sqlx::query_as(
        "select count(*), count(distinct transaction_id) from authz.audit_log
         where actor = 'ada' and service = 'ops-dashboard' and request_id = 'req-8'
           and action in ('workers.scale', 'membership.add')",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(same, (2, 1));
    assert_eq!(roles(&pool).await, 1);
}

#[tokio::test]
async fn change_that_fails_or_is_dropped_is_rolled_back_and_recorded() {
    let (_database, pool, authz) = world().await;
    let failed = authz
        .operation::<WorkersScale>(&u("ada"))
        .detail(json!({ "workers": 4 }))
        .transact(async |_, connection| {
            sqlx::query("insert into roles values ('web')").execute(connection).await.unwrap();
            Err::<(), _>("changed my mind")
        })
        .await;
    assert!(matches!(failed, Err(OperationError::Failed("changed my mind"))), "{failed:?}");
    let mut change = authz.operation::<WorkersScale>(&u("ada")).begin().await.unwrap();
    sqlx::query("insert into roles values ('web')").execute(change.connection()).await.unwrap();
    drop(change);
    let trail = trail_of(&pool, 2).await;
    assert_eq!(outcomes(&trail), [Outcome::Failed, Outcome::Failed]);
    assert_eq!(trail[0].detail, json!({ "workers": 4, "error": "changed my mind" }));
    assert_eq!(trail[1].detail, json!({ "error": "rolled back: it was dropped before its commit" }));
    assert_eq!(roles(&pool).await, 0);
}

#[tokio::test]
async fn change_that_cannot_be_committed_is_recorded_as_failed() {
    let (_database, pool, authz) = world().await;
    sqlx::raw_sql("alter table roles add column boss text references roles deferrable initially deferred")
        .execute(&pool)
        .await
        .unwrap();
    let failed = authz
        .operation::<WorkersScale>(&u("ada"))
        .transact(async |_, c| sqlx::query("insert into roles values ('web', 'nobody')").execute(c).await)
        .await;
    assert!(matches!(failed, Err(OperationError::RolledBack(_))), "{failed:?}");
    let trail = trail(&pool).await;
    assert_eq!(outcomes(&trail), [Outcome::Failed]);
    assert!(trail[0].detail["error"].as_str().unwrap().starts_with("the commit failed"), "{trail:?}");
}

#[tokio::test]
async fn permission_is_decided_on_what_the_transaction_sees() {
    let (_database, pool, authz) = world().await;
    let mut change = authz.operation::<WorkersScale>(&u("ada")).begin().await.unwrap();
    grant::to_user(change.connection(), &u("ada"), &Grant::new(p("queue.*"), ""), &admin()).await.unwrap();
    let inside: Result<Permit<QueueRead>, _> = authz::authorize(change.connection(), &u("ada")).await;
    assert!(inside.is_ok(), "{inside:?}");
    change.fail(&"not now").await;
    let outside: Result<Permit<QueueRead>, _> = authz::authorize(&pool, &u("ada")).await;
    assert!(outside.is_err());
}

#[tokio::test]
async fn many_operations_at_once_each_have_their_start_and_end() {
    let (_database, pool, authz) = world().await;
    let authz = Arc::new(authz);
    let tasks: Vec<_> = (0..200)
        .map(|n| {
            let authz = Arc::clone(&authz);
            tokio::spawn(async move {
                let name: ActionName = a("workers.scale");
                authz
                    .operation_named(&u("ada"), &name)
                    .target(format!("role {n}"))
                    .run(async |_| if n % 3 == 0 { Err(n) } else { Ok(()) })
                    .await
            })
        })
        .collect();
    for task in tasks {
        let _ = task.await.unwrap();
    }
    let pairs: i64 = sqlx::query_scalar(
        "select count(*) from authz.audit_log s join authz.audit_log e on e.operation_id = s.audit_id
         where s.outcome = 'started' and e.target = s.target
           and e.outcome = case when substr(s.target, 6)::int % 3 = 0 then 'failed' else 'succeeded' end",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(pairs, 200);
    assert_eq!(trail(&pool).await.len(), 400);
    assert_eq!(open_operations(&pool).await, 0);
}

#[tokio::test]
async fn operations_can_be_spawned() {
    fn spawnable<T: Send + 'static>(_: T) {}
    let (_database, pool, authz) = world().await;
    let pool = pool.clone();
    spawnable(async move {
        let ran = authz.operation::<WorkersScale>(&u("ada")).run(async |_| Ok::<_, Infallible>(())).await;
        let changed = authz
            .operation::<WorkersScale>(&u("ada"))
            .transact(async |_, c| sqlx::query("insert into roles values ('web')").execute(c).await)
            .await;
        drop((ran.is_ok(), changed.is_ok(), pool));
    });
}
