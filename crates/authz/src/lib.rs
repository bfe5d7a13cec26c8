#![doc = include_str!("../README.md")]

pub mod name;

pub mod decision;

mod error;

pub mod revision;

pub mod user;

pub mod group;

pub mod action;

pub mod grant;

pub mod audit;

mod check;

mod explain;

pub mod mirror;

pub mod snapshot;

mod migrate;

mod service;

pub use check::check;
pub use decision::{Allow, Decision, Denial, Deny, DenyReason, Holder, MatchedGrant, Revision, Verdict};
pub use error::Error;
pub use explain::{Explanation, Path, WOULD_ALLOW_LIMIT, explain};
pub use migrate::{migrate, schema_fingerprint};
pub use name::{ActionName, ActionPattern, DirectoryName, GroupName, NameError, UserName};
pub use service::Authz;
pub use snapshot::Snapshot;
