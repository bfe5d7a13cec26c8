//! The command line; every option can be given by environment as well.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use authz::DirectoryName;
use clap::builder::{BoolishValueParser, OsStr, Resettable};
use clap::error::ErrorKind;
use clap::{Arg, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgPool};
use tracing_subscriber::EnvFilter;

use crate::file::FileSource;
use crate::filter::{GroupFilter, Pattern};
use crate::google::{GoogleConfig, GoogleSource, Keyless};
use crate::guard::{Limit, Limits};
use crate::history::Age;
use crate::run::Options;
use crate::source::{Source, SourceError};
use crate::stop::{Reason, Stop};

/// How long to wait for the database before giving up.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or nothing to do
  1  failed; nothing was changed, unless the message says that this is not known
  2  the command line cannot be used
  3  refused by the guard; nothing was changed
  4  partial: something could not be listed, or was not removed, and stays as it was
  5  another run holds the lease, or took it over; nothing was changed
  6  ended by a signal; nothing was changed, unless the message says that this is not known
  7  status: a directory is older than --max-age";

/// Mirrors users, groups and memberships of a Google Workspace into Postgres.
///
/// Every option can be given by the environment variable that its help names. An empty one counts as not set; that of an
/// option without a value takes true or false, yes or no, 1 or 0.
#[derive(Debug, Parser)]
#[command(name = "dir-sync", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// How to write the log, on standard error.
    #[arg(long, global = true, env = "DIR_SYNC_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,
    /// What to log, as in `info` or `warn,dir_sync=debug` [default: `warn`, with --log-format json `info`].
    #[arg(long, global = true, env = "DIR_SYNC_LOG", value_name = "FILTER", value_parser = log_filter)]
    pub log: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create the tables, or bring them up to date.
    Migrate(Database),
    /// Show what `run` would change; the mirror stays as it is.
    Plan(Job),
    /// Make the mirror what the directory is, within the limits.
    Run(Job),
    /// Try each thing that a run needs, and say what is missing and where to set it right; changes nothing.
    Doctor(Job),
    /// Show the newest runs.
    Runs(History),
    /// Show how fresh the directories are.
    Status(Freshness),
}

impl Cli {
    /// What the command line and the environment say; ends the program if that cannot be used, or was a question for help.
    #[must_use]
    pub fn read() -> Self {
        let matches = without_empty_variables(Self::command()).try_get_matches().unwrap_or_else(|error| {
            match error.kind() {
                // That names the empty variables too.
                ErrorKind::DisplayHelp => Self::command().get_matches(),
                _ => error.exit(),
            }
        });
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// A variable that is empty is one that somebody wanted unset, as in a template.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let without = |option: Arg| {
        let value = option.get_env().and_then(std::env::var_os);
        if value.is_some_and(|value| value.is_empty()) {
            option.env(Resettable::<OsStr>::Reset)
        } else {
            option
        }
    };
    command.mut_args(without).mut_subcommands(|command| command.mut_args(without))
}

/// The text, if it is a filter: one that is none would be left out in silence.
fn log_filter(text: &str) -> Result<String, tracing_subscriber::filter::ParseError> {
    EnvFilter::try_new(text).map(|_| text.to_owned())
}

/// The name of a directory that has a source.
fn synced_directory(text: &str) -> Result<DirectoryName, authz::Error> {
    let name = DirectoryName::from_str(text)?;
    if name.is_local() { Err(authz::Error::LocalDirectory) } else { Ok(name) }
}

