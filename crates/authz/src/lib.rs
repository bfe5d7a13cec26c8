//! Permissions in Postgres: users, groups, actions, grants, checks and an audit trail.
