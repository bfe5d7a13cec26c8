-- What the trail said and was not so, or did not say. In one statement of many parts, a row can be given and taken again by a
-- trigger: its records ended with the giving (0025 is the other way round). A user's `external_id`, which says whose login
-- it is, was in no record. A record was refused that came while the partition of its month was made. And the jobs of
-- the trail could be talked into writing what later readers stumble over. Replaces functions, and triggers of `users`, `groups`
-- and `actions`, which it locks for a moment.

-- As in 0025, but what came and is not there is told to have gone.
create or replace function authz.audit_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' as $$
declare
    live   constant text := format('authz.%I', tg_table_name);
    gone   text;
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
    -- A trigger that ran before this one, or a part of the statement, may have taken what came.
    gone := format('not exists (select from %s l where %s)', live,
                   (select string_agg(format('l.%1$I = n.%1$I', key), ' and ') from unnest(string_to_array(tg_argv[4], ', ')) key));
    -- An update that moves a row to another key ends one grant and makes another.
    for change in
        select * from (values
            (1, 'INSERT', 'add', 'new_rows', 'true'),
            (1, 'DELETE', 'remove', 'old_rows', 'true'),
            (2, 'DELETE', 'change', live, format('(%s) in (select %1$s from old_rows)', tg_argv[4])),
            (1, 'UPDATE', 'remove', 'old_rows', format('(%s) not in (select %1$s from new_rows)', tg_argv[4])),
            (2, 'UPDATE', 'add', 'new_rows', format('(%s) not in (select %1$s from old_rows)', tg_argv[4])),
            (3, 'UPDATE', 'change', 'new_rows', format('(%s) in (select %1$s from old_rows)', tg_argv[4])),
            (4, 'UPDATE', 'change', live,
             format('(%s) in (select %1$s from old_rows except select %1$s from new_rows)', tg_argv[4])),
            (5, 'INSERT', 'remove', 'new_rows', gone),
            (5, 'UPDATE', 'remove', 'new_rows', gone)
        ) as v (step, op, verb, row_source, condition)
        where v.op = tg_op
        order by v.step
    loop
        execute format(
            'insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
             select authz.current_service(), %s, $1, ''succeeded'', %s, %s,
                    nullif(current_setting(''authz.request_id'', true), ''''), (select revision from authz.revision)
             from (select * from %s n where %s) r %s',
            case when tg_argv[0] = 'grant' and tg_op = 'INSERT' and change.verb = 'add' then 'r.granted_by' else 'authz.current_actor()' end,
            tg_argv[1], tg_argv[2], change.row_source, change.condition, tg_argv[3])
        using tg_argv[0] || '.' || change.verb;
    end loop;
    return null;
end $$;

-- As in 0022, but a grant that came and is not there reaches nobody.
create or replace function authz.reach_by_grants() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from authz.group_reach;
        return null;
    end if;
    if tg_op = 'DELETE' then
        delete from authz.group_reach re using old_rows o
        where re.holder_id = o.group_id and re.action_name = o.action_name collate "C"
          and not exists (select from authz.group_actions ga
                          where ga.group_id = o.group_id and ga.action_name = o.action_name);
    end if;
    if tg_op = 'UPDATE' then
        delete from authz.group_reach re
        using (select o.group_id, o.action_name from old_rows o
               except select ga.group_id, ga.action_name
               from old_rows o join authz.group_actions ga using (group_id, action_name)) gone
        where re.holder_id = gone.group_id and re.action_name = gone.action_name collate "C";
        insert into authz.group_reach (group_id, action_name, holder_id, depth)
        select an.group_id, came.action_name, an.ancestor_id, an.depth
        from (select n.group_id, n.action_name from new_rows n
              except select o.group_id, o.action_name from old_rows o) came
        join authz.group_actions ga on ga.group_id = came.group_id and ga.action_name = came.action_name
        join authz.group_ancestors an on an.ancestor_id = came.group_id
        on conflict (group_id, action_name, holder_id) do nothing;
    end if;
    if tg_op = 'INSERT' then
        insert into authz.group_reach (group_id, action_name, holder_id, depth)
        select an.group_id, n.action_name, an.ancestor_id, an.depth
        from new_rows n
        join authz.group_actions ga on ga.group_id = n.group_id and ga.action_name = n.action_name
        join authz.group_ancestors an on an.ancestor_id = n.group_id
        on conflict (group_id, action_name, holder_id) do nothing;
    end if;
    return null;
end $$;

-- As in 0013, but a user has the `sub` behind the directory, and what is there is not told to have gone:
--   state.users    {"users": [[user_id, user_name, status, directory_id, external_id], …]}
create or replace function authz.state_queries()
returns table (table_name text, action text, kind text, occasion text, all_rows text, inserted text, updated text, deleted text)
language sql immutable
begin atomic
    select v.table_name, 'state.' || v.table_name, v.kind, 'always',
           format('select %L as key, null::bigint as owner_id, %s as item, r.%I as name from authz.%I r', v.added, v.item, v.name, v.table_name),
           format('select %L as key, null::bigint as owner_id, %s as item, r.%I as name from new_rows r', v.added, v.item, v.name),
           format('select %L as key, null::bigint as owner_id, %s as item, r.%I as name
                   from new_rows r left join old_rows o using (%I) where %s is distinct from %s
                   union all
                   select %L, null, %s, r.%I from old_rows r where not exists (select from new_rows n where n.%I = r.%I)',
                  v.added, v.item, v.name, v.id, v.item, replace(v.item, 'r.', 'o.'),
                  v.removed, v.gone, v.name, v.id, v.id),
           format('select %L as key, null::bigint as owner_id, %s as item, r.%I as name from old_rows r
                   where not exists (select from authz.%I l where l.%I = r.%I)',
                  v.removed, v.gone, v.name, v.table_name, v.id, v.id)
    from (values
        ('users', 'user', 'users', 'users', 'user_id', 'user_name',
         'jsonb_build_array(r.user_id, r.user_name, r.status, r.directory_id, r.external_id)',
         'jsonb_build_array(r.user_id, r.user_name, ''deleted'', r.directory_id, r.external_id)'),
        ('groups', 'group', 'groups', 'groups', 'group_id', 'group_name',
         'jsonb_build_array(r.group_id, r.group_name, r.status)',
         'jsonb_build_array(r.group_id, r.group_name, ''deleted'')'),
        ('actions', 'action', 'added', 'removed', 'action_name', 'action_name',
         'to_jsonb(r.action_name)', 'to_jsonb(r.action_name)')
    ) as v (table_name, kind, added, removed, id, name, item, gone)
    union all
    select v.table_name, 'state.members', 'group', 'sync',
           -- Those of local groups are in the baseline of grants and of memberships made by hand.
           format(v.form, 'added', 'authz.' || v.table_name) || ' where g.directory_id <> 0',
           format(v.form, 'added', 'new_rows'),
           format(v.form, 'added', 'new_rows') || format(v.other, 'old_rows') || ' union all '
               || format(v.form, 'removed', 'old_rows') || format(v.other, 'new_rows'),
           format(v.form, 'removed', 'old_rows')
    from (select m.table_name,
                 format('select %%L as key, r.%1$I as owner_id, to_jsonb(r.%2$I) as item, coalesce(g.group_name, r.%1$I::text) as name
                         from %%s r left join authz.groups g on g.group_id = r.%1$I', m.owner, m.member) as form,
                 format(' where (r.%1$I, r.%2$I) not in (select %1$I, %2$I from %%s)', m.owner, m.member) as other
          from (values ('group_users', 'group_id', 'user_id'), ('group_groups', 'parent_group_id', 'child_group_id'),
                       ('group_directories', 'group_id', 'directory_id')) as m (table_name, owner, member)) v;
end;

do $$
declare
    t record;
    e record;
begin
    for t in select * from authz.state_queries() where table_name in ('users', 'groups', 'actions') loop
        for e in
            select * from (values
                ('insert', 'referencing new table as new_rows', t.inserted),
                ('update', 'referencing old table as old_rows new table as new_rows', t.updated),
                ('delete', 'referencing old table as old_rows', t.deleted)
            ) as v (event, rows, query)
        loop
            execute format('create or replace trigger zz_state_%s after %s on authz.%I %s
                            for each statement execute function authz.audit_state(%L, %L, %L, %L)',
                           e.event, e.event, t.table_name, e.rows, t.action, t.kind, e.query, t.occasion);
        end loop;
    end loop;
end $$;

-- As in 0012, but who writes at that moment is not refused.
create or replace function authz.make_audit_partition(first_day date) returns boolean
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
    if exists (select from (values (interval '0'), ('1 minute')) soon (ahead)
               where to_regclass(format('authz.audit_log_%s', to_char(clock_timestamp() + ahead, 'YYYYMM'))) is null) then
        -- Who writes now writes to the default partition: whoever waits must wait for the whole, and then looks for its part
        -- anew. Whichever month this is, as that of today may follow in this transaction.
        lock table authz.audit_log in access exclusive mode;
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

-- As in 0021, but never with the mark of what the database writes of itself: the caller says what they say.
create or replace function authz.sweep_operations(older_than interval) returns bigint
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
    insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision, operation_id,
                                 by_database)
    select s.service, s.actor, s.action, 'abandoned', s.target,
           jsonb_build_object('reason', 'the process that ran it is gone', 'swept_by', authz.current_service()),
           s.request_id, s.revision, s.audit_id, false
    from closed c
    join authz.audit_log s on s.audit_id = c.audit_id and s.recorded_at = c.recorded_at and s.outcome = 'started';
    get diagnostics swept = row_count;
    return swept;
end $$;

create or replace function authz.disown_operations(of_owner bigint, numbers bigint[]) returns setof bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    return query
    with closed as (
        delete from authz.open_operations o where o.owner_id = of_owner and o.number = any (numbers)
        returning o.audit_id, o.recorded_at, o.number
    ),
    told as (
        insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision, operation_id,
                                     by_database)
        select s.service, s.actor, s.action, 'abandoned', s.target,
               jsonb_build_object('reason', 'it was never run, since its start could not be confirmed'),
               s.request_id, s.revision, s.audit_id, false
        from closed c
        join authz.audit_log s on s.audit_id = c.audit_id and s.recorded_at = c.recorded_at and s.outcome = 'started'
    )
    select c.number from closed c;
end $$;

-- As in 0020, but for numbers only that the trail can have.
create or replace function authz.note_audit_prune(told jsonb) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    key     text;
    written bigint;
begin
    foreach key in array array['before_micros', 'through_seal'] loop
        if told ? key and (jsonb_typeof(told -> key) <> 'number'
                           or (told ->> key)::numeric not between -9223372036854775808 and 9223372036854775807) then
            raise exception '% is no number that fits into eight bytes: %', key, told -> key
                using errcode = 'invalid_parameter_value';
        end if;
    end loop;
    insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, by_database)
    values (authz.current_service(), authz.current_actor(), 'audit.prune', 'succeeded', 'audit_log', told,
            nullif(current_setting('authz.request_id', true), ''), true)
    returning audit_id into written;
    return written;
end $$;

-- As in 0020, but it sees to it itself that no change is under way and that it sees the newest. Of users who are there already the
-- trail has the `sub` from the next baseline on.
create or replace function authz.write_audit_baseline() returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' set lock_timeout = '5s' as $$
declare
    written integer;
begin
    if current_setting('transaction_isolation') in ('repeatable read', 'serializable') then
        raise exception 'a baseline is written in a transaction that is read committed: any other does not see the newest rows'
            using errcode = 'invalid_transaction_state';
    end if;
    -- Who has changed something and has no record of it yet, writes it after this one.
    lock table authz.audit_log in share row exclusive mode;
    perform set_config('authz.writes_itself', 'yes', true);
    written := authz.write_whole_baseline();
    perform set_config('authz.writes_itself', '', true);
    return written;
end $$;
