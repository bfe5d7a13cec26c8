-- What a large sync spent most on beside the memberships themselves. Replaces two triggers of group_users (locks it for a
-- moment) and drops two indexes of staging tables, which are empty between runs.

-- As `audit_state` for the memberships that a sync adds or removes, with the same records: the rows of a group are brought
-- together as numbers before they become JSON, which takes a third of the time.
create function authz.audit_members() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if coalesce(current_setting('authz.sync_run', true), '') = '' then
        return null;
    end if;
    -- Planned for each statement, as only then it is known how many rows there are.
    execute format(
        $sql$
        insert into authz.audit_log (service, actor, action, outcome, target, detail, request_id, revision)
        select authz.current_service(), authz.current_actor(), 'state.members', 'succeeded',
               'group ' || coalesce(g.group_name, m.group_id::text),
               jsonb_build_object('table', 'group_users', 'group_id', m.group_id, %L, to_jsonb(m.user_ids[part:part + 999])),
               nullif(current_setting('authz.request_id', true), ''), (select revision from authz.revision)
        from (select r.group_id, array_agg(r.user_id) as user_ids from %I r group by r.group_id) m
        left join authz.groups g on g.group_id = m.group_id,
             generate_series(1, cardinality(m.user_ids), 1000) as part
        order by m.group_id, part
        $sql$,
        case tg_op when 'INSERT' then 'added' else 'removed' end,
        case tg_op when 'INSERT' then 'new_rows' else 'old_rows' end);
    return null;
end $$;
revoke execute on function authz.audit_members() from public;

drop trigger zz_state_insert on authz.group_users;
drop trigger zz_state_delete on authz.group_users;
create trigger zz_state_insert after insert on authz.group_users referencing new table as new_rows
    for each statement execute function authz.audit_members();
create trigger zz_state_delete after delete on authz.group_users referencing old table as old_rows
    for each statement execute function authz.audit_members();

-- Each staged and planned membership was put into an index that only small look-ups used.
drop index authz.sync_stage_members_by_group;
drop index authz.sync_plan_members_by_group;
