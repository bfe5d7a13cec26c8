-- What a review found: `authz.can` judges no name that cannot be one, a changed end or reason of a grant leaves
-- `group_reach` alone, and old rows of `changes` go at least as fast as new ones come. Replaces functions, locks no table.

-- `covering` works on every segment of the name, so its length is bounded before it is called.
create or replace function authz.can(user_name text, action_name text) returns boolean
language plpgsql stable parallel safe set plan_cache_mode = force_generic_plan as $$
declare
    subject  record;
    patterns text[];
begin
    if octet_length(can.action_name) > 255 or octet_length(can.user_name) > 1024 then
        return false;
    end if;
    -- Lower-cased in ASCII alone, then compared in the column's own collation, or the index could not be used.
    select u.user_id, u.status, u.directory_id, exists (select from authz.actions a where a.action_name = can.action_name) as known
    into subject
    from authz.users u
    where u.user_name = (lower(btrim(can.user_name, E' \t\n\r\f') collate "C") collate "default")
      and u.status <> 'deleted';
    if subject.status is null or subject.status not in ('active', 'external') or not subject.known then
        return false;
    end if;
    patterns := authz.covering(can.action_name);
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

-- As in 0007, but what an update keeps stays where it is.
create or replace function authz.reach_by_grants() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from authz.group_reach;
        return null;
    end if;
    if tg_op = 'DELETE' then
        delete from authz.group_reach re using old_rows o
        where re.holder_id = o.group_id and re.action_name = o.action_name collate "C";
    end if;
    if tg_op = 'UPDATE' then
        delete from authz.group_reach re
        using (select o.group_id, o.action_name from old_rows o
               except select n.group_id, n.action_name from new_rows n) gone
        where re.holder_id = gone.group_id and re.action_name = gone.action_name collate "C";
        insert into authz.group_reach (group_id, action_name, holder_id, depth)
        select an.group_id, came.action_name, an.ancestor_id, an.depth
        from (select n.group_id, n.action_name from new_rows n
              except select o.group_id, o.action_name from old_rows o) came
        join authz.group_ancestors an on an.ancestor_id = came.group_id
        on conflict (group_id, action_name, holder_id) do nothing;
    end if;
    if tg_op = 'INSERT' then
        insert into authz.group_reach (group_id, action_name, holder_id, depth)
        select an.group_id, n.action_name, an.ancestor_id, an.depth
        from new_rows n
        join authz.group_ancestors an on an.ancestor_id = n.group_id
        on conflict (group_id, action_name, holder_id) do nothing;
    end if;
    return null;
end $$;

-- As in 0008, but a large revision makes room for itself, and the small ones in between leave less than a prune takes.
create or replace function authz.note_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    most      constant integer := 10000;
    large     constant integer := 1000;
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
    -- INVARIANT: what may go at once is more than what has come since it could go last, so the table does not grow
    -- without end (held by `old_changes_go_as_fast_as_new_ones_come`). The newest revision among what is looked at
    -- stays, since some of its rows may be further on: a reader that finds a revision finds all of it.
    if current % 256 = 0 or touched between large and most then
        with oldest as materialized (
            select c.change_id, c.revision, c.changed_at from authz.changes c order by c.change_id
            limit case when current % 256 = 0 then 300 * large else most + 2 * touched end
        )
        delete from authz.changes
        where change_id in (
            select o.change_id from oldest o
            where o.changed_at < statement_timestamp() - interval '1 day'
              and o.revision < (select max(l.revision) from oldest l));
    end if;
    return null;
end $$;
