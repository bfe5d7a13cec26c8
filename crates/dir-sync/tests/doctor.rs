//! `dir-sync doctor`: each step that fails is named, with what is missing and where to set it right.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use authz::mirror::Run;
use directory_emulator::{Effect, Emulator, Fault, Options, Target};
use serde_json::Value;
use testdb::{Database, Server};

use self::support::*;

fn org() -> Org {
    Org::new("C1").user("1", "ada").group("g1", "ops").member("g1", "1")
}

/// The steps that work, and those that do not with what is said of them.
async fn examined(program: Program) -> (Vec<String>, Vec<(String, String)>) {
    let outcome = program.output().await;
    let steps = outcome.json()["steps"].as_array().unwrap().clone();
    let text = |step: &Value, key: &str| step[key].as_str().unwrap().to_owned();
    let (well, ill): (Vec<_>, Vec<_>) = steps.iter().partition(|step| step["works"] == true);
    assert_eq!(outcome.code, i32::from(!ill.is_empty()), "{outcome:?}");
    (
        well.into_iter().map(|step| text(step, "step")).collect(),
        ill.into_iter().map(|step| (text(step, "step"), text(step, "says"))).collect(),
    )
}

/// Exactly one step fails, and says all of this.
async fn assert_finds(program: Program, step: &str, says: &[&str]) -> Vec<String> {
    let (well, ill) = examined(program).await;
    assert_eq!(ill.len(), 1, "{step} should fail, alone: {ill:?}");
    let (name, said) = &ill[0];
    assert_eq!(name, step, "{said}");
    for part in says {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
    well
}

fn by_machine(database: &Database, emulator: &Emulator) -> Program {
    Program::job("doctor", database.url())
        .google_at(emulator)
        .machine(emulator.service_account())
        .for_admin(emulator)
}

#[tokio::test]
async fn all_is_well() {
    let (database, pool) = database().await;
    let workspace = workspace(org().directory()).await;
    let (well, ill) = examined(Program::job("doctor", database.url()).google(&workspace)).await;
    assert_eq!(ill, []);
    let tables = ["database", "tables", "privileges", "lease"];
    let by_key = ["credentials", "scope for users", "scope for groups", "list users", "list groups"];
    assert_eq!(well, [by_key.as_slice(), &tables].concat());
    let (well, ill) = examined(by_machine(&database, &workspace.emulator)).await;
    assert_eq!(ill, []);
    assert_eq!(well.get(..3).unwrap(), ["credentials", "identity", "signature"]);
    let (_folder, path) = org().write();
    let (well, _) = examined(Program::job("doctor", database.url()).file(&path)).await;
    assert_eq!(well, [["file"].as_slice(), &tables].concat());
    assert_eq!(number(&pool, "select count(*) from authz.sync_runs").await, 0, "it changes nothing");
    assert_eq!(number(&pool, "select count(*) from authz.directories").await, 1, "it changes nothing");
}

#[tokio::test]
async fn each_step_of_signing_in_is_named() {
    let (database, _pool) = database().await;
    let workspace = workspace(org().directory()).await;
    let emulator = &workspace.emulator;
    let doctor = || Program::job("doctor", database.url());
    let well = assert_finds(
        doctor().google_at(emulator).option("--google-credentials", "/nonexistent/key.json"),
        "credentials",
        &["/nonexistent/key.json", "cannot be read", "Service Accounts > Keys"],
    )
    .await;
    assert_eq!(well, ["database", "tables", "privileges", "lease"], "what does not depend on it is tried");
    assert_finds(
        doctor().google_at(emulator),
        "credentials",
        &["--google-credentials", "--google-service-account"],
    )
    .await;

    let nowhere = doctor()
        .option("--source", "google")
        .machine("x@example.com")
        .option("--google-metadata-url", "http://127.0.0.1:1");
    assert_finds(nowhere, "identity", &["http://127.0.0.1:1"]).await;
    emulator.add_fault(Fault::new(Target::prefix("/computeMetadata/"), Effect::status(404, "notFound")));
    assert_finds(by_machine(&database, emulator), "identity", &["Workload Identity"]).await;
    emulator.clear_faults();
    let folder = tempfile::tempdir().unwrap();
    let federated = doctor().google_at(emulator).federated(emulator, folder.path(), true).for_admin(emulator);
    std::fs::remove_file(folder.path().join("subject-token")).unwrap();
    assert_finds(federated.clone(), "identity", &["subject-token", "mounted"]).await;
    std::fs::write(folder.path().join("subject-token"), "a token").unwrap();
    emulator.add_fault(Fault::new(Target::path("/v1/token"), Effect::status(400, "invalid_grant")));
    assert_finds(federated.clone(), "identity", &["Workload Identity Federation"]).await;
    emulator.clear_faults();
    emulator.add_fault(Fault::new(Target::prefix("/v1/projects/"), Effect::status(403, "forbidden")));
    assert_finds(federated, "identity", &["roles/iam.workloadIdentityUser"]).await;
    assert_finds(
        by_machine(&database, emulator),
        "signature",
        &[
            "roles/iam.serviceAccountTokenCreator",
            "IAM Service Account Credentials API",
            emulator.service_account(),
        ],
    )
    .await;
    emulator.clear_faults();
    let other = doctor().google_at(emulator).machine("other@example.com").for_admin(emulator);
    assert_finds(other, "signature", &["`other@example.com`"]).await;
}

#[tokio::test]
async fn missing_scope_role_or_subject_is_named() {
    let (database, _pool) = database().await;
    let user_scope = dir_sync::google::USER_SCOPE;
    let emulator = Options::new().not_delegated(user_scope).start(org().directory()).await.unwrap();
    let says = [user_scope, "Domain-wide delegation", emulator.service_account()];
    let well = assert_finds(by_machine(&database, &emulator), "scope for users", &says).await;
    assert!(well.contains(&"scope for groups".to_owned()), "{well:?}");

    let emulator = Emulator::start(org().directory()).await.unwrap();
    let nobody = Program::job("doctor", database.url())
        .google_at(&emulator)
        .machine(emulator.service_account())
        .option("--google-subject", "nobody@example.com");
    let (_, ill) = examined(nobody).await;
    assert!(
        ill.iter()
            .all(|(_, said)| said.contains("`nobody@example.com`") && said.contains("--google-subject")),
        "{ill:?}"
    );
    assert_eq!(ill.len(), 2, "neither scope: {ill:?}");

    for (target, step) in [(Target::users(), "list users"), (Target::groups(), "list groups")] {
        emulator.add_fault(Fault::new(target, Effect::status(403, "forbidden")));
        assert_finds(by_machine(&database, &emulator), step, &["admin role"]).await;
        emulator.clear_faults();
    }
}

/// What is said of the lease.
async fn lease_of(program: Program) -> String {
    let steps = program.output().await.json()["steps"].as_array().unwrap().clone();
    steps.iter().find(|step| step["step"] == "lease").unwrap()["says"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn role_that_may_only_look_does_not_say_who_is_dead() {
    let (database, pool) = database().await;
    execute(&pool, include_str!("../../../deploy/sql/roles.sql")).await;
    let (_folder, path) = org().write();
    drop(Run::begin(&pool, &name(MAIN), "test").await.unwrap());
    expire_leases(&pool).await;
    let url = database.url();
    let reader = format!("{url}{}options[role]=authz_reader", if url.contains('?') { '&' } else { '?' });
    let says = lease_of(Program::job("doctor", &reader).file(&path)).await;
    assert!(says.contains("killed or is still applying"), "{says}");
}

#[tokio::test]
async fn each_step_in_the_database_is_named() {
    let (_folder, path) = org().write();
    let at = |url: &str| Program::job("doctor", url).file(&path);
    assert_finds(at("postgres://127.0.0.1:1/none"), "database", &["127.0.0.1:1", "cannot be reached"]).await;
    let bare = Database::empty().await.unwrap();
    assert_finds(at(bare.url()), "tables", &["are missing", "dir-sync migrate"]).await;

    let (database, pool) = database().await;
    let running = Run::begin(&pool, &name(MAIN), "test").await.unwrap();
    assert_finds(at(database.url()), "lease", &["is held by run 1", "exit code 5"]).await;
    drop(running);
    expire_leases(&pool).await;
    assert_eq!(examined(at(database.url())).await.1, [], "what a killed run left is no obstacle");
    assert!(lease_of(at(database.url())).await.contains("was killed"));

    // A run that takes long to apply: the lease is over, and its lock is the sign of life.
    let mut applying = pool.begin().await.unwrap();
    sqlx::query("select run_id from authz.sync_leases for update").execute(&mut *applying).await.unwrap();
    assert_finds(at(database.url()), "lease", &["is held by run 1", "exit code 5"]).await;
    applying.rollback().await.unwrap();

    execute(&pool, "delete from authz._sqlx_migrations where version = (select max(version) from authz._sqlx_migrations)").await;
    assert_finds(at(database.url()), "tables", &["this program needs", "dir-sync migrate"]).await;
    execute(&pool, "update authz._sqlx_migrations set version = 9999 where version = 1").await;
    assert_finds(at(database.url()), "tables", &["9999", "newer program"]).await;
}

#[tokio::test]
async fn server_that_takes_no_changes_is_named() {
    let (_folder, path) = org().write();
    let at = |url: &str| Program::job("doctor", url).file(&path);
    let (database, _pool) = database().await;
    let url = database.url();
    let read_only = format!(
        "{url}{}options[default_transaction_read_only]=on",
        if url.contains('?') { '&' } else { '?' }
    );
    assert_finds(at(&read_only), "database", &["default_transaction_read_only", "primary"]).await;

    let primary = Server::start().await.unwrap();
    let pool = connect(&primary.url("postgres")).await;
    authz::migrate(&pool).await.unwrap();
    assert_eq!(examined(at(&primary.url("postgres"))).await.1, []);
    let standby = primary.standby().await.unwrap();
    let well = assert_finds(at(&standby.url("postgres")), "database", &["hot standby", "primary"]).await;
    assert_eq!(well, ["file", "tables", "privileges", "lease"], "the rest is tried");
}
