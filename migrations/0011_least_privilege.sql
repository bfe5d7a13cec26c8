-- What lets a sync, and people who maintain groups, work as database roles that own nothing (deploy/sql/roles.sql).
-- Functions and privileges only; locks no table.

-- Locks the revision until the transaction ends, as each change does. A role that could lock the row itself could
-- also write any number into it.
create function authz.hold_revision() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    current bigint;
begin
    select r.revision into current from authz.revision r for update;
    return current;
end $$;

-- Counts what is staged, for the planner. Only the owner of a table may do that; for others it is a silent nothing.
create function authz.analyze_staging() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    analyze authz.sync_stage_users, authz.sync_stage_groups, authz.sync_stage_members, authz.sync_stage_unseen_users;
end $$;

-- A function that runs as its owner is for those who are named. Triggers go on calling theirs.
revoke execute on function authz.hold_revision(), authz.analyze_staging(), authz.close_below(bigint[]) from public;
