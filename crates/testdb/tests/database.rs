//! What a test gets from `Database`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashSet,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use testdb::Database;

async fn notes_table(url: String) -> sqlx::Result<()> {
    let mut connection = PgConnection::connect(&url).await?;
    sqlx::raw_sql("CREATE TABLE note (text text); INSERT INTO note VALUES ('from the template')")
        .execute(&mut connection)
        .await?;
    connection.close().await
}

async fn notes(url: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar("SELECT text FROM note ORDER BY text").fetch_all(&mut connection).await.unwrap()
}

async fn exists(name: &str) -> bool {
    let other = Database::empty().await.unwrap();
    let mut connection = PgConnection::connect(other.url()).await.unwrap();
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(name)
        .fetch_one(&mut connection)
        .await
        .unwrap()
}

#[tokio::test]
async fn databases_are_independent() {
    let one = Database::create("notes", notes_table).await.unwrap();
    let other = Database::create("notes", notes_table).await.unwrap();
    let mut connection = PgConnection::connect(one.url()).await.unwrap();
    sqlx::query("INSERT INTO note VALUES ('mine')").execute(&mut connection).await.unwrap();
    assert_eq!(notes(one.url()).await, ["from the template", "mine"]);
    assert_eq!(notes(other.url()).await, ["from the template"]);
    assert!(testdb::describe().unwrap().starts_with("PostgreSQL "));
}

#[tokio::test]
async fn template_is_prepared_once_for_many_tasks() {
    // A name of this test's own, since tests may run again on a server that is still there.
    let template = format!("once_{}", std::process::id());
    let prepared = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..40)
        .map(|_| {
            let (template, prepared) = (template.clone(), Arc::clone(&prepared));
            tokio::spawn(async move {
                Database::create(&template, |url| {
                    prepared.fetch_add(1, Ordering::SeqCst);
                    notes_table(url)
                })
                .await
                .unwrap()
            })
        })
        .collect();
    let mut databases = Vec::new();
    for task in tasks {
        databases.push(task.await.unwrap());
    }
    assert_eq!(prepared.load(Ordering::SeqCst), 1);
    let names: HashSet<_> = databases.iter().map(Database::name).collect();
    assert_eq!(names.len(), 40);
    for database in &databases {
        assert_eq!(notes(database.url()).await, ["from the template"]);
    }
}

#[tokio::test]
async fn failed_preparation_is_reported_and_not_kept() {
    let template = format!("failing_{}", std::process::id());
    let failing = Database::create(&template, async |url: String| {
        notes_table(url).await.unwrap();
        Err::<(), _>(std::io::Error::other("the migration is wrong"))
    });
    let error = failing.await.err().unwrap();
    assert!(matches!(error, testdb::Error::Prepare { .. }), "{error}");
    let database = Database::create(&template, notes_table).await.unwrap();
    assert_eq!(notes(database.url()).await, ["from the template"]);
}

#[tokio::test]
async fn cancelled_preparation_lets_the_next_one_prepare() {
    let template = format!("cancelled_{}", std::process::id());
    let (started, has_started) = tokio::sync::oneshot::channel();
    let task = tokio::spawn({
        let template = template.clone();
        async move {
            let never = async |url: String| {
                notes_table(url).await?;
                let _ = started.send(());
                std::future::pending::<sqlx::Result<()>>().await
            };
            Database::create(&template, never).await.map(drop)
        }
    });
    has_started.await.unwrap();
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    let database = Database::create(&template, notes_table).await.unwrap();
    assert_eq!(notes(database.url()).await, ["from the template"]);
}

#[tokio::test]
async fn connections_left_open_do_not_spoil_a_template() {
    let template = format!("open_{}", std::process::id());
    let mut left = None;
    let prepare = async |url: String| {
        notes_table(url.clone()).await?;
        left = Some(PgConnection::connect(&url).await?);
        Ok::<_, sqlx::Error>(())
    };
    let database = Database::create(&template, prepare).await.unwrap();
    assert_eq!(notes(database.url()).await, ["from the template"]);
}

#[tokio::test]
async fn dropped_database_is_gone_although_connected() {
    let database = Database::create("notes", notes_table).await.unwrap();
    let name = database.name().to_owned();
    let connection = PgConnection::connect(database.url()).await.unwrap();
    assert!(exists(&name).await);
    drop(database);
    assert!(!exists(&name).await);
    drop(connection);
}

#[test]
fn database_outlives_the_runtime_that_made_it() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let database = runtime().block_on(Database::empty()).unwrap();
    let name = database.name().to_owned();
    assert!(runtime().block_on(exists(&name)));
    drop(database);
    assert!(!runtime().block_on(exists(&name)));
}

#[tokio::test]
async fn database_has_no_objects_when_empty() {
    let database = Database::empty().await.unwrap();
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let text = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    let count: i64 = sqlx::query_scalar(AssertSqlSafe(text)).fetch_one(&mut connection).await.unwrap();
    assert_eq!(count, 0);
}

#[tokio::test]
async fn template_name_is_checked() {
    for name in ["", "A", "a-b", "a\"; drop", &"a".repeat(41)] {
        let error = Database::create(name, notes_table).await.err().unwrap();
        assert!(matches!(error, testdb::Error::TemplateName(_)), "{name}");
    }
}

#[tokio::test]
async fn psql_takes_the_url() {
    let Some(psql) = ["psql", "/usr/lib/postgresql/15/bin/psql"].into_iter().find(|psql| {
        Command::new(psql).arg("--version").output().is_ok_and(|output| output.status.success())
    }) else {
        eprintln!("skipped: there is no psql on this machine");
        return;
    };
    let database = Database::create("notes", notes_table).await.unwrap();
    let mut command = Command::new(psql);
    // A port in the environment must not lead elsewhere.
    command.args(["-AXtqc", "SELECT text FROM note"]).arg(database.url()).env("PGPORT", "1");
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "from the template", "{output:?}");
}