/// Which runs to show.
#[derive(Debug, Args)]
pub struct History {
    #[command(flatten)]
    /// Which database.
    pub database: Database,
    /// Only the runs of this directory.
    #[arg(long, env = "DIR_SYNC_DIRECTORY", value_name = "NAME", value_parser = DirectoryName::from_str)]
    pub directory: Option<DirectoryName>,
    /// How many.
    #[arg(long, env = "DIR_SYNC_LIMIT", value_name = "N", default_value_t = 20)]
    pub limit: u32,
    /// How to print them.
    #[arg(long, env = "DIR_SYNC_OUTPUT", value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Whose freshness to show.
#[derive(Debug, Args)]
pub struct Freshness {
    #[command(flatten)]
    /// Which database.
    pub database: Database,
    /// Only this directory.
    #[arg(long, env = "DIR_SYNC_DIRECTORY", value_name = "NAME", value_parser = DirectoryName::from_str)]
    pub directory: Option<DirectoryName>,
    /// End with exit code 7 if a directory was not synced completely within this time, as in `2h`.
    #[arg(long, env = "DIR_SYNC_MAX_AGE", value_name = "AGE")]
    pub max_age: Option<Age>,
    /// How to print it.
    #[arg(long, env = "DIR_SYNC_OUTPUT", value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Whom to tell how a `run` ended. A `plan` is none: it would stand in the place of the newest run.
#[derive(Debug, Args)]
pub struct Monitoring {
    /// Write metrics of a `run` into this file (`OpenMetrics` text), for the textfile collector of a node exporter.
    #[arg(long, env = "DIR_SYNC_METRICS_FILE", value_name = "FILE")]
    pub metrics_file: Option<PathBuf>,
    /// Send metrics of a `run` to this Prometheus push gateway, as in `http://pushgateway:9091`, or
    /// `https://user:password@pushgateway` for HTTP basic authentication.
    #[arg(long, env = "DIR_SYNC_PUSH_GATEWAY", hide_env_values = true, value_name = "URL")]
    pub push_gateway: Option<String>,
}

/// How to write the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object in a line.
    Json,
}

/// Which database.
#[derive(Debug, Args)]
pub struct Database {
    /// The database, as `postgres://user:password@host/name`; in a password `%2F`, `%23`, `%3F` and `%40` stand for `/`, `#`, `?`
    /// and `@`
    #[arg(long, env = "DIR_SYNC_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: String,
}

/// One sync.
#[derive(Debug, Args)]
pub struct Job {
    #[command(flatten)]
    /// Which database.
    pub database: Database,
    /// The name under which the mirror is kept; another source needs another name.
    #[arg(long, env = "DIR_SYNC_DIRECTORY", value_name = "NAME", value_parser = synced_directory)]
    pub directory: DirectoryName,
    /// Where users and groups come from: `google`, or `file:PATH` for a directory file.
    #[arg(long, env = "DIR_SYNC_SOURCE", value_name = "google|file:PATH")]
    pub source: SourceChoice,
    /// Apply this plan although it passes a limit.
    #[arg(long, env = "DIR_SYNC_APPROVE", value_name = "HASH")]
    pub approve: Option<String>,
    /// Whether members whom the directory does not list are mirrored, and so get what their groups have.
    #[arg(long, env = "DIR_SYNC_EXTERNAL_MEMBERS", value_enum, default_value_t = External::Exclude)]
    pub external_members: External,
    /// Mirror only groups whose address is of one of these patterns (`ops-*@example.com`, or several with commas).
    #[arg(long, env = "DIR_SYNC_INCLUDE_GROUPS", value_name = "PATTERN", value_delimiter = ',')]
    pub include_groups: Vec<Pattern>,
    /// Leave out groups whose address is of one of these patterns, as if the directory did not list them.
    #[arg(long, env = "DIR_SYNC_EXCLUDE_GROUPS", value_name = "PATTERN", value_delimiter = ',')]
    pub exclude_groups: Vec<Pattern>,
    /// Link local users and groups that have the name of a directory's one, instead of reporting a conflict.
    #[arg(long, env = "DIR_SYNC_ADOPT_LOCAL", value_parser = BoolishValueParser::new())]
    pub adopt_local: bool,
    /// Users that may be removed, suspended or turned external at once: a share, or a number, whichever is more.
    #[arg(long, env = "DIR_SYNC_MAX_REMOVED_USERS", value_name = "LIMIT", default_value_t = Limits::default().users)]
    pub max_removed_users: Limit,
    /// Groups that may be removed at once.
    #[arg(long, env = "DIR_SYNC_MAX_REMOVED_GROUPS", value_name = "LIMIT", default_value_t = Limits::default().groups)]
    pub max_removed_groups: Limit,
    /// Memberships that may be removed at once.
    #[arg(long, env = "DIR_SYNC_MAX_REMOVED_MEMBERSHIPS", value_name = "LIMIT", default_value_t = Limits::default().memberships)]
    pub max_removed_memberships: Limit,
    /// Members that one group which stays may lose at once.
    #[arg(long, env = "DIR_SYNC_MAX_REMOVED_MEMBERS_OF_GROUP", value_name = "LIMIT", default_value_t = Limits::default().members_of_group)]
    pub max_removed_members_of_group: Limit,
    /// Users who may lose an action at once, in whatever way: one nested group less can take it from many.
    #[arg(long, env = "DIR_SYNC_MAX_LOSING_USERS", value_name = "LIMIT", default_value_t = Limits::default().losing_users)]
    pub max_losing_users: Limit,
    /// Add and change only: users, groups and memberships that the directory lists no more stay. The run is partial if
    /// there are any.
    #[arg(long, env = "DIR_SYNC_NO_REMOVE", value_parser = BoolishValueParser::new())]
    pub no_remove: bool,
    /// How to print the result.
    #[arg(long, env = "DIR_SYNC_OUTPUT", value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// Calls under way at the same time.
    #[arg(long, env = "DIR_SYNC_CONCURRENCY", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub concurrency: u16,
    /// Seconds that a run may take; past them it is ended and fails, as by a signal. 0 sets no limit.
    #[arg(long, env = "DIR_SYNC_DEADLINE", value_name = "SECONDS", default_value_t = 3600)]
    pub deadline: u32,
    /// Begin after a random time of up to so many seconds, so that many jobs of one minute do not meet at the quota.
    #[arg(long, env = "DIR_SYNC_START_JITTER", value_name = "SECONDS", default_value_t = 0)]
    pub start_jitter: u32,
    #[command(flatten)]
    /// Whom to tell.
    pub monitoring: Monitoring,
    #[command(flatten)]
    /// Google's options.
    pub google: Google,
}

/// How to reach Google Workspace.
#[derive(Debug, Args)]
pub struct Google {
    /// The service account's key file (JSON), or a configuration of workload identity federation.
    #[arg(long, env = "DIR_SYNC_GOOGLE_CREDENTIALS", value_name = "FILE")]
    pub google_credentials: Option<PathBuf>,
    /// The service account to sign as without a key. Without --google-credentials the metadata server of this machine or
    /// cluster vouches.
    #[arg(long, env = "DIR_SYNC_GOOGLE_SERVICE_ACCOUNT", value_name = "EMAIL")]
    pub google_service_account: Option<String>,
    /// The administrator on whose behalf the directory is read (domain-wide delegation).
    #[arg(long, env = "DIR_SYNC_GOOGLE_SUBJECT", value_name = "EMAIL")]
    pub google_subject: Option<String>,
    /// The Workspace customer.
    #[arg(long, env = "DIR_SYNC_GOOGLE_CUSTOMER", value_name = "ID", default_value = "my_customer")]
    pub google_customer: String,
    /// Another base address of the API, for tests and proxies.
    #[arg(
        long,
        env = "DIR_SYNC_GOOGLE_URL",
        value_name = "URL",
        default_value = "https://admin.googleapis.com/"
    )]
    pub google_url: String,
    /// The metadata server, for signing in without a key.
    #[arg(long, env = "DIR_SYNC_GOOGLE_METADATA_URL", value_name = "URL", default_value_t = Keyless::default().metadata_url)]
    pub google_metadata_url: String,
    /// The API that signs for service accounts, for signing in without a key.
    #[arg(long, env = "DIR_SYNC_GOOGLE_IAM_URL", value_name = "URL", default_value_t = Keyless::default().iam_url)]
    pub google_iam_url: String,
    /// The token endpoint, for signing in without a key; a key names its own.
    #[arg(long, env = "DIR_SYNC_GOOGLE_TOKEN_URL", value_name = "URL", default_value_t = Keyless::default().token_url)]
    pub google_token_url: String,
    /// The quota: calls per minute, 0 for no limit.
    #[arg(long, env = "DIR_SYNC_GOOGLE_QUOTA", value_name = "N", default_value_t = 2400)]
    pub google_quota: u32,
    /// Seconds that one call may take, its whole answer included.
    #[arg(long, env = "DIR_SYNC_GOOGLE_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    pub google_request_timeout: u32,
}

