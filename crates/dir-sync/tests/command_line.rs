//! The program: its options, its exit codes, and what it says when something is wrong.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::path::Path;

use authz::mirror::Run;
use serde_json::{Value, json};
use sqlx::PgPool;
use testdb::Database;

use self::support::*;

const PASSWORD: &str = "hunter2-is-no-secret";

fn org() -> Org {
    Org::new("C1").user("1", "ada").user("2", "bo").group("g1", "ops").member("g1", "1").member("g1", "2")
}

/// Far more goes than may at once.
fn emptied() -> Org {
    Org::new("C1").user("9", "zed").group("g9", "new").member("g9", "9")
}

fn run_of(database: &Database, path: &Path) -> Program {
    Program::job("run", database.url()).file(path)
}

/// The database's URL with a password in it, where it has none yet, and that password.
fn with_password(url: &str) -> (String, String) {
    let (scheme, rest) = url.split_once("://").unwrap();
    let (user, place) = rest.split_once('@').unwrap_or(("postgres", rest));
    match user.split_once(':') {
        Some((_, password)) => (url.to_owned(), password.to_owned()),
        None => (format!("{scheme}://{user}:{PASSWORD}@{place}"), PASSWORD.to_owned()),
    }
}

async fn mirrored() -> (Database, PgPool) {
    let (database, pool) = database().await;
    applied(&pool, &org()).await;
    (database, pool)
}

/// The run fails: exit code 1, one JSON object with a message in which all of `says` occurs, nothing written.
async fn assert_fails(pool: &PgPool, program: Program, says: &[&str]) {
    assert_ends_with(1, pool, program, says).await;
}

/// The options are well formed and do not make a run: the same with exit code 2, which nobody tries again.
async fn assert_cannot_be_used(pool: &PgPool, program: Program, says: &[&str]) {
    assert_ends_with(2, pool, program, says).await;
}

async fn assert_ends_with(code: i32, pool: &PgPool, program: Program, says: &[&str]) {
    let before = written_rows(pool).await;
    let outcome = program.output().await;
    assert_eq!(outcome.code, code, "{outcome:?}");
    assert_eq!(outcome.status(), "failed");
    for part in says {
        assert!(outcome.error().contains(part), "`{part}` is not in: {}", outcome.error());
    }
    assert_eq!(written_rows(pool).await, before, "{outcome:?}");
}

/// The command line is not accepted: exit code 2, and all of `says` on standard error.
async fn assert_usage(program: Program, says: &[&str]) {
    let outcome = program.output().await;
    assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{outcome:?}");
    for part in says {
        assert!(outcome.stderr.contains(part), "`{part}` is not in: {}", outcome.stderr);
    }
}

#[tokio::test]
async fn migrate_makes_the_tables_and_may_be_repeated() {
    let database = Database::empty().await.unwrap();
    let migrate = Program::new("migrate").option("--database-url", database.url());
    for _ in 0..2 {
        let outcome = migrate.output().await;
        assert_eq!(
            (outcome.code, outcome.stdout.as_str()),
            (0, "the tables are up to date\n"),
            "{outcome:?}"
        );
    }
    let (_folder, path) = org().write();
    assert_eq!(run_of(&database, &path).output().await.code, 0);
    assert_eq!(
        Mirror::read(&connect(database.url()).await, MAIN).await,
        Mirror::wanted(&org().json(), false)
    );
}

