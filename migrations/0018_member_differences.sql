-- Staging of a group's differences: of a group whose last listing is what the mirror has, only the members that came, changed
-- or went are staged. Staging tables only, which are empty between runs.

alter table authz.sync_stage_groups
    -- The digest of the listing that the mirror's members were compared as; null if all members are staged.
    add column members_basis bytea,
    -- How many listed members the mirror was found to have as they are listed.
    add column members_same  bigint not null default 0;

-- Users whom the mirror has in a compared group and whom the directory did not list there.
create unlogged table authz.sync_stage_gone_members (
    run_id            bigint not null,
    group_external_id text not null,
    user_id           bigint not null
);

-- Whoever fills the other staging tables fills this one.
do $$
declare
    allowed record;
begin
    for allowed in
        select a.privilege_type, case when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end as grantee
        from pg_class c, aclexplode(c.relacl) a
        where c.oid = 'authz.sync_stage_members'::regclass and a.grantee <> c.relowner
    loop
        execute format('grant %s on authz.sync_stage_gone_members to %s', allowed.privilege_type, allowed.grantee);
    end loop;
end $$;

create or replace function authz.analyze_staging() returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    analyze authz.sync_stage_users, authz.sync_stage_groups, authz.sync_stage_members, authz.sync_stage_unseen_users,
            authz.sync_stage_gone_members;
end $$;
