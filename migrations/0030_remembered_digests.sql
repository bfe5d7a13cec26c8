-- A transaction that sees the past (`repeatable read` or stricter, its snapshot older than a run) does not see the digests that
-- the run remembered since, so a membership that it changed left them there, and no later run put it right. Where a run had changed
-- anything that decides, such a transaction failed already, as the revision was another one. Adds a function and a trigger to
-- `group_digests`, which it locks for a moment.

-- INVARIANT: whoever changes memberships, users or groups sees each digest that there is, or cannot go on: all of them lock the
-- revision's row, and that fails for a snapshot from before its last update (held by
-- `change_that_does_not_see_a_digest_does_not_leave_it_behind`). It stays the same number: nothing that decides has changed. A digest
-- that was there before is seen as it was, and to delete that fails by itself.
create or replace function authz.note_digests() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from new_rows) then
        update authz.revision set revision = revision;
    end if;
    return null;
end $$;
revoke execute on function authz.note_digests() from public;

create or replace trigger note_insert after insert on authz.group_digests referencing new table as new_rows
    for each statement execute function authz.note_digests();
