//! From the commit of a revoke to the deny in another process, in world M.
//!
//! The bench starts itself once more, as the reader: a process with a snapshot that is told of a user and an action,
//! says when the user may, and then at what time it noticed that the user no longer may. Both read the machine's
//! monotonic clock. The time counts from before the commit is sent.

#![expect(clippy::unwrap_used, reason = "a benchmark may stop")]

mod worlds;

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use authz::audit::Actor;
use authz::grant::{self, Grant};
use authz::{ActionName, ActionPattern, GroupName, Snapshot, UserName};
use rand::Rng;
use rustix::time::{ClockId, clock_gettime};
use sqlx::PgPool;
use tokio::runtime::Runtime;

use self::worlds::MEDIUM;

const BY_NOTIFY: usize = 200;
const BY_POLLING: usize = 100;
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often the reader asks.
const LOOK: Duration = Duration::from_micros(50);
const ACTION: ActionName = ActionName::constant("revoked.soon");

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.as_slice() {
        [_, role, url, way] if role == "reader" => reader(url, way == "notify"),
        _ => Runtime::new().unwrap().block_on(writer()),
    }
}

/// Nanoseconds of a clock that all processes of this machine share.
fn now() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

fn reader(url: &str, by_notify: bool) {
    let runtime = Runtime::new().unwrap();
    let snapshot = runtime.block_on(async {
        let options = Snapshot::options().listen(by_notify);
        let options = if by_notify { options } else { options.poll_interval(POLL_INTERVAL) };
        options.start(PgPool::connect(url).await.unwrap()).await.unwrap()
    });
    println!("loaded");
    for user in std::io::stdin().lines() {
        let user = UserName::parse(&user.unwrap()).unwrap();
        let may = || snapshot.check(&user, &ACTION).unwrap().is_allow();
        while !may() {
            std::thread::sleep(LOOK);
        }
        println!("allow");
        while may() {
            std::thread::sleep(LOOK);
        }
        println!("{}", now());
    }
}

struct Reader {
    child: Child,
    questions: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Reader {
    fn start(url: &str, way: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["reader", url, way]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let questions = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut reader = Self { child, questions, answers };
        assert_eq!(reader.answer(), "loaded");
        reader
    }

    fn answer(&mut self) -> String {
        self.answers.next().unwrap().unwrap()
    }
}

/// Who holds the grant that comes and goes.
enum Holder {
    Group(GroupName),
    User(UserName),
}

async fn writer() {
    let database = MEDIUM.build().await;
    let pool = PgPool::connect(database.url()).await.unwrap();
    let actor = Actor::new("admin@example.com", "benches");
    authz::action::register(&pool, &[(ACTION, "")], &actor).await.unwrap();
    let (user, group, holders) = most_held(&pool).await;
    println!("world M on {}", testdb::describe().unwrap_or_default());
    println!("by NOTIFY: {BY_NOTIFY} times; by polling every {POLL_INTERVAL:?} alone: {BY_POLLING} times");
    for (way, times) in [("notify", BY_NOTIFY), ("poll", BY_POLLING)] {
        let mut reader = Reader::start(database.url(), way);
        if way == "notify" {
            listening(&pool).await;
        }
        for (what, holder) in [
            (format!("a group's grant that {holders} users hold"), Holder::Group(group.clone())),
            ("a user's grant".to_owned(), Holder::User(user.clone())),
        ] {
            let mut times = times_of(&pool, &mut reader, &holder, &user, &actor, times).await;
            times.sort_unstable();
            let at = |percent: usize| times.get((times.len() - 1) * percent / 100).copied().unwrap();
            println!("{way}: {what}: p50 {:?}, p99 {:?}, most {:?}", at(50), at(99), at(100));
        }
        drop(reader.questions);
        reader.child.wait().unwrap();
    }
}

async fn times_of(
    pool: &PgPool,
    reader: &mut Reader,
    holder: &Holder,
    user: &UserName,
    actor: &Actor,
    times: usize,
) -> Vec<Duration> {
    let pattern = ActionPattern::parse(ACTION.as_str()).unwrap();
    let grant = Grant::new(pattern.clone(), "until it is revoked");
    let mut measured = Vec::new();
    for _ in 0..times {
        match holder {
            Holder::Group(group) => grant::to_group(pool, group, &grant, actor).await.unwrap(),
            Holder::User(user) => grant::to_user(pool, user, &grant, actor).await.unwrap(),
        };
        writeln!(reader.questions, "{user}").unwrap();
        assert_eq!(reader.answer(), "allow");
        // The reader has just polled; a revoke comes at any time.
        tokio::time::sleep(POLL_INTERVAL.mul_f64(rand::rng().random())).await;
        let mut tx = pool.begin().await.unwrap();
        match holder {
            Holder::Group(group) => grant::revoke_from_group(&mut *tx, group, &pattern, actor).await.unwrap(),
            Holder::User(user) => grant::revoke_from_user(&mut *tx, user, &pattern, actor).await.unwrap(),
        };
        let start = now();
        tx.commit().await.unwrap();
        let end: i64 = reader.answer().parse().unwrap();
        measured.push(Duration::from_nanos((end - start).max(0).cast_unsigned()));
    }
    measured
}

/// An active user, the user's group above all, and how many users that has with all groups below.
async fn most_held(pool: &PgPool) -> (UserName, GroupName, i64) {
    let (group, user, holders): (String, String, i64) = sqlx::query_as(
        "select (select g.group_name from authz.groups g where g.group_id = an.ancestor_id),
                min(u.user_name), count(distinct gu.user_id)
         from authz.group_ancestors an
         join authz.group_users gu on gu.group_id = an.group_id
         join authz.users u on u.user_id = gu.user_id and u.status = 'active'
         where an.ancestor_id in (
             select c.ancestor_id from authz.group_ancestors c
             group by c.ancestor_id order by count(*) desc, c.ancestor_id limit 1)
         group by an.ancestor_id",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    (UserName::parse(&user).unwrap(), GroupName::parse(&group).unwrap(), holders)
}

/// Waits until the reader's listener is there.
async fn listening(pool: &PgPool) {
    loop {
        let there: bool = sqlx::query_scalar(
            "select exists (select from pg_stat_activity
                            where datname = current_database() and query ilike 'listen%')",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        if there {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
