//! Organisations of three sizes, made by Postgres itself.

#![allow(dead_code, reason = "each bench uses a part")]

use authz::{ActionName, UserName};
use rand::Rng;
use rand::rngs::SmallRng;
use sqlx::{Executor, PgPool};
use testdb::Database;

pub(crate) struct World {
    pub(crate) name: &'static str,
    pub(crate) users: u32,
    pub(crate) groups: u32,
    pub(crate) memberships: u32,
    pub(crate) grants: u32,
}

pub(crate) const SMALL: World =
    World { name: "S", users: 1_000, groups: 100, memberships: 5_000, grants: 500 };
pub(crate) const MEDIUM: World =
    World { name: "M", users: 100_000, groups: 5_000, memberships: 1_000_000, grants: 20_000 };
pub(crate) const LARGE: World =
    World { name: "L", users: 1_000_000, groups: 50_000, memberships: 10_000_000, grants: 200_000 };

const ACTIONS: u32 = 1_000;

impl World {
    /// Groups in trees of depth three and more; grants to groups and (one in ten) to users, one in twenty a wildcard
    /// and one in twenty ended; one user in fifty is suspended.
    ///
    /// The memberships are put in without triggers, the foreign keys' among them, and in order, which saves most of the
    /// time. The grants after them, in the same transaction, raise the revision.
    pub(crate) async fn build(&self) -> Database {
        let database = Database::empty().await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        authz::migrate(&pool).await.unwrap();
        let World { users, groups, memberships, grants, .. } = self;
        let script = format!(
            "select setseed(0.5);
             insert into authz.actions
                 select format('area%s.task%s', n % 20, n) from generate_series(1, {ACTIONS}) n;
             insert into authz.users (user_id, user_name, status)
                 select n, format('user%s@example.com', n), case when n % 50 = 0 then 'suspended' else 'active' end
                 from generate_series(1, {users}) n;
             insert into authz.groups (group_id, group_name)
                 select n, format('group%s@example.com', n) from generate_series(1, {groups}) n;
             insert into authz.group_groups
                 select n / 5, n from generate_series(5, {groups}) n where n % 5 <> 0 and n / 5 > 0;
             do $$
             declare
                 by_user text := pg_get_indexdef('authz.group_users_by_user'::regclass);
             begin
                 set local session_replication_role = replica;
                 drop index authz.group_users_by_user;
                 insert into authz.group_users (group_id, user_id)
                     select distinct 1 + floor(random() * {groups})::bigint, 1 + n % {users}
                     from generate_series(1, {memberships}) n
                     order by 1, 2;
                 execute by_user;
                 set local session_replication_role = origin;
             end $$;
             insert into authz.group_actions (group_id, action_name, expires_at)
                 select 1 + floor(random() * {groups})::bigint,
                        case when n % 20 = 0 then format('area%s.*', n % 19)
                             else format('area%s.task%s', a % 20, a) end,
                        case when n % 20 = 1 then now() - interval '1 day' end
                 from (select n, 1 + floor(random() * {ACTIONS})::int as a
                       from generate_series(1, {grants} * 9 / 10) n) v
                 on conflict do nothing;
             insert into authz.user_actions (user_id, action_name)
                 select 1 + floor(random() * {users})::bigint, format('area%s.task%s', a % 20, a)
                 from (select n, 1 + floor(random() * {ACTIONS})::int as a from generate_series(1, {grants} / 10) n) v
                 on conflict do nothing;"
        );
        pool.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(script))).await.unwrap();
        // As autovacuum would before long. Until then no index answers alone: the query of a load took four times as long.
        // A vacuum that another one, an automatic one say, keeps from seeing that all rows are old marks no page as visible to
        // all: then Postgres reads all of a small `group_reach` rather than its index, which takes twice the time.
        let mut visible = false;
        while !visible {
            pool.execute("vacuum analyze").await.unwrap();
            visible = sqlx::query_scalar(
                "select bool_and(relallvisible > 0) from pg_class
                 where oid in ('authz.group_reach'::regclass, 'authz.group_users'::regclass)",
            )
            .fetch_one(&pool)
            .await
            .unwrap();
        }
        pool.close().await;
        database
    }

    /// Whether a random user may do a random task.
    pub(crate) fn question(&self, rng: &mut SmallRng) -> (UserName, ActionName) {
        let task = rng.random_range(1..=ACTIONS);
        let user = format!("user{}@example.com", rng.random_range(1..=self.users));
        let action = format!("area{}.task{task}", task % 20);
        (UserName::parse(&user).unwrap(), ActionName::parse(&action).unwrap())
    }
}
