//! Mirrors users, groups and memberships of a Google Workspace into the authz tables.
