//! What people who operate it look at: logs, history, freshness, metrics.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use testdb::Database;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use self::support::*;

fn org() -> Org {
    Org::new("C1").user("1", "ada").user("2", "bo").group("g1", "ops").member("g1", "1").member("g1", "2")
}

fn run_of(database: &Database, path: &Path) -> Program {
    Program::job("run", database.url()).file(path)
}

fn ask(command: &str, database: &Database) -> Program {
    Program::new(command).option("--database-url", database.url())
}

#[tokio::test]
async fn json_log_is_one_object_a_line_and_ends_with_the_run() {
    let (database, pool) = database().await;
    let (_folder, path) = org().write();
    let outcome = run_of(&database, &path).option("--log-format", "json").output().await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let lines: Vec<Value> = outcome.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert_eq!(
        (&last["message"], &last["status"], &last["exit_code"]),
        (&"run ended".into(), &"applied".into(), &0.into())
    );
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()));
    assert_eq!(last["conflicts"], 0);
    execute(&pool, "insert into authz.users (user_name, directory_id) values ('cy@example.com', 0)").await;
    let (_folder, with_cy) = org().user("3", "cy").write();
    let outcome = run_of(&database, &with_cy).option("--log-format", "json").output().await;
    let last: Value = serde_json::from_str(outcome.stderr.lines().last().unwrap()).unwrap();
    assert_eq!((&last["status"], &last["conflicts"]), (&"unchanged".into(), &1.into()), "all is not well");
    let quiet = run_of(&database, &path).environment("DIR_SYNC_LOG_FORMAT", "json").option("--log", "warn");
    assert_eq!(quiet.output().await.stderr, "");
}

/// A machine's log that shows warnings only has it, and a person reads it once.
#[tokio::test]
async fn end_that_somebody_has_to_look_at_is_a_warning_or_an_error() {
    let (database, _pool) = database().await;
    let (_folder, path) = org().write();
    assert_eq!(run_of(&database, &path).output().await.code, 0);
    let (_folder, emptied) = Org::new("C1").user("3", "cy").write();
    let (_folder, elsewhere) = Org::new("C2").user("3", "cy").write();
    for (path, level, says) in [(emptied, "WARN", "run again with --approve"), (elsewhere, "ERROR", "`C2`")] {
        let warnings = run_of(&database, &path).option("--log-format", "json").option("--log", "warn");
        let logged = warnings.output().await;
        let line: Value = serde_json::from_str(logged.stderr.trim_end()).unwrap();
        assert_eq!((&line["message"], &line["level"]), (&"run ended".into(), &level.into()), "{line}");
        assert!(line["reason"].as_str().unwrap().contains(says), "{line}");
        let read = Program::new("run")
            .option("--database-url", database.url())
            .option("--directory", MAIN)
            .file(&path);
        let read = read.output().await;
        assert_eq!(read.stderr.matches(says).count(), 1, "{read:?}");
    }
}

#[tokio::test]
async fn log_for_people_has_no_colours_where_nobody_looks_and_a_wrong_filter_is_no_silence() {
    let (database, _pool) = database().await;
    let (_folder, path) = org().write();
    let logged = run_of(&database, &path).option("--log", "info").output().await;
    assert!(logged.stderr.contains("run ended") && !logged.stderr.contains('\u{1b}'), "{logged:?}");
    let wrong = run_of(&database, &path).environment("DIR_SYNC_LOG", "dir_sync=loud").output().await;
    assert_eq!(wrong.code, 2, "{wrong:?}");
    assert!(wrong.stderr.contains("--log") && wrong.stderr.contains("dir_sync=loud"), "{wrong:?}");
}

#[tokio::test]
async fn terminal_shows_how_far_the_crawl_is_in_one_line_that_is_gone_at_the_end() {
    const CLEAR: &str = "\r\u{1b}[2K";
    let (database, _pool) = database().await;
    let (_folder, path) = org().write();
    let run = ask("run", &database).option("--directory", MAIN).file(&path).option("--log", "off");
    let (code, sent) = run.output_on_terminal().await;
    assert_eq!(code, Some(0), "{sent:?}");
    let drawn: Vec<_> = sent.split(CLEAR).collect();
    assert!(drawn.len() > 2 && drawn.concat().contains(" groups, 2 users, "), "{sent:?}");
    assert!(drawn.iter().all(|line| !line.contains('\n')), "one line: {sent:?}");
    assert!(sent.ends_with(CLEAR), "gone at the end: {sent:?}");
    assert_eq!(run.output().await.stderr, "", "nothing where nobody looks");
}

