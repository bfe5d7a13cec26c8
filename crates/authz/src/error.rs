//! What can go wrong, and what to do about it.

use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::decision::Revision;
use crate::name::{ActionName, ActionPattern, DirectoryName, GroupName, NameError, UserName};

const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// Every way in which a call of this library can fail. A denied check is not one: see [`Decision`](crate::Decision).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text is not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// No user of that name.
    #[error("user `{0}` is not known; run dir-sync or create the user first (`authz::user::create`)")]
    UnknownUser(UserName),
    /// No group of that name.
    #[error("group `{0}` is not known; run dir-sync or create the group first (`authz::group::create`)")]
    UnknownGroup(GroupName),
    /// No such action.
    #[error("action `{0}` is not registered; register it first (`authz::action::register`)")]
    UnknownAction(ActionPattern),
    /// No directory of that name.
    #[error("directory `{0}` is not known; it is made by the first run of dir-sync with that name")]
    UnknownDirectory(DirectoryName),
    /// The name is taken.
    #[error("a user named `{0}` exists already; choose another name or use the existing user")]
    UserExists(UserName),
    /// The name is taken.
    #[error("a group named `{0}` exists already; choose another name or use the existing group")]
    GroupExists(GroupName),
    /// The directory's row, not ours.
    #[error(
        "`{name}` belongs to directory `{directory}`; change it there, the next run of dir-sync brings it here"
    )]
    OwnedByDirectory {
        /// The user or group.
        name: String,
        /// Whose sync keeps it.
        directory: String,
    },
    /// A group would contain itself.
    #[error(
        "group `{child}` already contains `{parent}`, so it cannot become a member of it; remove the other edge first"
    )]
    Cycle {
        /// The group that was to contain the other.
        parent: GroupName,
        /// The group that was to become a member.
        child: GroupName,
    },
    /// Unregistering an action that is granted.
    #[error("action `{0}` is still granted to somebody; revoke those grants first")]
    ActionInUse(ActionName),
    /// Revoking what is not granted.
    #[error("`{pattern}` is not granted to `{holder}`; nothing was revoked")]
    NoSuchGrant {
        /// The user or group.
        holder: String,
        /// What was to be revoked.
        pattern: ActionPattern,
    },
    /// A sync of a directory whose source now shows another organisation.
    #[error(
        "directory `{directory}` mirrors organisation `{known}`, but the source shows `{found}`; use another --directory name, or the right credentials"
    )]
    OtherCustomer {
        /// The directory.
        directory: DirectoryName,
        /// The organisation that it mirrors.
        known: String,
        /// The organisation that the source shows.
        found: String,
    },
    /// A sync of an organisation that another directory mirrors already.
    #[error(
        "directory `{other}` mirrors organisation `{customer}` already, and an organisation has one directory here; run with --directory \
         {other}. If it is to be called `{directory}` from now on, rename it first: update authz.directories set directory_name = \
         '{directory}' where directory_name = '{other}' (after the row `{directory}`, if there is one, got another name)"
    )]
    CustomerTaken {
        /// The directory of this sync.
        directory: DirectoryName,
        /// The directory that mirrors the organisation.
        other: String,
        /// The organisation.
        customer: String,
    },
    /// Another sync of the same directory is at work.
    #[error("run {run_id} of directory `{directory}` is still at work; wait for it to end")]
    LeaseHeld {
        /// The directory.
        directory: DirectoryName,
        /// The run that holds the lease.
        run_id: i64,
    },
    /// The lease went to another run meanwhile; nothing was written.
    #[error("run {run_id} lost its lease to another run and wrote nothing; the other run does the work")]
    LeaseLost {
        /// The run that lost it.
        run_id: i64,
    },
    /// The staging area is not what was staged: the database server crashed meanwhile, another run cleared it, or a step of the
    /// staging failed or was dropped.
    #[error(
        "run {run_id} lost what it had staged (did the database server restart?) and changed nothing; run again"
    )]
    StagingLost {
        /// The run.
        run_id: i64,
    },
    /// The name `local` is not a directory that can be synced.
    #[error("`local` is what is kept by hand and has no source; give the directory another name")]
    LocalDirectory,
    /// A directory is not as fresh as was demanded. The caller cannot tell whether the user may do it: not an allow.
    #[error(
        "a directory {}, and at most {max:?} of age was asked for; see whether dir-sync runs and ends completely",
        age.map_or_else(|| "was never synced completely".to_owned(), |age| format!("was last synced completely {age:?} ago"))
    )]
    DirectoryStale {
        /// How long ago; `None` for never.
        age: Option<std::time::Duration>,
        /// How long ago it may be.
        max: std::time::Duration,
    },
    /// A record that is larger than the trail takes.
    #[error(
        "the {what} of an audit record has {bytes} bytes, and at most {limit} are recorded; make it shorter"
    )]
    RecordTooLarge {
        /// Which part of it.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The size that it may have.
        limit: usize,
    },
    /// A text that is not a place in the trail.
    #[error("`{text}` is not a cursor; take one from a page, as it is")]
    NotACursor {
        /// The text, with control characters escaped.
        text: String,
    },
    /// A question about a time before the trail.
    #[error(
        "the audit trail does not tell of {asked}: what it needs for that begins at {begins}; ask an export of the months before"
    )]
    BeforeTrail {
        /// What was asked about.
        asked: chrono::DateTime<chrono::Utc>,
        /// From when on the trail holds everything.
        begins: chrono::DateTime<chrono::Utc>,
    },
    /// No record of that number.
    #[error("the audit trail has no record {0}; it may have been removed with its month")]
    UnknownRecord(i64),
    /// A record did not get into the audit trail, or nobody knows whether it did. What it tells of must not go on.
    #[error("the audit record could not be written; see the cause, and try again once that is mended")]
    NotRecorded(#[source] std::sync::Arc<sqlx::Error>),
    /// The tables are missing.
    #[error(
        "the database has no authz tables (or an older version of them); run `dir-sync migrate` or call `authz::migrate`"
    )]
    NotMigrated(#[source] sqlx::Error),
    /// The database role may not do it.
    #[error(
        "this database role lacks a privilege; deploy/sql/roles.sql grants what a sync, a service and an operator need (run it \
         again after each `migrate`), and `migrate` runs as the owner of the schema"
    )]
    NotPermitted(#[source] sqlx::Error),
    /// The migrations failed.
    #[error("the authz tables could not be brought up to date")]
    Migrate(#[source] MigrateError),
    /// The database holds something that this version does not understand.
    #[error(
        "the database holds {what} that this version of authz does not understand; use the version that wrote it, or newer"
    )]
    Unreadable {
        /// What was found.
        what: String,
    },
    /// A text is not a SHA-256.
    #[error("`{0}` is not a digest; a digest is 64 hexadecimal digits, 0 to 9 and a to f")]
    NotADigest(String),
    /// A text is not a checkpoint.
    #[error("`{0}` is not a checkpoint; write the number of a seal, a colon and its digest")]
    NotACheckpoint(String),
    /// A text is not a key for seals, or none could be made.
    #[error("{0}; make one with `authz audit key`")]
    NotAKey(&'static str),
    /// An export could not be read or written.
    #[error("the export of the audit trail could not be read or written")]
    Export(#[source] std::io::Error),
    /// The trail does not verify, so nothing was exported or removed.
    #[error("the audit trail does not verify: {0}; nothing was removed")]
    TrailAltered(crate::audit::Finding),
    /// The live tables are not what the trail says, so nothing was removed.
    #[error(
        "the grants and memberships are not what the audit trail says (`authz verify --state` lists {0} differences); nothing was removed"
    )]
    StateDiffers(usize),
    /// A month that cannot be removed yet.
    #[error("the month of {month} cannot be removed: {reason}")]
    MonthNotRemovable {
        /// Its first day.
        month: chrono::NaiveDate,
        /// Why not.
        reason: String,
    },
    /// The snapshot has not heard from the database for too long. The caller cannot tell: not an allow.
    #[error(
        "the snapshot of permissions is {age:?} old and may be at most {max:?}; see why the database does not answer"
    )]
    SnapshotStale {
        /// How old it is.
        age: std::time::Duration,
        /// How old it may be.
        max: std::time::Duration,
    },
    /// The snapshot did not come to the wanted revision in time.
    #[error("the snapshot of permissions is at revision {has}, not yet at {wanted}; try again")]
    SnapshotBehind {
        /// The revision that was asked for.
        wanted: Revision,
        /// The revision that it has.
        has: Revision,
    },
    /// The snapshot was shut down.
    #[error("the snapshot of permissions was shut down; start another one")]
    SnapshotClosed,
    /// The snapshot does not know users by `sub`.
    #[error("the snapshot does not hold the `sub` of users; start it with `by_sub(true)`")]
    Unindexed,
    /// The database did not answer, or refused. The caller cannot tell whether the user may do it: not an allow.
    #[error("the database did not answer as expected")]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        // 3F000 invalid_schema_name, 42P01 undefined_table, 42703 undefined_column, 42883 undefined_function
        match code(&error).as_deref() {
            Some("3F000" | "42P01" | "42703" | "42883") => Self::NotMigrated(error),
            Some(INSUFFICIENT_PRIVILEGE) => Self::NotPermitted(error),
            _ => Self::Database(error),
        }
    }
}

