//! The folder in which the processes of a run find each other, and the lock that only one of them holds while
//! it joins or starts a server.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
};

use crate::{
    account::Account,
    error::{Doing as _, Error},
};

/// The longest path of a folder whose sockets all systems take (103 bytes with `/srv-xxxxxxxx/.s.PGSQL.5432`).
const LONGEST: usize = 76;

/// The run folder with `start.lock` held; dropping it frees the lock and removes the folder if it is empty.
///
/// The folder and all in it belong to the server's user, so that the keeper can remove it.
pub(crate) struct RunFolder {
    path: PathBuf,
    account: Account,
    _lock: File,
}

impl RunFolder {
    /// Waits until no other process starts or joins a server.
    pub(crate) fn lock(account: Account) -> Result<RunFolder, Error> {
        let path = location(account);
        loop {
            let doing = || format!("use the folder `{}`", path.display());
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).doing(doing());
                }
                _ => {}
            }
            let about = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                about => about.doing(doing())?,
            };
            if !about.is_dir() || !account.owns(about.uid()) || about.mode() & 0o077 != 0 {
                return Err(Error::RunFolder { folder: path.display().to_string() });
            }
            // A keeper may remove the folder or the file at any of the next steps; then it starts over.
            match lock_in(&path, account) {
                Ok(Some(lock)) => return Ok(RunFolder { path, account, _lock: lock }),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).doing(doing()),
            }
        }
    }

    pub(crate) fn account(&self) -> Account {
        self.account
    }

    /// The folders of servers, whatever their state.
    pub(crate) fn servers(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("srv-"))
            .map(|entry| entry.path())
            .collect()
    }

    /// Makes a folder for a new server.
    pub(crate) fn new_server(&self) -> Result<PathBuf, Error> {
        let folder = self.path.join(format!("srv-{:08x}", rand::random::<u32>()));
        let made = DirBuilder::new().mode(0o700).create(&folder).and_then(|()| self.account.give(&folder));
        made.doing(format!("make the folder `{}`", folder.display()))?;
        Ok(folder)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if self.servers().is_empty() {
            // The lock is still held, and who waits for it looks whether its file is still there.
            let _ = fs::remove_file(self.path.join("start.lock"));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

fn lock_in(path: &Path, account: Account) -> io::Result<Option<File>> {
    account.give(path)?;
    let start = path.join("start.lock");
    let file = create(&start, account)?;
    file.lock()?;
    Ok(is_named(&file, &start)?.then_some(file))
}

/// Opens a file for everybody who shares the folder, and makes it if it is not there.
pub(crate) fn create(path: &Path, account: Account) -> io::Result<File> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600).custom_flags(no_follow);
    let file = options.open(path)?;
    let about = file.metadata()?;
    if let Some((uid, gid)) = account.other().filter(|(uid, _)| *uid != about.uid()) {
        fchown(&file, Some(uid), Some(gid))?;
    }
    Ok(file)
}

/// Whether `path` is still the name of this open file.
pub(crate) fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    let (held, named) = (file.metadata()?, fs::symlink_metadata(path)?);
    Ok((held.dev(), held.ino()) == (named.dev(), named.ino()))
}

/// In the folder for temporary files, unless the server's user may not write there or the path is too long.
fn location(account: Account) -> PathBuf {
    let name = format!("authz-testdb-{}", account.me());
    let temp = env::temp_dir();
    let temp = fs::canonicalize(&temp).unwrap_or(temp);
    let path = temp.join(&name);
    let fits = path.as_os_str().len() <= LONGEST && account.can_write_in(&temp);
    if fits { path } else { Path::new("/tmp").join(name) }
}
