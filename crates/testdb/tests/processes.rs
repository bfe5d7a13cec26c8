//! What several processes of a run share, and what they leave behind: nothing.
//!
//! Each test starts processes of its own, which run [`helper`], with a folder for temporary files of its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    error::Error as _,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid, kill_process, test_kill_process};
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;
use testdb::{Database, Server};

/// Not a test, but what the processes of the tests below do: make a database, say so, and keep it until their
/// stdin ends.
#[tokio::test]
async fn helper() {
    let Ok(what) = std::env::var("TESTDB_HELPER") else { return };
    if what == "server" {
        let server = Server::start().await.unwrap();
        println!("\nhelper: database - {}", server.url("postgres"));
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        return;
    }
    let database = Database::create("helper", async |url: String| {
        println!("\nhelper: prepares");
        PgConnection::connect(&url).await?.close().await
    });
    match database.await {
        Ok(database) => {
            println!("\nhelper: database {} {}", database.name(), database.url());
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
        Err(error) => {
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            println!("\nhelper: error {error} {source}");
        }
    }
}

struct Helper {
    child: Child,
    out: BufReader<ChildStdout>,
    prepared: bool,
    name: String,
    url: String,
}

impl Helper {
    /// Starts a process without waiting for its database.
    fn start(temp: &Path, change: impl FnOnce(&mut Command)) -> Helper {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["helper", "--exact", "--nocapture"])
            .env("TESTDB_HELPER", "database")
            .env("TMPDIR", temp);
        for name in ["AUTHZ_TEST_DATABASE_URL", "AUTHZ_TEST_POSTGRES", "AUTHZ_TEST_POSTGRES_BIN"] {
            command.env_remove(name);
        }
        // These tests are about a server that is started on this machine.
        command.env("DOCKER_HOST", "unix:///nonexistent/docker.sock");
        change(&mut command);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Helper { child, out, prepared: false, name: String::new(), url: String::new() }
    }

    fn wait(mut self) -> Helper {
        loop {
            let line = self.line();
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["prepares"] => self.prepared = true,
                ["database", name, url] => {
                    (self.name, self.url) = (name.to_owned(), url.to_owned());
                    return self;
                }
                _ => panic!("{line}"),
            }
        }
    }

    fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.out.read_line(&mut line).unwrap() > 0, "the helper ended early");
            if let Some(line) = line.strip_prefix("helper: ") {
                return line.trim_end().to_owned();
            }
        }
    }

    /// Lets the process end by itself.
    fn end(mut self) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "{rest}");
    }

    /// Ends it with SIGKILL.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn connect(&self) -> sqlx::Result<PgConnection> {
        PgConnection::connect(&self.url).await
    }
}

/// A folder like the system's for temporary files, with a short path.
fn temp() -> TempDir {
    let temp = tempfile::Builder::new().tempdir_in("/tmp").unwrap();
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    temp
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(100);
    while !condition() {
        assert!(Instant::now() < deadline, "this did not happen in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn wait_until_empty(temp: &TempDir) {
    wait_until("the folder is empty", || fs::read_dir(temp).unwrap().next().is_none());
}

/// The folder of the only server in a folder for temporary files.
fn server_folder(temp: &TempDir) -> PathBuf {
    let only = |folder: &Path| {
        let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.retain(|path| path.is_dir());
        assert_eq!(entries.len(), 1, "{entries:?}");
        entries.remove(0)
    };
    only(&only(temp.path()))
}

fn postmaster(temp: &TempDir) -> Pid {
    let text = fs::read_to_string(server_folder(temp).join("data/postmaster.pid")).unwrap();
    Pid::from_raw(text.lines().next().unwrap().parse().unwrap()).unwrap()
}

/// Whether the process runs; one that only waits for its parent to take notice does not.
fn runs(pid: Pid) -> bool {
    let output = Command::new("ps").args(["-o", "state=", "-p", &pid.to_string()]).output();
    match output {
        Ok(output) => {
            !matches!(String::from_utf8_lossy(&output.stdout).trim().chars().next(), None | Some('Z'))
        }
        Err(_) => test_kill_process(pid).is_ok(),
    }
}

#[test]
fn processes_share_a_server_and_its_templates() {
    let temp = temp();
    let helpers: Vec<_> = (0..6).map(|_| Helper::start(temp.path(), |_| ())).collect();
    let helpers: Vec<_> = helpers.into_iter().map(Helper::wait).collect();
    assert_eq!(helpers.iter().filter(|helper| helper.prepared).count(), 1);
    let mut names: Vec<_> = helpers.iter().map(|helper| &helper.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 6);
    server_folder(&temp);
    helpers.into_iter().for_each(Helper::end);
    wait_until_empty(&temp);
}

#[tokio::test]
async fn killed_user_leaves_nothing() {
    let temp = temp();
    let first = Helper::start(temp.path(), |_| ()).wait();
    let second = Helper::start(temp.path(), |_| ()).wait();
    let postmaster = postmaster(&temp);
    // The one that started the server is not needed for the other to go on.
    first.kill();
    second.connect().await.unwrap().close().await.unwrap();
    assert!(runs(postmaster));
    second.kill();
    wait_until_empty(&temp);
    wait_until("the server has ended", || !runs(postmaster));
}

#[test]
fn user_killed_during_the_start_leaves_nothing() {
    let temp = temp();
    let helper = Helper::start(temp.path(), |_| ());
    wait_until("initdb runs", || {
        let Some(run) = fs::read_dir(&temp).unwrap().next() else { return false };
        let servers = fs::read_dir(run.unwrap().path()).into_iter().flatten();
        servers.flatten().any(|server| server.path().join("data").exists())
    });
    helper.kill();
    wait_until_empty(&temp);
}

#[test]
fn what_a_killed_keeper_leaves_is_removed_by_the_next_run() {
    let temp = temp();
    let helper = Helper::start(temp.path(), |_| ()).wait();
    let postmaster = postmaster(&temp);
    let output = Command::new("ps").args(["-eo", "pid=,pgid="]).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let processes: Vec<(i32, i32)> = output
        .lines()
        .map(|line| {
            let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
            (numbers.next().unwrap(), numbers.next().unwrap())
        })
        .collect();
    let of = |wanted| processes.iter().find(|(pid, _)| *pid == wanted).unwrap().1;
    let group = of(postmaster.as_raw_nonzero().get());
    for (pid, of) in &processes {
        if *of == group && *pid != postmaster.as_raw_nonzero().get() {
            kill_process(Pid::from_raw(*pid).unwrap(), Signal::KILL).unwrap();
        }
    }
    helper.kill();
    assert!(runs(postmaster), "a server without a keeper is what this test is about");
    Helper::start(temp.path(), |_| ()).wait().end();
    wait_until_empty(&temp);
    wait_until("the old server has ended", || !runs(postmaster));
}

#[test]
fn killed_user_of_a_private_server_leaves_nothing() {
    let temp = temp();
    let helper = Helper::start(temp.path(), |command| {
        command.env("TESTDB_HELPER", "server");
    })
    .wait();
    let postmaster = postmaster(&temp);
    helper.kill();
    wait_until_empty(&temp);
    wait_until("the server has ended", || !runs(postmaster));
}

#[test]
fn ordinary_user_has_a_server_too() {
    if !geteuid().is_root() {
        eprintln!(
            "skipped: only root can become another user, and the other tests run as an ordinary one now"
        );
        return;
    }
    let (nobody, temp, home) = (65534, temp(), temp());
    chown(temp.path(), Some(nobody), Some(nobody)).unwrap();
    // The other user may not be able to reach this program where it is.
    let program = home.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let helper = Helper::start(temp.path(), |command| {
        let mut other = Command::new(&program);
        other.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => other.env(name, value),
                None => other.env_remove(name),
            };
        }
        other.uid(nobody).gid(nobody).current_dir("/").env("HOME", home.path());
        *command = other;
    });
    let helper = helper.wait();
    assert!(temp.path().join("authz-testdb-65534").is_dir());
    helper.kill();
    wait_until_empty(&temp);
}

