-- The foreign keys of group_users as checks of whole statements: a key's own trigger runs a look-up for each row, which was
-- three quarters of inserting a million memberships. Replaces the two keys by triggers on group_users, users and groups;
-- locks the three tables for that moment.
--
-- INVARIANT: each row of group_users has its group and its user (held by the tests in `tests/membership_references.rs`).
-- What a key would lock row by row is settled by the revision: each statement on these tables locks it before its first
-- row (`a_lock_revision`), so no other change is under way between a check and the commit. The check itself is a query
-- of its own and sees what was committed while the statement waited. A transaction with an older snapshot (REPEATABLE
-- READ) cannot take the lock after somebody else's change, since each change of a key raises the revision.
--
-- What differs from foreign keys: TRUNCATE of users or groups refuses to leave memberships behind instead of emptying
-- them by CASCADE; a restore by pg_dump, which makes triggers after the data, does not check the dump again; and a dump of
-- data alone has to be restored with --disable-triggers, as the triggers of the closure and of the trail demand already.

lock table authz.users, authz.groups, authz.group_users in access exclusive mode;

-- After an insert or update of memberships.
create function authz.refuse_dangling_memberships() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    missing record;
begin
    -- Planned for each statement: a plan kept from one row would look a million rows up one by one.
    execute 'select n.group_id, n.user_id, g.group_id is null as no_group
             from new_rows n
             left join authz.groups g on g.group_id = n.group_id
             left join authz.users u on u.user_id = n.user_id
             where g.group_id is null or u.user_id is null
             limit 1' into missing;
    if missing.no_group then
        raise exception 'group % does not exist', missing.group_id using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'group_users', column = 'group_id',
            constraint = 'group_users_group_id_fkey', hint = 'Create the group first.';
    elsif not missing.no_group then
        raise exception 'user % does not exist', missing.user_id using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'group_users', column = 'user_id',
            constraint = 'group_users_user_id_fkey', hint = 'Create the user first.';
    end if;
    return null;
end $$;

-- After users or groups were deleted, or got another id: what had memberships must be there still.
create function authz.refuse_lost_users() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    gone bigint[];
    lost bigint;
begin
    if tg_op = 'DELETE' then
        gone := array(select o.user_id from old_rows o);
    else
        gone := array(select o.user_id from old_rows o except select n.user_id from new_rows n);
    end if;
    if cardinality(gone) = 0 then
        return null;
    end if;
    select m.user_id into lost
    from authz.group_users m
    where m.user_id = any (gone) and not exists (select from authz.users u where u.user_id = m.user_id)
    limit 1;
    if lost is not null then
        raise exception 'user % is still in a group', lost using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'group_users', column = 'user_id',
            constraint = 'group_users_user_id_fkey', hint = 'Remove the user''s memberships first.';
    end if;
    return null;
end $$;

create function authz.refuse_lost_groups() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    gone bigint[];
    lost bigint;
begin
    if tg_op = 'DELETE' then
        gone := array(select o.group_id from old_rows o);
    else
        gone := array(select o.group_id from old_rows o except select n.group_id from new_rows n);
    end if;
    if cardinality(gone) = 0 then
        return null;
    end if;
    select m.group_id into lost
    from authz.group_users m
    where m.group_id = any (gone) and not exists (select from authz.groups g where g.group_id = m.group_id)
    limit 1;
    if lost is not null then
        raise exception 'group % still has members', lost using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'group_users', column = 'group_id',
            constraint = 'group_users_group_id_fkey', hint = 'Remove the group''s members first.';
    end if;
    return null;
end $$;

-- After users or groups were emptied.
create function authz.refuse_memberships_of_none() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from authz.group_users) then
        raise exception 'there are memberships left' using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'group_users',
            hint = 'Truncate authz.group_users in the same statement.';
    end if;
    return null;
end $$;

revoke execute on function authz.refuse_dangling_memberships(), authz.refuse_lost_users(), authz.refuse_lost_groups(),
    authz.refuse_memberships_of_none() from public;

-- The triggers come before the keys go, and all of it in one transaction: what the keys hold now holds from then on.
create trigger references_insert after insert on authz.group_users referencing new table as new_rows
    for each statement execute function authz.refuse_dangling_memberships();
create trigger references_update after update on authz.group_users referencing new table as new_rows
    for each statement execute function authz.refuse_dangling_memberships();
create trigger references_delete after delete on authz.users referencing old table as old_rows
    for each statement execute function authz.refuse_lost_users();
create trigger references_update after update on authz.users referencing old table as old_rows new table as new_rows
    for each statement execute function authz.refuse_lost_users();
create trigger references_truncate after truncate on authz.users
    for each statement execute function authz.refuse_memberships_of_none();
create trigger references_delete after delete on authz.groups referencing old table as old_rows
    for each statement execute function authz.refuse_lost_groups();
create trigger references_update after update on authz.groups referencing old table as old_rows new table as new_rows
    for each statement execute function authz.refuse_lost_groups();
create trigger references_truncate after truncate on authz.groups
    for each statement execute function authz.refuse_memberships_of_none();

alter table authz.group_users
    drop constraint group_users_group_id_fkey,
    drop constraint group_users_user_id_fkey;
