//! The revision that a change made, or that a reader sees.

use sqlx::{PgExecutor, Postgres, Transaction};

use crate::decision::Revision;
use crate::error::Error;

/// The revision that the executor sees.
///
/// # Errors
/// [`Error::Database`] if the database does not answer.
pub async fn current(executor: impl PgExecutor<'_>) -> Result<Revision, Error> {
    let revision = sqlx::query_scalar!("select revision from authz.revision").fetch_one(executor).await?;
    Ok(Revision(revision))
}

/// Ends a change: the revision that it made (or found, if it changed nothing), then the commit.
pub(crate) async fn commit(mut tx: Transaction<'_, Postgres>) -> Result<Revision, Error> {
    let revision = current(&mut *tx).await?;
    tx.commit().await?;
    Ok(revision)
}
