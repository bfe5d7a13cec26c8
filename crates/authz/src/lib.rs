#![doc = include_str!("../README.md")]

pub mod name;

pub mod decision;

mod error;

pub mod revision;

pub mod user;

pub mod group;

pub mod directory;

pub mod action;

pub mod grant;

pub mod audit;

mod begin;
mod check;

mod explain;

mod lent;
mod list;

pub mod permit;

pub mod mirror;

pub mod snapshot;

mod migrate;

mod service;

mod unregistered;

#[cfg(feature = "tower")]
pub mod web;

pub use begin::{Begin, Beginning, begin};
pub use check::{check, check_many, check_many_by_sub};
pub use decision::{Allow, Decision, Denial, Deny, DenyReason, Holder, MatchedGrant, Revision, Verdict};
pub use error::Error;
pub use explain::{Explanation, Fact, Missing, Path, WOULD_ALLOW_LIMIT, explain};
pub use list::{PAGE_LIMIT, Page, actions_of, users_who_can};
pub use migrate::{SchemaState, migrate, schema_fingerprint, schema_state};
pub use name::{
    ActionName, ActionPattern, DirectoryName, GroupName, NameError, Principal, Sub, UserKey, UserName,
};
pub use permit::{
    Action, Denied, Named, On, Permit, Refusal, WrongPermit, authorize, authorize_named, authorize_on,
};
pub use service::Authz;
pub use snapshot::Snapshot;
