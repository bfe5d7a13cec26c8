//! The `dir-sync` program; see the library of the same name.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use dir_sync::cli::{Cli, Command, Job, Output, StartError};
use dir_sync::source::error_chain;
use dir_sync::stop::Stop;
use dir_sync::{DirectorySync, Options};
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    // The sign-in library prints tokens at debug level, so no filter may switch that on.
    let filter = EnvFilter::try_from_env("DIR_SYNC_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let filter = match "yup_oauth2=off".parse() {
        Ok(silence) => filter.add_directive(silence),
        Err(_) => filter,
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    match cli.command {
        Command::Migrate(database) => {
            let migrated = async { Ok::<_, StartError>(authz::migrate(&database.connect().await?).await?) };
            match migrated.await {
                Ok(()) => say("the tables are up to date"),
                Err(error) => not_started(&error, Output::Text),
            }
        }
        Command::Plan(job) => match start(&job).await {
            Ok(sync) => ended(&sync.plan().await, job.output),
            Err(error) => not_started(&error, job.output),
        },
        Command::Run(job) => match start(&job).await {
            Ok(sync) => ended(&sync.run().await, job.output),
            Err(error) => not_started(&error, job.output),
        },
    }
}

async fn start(job: &Job) -> Result<DirectorySync, StartError> {
    let stop = Stop::on_signals().map_err(StartError::Signals)?;
    let opening = async { Ok::<_, StartError>((job.database.connect().await?, job.open_source().await?)) };
    let (pool, source) = tokio::select! {
        opened = opening => opened?,
        reason = stop.wanted() => return Err(StartError::Stopped(reason)),
    };
    let options = Options { stop, ..job.options() };
    Ok(DirectorySync::new(pool, job.directory.clone(), source).options(options))
}

fn ended(report: &dir_sync::Report, output: Output) -> ExitCode {
    let text = match output {
        Output::Text => report.to_string(),
        Output::Json => serde_json::to_string(report).unwrap_or_else(|error| {
            serde_json::json!({"status": "failed", "error": error.to_string()}).to_string()
        }),
    };
    // What went wrong goes to standard error in the form for people, so that it is seen behind a pipe too.
    if output == Output::Text && report.exit_code() != 0 {
        let _ = writeln!(std::io::stderr(), "{}", text.trim_end());
    } else {
        say(text.trim_end());
    }
    ExitCode::from(report.exit_code())
}

/// The database or the source could not be opened, so there is no run to report on.
fn not_started(error: &StartError, output: Output) -> ExitCode {
    let message = error_chain(error);
    if output == Output::Json {
        say(&serde_json::json!({
            "status": "failed", "plan_hash": null, "counts": authz::mirror::Counts::default(), "api_calls": 0,
            "duration_ms": 0, "error": message,
        })
        .to_string());
    } else {
        let _ = writeln!(std::io::stderr(), "failed: {message}");
    }
    ExitCode::from(error.exit_code())
}

/// A reader that went away is no reason to fail: the work is done.
fn say(text: &str) -> ExitCode {
    let _ = writeln!(std::io::stdout(), "{text}");
    ExitCode::SUCCESS
}
