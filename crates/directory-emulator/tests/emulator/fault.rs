use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use directory_emulator::{Call, Effect, Emulator, Fault, Framing, Gate, Target};

use crate::client::{Broken, Client, claims, groups_of_sizes, jwt};

const MEMBERS: &str = "groups/g1/members";

async fn started() -> (Emulator, Client) {
    let emulator = Emulator::start(groups_of_sizes(&[201, 2])).await.unwrap();
    let client = Client::admin(&emulator).await;
    (emulator, client)
}

async fn statuses(client: &Client, path: &str, calls: usize) -> Vec<u16> {
    let mut statuses = Vec::new();
    for _ in 0..calls {
        statuses.push(client.get(path).await.status.as_u16());
    }
    statuses
}

#[tokio::test]
async fn fault_strikes_the_calls_it_names() {
    let (emulator, client) = started().await;
    let fault = || Fault::new(Target::members_of("g1"), Effect::status(503, "backendError"));
    for (fault, expected) in [
        (fault(), [503, 503, 503, 503]),
        (fault().on_call(2), [200, 503, 200, 200]),
        (fault().from_call(3), [200, 200, 503, 503]),
        (fault().up_to_call(1), [503, 200, 200, 200]),
        (fault().from_call(2).up_to_call(3), [200, 503, 503, 200]),
    ] {
        emulator.add_fault(fault.clone());
        assert_eq!(statuses(&client, "groups/g2/members", 1).await, [200]);
        assert_eq!(statuses(&client, MEMBERS, 4).await, expected, "{fault:?}");
        emulator.clear_faults();
        assert_eq!(statuses(&client, MEMBERS, 1).await, [200]);
    }
}

#[tokio::test]
async fn target_finds_calls_however_they_are_written() {
    let (emulator, client) = started().await;
    let encoded = "groups/GROUP1%40example.com/members";
    for (target, struck) in [
        (Target::members_of("g1"), [true, true, false, false]),
        (Target::members_of("group1@example.com"), [true, true, false, false]),
        (Target::path("/admin/directory/v1/groups/g1/members"), [true, false, false, false]),
        (Target::prefix("/admin/directory/v1/groups/"), [true, true, true, false]),
        (Target::groups(), [false, false, false, true]),
        (Target::Anything, [true, true, true, true]),
        (Target::token(), [false; 4]),
    ] {
        emulator.add_fault(Fault::new(target.clone(), Effect::status(500, "internalError")));
        let paths = [MEMBERS, encoded, "groups/g1", "groups?customer=my_customer"];
        for (path, struck) in paths.into_iter().zip(struck) {
            let status = client.get(path).await.status.as_u16();
            assert_eq!(status, if struck { 500 } else { 200 }, "{target:?} {path}");
        }
        emulator.clear_faults();
    }
}

#[tokio::test]
async fn status_fault_has_googles_body_and_retry_after() {
    let (emulator, client) = started().await;
    emulator.add_fault(Fault::new(Target::Anything, Effect::status_retry_after(429, "rateLimitExceeded", 7)));
    let answer = client.get(MEMBERS).await;
    assert_eq!(answer.error(), (429, "rateLimitExceeded".to_owned()));
    assert_eq!(answer.json()["error"]["errors"][0]["domain"], "usageLimits");
    assert_eq!(answer.header("retry-after"), "7");
}

#[tokio::test]
async fn cut_answer_breaks_in_its_body() {
    let (emulator, client) = started().await;
    for (framing, with_length) in [(Framing::ContentLength, true), (Framing::Chunked, false)] {
        emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::CutShort(framing)).on_call(1));
        let broken = client.try_get(MEMBERS, &[]).await.unwrap_err();
        assert_eq!(broken, Broken::InBody { status: StatusCode::OK, with_length }, "{framing:?}");
        assert_eq!(client.get(MEMBERS).await.status, StatusCode::OK);
        emulator.clear_faults();
    }
}

#[tokio::test]
async fn closed_connection_has_no_answer() {
    let (emulator, client) = started().await;
    emulator.add_fault(Fault::new(Target::members_of("g2"), Effect::CloseConnection).on_call(1));
    assert_eq!(client.try_get("groups/g2/members", &[]).await.unwrap_err(), Broken::BeforeHead);
    assert_eq!(client.get("groups/g2/members").await.status, StatusCode::OK);
    let statuses: Vec<_> = emulator.calls().iter().map(|call| call.status).collect();
    assert_eq!(statuses, [None, Some(200)]);
}

#[tokio::test]
async fn emptied_listing_looks_like_an_empty_one() {
    let (emulator, client) = started().await;
    for (target, path, key) in [
        (Target::users(), "users?customer=my_customer", "users"),
        (Target::groups(), "groups?customer=my_customer", "groups"),
        (Target::members_of("g1"), MEMBERS, "members"),
    ] {
        emulator.add_fault(Fault::new(target, Effect::EmptyListing));
        let page = client.get(path).await.json();
        assert!(page.get(key).is_none() && page.get("nextPageToken").is_none(), "{page}");
        assert_eq!(page["kind"], format!("admin#directory#{key}"));
    }
}