impl From<MigrateError> for Error {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)
                if code(&error).as_deref() == Some(INSUFFICIENT_PRIVILEGE) =>
            {
                Self::NotPermitted(error)
            }
            error => Self::Migrate(error),
        }
    }
}

impl Error {
    /// Whether the database itself has answered that a statement failed: its transaction is gone then, and nothing of it was
    /// done. `false` if no answer came, or one that ends the session (a server that shuts down, a pooler that lost its own):
    /// a commit under way may have been done nonetheless.
    #[must_use]
    pub fn is_rolled_back(&self) -> bool {
        let (Self::Database(error) | Self::NotMigrated(error) | Self::NotPermitted(error)) = self else {
            return false;
        };
        let Some(answer) = error.as_database_error() else { return false };
        let goes_on = answer
            .try_downcast_ref::<PgDatabaseError>()
            .is_some_and(|answer| matches!(answer.severity(), PgSeverity::Error));
        // Classes 08 connection_exception and 57 operator_intervention, but for 57014 query_canceled, which ends a statement
        let of_the_session =
            |code: &str| code != "57014" && ["08", "57"].iter().any(|class| code.starts_with(class));
        goes_on && !answer.code().is_some_and(|code| of_the_session(&code))
    }
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(std::borrow::Cow::into_owned)
}

/// The constraint that a statement violated, if that is why it failed.
pub(crate) fn constraint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error().and_then(|e| e.constraint())
}
