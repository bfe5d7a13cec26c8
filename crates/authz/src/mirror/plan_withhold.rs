//! Removals taken out of the plan again, for a sync that shall only add and change.

use sqlx::PgConnection;

use super::Run;
use super::plan_summary::count;
use crate::error::Error;

impl Run {
    /// Users who would go, or stay only as external members, stay as they are. Says how many.
    ///
    /// To be called before names are settled: who stays keeps the name.
    pub(super) async fn withhold_users(&self, tx: &mut PgConnection) -> Result<u64, Error> {
        let kept = sqlx::query!(
            r#"
            delete from authz.sync_plan_users
            where run_id = $1 and (op = 'remove' or (op = 'change' and old_directory_id = $2 and new_directory_id is null))
            "#,
            self.run_id,
            self.directory_id,
        )
        .execute(tx)
        .await?;
        Ok(kept.rows_affected())
    }

    /// Groups that would go stay. Says how many.
    pub(super) async fn withhold_groups(&self, tx: &mut PgConnection) -> Result<u64, Error> {
        let kept = sqlx::query!(
            "delete from authz.sync_plan_groups where run_id = $1 and op = 'remove'",
            self.run_id
        )
        .execute(tx)
        .await?;
        Ok(kept.rows_affected())
    }

    /// Memberships that would go stay. Says how many.
    pub(super) async fn withhold_memberships(&self, tx: &mut PgConnection) -> Result<u64, Error> {
        let kept = sqlx::query_scalar!(
            r#"
            with kept as (delete from authz.sync_plan_members where run_id = $1 and op = 'remove' returning 1)
            select count(*) as "kept!" from kept
            "#,
            self.run_id,
        )
        .fetch_one(tx)
        .await?;
        Ok(count(kept))
    }
}
