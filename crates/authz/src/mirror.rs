//! The write side of a directory sync: lease, staging, plan and apply. `dir-sync` drives it; a service that
//! only asks questions never needs it.
//!
//! The order is [`Run::begin`] (takes the lease), `stage_*` (what the source lists), [`Run::plan`] (what would
//! change), then [`Planned::apply`] or [`Planned::discard`], and [`Run::fail`] for everything that goes wrong.

mod apply;
mod known;
mod lease;
mod members;
mod plan;
mod plan_groups;
mod plan_memberships;
mod plan_summary;
mod plan_users;
mod remember;
mod report;
mod stage;
mod stage_members;

pub use lease::{HEARTBEAT_EVERY, LEASE_TTL, Run, record_failure};
pub use plan::{PlanOptions, Planned};
pub use report::{
    Change, Conflict, Counts, GroupChange, MembershipChange, Plan, SHOWN, Tally, Totals, UserChange,
};
pub use stage::{StagedGroup, StagedMember, StagedUser};
