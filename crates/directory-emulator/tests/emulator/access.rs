use std::time::Duration;

use axum::http::StatusCode;
use directory_emulator::{Emulator, Options};
use serde_json::json;

use crate::client::{Client, GROUP_SCOPE, MEMBER_SCOPE, USER_SCOPE, directory, group, groups_of_sizes, user};

const AUTH_ERROR: (u16, &str) = (401, "authError");

async fn refusal(client: &Client, path: &str) -> (u16, String) {
    client.get(path).await.error()
}

#[tokio::test]
async fn call_without_a_good_token_is_refused() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let stranger = Client::stranger(&emulator);
    let answer = stranger.get("groups/g1").await;
    assert_eq!(answer.error(), (401, "authError".to_owned()));
    assert_eq!(answer.json()["error"]["status"], "UNAUTHENTICATED");
    assert!(answer.header("www-authenticate").starts_with("Bearer "));
    let (status, reason) = refusal(&stranger.with_token("ya29.made-up"), "groups/g1").await;
    assert_eq!((status, reason.as_str()), AUTH_ERROR);
}

#[tokio::test]
async fn expired_token_is_refused() {
    let directory = groups_of_sizes(&[1]);
    let emulator = Options::new().token_lifetime(Duration::ZERO).start(directory).await.unwrap();
    let client = Client::admin(&emulator).await;
    assert_eq!(refusal(&client, "groups/g1").await.0, 401);

    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::admin(&emulator).await;
    assert_eq!(client.get("groups/g1").await.status, StatusCode::OK);
    emulator.expire_tokens();
    assert_eq!(refusal(&client, "groups/g1").await.0, 401);
}

#[tokio::test]
async fn each_call_needs_its_scope() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let calls = ["users/u1", "groups/g1", "groups/g1/members"];
    for (scope, allowed) in [
        (USER_SCOPE, [true, false, false]),
        (GROUP_SCOPE, [false, true, true]),
        (MEMBER_SCOPE, [false, false, true]),
    ] {
        let client = Client::signed_in(&emulator, Some(emulator.subject()), &[scope]).await;
        for (path, allowed) in calls.into_iter().zip(allowed) {
            let answer = client.get(path).await;
            if allowed {
                assert_eq!(answer.status, StatusCode::OK, "{scope} {path}");
            } else {
                assert_eq!(answer.error(), (403, "insufficientPermissions".to_owned()), "{scope} {path}");
                assert_eq!(answer.error_message(), "Request had insufficient authentication scopes.");
                assert_eq!(answer.json()["error"]["status"], "PERMISSION_DENIED");
            }
        }
    }
}

#[tokio::test]
async fn only_administrators_may_call() {
    let mut admin = user(1);
    admin["isAdmin"] = json!(true);
    let directory = directory(vec![admin, user(2)], vec![(group(1), vec![])]);
    let emulator = Options::new().subject("root@elsewhere.example").start(directory).await.unwrap();
    let scopes = [GROUP_SCOPE];
    for subject in ["root@elsewhere.example", "ROOT@elsewhere.example", "user1@example.com"] {
        let client = Client::signed_in(&emulator, Some(subject), &scopes).await;
        assert_eq!(client.get("groups/g1").await.status, StatusCode::OK, "{subject}");
    }
    for subject in [Some("user2@example.com"), None] {
        let client = Client::signed_in(&emulator, subject, &scopes).await;
        let answer = client.get("groups/g1").await;
        assert_eq!(answer.error(), (403, "forbidden".to_owned()), "{subject:?}");
        assert_eq!(answer.error_message(), "Not Authorized to access this resource/api");
    }
}

#[tokio::test]
async fn quota_of_a_user_is_a_403_and_of_the_account_a_429() {
    let options = Options::new().user_quota_per_minute(2);
    let emulator = options.start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::admin(&emulator).await;
    for _ in 0..2 {
        assert_eq!(client.get("groups/g1").await.status, StatusCode::OK);
    }
    let answer = client.get("groups/g1").await;
    assert_eq!(answer.error(), (403, "quotaExceeded".to_owned()));
    assert_eq!(answer.json()["error"]["errors"][0]["domain"], "usageLimits");

    let options = Options::new().account_quota_per_minute(1);
    let emulator = options.start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::admin(&emulator).await;
    assert_eq!(client.get("groups/g1").await.status, StatusCode::OK);
    let answer = client.get("groups/g1").await;
    assert_eq!(answer.error(), (429, "rateLimitExceeded".to_owned()));
    assert!((1..=60).contains(&answer.header("retry-after").parse::<u32>().unwrap()));
}
