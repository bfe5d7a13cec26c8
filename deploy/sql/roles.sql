-- Database roles with the least that each needs. Run it as the owner of the schema `authz` (who ran `dir-sync migrate`)
-- with the right to create roles, and again after each `dir-sync migrate`: it may run any number of times.
--
--     psql -v ON_ERROR_STOP=1 -f deploy/sql/roles.sql
--     create role dashboard login in role authz_service;
--     create role dir_sync login in role authz_sync;
--
-- authz_reader   asks: checks, lists, `authz.can`, snapshots. Not the audit trail.
-- authz_service  a service: asks, registers its actions, writes audit records. Cannot change who is in what or may what.
-- authz_sync     dir-sync: writes users, groups and memberships. Cannot grant, nor register actions.
-- authz_auditor  the job that keeps the trail: sweeps up, seals, verifies, exports, and drops old months. Changes no rights.
-- authz_admin    people, by `authz-cli` or psql: users, groups, memberships, actions and grants; reads the audit trail.
--
-- Of these nobody can change an audit record, or write one under another database user, at another time or in another
-- transaction than it was; and nobody remove one but the auditor, by whole months that are sealed. The auditor writes the
-- seals, too; so keep exports, and checkpoints of the chain, where whoever has that role cannot change them.

-- They hold only where nobody else can create in a schema of their search path: an operator, function or aggregate of
-- somebody's in `public` that fits a call better than PostgreSQL's own runs with the rights of whoever comes by.

do $$
begin
    if exists (select from pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a
               where n.nspname = 'public' and a.grantee = 0 and a.privilege_type = 'CREATE') then
        raise warning 'everybody may create in schema public of this database, and so act with the rights of these roles'
            using hint = 'revoke create on schema public from public';
    end if;
end $$;

do $$
declare
    wanted text;
begin
    foreach wanted in array array['authz_reader', 'authz_service', 'authz_sync', 'authz_auditor', 'authz_admin'] loop
        begin
            execute format('create role %I nologin', wanted);
        exception when duplicate_object or unique_violation then
            null; -- it is there, or somebody makes it at this moment
        end;
    end loop;
end $$;

begin;

revoke all on schema authz from public;
revoke all on all tables in schema authz from public, authz_reader, authz_service, authz_sync, authz_auditor, authz_admin;
revoke execute on all functions in schema authz from public, authz_reader, authz_service, authz_sync, authz_auditor, authz_admin;
grant usage on schema authz to authz_reader, authz_service, authz_sync, authz_auditor, authz_admin;

-- What a decision is made of, and how fresh it is.
grant select on
    authz.directories, authz.users, authz.groups, authz.group_users, authz.group_groups, authz.group_directories,
    authz.group_ancestors, authz.group_reach, authz.actions, authz.user_actions, authz.group_actions,
    authz.revision, authz.changes, authz.sync_runs, authz.sync_leases, authz._sqlx_migrations
    to authz_reader, authz_service, authz_sync, authz_auditor, authz_admin;
grant execute on function authz.can(text, text), authz.covering(text)
    to authz_reader, authz_service, authz_sync, authz_auditor, authz_admin;

-- A service says what it can do, but not who may.
grant insert, update (description) on authz.actions to authz_service;

-- A sync: the mirror, its own record and its staging area.
grant insert, update (customer_id, last_complete_sync_at) on authz.directories to authz_sync;
grant insert, update on authz.users, authz.groups to authz_sync;
grant insert, update, delete on authz.group_users, authz.group_groups, authz.group_directories to authz_sync;
grant insert, update on authz.sync_runs to authz_sync;
grant insert, update, delete on authz.sync_leases to authz_sync;
do $$
declare
    staging text;
begin
    -- Staged and planned rows are the sync's own; which tables there are is the business of the migrations.
    for staging in
        select c.relname from pg_class c
        where c.relnamespace = 'authz'::regnamespace and c.relkind = 'r'
          and (c.relname like 'sync\_stage\_%' or c.relname like 'sync\_plan\_%')
    loop
        execute format('grant select, insert, update, delete on authz.%I to authz_sync', staging);
    end loop;
end $$;
grant select, insert, update, delete on authz.group_digests, authz.group_outsiders to authz_sync;
grant execute on function authz.hold_revision(), authz.analyze_staging(),
    authz.watch_session(integer, timestamptz, interval) to authz_sync;

-- People: what is kept by hand, and who may do what.
grant insert, update on authz.users, authz.groups to authz_admin;
grant insert, update, delete on authz.group_users, authz.group_groups, authz.group_directories to authz_admin;
grant insert, update, delete on authz.actions, authz.user_actions, authz.group_actions to authz_admin;
grant select on authz.audit_log, authz.audit_seals to authz_admin;
grant execute on function authz.hold_revision() to authz_admin;

-- Operations: which are under way, and whose.
grant select, insert, update, delete on authz.operation_owners, authz.open_operations
    to authz_service, authz_admin, authz_auditor;
grant select on authz.audit_eras to authz_service, authz_sync, authz_admin, authz_auditor;
grant execute on function authz.note_audit_era() to authz_service, authz_sync, authz_admin, authz_auditor;
grant execute on function authz.sweep_operations(interval), authz.disown_operations(bigint, bigint[])
    to authz_service, authz_admin, authz_auditor;

-- The trail: whole, and its months. `drop_audit_months` drops a month only once all of it is sealed; that it is exported
-- and the export read back before is the work of `authz audit prune`.
grant select on all tables in schema authz to authz_auditor;
grant insert on authz.audit_seals to authz_auditor;
grant select on sequence authz.audit_log_audit_id_seq to authz_auditor;
grant execute on function authz.make_audit_partition(date), authz.make_audit_partitions(integer),
    authz.hold_audit_trail(boolean), authz.drop_audit_months(date), authz.write_audit_baseline(),
    authz.note_audit_prune(jsonb) to authz_auditor;

-- Audit records: what the writer says, while the database itself says who, when and in which transaction. Writers find their
-- own records again by number, and read no more of them.
grant execute on function authz.current_actor(), authz.current_service() to authz_service, authz_sync, authz_auditor, authz_admin;
do $$
declare
    told text;
begin
    select string_agg(quote_ident(a.attname), ', ') into told
    from pg_attribute a
    where a.attrelid = 'authz.audit_log'::regclass and a.attnum > 0 and not a.attisdropped
      and a.attname not in ('audit_id', 'recorded_at', 'database_user', 'transaction_id', 'by_database');
    execute format('grant insert (%s), select (audit_id, recorded_at, transaction_id, operation_id, outcome) on authz.audit_log to authz_service, authz_sync, authz_auditor, authz_admin', told);
end $$;

commit;
