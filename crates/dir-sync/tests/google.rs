//! Google's API as a source, against the emulator.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dir_sync::crawl::{Batch, Crawl, CrawlError, CrawlOptions, crawl};
use dir_sync::file::FileSource;
use dir_sync::google::{GoogleConfig, GoogleSource, RetryPolicy};
use dir_sync::source::{Group, Member, Source, SourceError, User, error_chain};
use directory_emulator::{Directory, Effect, Emulator, Fault, Framing, Target};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

fn organisation() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/data/org-2025-01.json.gz")
}

fn small_directory() -> Value {
    json!({
        "customerId": "C1",
        "users": [{"id": "1", "primaryEmail": "admin@example.com", "customerId": "C1", "suspended": false}],
        "groups": [
            {"id": "g1", "email": "ops@example.com", "name": "ops", "directMembersCount": "1"},
            {"id": "g2", "email": "a/b%2f@example.com", "name": "odd", "directMembersCount": "0"},
        ],
        "members": {"g1": [{"id": "1", "email": "admin@example.com", "role": "MEMBER", "type": "USER"}]},
    })
}

/// An emulator, and what it takes to reach it.
struct Workspace {
    emulator: Emulator,
    config: GoogleConfig,
    folder: tempfile::TempDir,
}

fn quick() -> RetryPolicy {
    RetryPolicy {
        base_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(4),
        ..RetryPolicy::default()
    }
}

async fn workspace(directory: Directory) -> Workspace {
    let emulator = Emulator::start(directory).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("key.json");
    std::fs::write(&credentials, emulator.service_account_key()).unwrap();
    let config = GoogleConfig {
        subject: Some(emulator.subject().to_owned()),
        base_url: emulator.url(),
        retry: quick(),
        queries_per_minute: 0,
        ..GoogleConfig::new(credentials)
    };
    Workspace { emulator, config, folder }
}

async fn small_workspace() -> Workspace {
    workspace(Directory::from_value(small_directory()).unwrap()).await
}

#[derive(Debug, Default, PartialEq)]
struct Held {
    users: BTreeMap<String, User>,
    groups: BTreeMap<String, Group>,
    members: BTreeMap<String, BTreeMap<String, Member>>,
}

async fn crawled(source: Arc<dyn Source>) -> (Result<Crawl, CrawlError>, Held) {
    let (pages, mut batches) = mpsc::channel(4);
    let crawl = tokio::spawn(crawl(source, CrawlOptions::default(), pages));
    let mut held = Held::default();
    while let Some(batch) = batches.recv().await {
        match batch {
            Batch::Users(users) => held.users.extend(users.into_iter().map(|user| (user.id.clone(), user))),
            Batch::Groups(groups) => {
                held.groups.extend(groups.into_iter().map(|group| (group.id.clone(), group)));
            }
            Batch::Members { group_id, members } => {
                let group = held.members.entry(group_id).or_default();
                group.extend(members.into_iter().map(|member| (member.id.clone(), member)));
            }
            Batch::Listed { group_id } => {
                held.members.entry(group_id).or_default();
            }
            Batch::MembersAgain { .. } | Batch::Restart(_) => {}
        }
    }
    (crawl.await.unwrap(), held)
}

impl Workspace {
    async fn source(&self) -> Arc<GoogleSource> {
        Arc::new(GoogleSource::new(self.config.clone()).await.unwrap())
    }

    async fn crawled(&self) -> (Result<Crawl, CrawlError>, Held) {
        crawled(self.source().await).await
    }

    async fn refusal(&self) -> String {
        let error = self.source().await.users(None).await.unwrap_err();
        assert!(error.is_fatal(), "{error}");
        error_chain(&error)
    }
}

