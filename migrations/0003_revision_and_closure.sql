-- The revision, what each revision changed, and the closure of the group graph. All three are kept by
-- triggers, so a change by hand in psql counts like one made by the library. New tables; triggers on ours.

-- One row. Whoever changes something that can alter a decision locks it until commit, hence commit order is
-- revision order, and closure maintenance never runs twice at once.
create table authz.revision (revision bigint not null);
create unique index revision_is_one_row on authz.revision ((true));
insert into authz.revision (revision) values (1);

create table authz.changes (
    change_id    bigint generated always as identity primary key,
    revision     bigint not null,
    -- The table that changed, in the singular; `reload` stands for more than can be listed.
    kind         text not null check (kind in ('user', 'group', 'group_user', 'group_group', 'group_directory',
                                               'action', 'user_action', 'group_action', 'reload')),
    user_id      bigint,
    group_id     bigint,
    action_name  text,
    changed_at   timestamptz not null default statement_timestamp()
);
create index changes_by_revision on authz.changes (revision);

create function authz.lock_revision() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    -- INVARIANT: taken before the first row is, so two writers queue here and cannot deadlock later
    -- (held by the test `concurrent_edges_give_one_right_closure`).
    perform 1 from authz.revision for update;
    return null;
end $$;

-- Arguments: the kind; the key columns as (user_id, group_id, action_name); the columns that decide.
create function authz.note_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    most      constant integer := 10000;
    keys      text;
    touched   bigint;
    current   bigint;
begin
    if tg_op = 'TRUNCATE' then
        touched := most + 1;
    else
        keys := case tg_op
            when 'INSERT' then format('select %s from new_rows', tg_argv[2])
            when 'DELETE' then format('select %s from old_rows', tg_argv[2])
            else format('(select %1$s from old_rows except select %1$s from new_rows) union all
                         (select %1$s from new_rows except select %1$s from old_rows)', tg_argv[2])
        end;
        execute format('select count(*) from (select 1 from (%s) k limit %s) c', keys, most + 1) into touched;
        if touched = 0 then
            return null;
        end if;
    end if;

    update authz.revision set revision = revision + 1 returning revision into current;
    if touched > most then
        insert into authz.changes (revision, kind) values (current, 'reload');
    else
        execute format('insert into authz.changes (revision, kind, user_id, group_id, action_name)
                        select distinct $1, $2, %s from (%s) k', tg_argv[1], keys)
            using current, tg_argv[0];
    end if;
    perform pg_notify('authz_revision', current::text);
    return null;
end $$;

do $$
declare
    t record;
begin
    for t in
        select * from (values
            ('users', 'user', 'user_id, null::bigint, null::text', 'user_id, user_name, directory_id, external_id, status'),
            ('groups', 'group', 'null::bigint, group_id, null::text', 'group_id, group_name, directory_id, status'),
            ('group_users', 'group_user', 'user_id, group_id, null::text', 'user_id, group_id'),
            ('group_groups', 'group_group', 'null::bigint, child_group_id, null::text', 'parent_group_id, child_group_id'),
            ('group_directories', 'group_directory', 'null::bigint, group_id, null::text', 'group_id, directory_id'),
            ('actions', 'action', 'null::bigint, null::bigint, action_name', 'action_name'),
            ('user_actions', 'user_action', 'user_id, null::bigint, action_name', 'user_id, action_name, expires_at'),
            ('group_actions', 'group_action', 'null::bigint, group_id, action_name', 'group_id, action_name, expires_at')
        ) as v (table_name, kind, keys, decides)
    loop
        execute format('create trigger a_lock_revision before insert or update or delete or truncate on authz.%I
                        for each statement execute function authz.lock_revision()', t.table_name);
        execute format('create trigger z_note_insert after insert on authz.%I referencing new table as new_rows
                        for each statement execute function authz.note_changes(%L, %L, %L)',
                       t.table_name, t.kind, t.keys, t.decides);
        execute format('create trigger z_note_update after update on authz.%I
                        referencing old table as old_rows new table as new_rows
                        for each statement execute function authz.note_changes(%L, %L, %L)',
                       t.table_name, t.kind, t.keys, t.decides);
        execute format('create trigger z_note_delete after delete on authz.%I referencing old table as old_rows
                        for each statement execute function authz.note_changes(%L, %L, %L)',
                       t.table_name, t.kind, t.keys, t.decides);
        execute format('create trigger z_note_truncate after truncate on authz.%I
                        for each statement execute function authz.note_changes(%L, %L, %L)',
                       t.table_name, t.kind, t.keys, t.decides);
    end loop;
end $$;

-- The closure of group_groups: each group is its own ancestor at depth 0; depth is the shortest way up.
create table authz.group_ancestors (
    group_id    bigint not null references authz.groups,
    ancestor_id bigint not null references authz.groups,
    depth       integer not null check (depth >= 0),
    primary key (group_id, ancestor_id),
    constraint self_is_depth_zero check ((depth = 0) = (group_id = ancestor_id))
);
create index group_ancestors_by_ancestor on authz.group_ancestors (ancestor_id, group_id);

create function authz.close_new_groups() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    insert into authz.group_ancestors (group_id, ancestor_id, depth) select group_id, group_id, 0 from new_rows;
    return null;
end $$;

create trigger close_new_groups after insert on authz.groups referencing new table as new_rows
    for each statement execute function authz.close_new_groups();

-- Computes anew what lies above the given groups and everything below them: breadth first, so a cycle ends
-- where it began and each depth is the shortest.
create function authz.close_below(changed bigint[]) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    affected bigint[];
    level    integer := 0;
begin
    if changed is null then
        return;
    end if;
    -- Below by the closure as it was, and by the edges as they are: a removed edge shows in the first alone,
    -- a new one in the second alone.
    with recursive below (group_id) as (
        select group_id from authz.group_ancestors where ancestor_id = any (changed)
        union
        select e.child_group_id from below b join authz.group_groups e on e.parent_group_id = b.group_id
    )
    select array_agg(group_id) into affected from below;

    delete from authz.group_ancestors where group_id = any (affected) and depth > 0;
    loop
        insert into authz.group_ancestors (group_id, ancestor_id, depth)
        select distinct a.group_id, e.parent_group_id, level + 1
        from authz.group_ancestors a
        join authz.group_groups e on e.child_group_id = a.ancestor_id
        where a.group_id = any (affected) and a.depth = level and e.parent_group_id <> a.group_id
        on conflict (group_id, ancestor_id) do nothing;
        exit when not found;
        level := level + 1;
    end loop;
end $$;

create function authz.close_changed_edges() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'INSERT' then
        perform authz.close_below((select array_agg(distinct child_group_id) from new_rows));
    elsif tg_op = 'DELETE' then
        perform authz.close_below((select array_agg(distinct child_group_id) from old_rows));
    elsif tg_op = 'UPDATE' then
        perform authz.close_below((select array_agg(distinct child_group_id)
                                   from (table old_rows union table new_rows) edges));
    else
        delete from authz.group_ancestors where depth > 0;
    end if;
    return null;
end $$;

create trigger close_insert after insert on authz.group_groups referencing new table as new_rows
    for each statement execute function authz.close_changed_edges();
create trigger close_update after update on authz.group_groups
    referencing old table as old_rows new table as new_rows
    for each statement execute function authz.close_changed_edges();
create trigger close_delete after delete on authz.group_groups referencing old table as old_rows
    for each statement execute function authz.close_changed_edges();
create trigger close_truncate after truncate on authz.group_groups
    for each statement execute function authz.close_changed_edges();
