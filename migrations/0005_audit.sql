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
-- Arguments: what is changed; the columns that name it, as (holder, object).
create function authz.audit_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    verb text := case tg_op when 'INSERT' then 'add' when 'DELETE' then 'remove' else 'change' end;
    rows text := case tg_op when 'DELETE' then 'old_rows' else 'new_rows' end;
    act  text := authz.current_actor();
begin
    if tg_argv[0] = 'membership' and coalesce(current_setting('authz.sync_run', true), '') <> '' then
        return null;
    end if;
    execute format(
        'insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
         select authz.current_service(), %s, $1, ''succeeded'', %s, %s,
                nullif(current_setting(''authz.request_id'', true), ''''), (select revision from authz.revision)
         from %I r %s',
        case when tg_argv[0] = 'grant' and tg_op <> 'DELETE' then 'r.granted_by' else '$2' end,
        tg_argv[1], tg_argv[2], rows, tg_argv[3])
    using tg_argv[0] || '.' || verb, act;
    return null;
end $$;

do $$
declare
    t record;
    e record;
begin
    for t in
        select * from (values
            ('user_actions', 'grant', 'format(''user %s'', u.user_name)',
             'jsonb_build_object(''user'', u.user_name, ''grant'', r.action_name, ''granted_by'', r.granted_by, ''expires_at'', r.expires_at, ''reason'', r.reason)',
             'join authz.users u on u.user_id = r.user_id'),
            ('group_actions', 'grant', 'format(''group %s'', g.group_name)',
             'jsonb_build_object(''group'', g.group_name, ''grant'', r.action_name, ''granted_by'', r.granted_by, ''expires_at'', r.expires_at, ''reason'', r.reason)',
             'join authz.groups g on g.group_id = r.group_id'),
            ('group_users', 'membership', 'format(''group %s'', g.group_name)',
             'jsonb_build_object(''group'', g.group_name, ''user'', u.user_name, ''role'', r.role)',
             'join authz.groups g on g.group_id = r.group_id join authz.users u on u.user_id = r.user_id'),
            ('group_groups', 'membership', 'format(''group %s'', g.group_name)',
             'jsonb_build_object(''group'', g.group_name, ''member_group'', c.group_name)',
             'join authz.groups g on g.group_id = r.parent_group_id join authz.groups c on c.group_id = r.child_group_id'),
            ('group_directories', 'membership', 'format(''group %s'', g.group_name)',
             'jsonb_build_object(''group'', g.group_name, ''everyone_of'', d.directory_name)',
             'join authz.groups g on g.group_id = r.group_id join authz.directories d on d.directory_id = r.directory_id')
        ) as v (table_name, what, target, detail, joins)
    loop
        for e in
            select * from (values
                ('insert', 'referencing new table as new_rows'),
                ('update', 'referencing old table as old_rows new table as new_rows'),
                ('delete', 'referencing old table as old_rows')
            ) as v (event, rows)
        loop
            execute format('create trigger zz_audit_%s after %s on authz.%I %s
                            for each statement execute function authz.audit_changes(%L, %L, %L, %L)',
                           e.event, e.event, t.table_name, e.rows, t.what, t.target, t.detail, t.joins);
        end loop;
    end loop;
end $$;