#[tokio::test]
async fn crawl_of_the_api_equals_the_file() {
    let workspace = workspace(Directory::from_file(organisation()).unwrap()).await;
    let (from_api, api) = workspace.crawled().await;
    let (from_file, file) = crawled(Arc::new(FileSource::open(organisation()).unwrap())).await;
    let (from_api, from_file) = (from_api.unwrap(), from_file.unwrap());
    assert!(api == file, "users, groups and members differ");
    assert_eq!((api.users.len(), api.groups.len(), from_api.memberships), (1478, 714, 3571));
    assert_eq!(Crawl { calls: 0, ..from_api.clone() }, from_file);

    let pages = |items: usize, size: usize| items.div_ceil(size).max(1);
    let member_pages: usize = api.members.values().map(|members| pages(members.len(), 200)).sum();
    let minimum = (pages(1478, 500) + pages(714, 200) + member_pages) as u64;
    assert_eq!((workspace.emulator.call_count(), from_api.calls), (minimum, minimum));
}

#[tokio::test]
async fn cold_start_fetches_one_token() {
    let workspace = small_workspace().await;
    workspace.crawled().await.0.unwrap();
    let source = workspace.source().await;
    let before = workspace.emulator.token_call_count();
    let all = (0..16).map(|_| {
        let source = Arc::clone(&source);
        tokio::spawn(async move { source.users(None).await.unwrap() })
    });
    futures_util::future::join_all(all).await;
    assert_eq!(workspace.emulator.token_call_count() - before, 1);
}

#[tokio::test]
async fn every_call_asks_for_full_pages_and_named_fields_only() {
    let workspace = small_workspace().await;
    workspace.crawled().await.0.unwrap();
    for call in workspace.emulator.calls() {
        let full = if call.path.ends_with("/users") { "maxResults=500" } else { "maxResults=200" };
        assert!(call.query.contains(full), "{call:?}");
        assert!(call.query.contains("fields=") && call.query.contains("nextPageToken"), "{call:?}");
        assert!(!call.query.contains("domain="), "{call:?}");
    }
}

#[tokio::test]
async fn passing_failure_is_tried_again() {
    let passing = [
        Effect::status(503, "backendError"),
        Effect::status(500, "backendError"),
        Effect::status(403, "quotaExceeded"),
        Effect::status(403, "userRateLimitExceeded"),
        Effect::status(429, "rateLimitExceeded"),
        Effect::status_retry_after(429, "rateLimitExceeded", 0),
        Effect::CutShort(Framing::ContentLength),
        Effect::CutShort(Framing::Chunked),
        Effect::CloseConnection,
    ];
    for effect in passing {
        for target in [Target::users(), Target::groups(), Target::members_of("g1")] {
            let workspace = small_workspace().await;
            workspace.emulator.add_fault(Fault::new(target.clone(), effect.clone()).on_call(1));
            let (crawl, held) = workspace.crawled().await;
            let crawl = crawl.unwrap();
            assert!(crawl.incomplete.is_empty(), "{effect:?} {target:?}: {:?}", crawl.incomplete);
            assert_eq!(
                (held.users.len(), held.groups.len(), crawl.memberships),
                (1, 2, 1),
                "{effect:?} {target:?}"
            );
            assert_eq!(crawl.calls, 5, "{effect:?} {target:?}: four calls and one more");
        }
    }
}

#[tokio::test]
async fn slow_answer_is_given_up_and_asked_for_again() {
    let mut workspace = small_workspace().await;
    workspace.config.request_timeout = Duration::from_millis(500);
    let slow = Effect::Delay(Duration::from_hours(1));
    workspace.emulator.add_fault(Fault::new(Target::users(), slow).on_call(1));
    assert_eq!(workspace.crawled().await.0.unwrap().calls, 5);
}

#[tokio::test]
async fn lasting_failure_of_one_group_is_incomplete() {
    let workspace = small_workspace().await;
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::status(503, "backendError")));
    let crawl = workspace.crawled().await.0.unwrap();
    assert_eq!(crawl.incomplete.len(), 1);
    let reason = &crawl.incomplete[0].reason;
    assert!(
        reason.contains("ops@example.com") && reason.contains("6 attempts") && reason.contains("503"),
        "{reason}"
    );
    assert_eq!(crawl.calls, 3 + 6);
}

