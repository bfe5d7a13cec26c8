//! The `dir-sync` program as a child process.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

use super::Workspace;

/// A command line in the making. Nothing of the environment of the tests themselves reaches the program.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Program {
    pub(crate) fn new(command: &str) -> Self {
        Self { arguments: vec![command.into()], environment: Vec::new() }
    }

    /// `run` or `plan` of the directory `main`, with JSON as output.
    pub(crate) fn job(command: &str, database_url: &str) -> Self {
        Self::new(command)
            .option("--database-url", database_url)
            .option("--directory", super::MAIN)
            .option("--output", "json")
    }

    pub(crate) fn option(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.arguments.push(name.into());
        self.arguments.push(value.into());
        self
    }

    pub(crate) fn flag(mut self, name: &str) -> Self {
        self.arguments.push(name.into());
        self
    }

    pub(crate) fn environment(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    pub(crate) fn file(self, path: &Path) -> Self {
        self.option("--source", format!("file:{}", path.display()))
    }

    pub(crate) fn google(self, workspace: &Workspace) -> Self {
        self.option("--source", "google")
            .option("--google-credentials", workspace.key_file())
            .option("--google-subject", workspace.emulator.subject())
            .option("--google-url", workspace.emulator.url())
            .option("--google-quota", "0")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dir-sync"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DIR_SYNC_") || name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it to its end.
    pub(crate) async fn output(&self) -> Outcome {
        self.spawn().output().await
    }

    /// Runs it to its end with a terminal as standard error; gives its exit code and what the terminal was sent.
    pub(crate) async fn output_on_terminal(&self) -> (Option<i32>, String) {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let theirs = std::fs::OpenOptions::new().write(true).open(name.to_str().unwrap()).unwrap();
        let mut command = self.command();
        let mut child = Running(Some(command.stdout(Stdio::null()).stderr(theirs).spawn().unwrap()));
        // Ours is the only one left when the program ends: reading then ends, with an error on Linux.
        drop(command);
        tokio::task::spawn_blocking(move || {
            let (mut terminal, mut sent) = (std::fs::File::from(terminal), Vec::new());
            let _ = terminal.read_to_end(&mut sent);
            let code = child.0.take().unwrap().wait().unwrap().code();
            (code, String::from_utf8(sent).unwrap())
        })
        .await
        .unwrap()
    }

    /// Starts it.
    pub(crate) fn spawn(&self) -> Running {
        Running(Some(self.command().spawn().unwrap()))
    }
}

/// A program at work; it does not outlive its test.
#[derive(Debug)]
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) async fn output(mut self) -> Outcome {
        let child = self.0.take().unwrap();
        let output = tokio::task::spawn_blocking(|| child.wait_with_output()).await.unwrap().unwrap();
        Outcome::of(&output)
    }

    /// Ends it with SIGKILL; it must have been at work.
    pub(crate) fn kill(mut self) {
        let mut child = self.0.take().unwrap();
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), None, "the program ended by itself: {status}");
    }

    /// Ends it with SIGKILL, if it is still at work.
    pub(crate) fn kill_if_running(mut self) {
        let mut child = self.0.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.0.as_ref().unwrap()), signal).unwrap();
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a program said, and its exit code.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let code = output.status.code().unwrap();
        Self { code, stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// The one object that `--output json` prints.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.stdout.trim_end().lines().count(), 1, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap()
    }

    pub(crate) fn status(&self) -> String {
        self.json()["status"].as_str().unwrap().to_owned()
    }

    pub(crate) fn error(&self) -> String {
        self.json()["error"].as_str().unwrap().to_owned()
    }
}
