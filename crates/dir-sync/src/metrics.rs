//! What a run tells the monitoring: an `OpenMetrics` text, as a file for a collector or sent to a push gateway.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use authz::mirror::{Freshness, Tally, Totals};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use url::Url;

use crate::google::connector;
use crate::report::{Report, Status};

/// How long a push gateway may take.
const PUSH_WITHIN: Duration = Duration::from_secs(10);

const FRESHNESS: &str = "dir_sync_last_complete_sync_timestamp_seconds";

/// A run and the freshness of its directory as `OpenMetrics` text. All are gauges of the newest run.
///
/// A directory that was never complete is as old as can be. Without a known freshness that line is missing:
/// [`write_file`] and [`push`] leave what was told before, so that an alert on its age fires in the end.
#[must_use]
pub fn render(report: &Report, freshness: Option<&Freshness>) -> String {
    let mut text = Text { text: String::new(), directory: &report.directory };
    text.family(
        "dir_sync_last_run_exit_code",
        "Exit code of the newest run: 0 done, 1 failed, 2 usage, 3 refused, 4 partial, 5 another run holds the \
         lease, 6 ended by a signal",
    );
    text.value("dir_sync_last_run_exit_code", "", report.exit_code());
    text.family("dir_sync_last_run_status", "1 for the status of the newest run");
    for status in Status::ALL {
        let label = format!(",status=\"{status}\"");
        text.value("dir_sync_last_run_status", &label, u8::from(status == report.status));
    }
    text.family("dir_sync_last_run_duration_seconds", "How long the newest run took");
    text.value(
        "dir_sync_last_run_duration_seconds",
        "",
        Duration::from_millis(report.duration_ms).as_secs_f64(),
    );
    text.family("dir_sync_last_run_api_calls", "API calls of the newest run, retries included");
    text.value("dir_sync_last_run_api_calls", "", report.api_calls);
    text.family("dir_sync_last_run_changes", "Rows that the newest run changed, or would have");
    let counts = &report.counts;
    for (kind, tally) in
        [("users", counts.users), ("groups", counts.groups), ("memberships", counts.memberships)]
    {
        let Tally { added, removed, changed } = tally;
        for (change, count) in [("added", added), ("removed", removed), ("changed", changed)] {
            text.value("dir_sync_last_run_changes", &format!(",kind=\"{kind}\",change=\"{change}\""), count);
        }
    }
    text.family("dir_sync_last_run_incomplete_groups", "Groups whose members could not be listed");
    text.value("dir_sync_last_run_incomplete_groups", "", report.incomplete.len());
    if let Some(plan) = &report.plan {
        text.family("dir_sync_last_run_listed", "What the source listed in the newest run that has a plan");
        let Totals { users, groups, memberships } = plan.listed;
        for (kind, count) in [("users", users), ("groups", groups), ("memberships", memberships)] {
            text.value("dir_sync_last_run_listed", &format!(",kind=\"{kind}\""), count);
        }
        text.family(
            "dir_sync_last_run_conflicts",
            "Rows of the directory that cannot be mirrored as they are",
        );
        text.value("dir_sync_last_run_conflicts", "", plan.conflicts.len());
        text.family("dir_sync_last_run_users_losing_actions", "Users who may do less by the newest plan");
        text.value("dir_sync_last_run_users_losing_actions", "", plan.actions.users_losing);
        text.family("dir_sync_last_run_users_gaining_actions", "Users who may do more by the newest plan");
        text.value("dir_sync_last_run_users_gaining_actions", "", plan.actions.users_gaining);
    }
    if let Some(freshness) = freshness {
        text.family(
            FRESHNESS,
            "When the newest complete sync began to read, in Unix time; 0 if there was none",
        );
        let complete = freshness.last_complete_sync_at.map_or(0, |complete| complete.timestamp());
        text.value(FRESHNESS, "", complete);
    }
    text.text.push_str("# EOF\n");
    text.text
}

struct Text<'a> {
    text: String,
    directory: &'a str,
}

// Writing into a string does not fail. A directory's name has no character that a label would have to escape.
impl Text<'_> {
    fn family(&mut self, name: &str, help: &str) {
        let _ = writeln!(self.text, "# TYPE {name} gauge\n# HELP {name} {help}");
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{name}{{directory=\"{}\"{labels}}} {value}", self.directory);
    }
}

