//! Ways to sign in at the emulator without a key.

use std::path::Path;

use directory_emulator::Emulator;

use super::Program;

impl Program {
    /// Google as a source, at this emulator, without any way to sign in yet.
    pub(crate) fn google_at(self, emulator: &Emulator) -> Self {
        self.option("--source", "google")
            .option("--google-url", emulator.url())
            .option("--google-iam-url", emulator.url())
            .option("--google-metadata-url", emulator.url())
            .option("--google-token-url", format!("{}token", emulator.url()))
            .option("--google-quota", "0")
    }

    /// The metadata server vouches for this account.
    pub(crate) fn machine(self, account: &str) -> Self {
        self.option("--google-service-account", account)
    }

    /// Workload identity federation vouches.
    pub(crate) fn federated(self, emulator: &Emulator, folder: &Path, impersonate: bool) -> Self {
        let token = folder.join("subject-token");
        std::fs::write(&token, "a token of the cluster").unwrap();
        let file = folder.join("external-account.json");
        std::fs::write(&file, emulator.external_account(&token, impersonate)).unwrap();
        self.option("--google-credentials", file)
    }

    /// On behalf of the emulator's administrator.
    pub(crate) fn for_admin(self, emulator: &Emulator) -> Self {
        self.option("--google-subject", emulator.subject())
    }
}
