//! Every way to sign in leads to the same mirror, and leaves no secret behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use std::path::{Path, PathBuf};

use directory_emulator::{Effect, Emulator, Fault, Options, Target};
use rustix::process::Signal;
use sqlx::PgPool;

use self::support::*;

fn org() -> Org {
    Org::new("C1").user("1", "ada").user("2", "bo").group("g1", "ops").member("g1", "1").member("g1", "2")
}

async fn assert_mirrored(pool: &PgPool, program: &Program) {
    let outcome = program.output().await;
    assert_eq!((outcome.code, outcome.status().as_str()), (0, "applied"), "{outcome:?}");
    assert_eq!(Mirror::read(pool, MAIN).await, Mirror::wanted(&org().json(), false));
}

#[tokio::test]
async fn machine_that_vouches_needs_no_key() {
    let (database, pool) = database().await;
    let emulator = Emulator::start(org().directory()).await.unwrap();
    let program = Program::job("run", database.url()).google_at(&emulator);
    assert_mirrored(&pool, &program.machine(emulator.service_account()).for_admin(&emulator)).await;
    assert_eq!(emulator.token_call_count(), 3, "the machine's token, a signature and a token, once each");
}

#[tokio::test]
async fn federated_workload_needs_no_key() {
    for impersonate in [false, true] {
        let (database, pool) = database().await;
        let emulator = Emulator::start(org().directory()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let program = Program::job("run", database.url())
            .google_at(&emulator)
            .federated(&emulator, folder.path(), impersonate)
            .for_admin(&emulator);
        // A file with impersonation names the account itself.
        let program = if impersonate { program } else { program.machine(emulator.service_account()) };
        assert_mirrored(&pool, &program).await;
    }
}

#[tokio::test]
async fn account_that_is_an_administrator_itself_needs_no_subject() {
    for with_key in [true, false] {
        let (database, pool) = database().await;
        let emulator = Options::new().account_is_admin().start(org().directory()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key.json");
        std::fs::write(&key, emulator.service_account_key()).unwrap();
        let program = Program::job("run", database.url()).google_at(&emulator);
        let program = if with_key {
            program.option("--google-credentials", key)
        } else {
            program.machine(emulator.service_account())
        };
        assert_mirrored(&pool, &program).await;
    }
}

#[tokio::test]
async fn token_without_a_key_is_renewed_when_it_ends() {
    let (database, pool) = database().await;
    // Shorter than the margin: each call finds it at its end.
    let short = std::time::Duration::from_secs(30);
    let emulator = Options::new().token_lifetime(short).start(org().directory()).await.unwrap();
    let program = Program::job("run", database.url()).google_at(&emulator);
    assert_mirrored(&pool, &program.machine(emulator.service_account()).for_admin(&emulator)).await;
    assert_eq!(emulator.token_call_count(), 9, "three calls for each of three");
}

#[tokio::test]
async fn failing_step_without_a_key_is_tried_again() {
    let (database, pool) = database().await;
    let emulator = Emulator::start(org().directory()).await.unwrap();
    for path in ["/computeMetadata/", "/v1/projects/", "/token"] {
        emulator.add_fault(Fault::new(Target::prefix(path), Effect::status(503, "backendError")).on_call(1));
    }
    let program = Program::job("run", database.url()).google_at(&emulator);
    assert_mirrored(&pool, &program.machine(emulator.service_account()).for_admin(&emulator)).await;
}

/// A named pipe: what is written into it comes once, and as long as nobody writes, nothing comes.
fn pipe(folder: &Path, name: &str) -> PathBuf {
    let pipe = folder.join(name);
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    pipe
}

#[tokio::test]
async fn key_may_come_through_a_pipe() {
    let (database, pool) = database().await;
    let emulator = Emulator::start(org().directory()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let pipe = pipe(folder.path(), "key.json");
    for command in ["doctor", "run"] {
        let program = Program::job(command, database.url()).google_at(&emulator).for_admin(&emulator);
        let running = program.option("--google-credentials", &pipe).spawn();
        let (pipe, key) = (pipe.clone(), emulator.service_account_key());
        std::thread::spawn(move || std::fs::write(pipe, key));
        let outcome = tokio::time::timeout(DEADLINE, running.output()).await.unwrap();
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false));
}

#[tokio::test]
async fn signal_while_a_key_or_a_token_does_not_come_ends_the_program_in_order() {
    let (database, _pool) = database().await;
    let emulator = Emulator::start(org().directory()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |command: &str| Program::job(command, database.url()).google_at(&emulator).for_admin(&emulator);
    let key = pipe(folder.path(), "key.json");
    let federated = at("run").federated(&emulator, folder.path(), true);
    let token = folder.path().join("subject-token");
    std::fs::remove_file(&token).unwrap();
    let token = pipe(folder.path(), "subject-token");
    for (program, pipe) in [
        (at("run").option("--google-credentials", &key), &key),
        (at("doctor").option("--google-credentials", &key), &key),
        (federated, &token),
    ] {
        let running = program.spawn();
        let pipe = pipe.clone();
        let opened = tokio::task::spawn_blocking(move || std::fs::OpenOptions::new().write(true).open(pipe));
        let silent = tokio::time::timeout(DEADLINE, opened).await.unwrap().unwrap().unwrap();
        running.signal(Signal::TERM);
        let outcome = tokio::time::timeout(DEADLINE, running.output()).await.unwrap();
        assert_eq!(outcome.code, 6, "{outcome:?}");
        assert!(outcome.error().contains("ended by SIGTERM"), "{outcome:?}");
        drop(silent);
    }
}

#[tokio::test]
async fn no_token_is_in_any_log() {
    let (database, _pool) = database().await;
    let workspace = workspace(org().directory()).await;
    let emulator = &workspace.emulator;
    let folder = tempfile::tempdir().unwrap();
    let job = || Program::job("run", database.url());
    let programs = [
        job().google(&workspace),
        job().google_at(emulator).machine(emulator.service_account()).for_admin(emulator),
        job().google_at(emulator).federated(emulator, folder.path(), true).for_admin(emulator),
        Program::job("doctor", database.url()).google(&workspace),
        Program::job("doctor", database.url())
            .google_at(emulator)
            .machine(emulator.service_account())
            .for_admin(emulator),
    ];
    for format in ["human", "json"] {
        for program in &programs {
            let everything =
                "trace,yup_oauth2=trace,yup_oauth2::authenticator=trace,hyper=trace,hyper_util=trace";
            let program = program.clone().option("--log", everything).option("--log-format", format);
            let outcome = program.output().await;
            assert_eq!(outcome.code, 0, "{outcome:?}");
            assert!(outcome.stderr.len() > 1_000, "nothing was logged: {outcome:?}");
            let tokens = emulator.tokens();
            assert!(!tokens.is_empty());
            let said = format!("{}{}", outcome.stdout, outcome.stderr);
            assert!(tokens.iter().all(|token| !said.contains(token)), "a token was told");
            // Every signed assertion, and the key, begin so.
            assert!(!said.contains("eyJ") && !said.contains("PRIVATE KEY"), "a secret was told");
            assert!(!said.contains("a token of the cluster"));
        }
    }
}
