//! The emulator, and what it takes to reach it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dir_sync::google::{GoogleConfig, GoogleSource, RetryPolicy};
use directory_emulator::{Directory, Emulator};
use tempfile::TempDir;

/// An emulated Google Workspace.
pub(crate) struct Workspace {
    pub(crate) emulator: Emulator,
    pub(crate) config: GoogleConfig,
    pub(crate) folder: TempDir,
}

pub(crate) async fn workspace(directory: Directory) -> Workspace {
    let emulator = Emulator::start(directory).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("key.json");
    std::fs::write(&credentials, emulator.service_account_key()).unwrap();
    let config = GoogleConfig {
        subject: Some(emulator.subject().to_owned()),
        base_url: emulator.url(),
        retry: RetryPolicy {
            base_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(4),
            attempts: 3,
            ..RetryPolicy::default()
        },
        queries_per_minute: 0,
        ..GoogleConfig::new(credentials)
    };
    Workspace { emulator, config, folder }
}

impl Workspace {
    pub(crate) async fn source(&self) -> Arc<GoogleSource> {
        Arc::new(GoogleSource::new(self.config.clone()).await.unwrap())
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.folder.path().join("key.json")
    }
}
