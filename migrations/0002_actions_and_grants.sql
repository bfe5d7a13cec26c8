-- What can be done, and who may do it. New tables only.

create table authz.actions (
    action_name text primary key
        constraint action_name_is_canonical check (
            (action_name collate "C") ~ '^[a-z0-9_-]+(\.[a-z0-9_-]+)*$' and octet_length(action_name) <= 255),
    description text not null default ''
);

-- A grant's action_name is an action, or a pattern that ends in `.*` (or is `*`) and covers all below.
-- The generated column makes "an exact grant names a registered action" a foreign key.
create table authz.user_actions (
    user_id      bigint not null references authz.users,
    action_name  text not null
        constraint granted_name_is_canonical check (
            (action_name collate "C") ~ '^(\*|[a-z0-9_-]+(\.[a-z0-9_-]+)*(\.\*)?)$'
            and octet_length(action_name) <= 255),
    granted_by   text not null default session_user,
    granted_at   timestamptz not null default now()
        constraint granted_at_is_a_date check (granted_at > '-infinity' and granted_at < '10000-01-01 UTC'),
    -- Null for no end. `infinity` is no date for most programs, so it is none here.
    expires_at   timestamptz
        constraint expires_at_is_a_date check (expires_at > '-infinity' and expires_at < '10000-01-01 UTC'),
    reason       text not null default '',
    exact_action text generated always as (case when action_name not like '%*' then action_name end) stored
        constraint granted_action_is_registered references authz.actions (action_name),
    primary key (user_id, action_name)
);
create index user_actions_by_action on authz.user_actions (action_name, user_id);
create index user_actions_by_exact_action on authz.user_actions (exact_action) where exact_action is not null;

create table authz.group_actions (
    group_id     bigint not null references authz.groups,
    action_name  text not null
        constraint granted_name_is_canonical check (
            (action_name collate "C") ~ '^(\*|[a-z0-9_-]+(\.[a-z0-9_-]+)*(\.\*)?)$'
            and octet_length(action_name) <= 255),
    granted_by   text not null default session_user,
    granted_at   timestamptz not null default now()
        constraint granted_at_is_a_date check (granted_at > '-infinity' and granted_at < '10000-01-01 UTC'),
    -- Null for no end. `infinity` is no date for most programs, so it is none here.
    expires_at   timestamptz
        constraint expires_at_is_a_date check (expires_at > '-infinity' and expires_at < '10000-01-01 UTC'),
    reason       text not null default '',
    exact_action text generated always as (case when action_name not like '%*' then action_name end) stored
        constraint granted_action_is_registered references authz.actions (action_name),
    primary key (group_id, action_name)
);
create index group_actions_by_action on authz.group_actions (action_name, group_id);
create index group_actions_by_exact_action on authz.group_actions (exact_action) where exact_action is not null;
