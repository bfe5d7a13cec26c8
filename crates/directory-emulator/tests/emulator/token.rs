use axum::http::StatusCode;
use directory_emulator::Emulator;
use serde_json::{Value, json};

use crate::client::{Answer, Client, claims, groups_of_sizes, jwt, jwt_with_header};

fn refusal(answer: &Answer) -> (u16, String, String) {
    let body = answer.json();
    let text = |key: &str| body[key].as_str().unwrap().to_owned();
    assert_eq!(answer.header("cache-control"), "no-store");
    (answer.status.as_u16(), text("error"), text("error_description"))
}

/// What the token endpoint says to good claims with one changed.
async fn refused(emulator: &Emulator, claim: &str, value: Value) -> (u16, String, String) {
    let mut claims = claims(emulator);
    claims[claim] = value;
    refusal(&Client::stranger(emulator).ask_token(&jwt(emulator, &claims)).await)
}

#[tokio::test]
async fn good_claims_get_a_bearer_token() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    for (claim, value) in [
        ("aud", json!("https://oauth2.googleapis.com/token")),
        ("sub", json!("user1@example.com")),
        ("sub", Value::Null),
        ("iss", serde_json::from_str::<Value>(&emulator.service_account_key()).unwrap()["client_id"].clone()),
    ] {
        let mut claims = claims(&emulator);
        claims[claim] = value;
        let answer = Client::stranger(&emulator).ask_token(&jwt(&emulator, &claims)).await;
        assert_eq!(answer.status, StatusCode::OK, "{claim}: {answer:?}");
        assert_eq!(answer.header("cache-control"), "no-store");
        let body = answer.json();
        assert_eq!((&body["token_type"], &body["expires_in"]), (&json!("Bearer"), &json!(3599)));
    }
}

#[tokio::test]
async fn unknown_subject_is_an_invalid_grant() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let expected = (400, "invalid_grant".to_owned(), "Invalid email or User ID".to_owned());
    assert_eq!(refused(&emulator, "sub", json!("nobody@example.com")).await, expected);
}

#[tokio::test]
async fn scope_that_was_not_delegated_is_an_unauthorized_client() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let good = claims(&emulator)["scope"].as_str().unwrap().to_owned();
    for scope in ["https://www.googleapis.com/auth/drive".to_owned(), format!("{good} openid")] {
        let (status, error, description) = refused(&emulator, "scope", json!(scope)).await;
        assert_eq!((status, error.as_str()), (401, "unauthorized_client"));
        assert_eq!(
            description,
            "Client is unauthorized to retrieve access tokens using this method, or client not authorized for \
             any of the scopes requested."
        );
    }
    assert_eq!(refused(&emulator, "scope", json!("")).await.1, "invalid_scope");
}

#[tokio::test]
async fn signature_of_another_key_is_refused() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::stranger(&emulator);
    let expected = (400, "invalid_grant".to_owned(), "Invalid JWT Signature.".to_owned());

    let good = jwt(&emulator, &claims(&emulator));
    let mut other_claims = claims(&emulator);
    other_claims["sub"] = json!("user1@example.com");
    let other = jwt(&emulator, &other_claims);
    let (message, _) = good.rsplit_once('.').unwrap();
    let (_, signature) = other.rsplit_once('.').unwrap();
    assert_eq!(refusal(&client.ask_token(&format!("{message}.{signature}")).await), expected);
    assert_eq!(refusal(&client.ask_token(&format!("{message}.")).await), expected);

    for header in [json!({"alg": "RS256", "kid": "another"}), json!({"alg": "none"}), json!({"alg": "HS256"})]
    {
        let assertion = jwt_with_header(&emulator, &header, &claims(&emulator));
        assert_eq!(refusal(&client.ask_token(&assertion).await), expected, "{header}");
    }
    let without_key_id = jwt_with_header(&emulator, &json!({"alg": "RS256"}), &claims(&emulator));
    assert_eq!(client.ask_token(&without_key_id).await.status, StatusCode::OK);
}

#[tokio::test]
async fn issuer_audience_and_dates_are_checked() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let now = claims(&emulator)["iat"].as_u64().unwrap();
    for (claim, value, expected) in [
        ("iss", json!("someone@else.example"), "account not found"),
        ("aud", json!("https://example.com/token"), "audience"),
        ("exp", json!(now - 1), "short-lived"),
        ("exp", json!(now + 3600 + 301), "short-lived"),
        ("iat", json!(now + 1000), "reasonable timeframe"),
        ("iat", json!(now - 4000), "short-lived"),
        ("iat", json!("soon"), "Invalid JWT"),
    ] {
        let (status, error, description) = refused(&emulator, claim, value.clone()).await;
        assert_eq!((status, error.as_str()), (400, "invalid_grant"), "{claim} {value}");
        assert!(description.contains(expected), "{claim} {value}: {description}");
    }
}

#[tokio::test]
async fn assertion_past_its_time_is_refused() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let mut old = claims(&emulator);
    let now = old["iat"].as_u64().unwrap();
    old["iat"] = json!(now - 3601);
    old["exp"] = json!(now - 1);
    let answer = Client::stranger(&emulator).ask_token(&jwt(&emulator, &old)).await;
    assert_eq!(refusal(&answer).1, "invalid_grant");
}

#[tokio::test]
async fn what_is_no_token_request_is_refused() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::stranger(&emulator);
    let grant = "urn:ietf:params:oauth:grant-type:jwt-bearer";
    for (body, expected) in [
        (String::new(), "unsupported_grant_type"),
        ("grant_type=refresh_token".to_owned(), "unsupported_grant_type"),
        (format!("grant_type={grant}"), "invalid_request"),
        (format!("grant_type={grant}&assertion=abc"), "invalid_grant"),
        (format!("grant_type={grant}&assertion=a.b.c"), "invalid_grant"),
    ] {
        assert_eq!(refusal(&client.post_token(&body).await).1, expected, "{body}");
    }
    let json = [("content-type", "application/json")];
    let answer = client.send("POST", "token", &json, "{}").await.unwrap();
    assert_eq!(refusal(&answer).1, "invalid_request");
}
