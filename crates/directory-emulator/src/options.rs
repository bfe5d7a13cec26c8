use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::{Directory, Emulator, Error};

/// How an emulator is set up; finished by [`start`](Options::start).
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) listen: SocketAddr,
    pub(crate) subject: Option<String>,
    pub(crate) user_quota_per_minute: Option<u32>,
    pub(crate) account_quota_per_minute: Option<u32>,
    pub(crate) token_lifetime: Duration,
    pub(crate) not_delegated: Vec<String>,
    pub(crate) account_is_admin: bool,
}

impl Options {
    /// A free port on 127.0.0.1, `admin@` the first user's domain as subject, no quota, tokens for an hour.
    #[must_use]
    pub fn new() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            subject: None,
            user_quota_per_minute: None,
            account_quota_per_minute: None,
            token_lifetime: Duration::from_secs(3599),
            not_delegated: Vec::new(),
            account_is_admin: false,
        }
    }

    /// The address to listen on; port 0 takes any free one.
    #[must_use]
    pub fn listen(self, address: SocketAddr) -> Self {
        Self { listen: address, ..self }
    }

    /// The administrator that the service account may act as; need not be in the directory.
    #[must_use]
    pub fn subject(self, email: impl Into<String>) -> Self {
        Self { subject: Some(email.into()), ..self }
    }

    /// Answers each user's calls past this many in a minute with 403 `quotaExceeded`.
    #[must_use]
    pub fn user_quota_per_minute(self, calls: u32) -> Self {
        Self { user_quota_per_minute: Some(calls), ..self }
    }

    /// Answers all calls past this many in a minute with 429 `rateLimitExceeded`.
    #[must_use]
    pub fn account_quota_per_minute(self, calls: u32) -> Self {
        Self { account_quota_per_minute: Some(calls), ..self }
    }

    /// How long access tokens are good for, in whole seconds.
    #[must_use]
    pub fn token_lifetime(self, lifetime: Duration) -> Self {
        Self { token_lifetime: lifetime, ..self }
    }

    /// A scope that the organisation has not delegated to the service account.
    #[must_use]
    pub fn not_delegated(mut self, scope: impl Into<String>) -> Self {
        self.not_delegated.push(scope.into());
        self
    }

    /// Gives the service account itself the role of an administrator, so that it needs no subject.
    #[must_use]
    pub fn account_is_admin(self) -> Self {
        Self { account_is_admin: true, ..self }
    }

    /// Starts a server on the current tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn start(self, directory: Directory) -> Result<Emulator, Error> {
        Emulator::start_with(directory, self).await
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}
