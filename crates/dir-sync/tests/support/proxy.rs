//! The way to the database, which may go silent without a word, or lose an answer.

use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;
use testdb::Database;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What becomes of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It arrives.
    Open,
    /// It is taken and goes nowhere, and no connection ends.
    Silent,
    /// Every connection ends at once.
    Closed,
}

/// A TCP proxy in front of a database.
pub(crate) struct Proxy {
    url: String,
    way: watch::Sender<Way>,
    /// What the way is to be once the next COMMIT was done and its answer was lost.
    at_commit: watch::Sender<Option<Way>>,
    _serving: JoinSet<()>,
}

impl Proxy {
    /// An open way to the database.
    pub(crate) async fn start(database: &Database) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = through(database.url(), listener.local_addr().unwrap().port());
        let (way, at_commit) = (watch::Sender::new(Way::Open), watch::Sender::new(None));
        let server = PgConnectOptions::from_str(database.url()).unwrap();
        let mut serving = JoinSet::new();
        let (way_now, lost) = (way.clone(), at_commit.clone());
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                connections.spawn(serve(client, server.clone(), way_now.clone(), lost.clone()));
            }
        });
        Self { url, way, at_commit, _serving: serving }
    }

    /// The database's URL by this way.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// From here on nothing arrives, and nobody is told.
    pub(crate) fn go_silent(&self) {
        self.way.send_replace(Way::Silent);
    }

    /// The next COMMIT is done, and its answer is lost. From then on the way is this; if it is open, that connection ends.
    pub(crate) fn lose_answer_to_commit(&self, then: Way) {
        self.at_commit.send_replace(Some(then));
    }
}

/// The same URL with another host and port, and without TLS, so that COMMIT can be read.
fn through(url: &str, port: u16) -> String {
    let (scheme, rest) = url.split_once("://").unwrap();
    let (authority, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let user = authority.rsplit_once('@').map_or(String::new(), |(user, _)| format!("{user}@"));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let kept = query.split('&').filter(|pair| {
        let name = pair.split('=').next().unwrap_or_default();
        !["", "host", "hostaddr", "port", "sslmode"].contains(&name)
    });
    let query = kept.chain(["sslmode=disable"]).collect::<Vec<_>>().join("&");
    format!("{scheme}://{user}127.0.0.1:{port}{path}?{query}")
}

async fn serve(
    client: TcpStream,
    server: PgConnectOptions,
    way: watch::Sender<Way>,
    at_commit: watch::Sender<Option<Way>>,
) {
    if let Some(folder) = server.get_socket() {
        let path = folder.join(format!(".s.PGSQL.{}", server.get_port()));
        relay(client, UnixStream::connect(path).await.unwrap(), &way, &at_commit).await;
    } else {
        let address = (server.get_host(), server.get_port());
        relay(client, TcpStream::connect(address).await.unwrap(), &way, &at_commit).await;
    }
}

/// Hands on what comes, either way, until one of the two ends.
async fn relay(
    mut client: TcpStream,
    mut server: impl AsyncRead + AsyncWrite + Unpin,
    way: &watch::Sender<Way>,
    at_commit: &watch::Sender<Option<Way>>,
) {
    let mut changed = way.subscribe();
    let (mut up, mut down) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            biased;
            () = async { drop(changed.wait_for(|now| *now != Way::Open).await) } => {
                if *way.borrow() == Way::Closed {
                    return;
                }
                std::future::pending::<()>().await;
            }
            read = client.read(&mut up) => {
                let sent = &up[..read.unwrap_or_default()];
                if sent.is_empty() || server.write_all(sent).await.is_err() {
                    return;
                }
                if sent.windows(6).any(|word| word == b"COMMIT")
                    && let Some(then) = at_commit.send_replace(None)
                {
                    let _answer = server.read(&mut down).await;
                    way.send_replace(then);
                    if then == Way::Open {
                        return;
                    }
                }
            }
            read = server.read(&mut down) => {
                let sent = &down[..read.unwrap_or_default()];
                if sent.is_empty() || client.write_all(sent).await.is_err() {
                    return;
                }
            }
        }
    }
}
