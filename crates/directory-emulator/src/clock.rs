use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970 in UTC: the one place where this crate asks what time it is.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
