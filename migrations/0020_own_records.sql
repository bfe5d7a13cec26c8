-- Records that the database writes of itself (what became of grants, memberships, users, groups and actions; baselines; what
-- retention removed) bear a mark that nobody else can set. Replay, `verify` and retention believe no others: a service may
-- have an action of its own called `grant.add`, and no service can make the trail say what did not happen.
-- Adds a column without a rewrite: locks the trail for a moment.

-- Null on records from before: they were believed by their names, and still are.
alter table authz.audit_log add column by_database boolean;
-- True in a trigger or a baseline that runs as the owner of the trail, who alone has the right to delete from it. Others gain
-- nothing by a trigger of their own or by the setting; the owner can write anything anyway.
alter table authz.audit_log alter column by_database set default
    (pg_trigger_depth() > 0 or coalesce(current_setting('authz.writes_itself', true) = 'yes', false))
    and has_table_privilege('authz.audit_log', 'delete');

alter function authz.write_audit_baseline() rename to write_whole_baseline;
-- The state as it stands, as the point from which a replay can begin. Says how many records that are.
create function authz.write_audit_baseline() returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    written integer;
begin
    perform set_config('authz.writes_itself', 'yes', true);
    written := authz.write_whole_baseline();
    perform set_config('authz.writes_itself', '', true);
    return written;
end $$;
revoke execute on function authz.write_audit_baseline() from public;

-- The record of retention, for the job that has dropped months in the same transaction. Says its number.
create function authz.note_audit_prune(told jsonb) returns bigint
language sql security definer set search_path = pg_catalog, pg_temp as $$
    insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, by_database)
    values (authz.current_service(), authz.current_actor(), 'audit.prune', 'succeeded', 'audit_log', told,
            nullif(current_setting('authz.request_id', true), ''), true)
    returning audit_id
$$;
revoke execute on function authz.note_audit_prune(jsonb) from public;