/// Where a directory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceChoice {
    /// Google Workspace.
    Google,
    /// A directory file.
    File(PathBuf),
}

impl FromStr for SourceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "google" => Ok(Self::Google),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("write `google`, or `file:` and the path of a directory file".to_owned()),
        }
    }
}

/// What to do with members whom the directory does not list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum External {
    /// They are mirrored.
    Include,
    /// They are counted only.
    Exclude,
}

/// How to print the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// Why a run did not even begin.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The URL is none.
    #[error("the database URL cannot be used; write postgres://user:password@host/name")]
    DatabaseUrl(#[source] sqlx::Error),
    /// A password ends too early, and its rest would be taken for the host.
    #[error(
        "the database URL cannot be used: a `/`, `#` or `?` comes before its `@`; in a user name, a password or the name of a \
         database write `%2F`, `%23`, `%3F` and `%40` for `/`, `#`, `?` and `@`"
    )]
    NotEncoded,
    /// Another kind of database.
    #[error(
        "the database URL begins with `{0}://`; dir-sync needs PostgreSQL: write postgres://user:password@host/name"
    )]
    OtherDatabase(String),
    /// Nobody answers there.
    #[error("the database at {place} cannot be reached")]
    Unreachable {
        /// Host and port, or socket, in backticks; no credentials.
        place: String,
        /// Why not.
        #[source]
        source: sqlx::Error,
    },
    /// `--source google` needs a key.
    #[error(
        "--source google needs --google-credentials FILE, the key file of a service account, or, on a machine that \
         vouches for it, --google-service-account EMAIL"
    )]
    NoCredentials,
    /// The source cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The system does not let signals be handled.
    #[error("signals cannot be handled")]
    Signals(#[source] std::io::Error),
    /// A signal came first.
    #[error("ended by {0} before anything was done")]
    Stopped(Reason),
    /// A signal came while the tables were made.
    #[error(
        "ended by {0}; it is not known which migrations were done, each as a whole or not at all: run `dir-sync migrate` again"
    )]
    StoppedMigrating(Reason),
    /// The system does not give what a program needs.
    #[error("the program cannot start its threads")]
    Threads(#[source] std::io::Error),
    /// The tables could not be made.
    #[error(transparent)]
    Authz(#[from] authz::Error),
}

impl StartError {
    /// 1 failed, 2 the command line cannot be used, 6 ended by a signal.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::DatabaseUrl(_)
            | Self::NotEncoded
            | Self::OtherDatabase(_)
            | Self::NoCredentials
            | Self::Source(SourceError::Setting { .. }) => 2,
            Self::Stopped(_) | Self::StoppedMigrating(_) => 6,
            Self::Unreachable { .. }
            | Self::Source(_)
            | Self::Signals(_)
            | Self::Threads(_)
            | Self::Authz(_) => 1,
        }
    }
}

