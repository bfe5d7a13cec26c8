-- What lets the jobs that keep the trail work as database roles that own nothing (deploy/sql/roles.sql): to hold the trail
-- while a month is dropped or an era of seals ends, and to read and write what a swept-up operation needs. Functions and
-- privileges only; locks no table.

-- Holds off writers of the trail until the transaction ends; readers too, where `exclusive`. A role that could lock the
-- table itself could also change it.
create function authz.hold_audit_trail(exclusive boolean) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exclusive then
        lock table authz.audit_log in access exclusive mode;
    else
        lock table authz.audit_log in share mode;
    end if;
end $$;

-- Records as `abandoned` each operation that began more than `older_than` ago, has no end, and whose owner no longer
-- renews its lease; says how many. Who calls it stands in the record: as `swept_by`, and as the database user.
--
-- Who may call this or `disown_operations` writes into `open_operations` what he likes. So they take nothing from there
-- but which records are meant, and only a `started` one is: its end says what the start said, and nothing of the caller's
-- but his name.
create function authz.sweep_operations(older_than interval) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    swept bigint;
begin
    -- INVARIANT: one `abandoned` per start, since who takes away the row of the open operation writes it, in one
    -- statement (held by the test `concurrent_sweepers_record_each_operation_once`).
    with gone as (
        select o.audit_id
        from authz.open_operations o
        where o.recorded_at < clock_timestamp() - older_than
          and not exists (select from authz.operation_owners w
                          where w.owner_id = o.owner_id and w.expires_at >= clock_timestamp())
        order by o.audit_id
        for update of o skip locked
    ),
    closed as (
        delete from authz.open_operations o using gone g where o.audit_id = g.audit_id
        returning o.audit_id, o.recorded_at
    ),
    forgotten as (
        delete from authz.operation_owners w
        where w.expires_at < clock_timestamp() - interval '1 day'
          and not exists (select from authz.open_operations o where o.owner_id = w.owner_id)
    )
    insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision, operation_id)
    select s.service, s.actor, s.action, 'abandoned', s.target,
           jsonb_build_object('reason', 'the process that ran it is gone', 'swept_by', authz.current_service()),
           s.request_id, s.revision, s.audit_id
    from closed c
    join authz.audit_log s on s.audit_id = c.audit_id and s.recorded_at = c.recorded_at and s.outcome = 'started';
    get diagnostics swept = row_count;
    return swept;
end $$;

-- Records as `abandoned` those starts of an owner that have one of these numbers and no end: they came into the trail,
-- and nobody was told so. Gives the numbers.
create function authz.disown_operations(of_owner bigint, numbers bigint[]) returns setof bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    return query
    with closed as (
        delete from authz.open_operations o where o.owner_id = of_owner and o.number = any (numbers)
        returning o.audit_id, o.recorded_at, o.number
    ),
    told as (
        insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision, operation_id)
        select s.service, s.actor, s.action, 'abandoned', s.target,
               jsonb_build_object('reason', 'it was never run, since its start could not be confirmed'),
               s.request_id, s.revision, s.audit_id
        from closed c
        join authz.audit_log s on s.audit_id = c.audit_id and s.recorded_at = c.recorded_at and s.outcome = 'started'
    )
    select c.number from closed c;
end $$;

revoke execute on function authz.hold_audit_trail(boolean), authz.sweep_operations(interval),
    authz.disown_operations(bigint, bigint[]) from public;

-- Services call it now whenever they begin to write. It waits for those who write, and others wait behind it.
alter function authz.note_audit_era() set lock_timeout = '2s';
