//! Which user the server runs as: this one or, since PostgreSQL refuses root, an unprivileged one.

use std::{
    fs, io,
    os::unix::{fs::lchown, process::CommandExt as _},
    path::Path,
    process::Command,
};

use crate::error::Error;

/// The user of the server and of everything in its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    me: u32,
    /// Another user's ids when this process is root.
    other: Option<(u32, u32)>,
}

impl Account {
    pub(crate) fn of_server() -> Result<Account, Error> {
        let me = rustix::process::geteuid().as_raw();
        if me != 0 {
            return Ok(Account { me, other: None });
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let other = unprivileged(&passwd).ok_or_else(|| {
            Error::NoServer(
                "PostgreSQL refuses to run as root, and /etc/passwd has neither `postgres` nor `nobody`; run as \
                 another user"
                    .to_owned(),
            )
        })?;
        Ok(Account { me, other: Some(other) })
    }

    /// The id in the run folder's name: who shares a server.
    pub(crate) fn me(self) -> u32 {
        self.me
    }

    /// The ids to which the server's files are given when this process is root.
    pub(crate) fn other(self) -> Option<(u32, u32)> {
        self.other
    }

    /// Whether a file of this owner is ours, or the server's.
    pub(crate) fn owns(self, uid: u32) -> bool {
        uid == self.me || self.other.is_some_and(|(other, _)| other == uid)
    }

    /// Hands a path over to the server's user.
    pub(crate) fn give(self, path: &Path) -> io::Result<()> {
        self.other.map_or(Ok(()), |(uid, gid)| lchown(path, Some(uid), Some(gid)))
    }

    /// A command that runs as the server's user.
    pub(crate) fn command(self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/");
        if let Some((uid, gid)) = self.other {
            command.uid(uid).gid(gid);
        }
        // Settings for clients and servers of PostgreSQL must not leak into the server of the tests.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            command.env_remove(name);
        }
        command.env("LC_ALL", "C").env("TZ", "UTC");
        command
    }

    /// Whether the server's user can make and remove folders in `folder`.
    pub(crate) fn can_write_in(self, folder: &Path) -> bool {
        if self.other.is_none() {
            return true;
        }
        let mut command = self.command("/bin/sh");
        command.args(["-c", "cd \"$1\" && test -w .", "sh"]).arg(folder).stderr(std::process::Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }
}

/// The ids of `postgres`, else of `nobody`. macOS writes the latter's as -2.
fn unprivileged(passwd: &str) -> Option<(u32, u32)> {
    let ids = |wanted: &str| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, uid, gid) = (fields.next()?, fields.nth(1)?, fields.next()?);
            (name == wanted).then(|| Some((id(uid)?, id(gid)?)))?
        })
    };
    ["postgres", "_postgres", "nobody"].into_iter().find_map(ids)
}

fn id(text: &str) -> Option<u32> {
    text.parse().ok().or_else(|| text.parse::<i32>().ok().map(i32::cast_unsigned)).filter(|id| *id != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_is_preferred_to_nobody() {
        let passwd = "root:x:0:0::/:/bin/sh\nnobody:*:-2:-2::/:/bin/false\npostgres:x:101:104::/:/bin/sh\n";
        assert_eq!(unprivileged(passwd), Some((101, 104)));
        let without = passwd.replace("postgres", "other");
        assert_eq!(unprivileged(&without), Some((4_294_967_294, 4_294_967_294)));
        assert_eq!(unprivileged("root:x:0:0::/:/bin/sh\n"), None);
        assert_eq!(unprivileged("nobody:x:0:0::/:/bin/sh\n"), None);
    }
}