#[tokio::test]
async fn lasting_failure_of_the_users_fails_the_crawl() {
    let workspace = small_workspace().await;
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::CutShort(Framing::Chunked)));
    assert!(matches!(workspace.crawled().await.0, Err(CrawlError::Listing { .. })));
}

#[tokio::test]
async fn circling_page_tokens_are_incomplete() {
    let workspace = workspace(Directory::from_file(organisation()).unwrap()).await;
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::RepeatPageToken));
    let error = workspace.crawled().await.0.unwrap_err();
    assert!(matches!(error, CrawlError::Incomplete { .. }), "{error}");
}

#[tokio::test]
async fn refused_page_token_starts_the_listing_again() {
    let workspace = workspace(Directory::from_file(organisation()).unwrap()).await;
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::status(400, "invalid")).on_call(2));
    let (crawl, held) = workspace.crawled().await;
    assert_eq!((crawl.unwrap().users, held.users.len()), (1478, 1478));
}

#[tokio::test]
async fn group_deleted_during_the_crawl_is_vanished() {
    let mut later = small_directory();
    later["groups"].as_array_mut().unwrap().retain(|group| group["id"] != "g1");
    later["members"].as_object_mut().unwrap().remove("g1");
    let workspace = small_workspace().await;
    let replaced = Effect::ReplaceDirectory(Arc::new(Directory::from_value(later).unwrap()));
    workspace.emulator.add_fault(Fault::new(Target::members_of("g1"), replaced).on_call(1));
    let crawl = workspace.crawled().await.0.unwrap();
    assert_eq!(crawl.vanished, ["g1"]);
    assert!(crawl.incomplete.is_empty());
    assert_eq!(crawl.groups, 1);
}

#[tokio::test]
async fn refusal_names_what_to_change() {
    for (reason, hint) in [
        ("forbidden", "--google-subject"),
        ("insufficientPermissions", "admin.directory.group.readonly"),
        ("domainCannotUseApis", "API controls"),
    ] {
        let workspace = small_workspace().await;
        workspace.emulator.add_fault(Fault::new(Target::users(), Effect::status(403, reason)));
        let refusal = workspace.refusal().await;
        assert!(refusal.contains(hint), "{refusal}");
        assert_eq!(workspace.emulator.call_count(), 1, "a refusal is not tried again");
    }
    let mut workspace = small_workspace().await;
    workspace.config.customer = "C0nobody".to_owned();
    let refusal = workspace.source().await.users(None).await.unwrap_err().to_string();
    assert!(refusal.contains("--google-customer"), "{refusal}");
}

#[tokio::test]
async fn group_that_may_not_be_read_does_not_stop_the_others() {
    let workspace = workspace(Directory::from_file(organisation()).unwrap()).await;
    let (_, whole) = workspace.crawled().await;
    let forbidden: Vec<_> = whole.groups.keys().step_by(9).cloned().collect();
    for group in &forbidden {
        let fault = Fault::new(Target::members_of(group.clone()), Effect::status(403, "forbidden"));
        workspace.emulator.add_fault(fault);
    }
    let (crawl, held) = workspace.crawled().await;
    let crawl = crawl.unwrap();
    let mut incomplete: Vec<_> = crawl.incomplete.iter().map(|group| group.group_id.clone()).collect();
    incomplete.sort_unstable();
    assert_eq!(incomplete, forbidden);
    assert!(crawl.incomplete.iter().all(|group| group.reason.contains("403 forbidden")), "{crawl:?}");
    assert_eq!(held.members.len(), whole.members.len() - forbidden.len());
}

/// That is a matter of rights, and not of one group after the other.
#[tokio::test]
async fn groups_none_of_which_may_be_read_stop_the_crawl() {
    let workspace = workspace(Directory::from_file(organisation()).unwrap()).await;
    let members = Target::prefix("/admin/directory/v1/groups/");
    workspace.emulator.add_fault(Fault::new(members, Effect::status(403, "forbidden")));
    let error = workspace.crawled().await.0.unwrap_err();
    assert!(
        matches!(&error, CrawlError::Fatal(error) if error.to_string().contains("admin role")),
        "{error}"
    );
    assert!(workspace.emulator.call_count() < 50, "{}", workspace.emulator.call_count());
}

