//! A server's folder, its server, and the keeper that ends both when nobody uses them any more.
//!
//! The folder holds `alive`, on which each user has a shared lock; `keeper`, locked while the keeper lives;
//! `log`, locked while any process of the server lives; `hold`, locked while a killed server is to stay down;
//! `ready`, written last, which says how to reach the server; `closing`, once nobody may use it any more; and
//! `data`. The kernel frees the locks of processes that are killed.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use sqlx::{Connection as _, PgConnection};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    account::Account,
    address::Address,
    error::{Doing as _, Error, chain},
    programs::Programs,
    run_folder::{self, RunFolder},
};

const SCRIPT: &str = include_str!("keeper.sh");
const DEADLINE: Duration = Duration::from_mins(2);
const PAUSE: Duration = Duration::from_millis(5);

/// How a server is run.
#[derive(Clone)]
pub(crate) struct Manner {
    /// For how many seconds it stays without a user: the next test may be about to start.
    pub(crate) linger: u32,
    /// What differs from PostgreSQL's own settings, as `name=value`.
    pub(crate) settings: &'static [&'static str],
    /// The folder of the server that it is a standby of.
    pub(crate) primary: Option<PathBuf>,
}

/// A server that this process started. Dropping it gives up this process's use of it and nothing more.
pub(crate) struct Kept {
    folder: PathBuf,
    account: Account,
    programs: Option<Programs>,
    manner: Manner,
    alive: File,
    /// Locked as long as the server is to stay down.
    hold: Option<File>,
    log: File,
    keeper: Child,
}

impl Kept {
    /// Makes a server's folder and starts its keeper, which starts the server.
    ///
    /// Without programs there is only the folder, to be removed when nobody uses it any more.
    pub(crate) fn start(run: &RunFolder, programs: Option<Programs>, manner: Manner) -> Result<Kept, Error> {
        let (account, folder) = (run.account(), run.new_server()?);
        let made = Kept::in_folder(&folder, account, programs, manner);
        if made.is_err() {
            // There may be no keeper to do it; what is left is removed by the next process that looks.
            let _ = fs::remove_dir_all(&folder);
        }
        made
    }

    fn in_folder(
        folder: &Path,
        account: Account,
        programs: Option<Programs>,
        manner: Manner,
    ) -> Result<Kept, Error> {
        let doing = || format!("start a server in `{}`", folder.display());
        let alive = run_folder::create(&folder.join("alive"), account).doing(doing())?;
        // INVARIANT: the user's lock is there before the keeper waits for it to go (`killed_user_leaves_nothing`).
        alive.lock_shared().doing(doing())?;
        run_folder::create(&folder.join("hold"), account).doing(doing())?;
        let log = run_folder::create(&folder.join("log"), account).doing(doing())?;
        let programs = programs.map(|programs| programs.usable_by(account, folder)).transpose()?;
        let keeper = spawn(folder, account, programs.as_ref(), &manner).doing(doing())?;
        Ok(Kept { folder: folder.to_owned(), account, programs, manner, alive, hold: None, log, keeper })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The programs that the server runs, as its user can run them.
    pub(crate) fn programs(&self) -> Option<&Programs> {
        self.programs.as_ref()
    }

    pub(crate) fn address(&self) -> Address {
        Address::of_socket(&self.folder)
    }

    /// Gives up everything but the use of the server.
    pub(crate) fn into_use(self) -> File {
        self.alive
    }

    /// Waits until the server takes connections.
    pub(crate) async fn wait_until_ready(&mut self) -> Result<(), Error> {
        let url = self.address().url("postgres");
        let deadline = Instant::now() + DEADLINE;
        loop {
            let last = match connect(&url).await {
                Ok(connection) => {
                    // It was only to see whether it can be had.
                    let _ = connection.close().await;
                    return Ok(());
                }
                Err(error) => error,
            };
            let keeper_ended = self.keeper.try_wait().is_ok_and(|status| status.is_some());
            if keeper_ended || self.folder.join("ended").exists() {
                return Err(Error::NotStarted { reason: "it ended".to_owned(), log: self.end_of_log() });
            }
            if Instant::now() > deadline {
                return Err(Error::NotStarted { reason: chain(&last), log: self.end_of_log() });
            }
            sleep(PAUSE).await;
        }
    }

    /// Kills the keeper and the server at once, and leaves a new keeper that waits for [`Kept::restart`].
    pub(crate) fn kill(&mut self) -> Result<(), Error> {
        if self.hold.is_some() {
            return Ok(());
        }
        let doing = || "kill the server".to_owned();
        let hold = run_folder::create(&self.folder.join("hold"), self.account).doing(doing())?;
        hold.lock().doing(doing())?;
        // The postmaster is in the keeper's group. Its children have groups of their own and would end with it,
        // but not at once; a stopped postmaster has no new ones.
        let postmaster = postmaster_of(&self.folder.join("data"));
        let mut backends = Vec::new();
        if let Some(postmaster) = postmaster {
            kill_process(postmaster, Signal::STOP).map_err(io::Error::from).doing(doing())?;
            backends = children_of(postmaster);
        }
        kill_group(&self.keeper).doing(doing())?;
        for backend in backends {
            // It may have ended by itself.
            let _ = kill_process(backend, Signal::KILL);
        }
        self.keeper.wait().doing(doing())?;
        self.wait_for_processes()?;
        match fs::remove_file(self.folder.join("ended")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).doing(doing()),
            _ => {}
        }
        self.keeper =
            spawn(&self.folder, self.account, self.programs.as_ref(), &self.manner).doing(doing())?;
        self.hold = Some(hold);
        Ok(())
    }

