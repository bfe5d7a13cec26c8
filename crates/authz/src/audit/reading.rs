//! How a reader of the trail begins, so that retention takes nothing away from under it.

use sqlx::{Connection, PgConnection, Postgres, Transaction};

/// Begins a transaction that sees one state of the trail throughout.
///
/// It holds the trail before it sees anything: `lock` takes no snapshot. A query would first fix what it sees and wait for the
/// table then; so whoever came in the last step of a [`prune`](super::retention::prune()) found the months gone, and no record of
/// why.
// INVARIANT: what waits for retention sees all that retention did (held by the test
// `readers_that_wait_for_a_prune_see_what_it_left`).
pub(crate) async fn begin_reading(
    connection: &mut PgConnection,
) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
    let mut tx = connection.begin_with("begin isolation level repeatable read read only").await?;
    hold_trail(&mut tx).await?;
    Ok(tx)
}

/// Nothing is taken away from the trail until the transaction ends.
pub(crate) async fn hold_trail(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query!("lock table authz.audit_log in access share mode").execute(connection).await?;
    Ok(())
}
