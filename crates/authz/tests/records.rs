//! What the database writes into the trail of itself, where a change is not what it looks like.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::time::Duration;

use authz::audit::{self, Actor, Moment, Outcome, Record};
use authz::{grant, user};
use serde_json::{Value, json};
use sqlx::{Executor, PgPool};
use support::{action, admin, pattern};

async fn latest(pool: &PgPool, action: &str) -> Value {
    sqlx::query_scalar("select detail from authz.audit_log where action = $1 order by audit_id desc limit 1")
        .bind(action)
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn whose_login_a_user_is_is_recorded() {
    let (_database, pool) = support::database().await;
    user::create(&pool, &support::user("a"), "", &admin()).await.unwrap();
    assert_eq!(latest(&pool, "state.users").await, json!({ "users": [[1, "a", "active", 0, null]] }));
    pool.execute("update authz.users set external_id = 'sub-of-another'").await.unwrap();
    assert_eq!(
        latest(&pool, "state.users").await,
        json!({ "users": [[1, "a", "active", 0, "sub-of-another"]] })
    );
    let before: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    pool.execute("update authz.users set display_name = 'A'").await.unwrap();
    let after: i64 =
        sqlx::query_scalar("select count(*) from authz.audit_log").fetch_one(&pool).await.unwrap();
    assert_eq!(before, after);
    pool.execute("select authz.write_audit_baseline()").await.unwrap();
    assert_eq!(
        latest(&pool, "state.users").await,
        json!({ "users": [[1, "a", "active", 0, "sub-of-another"]] })
    );
}

#[tokio::test]
async fn an_action_that_is_taken_away_and_registered_by_one_statement_is_there() {
    let (_database, pool) = support::database().await;
    user::create(&pool, &support::user("a"), "", &admin()).await.unwrap();
    authz::action::register(&pool, &[(action("z.one"), ""), (action("z.two"), "")], &admin()).await.unwrap();
    let all = grant::Grant::new(pattern("*"), "why");
    grant::to_user(&pool, &support::user("a"), &all, &admin()).await.unwrap();
    // The part that registers one ends before the part that takes both away.
    pool.execute(
        "with gone as (delete from authz.actions returning *),
              came as (insert into authz.actions select * from gone where action_name = 'z.one' limit 1 returning 1)
         select count(*) from came",
    )
    .await
    .unwrap();
    let now = sqlx::query_scalar("select clock_timestamp()").fetch_one(&pool).await.unwrap();
    for (name, holders) in [("z.one", 1), ("z.two", 0)] {
        let could = audit::who_could(&pool, &action(name), Moment::At(now)).await;
        assert_eq!(could.map_or(0, |found| found.len()), holders, "{name}");
    }
}

/// Who writes while the part of the month under way is made waits for it, and is not refused.
#[tokio::test]
async fn no_record_is_refused_for_the_month_that_is_just_made() {
    let (_database, pool) = support::database().await;
    let month = "select to_char(now() at time zone 'UTC', 'YYYYMM')";
    let month: String = sqlx::query_scalar(month).fetch_one(&pool).await.unwrap();
    // As where nobody has made months for a long time.
    let before = "select to_char(now() at time zone 'UTC' - interval '1 month', 'YYYYMM')";
    let before: String = sqlx::query_scalar(before).fetch_one(&pool).await.unwrap();
    pool.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "drop table authz.audit_log_{month}; drop table if exists authz.audit_log_{before};
         insert into authz.audit_log (service, actor, action, outcome, recorded_at)
         values ('tests', 'a', 'x', 'succeeded', now() - interval '1 month')"
    ))))
    .await
    .unwrap();
    let make = async |maker: &mut sqlx::PgConnection, months: i32| {
        sqlx::query_scalar::<_, bool>(
            "select authz.make_audit_partition(
                 (date_trunc('month', now() at time zone 'UTC') - make_interval(months => $1))::date)",
        )
        .bind(months)
        .fetch_one(maker)
        .await
        .unwrap()
    };
    let mut maker = pool.begin().await.unwrap();
    assert!(make(&mut maker, 1).await);
    let writer = tokio::spawn({
        let pool = pool.clone();
        async move {
            let record = Record::new("workers.scale", Outcome::Succeeded);
            audit::record(&pool, &Actor::new("a", "tests"), &record).await
        }
    });
    tokio::time::timeout(Duration::from_mins(1), async {
        let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&pool).await.unwrap() == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap();
    assert!(make(&mut maker, 0).await);
    maker.commit().await.unwrap();
    writer.await.unwrap().unwrap();
    let there = format!("select count(*) from authz.audit_log_{month} where action = 'workers.scale'");
    let there: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(there)).fetch_one(&pool).await.unwrap();
    assert_eq!(there, 1);
}

#[tokio::test]
async fn jobs_write_nothing_that_readers_stumble_over() {
    let (_database, pool) = support::database().await;
    for told in [
        "{\"before_micros\": 0, \"through_seal\": 1e30}",
        "{\"before_micros\": -1e30, \"through_seal\": 1}",
        "{\"before_micros\": \"0\", \"through_seal\": 1}",
    ] {
        let refused = sqlx::query("select authz.note_audit_prune($1::jsonb)")
            .bind(told.parse::<Value>().unwrap())
            .execute(&pool)
            .await
            .unwrap_err();
        assert!(refused.to_string().contains("is no number that fits into eight bytes"), "{refused}");
    }
    let mut tx = pool.begin().await.unwrap();
    tx.execute("set transaction isolation level repeatable read").await.unwrap();
    let refused = tx.execute("select authz.write_audit_baseline()").await.unwrap_err();
    assert!(refused.to_string().contains("read committed"), "{refused}");
    drop(tx);
    assert_eq!(audit::verify(&pool, &audit::Trust::new()).await.unwrap().finding, None);
}
