-- As 0022, for the trail: where one statement takes a grant or a membership and gives it again, its records could end with
-- the taking. A replay then knew nothing of what stands, and `verify --state` called it altered. Replaces a function, locks no
-- table.

-- As in 0012, but what was taken and is there now is told of once more, as it is.
create or replace function authz.audit_changes() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    live   constant text := format('authz.%I', tg_table_name);
    change record;
begin
    if tg_argv[0] = 'membership' and coalesce(current_setting('authz.sync_run', true), '') <> '' then
        return null;
    end if;
    if tg_op = 'TRUNCATE' then
        insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
        select authz.current_service(), authz.current_actor(), tg_argv[0] || '.remove', 'succeeded',
               'all of ' || tg_table_name, jsonb_build_object('emptied', tg_table_name),
               nullif(current_setting('authz.request_id', true), ''), r.revision
        from authz.revision r;
        return null;
    end if;
    -- An update that moves a row to another key ends one grant and makes another.
    for change in
        select * from (values
            (1, 'INSERT', 'add', 'new_rows', 'true'),
            (1, 'DELETE', 'remove', 'old_rows', 'true'),
            (2, 'DELETE', 'change', live, format('(%s) in (select %1$s from old_rows)', tg_argv[4])),
            (1, 'UPDATE', 'remove', 'old_rows', format('(%s) not in (select %1$s from new_rows)', tg_argv[4])),
            (2, 'UPDATE', 'add', 'new_rows', format('(%s) not in (select %1$s from old_rows)', tg_argv[4])),
            (3, 'UPDATE', 'change', 'new_rows', format('(%s) in (select %1$s from old_rows)', tg_argv[4])),
            (4, 'UPDATE', 'change', live,
             format('(%s) in (select %1$s from old_rows except select %1$s from new_rows)', tg_argv[4]))
        ) as v (step, op, verb, row_source, condition)
        where v.op = tg_op
        order by v.step
    loop
        execute format(
            'insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
             select authz.current_service(), %s, $1, ''succeeded'', %s, %s,
                    nullif(current_setting(''authz.request_id'', true), ''''), (select revision from authz.revision)
             from (select * from %s where %s) r %s',
            case when tg_argv[0] = 'grant' and tg_op = 'INSERT' then 'r.granted_by' else 'authz.current_actor()' end,
            tg_argv[1], tg_argv[2], change.row_source, change.condition, tg_argv[3])
        using tg_argv[0] || '.' || change.verb;
    end loop;
    return null;
end $$;
