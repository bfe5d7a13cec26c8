//! Renews the query data that `authz` is built against (`crates/authz/.sqlx`), on a database of its own with
//! all migrations; with `--check` only says whether it is up to date.
//!
//! It must not use `authz` itself, which may not compile before its query data is renewed.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match prepare(std::env::args().nth(1).as_deref() == Some("--check")).await {
        Ok(message) => {
            println!("{message}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn prepare(check: bool) -> Result<String, Failure> {
    let authz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../authz").canonicalize()?;
    let database = testdb::Database::empty().await?;
    migrate(&authz.join("migrations"), database.url()).await?;

    let fresh = authz.join(".sqlx.new");
    let _ = fs::remove_dir_all(&fresh); // of a run that was stopped
    fs::create_dir(&fresh)?;
    let written = write_query_data(&authz, &fresh, database.url());
    let (old, new) = (files(&authz.join(".sqlx"))?, files(&fresh)?);
    if written.is_err() || check || old == new {
        fs::remove_dir_all(&fresh)?;
        written?;
        return if old == new {
            Ok(format!("the data of {} queries is up to date", new.len()))
        } else {
            Err("crates/authz/.sqlx is not up to date; run `cargo run -p testdb --example prepare_queries`"
                .into())
        };
    }
    fs::remove_dir_all(authz.join(".sqlx"))?;
    fs::rename(&fresh, authz.join(".sqlx"))?;
    Ok(format!("wrote the data of {} queries", new.len()))
}

async fn migrate(folder: &Path, url: &str) -> Result<(), Failure> {
    let mut connection = PgConnection::connect(url).await?;
    connection.execute("create schema authz").await?;
    let mut scripts: Vec<_> = fs::read_dir(folder)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    scripts.retain(|path| path.extension().is_some_and(|e| e == "sql"));
    scripts.sort();
    for script in scripts {
        connection.execute(sqlx::raw_sql(AssertSqlSafe(fs::read_to_string(script)?))).await?;
    }
    connection.close().await?;
    Ok(())
}

/// The macros write their data where `SQLX_OFFLINE_DIR` says while the crate is checked.
fn write_query_data(authz: &Path, folder: &Path, url: &str) -> Result<(), Failure> {
    let lib = fs::File::options().append(true).open(authz.join("src/lib.rs"))?;
    lib.set_modified(std::time::SystemTime::now())?; // so that the macros run again
    let status = Command::new(env!("CARGO"))
        .args(["check", "--quiet", "--package", "authz", "--lib"])
        .current_dir(authz)
        .env("AUTHZ_DATABASE_URL", url)
        .env("SQLX_OFFLINE_DIR", folder)
        .env_remove("SQLX_OFFLINE")
        .status()?;
    if status.success() { Ok(()) } else { Err("authz does not compile; see above".into()) }
}

fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        all.insert(entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
    }
    Ok(all)
}
