//! What is dropped in the middle of its work, or fails there, leaves the pool of its host with connections that answer the
//! questions they are asked, and no others.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may stop")]

mod support;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::str::FromStr;
use std::task::Poll;
use std::time::Duration;

use authz::audit::operation::OperationError;
use authz::audit::{self, Outcome, Query, Record, Trust};
use authz::grant::{Grant, to_user};
use authz::group::{Role, create};
use authz::mirror::{Failure, PlanOptions, Run, StagedGroup, StagedMember, StagedUser};
use authz::{Authz, Error, GroupName, Snapshot, UserName, check, check_many, explain, users_who_can};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use testdb::Database;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use self::support::{action, admin, database, group, pattern, user};

const DEADLINE: Duration = Duration::from_mins(1);

/// So much that a copy of it comes in many pieces.
const WORLD: &str = "
    insert into authz.actions values ('a');
    insert into authz.users (user_name, display_name) select 'user' || n, repeat('x', 800) from generate_series(1, 400) n;
    insert into authz.groups (group_name) select 'group' || n from generate_series(1, 20) n;
    insert into authz.group_users (group_id, user_id)
        select g.group_id, u.user_id from authz.groups g, authz.users u where u.user_id % 7 = g.group_id % 7;
    insert into authz.group_actions (group_id, action_name) select group_id, 'a' from authz.groups where group_id % 7 = 1;
    insert into authz.users (user_name) values ('ada'), ('bob');
    insert into authz.user_actions (user_id, action_name) select user_id, 'a' from authz.users where user_name = 'ada';
    insert into authz.audit_log (service, actor, action, outcome)
        select repeat('s', 100), 'ada', 'workers.scale', 'succeeded' from generate_series(1, 500)";

/// What it gives, or nothing if it has to wait more often than so many times; it is dropped then.
async fn waiting_at_most<T>(times: usize, work: impl Future<Output = T>) -> Option<T> {
    let (mut work, mut left) = (pin!(work), times);
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

/// A pool of so few connections that whoever comes next gets the same ones. It brings answers in pieces, so that whoever
/// reads a long one has to wait in its middle.
async fn pool_of(connections: u32, database: &Database) -> PgPool {
    let server = PgConnectOptions::from_str(database.url()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut here = PgConnectOptions::new_without_pgpass()
        .host("127.0.0.1")
        .port(listener.local_addr().unwrap().port())
        .ssl_mode(PgSslMode::Disable)
        .username(server.get_username());
    if let Some(database) = server.get_database() {
        here = here.database(database);
    }
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(hand_on(client, server.clone()));
        }
    });
    PgPoolOptions::new().max_connections(connections).connect_with(here).await.unwrap()
}

async fn hand_on(client: TcpStream, server: PgConnectOptions) {
    // Whichever of the two ends, the other notices.
    let _ = if let Some(folder) = server.get_socket() {
        let path = folder.join(format!(".s.PGSQL.{}", server.get_port()));
        piece_by_piece(client, UnixStream::connect(path).await.unwrap()).await
    } else {
        let address = (server.get_host(), server.get_port());
        piece_by_piece(client, TcpStream::connect(address).await.unwrap()).await
    };
}

