//! The Admin SDK Directory API of Google Workspace as a source.

mod auth;
mod breaker;
mod client;
mod failure;
mod keyless;
mod limiter;
mod probe;
mod retry;
pub(crate) mod shape;
mod throttle;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use async_trait::async_trait;
use google_apis_common::url::Params;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use url::Url;

use self::auth::SignIn;
use self::client::{ApiClient, Call};
pub use self::keyless::Keyless;
use self::limiter::Limiter;
pub(crate) use self::probe::probe;
pub use self::retry::RetryPolicy;
use self::shape::{Answer, GroupShape, MemberShape, Shape, UserShape};
use self::throttle::Throttle;
use crate::source::{Group, Member, Page, PageToken, Source, SourceError, User};

/// The scope that lets users be listed.
pub const USER_SCOPE: &str = "https://www.googleapis.com/auth/admin.directory.user.readonly";
/// The scope that lets groups and members be listed.
pub const GROUP_SCOPE: &str = "https://www.googleapis.com/auth/admin.directory.group.readonly";
/// Where in the Admin console a service account is allowed to act for an administrator.
pub const DELEGATION_PAGE: &str =
    "Security > Access and data control > API controls > Domain-wide delegation";

type HttpsConnector = hyper_rustls::HttpsConnector<HttpConnector>;

const MY_CUSTOMER: &str = "my_customer";
// `fields` names what is used and no more. `kind` is among it because it alone tells an empty page from an answer of
// something else.
const USER_FIELDS: &str =
    "kind,nextPageToken,users(id,primaryEmail,name/fullName,suspended,archived,customerId,deletionTime)";
const GROUP_FIELDS: &str = "kind,nextPageToken,groups(id,email,name,description)";
const MEMBER_FIELDS: &str = "kind,nextPageToken,members(id,email,role,type)";
const ONE_MEMBER_FIELDS: &str = "id,email,role,type";
const USERS_PER_PAGE: &str = "500";
const GROUPS_PER_PAGE: &str = "200";
const MEMBERS_PER_PAGE: &str = "200";
// A group key stands as one segment of the path.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// How to reach a Google Workspace directory.
#[derive(Debug, Clone)]
pub struct GoogleConfig {
    /// The JSON key of a service account, or a file of workload identity federation; without one this machine's metadata
    /// server vouches for us.
    pub credentials: Option<PathBuf>,
    /// Where to sign in without a key.
    pub keyless: Keyless,
    /// The administrator to act as; without one the service account acts for itself.
    pub subject: Option<String>,
    /// The customer whose directory to list; `my_customer` is the signed-in administrator's own.
    pub customer: String,
    /// The API's address.
    pub base_url: String,
    /// Calls per minute at most; 0 sets no limit.
    pub queries_per_minute: u32,
    /// Calls under way at the same time, at most; fewer while the directory says that its quota is used up.
    pub concurrency: u16,
    /// How long one call may take, its whole body included.
    pub request_timeout: Duration,
    /// How often a failed call is tried again.
    pub retry: RetryPolicy,
}

impl GoogleConfig {
    /// The usual settings with this key file.
    #[must_use]
    pub fn new(credentials: impl Into<PathBuf>) -> Self {
        Self { credentials: Some(credentials.into()), ..Self::keyless() }
    }

    /// The usual settings on a machine that vouches for us, without a key.
    #[must_use]
    pub fn keyless() -> Self {
        Self {
            credentials: None,
            keyless: Keyless::default(),
            subject: None,
            customer: MY_CUSTOMER.to_owned(),
            base_url: "https://admin.googleapis.com/".to_owned(),
            queries_per_minute: 2400,
            concurrency: 8,
            request_timeout: Duration::from_mins(1),
            retry: RetryPolicy::default(),
        }
    }
}

/// A Google Workspace directory.
pub struct GoogleSource {
    client: ApiClient,
    customer: String,
    subject: Option<String>,
    seen_customer: OnceLock<String>,
}

impl std::fmt::Debug for GoogleSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The rest holds the key and the token.
        f.debug_struct("GoogleSource")
            .field("customer", &self.customer)
            .field("subject", &self.subject)
            .finish_non_exhaustive()
    }
}

impl GoogleSource {
    /// Reads the key file and gets ready; nothing is sent before the first page is asked for.
    ///
    /// # Errors
    /// [`SourceError::Credentials`] if the key file cannot be used, [`SourceError::Setting`] if another setting cannot.
    pub async fn new(config: GoogleConfig) -> Result<Self, SourceError> {
        let sign_in = SignIn::new(&config, connector()?).await?;
        Self::signed_in(config, sign_in)
    }

    /// The same with the key file read already.
    fn signed_in(config: GoogleConfig, sign_in: SignIn) -> Result<Self, SourceError> {
        let base = base_url(&config.base_url)?;
        if config.customer.trim().is_empty() {
            return Err(SourceError::Setting {
                message: format!(
                    "the customer (`--google-customer`) is empty; `{MY_CUSTOMER}` is the usual one"
                ),
            });
        }
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .build(connector()?);
        let limiter = Limiter::new(config.queries_per_minute);
        let throttle = Throttle::new(config.concurrency);
        let client =
            ApiClient::new(http, sign_in, base, limiter, throttle, config.retry, config.request_timeout);
        Ok(Self {
            client,
            customer: config.customer,
            subject: config.subject,
            seen_customer: OnceLock::new(),
        })
    }