impl Database {
    /// Connects, or says within seconds why not.
    ///
    /// # Errors
    /// [`StartError::Unreachable`], or that the URL cannot be used: [`StartError::DatabaseUrl`], [`StartError::NotEncoded`] or
    /// [`StartError::OtherDatabase`].
    pub async fn connect(&self) -> Result<PgPool, StartError> {
        let (options, place) = self.options_and_place()?;
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
            Err(source) => return Err(StartError::Unreachable { place, source }),
        }
        Ok(PgPoolOptions::new().max_connections(4).acquire_timeout(CONNECT_WITHIN).connect_lazy_with(options))
    }

    /// How to connect, and the host and port, or the socket, as they may be shown.
    // INVARIANT: no part of what may be a password is shown, however it is written (held by the tests
    // `password_that_is_not_encoded_is_in_no_output` and `password_is_in_no_output`).
    fn options_and_place(&self) -> Result<(PgConnectOptions, String), StartError> {
        let text = &self.database_url;
        if let Some((scheme, _)) = text.split_once("://")
            && scheme.chars().all(|c| c.is_ascii_alphanumeric())
            && !["postgres", "postgresql"].iter().any(|known| scheme.eq_ignore_ascii_case(known))
        {
            return Err(StartError::OtherDatabase(scheme.to_owned()));
        }
        // An `@` behind the host: of a password with one of these in it, or of an option, as in `?user=app@example.com`.
        let behind = text.split_once("://").map_or(text.as_str(), |(_, rest)| rest);
        let behind = behind.find(['/', '?', '#']).and_then(|end| behind.get(end..)).unwrap_or_default();
        let options = PgConnectOptions::from_str(text);
        if behind.contains('@') {
            let path = behind.split('?').next().unwrap_or_default();
            if options.is_err() || path.contains('@') || behind.contains('#') {
                return Err(StartError::NotEncoded);
            }
        }
        let options = options
            .map_err(StartError::DatabaseUrl)?
            .application_name("dir-sync")
            .disable_statement_logging(); // a bulk statement that takes seconds is no news
        let place = if behind.contains('@') {
            "the host of its URL (not shown, as an `@` follows: in a password write `%2F`, `%23`, `%3F` and `%40` for `/`, `#`, `?` and `@`)"
                .to_owned()
        } else {
            options.get_socket().map_or_else(
                || format!("`{}:{}`", options.get_host(), options.get_port()),
                |socket| format!("`{}`", socket.display()),
            )
        };
        Ok((options, place))
    }
}

