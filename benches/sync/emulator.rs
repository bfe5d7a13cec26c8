//! A process that syncs from the emulated API, measured by its own counters of memory and CPU.

use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use dir_sync::file::FileSource;
use dir_sync::google::{GoogleConfig, GoogleSource};
use dir_sync::source::Source;
use dir_sync::{DirectorySync, Status};
use directory_emulator::{Directory, Emulator};
use sqlx::PgPool;

use crate::world::World;
use crate::{migrated, options};

/// Syncs twice from the API and twice from a file, each time as another process.
pub(crate) async fn measure(world: World) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("world.json");
    let json = world.json();
    std::fs::File::create(&file).unwrap().write_all(json.to_string().as_bytes()).unwrap();
    let emulator = Emulator::start(Directory::from_value(json).unwrap()).await.unwrap();
    let key = folder.path().join("key.json");
    std::fs::write(&key, emulator.service_account_key()).unwrap();
    for source in ["google", "file"] {
        let (database, _pool) = migrated().await;
        for run in ["first load", "unchanged"] {
            let output = tokio::process::Command::new(std::env::current_exe().unwrap())
                .arg("child")
                .env("SYNC_SOURCE", source)
                .env("SYNC_FILE", &file)
                .env("SYNC_DATABASE", database.url())
                .env("SYNC_KEY", &key)
                .env("SYNC_SUBJECT", emulator.subject())
                .env("SYNC_URL", emulator.url())
                .stderr(Stdio::inherit())
                .output()
                .await
                .unwrap();
            println!("{source}, {run}: {}", String::from_utf8_lossy(&output.stdout).trim());
        }
    }
}

/// The measured process.
pub(crate) async fn child() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let source: Arc<dyn Source> = if variable("SYNC_SOURCE") == "file" {
        Arc::new(FileSource::open(PathBuf::from(variable("SYNC_FILE"))).unwrap())
    } else {
        let config = GoogleConfig {
            subject: Some(variable("SYNC_SUBJECT")),
            base_url: variable("SYNC_URL"),
            queries_per_minute: 0,
            ..GoogleConfig::new(variable("SYNC_KEY"))
        };
        Arc::new(GoogleSource::new(config).await.unwrap())
    };
    let pool = PgPool::connect(&variable("SYNC_DATABASE")).await.unwrap();
    let report = DirectorySync::new(pool, "world".parse().unwrap(), source).options(options()).run().await;
    assert!(matches!(report.status, Status::Applied | Status::Unchanged), "{report}");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    let peak: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    // User and system time in hundredths of a second, behind the name in brackets.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let ticks: u64 = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|n| n.parse::<u64>().unwrap())
        .sum();
    println!(
        "{:?}, peak memory {:.1} MiB, {} calls in {:.1} s, {:.1} s of CPU",
        report.status,
        peak as f64 / 1024.0,
        report.api_calls,
        report.duration_ms as f64 / 1000.0,
        ticks as f64 / 100.0
    );
}
