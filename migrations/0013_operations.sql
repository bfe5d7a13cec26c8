-- Which operations are under way, and which process runs each: so that a sweeper can tell a start whose process is
-- gone from one that takes long. New tables; indexes on audit_log, which lock it against writes while they are built.

-- A process that runs operations, with a lease that it renews. An owner whose lease has ended is taken for gone.
create table authz.operation_owners (
    owner_id   bigint generated always as identity primary key,
    service    text not null,
    started_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null
);

-- A `started` record whose end is not recorded yet; written and removed with those records. It is an index, not a
-- part of the trail: what happened is in audit_log alone.
create table authz.open_operations (
    audit_id    bigint primary key,
    -- As in the `started` record, to find it in its partition.
    recorded_at timestamptz not null,
    owner_id    bigint not null,
    -- The owner's own count, by which it finds a start whose answer it never got.
    number      bigint not null,
    unique (owner_id, number)
);
