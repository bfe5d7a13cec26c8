use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::call_log::Call;
use crate::directory::{domain_of, text};
use crate::fault::Fault;
use crate::server::{Shared, serve};
use crate::service_account::{CLIENT_EMAIL, ServiceAccount};
use crate::{Directory, Error, Options, keyless};

/// A running server. Dropping it ends the server and all its connections.
#[derive(Debug)]
pub struct Emulator {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Emulator {
    /// Starts a server with [`Options::new`] on the current tokio runtime.
    ///
    /// # Errors
    /// When no port of 127.0.0.1 can be listened on.
    pub async fn start(directory: Directory) -> Result<Self, Error> {
        Options::new().start(directory).await
    }

    pub(crate) async fn start_with(directory: Directory, options: Options) -> Result<Self, Error> {
        let unavailable = |source| Error::Listen { address: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(unavailable)?;
        let address = listener.local_addr().map_err(unavailable)?;

        let subject = options.subject.clone().unwrap_or_else(|| default_subject(&directory));
        let account = ServiceAccount::new()?;
        let shared = Arc::new(Shared::new(directory, account, subject, token_uri(address), &options));
        let server = tokio::spawn(serve(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, server })
    }

    /// The address of the server, as in `http://127.0.0.1:41527/`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// The administrator that the service account may act as.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.shared.subject
    }

    /// The text of a service-account key file whose tokens come from this server.
    ///
    /// The key in it is committed to this repository and worth nothing elsewhere.
    #[must_use]
    pub fn service_account_key(&self) -> String {
        ServiceAccount::key_file(&token_uri(self.address))
    }

    /// The text of a file with which a workload outside of Google's cloud signs in without a key: by the token in this
    /// other file, directly or by way of the service account.
    #[must_use]
    pub fn external_account(&self, subject_token: &Path, impersonate: bool) -> String {
        keyless::external_account_file(&self.url(), subject_token, impersonate)
    }

    /// The address of the service account that the metadata server of this machine knows.
    #[must_use]
    pub fn service_account(&self) -> &'static str {
        CLIENT_EMAIL
    }

    /// Serves another directory from the next call on: a later moment of the same organisation.
    pub fn replace_directory(&self, directory: Directory) {
        self.shared.replace_directory(Arc::new(directory));
    }

    /// Calls of the API in the order of arrival, without those of the token endpoint.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        self.shared.api_calls.calls()
    }

    /// How many calls of the API have arrived, without those of the token endpoint.
    #[must_use]
    pub fn call_count(&self) -> u64 {
        self.shared.api_calls.count()
    }

    /// How many calls have arrived that are about signing in: of the token endpoint, and those of signing in without a key.
    #[must_use]
    pub fn token_call_count(&self) -> u64 {
        self.shared.token_calls.count()
    }

    /// The access tokens that were given out: what no log may hold.
    #[must_use]
    pub fn tokens(&self) -> Vec<String> {
        self.shared.tokens.texts()
    }

    /// Forgets every access token that was given out, as if its time were over.
    pub fn expire_tokens(&self) {
        self.shared.tokens.clear();
    }

    /// Switches a fault on. Of several that strike the same call, those that wait add up, and the first that
    /// answers in place of the API wins.
    pub fn add_fault(&self, fault: Fault) {
        self.shared.faults.add(fault);
    }

    /// Switches all faults off. Calls that are held at a gate stay there until it is released.
    pub fn clear_faults(&self) {
        self.shared.faults.clear();
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // INVARIANT: the task owns every connection, so none outlives it (dropped_emulator_closes_connections).
        self.server.abort();
    }
}

fn token_uri(address: SocketAddr) -> String {
    format!("http://{address}/token")
}

fn default_subject(directory: &Directory) -> String {
    let first_domain = directory.users().first().and_then(|user| domain_of(text(user, "primaryEmail")));
    format!("admin@{}", first_domain.as_deref().unwrap_or("example.com"))
}
