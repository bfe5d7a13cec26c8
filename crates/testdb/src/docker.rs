//! A server in Docker.
//!
//! The container ends by itself once the processes of the run are gone (`docker.sh`), and Docker removes it then.
//! This needs a Docker daemon and so is exercised only where there is one; elsewhere the tests cover the choice
//! of the way and the script, with a stand-in for the image's entry point.

use std::time::Duration;

use sqlx::PgConnection;
use testcontainers::{
    GenericImage, ImageExt as _,
    core::{IntoContainerPort as _, WaitFor},
    runners::AsyncRunner as _,
};
use tokio::time::{Instant, sleep, timeout};

use crate::{address::Address, error::chain, keeper, lease::USERS};

const IMAGE: (&str, &str) = ("postgres", "18-alpine");
const SCRIPT: &str = include_str!("docker.sh");
const SETTINGS: [&str; 6] = [
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_connections=300",
];

/// Starts a container, and returns its address and the session that keeps it.
///
/// Says in words why there is none.
pub(crate) async fn start() -> Result<(Address, PgConnection), String> {
    // An image may have to be pulled, but a daemon that never answers must not stop the tests.
    let started = timeout(Duration::from_mins(5), try_start()).await;
    started.unwrap_or_else(|_| Err("the container did not start within five minutes".to_owned()))
}

async fn try_start() -> Result<(Address, PgConnection), String> {
    let said = |error: testcontainers::TestcontainersError| chain(&error);
    let password = format!("{:032x}", rand::random::<u128>());
    let settings = SETTINGS.iter().flat_map(|setting| ["-c".to_owned(), (*setting).to_owned()]);
    let script =
        ["-c".to_owned(), SCRIPT.to_owned(), "authz-testdb".to_owned(), USERS.to_string(), "0".to_owned()];
    let container = GenericImage::new(IMAGE.0, IMAGE.1)
        .with_entrypoint("sh")
        .with_exposed_port(5432.tcp())
        .with_wait_for(WaitFor::Nothing)
        .with_cmd(script.into_iter().chain(settings))
        .with_env_var("POSTGRES_PASSWORD", &password)
        .with_host_config_modifier(|host| host.auto_remove = Some(true))
        .start()
        .await
        .map_err(said)?;
    let host = container.get_host().await.map_err(said)?;
    let port = container.get_host_port_ipv4(5432).await.map_err(said)?;
    let address = Address::of_port(&host.to_string(), port, &password);
    let session = wait_until_ready(&address).await?;
    // The container outlives this process if others use it, and ends by itself.
    std::mem::forget(container);
    Ok((address, session))
}

async fn wait_until_ready(address: &Address) -> Result<PgConnection, String> {
    let deadline = Instant::now() + Duration::from_mins(2);
    loop {
        let reason = match keeper::connect(&address.url("postgres")).await {
            Ok(session) => match hold(session).await {
                Some(session) => return Ok(session),
                None => "the container is about to stop".to_owned(),
            },
            Err(error) => chain(&error),
        };
        if Instant::now() > deadline {
            return Err(format!("the server in the container does not answer: {reason}"));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Makes a session one that the container waits for; `None` if the container is about to stop.
pub(crate) async fn hold(mut session: PgConnection) -> Option<PgConnection> {
    let held: sqlx::Result<bool> = sqlx::query_scalar("SELECT pg_try_advisory_lock_shared($1, 0)")
        .bind(USERS)
        .fetch_one(&mut session)
        .await;
    matches!(held, Ok(true)).then_some(session)
}

#[cfg(test)]
mod tests {
    use std::{
        env, fs,
        net::TcpListener,
        os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
        process::Stdio,
    };

    use super::*;
    use crate::{account::Account, programs::Programs};

    /// The script of the container on this machine, with a stand-in for the entry point of the image.
    #[tokio::test]
    async fn container_serves_while_it_has_a_user_and_then_ends() {
        let (account, programs) = (Account::of_server().unwrap(), Programs::installed());
        let Some(bin) = programs.map(|programs| programs.bin).filter(|bin| bin.join("pg_isready").exists())
        else {
            eprintln!("skipped: there is no PostgreSQL with its clients on this machine");
            return;
        };
        let root = tempfile::Builder::new().tempdir_in("/tmp").unwrap();
        let (folder, data) = (root.path(), root.path().join("data"));
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(&data).unwrap();
        account.give(&data).unwrap();
        let entry = folder.join("docker-entrypoint.sh");
        let text = format!("#!/bin/sh\nshift\nexec postgres -D {0} -k {0} \"$@\"\n", data.display());
        fs::write(&entry, text).unwrap();
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o755)).unwrap();
        let path = [folder.to_owned(), bin.clone(), "/usr/bin".into(), "/bin".into()];
        let path = env::join_paths(path).unwrap();

        let mut initdb = account.command(bin.join("initdb"));
        let initdb = initdb.args(["-U", "postgres", "--auth=trust", "--no-sync", "-D"]).arg(&data);
        assert!(initdb.stdout(Stdio::null()).status().unwrap().success());
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = account.command("/bin/sh");
        command.args(["-c", SCRIPT, "authz-testdb", &USERS.to_string(), "0", "-c", "fsync=off"]);
        command.env("PATH", path).env("PGPORT", port.to_string()).env("POSTGRES_PASSWORD", "unused");
        let mut container = command.stderr(Stdio::null()).process_group(0).spawn().unwrap();

        let address = Address::of_port("127.0.0.1", port, "unused");
        let user = wait_until_ready(&address).await.unwrap();
        // Longer than the script waits without a user.
        sleep(Duration::from_secs(7)).await;
        assert!(container.try_wait().unwrap().is_none());
        let session = keeper::connect(&address.url("postgres")).await.unwrap();
        drop(hold(session).await.unwrap());
        drop(user);
        let ended = tokio::task::spawn_blocking(move || container.wait());
        let ended = timeout(Duration::from_mins(1), ended).await.expect("it ends by itself").unwrap();
        assert!(ended.unwrap().success());
    }
}
