//! A sync as the database role `authz_sync`, which owns nothing and may grant nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "a test may stop")]

mod support;

use directory_emulator::{Effect, Fault, Target};
use sqlx::{AssertSqlSafe, PgPool};
use testdb::Database;

use self::support::*;

async fn database_with_roles() -> (Database, PgPool) {
    let (database, pool) = database().await;
    sqlx::raw_sql(include_str!("../../../deploy/sql/roles.sql")).execute(&pool).await.unwrap();
    (database, pool)
}

fn as_role(database: &Database, role: &str) -> String {
    let url = database.url();
    format!("{url}{}options[role]={role}", if url.contains('?') { '&' } else { '?' })
}

fn org() -> Org {
    let org = Org::new("C1").group("g", "ops").group("h", "web").nested("h", "g").everyone("h", "C1");
    (0..8).fold(org, |org, n| {
        let id = n.to_string();
        org.user(&id, &format!("u{n}")).member("g", &id)
    })
}

#[tokio::test]
async fn every_kind_of_run_works_as_the_sync_role() {
    let (database, pool) = database_with_roles().await;
    let workspace = workspace(org().directory()).await;
    let url = as_role(&database, "authz_sync");
    let run = Program::job("run", &url).google(&workspace);
    let first = run.output().await;
    assert_eq!((first.code, first.status().as_str()), (0, "applied"), "{first:?}");
    assert!(!first.stderr.contains("watched"), "the session that copies is watched: {first:?}");
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&org().json(), false));
    execute(
        &pool,
        "insert into authz.actions (action_name) values ('workers.scale');
         insert into authz.group_actions (group_id, action_name) select group_id, 'workers.*' from authz.groups",
    )
    .await;
    assert_eq!(run.output().await.status(), "unchanged");

    let next = org()
        .rename_user("1", "renamed")
        .set_user("2", "suspended", true)
        .without_user("3")
        .without_member("g", "4")
        .user("9", "u9")
        .member("g", "9")
        .group("i", "new")
        .rename_group("g", "operations");
    workspace.emulator.replace_directory(next.directory());
    let plan = Program::job("plan", &url).google(&workspace).output().await;
    assert_eq!((plan.code, plan.status().as_str()), (0, "planned"), "{plan:?}");
    assert_eq!(
        plan.json()["plan"]["actions"]["users_losing"],
        2,
        "suspended and gone; the other is in the directory still"
    );
    workspace.emulator.add_fault(Fault::new(Target::members_of("i"), Effect::status(500, "backendError")));
    let partial = run.output().await;
    assert_eq!((partial.code, partial.status().as_str()), (4, "partial"), "{partial:?}");
    workspace.emulator.clear_faults();
    run.output().await;
    assert_eq!(Mirror::read(&pool, MAIN).await, Mirror::wanted(&next.json(), false));

    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::EmptyListing));
    let refused = run.output().await;
    assert_eq!((refused.code, refused.status().as_str()), (3, "refused"), "{refused:?}");
    workspace.emulator.clear_faults();
    workspace.emulator.add_fault(Fault::new(Target::users(), Effect::status(403, "forbidden")));
    assert_eq!(run.output().await.code, 1);
    workspace.emulator.clear_faults();

    for command in ["doctor", "plan"] {
        let outcome = Program::job(command, &url).google(&workspace).output().await;
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
    for command in ["runs", "status"] {
        let outcome = Program::new(command).option("--database-url", &url).output().await;
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
    let records = number(&pool, "select count(*) from authz.audit_log where action = 'directory.sync'").await;
    assert_eq!(records, 6, "each run but the plans has its record");
}

/// As after a new version whose migrations made tables, if the roles were not granted anew.
#[tokio::test]
async fn doctor_names_each_table_that_a_sync_may_not_write() {
    let (database, pool) = database_with_roles().await;
    let as_sync = connect(&as_role(&database, "authz_sync")).await;
    assert_eq!(authz::mirror::missing_privileges(&as_sync).await.unwrap(), [""; 0]);
    let tables: Vec<String> = sqlx::query_scalar(
        "select distinct table_name::text from information_schema.role_table_grants
         where grantee = 'authz_sync' and table_schema = 'authz' and privilege_type = 'INSERT'",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert!(tables.len() > 15, "{tables:?}");
    for table in tables {
        let sql = format!("revoke all on authz.{table} from authz_sync");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
        let missing = authz::mirror::missing_privileges(&as_sync).await.unwrap();
        assert!(missing.contains(&format!("insert authz.{table}")), "{table}: {missing:?}");
    }
    let function = "authz.watch_session(integer, timestamptz, interval)";
    assert!(
        !authz::mirror::missing_privileges(&as_sync).await.unwrap().contains(&format!("execute {function}"))
    );
    let sql = format!("revoke execute on function {function} from authz_sync");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
    assert!(
        authz::mirror::missing_privileges(&as_sync).await.unwrap().contains(&format!("execute {function}"))
    );
}

#[tokio::test]
async fn doctor_names_what_another_role_may_not() {
    let (database, _pool) = database_with_roles().await;
    let (_folder, path) = org().write();
    let url = as_role(&database, "authz_reader");
    let outcome = Program::job("doctor", &url).file(&path).output().await;
    assert_eq!(outcome.code, 1, "{outcome:?}");
    let steps = outcome.json();
    let ill: Vec<_> =
        steps["steps"].as_array().unwrap().iter().filter(|step| step["works"] == false).collect();
    assert_eq!(ill.len(), 1, "{steps}");
    let says = ill[0]["says"].as_str().unwrap();
    for part in
        ["insert authz.users", "execute authz.hold_revision()", "`authz_sync`", "deploy/sql/roles.sql"]
    {
        assert!(says.contains(part), "{says}");
    }
}

#[tokio::test]
async fn role_that_may_not_is_told_what_grants_it() {
    let (database, pool) = database_with_roles().await;
    let (_folder, path) = org().write();
    let run = Program::job("run", &as_role(&database, "authz_reader")).file(&path).output().await;
    assert_eq!(run.code, 1, "{run:?}");
    for part in ["permission denied for table", "deploy/sql/roles.sql grants"] {
        assert!(run.error().contains(part), "{run:?}");
    }

    let migrate = async |refusal: &str| {
        let url = as_role(&database, "authz_sync");
        let outcome = Program::new("migrate").option("--database-url", &url).output().await;
        assert_eq!(outcome.code, 1, "{outcome:?}");
        for part in [refusal, "`migrate` runs as the owner of the schema"] {
            assert!(outcome.stderr.contains(part), "{outcome:?}");
        }
    };
    migrate("permission denied for database").await;
    // It may do all but change what it does not own: so the refusal comes in the middle of a migration.
    sqlx::raw_sql(
        "do $$ begin execute format('grant create on database %I to authz_sync', current_database()); end $$;
         grant all on schema authz to authz_sync;
         grant all on authz._sqlx_migrations to authz_sync;
         delete from authz._sqlx_migrations where version = (select max(version) from authz._sqlx_migrations)",
    )
    .execute(&pool)
    .await
    .unwrap();
    migrate("must be owner of").await;
}
