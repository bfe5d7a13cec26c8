//! Statements that a person may write, of every shape: many rows at once, rows that move or change places, parts that undo
//! each other's work, and what changes nothing.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

/// Few of each, so that the sessions meet.
pub(crate) const USERS: i64 = 10;
const GROUPS: i64 = 8;
pub(crate) const ACTIONS: [&str; 7] = ["a", "a.b", "a.b.c", "a.bc", "b", "b.c", "c.d"];
const PATTERNS: [&str; 9] = ["*", "a.*", "a.b.*", "a", "a.b", "a.b.c", "b", "b.*", "c.*"];

pub(crate) fn random_statement(rng: &mut SmallRng) -> String {
    // Seldom, since it leaves little to be right or wrong about.
    if rng.random_ratio(1, 100) {
        let tables =
            ["group_users", "group_groups", "group_actions", "user_actions, authz.group_directories"];
        return format!("truncate authz.{}", tables.choose(rng).unwrap());
    }
    let picked = Picked::random(rng);
    let statements = [
        picked.users(),
        picked.groups(),
        picked.members(),
        picked.directories(),
        picked.edges(),
        picked.actions(),
        picked.user_grants(),
        picked.group_grants(),
    ]
    .concat();
    statements.choose(rng).unwrap().clone()
}

/// What a statement is about.
struct Picked {
    user: i64,
    other_user: i64,
    group: i64,
    other_group: i64,
    directory: i32,
    action: &'static str,
    pattern: &'static str,
    other_pattern: &'static str,
    user_status: &'static str,
    group_status: &'static str,
    /// An SQL expression: never, ended, not yet.
    end: &'static str,
    third: i32,
    new_id: u32,
}

impl Picked {
    fn random(rng: &mut SmallRng) -> Self {
        Self {
            user: rng.random_range(1..=USERS),
            other_user: rng.random_range(1..=USERS),
            group: rng.random_range(1..=GROUPS),
            other_group: rng.random_range(1..=GROUPS),
            directory: rng.random_range(0..3),
            action: ACTIONS.choose(rng).unwrap(),
            pattern: PATTERNS.choose(rng).unwrap(),
            other_pattern: PATTERNS.choose(rng).unwrap(),
            user_status: ["active", "active", "active", "suspended", "deleted"].choose(rng).unwrap(),
            group_status: ["active", "active", "deleted"].choose(rng).unwrap(),
            end: ["null", "now() - interval '1 second'", "now() + interval '1 hour'"].choose(rng).unwrap(),
            third: rng.random_range(0..3),
            new_id: rng.random_range(1_000_000..2_000_000),
        }
    }

    fn users(&self) -> Vec<String> {
        let Self { user, other_user, directory, user_status, .. } = self;
        vec![
            format!(
                "update authz.users set status = '{user_status}', directory_id = {directory} where user_id between {user} and {other_user}"
            ),
            format!("update authz.users set status = 'external', directory_id = null where user_id = {user}"),
            format!(
                "update authz.users set user_name = (select o.user_name from authz.users o where o.user_id = {user} + {other_user} - users.user_id) where user_id in ({user}, {other_user})"
            ),
            format!(
                "update authz.users set external_id = case when external_id is null then 'sub{other_user}' end where user_id = {user}"
            ),
            // The name of one who is deleted goes to another, until that one is not only marked as deleted.
            format!("insert into authz.users (user_name, directory_id) values ('u{user}', {directory})"),
            format!("delete from authz.users where user_id > {USERS}"),
        ]
    }

    fn groups(&self) -> Vec<String> {
        let Self { group, other_group, group_status, new_id, .. } = self;
        vec![
            format!(
                "update authz.groups set status = '{group_status}' where group_id in ({group}, {other_group})"
            ),
            format!(
                "with new as (insert into authz.groups (group_name) values ('n{new_id}') returning group_id)
                 insert into authz.group_groups (parent_group_id, child_group_id) select group_id, {group} from new"
            ),
            // The last part runs first: the edge is there before the group.
            format!(
                "with new as (insert into authz.groups (group_id, group_name) values ({new_id}, 'n{new_id}')),
                      edge as (insert into authz.group_groups (parent_group_id, child_group_id) values ({group}, {new_id}))
                 select"
            ),
        ]
    }

    fn members(&self) -> Vec<String> {
        let Self { user, other_user, group, other_group, third, .. } = self;
        vec![
            format!(
                "insert into authz.group_users (group_id, user_id) select {group}, n from generate_series(1, {USERS}) n where n % 3 = {third} on conflict do nothing"
            ),
            format!(
                "delete from authz.group_users where group_id between {group} and {other_group} and user_id % 3 = {third}"
            ),
            format!(
                "update authz.group_users set group_id = {group} where group_id = {other_group} and user_id not in (select user_id from authz.group_users where group_id = {group})"
            ),
            format!(
                "update authz.group_users set user_id = {user} where user_id = {other_user} and group_id not in (select group_id from authz.group_users where user_id = {user})"
            ),
            format!(
                "with gone as (update authz.groups set status = 'deleted' where group_id = {group})
                 insert into authz.group_users (group_id, user_id) values ({group}, {user}) on conflict do nothing"
            ),
        ]
    }

