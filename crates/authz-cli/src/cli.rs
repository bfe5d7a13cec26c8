//! The command line; every option can be given by environment as well.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use authz::audit::{Actor, Checkpoint, PublicKey};
use authz::{ActionName, ActionPattern, DirectoryName, GroupName, UserName};
use chrono::{DateTime, Utc};
use clap::{Args, Parser, Subcommand, ValueEnum};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgPool};

use crate::answer::Failure;

/// How long to wait for the database before giving up.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Who may do what, and the audit trail of it.
///
/// Exit codes: 0 done, allowed or nothing found; 1 failed; 2 usage; 3 denied, or the verification found something.
#[derive(Debug, Parser)]
#[command(name = "authz", version)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which database, on whose behalf, and how to print.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The database, as `postgres://user:password@host/name`
    #[arg(long, env = "AUTHZ_DATABASE_URL", hide_env_values = true, value_name = "URL", global = true)]
    database_url: Option<String>,
    /// Who makes the change, for the audit trail; the name of the system's user if not given
    #[arg(long, env = "AUTHZ_ACTOR", value_name = "NAME", global = true)]
    actor: Option<String>,
    /// How to print the result
    #[arg(long, env = "AUTHZ_OUTPUT", value_enum, default_value_t = Output::Text, global = true)]
    pub(crate) output: Output,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create the tables, or bring them up to date
    Migrate,
    /// Whether a user may do an action (exit code 3 if not)
    Can { user: UserName, action: ActionName },
    /// Why a user may or may not do an action, and what is missing (exit code 3 if not allowed)
    Explain { user: UserName, action: ActionName },
    /// Who may do an action
    WhoCan {
        action: ActionName,
        #[command(flatten)]
        page: Page,
    },
    /// Grant an action, or a pattern such as `workers.*`
    Grant {
        /// `user:NAME` or `group:NAME`
        holder: Holder,
        action: ActionPattern,
        /// Why
        #[arg(long, env = "AUTHZ_REASON", value_name = "TEXT", value_parser = said)]
        reason: String,
        /// Until when, a time to come, such as `2027-01-31T00:00:00Z`; for ever if not given
        #[arg(long, env = "AUTHZ_UNTIL", value_name = "TIME")]
        until: Option<DateTime<Utc>>,
    },
    /// Take back what was granted under exactly that pattern
    Revoke {
        /// `user:NAME` or `group:NAME`
        holder: Holder,
        action: ActionPattern,
    },
    /// The registered actions, and registering them
    #[command(subcommand)]
    Actions(Actions),
    /// Users
    #[command(subcommand)]
    Users(Users),
    /// Groups, and who is in the local ones
    #[command(subcommand)]
    Groups(Groups),
    /// Whether the trail is what was sealed; with --state, whether the grants are what the trail says
    Verify(Verify),
    /// The audit trail
    #[command(subcommand)]
    Audit(Audit),
}

/// The text, if it says anything.
fn said(text: &str) -> Result<String, &'static str> {
    if text.trim().is_empty() { Err("say why; it stands in the audit trail") } else { Ok(text.to_owned()) }
}

