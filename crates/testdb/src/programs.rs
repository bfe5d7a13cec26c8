//! PostgreSQL's programs: where they are on this machine, and a copy for a user who cannot reach them.

use std::{
    env, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    account::Account,
    error::{Doing as _, Error},
};

/// Folders in which systems put the programs; `*` is any version, the highest first.
const USUAL: [&str; 4] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
];

/// A folder with `initdb` and `postgres`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Programs {
    pub(crate) bin: PathBuf,
    /// What has to stay together when the programs are copied.
    tree: PathBuf,
}

impl Programs {
    /// The programs in `bin`, whose libraries are within `tree`.
    pub(crate) fn within(bin: PathBuf, tree: PathBuf) -> Option<Programs> {
        let complete = ["initdb", "postgres"].iter().all(|name| bin.join(name).is_file());
        complete.then_some(Programs { bin, tree })
    }

    /// The programs in a folder that was named, or that some search came up with.
    pub(crate) fn in_folder(bin: &Path) -> Option<Programs> {
        // A link such as `/usr/local/bin/initdb` leads to the folder in which its libraries and data are found.
        let real = fs::canonicalize(bin.join("initdb")).ok();
        let real = real.as_deref().and_then(Path::parent).unwrap_or(bin);
        let of = |bin: &Path| Programs::within(bin.to_owned(), bin.parent()?.to_owned());
        of(real).or_else(|| of(bin))
    }

    /// Looks in PATH, asks `pg_config`, and looks where systems put them.
    pub(crate) fn installed() -> Option<Programs> {
        let path = env::var_os("PATH").unwrap_or_default();
        let in_path = env::split_paths(&path).find_map(|folder| Programs::in_folder(&folder));
        in_path.or_else(Programs::of_pg_config).or_else(|| {
            let folders = USUAL.iter().flat_map(|pattern| versions(pattern));
            folders.into_iter().find_map(|folder| Programs::in_folder(&folder))
        })
    }

    fn of_pg_config() -> Option<Programs> {
        let output = Command::new("pg_config").arg("--bindir").stderr(Stdio::null()).output().ok()?;
        Programs::in_folder(Path::new(String::from_utf8(output.stdout).ok()?.trim()))
    }

    /// `PostgreSQL 15.18`, if the user of the server can run the programs.
    pub(crate) fn version(&self, account: Account) -> io::Result<String> {
        let output = account.command(self.bin.join("postgres")).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut words = text.split_whitespace().skip(2);
        match words.next() {
            Some(version) if output.status.success() => Ok(format!("PostgreSQL {version}")),
            _ => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        }
    }

    /// These programs or, when the server's user cannot run them, a copy below `folder` that it can run.
    pub(crate) fn usable_by(self, account: Account, folder: &Path) -> Result<Programs, Error> {
        let doing = || format!("run `{}`", self.bin.join("postgres").display());
        let Err(error) = self.version(account) else { return Ok(self) };
        // The programs of the system are never out of reach, and `/usr` is too much to copy.
        let system =
            [Path::new("/"), Path::new("/usr"), Path::new("/usr/local")].contains(&self.tree.as_path());
        let Ok(below) = self.bin.strip_prefix(&self.tree) else { return Err(error).doing(doing()) };
        if system || !is_out_of_reach(&error) {
            return Err(error).doing(doing());
        }
        let tree = folder.join("programs");
        copy(&self.tree, &tree, account).doing(format!("copy `{}`", self.tree.display()))?;
        let copied = Programs { bin: tree.join(below), tree };
        copied.version(account).doing(doing())?;
        Ok(copied)
    }
}

/// A program that cannot be executed, or whose libraries cannot be read.
fn is_out_of_reach(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound | io::ErrorKind::Other)
}

/// The folders that a pattern with one `*` stands for, the highest version first.
fn versions(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else { return Vec::new() };
    let Some((parent, prefix)) = before.rsplit_once('/') else { return Vec::new() };
    let names = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort_by_key(|name| std::cmp::Reverse(number(name)));
    names.iter().map(|name| PathBuf::from(format!("{parent}/{name}{after}"))).collect()
}

/// `15` and `postgresql@15` as 15, `pgsql-9.6` as 9.
fn number(name: &str) -> u32 {
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    digits.get(..end).and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Copies a tree and gives every entry to the server's user.
fn copy(from: &Path, to: &Path, account: Account) -> io::Result<()> {
    let kind = fs::symlink_metadata(from)?.file_type();
    if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if kind.is_dir() {
        // Not the mode of the original: the keeper must be able to remove what is in it.
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()), account)?;
        }
    } else {
        fs::copy(from, to)?;
    }
    account.give(to)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    #[test]
    fn highest_version_comes_first() {
        let root = tempfile::tempdir().unwrap();
        for name in ["9.6", "15", "18", "other"] {
            fs::create_dir_all(root.path().join(name).join("bin")).unwrap();
        }
        let found = versions(&format!("{}/*/bin", root.path().display()));
        let names: Vec<_> = found.iter().map(|path| path.strip_prefix(root.path()).unwrap()).collect();
        assert_eq!(names, ["18/bin", "15/bin", "9.6/bin", "other/bin"].map(Path::new));
        assert_eq!(number("postgresql@17"), 17);
    }

    #[test]
    fn linked_programs_are_found_where_they_are() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let (real, linked) = (root.join("real/bin"), root.join("linked"));
        fs::create_dir_all(&real).unwrap();
        fs::create_dir_all(&linked).unwrap();
        assert_eq!(Programs::in_folder(&real), None);
        for name in ["initdb", "postgres"] {
            fs::write(real.join(name), "").unwrap();
            symlink(real.join(name), linked.join(name)).unwrap();
        }
        assert_eq!(Programs::in_folder(&linked).unwrap().bin, real);
    }

    #[test]
    fn programs_out_of_reach_are_copied_and_others_are_not() {
        let account = Account::of_server().unwrap();
        let Some((uid, _)) = account.other() else {
            eprintln!("skipped: who is not root can run what it can find");
            return;
        };
        let (locked, open) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(open.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let bin = locked.path().join("tree/bin");
        fs::create_dir_all(&bin).unwrap();
        for name in ["initdb", "postgres"] {
            fs::write(bin.join(name), "#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n").unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o700)).unwrap();
        }
        let programs = Programs::in_folder(&bin).unwrap();
        assert!(programs.version(account).is_err());
        let copied = programs.usable_by(account, open.path()).unwrap();
        assert_eq!(copied.bin, open.path().join("programs/bin"));
        assert_eq!(copied.version(account).unwrap(), "PostgreSQL 99.1");
        assert_eq!(fs::metadata(&copied.bin).unwrap().uid(), uid);
        assert_eq!(copied.clone().usable_by(account, open.path()).unwrap(), copied);
    }
}
