-- What lets the jobs that keep the trail work as database roles that own nothing (deploy/sql/roles.sql): to hold the trail
-- while a month is dropped or an era of seals ends, and to read and write what a swept-up operation needs. And a month is
-- dropped only once all of it is sealed. Functions and privileges only; locks no table.

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

-- As in 0012, but a month that holds a record which is in no seal stays: verification could not tell later that it was
-- there, nor that nobody removed more.
create or replace function authz.drop_audit_months(before date) returns text[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' set enable_seqscan = off as $$
declare
    partition_name text;
    newest         record;
    -- Sealed is what has no higher number than this: eras before, each as a whole;
    base           bigint := -9223372036854775808;
    -- and of this era what lies before this place and has no higher number than the last one given when that was sealed.
    transaction_id xid8   := '0';
    audit_id       bigint := -9223372036854775808;
    last_audit_id  bigint := 9223372036854775807;
    unsealed       boolean;
    dropped        text[] := '{}';
begin
    if before > date_trunc('month', clock_timestamp())::date then
        raise exception 'the month under way cannot be dropped' using errcode = 'invalid_parameter_value';
    end if;
    if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
        raise exception 'months are dropped in a transaction that is read committed: any other does not see the newest records'
            using errcode = 'invalid_transaction_state';
    end if;
    -- From here on nobody writes, and who did has ended.
    lock table authz.audit_log in access exclusive mode;
    select s.closing, s.base_audit_id, s.last_audit_id, s.until_transaction_id, s.until_audit_id into newest
    from authz.audit_seals s order by s.seal_id desc limit 1;
    if found and not newest.closing then
        base := newest.base_audit_id;
        transaction_id := newest.until_transaction_id;
        audit_id := newest.until_audit_id;
        last_audit_id := newest.last_audit_id;
    elsif found and newest.until_transaction_id = '9223372036854775807' and newest.until_audit_id = 9223372036854775807 then
        -- The last of those that close an era; a chain that stops before it is not through with anything.
        base := newest.last_audit_id;
    end if;
    for partition_name in
        select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'authz.audit_log'::regclass and c.relname ~ '^audit_log_[0-9]{6}$'
          and right(c.relname, 6) < to_char(before, 'YYYYMM')
        order by 1
    loop
        -- Each is a look into an index, however large the month is: the planner takes no other way, even without statistics.
        execute format('select exists (select from authz.%1$I a
                                       where a.audit_id > $1 and (a.transaction_id, a.audit_id) >= ($2, $3))
                            or exists (select from authz.%1$I a where a.audit_id > $4)', partition_name)
            into unsealed using base, transaction_id, audit_id, last_audit_id;
        if unsealed then
            raise exception 'authz.% holds records that are in no seal', partition_name
                using errcode = 'object_not_in_prerequisite_state',
                      hint = 'Seal and export them first; `authz audit prune` does both, and drops the month then.';
        end if;
        execute format('drop table authz.%I', partition_name);
        dropped := dropped || partition_name;
    end loop;
    return dropped;
end $$;
