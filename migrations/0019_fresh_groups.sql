-- A first load, and what is new later on: a group that has no member in the mirror and gets all that are listed need not be
-- compared member by member. Tables of staging and planning only, which are empty between runs: no lock that anybody waits for.

alter table authz.sync_stage_groups
    -- How many members of the group are staged, if all of its listing is.
    add column members_staged bigint not null default 0,
    -- The mirror has no members of the group, and will have all that are staged: they are planned as they stand there, and
    -- `sync_plan_members` has none of them.
    add column members_fresh  boolean not null default false;

-- A statement joins these tables as a whole or not at all, so a rough idea of what is in them is enough.
alter table authz.sync_stage_members
    alter column run_id set statistics 10,
    alter column group_external_id set statistics 10,
    alter column kind set statistics 10,
    alter column member_external_id set statistics 10,
    alter column member_name set statistics 0,
    alter column role set statistics 10;
alter table authz.sync_stage_users
    alter column run_id set statistics 10,
    alter column external_id set statistics 10,
    alter column user_name set statistics 10,
    alter column display_name set statistics 0,
    alter column suspended set statistics 10;

-- Each planned user was put into two indexes more, whose look-ups are joins of few rows or of all.
drop index authz.sync_plan_users_by_user;
drop index authz.sync_plan_users_by_name;
