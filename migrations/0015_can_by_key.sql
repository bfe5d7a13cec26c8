-- As in 0009, but the grants that `group_reach` leads to are found by their whole key: that table compares names byte by
-- byte, and a join under its order could not use the index of `group_actions` for them. Replaces a function, locks no table.

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
               join authz.group_actions ga
                   on ga.group_id = re.holder_id and ga.action_name = (re.action_name collate "default")
               join authz.groups g on g.group_id = re.holder_id
               where (ga.expires_at is null or ga.expires_at > statement_timestamp())
                 and g.status = 'active');
end $$;
