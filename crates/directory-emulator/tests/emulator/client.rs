//! A small HTTP client that can sign in, and directories to ask for.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, Request, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use directory_emulator::{Directory, Emulator};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

pub(crate) const USER_SCOPE: &str = "https://www.googleapis.com/auth/admin.directory.user.readonly";
pub(crate) const GROUP_SCOPE: &str = "https://www.googleapis.com/auth/admin.directory.group.readonly";
pub(crate) const MEMBER_SCOPE: &str = "https://www.googleapis.com/auth/admin.directory.group.member.readonly";

/// A directory of `example.com` with these groups, each with its members.
pub(crate) fn directory(users: Vec<Value>, groups: Vec<(Value, Vec<Value>)>) -> Directory {
    let members: serde_json::Map<String, Value> = groups
        .iter()
        .map(|(group, members)| (group["id"].as_str().unwrap().to_owned(), json!(members)))
        .collect();
    let groups: Vec<Value> = groups.into_iter().map(|(group, _)| group).collect();
    let users = Value::Array(users);
    Directory::from_value(json!({
        "customerId": "C01example", "asOf": "2026-01-01", "users": users, "groups": groups, "members": members,
    }))
    .unwrap()
}

pub(crate) fn user(number: usize) -> Value {
    json!({"id": format!("u{number}"), "primaryEmail": format!("user{number}@example.com")})
}

pub(crate) fn group(number: usize) -> Value {
    json!({"id": format!("g{number}"), "email": format!("group{number}@example.com")})
}

pub(crate) fn member(number: usize) -> Value {
    json!({"id": format!("u{number}"), "email": format!("user{number}@example.com"), "role": "MEMBER", "type": "USER"})
}

pub(crate) fn group_member(number: usize) -> Value {
    json!({"id": format!("g{number}"), "email": format!("group{number}@example.com"), "role": "MEMBER", "type": "GROUP"})
}

/// Groups `g1`, `g2`, ... of these numbers of members.
pub(crate) fn groups_of_sizes(sizes: &[usize]) -> Directory {
    let biggest = sizes.iter().copied().max().unwrap_or(0);
    let groups = sizes.iter().enumerate().map(|(n, size)| (group(n + 1), (1..=*size).map(member).collect()));
    directory((1..=biggest).map(user).collect(), groups.collect())
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) bytes: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The status, and the reason in Google's error body.
    pub(crate) fn error(&self) -> (u16, String) {
        let body = self.json();
        assert_eq!(body["error"]["code"], self.status.as_u16());
        (self.status.as_u16(), body["error"]["errors"][0]["reason"].as_str().unwrap().to_owned())
    }

    pub(crate) fn error_message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap().to_owned()
    }
}

/// Why there is no answer: the connection broke, before the head or in the body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    BeforeHead,
    InBody { status: StatusCode, with_length: bool },
}

pub(crate) struct Client {
    http: HyperClient<HttpConnector, Full<Bytes>>,
    url: String,
    token: Option<String>,
}

impl Client {
    /// A client with no token.
    pub(crate) fn stranger(emulator: &Emulator) -> Self {
        let http = HyperClient::builder(TokioExecutor::new()).build_http();
        Self { http, url: emulator.url(), token: None }
    }

    /// A client that acts as the administrator, with all scopes.
    pub(crate) async fn admin(emulator: &Emulator) -> Self {
        Self::signed_in(emulator, Some(emulator.subject()), &[USER_SCOPE, GROUP_SCOPE]).await
    }

    pub(crate) async fn signed_in(emulator: &Emulator, subject: Option<&str>, scopes: &[&str]) -> Self {
        let mut client = Self::stranger(emulator);
        let mut claims = claims(emulator);
        claims["scope"] = json!(scopes.join(" "));
        claims["sub"] = json!(subject);
        let answer = client.ask_token(&jwt(emulator, &claims)).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        client.token = Some(answer.json()["access_token"].as_str().unwrap().to_owned());
        client
    }

    pub(crate) fn with_token(&self, token: &str) -> Self {
        Self { http: self.http.clone(), url: self.url.clone(), token: Some(token.to_owned()) }
    }

    /// `path` stands behind `admin/directory/v1/`.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.get_with(path, &[]).await
    }

    pub(crate) async fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.try_get(path, headers).await.unwrap()
    }

    pub(crate) async fn try_get(&self, path: &str, headers: &[(&str, &str)]) -> Result<Answer, Broken> {
        self.send("GET", &format!("admin/directory/v1/{path}"), headers, "").await
    }

    /// All pages of a listing, each as its list of objects.
    pub(crate) async fn pages(&self, path: &str, key: &str) -> Vec<Vec<Value>> {
        let mut pages = Vec::new();
        let mut query = String::new();
        loop {
            let answer = self.get(&format!("{path}{query}")).await;
            assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
            let page = answer.json();
            assert_ne!(page[key], json!([]), "an empty listing omits its key");
            pages.push(page[key].as_array().cloned().unwrap_or_default());
            let Some(token) = page["nextPageToken"].as_str() else { return pages };
            let separator = if path.contains('?') { '&' } else { '?' };
            query = format!("{separator}pageToken={token}");
        }
    }

    pub(crate) async fn ask_token(&self, assertion: &str) -> Answer {
        let grant = "urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer";
        self.post_token(&format!("grant_type={grant}&assertion={assertion}")).await
    }

    pub(crate) async fn post_token(&self, body: &str) -> Answer {
        let form = [("content-type", "application/x-www-form-urlencoded")];
        self.send("POST", "token", &form, body).await.unwrap()
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<Answer, Broken> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body.to_owned())).unwrap();
        let (head, body) = self.http.request(request).await.map_err(|_| Broken::BeforeHead)?.into_parts();
        let with_length = head.headers.contains_key("content-length");
        let broken = Broken::InBody { status: head.status, with_length };
        let bytes = body.collect().await.map_err(|_| broken)?.to_bytes();
        Ok(Answer { status: head.status, headers: head.headers, bytes })
    }
}

/// Good claims of the administrator for the next hour.
pub(crate) fn claims(emulator: &Emulator) -> Value {
    let key: Value = serde_json::from_str(&emulator.service_account_key()).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    json!({
        "iss": key["client_email"], "aud": key["token_uri"], "scope": format!("{USER_SCOPE} {GROUP_SCOPE}"),
        "iat": now, "exp": now + 3600, "sub": emulator.subject(),
    })
}

/// The claims, signed as a service account does.
pub(crate) fn jwt(emulator: &Emulator, claims: &Value) -> String {
    let key: Value = serde_json::from_str(&emulator.service_account_key()).unwrap();
    let header = json!({"alg": "RS256", "typ": "JWT", "kid": key["private_key_id"]});
    jwt_with_header(emulator, &header, claims)
}

pub(crate) fn jwt_with_header(emulator: &Emulator, header: &Value, claims: &Value) -> String {
    let key: Value = serde_json::from_str(&emulator.service_account_key()).unwrap();
    let pem = key["private_key"].as_str().unwrap();
    assert!(pem.starts_with("-----BEGIN PRIVATE KEY-----"));
    let der = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).unwrap();
    let pair = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).unwrap();

    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let message =
        format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.to_string().as_bytes()));
    let mut signature = vec![0; pair.public().modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature).unwrap();
    format!("{message}.{}", encode(&signature))
}
