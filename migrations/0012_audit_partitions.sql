-- The audit trail by months, so that an old month can be exported and dropped at once; and what seals and the replay of
-- grants need to know. Rebuilds `audit_log` (takes as long as copying it, and locks it meanwhile; grants of rights on
-- the table are carried over), remakes the audit triggers of the tables of grants and memberships (locks them briefly).

alter table authz.audit_log rename to audit_log_whole;

-- Without key, identity and indexes at first: they are made after the copy, under the names that they had.
create table authz.audit_log (
    audit_id       bigint not null,
    recorded_at    timestamptz not null default clock_timestamp()
        constraint recorded_at_is_a_date check (recorded_at > '-infinity' and recorded_at < '10000-01-01 UTC'),
    service        text not null,
    actor          text not null,
    action         text not null,
    outcome        text not null
        constraint outcome_is_known check (outcome in ('denied', 'started', 'succeeded', 'failed', 'abandoned')),
    target         text,
    detail         jsonb not null default '{}',
    request_id     text,
    -- The decision that let the operation through or stopped it, with its path.
    decision       jsonb,
    revision       bigint,
    -- Who the database saw, whatever the record says of itself; and the transaction, for sealing in commit order.
    database_user  text not null default session_user,
    transaction_id xid8 not null default pg_current_xact_id(),
    -- On the record of an operation's end, the `audit_id` of its `started` record.
    operation_id   bigint
) partition by range (recorded_at);

-- Whatever no month takes (a clock that is far off, months that nobody made): a record is never refused for its time.
create table authz.audit_log_default partition of authz.audit_log default;

-- Makes the partition of the month (in UTC) that begins on that day, and moves to it what the default partition holds
-- of that month. Waits for no reader longer than two seconds: it fails then, and the next attempt makes it.
create function authz.make_audit_partition(first_day date) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' set lock_timeout = '2s' as $$
declare
    partition_name text := format('audit_log_%s', to_char(first_day, 'YYYYMM'));
    month_from     timestamptz := date_trunc('month', first_day::timestamptz);
    month_to       timestamptz := month_from + interval '1 month';
