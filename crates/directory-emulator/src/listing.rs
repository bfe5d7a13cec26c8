use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::directory::{Object, text};
use crate::error_body::ApiError;
use crate::parameters::Parameters;
use crate::server::Shaping;

const CHECK_BYTES: usize = 12;

/// One of the three listings: how it is called in answers, and how long its pages are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listing {
    /// The key of the objects, as in `users`.
    pub(crate) collection: &'static str,
    pub(crate) default_page: usize,
    pub(crate) longest_page: usize,
}

impl Listing {
    pub(crate) const USERS: Self = Self { collection: "users", default_page: 100, longest_page: 500 };
    pub(crate) const GROUPS: Self = Self { collection: "groups", default_page: 200, longest_page: 200 };
    pub(crate) const MEMBERS: Self = Self { collection: "members", default_page: 200, longest_page: 200 };

    /// The page that was asked for. `path` tells listings apart, `finish` completes each object shown.
    pub(crate) fn page(
        self,
        path: &str,
        parameters: &Parameters,
        objects: &[&Object],
        shaping: Shaping,
        finish: impl Fn(&Object) -> Object,
    ) -> Result<Value, ApiError> {
        let size = parameters.page_size(self.default_page, self.longest_page)?;
        let name = format!("{path} {}", parameters.listing_key());
        let asked = parameters.get("pageToken");
        let start = match asked {
            None => 0,
            Some(token) => Position::decode(token, &name)
                .ok_or_else(|| ApiError::invalid_input("pageToken"))?
                .start(objects),
        };
        let rest = objects.get(start..).unwrap_or_default();
        let shown = if shaping.empty { &[] } else { rest.get(..size).unwrap_or(rest) };

        let behind = || {
            let last_id = shown.last().map_or("", |object| text(object, "id")).to_owned();
            Position { offset: start + shown.len(), last_id }.encode(&name)
        };
        let next = if shaping.repeat_page_token {
            Some(asked.map_or_else(behind, str::to_owned))
        } else {
            (!shaping.empty && shown.len() < rest.len()).then(behind)
        };

        let mut page = Object::new();
        page.insert("kind".to_owned(), json!(format!("admin#directory#{}", self.collection)));
        if !shown.is_empty() {
            let shown = shown.iter().map(|object| Value::Object(finish(object))).collect();
            page.insert(self.collection.to_owned(), Value::Array(shown));
        }
        if let Some(token) = next {
            page.insert("nextPageToken".to_owned(), Value::String(token));
        }
        Ok(Value::Object(with_etag(page)))
    }
}

/// Where a page starts: behind an object, or at an offset if that object has gone.
struct Position {
    offset: usize,
    last_id: String,
}

impl Position {
    fn start(&self, objects: &[&Object]) -> usize {
        let is_last = |object: &&Object| text(object, "id") == self.last_id;
        // Without a change of directory, the object is where it was.
        let before = self.offset.checked_sub(1);
        if before.and_then(|before| objects.get(before)).is_some_and(is_last) {
            return self.offset;
        }
        objects.iter().position(is_last).map_or(self.offset, |index| index + 1)
    }

    fn encode(&self, listing: &str) -> String {
        let content = format!("{}:{}", self.offset, self.last_id);
        let mut bytes = check(listing, &content);
        bytes.extend_from_slice(content.as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn decode(token: &str, listing: &str) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (stated, content) = bytes.split_at_checked(CHECK_BYTES)?;
        let content = std::str::from_utf8(content).ok()?;
        if check(listing, content) != stated {
            return None;
        }
        let (offset, last_id) = content.split_once(':')?;
        Some(Self { offset: offset.parse().ok()?, last_id: last_id.to_owned() })
    }
}

fn check(listing: &str, content: &str) -> Vec<u8> {
    let hash = digest(&SHA256, format!("page token\n{listing}\n{content}").as_bytes());
    hash.as_ref().iter().copied().take(CHECK_BYTES).collect()
}

/// A copy with the kind and the etag, where the file gave none.
pub(crate) fn complete(object: &Object, kind: &str) -> Object {
    let mut complete = object.clone();
    complete.entry("kind").or_insert_with(|| json!(kind));
    with_etag(complete)
}

/// Adds an etag, in its quotes as Google's are, that changes with the content.
pub(crate) fn with_etag(mut object: Object) -> Object {
    if !object.contains_key("etag") {
        // A map of JSON values with text keys always has a JSON text.
        let content = serde_json::to_vec(&object).unwrap_or_default();
        let etag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(digest(&SHA256, &content)));
        object.insert("etag".to_owned(), Value::String(etag));
    }
    object
}
