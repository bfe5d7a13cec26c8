use std::error::Error as _;
use std::io::Write;

use directory_emulator::{Directory, Error};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

fn content() -> Value {
    json!({
        "customerId": "C01example", "asOf": "2026-01-01",
        "users": [{"id": "u1", "primaryEmail": "Ada@Example.com", "aliases": ["a@example.com"]}],
        "groups": [{"id": "g1", "email": "ops@example.com"}],
        "members": {"g1": [{"id": "u1"}]},
    })
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn plain_and_gzip_files_are_the_same_directory() {
    let json = content().to_string();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no-extension");
    for bytes in [json.as_bytes().to_vec(), packed(json.as_bytes())] {
        std::fs::write(&path, bytes).unwrap();
        let directory = Directory::from_file(&path).unwrap();
        assert_eq!((directory.customer_id(), directory.as_of()), ("C01example", Some("2026-01-01")));
        assert_eq!(Value::from(directory.users()[0].clone()), content()["users"][0]);
        assert_eq!(directory.user("ADA@example.com"), directory.user("A@example.com"));
        assert_eq!(directory.group("g1").unwrap()["email"], "ops@example.com");
        assert_eq!((directory.members("g1").len(), directory.members("g2").len()), (1, 0));
    }
}

#[test]
fn damaged_files_are_told_apart() {
    let whole = packed(content().to_string().as_bytes());
    assert!(matches!(Directory::from_slice(&whole[..whole.len() / 2]), Err(Error::Gunzip(_))));
    assert!(matches!(Directory::from_slice(&whole[..whole.len() - 4]), Err(Error::Gunzip(_))));
    assert!(matches!(Directory::from_slice(b""), Err(Error::Json(_))));
    assert!(matches!(Directory::from_slice(b"{\"customerId\": \"C"), Err(Error::Json(_))));
    assert!(matches!(Directory::from_slice(b"{}"), Err(Error::Json(_))));

    let missing = Directory::from_file("/no/such/file").unwrap_err();
    assert!(missing.to_string().contains("`/no/such/file`"), "{missing}");
    assert!(missing.source().is_some());
}

#[test]
fn inconsistent_directories_are_refused() {
    let changed = |pointer: &str, value: Value| {
        let mut content = content();
        *content.pointer_mut(pointer).unwrap() = value;
        Directory::from_value(content).map(|_| ())
    };
    for (pointer, value, expected) in [
        ("/users/0", json!({"id": "u1"}), "user number 1 has no `primaryEmail`"),
        ("/groups/0", json!({"email": "ops@example.com"}), "group number 1 has no `id`"),
        ("/members", json!({"g2": []}), "`members` names group `g2`"),
        ("/members/g1/0", json!({"email": "x@example.com"}), "a member of group `g1` has no `id`"),
        (
            "/users",
            json!([{"id": "u1", "primaryEmail": "a@x"}, {"id": "u2", "primaryEmail": "A@x"}]),
            "two users have the primaryEmail `A@x`",
        ),
    ] {
        let error = changed(pointer, value).unwrap_err();
        assert!(matches!(error, Error::Inconsistent { .. }), "{error:?}");
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}
