//! What every poll asks the database: its revision, its clock, and how far behind its primary it may be.

use std::time::Duration;

use sqlx::{Connection, PgConnection, Postgres, Transaction};

use super::clock;
use crate::decision::Revision;
use crate::error::Error;

/// What one poll learnt. It is true of the moment of the question or later.
#[derive(Debug, Clone, Copy)]
pub(super) struct Poll {
    pub(super) revision: Revision,
    /// Which change made the revision.
    pub(super) mark: Mark,
    /// Asked of a hot standby, of which there may be several that are not equally far.
    pub(super) on_standby: bool,
    /// The moment on [`clock::exact`] from which on changes may be missing.
    pub(super) as_of: u64,
    /// What to add to [`clock::awake_or_asleep_micros`] for the database's clock.
    pub(super) clock_offset: i64,
    /// How long ago the directory that waits longest was mirrored; `None` if there is no directory or nobody asks.
    pub(super) directory: Option<DirectoryAge>,
}

/// What tells one change from another one of the same number, which a restored backup or a promoted standby that lacks
/// the last commits will give again: the newest row of `changes` that belongs to the revision, and when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Mark {
    pub(super) change_id: Option<i64>,
    pub(super) micros: Option<i64>,
}

/// How long ago a directory was mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DirectoryAge {
    Never,
    Ago(Duration),
}

/// What is read in the transaction of a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// The answers of the poll.
    Revision,
    /// Permissions as well.
    Permissions,
}

const BEGIN: &str = "begin transaction isolation level repeatable read, read only";
/// Also holds the tables of the permissions before the transaction sees anything, and looks nothing up in schemas where others
/// may create, and compiles nothing. In one message: the statements of one are carried out one after the other.
///
/// INVARIANT: permissions are read as of the revision. `truncate` takes rows away from a transaction that began to see before
/// it, unless that holds the table (held by `readers_never_see_a_table_that_was_emptied_and_filled_again`).
const BEGIN_AND_HOLD: &str = "
    begin transaction isolation level repeatable read, read only;
    set local search_path = pg_catalog, pg_temp;
    set local jit = off;
    lock table authz.users, authz.groups, authz.group_users, authz.group_groups, authz.group_directories,
               authz.group_ancestors, authz.actions, authz.user_actions, authz.group_actions in access share mode";

/// Begins a transaction that sees one state throughout, behind a pooler on one server connection, and asks first.
///
/// How far a standby lags is asked before the transaction begins to see, never after: what is replayed in between is
/// not in the state, and would make it look younger than it is.
pub(super) async fn begin(
    connection: &mut PgConnection,
    directories: bool,
    reads: Reads,
) -> Result<(Transaction<'_, Postgres>, Poll), Error> {
    let sent = clock::exact();
    let lag = lag(&mut *connection).await?;
    let (lag, lagging) = (lag.micros.saturating_mul(1_000), lag.server);
    let begin = match reads {
        Reads::Revision => BEGIN,
        Reads::Permissions => BEGIN_AND_HOLD,
    };
    let mut transaction = connection.begin_with(begin).await?;
    // What the answer says of the time counts from here, so the database's clock is never taken to show less.
    let asked = clock::awake_or_asleep_micros();
    let row = sqlx::query!(
        r#"
        select r.revision, (extract(epoch from clock_timestamp()) * 1000000)::bigint as "now!",
               pg_is_in_recovery() as "on_standby!",
               (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint as "server!",
               c.change_id as "change_id?", (extract(epoch from c.changed_at) * 1000000)::bigint as "micros?"
        from authz.revision r
        left join lateral (
            select c.change_id, c.changed_at from authz.changes c
            where c.revision = r.revision
            order by c.change_id desc
            limit 1
        ) c on true
        "#
    )
    .fetch_one(&mut *transaction)
    .await?;
    // A pooler that gives a server for each transaction may have given two.
    if row.on_standby && row.server != lagging {
        let what = "one poll of a snapshot was answered by two servers, of which either may be behind; lead it to one";
        return Err(Error::Database(sqlx::Error::Protocol(what.to_owned())));
    }
    let lag = if row.on_standby { lag } else { 0 };
    let directory = if directories { oldest_directory(&mut transaction).await? } else { None };
    let poll = Poll {
        revision: Revision(row.revision),
        mark: Mark { change_id: row.change_id, micros: row.micros },
        on_standby: row.on_standby,
        as_of: sent.saturating_sub(lag),
        clock_offset: row.now.saturating_sub(asked),
        directory,
    };
    Ok((transaction, poll))
}

/// Of the server that was asked.
struct Lag {
    micros: u64,
    /// When it was started, which tells servers apart.
    server: i64,
}

/// How long ago, in microseconds, what a transaction that begins now sees was certainly all that there was.
///
/// On a hot standby the state is as old as what has been replayed. It counts as current only while the standby
/// receives from its primary and has replayed all it received, and all that the primary says there is (which only a
/// member of `pg_read_all_stats` is shown; it matters while much is being caught up with over a slow line).
/// Otherwise its age is that of the last transaction that was replayed: too much rather than too little.
async fn lag(connection: &mut PgConnection) -> Result<Lag, Error> {
    let row = sqlx::query!(
        r#"select case when not pg_is_in_recovery() then 0
                     when pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()
                          and exists (select from pg_stat_wal_receiver w
                                      where coalesce(w.latest_end_lsn <= pg_last_wal_replay_lsn(), true)) then 0
                     else (extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000000)::bigint
                end as micros,
                (extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint as "server!""#
    )
    .fetch_one(connection)
    .await?;
    // A standby that has replayed nothing cannot say how old it is.
    let micros = row.micros.map_or(u64::MAX, |micros| u64::try_from(micros).unwrap_or(0));
    Ok(Lag { micros, server: row.server })
}

async fn oldest_directory(connection: &mut PgConnection) -> Result<Option<DirectoryAge>, Error> {
    let row = sqlx::query!(
        r#"
        select count(*) as "directories!", count(d.last_complete_sync_at) as "synced!",
               (extract(epoch from clock_timestamp() - min(d.last_complete_sync_at)) * 1000000)::bigint as age
        from authz.directories d
        where d.directory_id <> 0
          and (d.last_complete_sync_at is not null
               or exists (select from authz.users u where u.directory_id = d.directory_id)
               or exists (select from authz.groups g where g.directory_id = d.directory_id)
               or exists (select from authz.group_directories gd where gd.directory_id = d.directory_id))
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
