//! A private server that can be killed.

use std::thread;

use tokio::{runtime::Builder, sync::oneshot};

use crate::{
    account::Account,
    address::Address,
    error::{Doing as _, Error},
    fetch,
    keeper::{Kept, Manner},
    programs::Programs,
    run_folder::RunFolder,
    source::{Facts, Way, Wishes},
};

/// Durable: what is committed is there after a crash.
const DURABLE: &[&str] = &[
    "listen_addresses=",
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "max_connections=100",
    "dynamic_shared_memory_type=mmap",
    // A standby looks for its primary again at once, not after five seconds.
    "wal_retrieve_retry_interval=100ms",
];

/// A PostgreSQL server of its own, with durable settings, for tests of what happens in a crash.
///
/// It needs PostgreSQL's programs, installed or fetched; a server behind a URL or in Docker is not killed.
/// Dropping it stops it and removes its data; so does the end of the process, also by a kill.
pub struct Server {
    /// Taken out while it is restarted, and for good when dropped.
    kept: Option<Kept>,
    address: Address,
}

impl Server {
    /// Starts a server with nothing but the usual `postgres` database.
    ///
    /// # Errors
    /// When there are no programs of PostgreSQL, or no server comes up.
    pub async fn start() -> Result<Server, Error> {
        let kept = on_own_thread(async || {
            let wishes = Wishes::of_environment()?;
            let mut facts = Facts::probe(&wishes).await?;
            facts.docker = Err("a server that is to be killed is not taken from Docker".to_owned());
            let programs = match facts.choose()? {
                Way::Fetched => fetch::programs(),
                Way::Installed | Way::Docker => facts.installed.clone(),
            };
            let programs = programs.or_else(|reason| {
                facts.strike(Way::Fetched, reason);
                facts.choose().and_then(|_| facts.installed.clone().map_err(Error::NoServer))
            })?;
            start(programs, Manner { linger: 0, settings: DURABLE, primary: None }).await
        })
        .await?;
        Ok(Server { address: kept.address(), kept: Some(kept) })
    }

    /// Starts a hot standby: a second server that starts as a copy of this one and then streams from it.
    ///
    /// It can be killed and restarted by itself. While this server is down the standby answers from what it has; it
    /// takes up the stream again after [`Server::restart`].
    ///
    /// # Errors
    /// When this server is down, when there is no `pg_basebackup` beside the server's programs, or when the
    /// standby does not come up.
    pub async fn standby(&self) -> Result<Server, Error> {
        let primary = self.kept.as_ref().ok_or(Error::Ending)?;
        let programs = primary.programs().ok_or(Error::Ending)?.clone();
        if !programs.bin.join("pg_basebackup").is_file() {
            return Err(Error::NoBaseBackup { bin: programs.bin.display().to_string() });
        }
        let manner = Manner { linger: 0, settings: DURABLE, primary: Some(primary.folder().to_owned()) };
        let kept = on_own_thread(async || start(programs, manner).await).await?;
        Ok(Server { address: kept.address(), kept: Some(kept) })
    }

    /// The URL of a database on this server. It stays the same after [`Server::restart`].
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        self.address.url(database)
    }

    /// Ends the server with SIGKILL, as a crash would. It stays down until [`Server::restart`].
    ///
    /// # Errors
    /// When the operating system does not let it.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.kept.as_mut().map_or(Err(Error::Ending), Kept::kill)
    }

    /// Starts a killed server again, on the same data and at the same URL, and waits until it has recovered.
    ///
    /// # Errors
    /// When it does not come up again.
    pub async fn restart(&mut self) -> Result<(), Error> {
        self.kept.as_mut().ok_or(Error::Ending)?.restart().await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            kept.stop();
        }
    }
}

async fn start(programs: Programs, manner: Manner) -> Result<Kept, Error> {
    // The run folder is locked only until the keeper has been started.
    let mut kept = {
        let run = RunFolder::lock(Account::of_server()?)?;
        Kept::start(&run, Some(programs), manner)?
    };
    match kept.wait_until_ready().await {
        Ok(()) => Ok(kept),
        Err(error) => {
            kept.stop();
            Err(error)
        }
    }
}

/// Runs what blocks, such as waiting for a lock, where it blocks nobody else.
async fn on_own_thread<T, F>(body: F) -> Result<T, Error>
where
    T: Send + 'static,
    F: AsyncFnOnce() -> Result<T, Error> + Send + 'static,
{
    let (reply, answer) = oneshot::channel();
    let body = move || {
        let runtime = Builder::new_current_thread().enable_all().build().doing("start a runtime");
        // Who asked may have given up meanwhile.
        let _ = reply.send(runtime.and_then(|runtime| runtime.block_on(body())));
    };
    thread::Builder::new().spawn(body).doing("start a thread")?;
    answer.await.map_err(|_| Error::Ending)?
}
