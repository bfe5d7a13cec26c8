//! A connection of a pool that goes back to it only if what it was taken for came to its end.

use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};

/// A connection that is closed when it is dropped, unless it was [given back](Self::give_back).
///
/// For every `COPY`: sqlx 0.9 loses count of the answers where one was dropped, or given up, before its end. The pool takes such a
/// connection for whole, and it then answers each question with the answer to the one before, or with none. And for a lock
/// that is the session's, and a transaction that borrows its connection (see [`begin()`](crate::begin())).
///
/// INVARIANT: a connection on which a copy was not read to its end goes back to no pool (held by the tests in
/// `tests/cancelled.rs`).
pub(crate) struct Lent {
    connection: PoolConnection<Postgres>,
    is_whole: bool,
}

impl Lent {
    /// Takes one out of the pool.
    ///
    /// # Errors
    /// As [`sqlx::Pool::acquire`].
    pub(crate) async fn from(pool: &PgPool) -> Result<Self, sqlx::Error> {
        Ok(Self { connection: pool.acquire().await?, is_whole: false })
    }

    /// All that was asked of it was answered, and the answers were read.
    pub(crate) fn give_back(mut self) {
        self.is_whole = true;
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.is_whole {
            self.connection.close_on_drop();
        }
    }
}

impl Deref for Lent {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

/// Drops a transaction of a pool, or what has become of it, whose server does not answer, and its connection with it: at once and
/// without a word to the server.
///
/// What is dropped elsewhere gives its connection back to the pool, in a task that first waits for the server to answer:
/// without end if it is silent, and the pool's place is taken for as long. Here that task comes to a runtime that ends
/// before it runs, and the connection is dropped with it.
pub(crate) fn drop_silent(transaction: impl Send + 'static) {
    // It has neither threads nor timers.
    let Ok(gone) = tokio::runtime::Builder::new_current_thread().build() else { return };
    {
        let _inside = gone.enter();
        drop(transaction);
    }
    gone.shutdown_background();
}
