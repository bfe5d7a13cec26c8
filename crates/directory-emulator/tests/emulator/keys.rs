use axum::http::StatusCode;
use directory_emulator::{Directory, Emulator};
use serde_json::{Value, json};

use crate::client::{Client, directory, group, group_member, member, user};

fn peculiar() -> Directory {
    let mut odd_user = user(1);
    odd_user["aliases"] = json!(["Nick/Name@example.com"]);
    let mut odd_group = group(1);
    odd_group["email"] = json!("ops/100%+x@example.com");
    odd_group["nonEditableAliases"] = json!(["ops@alias.example"]);
    let outside = json!({"id": "x1", "email": "eve@outside.example", "role": "MEMBER", "type": "USER"});
    let everyone = json!({"id": "C01example", "role": "MEMBER", "type": "CUSTOMER"});
    let groups = vec![
        (odd_group, vec![member(1), outside]),
        (group(2), vec![group_member(1), member(2)]),
        (group(3), vec![everyone]),
    ];
    directory(vec![odd_user, user(2), user(3)], groups)
}

#[tokio::test]
async fn keys_are_ids_addresses_or_aliases_and_percent_encoded() {
    let emulator = Emulator::start(peculiar()).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (path, id) in [
        ("groups/g1", "g1"),
        ("groups/ops%2F100%25%2Bx%40example.com", "g1"),
        ("groups/OPS%2f100%25+x@Example.COM", "g1"),
        ("groups/ops@alias.example", "g1"),
        ("users/u1", "u1"),
        ("users/USER1%40example.com", "u1"),
        ("users/nick%2Fname@example.com", "u1"),
        ("groups/ops%2F100%25%2Bx%40example.com/members/user1@example.com", "u1"),
        ("groups/g1/members/eve@outside.example", "x1"),
        ("groups/g2/members/ops@alias.example", "g1"),
    ] {
        let answer = client.get(path).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {answer:?}");
        assert_eq!(answer.json()["id"], id, "{path}");
    }
}

#[tokio::test]
async fn unknown_keys_are_named_by_their_place_in_the_path() {
    let emulator = Emulator::start(peculiar()).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (path, what) in [
        ("groups/nobody", "groupKey"),
        ("groups/nobody/members", "groupKey"),
        ("groups/nobody/hasMember/u1", "groupKey"),
        ("groups/u1", "groupKey"),
        ("users/nobody@example.com", "userKey"),
        ("groups/g1/members/u3", "memberKey"),
        ("groups/g1/members/nobody", "memberKey"),
        ("groups?userKey=nobody", "userKey"),
    ] {
        let answer = client.get(path).await;
        assert_eq!(answer.error(), (404, "notFound".to_owned()), "{path}");
        assert_eq!(answer.error_message(), format!("Resource Not Found: {what}"), "{path}");
    }
}

#[tokio::test]
async fn has_member_is_true_for_nested_members_and_everyone() {
    let emulator = Emulator::start(peculiar()).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (path, expected) in [
        ("groups/g1/hasMember/u1", true),
        ("groups/g1/hasMember/u2", false),
        ("groups/g2/hasMember/user1@example.com", true),
        ("groups/g2/hasMember/g1", true),
        ("groups/g3/hasMember/u3", true),
        ("groups/g3/hasMember/g1", false),
    ] {
        assert_eq!(client.get(path).await.json(), json!({"isMember": expected}), "{path}");
    }
}

#[tokio::test]
async fn has_member_refuses_an_external_member() {
    let emulator = Emulator::start(peculiar()).await.unwrap();
    let answer = Client::admin(&emulator).await.get("groups/g1/hasMember/eve@outside.example").await;
    assert_eq!(answer.error(), (400, "invalid".to_owned()));
}

#[tokio::test]
async fn groups_of_a_user_are_those_with_a_direct_membership() {
    let emulator = Emulator::start(peculiar()).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (key, expected) in [
        ("u1", vec!["g1"]),
        ("nick/name@example.com", vec!["g1"]),
        ("ops@alias.example", vec!["g2"]),
        ("eve@outside.example", vec!["g1"]),
        ("u3", vec![]),
    ] {
        let pages = client.pages(&format!("groups?userKey={key}"), "groups").await;
        let ids: Vec<&Value> = pages.iter().flatten().map(|group| &group["id"]).collect();
        assert_eq!(ids, expected, "{key}");
    }
}

#[tokio::test]
async fn unknown_paths_and_other_methods_have_json_errors() {
    let emulator = Emulator::start(peculiar()).await.unwrap();
    let client = Client::admin(&emulator).await;
    for path in ["", "user", "groups/", "groups//members", "groups/g1/members/u1/x", "groups/%FF"] {
        let answer = client.get(path).await;
        assert_eq!(answer.error(), (404, "notFound".to_owned()), "{path}");
        assert_eq!(answer.error_message(), "Not Found", "{path}");
    }
    let answer = client.send("GET", "", &[], "").await.unwrap();
    assert_eq!(answer.error(), (404, "notFound".to_owned()));
    let answer = client.send("DELETE", "admin/directory/v1/groups/g1", &[], "").await.unwrap();
    assert_eq!(answer.error(), (405, "httpMethodNotAllowed".to_owned()));
}
