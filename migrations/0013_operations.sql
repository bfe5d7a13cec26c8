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

-- A page of the trail by actor, action, target or request, in the order of commits. They take the place of the two
-- indexes by audit_id.
drop index authz.audit_log_by_actor;
drop index authz.audit_log_by_action;
create index audit_log_by_actor on authz.audit_log (actor, transaction_id, audit_id);
create index audit_log_by_action on authz.audit_log (action collate "C", transaction_id, audit_id);
create index audit_log_by_target on authz.audit_log (target, transaction_id, audit_id) where target is not null;
create index audit_log_by_request on authz.audit_log (request_id) where request_id is not null;

-- Records are read in the order of their transactions, and only those whose transactions can no longer be followed by
-- earlier ones. Transactions are counted by cluster, though: a trail that was restored into another one goes on under
-- another count. So each cluster begins an era; what has a higher number than `base_audit_id` is of that era or a later.
create table authz.audit_eras (
    era           integer primary key,
    cluster_id    bigint not null,
    base_audit_id bigint not null,
    begun_at      timestamptz not null default clock_timestamp()
);
insert into authz.audit_eras (era, cluster_id, base_audit_id)
select 1, system_identifier, 0 from pg_control_system();

-- Begins an era if the trail has come into another cluster. Called when a service starts, before it writes.
create function authz.note_audit_era() returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    here bigint := (select system_identifier from pg_control_system());
    last record;
begin
    select e.era, e.cluster_id into last from authz.audit_eras e order by e.era desc limit 1;
    if last.cluster_id = here then
        return last.era;
    end if;
    -- Waits for those who write: what they write is of the era before, or of the new one, not of both.
    lock table authz.audit_log in share row exclusive mode;
    insert into authz.audit_eras (era, cluster_id, base_audit_id)
    select max(e.era) + 1, here, (select coalesce(max(a.audit_id), 0) from authz.audit_log a)
    from authz.audit_eras e
    having (array_agg(e.cluster_id order by e.era desc))[1] <> here;
    return (select max(e.era) from authz.audit_eras e);
end $$;
