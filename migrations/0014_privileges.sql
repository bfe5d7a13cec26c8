-- What runs as the owner of the schema is for those who are named. PostgreSQL lets everybody execute a new function,
-- and a trigger function that runs as its owner can be hung on a table of anybody's own, with arguments of anybody's own.
-- Triggers go on calling theirs: who may make a trigger is asked only when it is made. Privileges only; locks no table.
--
-- INVARIANT: nobody but its owner may execute a function that runs as its owner, unless it was granted by name
-- (held by `functions_that_run_as_their_owner_are_for_nobody_else`). A migration that makes one revokes it as well.

do $$
declare
    definer regprocedure;
begin
    for definer in
        select p.oid::regprocedure from pg_proc p
        where p.pronamespace = 'authz'::regnamespace and p.prosecdef
    loop
        execute format('revoke execute on function %s from public', definer);
    end loop;
end $$;