#[tokio::test]
async fn missing_delegation_names_client_scopes_and_page() {
    let workspace = small_workspace().await;
    workspace.emulator.add_fault(Fault::new(Target::token(), Effect::status(401, "unauthorized_client")));
    let refusal = workspace.refusal().await;
    let key: Value = serde_json::from_str(&workspace.emulator.service_account_key()).unwrap();
    for part in [
        key["client_id"].as_str().unwrap(),
        "https://www.googleapis.com/auth/admin.directory.user.readonly",
        "https://www.googleapis.com/auth/admin.directory.group.readonly",
        "Security > Access and data control > API controls > Domain-wide delegation",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
    assert_eq!(workspace.emulator.token_call_count(), 1);
}

#[tokio::test]
async fn wrong_subject_is_named() {
    let mut workspace = small_workspace().await;
    workspace.config.subject = Some("nobody@example.com".to_owned());
    let refusal = workspace.refusal().await;
    assert!(refusal.contains("`nobody@example.com`"), "{refusal}");
}

#[tokio::test]
async fn token_endpoint_failure_is_tried_again() {
    for effect in [
        Effect::status(503, "server_error"),
        Effect::CloseConnection,
        Effect::CutShort(Framing::ContentLength),
    ] {
        let workspace = small_workspace().await;
        workspace.emulator.add_fault(Fault::new(Target::token(), effect).on_call(1));
        workspace.crawled().await.0.unwrap();
        assert_eq!(workspace.emulator.token_call_count(), 2);
    }
}

#[tokio::test]
async fn expired_token_is_replaced_once_for_all_calls() {
    let workspace = small_workspace().await;
    let source = workspace.source().await;
    source.users(None).await.unwrap();
    workspace.emulator.expire_tokens();
    crawled(source).await.0.unwrap();
    assert_eq!(workspace.emulator.token_call_count(), 2);
}

#[tokio::test]
async fn token_that_is_never_accepted_is_fatal() {
    let workspace = small_workspace().await;
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::status(401, "authError")));
    assert!(workspace.refusal().await.contains("does not accept the token"));
    assert_eq!(workspace.emulator.token_call_count(), 2);
}

#[tokio::test]
async fn unusable_key_file_is_named() {
    let workspace = small_workspace().await;
    let key: Value = serde_json::from_str(&workspace.emulator.service_account_key()).unwrap();
    let with = |field: &str, value: Value| {
        let mut key = key.clone();
        key[field] = value;
        key.to_string()
    };
    for (content, hint) in [
        ("hello".to_owned(), "is not JSON"),
        ("[]".to_owned(), "is no JSON object"),
        ("\"-----BEGIN PRIVATE KEY-----\"".to_owned(), "is no JSON object"),
        (with("type", json!("authorized_user")), "is of type `authorized_user`"),
        (with("client_email", Value::Null), "has no `client_email`"),
        (with("private_key", Value::Null), "has no `private_key`"),
        (with("private_key", json!("secret-text")), "not a readable RSA key"),
        (with("token_uri", json!("not an address")), "`token_uri`"),
    ] {
        let path = workspace.folder.path().join("other.json");
        std::fs::write(&path, content).unwrap();
        let error = GoogleSource::new(GoogleConfig::new(&path)).await.unwrap_err();
        let line = error_chain(&error);
        assert!(matches!(error, SourceError::Credentials { .. }), "{line}");
        assert!(
            line.contains("other.json") && line.contains(hint) && line.contains("service account"),
            "{line}"
        );
        assert!(!line.contains("BEGIN") && !line.contains("secret-text"), "{line}");
    }
    let missing = GoogleSource::new(GoogleConfig::new("nowhere/key.json")).await.unwrap_err().to_string();
    assert!(missing.contains("nowhere/key.json"), "{missing}");
}

