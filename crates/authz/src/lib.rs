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

pub mod permit;

pub mod mirror;

mod migrate;

mod service;

#[cfg(feature = "tower")]
pub mod web;

pub use check::check;
pub use decision::{Allow, Decision, Deny, DenyReason, Holder, MatchedGrant, Revision};
pub use error::Error;
pub use explain::{Explanation, Path, WOULD_ALLOW_LIMIT, explain};
pub use migrate::{migrate, schema_fingerprint};
pub use name::{ActionName, ActionPattern, DirectoryName, GroupName, NameError, UserName};
pub use permit::{
    Action, Denied, Named, On, Permit, Refusal, WrongPermit, authorize, authorize_named, authorize_on,
};
pub use service::Authz;
