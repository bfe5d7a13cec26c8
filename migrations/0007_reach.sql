-- Which grants reach which group, so that a check looks once per group of the user instead of once per group and
-- ancestor: the closure joined with the grants of groups, kept by triggers on both. It holds no end of a grant and no
-- status of a group; a check reads those where it found something, so they need no upkeep here.
-- New table; the triggers lock group_ancestors and group_actions for a moment.

create table authz.group_reach (
    group_id    bigint not null,
    -- Compared byte by byte: this is the hottest index, and a language's sort order costs several times more.
    action_name text collate "C" not null,
    holder_id   bigint not null,
    depth       integer not null,
    primary key (group_id, action_name, holder_id) include (depth)
);
create index group_reach_by_holder on authz.group_reach (holder_id, action_name, group_id);

-- INVARIANT: group_reach = group_ancestors ⋈ group_actions (held by the test `reach_is_the_closure_joined_with_the_grants`).
-- Each trigger adds or takes away the change of its own table against the other as it stands. Both tables change
-- under the lock on the revision, so no two changes miss each other.
create function authz.reach_by_ancestors() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from authz.group_reach;
        return null;
    end if;
    if tg_op in ('DELETE', 'UPDATE') then
        delete from authz.group_reach re using old_rows o
        where re.group_id = o.group_id and re.holder_id = o.ancestor_id;
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        insert into authz.group_reach (group_id, action_name, holder_id, depth)
        select n.group_id, ga.action_name, n.ancestor_id, n.depth
        from new_rows n
        join authz.group_actions ga on ga.group_id = n.ancestor_id
        -- One statement may change both tables; each trigger then finds the other's new rows.
        on conflict (group_id, action_name, holder_id) do nothing;
    end if;
    return null;
end $$;

create function authz.reach_by_grants() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from authz.group_reach;
        return null;
    end if;
    if tg_op in ('DELETE', 'UPDATE') then
        delete from authz.group_reach re using old_rows o
        where re.holder_id = o.group_id and re.action_name = o.action_name collate "C";
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        insert into authz.group_reach (group_id, action_name, holder_id, depth)
        select an.group_id, n.action_name, an.ancestor_id, an.depth
        from new_rows n
        join authz.group_ancestors an on an.ancestor_id = n.group_id
        on conflict (group_id, action_name, holder_id) do nothing;
    end if;
    return null;
end $$;

do $$
declare
    t record;
    e record;
begin
    for t in
        select * from (values ('group_ancestors', 'reach_by_ancestors'), ('group_actions', 'reach_by_grants'))
            as v (table_name, function_name)
    loop
        for e in
            select * from (values
                ('insert', 'referencing new table as new_rows'),
                ('update', 'referencing old table as old_rows new table as new_rows'),
                ('delete', 'referencing old table as old_rows'),
                ('truncate', '')
            ) as v (event, rows)
        loop
            execute format('create trigger reach_%s after %s on authz.%I %s for each statement execute function authz.%I()',
                           e.event, e.event, t.table_name, e.rows, t.function_name);
        end loop;
    end loop;
end $$;

insert into authz.group_reach (group_id, action_name, holder_id, depth)
select an.group_id, ga.action_name, an.ancestor_id, an.depth
from authz.group_ancestors an
join authz.group_actions ga on ga.group_id = an.ancestor_id;

-- As in 0004, over the new table.
create or replace function authz.can(user_name text, action_name text) returns boolean
language plpgsql stable parallel safe set plan_cache_mode = force_generic_plan as $$
declare
    subject  record;
    patterns text[] := authz.covering(can.action_name);
begin
    -- Lower-cased in ASCII alone, then compared in the column's own collation, or the index could not be used.
    select u.user_id, u.status, u.directory_id, exists (select from authz.actions a where a.action_name = can.action_name) as known
    into subject
    from authz.users u
    where u.user_name = (lower(btrim(can.user_name, E' \t\n\r\f') collate "C") collate "default")
      and u.status <> 'deleted';
    if subject.status is null or subject.status not in ('active', 'external') or not subject.known then
        return false;
    end if;
    return exists (
               select from authz.user_actions ua
               where ua.user_id = subject.user_id
                 and ua.action_name = any (patterns)
                 and (ua.expires_at is null or ua.expires_at > statement_timestamp()))
        or exists (
               select
               from (
                   select gu.group_id from authz.group_users gu where gu.user_id = subject.user_id
                   union all
                   select gd.group_id from authz.group_directories gd where gd.directory_id = subject.directory_id
               ) mine
               join authz.group_reach re on re.group_id = mine.group_id and re.action_name = any (patterns)
               join authz.group_actions ga on ga.group_id = re.holder_id and ga.action_name = re.action_name
               join authz.groups g on g.group_id = re.holder_id
               where (ga.expires_at is null or ga.expires_at > statement_timestamp())
                 and g.status = 'active');
end $$;

-- Where the patterns are found faster: without a look at every segment twice.
create or replace function authz.covering(action_name text) returns text[]
language plpgsql immutable strict parallel safe as $$
declare
    names text[] := array[action_name, '*'];
    stem  text := action_name;
begin
    while strpos(stem, '.') > 0 loop
        stem := substring(stem from '^(.*)\.');
        names := names || (stem || '.*');
    end loop;
    return names;
end $$;
