-- The decision for everyone who does not use the Rust library. Functions only.

-- What a grant may be called to cover an action: `a.b.c` is covered by `a.b.c`, `a.b.*`, `a.*` and `*`.
create function authz.covering(action_name text) returns text[]
language sql immutable strict parallel safe
begin atomic
    select array[action_name, '*'] || coalesce(array_agg(array_to_string(parts[1:n], '.') || '.*'), '{}')
    from (select string_to_array(action_name, '.') as parts) p,
         generate_series(1, cardinality(p.parts) - 1) as n;
end;

-- Whether the user may do the action, judged at the moment of the statement by the database's clock.
-- False for an unknown user, an unknown action and a null; a Google user is found by address.
create function authz.can(user_name text, action_name text) returns boolean
language sql stable parallel safe
begin atomic
    select coalesce((
        select u.status in ('active', 'external')
            and exists (select from authz.actions a where a.action_name = can.action_name)
            and (exists (
                    select from authz.user_actions ua
                    where ua.user_id = u.user_id
                      and ua.action_name = any (authz.covering(can.action_name))
                      and (ua.expires_at is null or ua.expires_at > statement_timestamp()))
                or exists (
                    select
                    from (
                        select gu.group_id from authz.group_users gu where gu.user_id = u.user_id
                        union all
                        select gd.group_id from authz.group_directories gd where gd.directory_id = u.directory_id
                    ) m
                    join authz.group_ancestors an on an.group_id = m.group_id
                    join authz.group_actions ga on ga.group_id = an.ancestor_id
                    join authz.groups g on g.group_id = an.ancestor_id
                    where ga.action_name = any (authz.covering(can.action_name))
                      and (ga.expires_at is null or ga.expires_at > statement_timestamp())
                      and g.status = 'active'))
        from authz.users u
        where u.user_name = lower(btrim(can.user_name, E' \t\n\r\f') collate "C") and u.status <> 'deleted'
    ), false);
end;