#[tokio::test]
async fn history_and_freshness_are_told() {
    let (database, pool) = database().await;
    let stale = ask("status", &database).option("--max-age", "1h").output().await;
    assert_eq!(stale.code, 7, "nothing was ever synced: {stale:?}");
    let unknown = ask("status", &database).option("--directory", MAIN).output().await;
    assert_eq!(unknown.code, 1, "{unknown:?}");
    assert!(unknown.stderr.contains("`main` is not known"), "{unknown:?}");

    applied(&pool, &org()).await;
    let (_folder, path) = Org::new("C1").user("3", "cy").write();
    assert_eq!(run_of(&database, &path).output().await.code, 3);
    let fresh = ask("status", &database).option("--max-age", "1h").option("--output", "json").output().await;
    assert_eq!(fresh.code, 0, "{fresh:?}");
    let main = &fresh.json()["directories"][0];
    assert_eq!((&main["directory"], &main["last_status"]), (&"main".into(), &"refused".into()));
    assert!(main["age_seconds"].as_f64().unwrap() < DEADLINE.as_secs_f64());
    execute(&pool, "update authz.directories set last_complete_sync_at = now() - interval '3 hours' where directory_id <> 0").await;
    let stale = ask("status", &database).option("--max-age", "2h").output().await;
    assert_eq!(stale.code, 7, "{stale:?}");
    assert!(
        stale.stdout.contains("3 h 0 min old, which is more than 2 h 0 min; run 2 is the newest: refused"),
        "{stale:?}"
    );
    assert_eq!(ask("status", &database).output().await.code, 0, "asked without a limit");

    let runs = ask("runs", &database).option("--output", "json").output().await.json();
    let statuses: Vec<_> =
        runs["runs"].as_array().unwrap().iter().map(|run| run["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["refused", "applied"], "the newest first");
    let text = ask("runs", &database).option("--directory", MAIN).option("--limit", "1").output().await;
    assert_eq!(text.stdout.lines().count(), 2, "{text:?}");
    assert!(
        text.stdout.contains("refused") && text.stdout.contains("2 of 2 users would be removed"),
        "{text:?}"
    );
    assert_eq!(ask("runs", &database).option("--directory", "other").output().await.code, 1);
    assert_eq!(ask("status", &database).option("--max-age", "soon").output().await.code, 2);
}

#[tokio::test]
async fn directory_that_was_never_complete_is_not_fresh() {
    let (database, _pool) = database().await;
    let (folder, path) = org().write();
    assert_eq!(Program::job("plan", database.url()).file(&path).output().await.code, 0);
    let status = ask("status", &database).option("--max-age", "1h").output().await;
    assert_eq!(status.code, 7, "{status:?}");
    assert!(status.stdout.contains("never complete, which is more than 1 h 0 min"), "{status:?}");
    let json = ask("status", &database).option("--output", "json").output().await.json();
    assert_eq!(json["directories"][0]["age_seconds"], Value::Null);

    // A group whose members are not in the file.
    let mut incomplete = org().json();
    incomplete["members"].as_object_mut().unwrap().remove("g1").unwrap();
    incomplete["groups"][0]["directMembersCount"] = "2".into();
    std::fs::write(&path, incomplete.to_string()).unwrap();
    let file = folder.path().join("dir_sync.prom");
    let partial = run_of(&database, &path).option("--metrics-file", &file).output().await;
    assert_eq!(partial.code, 4, "{partial:?}");
    let never = "dir_sync_last_complete_sync_timestamp_seconds{directory=\"main\"} 0";
    let told = std::fs::read_to_string(file).unwrap();
    assert!(told.lines().any(|line| line == never), "or no alert ever fires: {told}");
}

#[tokio::test]
async fn metrics_file_tells_how_each_run_ended() {
    let (database, pool) = database().await;
    let (folder, path) = org().write();
    let file = folder.path().join("dir_sync.prom");
    let with_metrics = |program: Program| {
        let file = file.clone();
        async move {
            let outcome = program.option("--metrics-file", &file).output().await;
            (outcome.code, std::fs::read_to_string(file).unwrap())
        }
    };
    let (code, text) = with_metrics(run_of(&database, &path)).await;
    assert_eq!(code, 0);
    let since = number(&pool, "select floor(extract(epoch from last_complete_sync_at))::bigint from authz.directories where directory_id <> 0").await;
    for line in [
        "dir_sync_last_run_exit_code{directory=\"main\"} 0".to_owned(),
        "dir_sync_last_run_status{directory=\"main\",status=\"applied\"} 1".to_owned(),
        "dir_sync_last_run_status{directory=\"main\",status=\"failed\"} 0".to_owned(),
        "dir_sync_last_run_changes{directory=\"main\",kind=\"users\",change=\"added\"} 2".to_owned(),
        "dir_sync_last_run_listed{directory=\"main\",kind=\"memberships\"} 2".to_owned(),
        format!("dir_sync_last_complete_sync_timestamp_seconds{{directory=\"main\"}} {since}"),
    ] {
        assert!(text.lines().any(|other| other == line), "`{line}` is not in:\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("5 another run holds the lease, 6 ended by a signal\n"), "{text}");
    let (_folder, other) = Org::new("C1").user("3", "cy").write();
    let (code, text) = with_metrics(run_of(&database, &other)).await;
    assert_eq!(code, 3);
    assert!(text.contains("status=\"refused\"} 1") && text.contains("sync_timestamp_seconds"), "{text}");
    let (code, text) = with_metrics(Program::job("run", "postgres://127.0.0.1:1/none").file(&path)).await;
    assert_eq!(code, 1);
    let known = format!("dir_sync_last_complete_sync_timestamp_seconds{{directory=\"main\"}} {since}");
    assert!(text.lines().any(|line| line == known), "an alert on its age needs it: {text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert!(
        text.contains("exit_code{directory=\"main\"} 1") && text.contains("status=\"failed\"} 1"),
        "{text}"
    );
    let names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "a file was left behind: {names:?}");

    let nowhere =
        run_of(&database, &path).option("--metrics-file", "/nonexistent/dir_sync.prom").output().await;
    assert_eq!(nowhere.code, 0, "metrics that cannot be written are a warning: {nowhere:?}");
    assert!(nowhere.stderr.contains("could not be written"), "{nowhere:?}");
}

/// Whose options stand in the environment, where a person plans too.
#[tokio::test]
async fn plan_leaves_the_metrics_of_the_newest_run() {
    let (database, _pool) = database().await;
    let (folder, path) = org().write();
    let file = folder.path().join("dir_sync.prom");
    let gateway = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", gateway.local_addr().unwrap());
    let plan = |url: &str| {
        Program::job("plan", url)
            .file(&path)
            .environment("DIR_SYNC_METRICS_FILE", &file)
            .environment("DIR_SYNC_PUSH_GATEWAY", &address)
    };
    assert_eq!(plan(database.url()).output().await.code, 0);
    assert!(!file.exists(), "there was no run yet");
    let run = run_of(&database, &path).environment("DIR_SYNC_METRICS_FILE", &file).output().await;
    assert_eq!(run.code, 0, "{run:?}");
    let told = std::fs::read_to_string(&file).unwrap();
    assert!(told.contains("status=\"applied\"} 1"), "{told}");
    for (url, code) in [(database.url(), 0), ("postgres://127.0.0.1:1/none", 1)] {
        let outcome = plan(url).output().await;
        assert_eq!((outcome.code, outcome.stderr.as_str()), (code, ""), "{outcome:?}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), told);
    }
    let pushed = tokio::time::timeout(std::time::Duration::ZERO, gateway.accept()).await;
    assert!(pushed.is_err(), "the push gateway was told of a plan");
}

/// A push gateway that takes one request and answers with this status.
async fn gateway(status: u16) -> (String, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let taken = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"# EOF\n") {
            assert!(stream.read_buf(&mut request).await.unwrap() > 0, "the request ended early");
        }
        let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    });
    (address, taken)
}

#[tokio::test]
async fn push_gateway_is_told_and_never_fails_a_run() {
    let (database, _pool) = database().await;
    let (_folder, path) = org().write();
    let (address, taken) = gateway(200).await;
    let outcome = run_of(&database, &path).option("--push-gateway", format!("{address}/")).output().await;
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    let request = taken.await.unwrap();
    // Not with PUT: that would take away what this run cannot tell, such as the freshness of an unreachable database.
    assert!(request.starts_with("POST /metrics/job/dir-sync/directory/main HTTP/1.1\r\n"), "{request}");
    assert!(request.contains("dir_sync_last_run_exit_code{directory=\"main\"} 0\n"), "{request}");

    let (refusing, _taken) = gateway(400).await;
    for (address, says) in [
        (refusing.as_str(), "answered with status 400"),
        ("http://127.0.0.1:1", "cannot be reached"),
        ("pushgateway:9091", "`pushgateway:9091` is no address of a push gateway"),
        ("me:secret@pushgateway:9091", "`pushgateway:9091` is no address of a push gateway"),
        ("http://me:12/secret@pushgateway:9091", "`pushgateway:9091` is no address of a push gateway"),
        ("http://me:12?secret@pushgateway:9091", "`pushgateway:9091` is no address of a push gateway"),
    ] {
        let outcome = run_of(&database, &path).environment("DIR_SYNC_PUSH_GATEWAY", address).output().await;
        assert_eq!((outcome.code, outcome.status().as_str()), (0, "unchanged"), "{outcome:?}");
        assert!(outcome.stderr.contains(says), "{outcome:?}");
        assert!(!outcome.stderr.contains("secret"), "{outcome:?}");
    }
}

#[tokio::test]
async fn password_for_a_push_gateway_is_sent_and_never_told() {
    const USER_AND_PASSWORD: &str = "bWU6cEBzcy93b3Jk"; // me:p@ss/word
    let (database, _pool) = database().await;
    let (_folder, path) = org().write();
    for status in [200, 401] {
        let (address, taken) = gateway(status).await;
        let with_password = address.replace("http://", "http://me:p%40ss%2Fword@");
        let run = run_of(&database, &path).environment("DIR_SYNC_PUSH_GATEWAY", with_password);
        let outcome = run.option("--log", "trace").output().await;
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let request = taken.await.unwrap();
        let header = format!("authorization: Basic {USER_AND_PASSWORD}\r\n");
        assert!(request.contains(&header), "{request}");
        assert!(request.contains(&format!("host: {}\r\n", address.replace("http://", ""))), "{request}");
        for part in ["p%40ss", "p@ss", USER_AND_PASSWORD] {
            assert!(!outcome.stderr.contains(part) && !outcome.stdout.contains(part), "`{part}` was told");
        }
    }
}

/// The first process of a container sees no signal that it does not handle.
#[tokio::test]
async fn signal_ends_what_only_looks_or_migrates_at_once() {
    let (database, pool) = database().await;
    let (_folder, path) = org().write();
    let doctor = Program::job("doctor", database.url()).file(&path);
    for (program, table, lock) in [
        (ask("status", &database), "authz.directories", "lock table authz.directories"),
        (ask("runs", &database), "authz.sync_runs", "lock table authz.sync_runs"),
        (ask("migrate", &database), "authz._sqlx_migrations", "lock table authz._sqlx_migrations"),
        (doctor, "authz._sqlx_migrations", "lock table authz._sqlx_migrations"),
    ] {
        let mut locker = pool.begin().await.unwrap();
        sqlx::query(lock).execute(&mut *locker).await.unwrap();
        let running = program.spawn();
        until("it waits for the table", async || waits_for_lock(&pool, table).await).await;
        running.signal(Signal::TERM);
        let outcome = tokio::time::timeout(DEADLINE, running.output()).await.unwrap();
        assert_eq!(outcome.code, 6, "{outcome:?}");
        let said = format!("{}{}", outcome.stdout, outcome.stderr);
        assert!(said.contains("ended by SIGTERM"), "{outcome:?}");
        locker.rollback().await.unwrap();
        assert_eq!(program.output().await.code, 0, "nothing is left in its way");
    }
}

/// Who reads the log of a machine sees no standard output.
#[tokio::test]
async fn failure_to_begin_is_one_error_in_a_log_for_machines() {
    let (database, _pool) = database().await;
    let missing = ask("run", &database).option("--directory", MAIN).file(Path::new("/nonexistent/org.json"));
    let nobody = Program::new("status").option("--database-url", "postgres://127.0.0.1:1/none");
    for (program, says) in [(missing, "does not exist"), (nobody, "cannot be reached")] {
        let logged = program.clone().option("--log-format", "json").option("--output", "json").output().await;
        assert_eq!(logged.code, 1, "{logged:?}");
        let lines: Vec<Value> =
            logged.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 1, "{logged:?}");
        assert_eq!((&lines[0]["level"], &lines[0]["exit_code"]), (&"ERROR".into(), &1.into()));
        assert!(lines[0]["error"].as_str().unwrap().contains(says), "{logged:?}");
        let read = program.output().await;
        assert_eq!(read.stderr.matches(says).count(), 1, "a person reads it once: {read:?}");
    }
}

#[tokio::test]
async fn patterns_that_keep_no_group_are_named() {
    let (database, _pool) = database().await;
    let (_folder, path) = org().write();
    let plan = |pattern: &str| {
        let plan = Program::job("plan", database.url()).file(&path).option("--include-groups", pattern);
        plan.option("--log", "warn").option("--log-format", "json")
    };
    let none = plan("osp@*,web@*").output().await;
    assert_eq!(none.code, 0, "{none:?}");
    let line: Value = serde_json::from_str(none.stderr.trim_end()).unwrap();
    assert_eq!((&line["level"], &line["include_groups"]), (&"WARN".into(), &"osp@*,web@*".into()));
    assert_eq!(run_of(&database, &path).output().await.code, 0);
    let some = plan("osp@*,ops@*").output().await;
    assert_eq!((some.code, some.stderr.as_str()), (0, ""), "unchanged groups are kept too: {some:?}");
}
