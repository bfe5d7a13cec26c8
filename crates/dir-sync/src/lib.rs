//! Mirrors users, groups and memberships of a Google Workspace into the authz tables.
//!
//! One run is `crawl → stage → plan → guard → apply → report`; the modules below are in that order. Planning
//! and guarding know neither Google nor SQL: `authz::mirror` owns the statements.

pub mod cli;

pub mod source;

pub mod file;

pub mod google;

pub mod filter;

pub mod crawl;

mod stage;

pub mod guard;

mod plan;

pub mod report;

pub mod metrics;

pub mod progress;

pub mod history;

pub mod stop;

pub mod run;

pub mod doctor;

pub use plan::Summary;
pub use report::{Report, Status};
pub use run::{DirectorySync, Options};