    async fn page<S: Shape>(
        &self,
        mut call: Call<'_>,
        token: Option<&PageToken>,
    ) -> Result<Page<S::Item>, SourceError> {
        if let Some(PageToken(token)) = token {
            call.params.push("pageToken", token.clone());
        }
        let answer: Answer<S> = self.client.get(&call).await?;
        answer.into_page().map_err(|problem| SourceError::Malformed { what: call.what, problem })
    }

    fn call<'a>(
        &self,
        path: String,
        per_page: &'a str,
        fields: &'a str,
        what: String,
        group: Option<&'a str>,
    ) -> Call<'a> {
        let mut params = Params::with_capacity(5);
        // Never `domain` as well: together they silently drop the secondary domains.
        if group.is_none() {
            params.push("customer", self.customer.clone());
        }
        params.push("maxResults", per_page);
        params.push("fields", fields);
        Call { path, params, what, group, one_member: false }
    }
}

#[async_trait]
impl Source for GoogleSource {
    fn describe(&self) -> String {
        let account = self.subject.as_deref().unwrap_or("the service account itself");
        format!("Google Workspace customer {} as {account}", self.customer)
    }

    async fn users(&self, page: Option<&PageToken>) -> Result<Page<User>, SourceError> {
        let path = "admin/directory/v1/users".to_owned();
        let call = self.call(path, USERS_PER_PAGE, USER_FIELDS, "users".to_owned(), None);
        let users = self.page::<UserShape>(call, page).await?;
        if let Some(customer) = users.items.iter().find_map(|user| user.customer_id.as_ref()) {
            self.seen_customer.get_or_init(|| customer.clone());
        }
        Ok(users)
    }

    async fn groups(&self, page: Option<&PageToken>) -> Result<Page<Group>, SourceError> {
        let path = "admin/directory/v1/groups".to_owned();
        let call = self.call(path, GROUPS_PER_PAGE, GROUP_FIELDS, "groups".to_owned(), None);
        self.page::<GroupShape>(call, page).await
    }

    async fn members(&self, group: &Group, page: Option<&PageToken>) -> Result<Page<Member>, SourceError> {
        let path = format!("admin/directory/v1/groups/{}/members", utf8_percent_encode(&group.id, SEGMENT));
        let what = format!("members of group `{}`", group.email);
        let call = self.call(path, MEMBERS_PER_PAGE, MEMBER_FIELDS, what, Some(&group.email));
        self.page::<MemberShape>(call, page).await
    }

    async fn member(&self, group: &Group, id: &str) -> Result<Option<Member>, SourceError> {
        let [group_key, member_key] = [&group.id, id].map(|key| utf8_percent_encode(key, SEGMENT));
        let path = format!("admin/directory/v1/groups/{group_key}/members/{member_key}");
        let what = format!("member `{id}` of group `{}`", group.email);
        let mut params = Params::with_capacity(1);
        params.push("fields", ONE_MEMBER_FIELDS);
        let call = Call { path, params, what, group: Some(&group.email), one_member: true };
        match self.client.get::<MemberShape>(&call).await {
            Ok(shape) => {
                let member = shape.into_member(id);
                member.map(Some).map_err(|problem| SourceError::Malformed { what: call.what, problem })
            }
            Err(SourceError::NoSuchMember { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn calls(&self) -> u64 {
        self.client.calls()
    }

    fn customer_id(&self) -> Option<String> {
        let configured = (self.customer != MY_CUSTOMER).then(|| self.customer.clone());
        self.seen_customer.get().cloned().or(configured)
    }
}

fn base_url(text: &str) -> Result<Url, SourceError> {
    let wrong = |problem: &str| SourceError::Setting {
        message: format!(
            "the address of the API (`--google-url`) `{text}` {problem}; expected one such as `https://admin.googleapis.com/`"
        ),
    };
    // The paths are joined to it, so it has to end like a folder.
    let folder = format!("{}/", text.trim().trim_end_matches('/'));
    let url = Url::parse(&folder).map_err(|error| wrong(&format!("is no web address ({error})")))?;
    if !matches!(url.scheme(), "https" | "http") || url.host_str().is_none() {
        return Err(wrong("is no web address"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("has a query"));
    }
    Ok(url)
}

/// Mozilla's roots rather than the machine's: a container without a CA bundle works too. Plain HTTP is for tests and
/// proxies on the same machine.
pub(crate) fn connector() -> Result<HttpsConnector, SourceError> {
    let builder = HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())
        .map_err(|error| SourceError::Setting { message: format!("TLS cannot be set up: {error}") })?;
    Ok(builder.https_or_http().enable_http1().build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_address_keeps_its_folder() {
        assert_eq!(base_url("http://127.0.0.1:80/api").unwrap().as_str(), "http://127.0.0.1/api/");
        assert_eq!(
            base_url("https://admin.googleapis.com/").unwrap().as_str(),
            "https://admin.googleapis.com/"
        );
    }

    #[test]
    fn wrong_base_address_names_the_option() {
        for wrong in ["", "admin.googleapis.com", "ftp://example.com/", "http://256.0.0.1/", "http://a/?b=c"]
        {
            let error = base_url(wrong).unwrap_err().to_string();
            assert!(error.contains("--google-url"), "{error}");
        }
    }
}
