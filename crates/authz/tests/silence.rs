//! The database, or a job, falls silent, with no word of an end: who waits for it stops waiting.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;
#[path = "support/trail.rs"]
mod trail;

use std::str::FromStr;
use std::time::Duration;

use authz::audit::operation::OperationError;
use authz::audit::retention::prune;
use authz::audit::{Outcome, Record, Sealer, Writer, seal};
use authz::grant::{Grant, to_user};
use authz::{Authz, action as actions, user as users};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use testdb::Database;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::support::{action, admin, database, pattern, user};
use self::trail::{fill, old_months, this_month};

/// A way to the database that can go silent.
struct Way {
    pool: PgPool,
    silent: watch::Sender<bool>,
    _serving: JoinSet<()>,
}

impl Way {
    async fn open(database: &Database) -> Self {
        let server = PgConnectOptions::from_str(database.url()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(listener.local_addr().unwrap().port())
            .ssl_mode(PgSslMode::Disable)
            .username(server.get_username())
            .database(server.get_database().unwrap());
        let silent = watch::Sender::new(false);
        let (mut serving, is_silent) = (JoinSet::new(), silent.clone());
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(serve(client, server.clone(), is_silent.subscribe()));
            }
        });
        let pool = PgPoolOptions::new().max_connections(3).connect_with(here).await.unwrap();
        Self { pool, silent, _serving: serving }
    }

    /// From here on nothing arrives, nobody is told, and hours pass at once.
    fn go_silent(&self) {
        self.silent.send_replace(true);
        tokio::time::pause();
    }
}

async fn serve(client: TcpStream, server: PgConnectOptions, silent: watch::Receiver<bool>) {
    if let Some(folder) = server.get_socket() {
        let path = folder.join(format!(".s.PGSQL.{}", server.get_port()));
        hand_on(client, UnixStream::connect(path).await.unwrap(), silent).await;
    } else {
        let address = (server.get_host(), server.get_port());
        hand_on(client, TcpStream::connect(address).await.unwrap(), silent).await;
    }
}

async fn hand_on(
    mut client: TcpStream,
    mut server: impl AsyncRead + AsyncWrite + Unpin,
    mut silent: watch::Receiver<bool>,
) {
    tokio::select! {
        biased;
        () = async { drop(silent.wait_for(|silent| *silent).await) } => std::future::pending().await,
        _ = copy_bidirectional(&mut client, &mut server) => {}
    }
}

/// On a clock that goes on by itself where there is nothing else to do.
async fn ends<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_hours(3), work).await.expect(what)
}

#[tokio::test]
async fn sealer_ends_though_the_database_is_silent() {
    let (database, pool) = database().await;
    fill(&pool, 4).await;
    // In its step, and when it makes partitions.
    for lock in [
        "lock table authz.audit_seals in access exclusive mode",
        "lock table authz.audit_log in access exclusive mode",
    ] {
        let way = Way::open(&database).await;
        let mut locker = pool.begin().await.unwrap();
        sqlx::query(lock).execute(&mut *locker).await.unwrap();
        let sealer = Sealer::start(way.pool.clone(), Duration::from_millis(10), None);
        let waits = "select exists (select from pg_locks l join pg_database d on d.oid = l.database
                                    where not l.granted and d.datname = current_database())";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&pool).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        way.go_silent();
        ends("the end of the sealer", sealer.shutdown()).await;
        ends("the end of its pool", way.pool.close()).await;
        tokio::time::resume();
        locker.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn change_that_fails_ends_though_the_database_is_silent() {
    let (database, pool) = database().await;
    actions::register(&pool, &[(action("workers.scale"), "")], &admin()).await.unwrap();
    users::create(&pool, &user("ada"), "Ada", &admin()).await.unwrap();
    to_user(&pool, &user("ada"), &Grant::new(pattern("workers.*"), ""), &admin()).await.unwrap();
    let way = Way::open(&database).await;
    let authz = Authz::new(way.pool.clone());
    let (ada, scale) = (user("ada"), action("workers.scale"));
    let change = authz.operation_named(&ada, &scale).transact(async |_, _| {
        way.go_silent();
        Err::<(), _>("it does not work")
    });
    let done = ends("the end of the change", change).await;
    assert!(matches!(done, Err(OperationError::Failed("it does not work"))), "{done:?}");
    ends("the end of the service", authz.shutdown()).await;
    ends("the end of its pool", way.pool.close()).await;
}

#[tokio::test]
async fn record_is_written_though_the_connection_of_the_writer_fell_silent() {
    let (database, _pool) = database().await;
    let way = Way::open(&database).await;
    let (writer, who) = (Writer::start(way.pool.clone()), admin());
    let record = Record::new("workers.scale", Outcome::Denied);
    let first = writer.record(&who, &record).await.unwrap();
    // The connections that there are; those to come are served.
    way.silent.send_replace(true);
    tokio::task::yield_now().await;
    way.silent.send_replace(false);
    let skip = async |seconds| {
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(seconds)).await;
        tokio::time::resume();
    };
    skip(2).await;
    let mut writing = Box::pin(writer.record(&who, &record));
    // It is asked by then whether it is alive; were it not yet, the wait would be one of some seconds.
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut writing).await.is_err());
    skip(6).await;
    assert_eq!(writing.await.unwrap(), first + 1, "nothing was sent twice");
}

#[tokio::test]
async fn server_is_told_to_end_a_job_that_falls_silent() {
    let (_database, pool) = database().await;
    // What holds in the transaction that writes a seal, or the record of a prune.
    sqlx::raw_sql(
        "create table public.told (job text, setting text, value text);
         create function tell() returns trigger language plpgsql as $$ begin
             insert into public.told
             select tg_table_name, name, current_setting(name)
             from unnest(array['idle_in_transaction_session_timeout', 'client_connection_check_interval']) name;
             return null;
         end $$;
         create trigger tell after insert on authz.audit_seals for each row execute function tell();
         create trigger tell after insert on authz.audit_log for each row when (new.action = 'audit.prune')
             execute function tell();",
    )
    .execute(&pool)
    .await
    .unwrap();
    old_months(&pool).await;
    seal(&pool, None).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    prune(&pool, this_month(&pool).await, folder.path(), None, &admin()).await.unwrap();
    let told: Vec<(String, String, String)> = sqlx::query_as(
        "select distinct case when job like 'audit_log%' then 'prune' else 'seal' end, setting, value
         from told order by 1, 2",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let row = |job: &str, setting: &str, value: &str| (job.to_owned(), setting.to_owned(), value.to_owned());
    let (check, idle) = ("client_connection_check_interval", "idle_in_transaction_session_timeout");
    assert_eq!(
        told,
        [
            row("prune", check, "5s"),
            row("prune", idle, "1min"),
            row("seal", check, "5s"),
            row("seal", idle, "1min")
        ]
    );
}
