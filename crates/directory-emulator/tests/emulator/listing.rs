use directory_emulator::Emulator;
use serde_json::{Value, json};

use crate::client::{Client, directory, group, group_member, groups_of_sizes, member, user};

async fn page_sizes(client: &Client, path: &str, key: &str) -> Vec<usize> {
    client.pages(path, key).await.iter().map(Vec::len).collect()
}

fn ids(pages: &[Vec<Value>]) -> Vec<String> {
    pages.iter().flatten().map(|object| object["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn group_of_exactly_200_members_has_one_page() {
    let emulator = Emulator::start(groups_of_sizes(&[0, 1, 199, 200, 201, 401])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let expected: [&[usize]; 6] = [&[0], &[1], &[199], &[200], &[200, 1], &[200, 200, 1]];
    for (number, sizes) in expected.into_iter().enumerate() {
        let path = format!("groups/g{}/members", number + 1);
        assert_eq!(page_sizes(&client, &path, "members").await, sizes, "{path}");
    }
}

#[tokio::test]
async fn pages_hold_every_member_once() {
    let emulator = Emulator::start(groups_of_sizes(&[401])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let expected: Vec<String> = (1..=401).map(|n| format!("u{n}")).collect();
    for size in [1, 7, 200, 201] {
        let path = format!("groups/g1/members?maxResults={size}");
        assert_eq!(ids(&client.pages(&path, "members").await), expected, "{size}");
    }
}

#[tokio::test]
async fn exactly_500_users_are_one_page() {
    for (users, sizes) in [(0, vec![0]), (1, vec![1]), (500, vec![500]), (501, vec![500, 1])] {
        let emulator = Emulator::start(directory((1..=users).map(user).collect(), vec![])).await.unwrap();
        let client = Client::admin(&emulator).await;
        let path = "users?customer=my_customer&maxResults=500";
        assert_eq!(page_sizes(&client, path, "users").await, sizes);
    }
}

#[tokio::test]
async fn exactly_200_groups_are_one_page() {
    for (groups, sizes) in [(0, vec![0]), (200, vec![200]), (201, vec![200, 1])] {
        let emulator = Emulator::start(groups_of_sizes(&vec![0; groups])).await.unwrap();
        let client = Client::admin(&emulator).await;
        assert_eq!(page_sizes(&client, "groups?customer=my_customer", "groups").await, sizes);
    }
}

#[tokio::test]
async fn empty_listing_omits_its_key() {
    let emulator = Emulator::start(groups_of_sizes(&[0])).await.unwrap();
    let page = Client::admin(&emulator).await.get("groups/g1/members").await.json();
    let etag = page["etag"].clone();
    assert_eq!(page, json!({"kind": "admin#directory#members", "etag": etag}));
}

#[tokio::test]
async fn page_sizes_have_googles_defaults_and_limits() {
    let directory = directory((1..=600).map(user).collect(), (1..=201).map(|n| (group(n), vec![])).collect());
    let emulator = Emulator::start(directory).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (path, key, size) in [
        ("users?customer=my_customer", "users", 100),
        ("users?customer=my_customer&maxResults=501", "users", 500),
        ("users?customer=my_customer&maxResults=2147483647", "users", 500),
        ("groups?customer=my_customer", "groups", 200),
        ("groups?customer=my_customer&maxResults=1000", "groups", 200),
        ("groups?customer=my_customer&maxResults=1", "groups", 1),
    ] {
        assert_eq!(client.get(path).await.json()[key].as_array().unwrap().len(), size, "{path}");
    }
    for value in ["0", "-1", "x", "2147483648"] {
        let answer = client.get(&format!("users?customer=my_customer&maxResults={value}")).await;
        assert_eq!(answer.error(), (400, "invalidParameter".to_owned()), "{value}");
    }
}

#[tokio::test]
async fn page_token_of_another_listing_is_refused() {
    let emulator = Emulator::start(groups_of_sizes(&[3, 3])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let page = client.get("groups/g1/members?maxResults=1").await.json();
    let token = page["nextPageToken"].as_str().unwrap();

    let same = client.get(&format!("groups/g1/members?maxResults=2&pageToken={token}")).await;
    assert_eq!(same.json()["members"].as_array().unwrap().len(), 2);
    for path in [
        format!("groups/g2/members?pageToken={token}"),
        format!("groups/g1/members?roles=MEMBER&pageToken={token}"),
        format!("groups/g1/members?pageToken=A{token}"),
        "groups/g1/members?pageToken=2".to_owned(),
    ] {
        let answer = client.get(&path).await;
        assert_eq!(answer.error(), (400, "invalid".to_owned()), "{path}");
        assert_eq!(answer.error_message(), "Invalid Input: pageToken");
    }
}

#[tokio::test]
async fn listing_goes_on_behind_its_last_object_after_a_change() {
    let emulator = Emulator::start(groups_of_sizes(&[4])).await.unwrap();
    let client = Client::admin(&emulator).await;
    let page = client.get("groups/g1/members?maxResults=2").await.json();
    let token = page["nextPageToken"].as_str().unwrap();

    let left = vec![member(2), member(3), member(4), member(5)];
    emulator.replace_directory(directory((1..=5).map(user).collect(), vec![(group(1), left)]));
    let page = client.get(&format!("groups/g1/members?pageToken={token}")).await.json();
    assert_eq!(ids(&[page["members"].as_array().unwrap().clone()]), ["u3", "u4", "u5"]);
}

#[tokio::test]
async fn derived_members_of_a_cycle_are_listed_once() {
    let groups = vec![
        (group(1), vec![member(1), group_member(2)]),
        (group(2), vec![member(1), member(2), group_member(3)]),
        (group(3), vec![member(3), group_member(1)]),
    ];
    let emulator = Emulator::start(directory((1..=3).map(user).collect(), groups)).await.unwrap();
    let client = Client::admin(&emulator).await;
    let mut derived = ids(&client.pages("groups/g1/members?includeDerivedMembership=true", "members").await);
    derived.sort();
    assert_eq!(derived, ["g1", "g2", "g3", "u1", "u2", "u3"]);
    assert_eq!(ids(&client.pages("groups/g1/members", "members").await), ["u1", "g2"]);
}

#[tokio::test]
async fn roles_filter_members() {
    let owner = json!({"id": "u1", "role": "OWNER", "type": "USER"});
    let without_role = json!({"id": "u2", "type": "USER"});
    let groups = vec![(group(1), vec![owner, without_role, member(3)])];
    let emulator = Emulator::start(directory(vec![], groups)).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (roles, expected) in
        [("OWNER", vec!["u1"]), ("MEMBER", vec!["u2", "u3"]), ("owner,MEMBER", vec!["u1", "u2", "u3"])]
    {
        let pages = client.pages(&format!("groups/g1/members?roles={roles}"), "members").await;
        assert_eq!(ids(&pages), expected, "{roles}");
    }
    assert_eq!(client.get("groups/g1/members?roles=BOSS").await.error(), (400, "invalid".to_owned()));
}

#[tokio::test]
async fn users_are_listed_in_the_order_asked_for() {
    let named = |number: usize, given: &str| {
        let mut user = user(number);
        user["name"] = json!({"givenName": given, "familyName": "X"});
        user
    };
    let users = vec![named(2, "b"), named(1, "C"), named(3, "a")];
    let emulator = Emulator::start(directory(users, vec![])).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (order, expected) in [
        ("", ["u2", "u1", "u3"]),
        ("&orderBy=email", ["u1", "u2", "u3"]),
        ("&orderBy=email&sortOrder=DESCENDING", ["u3", "u2", "u1"]),
        ("&orderBy=givenName", ["u3", "u2", "u1"]),
    ] {
        let path = format!("users?customer=C01example&maxResults=1{order}");
        assert_eq!(ids(&client.pages(&path, "users").await), expected, "{order}");
    }
    let answer = client.get("users?customer=my_customer&orderBy=id").await;
    assert_eq!(answer.error(), (400, "invalidParameter".to_owned()));
}

#[tokio::test]
async fn deleted_users_are_listed_only_when_asked_for() {
    let mut gone = user(2);
    gone["deletionTime"] = json!("2026-01-01T00:00:00.000Z");
    let emulator = Emulator::start(directory(vec![user(1), gone], vec![])).await.unwrap();
    let client = Client::admin(&emulator).await;
    assert_eq!(ids(&client.pages("users?customer=my_customer", "users").await), ["u1"]);
    assert_eq!(ids(&client.pages("users?customer=my_customer&showDeleted=true", "users").await), ["u2"]);
    assert_eq!(client.get("users/u2").await.error(), (404, "notFound".to_owned()));
}

#[tokio::test]
async fn domain_lists_one_domain_and_must_be_known() {
    let mut elsewhere = user(2);
    elsewhere["primaryEmail"] = json!("user2@Second.example");
    let emulator =
        Emulator::start(directory(vec![user(1), elsewhere], vec![(group(1), vec![])])).await.unwrap();
    let client = Client::admin(&emulator).await;
    assert_eq!(ids(&client.pages("users?domain=second.EXAMPLE", "users").await), ["u2"]);
    assert_eq!(ids(&client.pages("groups?domain=example.com", "groups").await), ["g1"]);
    assert_eq!(ids(&client.pages("groups?domain=second.example", "groups").await), Vec::<String>::new());
    let answer = client.get("users?domain=third.example").await;
    assert_eq!(answer.error(), (404, "notFound".to_owned()));
    assert_eq!(answer.error_message(), "Domain not found.");
}

#[tokio::test]
async fn exactly_one_of_customer_and_domain_is_taken() {
    let emulator = Emulator::start(groups_of_sizes(&[1])).await.unwrap();
    let client = Client::admin(&emulator).await;
    for path in [
        "users",
        "groups",
        "users?customer=C0other",
        "users?customer=my_customer&domain=example.com",
        "groups?customer=my_customer&domain=example.com",
        "groups?customer=my_customer&userKey=u1",
    ] {
        assert_eq!(client.get(path).await.error(), (400, "badRequest".to_owned()), "{path}");
    }
}

#[tokio::test]
async fn queries_of_one_clause_are_answered_and_others_refused() {
    let mut suspended = user(2);
    suspended["suspended"] = json!(true);
    let emulator =
        Emulator::start(directory(vec![user(1), suspended], vec![(group(1), vec![])])).await.unwrap();
    let client = Client::admin(&emulator).await;
    for (query, expected) in [
        ("email%3DUser1%40example.com", vec!["u1"]),
        ("email:user*", vec!["u1", "u2"]),
        ("isSuspended=true", vec!["u2"]),
    ] {
        let path = format!("users?customer=my_customer&query={query}");
        assert_eq!(ids(&client.pages(&path, "users").await), expected, "{query}");
    }
    for path in [
        "users?customer=my_customer&query=orgName=x",
        "users?customer=my_customer&query=email:a*+isSuspended=true",
        "groups?customer=my_customer&query=isSuspended=true",
    ] {
        assert_eq!(client.get(path).await.error(), (400, "invalid".to_owned()), "{path}");
    }
}
