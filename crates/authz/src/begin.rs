//! How a transaction begins, so that nobody who is dropped meanwhile leaves one open.

use futures_util::future::BoxFuture;
use sqlx::pool::PoolConnection;
use sqlx::{Connection, PgConnection, PgPool, Postgres, SqlSafeStr, Transaction};

/// Where a change is made: on a pool, on a connection, or in a transaction of the caller's, as a savepoint.
///
/// sqlx 0.9 forgets a transaction whose beginning was dropped before the server answered
/// ([sqlx#4385](https://github.com/launchbadge/sqlx/issues/4385)): the pool then lends the session on inside of it, what others write
/// there is lost, and what they read is old. On a pool a change therefore begins in a task of its own, which comes to its end
/// whether anybody waits for it or not. For a connection and for a transaction of the caller's nothing can be done from
/// here: **if a change on one of those is dropped before it is done** (by a timeout, say), do not use it any more. Begin your
/// own transactions by [`begin()`] too, wherever you may be dropped.
pub trait Begin<'c>: sealed::Sealed + Send {
    /// Begins.
    #[doc(hidden)]
    fn begin_whole(self) -> Beginning<'c>;
}

/// A transaction that begins. Boxed, so that whatever awaits it can go from thread to thread.
pub type Beginning<'c> = BoxFuture<'c, Result<Transaction<'c, Postgres>, sqlx::Error>>;

mod sealed {
    pub trait Sealed {}
}

impl sealed::Sealed for &PgPool {}
impl sealed::Sealed for &mut PgConnection {}
impl sealed::Sealed for &mut PoolConnection<Postgres> {}
impl sealed::Sealed for &mut Transaction<'_, Postgres> {}

impl Begin<'static> for &PgPool {
    fn begin_whole(self) -> Beginning<'static> {
        let pool = self.clone();
        // Changes wait for each other: in a stricter transaction whoever waited would be refused.
        Box::pin(async move { begin_on(pool.acquire().await?, Some(READ_COMMITTED)).await })
    }
}

impl<'c> Begin<'c> for &'c mut PgConnection {
    fn begin_whole(self) -> Beginning<'c> {
        Box::pin(self.begin())
    }
}

impl<'c> Begin<'c> for &'c mut PoolConnection<Postgres> {
    fn begin_whole(self) -> Beginning<'c> {
        Box::pin(self.begin())
    }
}

impl<'c> Begin<'c> for &'c mut Transaction<'_, Postgres> {
    fn begin_whole(self) -> Beginning<'c> {
        Box::pin(self.begin())
    }
}

/// A transaction on a connection of the pool, as [`Pool::begin`](sqlx::Pool::begin) gives it, but whoever is dropped meanwhile leaves
/// none open (see [`Begin`]).
///
/// # Errors
/// As [`Pool::begin`](sqlx::Pool::begin).
///
/// INVARIANT: a session goes back to the pool outside of any transaction, wherever its user was dropped (held by the tests in
/// `tests/cancelled.rs`).
pub async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    // Not in the task, so that whoever is dropped leaves the queue of those who wait for a connection.
    begin_on(pool.acquire().await?, None).await
}

/// The same on a connection that is closed in the end, and may therefore be copied on: see [`Lent`](crate::lent::Lent). Each of its
/// statements sees what others have committed by then, whatever the database takes for the default.
pub(crate) async fn begin_alone(pool: &PgPool) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    let mut connection = pool.acquire().await?;
    connection.close_on_drop();
    begin_on(connection, Some(READ_COMMITTED)).await
}

const READ_COMMITTED: &str = "begin isolation level read committed";

async fn begin_on(
    connection: PoolConnection<Postgres>,
    statement: Option<&'static str>,
) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    let beginning = Transaction::begin(connection, statement.map(SqlSafeStr::into_sql_str));
    // Dropped, the task goes on, and its transaction rolls back.
    tokio::spawn(beginning).await.map_err(|_| sqlx::Error::WorkerCrashed)?
}
