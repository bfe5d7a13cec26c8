//! Where a confirmed question is asked.

use std::fmt;
use std::ops::{Deref, DerefMut};

use futures_util::future::{BoxFuture, FutureExt, ready};
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres, Transaction};

/// Where a confirmed question is asked: on a pool, on a connection, or in a transaction of the caller's, which is judged by what
/// it sees.
///
/// [`sqlx::Acquire`] says the same, but a future that holds one on a borrowed connection cannot be spawned, nor be a handler
/// of axum: the compiler finds that its "implementation … is not general enough".
pub trait Lend<'c>: sealed::Sealed + Send {
    /// Lends the connection.
    #[doc(hidden)]
    fn lend(self) -> Lending<'c>;
}

/// A connection that is about to be lent. Boxed, so that whatever awaits it can go from thread to thread.
pub type Lending<'c> = BoxFuture<'c, Result<Loan<'c>, sqlx::Error>>;

/// A connection to ask on: one of a pool, which goes back to it when this is dropped, or the caller's.
pub struct Loan<'c>(Whose<'c>);

enum Whose<'c> {
    Pool(PoolConnection<Postgres>),
    Caller(&'c mut PgConnection),
}

impl<'c> Loan<'c> {
    fn of(connection: &'c mut PgConnection) -> Lending<'c> {
        ready(Ok(Self(Whose::Caller(connection)))).boxed()
    }
}

impl fmt::Debug for Loan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loan").finish_non_exhaustive()
    }
}

impl Deref for Loan<'_> {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        match &self.0 {
            Whose::Pool(connection) => connection,
            Whose::Caller(connection) => connection,
        }
    }
}

impl DerefMut for Loan<'_> {
    fn deref_mut(&mut self) -> &mut PgConnection {
        match &mut self.0 {
            Whose::Pool(connection) => connection,
            Whose::Caller(connection) => connection,
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

impl sealed::Sealed for &PgPool {}
impl sealed::Sealed for &mut PgConnection {}
impl sealed::Sealed for &mut PoolConnection<Postgres> {}
impl sealed::Sealed for &mut Transaction<'_, Postgres> {}

impl Lend<'static> for &PgPool {
    fn lend(self) -> Lending<'static> {
        self.acquire().map(|acquired| acquired.map(|connection| Loan(Whose::Pool(connection)))).boxed()
    }
}

impl<'c> Lend<'c> for &'c mut PgConnection {
    fn lend(self) -> Lending<'c> {
        Loan::of(self)
    }
}

impl<'c> Lend<'c> for &'c mut PoolConnection<Postgres> {
    fn lend(self) -> Lending<'c> {
        Loan::of(self)
    }
}

impl<'c> Lend<'c> for &'c mut Transaction<'_, Postgres> {
    fn lend(self) -> Lending<'c> {
        Loan::of(self)
    }
}
