//! A private server survives its own death, with all that was committed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use testdb::Server;

#[tokio::test]
async fn committed_is_there_after_a_crash_and_the_rest_is_not() {
    let mut server = Server::start().await.unwrap();
    let url = server.url("postgres");
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let fsync: String = sqlx::query_scalar("SHOW fsync").fetch_one(&mut connection).await.unwrap();
    assert_eq!(fsync, "on");
    sqlx::raw_sql("CREATE TABLE note (number integer)").execute(&mut connection).await.unwrap();
    for number in 1..=3 {
        sqlx::query("INSERT INTO note VALUES ($1)").bind(number).execute(&mut connection).await.unwrap();
        let mut open = PgConnection::connect(&url).await.unwrap();
        let mut open = open.begin().await.unwrap();
        sqlx::query("INSERT INTO note VALUES (-1)").execute(&mut *open).await.unwrap();

        server.kill().unwrap();
        assert!(sqlx::query("SELECT 1").execute(&mut connection).await.is_err());
        assert!(PgConnection::connect(&url).await.is_err());
        // Killing what is dead changes nothing.
        server.kill().unwrap();

        server.restart().await.unwrap();
        assert_eq!(server.url("postgres"), url);
        connection = PgConnection::connect(&url).await.unwrap();
        let numbers: Vec<i32> = sqlx::query_scalar("SELECT number FROM note ORDER BY 1")
            .fetch_all(&mut connection)
            .await
            .unwrap();
        assert_eq!(numbers, (1..=number).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn dropped_server_is_gone() {
    for killed in [false, true] {
        let mut server = Server::start().await.unwrap();
        let url = server.url("postgres");
        let socket = url.split(['@', ':']).nth(2).unwrap().replace("%2F", "/");
        assert!(std::path::Path::new(&socket).is_dir(), "{socket}");
        if killed {
            server.kill().unwrap();
        }
        drop(server);
        assert!(PgConnection::connect(&url).await.is_err());
        assert!(!std::path::Path::new(&socket).exists(), "{socket}");
    }
}

/// Waits until the standby has a note of this number.
async fn arrives(standby: &mut PgConnection, number: i32) {
    let waiting = async {
        loop {
            let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM note WHERE number = $1)")
                .bind(number)
                .fetch_one(&mut *standby)
                .await
                .unwrap();
            if there {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_mins(1), waiting).await.is_ok(), "{number} does not arrive");
}

async fn write(url: &str, number: i32) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query("INSERT INTO note VALUES ($1)").bind(number).execute(&mut connection).await.unwrap();
}

#[tokio::test]
async fn standby_follows_also_after_the_death_of_either() {
    let mut server = Server::start().await.unwrap();
    let primary = server.url("postgres");
    let mut connection = PgConnection::connect(&primary).await.unwrap();
    sqlx::raw_sql("CREATE TABLE note (number integer)").execute(&mut connection).await.unwrap();
    write(&primary, 1).await;

    let mut standby = server.standby().await.unwrap();
    let url = standby.url("postgres");
    assert_ne!(url, primary);
    let mut reader = PgConnection::connect(&url).await.unwrap();
    arrives(&mut reader, 1).await;
    write(&primary, 2).await;
    arrives(&mut reader, 2).await;
    assert!(sqlx::query("INSERT INTO note VALUES (-1)").execute(&mut reader).await.is_err());

    server.kill().unwrap();
    arrives(&mut reader, 2).await;
    server.restart().await.unwrap();
    write(&primary, 3).await;
    arrives(&mut reader, 3).await;

    standby.kill().unwrap();
    write(&primary, 4).await;
    standby.restart().await.unwrap();
    let mut reader = PgConnection::connect(&url).await.unwrap();
    arrives(&mut reader, 4).await;

    for gone in [standby, server] {
        let socket = gone.url("").split(['@', ':']).nth(2).unwrap().replace("%2F", "/");
        assert!(std::path::Path::new(&socket).is_dir(), "{socket}");
        drop(gone);
        assert!(!std::path::Path::new(&socket).exists(), "{socket}");
    }
}

#[tokio::test]
async fn dead_server_gets_no_standby() {
    let mut server = Server::start().await.unwrap();
    server.kill().unwrap();
    let error = server.standby().await.err().unwrap();
    assert!(matches!(error, testdb::Error::NotStarted { .. }), "{error}");
}