/// Which part of a list.
#[derive(Debug, Args)]
pub(crate) struct Page {
    /// Begin after this name
    #[arg(long, env = "AUTHZ_AFTER", value_name = "NAME")]
    pub(crate) after: Option<String>,
    /// At most so many
    #[arg(long, env = "AUTHZ_LIMIT", value_name = "N", default_value_t = 1000)]
    pub(crate) limit: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Actions {
    /// All of them, or those that one user may do
    List {
        /// Only what this user may do
        #[arg(long, env = "AUTHZ_OF", value_name = "USER")]
        of: Option<UserName>,
    },
    /// Make an action known, or change its description
    Register {
        action: ActionName,
        /// For people
        #[arg(long, env = "AUTHZ_DESCRIPTION", value_name = "TEXT", default_value = "")]
        description: String,
    },
    /// Forget an action that nobody is granted
    Unregister { action: ActionName },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Users {
    /// By name
    List(Page),
    /// One, with its grants and with what it may do
    Show { user: UserName },
    /// Create a local user
    Create {
        user: UserName,
        /// For people
        #[arg(long, env = "AUTHZ_DISPLAY_NAME", value_name = "TEXT", default_value = "")]
        display_name: String,
    },
    /// Suspend a local user
    Suspend { user: UserName },
    /// Let a suspended local user act again
    Resume { user: UserName },
    /// Delete a local user, with its memberships and grants
    Delete { user: UserName },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Groups {
    /// By name
    List(Page),
    /// One, with its grants
    Show { group: GroupName },
    /// Create a local group
    Create {
        group: GroupName,
        /// For people
        #[arg(long, env = "AUTHZ_DESCRIPTION", value_name = "TEXT", default_value = "")]
        description: String,
    },
    /// Delete a local group, with its members and grants
    Delete { group: GroupName },
    /// Put `user:NAME`, `group:NAME` or `everyone:DIRECTORY` into a local group
    Add { group: GroupName, member: Member },
    /// Take `user:NAME`, `group:NAME` or `everyone:DIRECTORY` out of a local group
    Remove { group: GroupName, member: Member },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// The newest records, newest first
    List {
        /// At most so many
        #[arg(long, env = "AUTHZ_LIMIT", value_name = "N", default_value_t = 50)]
        limit: u32,
    },
    /// Seal what is not sealed yet
    Seal {
        #[command(flatten)]
        key: Key,
        /// Go on until stopped, sealing every so many seconds
        #[arg(long, env = "AUTHZ_SEAL_EVERY", value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
        every: Option<u32>,
    },
    /// Whether the trail is what was sealed (exit code 3 if not)
    Verify(Verify),
    /// The newest seal as SEAL:DIGEST, to be kept outside the database
    Checkpoint,
    /// Write sealed records with their seals as lines of JSON
    Export {
        /// Where to; gzipped if it ends in .gz; standard output if not given
        #[arg(long, env = "AUTHZ_EXPORT_FILE", value_name = "FILE")]
        file: Option<PathBuf>,
        /// The first seal
        #[arg(long, env = "AUTHZ_FROM_SEAL", value_name = "SEAL", default_value_t = 1)]
        from_seal: i64,
        /// The last one; the newest if not given
        #[arg(long, env = "AUTHZ_TO_SEAL", value_name = "SEAL")]
        to_seal: Option<i64>,
    },
    /// Export what was not exported yet, and drop old months
    Prune {
        /// How many months to keep, beside the one under way
        #[arg(long, env = "AUTHZ_KEEP_MONTHS", value_name = "N")]
        keep_months: u16,
        /// Where the exports go
        #[arg(long, env = "AUTHZ_EXPORT_FOLDER", value_name = "FOLDER")]
        folder: PathBuf,
        #[command(flatten)]
        key: Key,
    },
    /// Make a key to sign seals with; prints the public half
    Key {
        /// Where the secret half goes; a file that is there is not written over
        #[arg(long, env = "AUTHZ_SIGNING_KEY_FILE", value_name = "FILE")]
        signing_key_file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Key {
    /// Sign the seals with the key in this file
    #[arg(long, env = "AUTHZ_SIGNING_KEY_FILE", value_name = "FILE")]
    pub(crate) signing_key_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Exports, in their order, instead of the database
    pub(crate) files: Vec<PathBuf>,
    /// A checkpoint that was kept (SEAL:DIGEST); may be given several times
    #[arg(long, env = "AUTHZ_CHECKPOINT", value_name = "CHECKPOINT", value_delimiter = ',')]
    pub(crate) checkpoint: Vec<Checkpoint>,
    /// A public key that seals are signed with; may be given several times. Every seal must then be signed
    #[arg(long, env = "AUTHZ_TRUSTED_KEY", value_name = "KEY", value_delimiter = ',')]
    pub(crate) trusted_key: Vec<PublicKey>,
    /// Seals before this one need no signature
    #[arg(long, env = "AUTHZ_SIGNED_FROM", value_name = "SEAL", default_value_t = 1)]
    pub(crate) signed_from: i64,
    /// By how many seconds a record's time may contradict the seals around it
    #[arg(long, env = "AUTHZ_TOLERANCE", value_name = "SECONDS", default_value_t = 60)]
    pub(crate) tolerance: u32,
    /// Replay grants and local memberships from the trail, and compare them with the tables
    #[arg(long, env = "AUTHZ_VERIFY_STATE", conflicts_with = "files")]
    pub(crate) state: bool,
}

/// How to print the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// Who holds a grant.
#[derive(Debug, Clone)]
pub(crate) enum Holder {
    User(UserName),
    Group(GroupName),
}

impl FromStr for Holder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("user", name)) => UserName::parse(name).map(Self::User).map_err(|e| e.to_string()),
            Some(("group", name)) => GroupName::parse(name).map(Self::Group).map_err(|e| e.to_string()),
            _ => Err("write `user:` or `group:` and a name".to_owned()),
        }
    }
}

/// Who can be in a group.
#[derive(Debug, Clone)]
pub(crate) enum Member {
    User(UserName),
    Group(GroupName),
    Everyone(DirectoryName),
}

impl FromStr for Member {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("user", name)) => UserName::parse(name).map(Self::User).map_err(|e| e.to_string()),
            Some(("group", name)) => GroupName::parse(name).map(Self::Group).map_err(|e| e.to_string()),
            Some(("everyone", name)) => {
                name.parse().map(Self::Everyone).map_err(|e: authz::NameError| e.to_string())
            }
            _ => Err("write `user:` or `group:` and a name, or `everyone:` and a directory".to_owned()),
        }
    }
}

impl Place {
    /// Connects, or says within seconds why not.
    pub(crate) async fn connect(&self) -> Result<PgPool, Failure> {
        let url = self
            .database_url
            .as_ref()
            .ok_or_else(|| Failure::usage("say which database: --database-url URL, or AUTHZ_DATABASE_URL"))?;
        let options = PgConnectOptions::from_str(url)
            .map_err(|_| {
                Failure::usage("the database URL cannot be used; write postgres://user:password@host/name")
            })?
            .application_name("authz")
            .disable_statement_logging();
        // One attempt of our own first: the pool would try until its time is up, and then say only that.
        let attempt = tokio::time::timeout(CONNECT_WITHIN, PgConnection::connect_with(&options)).await;
        let first = attempt.unwrap_or_else(|_| {
            Err(sqlx::Error::Io(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                "no answer in ten seconds",
            )))
        });
        match first {
            Ok(connection) => drop(connection.close().await),
            Err(error) => return Err(Failure::because("the database cannot be reached", &error)),
        }
        Ok(PgPoolOptions::new().max_connections(4).acquire_timeout(CONNECT_WITHIN).connect_lazy_with(options))
    }

    /// On whose behalf changes are made.
    pub(crate) fn actor(&self) -> Result<Actor, Failure> {
        let name = self.actor.clone().or_else(|| std::env::var("USER").ok()).filter(|name| !name.is_empty());
        name.map(|name| Actor::new(name, "authz"))
            .ok_or_else(|| Failure::usage("say who makes the change: --actor NAME, or AUTHZ_ACTOR"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_can_be_given_by_environment() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let built_in = matches!(argument.get_id().as_str(), "help" | "version");
                assert!(
                    argument.is_positional() || built_in || argument.get_env().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
