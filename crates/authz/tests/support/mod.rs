//! A migrated database per test.
#![allow(dead_code, reason = "each test binary uses a part")]

use authz::audit::Actor;
use authz::{ActionName, ActionPattern, GroupName, UserName};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use testdb::Database;

/// The database goes when the first is dropped, so keep it.
pub(crate) async fn database() -> (Database, PgPool) {
    let database = Database::create(&authz::schema_fingerprint(), |url| async move {
        let pool = PgPool::connect(&url).await?;
        authz::migrate(&pool).await?;
        pool.close().await;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    })
    .await
    .unwrap();
    let pool = pool(&database).await;
    (database, pool)
}

pub(crate) async fn pool(database: &Database) -> PgPool {
    PgPoolOptions::new().max_connections(8).connect(database.url()).await.unwrap()
}

pub(crate) fn admin() -> Actor {
    Actor::new("admin@example.com", "tests").request("req-1")
}

pub(crate) fn user(name: &str) -> UserName {
    UserName::parse(name).unwrap()
}

pub(crate) fn group(name: &str) -> GroupName {
    GroupName::parse(name).unwrap()
}

pub(crate) fn action(name: &str) -> ActionName {
    ActionName::parse(name).unwrap()
}

pub(crate) fn pattern(name: &str) -> ActionPattern {
    ActionPattern::parse(name).unwrap()
}
