-- The foreign key of users to directories as a check of whole statements, as 0016 has it for memberships: a third of what a
-- hundred thousand new users took was a look-up of the same directory for each. Replaces the key by triggers on users and directories;
-- locks both for that moment.
--
-- INVARIANT: each row of users that names a directory has it (held by the tests in `tests/membership_references.rs`). As
-- in 0016, whoever changes a side locks the revision before the first row, so no other change is under way between a check
-- and the commit; and taking a directory away raises the revision, so that a transaction with an older snapshot cannot
-- take the lock after it.

lock table authz.directories, authz.users in access exclusive mode;

-- After an insert or update of users.
create function authz.refuse_unknown_directories() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    unknown integer;
begin
    select n.directory_id into unknown
    from new_rows n
    where n.directory_id is not null and n.directory_id not in (select d.directory_id from authz.directories d)
    limit 1;
    if unknown is not null then
        raise exception 'directory % does not exist', unknown using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'users', column = 'directory_id',
            constraint = 'users_directory_id_fkey', hint = 'Create the directory first.';
    end if;
    return null;
end $$;

-- After directories were deleted, or got another id.
create function authz.refuse_lost_directories() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    gone integer[];
    lost integer;
begin
    if tg_op = 'DELETE' then
        gone := array(select o.directory_id from old_rows o);
    elsif tg_op = 'UPDATE' then
        gone := array(select o.directory_id from old_rows o except select n.directory_id from new_rows n);
    end if;
    if cardinality(gone) = 0 then
        return null;
    end if;
    -- Nothing is left after a truncate.
    select u.directory_id into lost
    from authz.users u
    where (tg_op = 'TRUNCATE' or u.directory_id = any (gone)) and u.directory_id is not null
      and not exists (select from authz.directories d where d.directory_id = u.directory_id)
    limit 1;
    if lost is not null then
        raise exception 'directory % still has users', lost using
            errcode = 'foreign_key_violation', schema = 'authz', table = 'users', column = 'directory_id',
            constraint = 'users_directory_id_fkey', hint = 'Remove its users first.';
    end if;
    update authz.revision set revision = revision + 1;
    insert into authz.changes (revision, kind) select r.revision, 'reload' from authz.revision r;
    perform pg_notify('authz_revision', r.revision::text) from authz.revision r;
    return null;
end $$;

revoke execute on function authz.refuse_unknown_directories(), authz.refuse_lost_directories() from public;

-- The triggers come before the key goes, and all of it in one transaction: what the key holds now holds from then on.
create trigger directory_insert after insert on authz.users referencing new table as new_rows
    for each statement execute function authz.refuse_unknown_directories();
create trigger directory_update after update on authz.users referencing new table as new_rows
    for each statement execute function authz.refuse_unknown_directories();
-- Not of every update: each sync writes down when it was complete.
create trigger a_lock_revision before delete or truncate or update of directory_id on authz.directories
    for each statement execute function authz.lock_revision();
create trigger references_delete after delete on authz.directories referencing old table as old_rows
    for each statement execute function authz.refuse_lost_directories();
create trigger references_update after update on authz.directories referencing old table as old_rows new table as new_rows
    for each statement execute function authz.refuse_lost_directories();
create trigger references_truncate after truncate on authz.directories
    for each statement execute function authz.refuse_lost_directories();

alter table authz.users drop constraint users_directory_id_fkey;
