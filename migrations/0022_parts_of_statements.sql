-- One statement can change several tables, or one table several times (`with … insert`), and its triggers then fire in the
-- order in which its parts end, when all of its rows are there already. Two triggers took that order for the order of
-- the rows: a grant taken and given again did not reach anybody, and a group that came with its edges was closed without
-- them. Replaces two functions, locks no table. What such a statement has left out is made up for, which locks the revision.

-- As in 0009, but a grant that is there now stays, whichever part of the statement took one of its name away.
create or replace function authz.reach_by_grants() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if tg_op = 'TRUNCATE' then
        delete from authz.group_reach;
        return null;
    end if;
    if tg_op = 'DELETE' then
        delete from authz.group_reach re using old_rows o
        where re.holder_id = o.group_id and re.action_name = o.action_name collate "C"
          and not exists (select from authz.group_actions ga
                          where ga.group_id = o.group_id and ga.action_name = o.action_name);
    end if;
    if tg_op = 'UPDATE' then
        delete from authz.group_reach re
        using (select o.group_id, o.action_name from old_rows o
               except select ga.group_id, ga.action_name
               from old_rows o join authz.group_actions ga using (group_id, action_name)) gone
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

-- As in 0003, but a group that is in others already is closed with them: the trigger of those edges found no such group.
create or replace function authz.close_new_groups() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    insert into authz.group_ancestors (group_id, ancestor_id, depth) select group_id, group_id, 0 from new_rows;
    perform authz.close_below((select array_agg(n.group_id) from new_rows n
                               where exists (select from authz.group_groups e where e.child_group_id = n.group_id)));
    return null;
end $$;

do $$
begin
    perform authz.hold_revision();
    perform authz.close_below((
        select array_agg(distinct e.child_group_id)
        from authz.group_groups e
        where not exists (select from authz.group_ancestors an
                          where an.group_id = e.child_group_id and an.ancestor_id = e.parent_group_id)
    ));
    insert into authz.group_reach (group_id, action_name, holder_id, depth)
    select an.group_id, ga.action_name, an.ancestor_id, an.depth
    from authz.group_actions ga
    join authz.group_ancestors an on an.ancestor_id = ga.group_id
    where not exists (select from authz.group_reach re
                      where re.group_id = an.group_id and re.action_name = ga.action_name collate "C"
                        and re.holder_id = an.ancestor_id);
end $$;