begin
    if first_day <> month_from::date then
        raise exception 'a month begins on its first day, not on %', first_day using errcode = 'invalid_parameter_value';
    end if;
    if to_regclass(format('authz.%I', partition_name)) is not null then
        return false;
    end if;
    perform pg_advisory_xact_lock(7022914612);
    if to_regclass(format('authz.%I', partition_name)) is not null then
        return false;
    end if;
    execute format('create table authz.%I (like authz.audit_log including defaults including constraints)', partition_name);
    lock table authz.audit_log_default in access exclusive mode;
    if exists (select 1 from authz.audit_log_default d where d.recorded_at >= month_from and d.recorded_at < month_to) then
        -- Only the table's owner can do this, and this function on its behalf: the records move, none changes.
        alter table authz.audit_log_default disable trigger append_only;
        execute format('with moved as (delete from authz.audit_log_default where recorded_at >= $1 and recorded_at < $2 returning *)
                        insert into authz.%I select * from moved', partition_name)
            using month_from, month_to;
        alter table authz.audit_log_default enable trigger append_only;
    end if;
    -- Attached rather than made in place: that does not stop those who write meanwhile.
    execute format('alter table authz.audit_log attach partition authz.%I for values from (%L) to (%L)',
                   partition_name, month_from, month_to);
    -- A statement trigger of the whole does not fire for a statement on a part.
    execute format('create trigger append_only before update or delete or truncate on authz.%I
                    for each statement execute function authz.refuse_change()', partition_name);
    return true;
end $$;

-- Makes the partitions of this month and of the next ones; says how many it made.
create function authz.make_audit_partitions(months_ahead integer default 3) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' as $$
declare
    this_month date := date_trunc('month', clock_timestamp())::date;
    months     date[];
    month      date;
    made       integer := 0;
begin
    -- First read, then made: a table that a query still reads cannot give its records away.
    months := array(
        select (this_month + make_interval(months => n))::date from generate_series(0, greatest(months_ahead, 0)) n
        union
        select date_trunc('month', d.recorded_at)::date from authz.audit_log_default d
        where d.recorded_at >= '2000-01-01' and d.recorded_at < this_month
        order by 1);
    foreach month in array months loop
        made := made + authz.make_audit_partition(month)::integer;
    end loop;
    return made;
end $$;

create trigger append_only before update or delete or truncate on authz.audit_log_default
    for each statement execute function authz.refuse_change();

-- The months of the records that there are; then the records; then this month and the next ones.
do $$
declare
    month date;
begin
    for month in
        select distinct date_trunc('month', w.recorded_at at time zone 'UTC')::date from authz.audit_log_whole w
    loop
        perform authz.make_audit_partition(month);
    end loop;
end $$;

insert into authz.audit_log
    (audit_id, recorded_at, service, actor, action, outcome, target, detail, request_id, decision, revision,
     database_user, transaction_id)
select audit_id, recorded_at, service, actor, action, outcome, target, detail, request_id, decision, revision,
       database_user, transaction_id
from authz.audit_log_whole;

do $$
declare
    allowed record;
    ids     record;
begin
    for allowed in
        select a.privilege_type, a.is_grantable,
               case when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end as grantee
        from pg_class c, aclexplode(c.relacl) a
        where c.oid = 'authz.audit_log_whole'::regclass and a.grantee <> c.relowner
    loop
        execute format('grant %s on authz.audit_log to %s%s', allowed.privilege_type, allowed.grantee,
                       case when allowed.is_grantable then ' with grant option' else '' end);
    end loop;
    select last_value, is_called into ids from authz.audit_log_audit_id_seq;
    drop table authz.audit_log_whole;
    alter table authz.audit_log alter column audit_id add generated always as identity;
    perform setval(pg_get_serial_sequence('authz.audit_log', 'audit_id'), ids.last_value, ids.is_called);
end $$;

alter table authz.audit_log add primary key (audit_id, recorded_at);
create index audit_log_by_time on authz.audit_log (recorded_at, audit_id);
create index audit_log_by_actor on authz.audit_log (actor, audit_id);
create index audit_log_by_action on authz.audit_log (action, audit_id);
create index audit_log_by_transaction on authz.audit_log (transaction_id, audit_id);
create index audit_log_by_operation on authz.audit_log (operation_id) where operation_id is not null;

create trigger append_only before update or delete or truncate on authz.audit_log
    for each statement execute function authz.refuse_change();

select authz.make_audit_partitions();

-- As in 0005; new is what a truncate says: which table it emptied.
create or replace function authz.audit_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    change record;
begin
    if tg_argv[0] = 'membership' and coalesce(current_setting('authz.sync_run', true), '') <> '' then
        return null;
    end if;
    if tg_op = 'TRUNCATE' then
        insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
        select authz.current_service(), authz.current_actor(), tg_argv[0] || '.remove', 'succeeded',
               'all of ' || tg_table_name, jsonb_build_object('emptied', tg_table_name),
               nullif(current_setting('authz.request_id', true), ''), r.revision
        from authz.revision r;
        return null;
    end if;
    -- An update that moves a row to another key ends one grant and makes another.
    for change in
        select * from (values
            ('INSERT', 'add', 'new_rows', 'true'),
            ('DELETE', 'remove', 'old_rows', 'true'),
            ('UPDATE', 'remove', 'old_rows', format('(%s) not in (select %1$s from new_rows)', tg_argv[4])),
            ('UPDATE', 'add', 'new_rows', format('(%s) not in (select %1$s from old_rows)', tg_argv[4])),
            ('UPDATE', 'change', 'new_rows', format('(%s) in (select %1$s from old_rows)', tg_argv[4]))
        ) as v (op, verb, row_source, condition)
        where v.op = tg_op
    loop
        execute format(
            'insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
             select authz.current_service(), %s, $1, ''succeeded'', %s, %s,
                    nullif(current_setting(''authz.request_id'', true), ''''), (select revision from authz.revision)
             from (select * from %I where %s) r %s',
            case when tg_argv[0] = 'grant' and tg_op = 'INSERT' then 'r.granted_by' else 'authz.current_actor()' end,
            tg_argv[1], tg_argv[2], change.row_source, change.condition, tg_argv[3])
        using tg_argv[0] || '.' || change.verb;
    end loop;
    return null;
end $$;

-- The triggers anew: a record now holds the numbers of the rows beside their names, since a name can be taken over by
-- another row. And a view of the live rows in the form of those records, to hold the trail against.
do $$
declare
    t record;
    e record;
    live text := '';
begin
    for t in
        select * from (values
            ('user_actions', 'grant', 'format(''user %s'', coalesce(u.user_name, r.user_id::text))',
             'jsonb_build_object(''user_id'', r.user_id, ''user'', u.user_name, ''grant'', r.action_name, ''granted_by'', r.granted_by, ''expires_at'', r.expires_at, ''reason'', r.reason)',
             'left join authz.users u on u.user_id = r.user_id', 'user_id, action_name'),
            ('group_actions', 'grant', 'format(''group %s'', coalesce(g.group_name, r.group_id::text))',
             'jsonb_build_object(''group_id'', r.group_id, ''group'', g.group_name, ''grant'', r.action_name, ''granted_by'', r.granted_by, ''expires_at'', r.expires_at, ''reason'', r.reason)',
             'left join authz.groups g on g.group_id = r.group_id', 'group_id, action_name'),
            ('group_users', 'membership', 'format(''group %s'', coalesce(g.group_name, r.group_id::text))',
             'jsonb_build_object(''group_id'', r.group_id, ''group'', g.group_name, ''user_id'', r.user_id, ''user'', coalesce(u.user_name, r.user_id::text), ''role'', r.role)',
             'left join authz.groups g on g.group_id = r.group_id left join authz.users u on u.user_id = r.user_id',
             'group_id, user_id'),
            ('group_groups', 'membership', 'format(''group %s'', coalesce(g.group_name, r.parent_group_id::text))',
             'jsonb_build_object(''group_id'', r.parent_group_id, ''group'', g.group_name, ''member_group_id'', r.child_group_id, ''member_group'', coalesce(c.group_name, r.child_group_id::text))',
             'left join authz.groups g on g.group_id = r.parent_group_id left join authz.groups c on c.group_id = r.child_group_id',
             'parent_group_id, child_group_id'),
            ('group_directories', 'membership', 'format(''group %s'', coalesce(g.group_name, r.group_id::text))',
             'jsonb_build_object(''group_id'', r.group_id, ''group'', g.group_name, ''directory_id'', r.directory_id, ''everyone_of'', d.directory_name)',
             'left join authz.groups g on g.group_id = r.group_id left join authz.directories d on d.directory_id = r.directory_id',
             'group_id, directory_id')
        ) as v (table_name, what, target, detail, joins, keys)
    loop
        for e in
            select * from (values
                ('insert', 'referencing new table as new_rows'),
                ('update', 'referencing old table as old_rows new table as new_rows'),
                ('delete', 'referencing old table as old_rows'),
                ('truncate', '')
            ) as v (event, rows)
        loop
            execute format('drop trigger zz_audit_%s on authz.%I', e.event, t.table_name);
            execute format('create trigger zz_audit_%s after %s on authz.%I %s
                            for each statement execute function authz.audit_changes(%L, %L, %L, %L, %L)',
                           e.event, e.event, t.table_name, e.rows, t.what, t.target, t.detail, t.joins, t.keys);
        end loop;
        live := live || case live when '' then '' else ' union all ' end
             || format('select %L::text as table_name, %L::text as what, %s as detail from authz.%I r %s',
                       t.table_name, t.what, t.detail, t.table_name, t.joins)
             -- What a sync keeps is not recorded row by row.
             || case t.what when 'membership' then ' where g.directory_id = 0' else '' end;
    end loop;
    execute 'create view authz.audited_state as ' || live;
end $$;

-- Writes the state as it stands into the trail, as the point from which a replay begins: where the records before it
-- are not enough, or not there any more. A part for each thousand rows. Whoever calls it holds off writers of the trail.
create function authz.write_audit_baseline() returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    written integer;
begin
    insert into authz.audit_log (service, actor, action, outcome, target, detail, revision)
    select authz.current_service(), authz.current_actor(), 'audit.baseline', 'succeeded', 'part ' || p.part,
           jsonb_build_object('part', p.part, 'parts', count(*) over (), 'rows', p.rows),
           (select revision from authz.revision)
    from (select n.part, coalesce(jsonb_agg(s.row_json) filter (where s.row_json is not null), '[]') as rows
          from (select jsonb_build_object('table', a.table_name, 'detail', a.detail) as row_json,
                       (row_number() over () - 1) / 1000 as part
                from authz.audited_state a) s
          right join (select generate_series(0, greatest((select count(*) - 1 from authz.audited_state), 0) / 1000) as part) n
                  using (part)
          group by n.part) p
    order by p.part;
    get diagnostics written = row_count;
    return written;
end $$;
revoke execute on function authz.write_audit_baseline() from public;

do $$
begin
    -- The records so far name their rows by name alone; nothing is needed where there is nothing yet.
    if exists (select 1 from authz.audited_state) then
        perform authz.write_audit_baseline();
    end if;
end $$;

-- A seal holds a digest for each of its records, and says which records are its own. No seal was made before this
-- migration, so the columns need no defaults. How all this fits together is told in `crates/authz/src/audit/seal.rs`.
alter table authz.audit_seals
    alter column seal_id drop identity,
    add column format               smallint not null,
    -- The counting of transactions begins anew in another cluster; then a new era begins, and a trail restored there
    -- goes on. The records of an era have numbers above `base_audit_id`.
    add column era                  integer not null,
    add column cluster_id           bigint not null,
    add column base_audit_id        bigint not null,
    -- The highest number given to a record so far, and the next transaction, when this seal was made.
    add column last_audit_id        bigint not null,
    add column next_transaction_id  xid8 not null,
    -- Whether it seals what an era left unsealed.
    add column closing              boolean not null,
    -- Where the next seal begins.
    add column until_transaction_id xid8 not null,
    add column until_audit_id       bigint not null,
    -- The digest over `entries`: for each record its number, its time and its digest (8, 8 and 32 bytes).
    add column records_digest       bytea not null check (octet_length(records_digest) = 32),
    add column entries              bytea not null check (octet_length(entries) = 48 * records),
    add constraint signature_has_its_key check ((key_id is null) = (signature is null));
-- A digest does not compress.
alter table authz.audit_seals alter column entries set storage external;

-- Removes the months that ended before that day, and what it did not move to a month stays. For the retention job
-- alone, which has exported them and writes a baseline for the replay in the same transaction.
create function authz.drop_audit_months(before date) returns text[]
language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' as $$
declare
    partition_name text;
    dropped        text[] := '{}';
begin
    if before > date_trunc('month', clock_timestamp())::date then
        raise exception 'the month under way cannot be dropped' using errcode = 'invalid_parameter_value';
    end if;
    for partition_name in
        select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'authz.audit_log'::regclass and c.relname ~ '^audit_log_[0-9]{6}$'
          and right(c.relname, 6) < to_char(before, 'YYYYMM')
        order by 1
    loop
        execute format('drop table authz.%I', partition_name);
        dropped := dropped || partition_name;
    end loop;
    return dropped;
end $$;
revoke execute on function authz.drop_audit_months(date) from public;
