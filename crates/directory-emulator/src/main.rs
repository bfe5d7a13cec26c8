//! Serves a directory file as Google's Admin SDK Directory API does, until it is told to stop.

use std::error::Error as StdError;
use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use directory_emulator::{Directory, Error, Options};
use tokio::signal::unix::{SignalKind, signal};

/// Serves a directory file as Google's Admin SDK Directory API does.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The directory file: JSON, plain or gzip.
    file: PathBuf,
    /// Where to listen; port 0 takes any free one.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    listen: SocketAddr,
    /// Writes a service-account key file for this server here, readable by its owner only.
    #[arg(long, value_name = "PATH")]
    key_file: Option<PathBuf>,
    /// The administrator to act as [default: admin@ the first user's domain].
    #[arg(long, value_name = "EMAIL")]
    subject: Option<String>,
}

#[derive(Debug, thiserror::Error)]
enum RunFailure {
    #[error(transparent)]
    Emulator(#[from] Error),
    #[error("cannot write key file `{path}`; choose a path that you may write to")]
    KeyFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot wait for signals or write to standard output")]
    Process(#[from] io::Error),
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", chain(&failure));
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), RunFailure> {
    // Before anyone is told the address, so that a signal right after it ends us in order.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let directory = Directory::from_file(&arguments.file)?;
    let mut options = Options::new().listen(arguments.listen);
    if let Some(subject) = arguments.subject {
        options = options.subject(subject);
    }
    let emulator = options.start(directory).await?;
    if let Some(path) = arguments.key_file {
        write_key(&path, &emulator.service_account_key())
            .map_err(|source| RunFailure::KeyFile { path, source })?;
    }

    let mut stdout = io::stdout();
    writeln!(stdout, "listening on {}", emulator.url())?;
    stdout.flush()?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

fn write_key(path: &Path, key: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    // The mode above holds for a new file only.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(key.as_bytes())
}

/// The message and those of its causes, in one line.
fn chain(failure: &dyn StdError) -> String {
    let mut text = failure.to_string();
    let mut cause = failure.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
