//! In which cluster the trail is: another one counts its transactions anew, so its records make an era of their own.

use std::sync::atomic::{AtomicBool, Ordering};

use sqlx::PgConnection;

/// Begins an era if the trail has come into another cluster since the last one began. Called before a process writes or
/// seals for the first time, since only what has a higher number than all records so far is of the new era.
///
/// Where it cannot be done now, because this role may not or because others write for long, that is logged and no error:
/// until somebody does it, records of this cluster are read late or out of their order, and none is lost.
///
/// # Errors
/// If the database does not answer.
// INVARIANT: after a restore old records are read before new ones, whoever writes first (held by the tests
// `service_that_writes_first_after_a_restore_begins_an_era` and `sealer_begins_an_era_after_a_restore`).
pub(crate) async fn note(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let noted = sqlx::query!("select authz.note_audit_era() as era").fetch_one(connection).await;
    let Err(error) = noted else { return Ok(()) };
    let code = error.as_database_error().and_then(|error| error.code().map(std::borrow::Cow::into_owned));
    match code.as_deref() {
        // 42501 insufficient_privilege: so it stays, and saying it once will do.
        Some("42501") if TOLD.swap(true, Ordering::Relaxed) => Ok(()),
        Some("42501") => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "this database role may not note into which cluster the audit trail was restored; run deploy/sql/roles.sql again"
            );
            Ok(())
        }
        // 55P03 lock_not_available
        Some("55P03") => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the audit trail was restored into another cluster, which could not be noted while others write; \
                 the next sealer or service that starts tries again"
            );
            Ok(())
        }
        _ => Err(error),
    }
}
