-- Records told when a grant ends in the time zone of the session that made it. East of UTC the last hours of 9999 are of the year
-- 10000, which other programs do not read: one such grant, made by hand, stopped every replay of its action for as long as
-- the record of it is there. From now on records tell it in UTC. Settings of functions; locks no table.

alter function authz.audit_changes() set timezone = 'UTC';
alter function authz.write_rights_baseline() set timezone = 'UTC';
alter function authz.write_audit_baseline() set timezone = 'UTC';