#[tokio::test]
async fn json_is_one_object_with_the_facts_of_the_run() {
    let (database, pool) = database().await;
    let workspace = workspace(org().directory()).await;
    let run = Program::job("run", database.url()).google(&workspace);
    let first = run.output().await;
    assert_eq!((first.code, first.stderr.as_str()), (0, ""), "{first:?}");
    let first = first.json();
    assert_eq!(first["status"], "applied");
    assert_eq!(first["plan_hash"].as_str().unwrap().len(), 16);
    assert_eq!(
        first["counts"],
        json!({
            "users": {"added": 2, "removed": 0, "changed": 0},
            "groups": {"added": 1, "removed": 0, "changed": 0},
            "memberships": {"added": 2, "removed": 0, "changed": 0},
        })
    );
    assert_eq!(first["api_calls"], 3);
    assert!(first["duration_ms"].is_u64());
    assert_eq!((&first["error"], &first["directory"]), (&Value::Null, &json!("main")));
    assert_eq!(first["run_id"], number(&pool, "select max(run_id) from authz.sync_runs").await);

    let again = run.output().await;
    assert_eq!((again.code, again.status().as_str()), (0, "unchanged"), "{again:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false));
}

#[tokio::test]
async fn plan_then_run_with_its_hash_passes_the_guard() {
    let (database, pool) = mirrored().await;
    let many = (0..8).fold(org(), |org, n| org.user(&format!("n{n}"), &format!("n{n}")));
    applied(&pool, &many).await;
    let (_folder, path) = org().write();
    let before = written_rows(&pool).await;
    let plan = Program::job("plan", database.url()).file(&path).output().await;
    assert_eq!((plan.code, plan.status().as_str()), (0, "planned"), "{plan:?}");
    let hash = plan.json()["plan_hash"].as_str().unwrap().to_owned();

    let refused = run_of(&database, &path).output().await;
    assert_eq!((refused.code, refused.status().as_str()), (3, "refused"), "{refused:?}");
    assert_eq!(refused.json()["plan_hash"], hash.as_str());
    let wrong = run_of(&database, &path).option("--approve", "0123456789abcdef").output().await;
    assert_eq!((wrong.code, wrong.status().as_str()), (3, "refused"), "{wrong:?}");
    assert_eq!(wrong.json()["refusal"]["approved"], "0123456789abcdef");
    assert_eq!(written_rows(&pool).await, before);

    let approved = run_of(&database, &path).option("--approve", &hash).output().await;
    assert_eq!((approved.code, approved.status().as_str()), (0, "applied"), "{approved:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false));
}

#[tokio::test]
async fn limits_are_options() {
    let (database, _pool) = mirrored().await;
    let (_folder, path) = emptied().write();
    let tight = run_of(&database, &path).option("--max-removed-users", "0%,0").output().await;
    assert_eq!(tight.code, 3, "{tight:?}");
    assert!(tight.stdout.contains("\"limit\":0"), "{tight:?}");
    let group = Org::new("C1")
        .user("1", "ada")
        .user("2", "bo")
        .group("g1", "ops")
        .group("g2", "web")
        .member("g2", "1");
    let (_folder, path) = group.write();
    let wide = |limit: &str| {
        run_of(&database, &path)
            .option("--max-removed-memberships", "100%,0")
            .option("--max-removed-members-of-group", limit)
    };
    let tight = wide("50%,1").output().await;
    assert_eq!(tight.code, 3, "{tight:?}");
    assert_eq!(
        tight.json()["refusal"]["violations"][0]["emptied_groups"]["groups"][0]["group"],
        "ops@example.com"
    );
    assert_eq!(wide("50%,2").output().await.code, 0);
}

#[tokio::test]
async fn text_tells_what_was_done_and_a_refusal_names_the_next_step() {
    let (database, _pool) = mirrored().await;
    let text = |org: &Org| {
        let (folder, path) = org.write();
        let program = Program::new("run")
            .option("--database-url", database.url())
            .option("--directory", MAIN)
            .option("--max-removed-users", "0%,0")
            .file(&path);
        async move {
            let outcome = program.output().await;
            drop(folder);
            outcome
        }
    };
    let unchanged = text(&org()).await;
    assert_eq!((unchanged.code, unchanged.stderr.as_str()), (0, ""), "{unchanged:?}");
    assert!(unchanged.stdout.contains("`main` is up to date"), "{unchanged:?}");
    let refused = text(&emptied()).await;
    assert_eq!((refused.code, refused.stdout.as_str()), (3, ""), "{refused:?}");
    assert!(refused.stderr.contains("ada@example.com"), "who would go: {}", refused.stderr);
    assert!(refused.stderr.contains("run again with --approve "), "{}", refused.stderr);
}

#[tokio::test]
async fn partial_run_has_its_own_exit_code() {
    let (database, pool) = mirrored().await;
    let mut directory = org().user("3", "cy").json();
    directory["members"].as_object_mut().unwrap().remove("g1").unwrap();
    directory["groups"][0]["directMembersCount"] = json!("2");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("org.json");
    std::fs::write(&path, directory.to_string()).unwrap();
    let outcome = run_of(&database, &path).output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (4, "partial"), "{outcome:?}");
    assert!(outcome.json()["incomplete"]["ops@example.com"].is_string(), "{outcome:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().user("3", "cy").json(), false));
}

#[tokio::test]
async fn run_beside_a_living_one_has_its_own_exit_code() {
    let (database, pool) = mirrored().await;
    let living = Run::begin(&pool, &name(MAIN), "test").await.unwrap();
    let (_folder, path) = emptied().write();
    let outcome = run_of(&database, &path).output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (5, "failed"), "{outcome:?}");
    assert!(outcome.error().contains("is still at work"), "{outcome:?}");
    let _ = living.fail("enough", 0, &actor()).await.unwrap();
    let unlimited = run_of(&database, &path)
        .option("--max-removed-users", "100%,0")
        .option("--max-removed-groups", "100%,0");
    assert_eq!(unlimited.option("--max-removed-memberships", "100%,0").output().await.code, 0);
}

#[tokio::test]
async fn every_option_can_come_from_the_environment() {
    let (database, pool) = database().await;
    let workspace = workspace(org().external("g1", "x", "x@partner.example").directory()).await;
    execute(&pool, "insert into authz.users (user_name) values ('ada@example.com')").await;
    let outcome = Program::new("run")
        .environment("DIR_SYNC_DATABASE_URL", database.url())
        .environment("DIR_SYNC_DIRECTORY", MAIN)
        .environment("DIR_SYNC_SOURCE", "google")
        .environment("DIR_SYNC_GOOGLE_CREDENTIALS", workspace.key_file())
        .environment("DIR_SYNC_GOOGLE_SUBJECT", workspace.emulator.subject())
        .environment("DIR_SYNC_GOOGLE_CUSTOMER", "C1")
        .environment("DIR_SYNC_GOOGLE_URL", workspace.emulator.url())
        .environment("DIR_SYNC_GOOGLE_QUOTA", "0")
        .environment("DIR_SYNC_EXTERNAL_MEMBERS", "include")
        .environment("DIR_SYNC_ADOPT_LOCAL", "true")
        .environment("DIR_SYNC_CONCURRENCY", "2")
        .environment("DIR_SYNC_OUTPUT", "json")
        .output()
        .await;
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(outcome.json()["plan"]["conflicts"], json!([]), "the local user was not adopted");
    let wanted = Mirror::wanted(&org().external("g1", "x", "x@partner.example").json(), true);
    assert_eq!(Mirror::read(&pool, MAIN).await, wanted);

    let (_folder, path) = emptied().write();
    let with_limit = |limit: &str| {
        Program::new("run")
            .environment("DIR_SYNC_DATABASE_URL", database.url())
            .environment("DIR_SYNC_DIRECTORY", MAIN)
            .environment("DIR_SYNC_SOURCE", format!("file:{}", path.display()))
            .environment("DIR_SYNC_OUTPUT", "json")
            .environment("DIR_SYNC_MAX_REMOVED_GROUPS", limit)
    };
    let refused = with_limit("0%,0").output().await;
    assert_eq!(refused.code, 3, "{refused:?}");
    let hash = refused.json()["plan_hash"].as_str().unwrap().to_owned();
    assert_eq!(with_limit("0%,0").environment("DIR_SYNC_APPROVE", hash).output().await.code, 0);
}

#[tokio::test]
async fn unusable_credentials_say_what_to_do() {
    let (database, pool) = mirrored().await;
    let workspace = workspace(org().without_user("2").directory()).await;
    let google = |key: &Path, subject: &str| {
        Program::job("run", database.url())
            .option("--source", "google")
            .option("--google-credentials", key)
            .option("--google-subject", subject)
            .option("--google-url", workspace.emulator.url())
    };
    let admin = workspace.emulator.subject();
    let broken = workspace.folder.path().join("broken.json");
    std::fs::write(&broken, "{\"type\": \"service_account\"").unwrap();
    assert_fails(&pool, google(&broken, admin), &["broken.json"]).await;
    let missing = workspace.folder.path().join("missing.json");
    assert_fails(&pool, google(&missing, admin), &["missing.json"]).await;
    let wrong = google(&workspace.key_file(), "nobody@example.com");
    assert_fails(&pool, wrong, &["`nobody@example.com`", "--google-subject"]).await;
    let none = Program::job("run", database.url()).option("--source", "google");
    assert_cannot_be_used(&pool, none, &["--google-credentials"]).await;
    let both = google(&workspace.key_file(), admin).option("--google-service-account", "sync@example.com");
    assert_cannot_be_used(&pool, both, &["--google-service-account", "without a key"]).await;
    let no_metadata = Program::job("run", database.url())
        .option("--source", "google")
        .option("--google-service-account", "sync@example.com")
        .option("--google-metadata-url", "metadata");
    assert_cannot_be_used(&pool, no_metadata, &["--google-metadata-url"]).await;
    let nobodys = google(&workspace.key_file(), admin).option("--google-customer", "");
    assert_cannot_be_used(&pool, nobodys, &["--google-customer"]).await;
    let nowhere = Program::job("run", database.url())
        .option("--source", "google")
        .option("--google-credentials", workspace.key_file())
        .option("--google-url", "admin.googleapis.com");
    assert_cannot_be_used(&pool, nowhere, &["--google-url"]).await;
}

#[tokio::test]
async fn unusable_file_says_what_to_do() {
    let (database, pool) = mirrored().await;
    let folder = tempfile::tempdir().unwrap();
    let half = |name: &str, whole: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, whole.split_at(whole.len() / 2).0).unwrap();
        path
    };
    let gzip = half("half.json.gz", &std::fs::read(organisation("2025-01")).unwrap());
    assert_fails(&pool, run_of(&database, &gzip), &["half.json.gz", "is cut short; write it again"]).await;
    let plain = half("half.json", emptied().json().to_string().as_bytes());
    assert_fails(&pool, run_of(&database, &plain), &["half.json", "is cut short; write it again"]).await;
    let missing = folder.path().join("missing.json");
    assert_fails(&pool, run_of(&database, &missing), &["missing.json", "does not exist"]).await;
    let other = folder.path().join("other.json");
    std::fs::write(&other, "{\"users\": []}").unwrap();
    assert_fails(&pool, run_of(&database, &other), &["`customerId`"]).await;
}