    fn directories(&self) -> Vec<String> {
        let Self { group, directory, .. } = self;
        vec![
            format!(
                "insert into authz.group_directories (group_id, directory_id) values ({group}, {directory}) on conflict do nothing"
            ),
            format!(
                "delete from authz.group_directories where group_id = {group} or directory_id = {directory}"
            ),
            format!(
                "update authz.group_directories set directory_id = {directory} where group_id = {group} and (select count(*) from authz.group_directories where group_id = {group}) = 1"
            ),
        ]
    }

    fn edges(&self) -> Vec<String> {
        let Self { group, other_group, third, .. } = self;
        let many = format!(
            "insert into authz.group_groups (parent_group_id, child_group_id) select {group}, n from generate_series(1, {GROUPS}) n where n <> {group} and n % 3 = {third} on conflict do nothing"
        );
        vec![
            many.clone(),
            many, // twice as often, or most of the time there are none
            format!(
                "delete from authz.group_groups where parent_group_id = {group} or child_group_id = {other_group}"
            ),
            format!(
                "update authz.group_groups set child_group_id = parent_group_id, parent_group_id = child_group_id where {group} in (parent_group_id, child_group_id)"
            ),
            format!(
                "with taken as (delete from authz.group_groups where parent_group_id = {group} returning child_group_id)
                 insert into authz.group_groups (parent_group_id, child_group_id) select {other_group}, child_group_id from taken where child_group_id <> {other_group} limit 1 on conflict do nothing"
            ),
            format!(
                "with taken as (delete from authz.group_groups where child_group_id = {group}),
                      given as (insert into authz.group_groups (parent_group_id, child_group_id) values ({other_group}, {group}) on conflict do nothing)
                 select"
            ),
            format!(
                "merge into authz.group_groups e using (select n from generate_series(1, {GROUPS}) n where n <> {group}) s on e.parent_group_id = {group} and e.child_group_id = s.n
                 when matched then delete
                 when not matched and n % 3 = {third} then insert (parent_group_id, child_group_id) values ({group}, n)"
            ),
        ]
    }

    fn actions(&self) -> Vec<String> {
        let Self { action, .. } = self;
        vec![
            format!("insert into authz.actions (action_name) values ('{action}') on conflict do nothing"),
            format!("delete from authz.actions where action_name = '{action}'"),
        ]
    }

    fn user_grants(&self) -> Vec<String> {
        let Self { user, other_user, pattern, end, third, .. } = self;
        vec![
            format!(
                "insert into authz.user_actions (user_id, action_name, expires_at) select n, '{pattern}', {end} from generate_series(1, {USERS}) n where n % 3 = {third}
                 on conflict (user_id, action_name) do update set expires_at = excluded.expires_at"
            ),
            format!("delete from authz.user_actions where user_id between {user} and {other_user} and action_name <> '{pattern}'"),
        ]
    }

    fn group_grants(&self) -> Vec<String> {
        let Self { group, other_group, pattern, other_pattern, end, third, .. } = self;
        vec![
            format!(
                "insert into authz.group_actions (group_id, action_name, expires_at) select n, '{pattern}', {end} from generate_series(1, {GROUPS}) n where n % 3 = {third}
                 on conflict (group_id, action_name) do update set expires_at = excluded.expires_at"
            ),
            format!(
                "insert into authz.group_actions (group_id, action_name) values ({group}, '{pattern}'), ({other_group}, '{pattern}')
                 on conflict (group_id, action_name) do update set action_name = '{other_pattern}'"
            ),
            format!("delete from authz.group_actions where group_id between {group} and {other_group} and action_name <> '{pattern}'"),
            format!(
                "update authz.group_actions set action_name = '{pattern}' where action_name = '{other_pattern}' and group_id not in (select group_id from authz.group_actions where action_name = '{pattern}')"
            ),
            format!(
                "update authz.group_actions set group_id = {group} where group_id = {other_group} and action_name not in (select action_name from authz.group_actions where group_id = {group})"
            ),
            format!(
                "with taken as (delete from authz.group_actions where action_name = '{pattern}' returning group_id)
                 insert into authz.group_actions (group_id, action_name, reason) select group_id, '{pattern}', 'again' from taken limit 1"
            ),
            format!(
                "with moved as (update authz.group_actions set action_name = '{other_pattern}' where action_name = '{pattern}' and group_id not in (select group_id from authz.group_actions where action_name = '{other_pattern}') returning group_id)
                 insert into authz.group_actions (group_id, action_name) select group_id, '{pattern}' from moved limit 1"
            ),
            // Given again with another reason, so that some go and some come.
            format!(
                "merge into authz.group_actions ga using (select n, 'reason ' || k as reason from generate_series({group}, {other_group}) n, generate_series(0, 1) k) s
                     on ga.group_id = s.n and ga.action_name = '{pattern}' and ga.reason = s.reason
                 when matched then delete
                 when not matched and s.reason = 'reason {third}' then insert (group_id, action_name, reason) values (n, '{pattern}', s.reason)"
            ),
        ]
    }
}
