-- The decision for everyone who does not use the Rust library. Functions only.

-- What a grant may be called to cover an action: `a.b.c` is covered by `a.b.c`, `a.b.*`, `a.*` and `*`.
create function authz.covering(action_name text) returns text[]
language plpgsql immutable strict parallel safe as $$
declare
    segments text[] := string_to_array(action_name, '.');
    names    text[] := array[action_name, '*'];
begin
    for n in 1 .. cardinality(segments) - 1 loop
        names := names || (array_to_string(segments[1:n], '.') || '.*');
    end loop;
    return names;
end $$;

-- Whether the user may do the action, judged at the moment of the statement by the database's clock.
-- False for an unknown user, an unknown action and a null; a Google user is found by address.
--
-- In PL/pgSQL, because a session keeps its plans; generic ones, because planning costs more than answering.
create function authz.can(user_name text, action_name text) returns boolean
language plpgsql stable parallel safe set plan_cache_mode = force_generic_plan as $$
declare
    subject  record;
    patterns text[] := authz.covering(can.action_name);
begin
    -- Lower-cased in ASCII alone, then compared in the column's own collation, or the index could not be used.
    select u.user_id, u.status, u.directory_id into subject
    from authz.users u
    where u.user_name = (lower(btrim(can.user_name, E' \t\n\r\f') collate "C") collate "default")
      and u.status <> 'deleted';
    if subject.status is null or subject.status not in ('active', 'external') then
        return false;
    end if;
    return exists (select from authz.actions a where a.action_name = can.action_name)
       and (exists (
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
               join authz.group_ancestors an on an.group_id = mine.group_id
               join authz.group_actions ga on ga.group_id = an.ancestor_id
               join authz.groups g on g.group_id = an.ancestor_id
               where ga.action_name = any (patterns)
                 and (ga.expires_at is null or ga.expires_at > statement_timestamp())
                 and g.status = 'active'));
end $$;
