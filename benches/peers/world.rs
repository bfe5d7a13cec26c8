//! One organisation in memory: drawn from a seed, put into a database, and asked by the plainest of all rules.

use std::collections::{BTreeSet, HashSet};

use authz::{ActionName, UserName};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use sqlx::PgPool;
use testdb::Database;

/// How large a world is.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) users: u32,
    pub(crate) groups: u32,
    pub(crate) memberships: u32,
    pub(crate) grants: u32,
}

/// Tasks 1 to `TASKS` are the actions; task n belongs to area n % `AREAS`.
pub(crate) const TASKS: u32 = 1_000;
pub(crate) const AREAS: u32 = 20;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Holder {
    User(u32),
    Group(u32),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Granted {
    Task(u32),
    Area(u32),
}

pub(crate) struct Grant {
    pub(crate) holder: Holder,
    pub(crate) granted: Granted,
    pub(crate) ended: bool,
}

pub(crate) struct World {
    pub(crate) shape: &'static Shape,
    /// (user, group), each once.
    pub(crate) memberships: BTreeSet<(u32, u32)>,
    pub(crate) grants: Vec<Grant>,
    live: HashSet<(Holder, Granted)>,
}

/// Who wants to do what: numbers for the peers' own names, parsed names for `authz`.
pub(crate) struct Question {
    pub(crate) user_number: u32,
    pub(crate) task: u32,
    pub(crate) user: UserName,
    pub(crate) action: ActionName,
}

pub(crate) fn user_name(user: u32) -> String {
    format!("user{user}@example.com")
}

pub(crate) fn group_name(group: u32) -> String {
    format!("group{group}@example.com")
}

pub(crate) fn is_suspended(user: u32) -> bool {
    user.is_multiple_of(50)
}

/// Trees: groups 1 to 4 and every fifth group are roots.
pub(crate) fn parent(group: u32) -> Option<u32> {
    (group > 5 && !group.is_multiple_of(5)).then_some(group / 5)
}

impl Granted {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Task(task) => format!("area{}.task{task}", task % AREAS),
            Self::Area(area) => format!("area{area}.*"),
        }
    }
}

impl World {
    /// The same world each time. Every user is in equally many groups; nine grants of ten are held by groups, one
    /// in twenty is a wildcard and one in twenty has ended.
    pub(crate) fn draw(shape: &'static Shape) -> Self {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut memberships = BTreeSet::new();
        for n in 0..shape.memberships {
            while !memberships.insert((1 + n % shape.users, rng.random_range(1..=shape.groups))) {}
        }
        let mut grants = Vec::new();
        let mut seen = HashSet::new();
        let mut live = HashSet::new();
        for n in 0..shape.grants {
            let (holder, granted) = loop {
                let holder = if n % 10 == 9 {
                    Holder::User(rng.random_range(1..=shape.users))
                } else {
                    Holder::Group(rng.random_range(1..=shape.groups))
                };
                let granted = if n % 20 == 0 {
                    Granted::Area(rng.random_range(0..AREAS))
                } else {
                    Granted::Task(rng.random_range(1..=TASKS))
                };
                if seen.insert((holder, granted)) {
                    break (holder, granted);
                }
            };
            let ended = n % 20 == 1;
            if !ended {
                live.insert((holder, granted));
            }
            grants.push(Grant { holder, granted, ended });
        }
        Self { shape, memberships, grants, live }
    }

    /// The grants that count; a peer is spared the ended ones.
    pub(crate) fn live_grants(&self) -> impl Iterator<Item = &Grant> {
        self.grants.iter().filter(|grant| !grant.ended)
    }

    pub(crate) fn groups_of(&self, user: u32) -> impl Iterator<Item = u32> {
        self.memberships.range((user, 0)..=(user, u32::MAX)).map(|(_, group)| *group)
    }

    /// The plainest rule: walk up from each group of the user.
    pub(crate) fn allows(&self, question: &Question) -> bool {
        let task = question.task;
        let covering = [Granted::Task(task), Granted::Area(task % AREAS)];
        let holds = |holder| covering.iter().any(|granted| self.live.contains(&(holder, *granted)));
        let user = question.user_number;
        !is_suspended(user)
            && (holds(Holder::User(user))
                || self.groups_of(user).any(|group| {
                    std::iter::successors(Some(group), |group| parent(*group))
                        .any(|group| holds(Holder::Group(group)))
                }))
    }

