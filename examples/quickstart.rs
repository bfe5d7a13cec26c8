//! The whole product on one real organisation.
fn main() {}
