//! What every poll asks the database: its revision, its clock, and how far behind its primary it may be.

use std::time::Duration;

use sqlx::PgConnection;

use super::clock;
use crate::decision::Revision;
use crate::error::Error;

/// What one poll learnt. It is true of the moment of the question or later.
#[derive(Debug, Clone, Copy)]
pub(super) struct Poll {
    pub(super) revision: Revision,
    /// The moment on [`clock::exact`] from which on changes may be missing.
    pub(super) as_of: u64,
    /// What to add to [`clock::awake_or_asleep_micros`] for the database's clock.
    pub(super) clock_offset: i64,
    /// How long ago the directory that waits longest was mirrored; `None` if there is no directory or nobody asks.
    pub(super) directory: Option<DirectoryAge>,
}

/// How long ago a directory was mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DirectoryAge {
    Never,
    Ago(Duration),
}

/// Asks, as the first statement of a transaction that sees one state throughout.
///
/// On a hot standby the state is as old as what has been replayed. It counts as current only while the standby
/// receives from its primary and has replayed all it received.
pub(super) async fn ask(connection: &mut PgConnection, sent: Sent, directories: bool) -> Result<Poll, Error> {
    let row = sqlx::query!(
        r#"
        select r.revision,
               (extract(epoch from clock_timestamp()) * 1000000)::bigint as "now!",
               case when not pg_is_in_recovery() then 0
                    when exists (select from pg_stat_wal_receiver)
                         and pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() then 0
                    else (extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000000)::bigint
               end as lag
        from authz.revision r
        "#
    )
    .fetch_one(&mut *connection)
    .await?;
    let directory = if directories { oldest_directory(connection).await? } else { None };
    // A standby that has replayed nothing cannot say how old it is.
    let lag = row.lag.map_or(u64::MAX, |micros| u64::try_from(micros).unwrap_or(0).saturating_mul(1_000));
    Ok(Poll {
        revision: Revision(row.revision),
        as_of: sent.exact.saturating_sub(lag),
        clock_offset: row.now.saturating_sub(sent.micros),
        directory,
    })
}

async fn oldest_directory(connection: &mut PgConnection) -> Result<Option<DirectoryAge>, Error> {
    let row = sqlx::query!(
        r#"
        select count(*) as "directories!", count(d.last_complete_sync_at) as "synced!",
               (extract(epoch from clock_timestamp() - min(d.last_complete_sync_at)) * 1000000)::bigint as age
        from authz.directories d
        where d.directory_id <> 0
        "#
    )
    .fetch_one(connection)
    .await?;
    Ok(if row.directories == 0 {
        None
    } else if row.synced < row.directories {
        Some(DirectoryAge::Never)
    } else {
        let micros = row.age.map_or(u64::MAX, |micros| u64::try_from(micros).unwrap_or(0));
        Some(DirectoryAge::Ago(Duration::from_micros(micros)))
    })
}

/// When a question was sent. What the answer says of the time counts from here, so an age is never too small.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    exact: u64,
    micros: i64,
}

impl Sent {
    pub(super) fn now() -> Self {
        Self { exact: clock::exact(), micros: clock::awake_or_asleep_micros() }
    }
}
