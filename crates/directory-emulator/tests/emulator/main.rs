//! The emulator over HTTP, as a client sees it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "clippy allows these in test functions, not in what test functions share"
)]

mod client;

mod access;
mod answer;
mod directory_file;
mod fault;
mod keys;
mod listing;
mod program;
mod token;
