-- Keeps `changes` small: every 256th revision takes away what is older than a day. Whoever still needs it (a snapshot
-- that has not polled for a day) finds the gap and loads all anew. Replaces one function, locks no table.

create or replace function authz.note_changes() returns trigger
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
    if current % 256 = 0 then
        -- At most so many rows are looked at, the oldest; a large backlog goes in several steps. The newest revision
        -- among them stays, since some of its rows may be further on: a reader that finds a revision finds all of it.
        with oldest as materialized (
            select c.change_id, c.revision, c.changed_at from authz.changes c order by c.change_id limit 20000
        )
        delete from authz.changes
        where change_id in (
            select o.change_id from oldest o
            where o.changed_at < statement_timestamp() - interval '1 day'
              and o.revision < (select max(l.revision) from oldest l));
    end if;
    return null;
end $$;
