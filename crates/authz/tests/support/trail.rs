//! A trail with something in it, and ways to spoil it.
#![allow(dead_code, reason = "each test binary uses a part")]

use authz::audit::{self, Actor, Outcome, Record};
use authz::grant::{self, Grant};
use authz::{ActionPattern, UserName, user};
use chrono::NaiveDate;
use serde_json::json;
use sqlx::{Connection, PgConnection, PgPool};

/// Records of all shapes, in transactions of one and of several.
pub(crate) async fn fill(pool: &PgPool, count: usize) {
    let odd = ["", "ä\u{2028}\"\\\n\t", "Ω≈ç√", "{\"json\": 1}", "\u{1}\u{7f}", "plain"];
    let mut number = 0;
    while number < count {
        let mut tx = pool.begin().await.unwrap();
        for _ in 0..=number % 3 {
            let text = odd[number % odd.len()];
            let actor = Actor::new(format!("user{number}{text}"), "tests");
            let actor = if number % 2 == 0 { actor.request(format!("req-{number}")) } else { actor };
            let detail = match number % 4 {
                0 => json!({}),
                1 => json!({ "text": text, "numbers": [1, -2.5, 1e30, 0.1], "b": null, "a": { "z": true } }),
                2 => json!([text, number]),
                _ => json!({ "n": number }),
            };
            let outcome =
                [Outcome::Started, Outcome::Succeeded, Outcome::Failed, Outcome::Denied][number % 4];
            let record = Record::new("workers.scale", outcome).detail(detail);
            let record = if number % 5 == 0 { record } else { record.target(text) };
            audit::record(&mut *tx, &actor, &record).await.unwrap();
            number += 1;
        }
        tx.commit().await.unwrap();
    }
}

/// What an administrator of the server can do: statements with the triggers off.
pub(crate) async fn spoil(pool: &PgPool, statements: &[&'static str]) {
    let mut connection = PgConnection::connect_with(&pool.connect_options()).await.unwrap();
    sqlx::raw_sql("set session_replication_role = replica").execute(&mut connection).await.unwrap();
    for statement in statements {
        let done = sqlx::raw_sql(*statement).execute(&mut connection).await.expect(statement);
        assert!(done.rows_affected() > 0, "{statement}");
    }
    connection.close().await.unwrap();
}

pub(crate) async fn this_month(pool: &PgPool) -> NaiveDate {
    sqlx::query_scalar("select date_trunc('month', now() at time zone 'UTC')::date")
        .fetch_one(pool)
        .await
        .unwrap()
}

/// Records and a grant in each of the last months; nothing sealed.
pub(crate) async fn old_months(pool: &PgPool) {
    let u = UserName::parse("a").unwrap();
    let admin = Actor::new("admin@example.com", "tests");
    user::create(pool, &u, "", &admin).await.unwrap();
    for months in (1..=3).rev() {
        let from: i64 = sqlx::query_scalar("select coalesce(max(audit_id), 0) from authz.audit_log")
            .fetch_one(pool)
            .await
            .unwrap();
        fill(pool, 8).await;
        let action = ActionPattern::parse(&format!("month{months}.*")).unwrap();
        grant::to_user(pool, &u, &Grant::new(action, "why"), &admin).await.unwrap();
        let statement = format!(
            "update authz.audit_log set recorded_at = (date_trunc('month', now() at time zone 'UTC') - interval '{months} months' + interval '10 days') at time zone 'UTC'
             where audit_id > {from}"
        );
        spoil(pool, &[statement.leak()]).await;
    }
}