impl Google {
    /// How to reach the directory.
    ///
    /// # Errors
    /// [`StartError::NoCredentials`].
    pub fn config(&self) -> Result<GoogleConfig, StartError> {
        if self.google_credentials.is_none() && self.google_service_account.is_none() {
            return Err(StartError::NoCredentials);
        }
        Ok(GoogleConfig {
            credentials: self.google_credentials.clone(),
            keyless: Keyless {
                service_account: self.google_service_account.clone(),
                metadata_url: self.google_metadata_url.clone(),
                iam_url: self.google_iam_url.clone(),
                token_url: self.google_token_url.clone(),
            },
            subject: self.google_subject.clone(),
            customer: self.google_customer.clone(),
            base_url: self.google_url.clone(),
            queries_per_minute: self.google_quota,
            request_timeout: Duration::from_secs(self.google_request_timeout.into()),
            ..GoogleConfig::keyless()
        })
    }
}

/// Reads a directory file in a thread that the program does not wait for when it ends: a file that does not come (a pipe,
/// a share that hangs) would keep it from seeing a signal.
pub(crate) async fn read_file(path: PathBuf) -> Result<FileSource, SourceError> {
    let (done, read) = tokio::sync::oneshot::channel();
    let reading = path.clone();
    std::thread::spawn(move || {
        let _ = done.send(FileSource::open(reading)); // nobody waits any more
    });
    let unread = |_| SourceError::File { path, problem: "was not read to its end".to_owned(), cause: None };
    read.await.map_err(unread)?
}

impl Job {
    /// Opens the source.
    ///
    /// # Errors
    /// [`StartError::Source`] if the file or the key cannot be used, [`StartError::NoCredentials`].
    pub async fn open_source(&self) -> Result<Arc<dyn Source>, StartError> {
        Ok(match &self.source {
            SourceChoice::File(path) => Arc::new(read_file(path.clone()).await?),
            SourceChoice::Google => {
                let mut config = self.google.config()?;
                config.concurrency = self.concurrency;
                Arc::new(GoogleSource::new(config).await?)
            }
        })
    }

    /// What the run may and shall do.
    #[must_use]
    pub fn options(&self) -> Options {
        Options {
            include_external: self.external_members == External::Include,
            adopt_local: self.adopt_local,
            no_remove: self.no_remove,
            filter: GroupFilter {
                include: self.include_groups.clone(),
                exclude: self.exclude_groups.clone(),
            },
            limits: Limits {
                users: self.max_removed_users,
                groups: self.max_removed_groups,
                memberships: self.max_removed_memberships,
                members_of_group: self.max_removed_members_of_group,
                losing_users: self.max_losing_users,
            },
            approve: self.approve.clone(),
            concurrency: usize::from(self.concurrency),
            deadline: (self.deadline > 0).then(|| Duration::from_secs(self.deadline.into())),
            start_jitter: Duration::from_secs(self.start_jitter.into()),
            progress: None,
            stop: Stop::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_has_an_environment_variable() {
        let program = Cli::command();
        for command in std::iter::once(&program).chain(program.get_subcommands()) {
            for option in command
                .get_arguments()
                .filter(|option| !matches!(option.get_id().as_str(), "help" | "version"))
            {
                let name = option.get_long().unwrap();
                let variable = option.get_env().and_then(|name| name.to_str()).unwrap_or_default();
                let wanted = format!("DIR_SYNC_{}", name.to_uppercase().replace('-', "_"));
                assert_eq!(variable, wanted, "--{name} of `{}`", command.get_name());
            }
        }
    }

    #[test]
    fn source_is_google_or_a_file() {
        assert_eq!("google".parse(), Ok(SourceChoice::Google));
        assert_eq!("file:a:b.json".parse(), Ok(SourceChoice::File("a:b.json".into())));
        for bad in ["", "file:", "file", "ldap", "google:x"] {
            assert!(bad.parse::<SourceChoice>().is_err(), "{bad}");
        }
    }
}
