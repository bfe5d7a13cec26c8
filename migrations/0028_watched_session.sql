-- In the middle of a `COPY`, or of a long answer, PostgreSQL waits for its client without end: none of its timeouts runs there,
-- and a client that is paused with its connection open keeps all its locks. This ends such a session from another one. Adds a
-- function, locks no table.

-- Ends a session that waits for its client, and gets on with nothing meanwhile, for so long. Returns true then, and false once
-- the transaction is over that began there at this moment. A `COPY` that gets on is left alone; a long answer of another statement
-- shows no progress, and is taken for none. Whoever calls it has to be of the role that the session logged in as (`set role` does
-- not count), or of one that may see and end it (`pg_read_all_stats` and `pg_signal_backend`).
create or replace function authz.watch_session(watched integer, began timestamptz, silence interval) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    since  timestamptz;
    before record;
    look   record;
begin
    if exists (select from pg_stat_activity a where a.pid = watched and a.xact_start is null and coalesce(a.state, 'disabled') = 'disabled') then
        raise exception 'session % cannot be watched', watched using
            errcode = 'insufficient_privilege',
            hint = 'Let who watches log in as the same role, and leave `track_activities` on.';
    end if;
    loop
        -- Within one transaction it would show the same each time.
        perform pg_stat_clear_snapshot();
        select a.wait_event_type, a.wait_event, a.query_start, a.state_change, c.bytes_processed into look
        from pg_stat_activity a
        left join pg_stat_progress_copy c on c.pid = a.pid
        where a.pid = watched and a.xact_start = began;
        if not found then
            return false;
        end if;
        if look.wait_event_type is distinct from 'Client' or look is distinct from before then
            before := look;
            since := clock_timestamp();
        elsif clock_timestamp() - since >= silence then
            return pg_terminate_backend(watched);
        end if;
        perform pg_sleep(least(extract(epoch from silence) / 10, 1));
    end loop;
end $$;