#[test]
fn folder_of_somebody_else_is_not_used() {
    let temp = temp();
    let run = temp.path().join(format!("authz-testdb-{}", geteuid().as_raw()));
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
    let mut helper = Helper::start(temp.path(), |_| ());
    let line = helper.line();
    assert!(line.starts_with("error") && line.contains("is not a private folder"), "{line}");
    helper.end();
}

#[test]
fn way_that_is_asked_for_and_fails_is_not_replaced() {
    let temp = temp();
    let mut helper = Helper::start(temp.path(), |command| {
        command.env("AUTHZ_TEST_POSTGRES", "docker");
    });
    let line = helper.line();
    assert!(line.starts_with("error there is no PostgreSQL server for the tests"), "{line}");
    helper.end();
    wait_until_empty(&temp);
}

#[test]
fn unusable_url_is_an_error_that_shows_no_password() {
    let temp = temp();
    let url = "postgres://me:secret-word@127.0.0.1:1/x";
    let mut helper = Helper::start(temp.path(), |command| {
        command.env("AUTHZ_TEST_DATABASE_URL", url);
    });
    let line = helper.line();
    assert!(line.starts_with("error the server that AUTHZ_TEST_DATABASE_URL names cannot be used"), "{line}");
    assert!(!line.contains("secret-word"), "{line}");
    helper.end();
    wait_until_empty(&temp);
}

/// The databases of this crate on a server.
async fn databases(server: &Server) -> Vec<String> {
    let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
    sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE datname LIKE 'testdb%' ORDER BY datname")
        .fetch_all(&mut connection)
        .await
        .unwrap()
}

#[tokio::test]
async fn nothing_is_left_on_a_server_behind_a_url() {
    let (temp, server) = (temp(), Server::start().await.unwrap());
    let url = server.url("postgres");
    let start = || {
        Helper::start(temp.path(), |command| {
            command.env("AUTHZ_TEST_DATABASE_URL", &url);
        })
    };

    let helpers: Vec<_> = (0..4).map(|_| start()).collect();
    let mut helpers: Vec<_> = helpers.into_iter().map(Helper::wait).collect();
    assert_eq!(helpers.iter().filter(|helper| helper.prepared).count(), 1);
    assert_eq!(databases(&server).await.len(), 5);
    let killed = helpers.pop().unwrap();
    let left = killed.name.clone();
    killed.kill();
    helpers.into_iter().for_each(Helper::end);
    // A killed process cannot drop its database; the next run does.
    assert_eq!(databases(&server).await, [left]);
    let next = start().wait();
    assert_eq!(databases(&server).await.len(), 2);
    next.end();
    assert_eq!(databases(&server).await, Vec::<String>::new());
    assert!(fs::read_dir(&temp).unwrap().next().is_none());
}

#[tokio::test]
async fn role_that_may_not_create_databases_is_told_so() {
    let (temp, server) = (temp(), Server::start().await.unwrap());
    let mut connection = PgConnection::connect(&server.url("postgres")).await.unwrap();
    sqlx::raw_sql("CREATE ROLE weak LOGIN").execute(&mut connection).await.unwrap();
    let url = server.url("postgres").replace("postgres@", "weak@");
    let mut helper = Helper::start(temp.path(), |command| {
        command.env("AUTHZ_TEST_DATABASE_URL", url);
    });
    let line = helper.line();
    assert!(line.contains("CREATEDB"), "{line}");
    helper.end();
}