#[tokio::test]
async fn failure_to_begin_is_told_on_standard_error_in_text_mode() {
    let (database, _pool) = database().await;
    let outcome = Program::new("run")
        .option("--database-url", database.url())
        .option("--directory", MAIN)
        .option("--source", "file:/nonexistent/org.json")
        .output()
        .await;
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{outcome:?}");
    assert!(outcome.stderr.contains("does not exist"), "{outcome:?}");
}

#[tokio::test]
async fn unusable_database_says_what_to_do() {
    let (_folder, path) = org().write();
    // A port that was free a moment ago, on which nobody listens.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nobody = format!("postgres://app:{PASSWORD}@127.0.0.1:{port}/app");
    let outcome = Program::job("run", &nobody).file(&path).output().await;
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.error().contains(&format!("`127.0.0.1:{port}` cannot be reached")), "{outcome:?}");
    let outcome = Program::new("migrate").option("--database-url", &nobody).output().await;
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("cannot be reached"), "{outcome:?}");

    let outcome = Program::job("run", "no-url").file(&path).output().await;
    assert_eq!(outcome.code, 2, "{outcome:?}");
    assert!(outcome.error().contains("postgres://user:password@host/name"), "{outcome:?}");
    for command in ["migrate", "status"] {
        let outcome = Program::new(command).option("--database-url", "no-url").output().await;
        assert_eq!(outcome.code, 2, "{outcome:?}");
        assert!(outcome.stderr.contains("postgres://user:password@host/name"), "{outcome:?}");
    }

    let bare = Database::empty().await.unwrap();
    let outcome = run_of(&bare, &path).output().await;
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert!(outcome.error().contains("run `dir-sync migrate`"), "{outcome:?}");
}