    pub(crate) fn questions(&self, seed: u64) -> impl Iterator<Item = Question> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let users = self.shape.users;
        std::iter::repeat_with(move || {
            let (user_number, task) = (rng.random_range(1..=users), rng.random_range(1..=TASKS));
            Question {
                user_number,
                task,
                user: UserName::parse(&user_name(user_number)).unwrap(),
                action: ActionName::parse(&Granted::Task(task).name()).unwrap(),
            }
        })
    }

    /// A fresh database that holds this world.
    pub(crate) async fn fill(&self) -> Database {
        let database = Database::empty().await.unwrap();
        let pool = PgPool::connect(database.url()).await.unwrap();
        authz::migrate(&pool).await.unwrap();
        let (users, groups): (Vec<_>, Vec<_>) =
            ((1..=self.shape.users).collect(), (1..=self.shape.groups).collect());

        sqlx::query("insert into authz.actions (action_name) select unnest($1::text[])")
            .bind((1..=TASKS).map(|task| Granted::Task(task).name()).collect::<Vec<_>>())
            .execute(&pool)
            .await
            .unwrap();
        sqlx::query(
            "insert into authz.users (user_id, user_name, status)
             select id, name, case when suspended then 'suspended' else 'active' end
             from unnest($1::bigint[], $2::text[], $3::boolean[]) as v (id, name, suspended)",
        )
        .bind(ids(users.iter().copied()))
        .bind(users.iter().map(|user| user_name(*user)).collect::<Vec<_>>())
        .bind(users.iter().map(|user| is_suspended(*user)).collect::<Vec<_>>())
        .execute(&pool)
        .await
        .unwrap();
        sqlx::query(
            "insert into authz.groups (group_id, group_name) select * from unnest($1::bigint[], $2::text[])",
        )
        .bind(ids(groups.iter().copied()))
        .bind(groups.iter().map(|group| group_name(*group)).collect::<Vec<_>>())
        .execute(&pool)
        .await
        .unwrap();
        let edges = || groups.iter().filter_map(|group| parent(*group).map(|parent| (parent, *group)));
        sqlx::query(
            "insert into authz.group_groups (parent_group_id, child_group_id)
             select * from unnest($1::bigint[], $2::bigint[])",
        )
        .bind(ids(edges().map(|(parent, _)| parent)))
        .bind(ids(edges().map(|(_, child)| child)))
        .execute(&pool)
        .await
        .unwrap();
        sqlx::query(
            "insert into authz.group_users (group_id, user_id) select * from unnest($1::bigint[], $2::bigint[])",
        )
        .bind(ids(self.memberships.iter().map(|(_, group)| *group)))
        .bind(ids(self.memberships.iter().map(|(user, _)| *user)))
        .execute(&pool)
        .await
        .unwrap();
        self.fill_grants(&pool).await;
        sqlx::query("analyze").execute(&pool).await.unwrap();
        pool.close().await;
        database
    }

    async fn fill_grants(&self, pool: &PgPool) {
        let rows = |of: fn(Holder) -> Option<u32>| {
            let grants =
                || self.grants.iter().filter_map(move |grant| of(grant.holder).map(|id| (id, grant)));
            (
                ids(grants().map(|(id, _)| id)),
                grants().map(|(_, grant)| grant.granted.name()).collect::<Vec<_>>(),
                grants().map(|(_, grant)| grant.ended).collect::<Vec<_>>(),
            )
        };
        let by_groups = rows(|holder| if let Holder::Group(group) = holder { Some(group) } else { None });
        let by_users = rows(|holder| if let Holder::User(user) = holder { Some(user) } else { None });
        for (statement, (holders, names, ended)) in [
            (
                "insert into authz.group_actions (group_id, action_name, expires_at)
                 select id, name, case when ended then now() - interval '1 day' end
                 from unnest($1::bigint[], $2::text[], $3::boolean[]) as v (id, name, ended)",
                by_groups,
            ),
            (
                "insert into authz.user_actions (user_id, action_name, expires_at)
                 select id, name, case when ended then now() - interval '1 day' end
                 from unnest($1::bigint[], $2::text[], $3::boolean[]) as v (id, name, ended)",
                by_users,
            ),
        ] {
            sqlx::query(statement).bind(holders).bind(names).bind(ended).execute(pool).await.unwrap();
        }
    }
}

fn ids(numbers: impl Iterator<Item = u32>) -> Vec<i64> {
    numbers.map(i64::from).collect()
}