#[tokio::test]
async fn repeated_page_token_never_ends() {
    let (emulator, client) = started().await;
    emulator.add_fault(Fault::new(Target::Anything, Effect::RepeatPageToken));
    for path in [MEMBERS, "groups/g2/members"] {
        let first = client.get(path).await.json();
        let token = first["nextPageToken"].as_str().unwrap();
        for _ in 0..3 {
            let page = client.get(&format!("{path}?pageToken={token}")).await.json();
            assert_eq!(page["nextPageToken"], token, "{path}");
        }
    }
}

#[tokio::test]
async fn delayed_answer_is_late_and_right() {
    let (emulator, client) = started().await;
    let right = client.get(MEMBERS).await.bytes;
    emulator.add_fault(Fault::new(Target::Anything, Effect::Delay(Duration::from_millis(60))));
    let start = Instant::now();
    assert_eq!(client.get(MEMBERS).await.bytes, right);
    assert!(start.elapsed() >= Duration::from_millis(60));
}

#[tokio::test]
async fn held_call_waits_for_the_gate() {
    let (emulator, client) = started().await;
    let gate = Gate::new();
    emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::Hold(gate.clone())));
    let held = tokio::spawn(async move { client.get(MEMBERS).await.status });
    gate.arrival(1).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(!held.is_finished());
    assert_eq!(emulator.calls()[0].status, None);
    gate.release();
    assert_eq!(held.await.unwrap(), StatusCode::OK);
    assert_eq!(emulator.calls()[0].status, Some(200));
}

#[tokio::test]
async fn directory_can_change_during_a_crawl() {
    let (emulator, client) = started().await;
    let later = Arc::new(groups_of_sizes(&[1]));
    emulator.add_fault(Fault::new(Target::members_of("g2"), Effect::ReplaceDirectory(later)).on_call(2));
    assert_eq!(statuses(&client, "groups/g2/members", 3).await, [200, 404, 404]);
}

#[tokio::test]
async fn waiting_faults_add_up_and_the_first_answer_wins() {
    let (emulator, client) = started().await;
    emulator.add_fault(Fault::new(Target::Anything, Effect::Delay(Duration::from_millis(30))));
    emulator.add_fault(Fault::new(Target::Anything, Effect::status(500, "internalError")));
    emulator.add_fault(Fault::new(Target::Anything, Effect::status(503, "backendError")));
    emulator.add_fault(Fault::new(Target::Anything, Effect::Delay(Duration::from_millis(30))));
    let start = Instant::now();
    assert_eq!(client.get(MEMBERS).await.error(), (500, "internalError".to_owned()));
    assert!(start.elapsed() >= Duration::from_millis(60));
}

#[tokio::test]
async fn token_fault_has_the_body_of_oauth() {
    let (emulator, client) = started().await;
    emulator.add_fault(Fault::new(Target::Anything, Effect::status(500, "internalError")));
    emulator.add_fault(Fault::new(Target::token(), Effect::status(401, "unauthorized_client")).on_call(1));
    let assertion = jwt(&emulator, &claims(&emulator));
    let answer = client.ask_token(&assertion).await;
    assert_eq!((answer.status.as_u16(), answer.json()["error"].as_str()), (401, Some("unauthorized_client")));
    assert_eq!(client.ask_token(&assertion).await.status, StatusCode::OK);
}

#[tokio::test]
async fn calls_are_counted_apart_from_token_calls() {
    let (emulator, client) = started().await;
    client.get("groups/g%31/members?maxResults=5").await;
    client.get("nothing").await;
    let call = |path: &str, query: &str, status| Call {
        method: "GET".to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        status: Some(status),
    };
    let expected = [
        call("/admin/directory/v1/groups/g%31/members", "maxResults=5", 200),
        call("/admin/directory/v1/nothing", "", 404),
    ];
    assert_eq!(emulator.calls(), expected);
    assert_eq!((emulator.call_count(), emulator.token_call_count()), (2, 1));
}

#[tokio::test]
async fn dropped_emulator_closes_connections() {
    let (emulator, client) = started().await;
    let gate = Gate::new();
    emulator.add_fault(Fault::new(Target::Anything, Effect::Hold(gate.clone())));
    let held = tokio::spawn(async move { client.try_get(MEMBERS, &[]).await.map(|_| ()) });
    gate.arrival(1).await;
    let address = emulator.url().trim_start_matches("http://").trim_end_matches('/').to_owned();
    drop(emulator);
    assert_eq!(held.await.unwrap(), Err(Broken::BeforeHead));
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
