//! A private server survives its own death, with all that was committed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

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
