//! Database checks beside `SELECT 1`.
fn main() {}
