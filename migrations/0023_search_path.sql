-- `authz.can` runs with the search path of whoever asks. Who may create in a schema of it (in `public` that is everybody up
-- to PostgreSQL 14, and in a cluster upgraded from there) could put an operator beside those of PostgreSQL that fits `covering`
-- better, and have the session of another decide what he liked, or run what he liked. Now nothing but PostgreSQL's own is
-- looked up, as in the functions that run as their owner. Settings of two functions; locks no table.

alter function authz.can(text, text) set search_path = pg_catalog, pg_temp;
alter function authz.covering(text) set search_path = pg_catalog, pg_temp;