    /// Waits until no process of the server is left, which is when its log is no longer locked.
    fn wait_for_processes(&self) -> Result<(), Error> {
        let doing = || "wait for the end of the server".to_owned();
        let log = run_folder::create(&self.folder.join("log"), self.account).doing(doing())?;
        let deadline = std::time::Instant::now() + DEADLINE;
        while log.try_lock().is_err() {
            if std::time::Instant::now() > deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut)).doing(doing());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Lets the server start again and waits until it takes connections.
    pub(crate) async fn restart(&mut self) -> Result<(), Error> {
        self.hold = None;
        self.wait_until_ready().await
    }

    /// Gives up the use of the server and waits until it is gone, which needs that nobody else uses it.
    pub(crate) fn stop(mut self) {
        drop((self.alive, self.hold));
        let deadline = std::time::Instant::now() + DEADLINE;
        while matches!(self.keeper.try_wait(), Ok(None)) && std::time::Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends a server that did not start, with everything of it. The run folder may be locked.
    pub(crate) fn abandon(mut self) {
        // What cannot be removed now is removed by the next process that looks.
        let _ = kill_group(&self.keeper);
        let _ = self.keeper.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }

    fn end_of_log(&mut self) -> String {
        let mut text = Vec::new();
        let read = self.log.seek(SeekFrom::Start(0)).and_then(|_| self.log.read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().rev().take(8).collect();
        let lines: Vec<_> = lines.into_iter().rev().collect();
        if read.is_err() || lines.is_empty() { "it is empty".to_owned() } else { lines.join(" | ") }
    }
}

fn spawn(folder: &Path, account: Account, programs: Option<&Programs>, manner: &Manner) -> io::Result<Child> {
    let alive = File::open(folder.join("alive"))?;
    let keeper = run_folder::create(&folder.join("keeper"), account)?;
    keeper.lock()?;
    let log = run_folder::create(&folder.join("log"), account)?;
    let mut command = account.command("/bin/sh");
    command.arg("-c").arg(SCRIPT).arg("authz-testdb-keeper").arg(folder);
    command.arg(programs.map_or(Path::new(""), |programs| &programs.bin));
    command.arg(manner.linger.to_string());
    command.arg(manner.primary.as_deref().unwrap_or(Path::new(""))).args(manner.settings);
    command.process_group(0).stdin(alive).stdout(keeper).stderr(Stdio::from(log)).spawn()
}

fn kill_group(child: &Child) -> io::Result<()> {
    match pid(i64::from(child.id())) {
        Some(group) => Ok(kill_process_group(group, Signal::KILL)?),
        None => Ok(()),
    }
}

fn pid(number: i64) -> Option<Pid> {
    i32::try_from(number).ok().filter(|number| *number > 1).and_then(Pid::from_raw)
}

/// Connects within a bound.
pub(crate) async fn connect(url: &str) -> sqlx::Result<PgConnection> {
    let bounded = timeout(Duration::from_secs(10), PgConnection::connect(url)).await;
    bounded.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

/// A server's folder that this process found.
pub(crate) enum Found {
    /// In use by this process from now on, as long as the file is open.
    Usable { alive: File, ready: String },
    /// About to be removed by its keeper, or of no use and still used by others.
    Busy,
    /// Nobody uses it, and nobody will remove it.
    Left,
}

/// Tries to become a user of the server in `folder`. Call it only with the run folder locked.
pub(crate) fn find(folder: &Path) -> Found {
    let path = folder.join("alive");
    let Ok(mut alive) = OpenOptions::new().read(true).append(true).open(&path) else { return Found::Left };
    let closing = |alive: &File| {
        folder.join("closing").exists() || !run_folder::is_named(alive, &path).unwrap_or(false)
    };
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !matches!(alive.try_lock_shared(), Ok(())) {
        // A keeper that only looks whether it has users holds the lock for a moment.
        if closing(&alive) || std::time::Instant::now() > deadline {
            return Found::Busy;
        }
        std::thread::sleep(PAUSE);
    }
    // The keeper sees by the byte that there was a user, should it be gone when it looks again.
    if alive.write_all(b".").is_err() {
        return Found::Busy;
    }
    // Whether there is a keeper is asked of a file that only a keeper locks.
    let kept = File::open(folder.join("keeper"))
        .is_ok_and(|keeper| matches!(keeper.try_lock_shared(), Err(TryLockError::WouldBlock)));
    match fs::read_to_string(folder.join("ready")) {
        Ok(ready) if kept && !closing(&alive) => Found::Usable { alive, ready },
        _ if kept => Found::Busy,
        _ => {
            // The shared lock becomes an exclusive one only when there are no other users.
            let unused = File::open(folder.join("alive")).is_ok_and(|file| {
                drop(alive);
                file.try_lock().is_ok()
            });
            if unused { Found::Left } else { Found::Busy }
        }
    }
}

/// Ends what is left of a server whose keeper was killed, and removes its folder.
pub(crate) fn remove_left(folder: &Path, account: Account) -> Result<(), Error> {
    let doing = || format!("remove `{}`", folder.display());
    let data = folder.join("data");
    if let Some(postmaster) = postmaster_of(&data) {
        // It may have ended meanwhile.
        let _ = kill_process(postmaster, Signal::QUIT);
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while postmaster_of(&data) == Some(postmaster) {
            if std::time::Instant::now() > deadline {
                let _ = kill_process(postmaster, Signal::KILL);
                break;
            }
            std::thread::sleep(PAUSE);
        }
    }
    // Nobody is to take it for a server again.
    let _ = fs::remove_file(folder.join("ready"));
    match run_folder::create(&folder.join("alive"), account) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        made => drop(made.doing(doing())?),
    }
    // A keeper without a server removes a folder. It is not waited for: it needs the run folder's lock.
    let manner = Manner { linger: 0, settings: &[], primary: None };
    let mut keeper = spawn(folder, account, None, &manner).doing(doing())?;
    std::thread::spawn(move || keeper.wait());
    Ok(())
}

/// The process that `postmaster.pid` names, if it really is a server on this data folder.
fn postmaster_of(data: &Path) -> Option<Pid> {
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let found = number(text.lines().next()?)?;
    let number = found.as_raw_nonzero();
    let same = if let Ok(cwd) = fs::read_link(format!("/proc/{number}/cwd")) {
        cwd == data
    } else {
        let output = Command::new("ps").args(["-o", "command=", "-p", &number.to_string()]).output();
        let wanted = format!("-D {}", data.display());
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(&wanted))
    };
    same.then_some(found)
}

/// The processes that this one has started and that have not ended.
fn children_of(parent: Pid) -> Vec<Pid> {
    let parent = parent.as_raw_nonzero().get().to_string();
    let mut children = Vec::new();
    if let Ok(processes) = fs::read_dir("/proc").map(Iterator::flatten) {
        for process in processes {
            let Ok(stat) = fs::read_to_string(process.path().join("stat")) else { continue };
            // After the name, which is in parentheses, come the state and the parent's number.
            let of = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
            if of == Some(&parent) {
                children.extend(process.file_name().to_str().and_then(number));
            }
        }
    } else if let Ok(output) = Command::new("ps").args(["-axo", "pid=,ppid="]).output() {
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let mut numbers = line.split_whitespace();
            if let (Some(child), true) = (numbers.next(), numbers.next() == Some(&parent)) {
                children.extend(number(child));
            }
        }
    }
    children
}

fn number(text: &str) -> Option<Pid> {
    text.trim().parse().ok().and_then(pid)
}
