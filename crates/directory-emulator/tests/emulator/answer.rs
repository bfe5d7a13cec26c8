use std::io::Read;

use axum::http::StatusCode;
use directory_emulator::Emulator;
use flate2::read::GzDecoder;
use serde_json::{Value, json};

use crate::client::{Client, directory, group, groups_of_sizes, member, user};

#[tokio::test]
async fn fields_select_parts_of_a_listing() {
    let emulator = Emulator::start(groups_of_sizes(&[3])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let page =
        client.get("groups/g1/members?maxResults=2&fields=members(id,role),nextPageToken").await.json();
    let expected = json!([{"id": "u1", "role": "MEMBER"}, {"id": "u2", "role": "MEMBER"}]);
    assert_eq!(page["members"], expected);
    assert!(page["nextPageToken"].is_string() && page["etag"].is_null() && page["kind"].is_null());

    let page = client.get("groups/g1/members?maxResults=1&fields=members/email").await.json();
    assert_eq!(page, json!({"members": [{"email": "user1@example.com"}]}), "no token unless it is selected");
    let all = client.get("groups/g1/members").await.json();
    assert_eq!(client.get("groups/g1/members?fields=*").await.json(), all);
}

#[tokio::test]
async fn wrong_fields_are_refused() {
    let emulator = Emulator::start(groups_of_sizes(&[3])).await.unwrap();
    let client = Client::admin(&emulator).await;
    for fields in ["members(id", "member(id)", "members(mail)", "id", "members(id),,kind"] {
        let answer = client.get(&format!("groups/g1/members?fields={fields}")).await;
        assert_eq!(answer.error(), (400, "invalidParameter".to_owned()), "{fields}");
        assert_eq!(answer.json()["error"]["errors"][0]["location"], "fields");
    }
}

#[tokio::test]
async fn objects_keep_what_they_have_and_get_what_they_lack() {
    let mut rich = user(1);
    rich["kind"] = json!("own#kind");
    rich["etag"] = json!("\"own\"");
    rich["posixAccounts"] = json!([{"uid": 1.5, "x": [null, {"y": "ü"}]}]);
    rich["notInTheSchema"] = json!({"kept": true});
    let mut counted = group(1);
    counted["directMembersCount"] = json!("7");
    let groups = vec![(counted, vec![member(1)]), (group(2), vec![member(1), member(2)])];
    let emulator = Emulator::start(directory(vec![rich.clone(), user(2)], groups)).await.unwrap();
    let client = Client::admin(&emulator).await;

    assert_eq!(client.get("users/u1").await.json(), rich);
    let filled = client.get("users/u2").await.json();
    assert_eq!(filled["kind"], "admin#directory#user");
    assert!(filled["etag"].as_str().unwrap().starts_with('"'));
    assert_eq!(client.get("groups/g1").await.json()["directMembersCount"], "7");
    assert_eq!(client.get("groups/g2").await.json()["directMembersCount"], "2");
    assert_eq!(client.get("groups/g2/members/u1").await.json()["kind"], "admin#directory#member");
}

#[tokio::test]
async fn custom_schemas_are_shown_on_demand() {
    let mut rich = user(1);
    rich["customSchemas"] = json!({"hr": {"level": 3}});
    let emulator = Emulator::start(directory(vec![rich], vec![])).await.unwrap();
    let client = Client::admin(&emulator).await;
    assert_eq!(client.get("users/u1").await.json()["customSchemas"], Value::Null);
    let full = client.get("users/u1?projection=full").await.json();
    assert_eq!(full["customSchemas"]["hr"]["level"], 3);
}

#[tokio::test]
async fn known_etag_is_answered_with_304_until_the_content_changes() {
    let emulator = Emulator::start(groups_of_sizes(&[2])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let first = client.get("groups/g1/members").await;
    let etag = first.header("etag").to_owned();
    assert_eq!(first.json()["etag"], etag, "the body and the header name the same etag");

    let known = [("if-none-match", etag.as_str())];
    let second = client.get_with("groups/g1/members", &known).await;
    assert_eq!((second.status, second.bytes.len()), (StatusCode::NOT_MODIFIED, 0));

    emulator.replace_directory(groups_of_sizes(&[3]));
    let third = client.get_with("groups/g1/members", &known).await;
    assert_eq!(third.status, StatusCode::OK);
    assert_ne!(third.header("etag"), etag);
}

#[tokio::test]
async fn gzip_needs_both_headers() {
    let emulator = Emulator::start(groups_of_sizes(&[200])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let plain = client.get("groups/g1/members").await;
    assert_eq!(plain.header("content-encoding"), "");
    for half in [("accept-encoding", "gzip"), ("user-agent", "dir-sync (gzip)")] {
        assert_eq!(client.get_with("groups/g1/members", &[half]).await.bytes, plain.bytes);
    }

    let both = [("accept-encoding", "deflate, gzip"), ("user-agent", "dir-sync (gzip)")];
    let packed = client.get_with("groups/g1/members", &both).await;
    assert_eq!(packed.header("content-encoding"), "gzip");
    assert!(packed.bytes.len() < plain.bytes.len() / 2);
    let mut unpacked = Vec::new();
    GzDecoder::new(packed.bytes.as_ref()).read_to_end(&mut unpacked).unwrap();
    assert_eq!(unpacked, plain.bytes);
}

#[tokio::test]
async fn alt_and_pretty_print_are_understood() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let pretty = client.get("groups/g1?alt=json&prettyPrint=true").await;
    assert!(pretty.bytes.contains(&b'\n'));
    assert_eq!(pretty.json(), client.get("groups/g1?prettyPrint=false").await.json());
    assert_eq!(client.get("groups/g1?alt=media").await.error(), (400, "invalidParameter".to_owned()));
}
