//! The `dir-sync` program; see the library of the same name.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use authz::DirectoryName;
use authz::mirror::{freshness, runs};
use dir_sync::cli::{self, Cli, Command, Database, Job, LogFormat, Monitoring, Output, StartError};
use dir_sync::doctor::examine;
use dir_sync::filter::Pattern;
use dir_sync::history::{Runs, Statuses, is_stale};
use dir_sync::progress::ProgressLine;
use dir_sync::run::ENDED;
use dir_sync::source::error_chain;
use dir_sync::stop::{Reason, Stop};
use dir_sync::{DirectorySync, Options, Report, metrics};
use serde::Serialize;
use sqlx::PgPool;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, filter, fmt};

/// How long the database may take to say for the metrics how fresh the directory is.
const FRESHNESS_WITHIN: Duration = Duration::from_secs(5);

/// How long the end of the program waits for threads that wait for a file, or for a name to be resolved.
const LINGER: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::read();
    start_log(&cli);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return not_begun(&StartError::Threads(error), Output::Text, cli.log_format),
    };
    let code = runtime.block_on(execute(&cli));
    runtime.shutdown_timeout(LINGER);
    code
}

async fn execute(cli: &Cli) -> ExitCode {
    let log = cli.log_format;
    let (done, output) = match &cli.command {
        Command::Plan(job) => return sync(job, DirectorySync::plan, None, log).await,
        Command::Run(job) => return sync(job, DirectorySync::run, Some(&job.monitoring), log).await,
        Command::Migrate(database) => {
            (unless_signalled(migrate(database), StartError::StoppedMigrating).await, Output::Text)
        }
        Command::Doctor(job) => {
            (unless_signalled(show_examination(job), StartError::Stopped).await, job.output)
        }
        Command::Runs(asked) => (unless_signalled(show_runs(asked), StartError::Stopped).await, asked.output),
        Command::Status(asked) => {
            (unless_signalled(show_status(asked), StartError::Stopped).await, asked.output)
        }
    };
    done.unwrap_or_else(|error| not_begun(&error, output, log))
}

/// What needs no order to end in. As the first process of a container it would not see a signal that nobody handles.
async fn unless_signalled(
    work: impl Future<Output = Result<ExitCode, StartError>>,
    stopped: fn(Reason) -> StartError,
) -> Result<ExitCode, StartError> {
    let stop = Stop::on_signals().map_err(StartError::Signals)?;
    tokio::select! {
        biased;
        done = work => done,
        reason = stop.wanted() => Err(stopped(reason)),
    }
}

