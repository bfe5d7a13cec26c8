-- A grant's dates begin in 1970. PostgreSQL writes older ones in ways that other programs do not read (`BC`, and before
-- time zones were agreed upon, offsets with seconds): one such grant, made by hand, could not be explained, and the record
-- of it stopped every replay of the trail for good. Older ones are set to 1970. Locks the two tables of grants while they
-- are read.

lock table authz.user_actions, authz.group_actions in access exclusive mode;

update authz.user_actions set expires_at = '1970-01-01 UTC' where expires_at < '1970-01-01 UTC';
update authz.user_actions set granted_at = '1970-01-01 UTC' where granted_at < '1970-01-01 UTC';
update authz.group_actions set expires_at = '1970-01-01 UTC' where expires_at < '1970-01-01 UTC';
update authz.group_actions set granted_at = '1970-01-01 UTC' where granted_at < '1970-01-01 UTC';

alter table authz.user_actions
    drop constraint granted_at_is_a_date,
    drop constraint expires_at_is_a_date,
    add constraint granted_at_is_a_date check (granted_at >= '1970-01-01 UTC' and granted_at < '10000-01-01 UTC'),
    add constraint expires_at_is_a_date check (expires_at >= '1970-01-01 UTC' and expires_at < '10000-01-01 UTC');
alter table authz.group_actions
    drop constraint granted_at_is_a_date,
    drop constraint expires_at_is_a_date,
    add constraint granted_at_is_a_date check (granted_at >= '1970-01-01 UTC' and granted_at < '10000-01-01 UTC'),
    add constraint expires_at_is_a_date check (expires_at >= '1970-01-01 UTC' and expires_at < '10000-01-01 UTC');
