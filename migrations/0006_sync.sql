-- What a directory sync keeps: its runs, its lease, and its staging area. New tables only.
-- The staging tables are unlogged: after a crash they are empty, and the next run fills them anew.

create table authz.sync_runs (
    run_id       bigint generated always as identity primary key,
    directory_id integer not null references authz.directories,
    source       text not null,
    started_at   timestamptz not null default clock_timestamp(),
    finished_at  timestamptz,
    status       text not null default 'running'
        constraint run_status_is_known check (status in
            ('running', 'applied', 'unchanged', 'planned', 'refused', 'partial', 'failed', 'abandoned')),
    plan_hash    text,
    counts       jsonb,
    api_calls    bigint,
    -- What failed, or which groups could not be listed.
    message      text,
    constraint finished_run_has_an_end check ((status = 'running') = (finished_at is null))
);
create index sync_runs_by_directory on authz.sync_runs (directory_id, run_id);

-- At most one run per directory. The run's id is the fencing token: an apply locks this row and finds its own id.
create table authz.sync_leases (
    directory_id integer primary key references authz.directories,
    run_id       bigint not null references authz.sync_runs,
    heartbeat_at timestamptz not null,
    expires_at   timestamptz not null
);

create unlogged table authz.sync_stage_users (
    run_id       bigint not null,
    external_id  text not null,
    -- Null if the directory's address cannot be a name: the mirror then keeps the name it has.
    user_name    text,
    display_name text not null,
    suspended    boolean not null,
    primary key (run_id, external_id)
);

create unlogged table authz.sync_stage_groups (
    run_id       bigint not null,
    external_id  text not null,
    group_name   text,
    display_name text not null,
    description  text not null,
    -- False keeps the memberships that the mirror has: the group's members could not be listed.
    members_complete boolean not null default true,
    primary key (run_id, external_id)
);

create unlogged table authz.sync_stage_members (
    run_id             bigint not null,
    group_external_id  text not null,
    kind               text not null check (kind in ('user', 'group', 'everyone')),
    member_external_id text not null,
    member_name        text,
    role               text not null,
    primary key (run_id, group_external_id, kind, member_external_id)
);

-- The plan: one row per change, made from the staging tables and the mirror, carried out as it stands.
create unlogged table authz.sync_plan_users (
    run_id           bigint not null,
    external_id      text not null,
    user_id          bigint,
    op               text not null check (op in ('add', 'change', 'remove')),
    old_name         text,
    new_name         text,
    old_display_name text,
    new_display_name text,
    old_status       text,
    new_status       text,
    old_directory_id integer,
    new_directory_id integer,
    primary key (run_id, external_id)
);
create index sync_plan_users_by_user on authz.sync_plan_users (run_id, user_id);
create index sync_plan_users_by_name on authz.sync_plan_users (run_id, new_name);

create unlogged table authz.sync_plan_groups (
    run_id           bigint not null,
    external_id      text not null,
    group_id         bigint,
    op               text not null check (op in ('add', 'change', 'remove')),
    old_name         text,
    new_name         text,
    old_display_name text,
    new_display_name text,
    old_description  text,
    new_description  text,
    primary key (run_id, external_id)
);
create index sync_plan_groups_by_group on authz.sync_plan_groups (run_id, group_id);
create index sync_plan_groups_by_name on authz.sync_plan_groups (run_id, new_name);

create unlogged table authz.sync_plan_members (
    run_id             bigint not null,
    group_external_id  text not null,
    kind               text not null check (kind in ('user', 'group', 'everyone')),
    member_external_id text not null,
    op                 text not null check (op in ('add', 'change', 'remove')),
    role               text not null,
    -- The rows concerned; null in an `add`, whose rows may come with the same plan.
    group_id           bigint,
    member_id          bigint,
    primary key (run_id, group_external_id, kind, member_external_id)
);

-- What a sync could not do and says: rows of the directory that cannot be mirrored as they are.
create unlogged table authz.sync_plan_conflicts (
    run_id      bigint not null,
    kind        text not null check (kind in ('user', 'group')),
    external_id text not null,
    name        text not null,
    reason      text not null,
    primary key (run_id, kind, external_id)
);