/// A server that answers the token endpoint, and all else with these bytes; gives back the heads of all requests.
async fn answering(answer: Vec<u8>) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}/", listener.local_addr().unwrap());
    let (heads, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut bytes = Vec::new();
            while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
                let mut part = [0; 4096];
                let read = connection.read(&mut part).await.unwrap();
                if read == 0 {
                    break;
                }
                bytes.extend_from_slice(&part[..read]);
            }
            let _ = heads.send(String::from_utf8_lossy(&bytes).into_owned());
            connection.write_all(&answer).await.unwrap();
        }
    });
    (address, seen)
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut answer =
        format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n")
            .into_bytes();
    answer.extend_from_slice(body);
    answer
}

async fn users_answered_with(answer: Vec<u8>) -> (Result<usize, SourceError>, Vec<String>) {
    let mut workspace = small_workspace().await;
    let (address, mut heads) = answering(answer).await;
    workspace.config.base_url = address;
    let users = workspace.source().await.users(None).await.map(|page| page.items.len());
    heads.close();
    let mut seen = Vec::new();
    while let Some(head) = heads.recv().await {
        seen.push(head);
    }
    (users, seen)
}

#[tokio::test]
async fn answer_is_asked_for_and_read_compressed() {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    let body =
        json!({"kind": "admin#directory#users", "users": [{"id": "1", "primaryEmail": "a@example.com"}]});
    encoder.write_all(body.to_string().as_bytes()).unwrap();
    let zipped = encoder.finish().unwrap();
    let (users, heads) = users_answered_with(http("200 OK", "content-encoding: gzip\r\n", &zipped)).await;
    assert_eq!(users.unwrap(), 1);
    let head = heads[0].to_lowercase();
    let line = |name: &str| head.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert_eq!(line("accept-encoding"), "accept-encoding: gzip");
    assert!(line("user-agent").contains("gzip"));

    let (users, heads) =
        users_answered_with(http("200 OK", "content-encoding: gzip\r\n", &zipped[..20])).await;
    assert!(matches!(users, Err(SourceError::Unavailable { attempts: 6, .. })));
    assert_eq!(heads.len(), 6, "a compressed body that is cut short is tried again");
}

#[tokio::test]
async fn answer_of_something_else_is_no_empty_listing() {
    for body in
        ["<html>sign in</html>", "[]", "{}", "null", "{\"ok\":true}", "{\"kind\":\"admin#directory#groups\"}"]
    {
        let (users, _) = users_answered_with(http("200 OK", "", body.as_bytes())).await;
        assert!(matches!(users, Err(SourceError::Malformed { .. })), "{body}: {users:?}");
    }
    let (users, heads) = users_answered_with(http("200 OK", "", b"")).await;
    assert!(matches!(users, Err(SourceError::Unavailable { .. })) && heads.len() == 6);
    let (users, _) = users_answered_with(http("302 Found", "location: /login\r\n", b"")).await;
    assert!(users.unwrap_err().to_string().contains("--google-url"));
}

#[tokio::test]
async fn group_key_is_one_segment_of_the_path() {
    let workspace = small_workspace().await;
    let odd = Group {
        id: "a/b%2f@example.com".into(),
        email: String::new(),
        name: String::new(),
        description: String::new(),
    };
    workspace.source().await.members(&odd, None).await.unwrap();
    let paths: BTreeSet<String> = workspace.emulator.calls().into_iter().map(|call| call.path).collect();
    assert_eq!(paths.first().unwrap(), "/admin/directory/v1/groups/a%2Fb%252f%40example.com/members");
}

#[tokio::test]
async fn calls_are_held_to_the_quota() {
    // Ten calls a minute: the 11th cannot have come within this test.
    let mut workspace = workspace(Directory::from_file(organisation()).unwrap()).await;
    workspace.config.queries_per_minute = 10;
    let source = workspace.source().await;
    for _ in 0..10 {
        source.users(None).await.unwrap();
    }
    let early = tokio::time::timeout(Duration::from_millis(200), source.users(None)).await;
    assert!(early.is_err());
    assert_eq!(workspace.emulator.call_count(), 10);
}
