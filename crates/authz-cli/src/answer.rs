//! What a command has to say, for people and for programs.

use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use serde_json::{Value, json};

use crate::cli::Output;

/// The answer is no.
const NO: u8 = 3;

/// What a command that ran has to say.
pub(crate) struct Answer {
    text: String,
    json: Value,
    yes: bool,
    silent: bool,
}

impl Answer {
    pub(crate) fn new(text: impl Into<String>, json: Value) -> Self {
        Self { text: text.into(), json, yes: true, silent: false }
    }

    pub(crate) fn done(text: &str) -> Self {
        Self::new(text, json!({ "done": text }))
    }

    /// One line for each.
    pub(crate) fn lines(lines: impl IntoIterator<Item = String>, json: Value) -> Self {
        Self::new(lines.into_iter().collect::<Vec<_>>().join("\n"), json)
    }

    pub(crate) const fn yes_if(mut self, yes: bool) -> Self {
        self.yes = yes;
        self
    }

    /// All was said already.
    pub(crate) const fn silent(mut self) -> Self {
        self.silent = true;
        self
    }

    pub(crate) fn print(&self, output: Output) -> ExitCode {
        let text = match output {
            Output::Text => self.text.clone(),
            Output::Json => self.json.to_string(),
        };
        if !self.silent && !text.is_empty() {
            // A reader that went away is no reason to fail: the work is done.
            let _ = writeln!(std::io::stdout(), "{text}");
        }
        if self.yes { ExitCode::SUCCESS } else { ExitCode::from(NO) }
    }
}

/// Why a command did not run.
pub(crate) struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// The command line lacks something.
    pub(crate) fn usage(message: &str) -> Self {
        Self { message: message.to_owned(), code: 2 }
    }

    pub(crate) fn because(what: &str, error: &dyn Error) -> Self {
        Self { message: format!("{what}: {}", chain(error)), code: 1 }
    }

    pub(crate) fn print(&self, output: Output) -> ExitCode {
        match output {
            Output::Text => drop(writeln!(std::io::stderr(), "failed: {}", self.message)),
            Output::Json => drop(writeln!(std::io::stdout(), "{}", json!({ "error": self.message }))),
        }
        ExitCode::from(self.code)
    }
}

impl From<authz::Error> for Failure {
    fn from(error: authz::Error) -> Self {
        Self { message: chain(&error), code: 1 }
    }
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}
