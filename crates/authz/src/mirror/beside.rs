//! Work with the database beside what else a run does.

use tokio::task::JoinHandle;

use crate::error::Error;

/// Work under way in a task of its own; dropped, it ends.
pub(super) struct Beside<T>(JoinHandle<Result<T, Error>>);

impl<T: Send + 'static> Beside<T> {
    /// Begins.
    pub(super) fn begin(work: impl Future<Output = Result<T, Error>> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }

    pub(super) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits for it.
    pub(super) async fn end(mut self) -> Result<T, Error> {
        (&mut self.0).await.map_err(|_| sqlx::Error::WorkerCrashed)?
    }
}

impl<T> Drop for Beside<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
