-- The audit trail: records that nobody changes afterwards, and the seals that will show if somebody did.
-- New tables; triggers on the tables of grants and memberships.

create table authz.audit_log (
    audit_id       bigint generated always as identity primary key,
    recorded_at    timestamptz not null default clock_timestamp(),
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
    transaction_id xid8 not null default pg_current_xact_id()
);
create index audit_log_by_time on authz.audit_log (recorded_at, audit_id);
create index audit_log_by_actor on authz.audit_log (actor, audit_id);
create index audit_log_by_action on authz.audit_log (action, audit_id);

-- One link of the chain: a digest over the records that became final since the seal before.
create table authz.audit_seals (
    seal_id         bigint generated always as identity primary key,
    sealed_at       timestamptz not null default clock_timestamp(),
    horizon         xid8 not null,
    records         bigint not null check (records >= 0),
    digest          bytea not null check (octet_length(digest) = 32),
    previous_digest bytea check (octet_length(previous_digest) = 32),
    key_id          text,
    signature       bytea
);

create function authz.refuse_change() returns trigger
language plpgsql as $$
begin
    raise exception 'authz.% is append-only: % is not possible', tg_table_name, lower(tg_op)
        using errcode = 'restrict_violation';
end $$;

create trigger append_only before update or delete or truncate on authz.audit_log
    for each statement execute function authz.refuse_change();
create trigger append_only before update or delete or truncate on authz.audit_seals
    for each statement execute function authz.refuse_change();

-- Who acts in this transaction: what the library has set, else the database user.
create function authz.current_actor() returns text
language sql stable
return coalesce(nullif(current_setting('authz.actor', true), ''), session_user::text);

create function authz.current_service() returns text
language sql stable
return coalesce(nullif(current_setting('authz.service', true), ''), nullif(current_setting('application_name'), ''), 'unknown');

-- Records every change of a grant or a membership in the transaction that makes it. The memberships that a
-- sync changes are not recorded one by one: the sync's own record stands for them.
-- Arguments: what is changed; the record's target; its detail; joins for the names; the key columns.
create function authz.audit_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    change record;
begin
    if tg_argv[0] = 'membership' and coalesce(current_setting('authz.sync_run', true), '') <> '' then
        return null;
    end if;
    if tg_op = 'TRUNCATE' then
        insert into authz.audit_log (service, actor, action, outcome, target, request_id, revision)
        select authz.current_service(), authz.current_actor(), tg_argv[0] || '.remove', 'succeeded',
               'all of ' || tg_table_name, nullif(current_setting('authz.request_id', true), ''), r.revision
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

do $$
declare
    t record;
    e record;
begin
    -- Left joins: a record is written even where the other row is gone, with the number in place of the name.
    for t in
        select * from (values
            ('user_actions', 'grant', 'format(''user %s'', coalesce(u.user_name, r.user_id::text))',
             'jsonb_build_object(''user'', u.user_name, ''grant'', r.action_name, ''granted_by'', r.granted_by, ''expires_at'', r.expires_at, ''reason'', r.reason)',
             'left join authz.users u on u.user_id = r.user_id', 'user_id, action_name'),
            ('group_actions', 'grant', 'format(''group %s'', coalesce(g.group_name, r.group_id::text))',
             'jsonb_build_object(''group'', g.group_name, ''grant'', r.action_name, ''granted_by'', r.granted_by, ''expires_at'', r.expires_at, ''reason'', r.reason)',
             'left join authz.groups g on g.group_id = r.group_id', 'group_id, action_name'),
            ('group_users', 'membership', 'format(''group %s'', coalesce(g.group_name, r.group_id::text))',
             'jsonb_build_object(''group'', g.group_name, ''user'', coalesce(u.user_name, r.user_id::text), ''role'', r.role)',
             'left join authz.groups g on g.group_id = r.group_id left join authz.users u on u.user_id = r.user_id',
             'group_id, user_id'),
            ('group_groups', 'membership', 'format(''group %s'', coalesce(g.group_name, r.parent_group_id::text))',
             'jsonb_build_object(''group'', g.group_name, ''member_group'', coalesce(c.group_name, r.child_group_id::text))',
             'left join authz.groups g on g.group_id = r.parent_group_id left join authz.groups c on c.group_id = r.child_group_id',
             'parent_group_id, child_group_id'),
            ('group_directories', 'membership', 'format(''group %s'', coalesce(g.group_name, r.group_id::text))',
             'jsonb_build_object(''group'', g.group_name, ''everyone_of'', d.directory_name)',
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
            execute format('create trigger zz_audit_%s after %s on authz.%I %s
                            for each statement execute function authz.audit_changes(%L, %L, %L, %L, %L)',
                           e.event, e.event, t.table_name, e.rows, t.what, t.target, t.detail, t.joins, t.keys);
        end loop;
    end loop;
end $$;