#[tokio::test]
async fn unusable_names_and_sources_say_what_to_do() {
    let (database, pool) = mirrored().await;
    let (_folder, path) = emptied().write();
    let named = |directory: &str| {
        Program::new("run")
            .option("--database-url", database.url())
            .option("--output", "json")
            .option("--directory", directory)
            .file(&path)
    };
    let before = written_rows(&pool).await;
    assert_usage(named("local"), &["--directory", "give the directory another name"]).await;
    assert_usage(named("Main"), &["--directory", "Main"]).await;
    assert_usage(named(""), &["--directory"]).await;
    let from = |source: &str| Program::job("run", database.url()).option("--source", source);
    assert_usage(from("ldap"), &["`google`", "`file:`"]).await;
    assert_usage(from("file:"), &["`google`", "`file:`"]).await;
    assert_usage(Program::job("run", database.url()), &["--source"]).await;
    assert_usage(named(MAIN).option("--max-removed-users", "many"), &["`10%,3`"]).await;
    assert_usage(named(MAIN).option("--external-members", "maybe"), &["include", "exclude"]).await;
    assert_usage(named(MAIN).option("--concurrency", "0"), &["1..=64"]).await;
    assert_usage(Program::new("sync"), &["sync"]).await;
    assert_eq!(written_rows(&pool).await, before);
    assert_eq!(number(&pool, "select count(*) from authz.directories").await, 2, "local and main");
}

