//! Connections with the rights of one role of `deploy/sql/roles.sql`.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::str::FromStr;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};

pub(crate) const ROLES: &str = include_str!("../../../../deploy/sql/roles.sql");
pub(crate) const ALL: [&str; 5] =
    ["authz_reader", "authz_service", "authz_sync", "authz_auditor", "authz_admin"];

pub(crate) async fn as_role(url: &str, role: &str) -> PgPool {
    let options = PgConnectOptions::from_str(url).unwrap().options([("role", role)]);
    PgPoolOptions::new().max_connections(3).connect_with(options).await.unwrap()
}

/// The SQLSTATE of what the statement fails with.
pub(crate) async fn refusal(pool: &PgPool, sql: &str) -> (String, sqlx::Error) {
    let error = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.expect_err(sql);
    let code = error.as_database_error().and_then(|error| error.code().map(std::borrow::Cow::into_owned));
    (code.unwrap_or_default(), error)
}

/// 42501 `insufficient_privilege`, and nothing else.
pub(crate) async fn assert_forbidden(pool: &PgPool, role: &str, sql: &str) {
    let (code, error) = refusal(pool, sql).await;
    assert_eq!(code, "42501", "{role}: {sql}: {error}");
}
