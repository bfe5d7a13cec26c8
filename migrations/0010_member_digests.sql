-- What a sync need not look at again: each group's digest of its direct members as the directory listed them, and which
-- of those members the mirror cannot answer for by itself. New tables; the triggers lock the tables of memberships, users
-- and groups for a moment. The staging tables are rebuilt for bulk loading; they are empty between runs.

-- INVARIANT: while a group has a row here, what its directory listed is what the mirror has of it, and its outsiders
-- (held by the tests in `crates/dir-sync/tests/digest.rs`). Any change of it takes the row away; the sync writes it last.
create table authz.group_digests (
    group_id bigint primary key references authz.groups on delete cascade,
    digest   bytea not null constraint digest_is_sha256 check (octet_length(digest) = 32),
    -- Memberships of all kinds that the mirror has of the group.
    members  bigint not null check (members >= 0)
);

-- Listed members that are no users or groups of the directory's own mirror: external ones, whether mirrored or not, and
-- those that a conflict keeps out. Each run looks at them again.
create table authz.group_outsiders (
    group_id    bigint not null references authz.group_digests on delete cascade,
    kind        text not null check (kind in ('user', 'group')),
    external_id text not null,
    member_name text,
    role        text not null,
    primary key (group_id, kind, external_id)
);

-- Argument: the column that names the group whose member a row is.
create function authz.forget_digests() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if not exists (select from authz.group_digests) then
        return null;
    end if;
    if tg_op = 'TRUNCATE' then
        delete from authz.group_digests;
        return null;
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        execute format('delete from authz.group_digests where group_id in (select %I from new_rows)', tg_argv[0]);
    end if;
    if tg_op in ('DELETE', 'UPDATE') then
        execute format('delete from authz.group_digests where group_id in (select %I from old_rows)', tg_argv[0]);
    end if;
    return null;
end $$;

do $$
declare
    t record;
    e record;
begin
    for t in
        select * from (values ('group_users', 'group_id'), ('group_groups', 'parent_group_id'), ('group_directories', 'group_id'))
            as v (table_name, group_column)
    loop
        for e in
            select * from (values
                ('insert', 'referencing new table as new_rows'),
                ('update', 'referencing old table as old_rows new table as new_rows'),
                ('delete', 'referencing old table as old_rows'),
                ('truncate', '')
            ) as v (event, rows)
        loop
            execute format('create trigger digest_%s after %s on authz.%I %s for each statement execute function authz.forget_digests(%L)',
                           e.event, e.event, t.table_name, e.rows, t.group_column);
        end loop;
    end loop;
end $$;

-- A member that is another one than before, or comes back, or goes: its groups are looked at again.
create function authz.forget_digests_of_users() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from authz.group_digests) then
        delete from authz.group_digests
        where group_id in (
            select gu.group_id
            from old_rows o
            join new_rows n on n.user_id = o.user_id
            join authz.group_users gu on gu.user_id = o.user_id
            where (o.external_id, o.directory_id, o.status = 'deleted')
                  is distinct from (n.external_id, n.directory_id, n.status = 'deleted'));
    end if;
    return null;
end $$;

create trigger digest_update after update on authz.users
    referencing old table as old_rows new table as new_rows
    for each statement execute function authz.forget_digests_of_users();

create function authz.forget_digests_of_groups() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from authz.group_digests) then
        with other as (
            select o.group_id
            from old_rows o
            join new_rows n on n.group_id = o.group_id
            where (o.external_id, o.directory_id, o.status = 'deleted')
                  is distinct from (n.external_id, n.directory_id, n.status = 'deleted')
        )
        delete from authz.group_digests
        where group_id in (select group_id from other
                           union all
                           select gg.parent_group_id from other join authz.group_groups gg on gg.child_group_id = other.group_id);
    end if;
    return null;
end $$;

create trigger digest_update after update on authz.groups
    referencing old table as old_rows new table as new_rows
    for each statement execute function authz.forget_digests_of_groups();

-- A group that is staged is kept as it is, unless its listing is complete and says otherwise.
alter table authz.sync_stage_groups
    add column members_listed boolean not null default false,
    add column members_digest bytea;

-- Users of the mirror whom the directory does not list as the mirror has them: changed ones, who are staged, and the rest.
create unlogged table authz.sync_stage_unseen_users (
    run_id  bigint not null,
    user_id bigint not null,
    primary key (run_id, user_id)
);

-- Rows come in bulk and without duplicates; two long unique keys cost more than all the rest of a first load.
alter table authz.sync_stage_members drop constraint sync_stage_members_pkey;
create index sync_stage_members_by_group on authz.sync_stage_members (run_id, group_external_id);
alter table authz.sync_plan_members drop constraint sync_plan_members_pkey;
create index sync_plan_members_by_group on authz.sync_plan_members (run_id, group_external_id);