/// The log goes to standard error, so that standard output is the result alone.
fn start_log(cli: &Cli) {
    let default = match cli.log_format {
        LogFormat::Human => format!("warn,{ENDED}=off"), // a person reads the report
        LogFormat::Json => "info".to_owned(),
    };
    let filter = EnvFilter::new(cli.log.as_deref().unwrap_or(&default));
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = match cli.log_format {
        LogFormat::Human => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    // INVARIANT: the sign-in library prints tokens, and what reads the database's URL the options in it that it does not know
    // (`sslpassword=…`); no filter can switch that on (held by the tests `no_token_is_in_any_log` and
    // `password_is_in_no_output`).
    let silent = filter::filter_fn(|metadata| {
        !["yup_oauth2", "sqlx_postgres::options"].iter().any(|target| metadata.target().starts_with(target))
    });
    tracing_subscriber::registry().with(lines.with_filter(silent)).with(filter).init();
}

async fn sync<F: Future<Output = Report>>(
    job: &Job,
    work: impl FnOnce(DirectorySync) -> F,
    monitoring: Option<&Monitoring>,
    log: LogFormat,
) -> ExitCode {
    let (report, pool) = match start(job).await {
        Ok((pool, sync, line)) => {
            let report = work(sync).await;
            drop(line);
            warn_of_no_group(job, &report);
            (report, Some(pool))
        }
        Err(error) => {
            let mut report = Report::blank(&job.directory);
            report.error = Some(error_chain(&error));
            report.exit_code = Some(error.exit_code());
            log_not_begun(&error, log);
            (report, None)
        }
    };
    if let Some(monitoring) = monitoring {
        monitor(monitoring, &job.directory, &report, pool.as_ref()).await;
    }
    let text = match job.output {
        Output::Text => report.to_string(),
        Output::Json => serde_json::to_string(&report).unwrap_or_else(|error| {
            serde_json::json!({"status": "failed", "error": error.to_string()}).to_string()
        }),
    };
    // What went wrong goes to standard error in the form for people, so that it is seen behind a pipe too.
    if job.output == Output::Text && report.exit_code() != 0 {
        let _ = writeln!(std::io::stderr(), "{}", text.trim_end());
    } else {
        say(text.trim_end());
    }
    ExitCode::from(report.exit_code())
}

async fn start(job: &Job) -> Result<(PgPool, DirectorySync, Option<ProgressLine>), StartError> {
    let stop = Stop::on_signals().map_err(StartError::Signals)?;
    let opening = async { Ok::<_, StartError>((job.database.connect().await?, job.open_source().await?)) };
    let (pool, source) = tokio::select! {
        opened = opening => opened?,
        reason = stop.wanted() => return Err(StartError::Stopped(reason)),
    };
    // Log lines and a line that is written over do not go together.
    let drawn = if job.output == Output::Text { ProgressLine::on_terminal() } else { None };
    let (line, progress) = drawn.unzip();
    let options = Options { stop, progress, ..job.options() };
    let sync = DirectorySync::new(pool.clone(), job.directory.clone(), source).options(options);
    Ok((pool, sync, line))
}

/// A pattern with a mistake in it leaves out everything, which looks like a directory without groups.
fn warn_of_no_group(job: &Job, report: &Report) {
    let none = report.plan.as_ref().is_some_and(|plan| plan.listed.groups == 0);
    if none && report.left_out_groups > 0 && !job.include_groups.is_empty() {
        let shown =
            |patterns: &[Pattern]| patterns.iter().map(Pattern::to_string).collect::<Vec<_>>().join(",");
        tracing::warn!(
            include_groups = shown(&job.include_groups),
            exclude_groups = shown(&job.exclude_groups),
            left_out = report.left_out_groups,
            "the patterns keep no group of the directory at all"
        );
    }
}

/// Tells the monitoring. What goes wrong here is a warning: the run is as good as it was.
async fn monitor(monitoring: &Monitoring, directory: &DirectoryName, report: &Report, pool: Option<&PgPool>) {
    if monitoring.metrics_file.is_none() && monitoring.push_gateway.is_none() {
        return;
    }
    let known = match pool {
        Some(pool) => {
            let asked = freshness(pool, Some(directory));
            tokio::time::timeout(FRESHNESS_WITHIN, asked).await.ok().and_then(Result::ok)
        }
        None => None,
    };
    let text = metrics::render(report, known.as_deref().and_then(<[_]>::first));
    if let Some(path) = &monitoring.metrics_file
        && let Err(error) = metrics::write_file(path, &report.directory, &text)
    {
        tracing::warn!(file = %path.display(), error = error_chain(&error), "the metrics could not be written");
    }
    if let Some(gateway) = &monitoring.push_gateway
        && let Err(error) = metrics::push(gateway, &report.directory, text).await
    {
        tracing::warn!(error = error_chain(&error), "the metrics could not be pushed");
    }
}

async fn migrate(database: &Database) -> Result<ExitCode, StartError> {
    authz::migrate(&database.connect().await?).await?;
    Ok(say("the tables are up to date"))
}

async fn show_examination(job: &Job) -> Result<ExitCode, StartError> {
    let examination = examine(job).await;
    show(&examination, &examination, job.output);
    Ok(ExitCode::from(u8::from(!examination.is_well())))
}

async fn show_runs(asked: &cli::History) -> Result<ExitCode, StartError> {
    let pool = asked.database.connect().await?;
    if asked.directory.is_some() {
        freshness(&pool, asked.directory.as_ref()).await?; // or it is not known
    }
    let runs = runs(&pool, asked.directory.as_ref(), asked.limit).await?;
    show(&Runs(&runs), &serde_json::json!({"runs": runs}), asked.output);
    Ok(ExitCode::SUCCESS)
}

async fn show_status(asked: &cli::Freshness) -> Result<ExitCode, StartError> {
    let directories = freshness(&asked.database.connect().await?, asked.directory.as_ref()).await?;
    let stale = asked
        .max_age
        .is_some_and(|max| directories.is_empty() || directories.iter().any(|d| is_stale(d, max)));
    show(
        &Statuses { directories: &directories, max_age: asked.max_age },
        &serde_json::json!({"stale": stale, "directories": directories}),
        asked.output,
    );
    Ok(if stale { ExitCode::from(7) } else { ExitCode::SUCCESS })
}

fn show(text: &impl std::fmt::Display, json: &impl Serialize, output: Output) {
    match (output, serde_json::to_string(json)) {
        (Output::Json, Ok(json)) => say(&json),
        _ => say(text.to_string().trim_end()),
    };
}

/// The database or the source could not be opened, so there is nothing to report on.
fn not_begun(error: &StartError, output: Output, log: LogFormat) -> ExitCode {
    let message = error_chain(error);
    log_not_begun(error, log);
    if output == Output::Json {
        say(&serde_json::json!({"status": "failed", "error": message}).to_string());
    } else {
        let _ = writeln!(std::io::stderr(), "failed: {message}");
    }
    ExitCode::from(error.exit_code())
}

/// No run has begun whose end would be in the log. People read it on standard error already.
fn log_not_begun(error: &StartError, log: LogFormat) {
    if log == LogFormat::Json {
        tracing::error!(error = error_chain(error), exit_code = error.exit_code(), "failed");
    }
}

/// A reader that went away is no reason to fail: the work is done.
fn say(text: &str) -> ExitCode {
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}
