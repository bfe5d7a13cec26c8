-- Operations under way and which process runs each, so that a sweeper can tell a start whose process is gone from one that
-- takes long; the order in which the trail is read; and what the trail must hold to say who could do what at any time.
-- New tables; indexes on audit_log, which lock it against writes while they are built; triggers on the tables of users,
-- groups, memberships and actions (locks them briefly), whose state is written into the trail once.

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

-- What a replay of the trail needs beside the records of grants and of memberships made by hand: users, groups and
-- actions, and the memberships that syncs change. A record holds many rows, as lists of their numbers:
--   state.users    {"users": [[user_id, user_name, status, directory_id], …]}     as they are from now on
--   state.groups   {"groups": [[group_id, group_name, status], …]}                as they are from now on
--   state.members  {"table": …, "group_id": …, "added" or "removed": [number, …]}
--   state.actions  {"added" or "removed": [action_name, …]}
-- The statement that writes them from a query of (key, owner_id, item, name): a record for each thousand rows of an owner.
create function authz.state_sql(action text, kind text, table_name text, rows_query text) returns text
language sql immutable
return format(
    $sql$
    insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
    select authz.current_service(), authz.current_actor(), %L, 'succeeded',
           case when min(p.name) = max(p.name) then %L || ' ' || min(p.name) else count(*) || ' ' || %L || 's' end,
           case when p.owner_id is null then '{}' else jsonb_build_object('table', %L::text, 'group_id', p.owner_id) end
               || jsonb_build_object(p.key, jsonb_agg(p.item)),
           nullif(current_setting('authz.request_id', true), ''), (select revision from authz.revision)
    from (select q.*, (row_number() over (partition by q.key, q.owner_id) - 1) / 1000 as part from (%s) q) p
    group by p.key, p.owner_id, p.part
    order by p.key, p.owner_id, p.part
    $sql$,
    action, kind, kind, table_name, rows_query);

-- Arguments: the action of the record; what a row is; the query; whether a sync is the only occasion.
create function authz.audit_state() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_argv[3] = 'sync' and coalesce(current_setting('authz.sync_run', true), '') = '' then
        return null;
    end if;
    if tg_op = 'TRUNCATE' then
        insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
        select authz.current_service(), authz.current_actor(), tg_argv[0], 'succeeded', 'all of ' || tg_table_name,
               jsonb_build_object('emptied', tg_table_name), nullif(current_setting('authz.request_id', true), ''),
               r.revision
        from authz.revision r;
    else
        execute authz.state_sql(tg_argv[0], tg_argv[1], tg_table_name, tg_argv[2]);
    end if;
    return null;
end $$;

-- The queries: of all rows for a baseline, and of those that a statement inserted, updated and deleted.
create function authz.state_queries()
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
           format('select %L as key, null::bigint as owner_id, %s as item, r.%I as name from old_rows r', v.removed, v.gone, v.name)
    from (values
        ('users', 'user', 'users', 'users', 'user_id', 'user_name',
         'jsonb_build_array(r.user_id, r.user_name, r.status, r.directory_id)',
         'jsonb_build_array(r.user_id, r.user_name, ''deleted'', r.directory_id)'),
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
    for t in select * from authz.state_queries() loop
        for e in
            select * from (values
                ('insert', 'referencing new table as new_rows', t.inserted),
                ('update', 'referencing old table as old_rows new table as new_rows', t.updated),
                ('delete', 'referencing old table as old_rows', t.deleted),
                ('truncate', '', '')
            ) as v (event, rows, query)
        loop
            execute format('create trigger zz_state_%s after %s on authz.%I %s
                            for each statement execute function authz.audit_state(%L, %L, %L, %L)',
                           e.event, e.event, t.table_name, e.rows, t.action, t.kind, e.query, t.occasion);
        end loop;
    end loop;
end $$;

-- The state as it stands, as the point from which a replay can begin: grants and local memberships as in 0012, and then
-- what that does not hold.
alter function authz.write_audit_baseline() rename to write_rights_baseline;
create function authz.write_audit_baseline() returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    t       record;
    parts   integer;
    written integer := authz.write_rights_baseline();
begin
    for t in select * from authz.state_queries() q order by q.table_name loop
        execute authz.state_sql(t.action, t.kind, t.table_name, t.all_rows);
        get diagnostics parts = row_count;
        written := written + parts;
    end loop;
    -- From here on the trail holds everything.
    insert into authz.audit_log (service, actor, action, outcome, target, revision)
    select authz.current_service(), authz.current_actor(), 'state.baseline', 'succeeded', format('%s records', written), r.revision
    from authz.revision r;
    return written + 1;
end $$;
revoke execute on function authz.write_audit_baseline() from public;

do $$
begin
    if exists (select from authz.users) or exists (select from authz.groups) or exists (select from authz.actions) then
        perform authz.write_audit_baseline();
    end if;
end $$;
