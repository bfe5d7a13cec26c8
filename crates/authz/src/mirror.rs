//! The write side of a directory sync: lease, staging, plan and apply. `dir-sync` drives it; a service that
//! only asks questions never needs it.
//!
//! The order is [`Run::begin`] (takes the lease), `stage_*` (what the source lists), [`Run::missing`] and
//! [`Run::missing_members`] (what to ask for once more before it is taken for gone), [`Run::plan`] (what would change), then
//! [`Planned::apply`] or [`Planned::discard`], and [`Run::fail`] for everything that goes wrong.

mod apply;
mod beside;
mod compare_members;
mod copy_in;
mod fill;
mod held;
mod history;
mod known;
mod lease;
mod members;
mod plan;
mod plan_actions;
mod plan_groups;
mod plan_memberships;
mod plan_summary;
mod plan_users;
mod plan_withhold;
mod remember;
mod report;
mod second_look;
mod stage;
mod stage_members;
mod users;
mod watch;

pub use history::{Freshness, Holder, RunRecord, freshness, holder, missing_privileges, runs};
pub use lease::{Failure, HEARTBEAT_EVERY, Interrupt, LEASE_TTL, Run, record_failure};
pub use members::StagedMembers;
pub use plan::{PlanOptions, Planned};
pub use report::{
    ActionChange, ActionChanges, Change, Conflict, Counts, GroupChange, MembershipChange, Plan, SHOWN,
    SHOWN_ACTIONS, Shrinking, Tally, Totals, UserChange,
};
pub use second_look::MissingMembers;
pub use stage::{Missing, StagedGroup, StagedMember, StagedUser};
pub use users::StagedUsers;