async fn piece_by_piece(
    mut client: TcpStream,
    mut server: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<(u64, u64)> {
    copy_bidirectional_with_sizes(&mut client, &mut server, 1024, 1024).await
}

async fn world() -> (Database, PgPool) {
    let (database, pool) = database().await;
    sqlx::raw_sql(WORLD).execute(&pool).await.unwrap();
    (database, pool)
}

/// Also that no session is left in a transaction: each statement on its own is another one.
async fn answers_are_right(pool: &PgPool, ada_may: bool, when: &str) {
    let mut transactions = Vec::new();
    for n in 0..3_i32 {
        let found: i32 = sqlx::query_scalar("select $1 + 0").bind(n).fetch_one(pool).await.expect(when);
        assert_eq!(found, n, "{when}");
        let current = "select pg_current_xact_id()::text";
        let transaction: String = sqlx::query_scalar(current).fetch_one(pool).await.expect(when);
        assert!(!transactions.contains(&transaction), "{when}: a transaction is open");
        transactions.push(transaction);
        for (name, may) in [("ada", ada_may), ("bob", false)] {
            let decision = check(pool, &user(name), &action("a")).await.expect(when);
            assert_eq!(decision.is_allow(), may, "{when}");
        }
    }
}

/// Drops the work at each of its waits, until it has done in time.
async fn dropped_anywhere<T>(
    database: &Database,
    what: &str,
    work: impl AsyncFn(PgPool) -> Result<T, Error>,
) -> T {
    dropped_anywhere_on(pool_of(1, database).await, what, work).await
}

async fn dropped_anywhere_on<T>(
    pool: PgPool,
    what: &str,
    work: impl AsyncFn(PgPool) -> Result<T, Error>,
) -> T {
    let ada_may = check(&pool, &user("ada"), &action("a")).await.unwrap().is_allow();
    let mut times = 0;
    loop {
        if let Some(done) = waiting_at_most(times, work(pool.clone())).await {
            assert!(times > 0, "{what} never waits");
            return done.expect(what);
        }
        let when = format!("{what} is dropped at its wait {times}");
        // On each connection: the others are lent out, and the longest idle one is lent next.
        for _ in 0..pool.options().get_max_connections() {
            let mut others = Vec::new();
            for _ in 1..pool.options().get_max_connections() {
                others.push(pool.acquire().await.expect(&when));
            }
            answers_are_right(&pool, ada_may, &when).await;
        }
        times += 1;
    }
}

#[tokio::test]
async fn questions_and_changes_dropped_anywhere_leave_the_pool_whole() {
    let (database, pool) = world().await;
    let (ada, a) = (user("ada"), action("a"));
    let _ = dropped_anywhere(&database, "a check", async |pool| check(&pool, &ada, &a).await).await;
    let many: Vec<_> = ["bob", "ada", "nobody"].map(|name| (user(name), action("a"))).into();
    dropped_anywhere(&database, "many checks", async |pool| check_many(&pool, &many).await).await;
    dropped_anywhere(&database, "an explanation", async |pool| explain(&pool, &ada, &a).await).await;
    dropped_anywhere(&database, "a list", async |pool| users_who_can(&pool, &a, None, 100).await).await;
    let grant = Grant::new(pattern("*"), "on call");
    dropped_anywhere(&database, "a grant", async |pool| to_user(&pool, &ada, &grant, &admin()).await).await;
    let record = Record::new("x", Outcome::Succeeded);
    dropped_anywhere(&database, "a record", async |pool| audit::record(&pool, &admin(), &record).await).await;
    let snapshot = Snapshot::options().listen(false).start(pool).await.unwrap();
    let _ = dropped_anywhere(&database, "a confirmed check", async |pool| {
        snapshot.check_confirmed(&pool, &ada, &a).await
    })
    .await;
}

#[tokio::test]
async fn snapshot_dropped_while_it_loads_leaves_the_pool_whole() {
    let (database, _pool) = world().await;
    let start = async |pool| Snapshot::options().listen(false).start(pool).await;
    Box::pin(dropped_anywhere(&database, "a start", start)).await;
}

#[tokio::test]
async fn audit_jobs_dropped_anywhere_leave_the_pool_whole() {
    let (database, _pool) = world().await;
    let seal = async |pool| {
        loop {
            let sealed = audit::seal(&pool, None).await?;
            // The session of the one that was dropped before may still end.
            if !sealed.busy {
                return Ok(sealed);
            }
            tokio::task::yield_now().await;
        }
    };
    dropped_anywhere(&database, "a seal", seal).await;
    let page = async |pool: PgPool| Query::new().page(&pool, None, 10).await;
    assert_eq!(dropped_anywhere(&database, "a page", page).await.entries.len(), 10);
    let state = async |pool| audit::verify_state(&pool).await;
    assert_eq!(dropped_anywhere(&database, "a verify of the state", state).await, []);
    let could = async |pool| {
        audit::who_could(&pool, &action("a"), audit::Moment::At(chrono::DateTime::<chrono::Utc>::MAX_UTC))
            .await
    };
    dropped_anywhere(&database, "a replay", could).await;
    let verify = async |pool| audit::verify(&pool, &Trust::new()).await;
    assert_eq!(dropped_anywhere(&database, "a verify", verify).await.finding, None);
    let export = async |pool| audit::export(&pool, 1, None, &mut io::sink()).await;
    assert!(dropped_anywhere(&database, "an export", export).await.records > 500);
}

#[tokio::test]
async fn sync_dropped_while_it_stages_leaves_the_pool_whole() {
    let (database, pool) = world().await;
    sqlx::raw_sql(
        "insert into authz.directories (directory_name) values ('main');
         insert into authz.users (user_name, display_name, directory_id, external_id)
             select 'listed' || n, repeat('x', 200), directory_id, n::text
             from authz.directories, generate_series(1, 1500) n where directory_name = 'main'",
    )
    .execute(&pool)
    .await
    .unwrap();
    let directory = "main".parse().unwrap();
    let member = |n| StagedMember::User { external_id: format!("{n}"), name: None, role: Role::Member };
    let work = async |one| {
        let expired = "update authz.sync_leases set expires_at = clock_timestamp()";
        sqlx::query(expired).execute(&pool).await.unwrap();
        let run = Run::begin(&one, &directory, "a test").await?;
        // The mirror's users are read meanwhile.
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        let nested = StagedMember::Group { external_id: "h".to_owned() };
        run.stage_members("g", (0..9_000).map(member).chain([nested]).collect()).await?;
        run.finish_members("g", false).await?;
        run.fail("it was a test", 0, &admin()).await
    };
    let failure = Box::pin(dropped_anywhere(&database, "a run", work)).await;
    assert_eq!(failure, Failure::Recorded);
}

/// A run whose listing puts a hundred users into a new group.
async fn staged(pool: PgPool) -> Result<Run, Error> {
    let run = Run::begin(&pool, &"main".parse().unwrap(), "a test").await?;
    let ids = || (0..100).map(|n| n.to_string());
    let listed = |external_id: String| StagedUser {
        name: UserName::parse(&format!("listed{external_id}")).ok(),
        external_id,
        display_name: String::new(),
        suspended: false,
    };
    let group = StagedGroup {
        external_id: "g".to_owned(),
        name: GroupName::parse("g").ok(),
        display_name: String::new(),
        description: String::new(),
    };
    let member = |external_id| StagedMember::User { external_id, name: None, role: Role::Owner };
    run.stage_users(ids().map(listed).collect()).await?;
    run.stage_groups(&[group]).await?;
    run.stage_members("g", ids().map(member).collect()).await?;
    run.finish_members("g", false).await?;
    run.staged().await?;
    Ok(run)
}

#[tokio::test]
async fn sync_dropped_while_it_copies_leaves_the_pool_whole() {
    let (database, pool) = world().await;
    let work = async |one: PgPool| {
        let expired = "update authz.sync_leases set expires_at = clock_timestamp()";
        sqlx::query(expired).execute(&pool).await.unwrap();
        // Nearly one wait, so that what is dropped is what comes after.
        let run = tokio::spawn(staged(one)).await.unwrap()?;
        let planned = run.plan(PlanOptions::default()).await.map_err(|(_, error)| error)?;
        planned.apply(None, 0, &admin()).await
    };
    // The copying session is watched from another one, and may be interrupted from a third.
    Box::pin(dropped_anywhere_on(pool_of(3, &database).await, "a run", work)).await;
    let members = "select count(*) from authz.group_users m
                   join authz.groups g using (group_id) join authz.users u using (user_id)
                   where g.external_id = 'g' and u.user_name = 'listed' || u.external_id and m.role = 'owner'";
    assert_eq!(sqlx::query_scalar::<_, i64>(members).fetch_one(&pool).await.unwrap(), 100);
}

#[tokio::test]
async fn migration_that_is_dropped_or_fails_leaves_no_lock() {
    let (database, pool) = world().await;
    dropped_anywhere(&database, "a migration", async |pool| authz::migrate(&pool).await).await;
    let newer = "insert into authz._sqlx_migrations (version, description, success, checksum, execution_time)
                 values (99990101000000, 'of a later version', true, '', 0)";
    sqlx::query(newer).execute(&pool).await.unwrap();
    for _ in 0..2 {
        let migrated =
            tokio::time::timeout(DEADLINE, authz::migrate(&pool)).await.expect("it waits for a lock");
        assert!(matches!(migrated, Err(Error::Migrate(_))), "{migrated:?}");
    }
    let locks = "select count(*) from pg_locks l join pg_database d on d.oid = l.database
                 where d.datname = current_database() and l.locktype = 'advisory'";
    let gone = async {
        while sqlx::query_scalar::<_, i64>(locks).fetch_one(&pool).await.unwrap() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("a lock is held");
}

/// A page that was taken in and then lost is not the absence of whom it named.
#[tokio::test]
async fn page_that_is_lost_is_not_absence() {
    let (_database, pool) = world().await;
    let directory = "main".parse().unwrap();
    let run = Run::begin(&pool, &directory, "a test").await.unwrap();
    let member = |n| StagedMember::User { external_id: format!("{n}"), name: None, role: Role::Member };
    let nested = StagedMember::Group { external_id: "h".to_owned() };
    run.stage_members("g", (0..9_000).map(member).chain([nested]).collect()).await.unwrap();
    // It goes to a table that somebody has locked, and nobody waits.
    let mut locker = pool.begin().await.unwrap();
    sqlx::raw_sql("lock table authz.sync_stage_members").execute(&mut *locker).await.unwrap();
    let mut finishing = Box::pin(async {
        run.finish_members("g", false).await?;
        run.staged().await
    });
    let waits = "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock' and query like 'copy authz.sync_stage_members%'";
    let sent = async {
        while sqlx::query_scalar::<_, i64>(waits).fetch_one(&pool).await.unwrap() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        finished = &mut finishing => panic!("{finished:?}"),
        sent = tokio::time::timeout(DEADLINE, sent) => sent.expect("the copy does not wait"),
    }
    drop(finishing);
    locker.rollback().await.unwrap();
    let (run, error) = run.plan(PlanOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::StagingLost { .. }), "{error}");
    assert_eq!(run.fail(&error.to_string(), 0, &admin()).await.unwrap(), Failure::Recorded);
}

/// A step that is dropped while its savepoint begins takes all of the transaction along, and that is what is told.
#[tokio::test]
async fn change_whose_step_was_dropped_is_told_as_it_ended() {
    let (database, pool) = world().await;
    sqlx::query("create table roles (role_name text)").execute(&pool).await.unwrap();
    let authz = Authz::new(pool_of(1, &database).await);
    let (ada, a, name, me) = (user("ada"), action("a"), group("ops"), admin());
    let mut rolled_back = 0;
    for times in 0.. {
        let mut is_created = false;
        let done = authz
            .operation_named(&ada, &a)
            .transact(async |_, connection| {
                sqlx::query("insert into roles values ('web')").execute(&mut *connection).await?;
                let step = waiting_at_most(times, create(&mut *connection, &name, "", &me)).await;
                is_created = step.is_some_and(|created| created.is_ok());
                sqlx::query("select 1").execute(connection).await
            })
            .await;
        let count = |rows: &'static str| sqlx::query_scalar::<_, i64>(rows).fetch_one(&pool);
        let there = count("select count(*) from roles").await.unwrap() == 1;
        match done {
            Ok(_) => assert!(there, "{times}"),
            Err(OperationError::RolledBack(_)) => {
                assert!(!there, "{times}");
                rolled_back += 1;
            }
            Err(error) => panic!("{times}: {error}"),
        }
        let outcome: String = sqlx::query_scalar(
            "select outcome::text from authz.audit_log where action = 'a' order by audit_id desc limit 1",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        assert_eq!(outcome, if there { "succeeded" } else { "failed" }, "{times}");
        sqlx::query("delete from roles").execute(&pool).await.unwrap();
        if is_created {
            break;
        }
    }
    assert!(rolled_back > 0);
    authz.shutdown().await;
}
