-- A statement that changes thousands of rows looked through twenty thousand old changes for some to prune, whether one was old
-- enough or not. Replaces a function, locks no table.

-- As in 0009, but it looks at the oldest first.
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
    if (current % 256 = 0 or touched between large and most)
       -- Where the oldest stays, so does all: it costs one row to know.
       and exists (select from (select c.changed_at from authz.changes c order by c.change_id limit 1) c
                   where c.changed_at < statement_timestamp() - interval '1 day') then
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
