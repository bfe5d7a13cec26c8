//! The program: its options, its exit codes, and what it prints.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use sqlx::{Executor, PgPool};
use testdb::Database;

async fn database() -> (Database, PgPool) {
    let database = Database::create(&authz::schema_fingerprint(), |url| async move {
        let pool = PgPool::connect(&url).await?;
        authz::migrate(&pool).await?;
        pool.close().await;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    })
    .await
    .unwrap();
    let pool = PgPool::connect(database.url()).await.unwrap();
    (database, pool)
}

/// Nothing of the environment of the tests themselves reaches the program.
fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_authz"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("AUTHZ_") || name.starts_with("PG") || name == "USER" {
            command.env_remove(name);
        }
    }
    command.args(arguments);
    command
}

fn ended(output: &Output) -> (i32, String) {
    (output.status.code().unwrap(), String::from_utf8(output.stdout.clone()).unwrap())
}

/// The exit code and what it printed.
fn run(database: &Database, arguments: &[&str]) -> (i32, String) {
    let mut command = command(arguments);
    command.env("AUTHZ_DATABASE_URL", database.url()).env("AUTHZ_ACTOR", "root@example.com");
    ended(&command.output().unwrap())
}

fn json(database: &Database, arguments: &[&str]) -> (i32, Value) {
    let (code, text) = run(database, &[arguments, &["--output", "json"]].concat());
    (code, serde_json::from_str(&text).expect(&text))
}

/// It went well.
fn good(database: &Database, arguments: &[&str]) -> String {
    let (code, text) = run(database, arguments);
    assert_eq!(code, 0, "{arguments:?}: {text}");
    text
}

fn world(database: &Database) {
    for arguments in [
        &["actions", "register", "workers.scale", "--description", "more or fewer"][..],
        &["users", "create", "ada"],
        &["users", "create", "bo"],
        &["groups", "create", "ops"],
        &["groups", "add", "ops", "user:ada"],
        &["grant", "group:ops", "workers.*", "--reason", "on call"],
        &["grant", "user:bo", "workers.scale", "--reason", "for a day", "--until", "2030-01-01T00:00:00Z"],
    ] {
        good(database, arguments);
    }
}

#[tokio::test]
async fn grants_are_made_asked_about_and_taken_back() {
    let (database, _) = database().await;
    world(&database);
    assert!(good(&database, &["can", "ada", "workers.scale"]).starts_with("allow"));
    assert_eq!(good(&database, &["who-can", "workers.scale"]), "ada\nbo\n");
    let (_, page) = json(&database, &["who-can", "workers.scale", "--limit", "1"]);
    assert_eq!((&page["users"][0], &page["next"]), (&"ada".into(), &"ada".into()));
    assert_eq!(good(&database, &["actions", "list", "--of", "ada"]), "workers.scale\n");
    let (_, explained) = json(&database, &["explain", "ada", "workers.scale"]);
    assert_eq!(explained["paths"][0]["reason"], "on call");
    let (_, shown) = json(&database, &["users", "show", "bo"]);
    assert_eq!(shown["grants"][0]["granted_by"], "root@example.com");
    assert_eq!(json(&database, &["users", "list"]).1["users"].as_array().unwrap().len(), 2);
    assert_eq!(json(&database, &["groups", "list"]).1["groups"][0]["name"], "ops");

    good(&database, &["revoke", "group:ops", "workers.*"]);
    let (code, denied) = run(&database, &["can", "ada", "workers.scale"]);
    assert_eq!((code, denied.starts_with("deny")), (3, true), "{denied}");
    let (code, why) = run(&database, &["explain", "ada", "workers.scale"]);
    assert_eq!((code, why.contains("missing")), (3, true), "{why}");
    let (_, list) = json(&database, &["audit", "list", "--limit", "1"]);
    let record = &list["records"][0];
    assert_eq!(
        (&record["action"], &record["actor"], &record["service"]),
        (&"grant.remove".into(), &"root@example.com".into(), &"authz".into())
    );
}

