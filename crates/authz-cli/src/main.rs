//! The `authz` program: who may do what, and the audit trail. Thin over the library of the same name.

mod answer;
mod audit;
mod cli;
mod permissions;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use answer::{Answer, Failure};
use cli::{Cli, Command};

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("AUTHZ_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    // It tells the options in the database's URL that it does not know, with their values (`sslpassword=…`).
    let silent = "sqlx_postgres::options=off".parse();
    let filter = silent.map_or_else(|_| EnvFilter::new("off"), |silent| filter.add_directive(silent));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(std::io::stderr().is_terminal()).init();
    let output = cli.place.output;
    match run(cli).await {
        Ok(answer) => answer.print(output),
        Err(failure) => failure.print(output),
    }
}

async fn run(Cli { place, command }: Cli) -> Result<Answer, Failure> {
    match command {
        Command::Migrate => {
            authz::migrate(&place.connect().await?).await?;
            Ok(Answer::done("the tables are up to date"))
        }
        Command::Verify(what) => audit::verify(&place, what).await,
        Command::Audit(command) => audit::run(&place, command).await,
        command => permissions::run(&place, command).await,
    }
}