#[tokio::test]
async fn password_is_in_no_output() {
    let (database, _pool) = database().await;
    let (url, password) = with_password(database.url());
    let (_folder, path) = org().write();
    let file = format!("file:{}", path.display());
    let job = |command: &str, url: &str| {
        Program::job(command, url).option("--source", &file).environment("DIR_SYNC_LOG", "trace")
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let unknown_option = format!("{url}{}sslpassword={password}", if url.contains('?') { '&' } else { '?' });
    let gateway = format!("http://me:{password}@pushgateway:9091");
    let programs = [
        (job("plan", &url), 0),
        (job("run", &url), 0),
        (job("run", &unknown_option), 0),
        (job("run", &url).option("--concurrency", "x"), 2),
        (job("run", &format!("postgres://app:{password}@127.0.0.1:{port}/app")), 1),
        (job("run", &format!("postgres://app:{password}@host:no-port/app")), 2),
        (job("run", &format!("mysql://app:{password}@host/app")), 2),
        (job("run", &format!("postgres://app:{password}@host/app?sslmode=nonsense")), 2),
        (Program::new("migrate").environment("DIR_SYNC_DATABASE_URL", &url), 0),
        (Program::new("run").environment("DIR_SYNC_DATABASE_URL", &url).flag("--help"), 0),
        (Program::new("run").environment("DIR_SYNC_DATABASE_URL", &url), 2),
        (Program::new("run").environment("DIR_SYNC_PUSH_GATEWAY", &gateway).flag("--help"), 0),
    ];
    for (program, code) in programs {
        let outcome = program.output().await;
        assert_eq!(outcome.code, code, "{outcome:?}");
        assert!(!outcome.stdout.contains(&password) && !outcome.stderr.contains(&password), "{outcome:?}");
    }
}

#[tokio::test]
async fn password_that_is_not_encoded_is_in_no_output() {
    let (_folder, path) = org().write();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    for (user_and_password, code, says) in [
        ("app:alpha/bravo", 2, "`%2F`, `%23`, `%3F` and `%40`"),
        ("app:alpha#bravo", 2, "`%2F`, `%23`, `%3F` and `%40`"),
        ("app:alpha?bravo", 2, "`%2F`, `%23`, `%3F` and `%40`"),
        ("app:alpha@bravo/charlie", 2, "`%2F`, `%23`, `%3F` and `%40`"),
        // A beginning of digits is a port to who reads it.
        (&format!("app:{port}/bravo"), 2, "`%2F`, `%23`, `%3F` and `%40`"),
        (&format!("app:alpha@127.0.0.1:{port}?bravo=charlie"), 1, "`%2F`, `%23`, `%3F` and `%40`"),
        ("app:alpha@bravo", 1, "`127.0.0.1:1` cannot be reached"),
    ] {
        let url = format!("postgres://{user_and_password}@127.0.0.1:1/app");
        for program in [
            Program::job("run", &url).file(&path).environment("DIR_SYNC_LOG", "trace"),
            Program::new("migrate").option("--database-url", &url),
        ] {
            let outcome = program.output().await;
            let said = format!("{}{}", outcome.stdout, outcome.stderr);
            assert_eq!(outcome.code, code, "{outcome:?}");
            assert!(said.contains(says), "`{says}` is not in: {said}");
            for part in ["alpha", "bravo", "charlie", port.as_str()] {
                assert!(!said.contains(part), "`{part}` is in: {said}");
            }
        }
    }
    let option = format!("postgres://127.0.0.1:{port}/app?user=me@example.com");
    let outcome = Program::job("run", &option).file(&path).output().await;
    assert_eq!(outcome.code, 1, "an `@` in an option is none of a password: {outcome:?}");
    let other = Program::job("run", "mysql://app:alpha@127.0.0.1/app").file(&path).output().await;
    assert_eq!(other.code, 2, "{other:?}");
    assert!(other.error().contains("`mysql://`") && other.error().contains("postgres://user"), "{other:?}");
}

#[tokio::test]
async fn empty_variable_is_not_set_and_a_switch_is_true_or_false_in_many_words() {
    let (database, _pool) = mirrored().await;
    let (_folder, path) = emptied().write();
    let plan = || Program::job("plan", database.url()).file(&path);
    for (word, removed) in
        [("1", 0), ("yes", 0), ("true", 0), ("0", 2), ("no", 2), ("false", 2), ("False", 2), ("", 2)]
    {
        let outcome = plan().environment("DIR_SYNC_NO_REMOVE", word).output().await;
        assert_eq!(outcome.code, 0, "{outcome:?}");
        assert_eq!(outcome.json()["counts"]["users"]["removed"], removed, "`{word}`: {outcome:?}");
    }
    assert_usage(plan().environment("DIR_SYNC_NO_REMOVE", "maybe"), &["--no-remove", "maybe"]).await;

    let workspace = workspace(org().directory()).await;
    let names = [
        "DIR_SYNC_INCLUDE_GROUPS",
        "DIR_SYNC_EXCLUDE_GROUPS",
        "DIR_SYNC_ADOPT_LOCAL",
        "DIR_SYNC_APPROVE",
        "DIR_SYNC_CONCURRENCY",
        "DIR_SYNC_GOOGLE_CUSTOMER",
        "DIR_SYNC_GOOGLE_SERVICE_ACCOUNT",
        "DIR_SYNC_LOG",
        "DIR_SYNC_MAX_REMOVED_USERS",
        "DIR_SYNC_METRICS_FILE",
        "DIR_SYNC_PUSH_GATEWAY",
    ];
    let run = Program::job("run", database.url()).google(&workspace);
    let outcome = names.iter().fold(run, |run, name| run.environment(name, "")).output().await;
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    let outcome = Program::new("status").environment("DIR_SYNC_DATABASE_URL", "").output().await;
    assert_eq!(outcome.code, 2, "{outcome:?}");
    assert!(outcome.stderr.contains("required") && outcome.stderr.contains("--database-url"), "{outcome:?}");
    let help = Program::new("run").environment("DIR_SYNC_NO_REMOVE", "").flag("--help").output().await;
    assert!(help.stdout.contains("DIR_SYNC_NO_REMOVE"), "{help:?}");
}