#[tokio::test]
async fn what_fails_and_what_is_misused_have_their_exit_codes() {
    let (database, _) = database().await;
    let (code, failed) = json(&database, &["grant", "user:nobody", "x.*", "--reason", "none"]);
    assert_eq!((code, failed["error"].as_str().unwrap().contains("`nobody`")), (1, true), "{failed}");
    for arguments in [
        &["grant", "ada", "x.*", "--reason", "none"][..],
        &["grant", "user:ada", "x.*"],
        &["can", "ada"],
        &["audit", "verify", "--checkpoint", "1:xyz"],
        &["audit", "seal", "--every", "0"],
        &[],
    ] {
        assert_eq!(run(&database, arguments).0, 2, "{arguments:?}");
    }
    // Neither a database nor an actor in the environment.
    assert_eq!(ended(&command(&["can", "ada", "x"]).output().unwrap()).0, 2);
    let mut nobody = command(&["users", "create", "ada", "--database-url", database.url()]);
    assert_eq!(ended(&nobody.output().unwrap()).0, 2);
    let mut nowhere = command(&["can", "ada", "x", "--database-url", "postgres://nobody@127.0.0.1:1/none"]);
    assert_eq!(ended(&nowhere.output().unwrap()).0, 1);
}

#[tokio::test]
async fn grant_that_has_ended_or_says_no_reason_is_a_usage_error() {
    let (database, pool) = database().await;
    world(&database);
    let grants = "select count(*) + (select count(*) from authz.group_actions) from authz.user_actions";
    let grant = |holder: &str, more: &[&str]| {
        let output = command(&[&["grant", holder, "workers.*"], more].concat())
            .env("AUTHZ_DATABASE_URL", database.url())
            .env("AUTHZ_ACTOR", "root@example.com")
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    // The database's clock counts, and the time zone: two hours from now stands there.
    let (past, future): (String, String) = sqlx::query_as(
        "select to_char(east - interval '1 s', form), to_char(east + interval '1 min', form)
         from (select now() at time zone 'UTC' + interval '2 h' as east, 'YYYY-MM-DD\"T\"HH24:MI:SS\"+02:00\"' as form) t",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    for holder in ["user:ada", "group:ops"] {
        for until in ["2020-01-01T00:00:00Z", "1969-12-31T23:59:59Z", &past] {
            let (code, told) = grant(holder, &["--reason", "for a day", "--until", until]);
            assert_eq!((code, told.contains("is in the past")), (2, true), "{told}");
        }
        for reason in ["", " \t"] {
            let (code, told) = grant(holder, &["--reason", reason]);
            assert_eq!((code, told.contains("--reason") && told.contains("say why")), (2, true), "{told}");
        }
    }
    let number: i64 = sqlx::query_scalar(grants).fetch_one(&pool).await.unwrap();
    assert_eq!(number, 2, "those of before");
    let (code, told) = grant("user:ada", &["--reason", "for a minute", "--until", &future]);
    assert_eq!(code, 0, "{told}");
}

#[tokio::test]
async fn role_that_may_not_is_told_what_grants_it() {
    let (database, pool) = database().await;
    sqlx::raw_sql(include_str!("../../../deploy/sql/roles.sql")).execute(&pool).await.unwrap();
    let separator = if database.url().contains('?') { '&' } else { '?' };
    let url = format!("{}{separator}options[role]=authz_reader", database.url());
    for arguments in [&["users", "create", "ada"][..], &["audit", "list"], &["audit", "seal"]] {
        let (code, failed) = json(&database, &[arguments, &["--database-url", &url]].concat());
        let error = failed["error"].as_str().unwrap();
        assert_eq!(code, 1, "{arguments:?}: {failed}");
        for part in ["permission denied", "deploy/sql/roles.sql grants"] {
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_trail_is_sealed_kept_outside_exported_and_verified() {
    let (database, pool) = database().await;
    world(&database);
    let folder = tempfile::tempdir().unwrap();
    let key = path(folder.path(), "key");
    let public = good(&database, &["audit", "key", "--signing-key-file", &key]).trim().to_owned();
    assert_eq!(
        run(&database, &["audit", "key", "--signing-key-file", &key]).0,
        1,
        "a key is not written over"
    );
    let (_, sealed) = json(&database, &["audit", "seal", "--signing-key-file", &key]);
    assert!(sealed["records"].as_i64().unwrap() > 2, "{sealed}");
    let checkpoint = good(&database, &["audit", "checkpoint"]).trim().to_owned();
    assert_eq!(sealed["checkpoint"], checkpoint.as_str());

    let trusted = ["--checkpoint", &checkpoint, "--trusted-key", &public];
    let (code, report) = json(&database, &[&["audit", "verify"][..], &trusted].concat());
    assert_eq!((code, &report["clean"], &report["unsealed"]), (0, &true.into(), &0.into()), "{report}");
    let (plain, zipped) = (path(folder.path(), "trail.ndjson"), path(folder.path(), "trail.ndjson.gz"));
    for file in [&plain, &zipped] {
        good(&database, &["audit", "export", "--file", file]);
        // Without a database.
        let mut offline = command(&["audit", "verify", file]);
        offline.args(trusted);
        let (code, text) = ended(&offline.output().unwrap());
        assert_eq!((code, text.ends_with("clean\n")), (0, true), "{text}");
    }
    assert_eq!(good(&database, &["audit", "export"]), std::fs::read_to_string(&plain).unwrap());
    let other = "2:0000000000000000000000000000000000000000000000000000000000000000";
    assert_eq!(run(&database, &["audit", "verify", "--checkpoint", other]).0, 3);

    let spoilt = std::fs::read_to_string(&plain).unwrap().replace("on call", "no call");
    std::fs::write(&plain, spoilt).unwrap();
    let (code, text) = ended(&command(&["audit", "verify", &plain]).output().unwrap());
    assert_eq!((code, text.contains("TAMPERED: record ")), (3, true), "{text}");
    pool.execute(
        "set session_replication_role = replica; update authz.audit_log set actor = 'x' where audit_id = 1",
    )
    .await
    .unwrap();
    let (code, report) = json(&database, &["verify"]);
    assert_eq!(
        (code, &report["finding"]["audit_id"], &report["finding"]["problem"]),
        (3, &1.into(), &"record_altered".into())
    );
}

#[tokio::test]
async fn a_grant_slipped_in_with_the_triggers_off_shows() {
    let (database, pool) = database().await;
    world(&database);
    good(&database, &["verify", "--state"]);
    pool.execute("begin; set local session_replication_role = replica; insert into authz.user_actions (user_id, action_name) select user_id, '*' from authz.users where user_name = 'ada'; commit")
        .await
        .unwrap();
    good(&database, &["verify"]);
    let (code, report) = json(&database, &["verify", "--state"]);
    assert_eq!((code, &report["differences"][0]["live"]["grant"]), (3, &"*".into()), "{report}");
}

#[tokio::test]
async fn pruning_leaves_young_months_alone() {
    let (database, _) = database().await;
    world(&database);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().to_str().unwrap();
    let (code, pruned) = json(&database, &["audit", "prune", "--keep-months", "0", "--folder", folder]);
    assert_eq!((code, pruned["dropped"].as_array().unwrap().len()), (0, 0));
}

/// Whoever misspells an option of the database's URL need not read its value in a log.
#[tokio::test]
async fn password_in_the_url_is_in_no_output() {
    let (database, _) = database().await;
    for level in ["warn", "trace"] {
        let separator = if database.url().contains('?') { '&' } else { '?' };
        let mut command = command(&["users", "list"]);
        command.env("AUTHZ_LOG", level).env("AUTHZ_ACTOR", "root@example.com");
        command.env("AUTHZ_DATABASE_URL", format!("{}{separator}sslpassword=hunter2", database.url()));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        for text in [&output.stdout, &output.stderr] {
            assert!(!String::from_utf8_lossy(text).contains("hunter2"), "{level}");
        }
    }
}

#[tokio::test]
async fn warning_has_no_colours_where_nobody_looks() {
    let (database, _pool) = database().await;
    world(&database);
    let output = command(&["can", "ada", "never.registered"])
        .env("AUTHZ_DATABASE_URL", database.url())
        .output()
        .unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("never.registered") && !told.contains('\u{1b}'), "{told:?}");
}
