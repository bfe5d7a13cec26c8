//! The directory file as a source.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::io::Write;
use std::path::PathBuf;

use dir_sync::file::FileSource;
use dir_sync::source::{Group, Member, MemberKind, Page, PageToken, Source, SourceError, error_chain};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

fn directory() -> Value {
    json!({
        "customerId": "C1",
        "asOf": "2026-01-01",
        "users": [
            {"id": "1", "primaryEmail": "a@example.com", "name": {"fullName": "Ada"}, "suspended": false, "archived": true},
            {"id": "2", "primaryEmail": "gone@example.com", "deletionTime": "2026-01-01T00:00:00Z"},
        ],
        "groups": [
            {"id": "g1", "email": "ops@example.com", "name": "Ops", "description": "on call", "directMembersCount": "2"},
            {"id": "g2", "email": "none@example.com", "name": "None", "directMembersCount": "0"},
            {"id": "g3", "email": "unsaid@example.com", "name": "Unsaid"},
        ],
        "members": {
            "g1": [
                {"id": "1", "email": "a@example.com", "role": "OWNER", "type": "USER"},
                {"id": "C1", "type": "CUSTOMER"},
            ],
        },
    })
}

struct Stored {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn stored(bytes: &[u8]) -> Stored {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("org.json");
    std::fs::write(&path, bytes).unwrap();
    Stored { path, _folder: folder }
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The message of opening a file with this content; it always names the file.
fn problem(bytes: &[u8]) -> String {
    let file = stored(bytes);
    let error = FileSource::open(&file.path).unwrap_err();
    assert!(matches!(error, SourceError::File { .. }));
    let line = error_chain(&error);
    assert!(line.contains(&file.path.display().to_string()), "{line}");
    line
}

fn without(key: &str) -> Vec<u8> {
    let mut directory = directory();
    directory.as_object_mut().unwrap().remove(key);
    directory.to_string().into_bytes()
}

fn group(id: &str) -> Group {
    Group {
        id: id.to_owned(),
        email: format!("{id}@example.com"),
        name: String::new(),
        description: String::new(),
    }
}

#[tokio::test]
async fn file_is_read_plain_and_gzipped() {
    let text = directory().to_string();
    for bytes in [text.clone().into_bytes(), gzipped(text.as_bytes())] {
        let file = stored(&bytes);
        let source = FileSource::open(&file.path).unwrap();
        let users = source.users(None).await.unwrap().items;
        assert_eq!(users.len(), 1, "a user being deleted is not listed");
        assert_eq!(
            (users[0].id.as_str(), users[0].display_name.as_str(), users[0].suspended),
            ("1", "Ada", true)
        );
        let groups = source.groups(None).await.unwrap().items;
        assert_eq!(groups.iter().map(|group| group.id.as_str()).collect::<Vec<_>>(), ["g1", "g2", "g3"]);
        let members = source.members(&group("g1"), None).await.unwrap().items;
        let customer =
            Member { id: "C1".into(), email: None, role: String::new(), kind: MemberKind::Customer };
        assert_eq!(members[1], customer);
        assert_eq!((source.calls(), source.customer_id().as_deref()), (0, Some("C1")));
        assert_eq!(source.describe(), "file org.json");
    }
}

#[tokio::test]
async fn listed_group_without_members_is_empty_if_its_count_says_so() {
    let file = stored(directory().to_string().as_bytes());
    let source = FileSource::open(&file.path).unwrap();
    for id in ["g2", "g3"] {
        assert_eq!(source.members(&group(id), None).await.unwrap(), Page { items: vec![], next: None });
    }
}

#[tokio::test]
async fn group_whose_members_the_file_lacks_is_an_error_of_that_group() {
    let mut directory = directory();
    directory["groups"][1]["directMembersCount"] = json!("4");
    let file = stored(directory.to_string().as_bytes());
    let source = FileSource::open(&file.path).unwrap();
    let error = source.members(&group("g2"), None).await.unwrap_err();
    assert!(matches!(error, SourceError::Malformed { .. }) && !error.is_fatal(), "{error}");
    assert_eq!(source.members(&group("g1"), None).await.unwrap().items.len(), 2);
}

#[tokio::test]
async fn listing_comes_in_pages() {
    let mut directory = directory();
    let users: Vec<_> =
        (0..1001).map(|n| json!({"id": n.to_string(), "primaryEmail": format!("{n}@example.com")})).collect();
    directory["users"] = users.into();
    let file = stored(directory.to_string().as_bytes());
    let source = FileSource::open(&file.path).unwrap();
    let (mut sizes, mut token) = (Vec::new(), None);
    loop {
        let page = source.users(token.as_ref()).await.unwrap();
        sizes.push(page.items.len());
        token = page.next;
        if token.is_none() {
            break;
        }
    }
    assert_eq!(sizes, [500, 500, 1]);
    let stale = source.users(Some(&PageToken("elsewhere".into()))).await.unwrap_err();
    assert!(matches!(stale, SourceError::StalePageToken { .. }));
}

#[test]
fn file_that_is_cut_short_says_so() {
    let text = directory().to_string();
    let zipped = gzipped(text.as_bytes());
    assert!(problem(&text.as_bytes()[..text.len() / 2]).contains("cut short"));
    assert!(problem(&zipped[..zipped.len() / 2]).contains("cut short"));
    // A gzip file without its checksum, and a file of nothing.
    assert!(problem(&zipped[..zipped.len() - 4]).contains("cut short"));
    assert!(problem(b"").contains("cut short"));
}

#[test]
fn missing_part_is_named() {
    for key in ["customerId", "users", "groups", "members"] {
        let line = problem(&without(key));
        assert!(line.contains(&format!("has no `{key}`")), "{line}");
    }
}

#[test]
fn missing_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = FileSource::open(folder.path().join("nowhere.json")).unwrap_err().to_string();
    assert!(error.contains("nowhere.json") && error.contains("does not exist"), "{error}");
}

#[test]
fn other_content_is_not_taken_for_a_directory() {
    assert!(problem(b"<html></html>").contains("is not JSON"));
    assert!(problem(b"[]").contains("is not a directory file"));
    let mut wrong = directory();
    wrong["users"] = json!({});
    assert!(problem(wrong.to_string().as_bytes()).contains("is not a directory file"));
    let mut nameless = directory();
    nameless["users"][0].as_object_mut().unwrap().remove("primaryEmail");
    assert!(problem(nameless.to_string().as_bytes()).contains("user `1` has no primaryEmail"));
}

#[test]
fn members_of_a_group_that_is_not_listed_are_an_error() {
    let mut stray = directory();
    stray["members"]["g9"] = json!([]);
    assert!(problem(stray.to_string().as_bytes()).contains("members of group `g9`"));
}

#[test]
fn members_of_a_group_that_stands_twice_are_an_error() {
    let text = directory().to_string().replace(r#""members":{"#, r#""members":{"g1":[],"#);
    assert!(problem(text.as_bytes()).contains("group `g1` twice"));
}
