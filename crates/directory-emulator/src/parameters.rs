use axum::extract::Query;
use axum::http::Uri;

use crate::error_body::ApiError;

/// The query parameters of a call.
#[derive(Debug)]
pub(crate) struct Parameters {
    pairs: Vec<(String, String)>,
}

impl Parameters {
    pub(crate) fn of(uri: &Uri) -> Result<Self, ApiError> {
        Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map(|Query(pairs)| Self { pairs })
            .map_err(|_| ApiError::bad_request())
    }

    /// The last value given; an empty one is as good as none.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let pair = self.pairs.iter().rev().find(|(key, _)| key == name);
        pair.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(value) => Err(not_allowed(name, value, &["true", "false"])),
        }
    }

    /// The value if it is one of those allowed, `None` if there is none.
    pub(crate) fn one_of(
        &self,
        name: &str,
        allowed: &[&'static str],
    ) -> Result<Option<&'static str>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match allowed.iter().find(|allowed| allowed.eq_ignore_ascii_case(value)) {
            Some(allowed) => Ok(Some(allowed)),
            None => Err(not_allowed(name, value, allowed)),
        }
    }

    /// `maxResults`: below one is an error, above the maximum is the maximum.
    pub(crate) fn page_size(&self, default: usize, maximum: usize) -> Result<usize, ApiError> {
        let Some(value) = self.get("maxResults") else { return Ok(default) };
        match value.parse::<i32>() {
            Ok(size) if size >= 1 => Ok(usize::try_from(size).map_or(maximum, |size| size.min(maximum))),
            _ => Err(ApiError::invalid_parameter(
                "maxResults",
                format!("Invalid value '{value}'. Values must be within the range: [1, {maximum}]"),
            )),
        }
    }

    /// All parameters that say which listing this is, so that a page token of another one is told apart.
    pub(crate) fn listing_key(&self) -> String {
        const NOT_THE_LISTING: [&str; 7] =
            ["alt", "fields", "key", "maxResults", "pageToken", "prettyPrint", "quotaUser"];
        let mut pairs: Vec<&(String, String)> =
            self.pairs.iter().filter(|(name, _)| !NOT_THE_LISTING.contains(&name.as_str())).collect();
        pairs.sort();
        format!("{pairs:?}")
    }
}

fn not_allowed(name: &str, value: &str, allowed: &[&str]) -> ApiError {
    ApiError::invalid_parameter(
        name,
        format!("Invalid string value: '{value}'. Allowed values: [{}]", allowed.join(", ")),
    )
}