/// Writes the file in one step: a collector reads the old text or the new one. A freshness of the directory that the old
/// one tells and the new one does not is kept: an alert on a series that is gone is silent.
///
/// # Errors
/// If the folder cannot be written to.
pub fn write_file(path: &Path, directory: &str, text: &str) -> io::Result<()> {
    let mut text = text.to_owned();
    if !text.contains(FRESHNESS) {
        let before = std::fs::read_to_string(path).unwrap_or_default();
        let series = format!("{FRESHNESS}{{directory=\"{directory}\"}} ");
        if let Some(line) = before.lines().find(|line| line.starts_with(&series)) {
            let end = text.find("# EOF").unwrap_or(text.len());
            text.insert_str(end, &format!("# TYPE {FRESHNESS} gauge\n{line}\n"));
        }
    }
    let name = path.file_name().ok_or_else(|| io::Error::other("the path names no file"))?;
    // Not with the ending that a collector looks for.
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(hidden);
    let written = (|| {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Why a push gateway has not taken the text.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The address is none.
    #[error(
        "`{0}` is no address of a push gateway; write one such as `http://pushgateway:9091`, and in a password `%2F`, `%23`, `%3F` \
         and `%40` for `/`, `#`, `?` and `@`"
    )]
    Address(String),
    /// No TLS.
    #[error(transparent)]
    Source(#[from] crate::source::SourceError),
    /// The request cannot be written.
    #[error("the request cannot be written")]
    Request(#[from] hyper::http::Error),
    /// Nobody answers there.
    #[error("the push gateway cannot be reached")]
    Unreachable(#[from] hyper_util::client::legacy::Error),
    /// No answer in time.
    #[error("the push gateway did not answer in ten seconds")]
    Late,
    /// It does not want it.
    #[error("the push gateway answered with status {0}")]
    Refused(u16),
}

/// Puts what the text tells in place of what the gateway has of it for this job and directory, and leaves there what the
/// text does not tell, such as a freshness that is not known. A user and a password in the address are sent as HTTP basic
/// authentication.
///
/// # Errors
/// [`PushError`]; the run is as good as it was.
pub async fn push(gateway: &str, directory: &str, text: String) -> Result<(), PushError> {
    let directory = utf8_percent_encode(directory, NON_ALPHANUMERIC);
    let address = format!("{}/metrics/job/dir-sync/directory/{directory}", gateway.trim_end_matches('/'));
    let mut url = Url::parse(&address)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        // A `/`, `?` or `#` in a password would make its beginning the host's port.
        .filter(|url| !url.path().contains('@') && url.query().is_none() && url.fragment().is_none())
        // Who writes a password into it shall not find it in the log.
        .ok_or_else(|| PushError::Address(gateway.rsplit('@').next().unwrap_or_default().to_owned()))?;
    let authorization = take_credentials(&mut url)?;
    let mut request = Request::post(url.as_str())
        .header(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")
        .body(Full::new(Bytes::from(text)))?;
    if let Some(authorization) = authorization {
        request.headers_mut().insert(AUTHORIZATION, authorization);
    }
    let client = Client::builder(TokioExecutor::new()).build(connector()?);
    let answer =
        tokio::time::timeout(PUSH_WITHIN, client.request(request)).await.map_err(|_| PushError::Late)??;
    if answer.status().is_success() { Ok(()) } else { Err(PushError::Refused(answer.status().as_u16())) }
}

/// Takes user and password out of the address, as the header that tells them.
fn take_credentials(url: &mut Url) -> Result<Option<HeaderValue>, hyper::http::Error> {
    let (user, password) = (url.username(), url.password().unwrap_or_default());
    if user.is_empty() && password.is_empty() {
        return Ok(None);
    }
    let [user, password] = [user, password].map(|part| percent_decode_str(part).collect::<Vec<u8>>());
    let pair = BASE64_STANDARD.encode([user, password].join(&b':'));
    let mut header = HeaderValue::try_from(format!("Basic {pair}"))?;
    header.set_sensitive(true);
    // Only an address without a host has no place for them.
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    Ok(Some(header))
}
