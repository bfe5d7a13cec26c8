use std::sync::Arc;

use tokio::sync::watch;

/// Holds calls until a test lets them go; clones are the same gate.
///
/// ```
/// # use directory_emulator::{Effect, Emulator, Fault, Gate, Target};
/// # async fn kill_while_reading(emulator: &Emulator) {
/// let gate = Gate::new();
/// emulator.add_fault(Fault::new(Target::members_of("g1"), Effect::Hold(gate.clone())).on_call(1));
/// // ... start the crawl, then:
/// gate.arrival(1).await;
/// // ... it now waits for this answer: end it, or go on:
/// gate.release();
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    arrived: watch::Sender<u64>,
    open: watch::Sender<bool>,
}

impl Gate {
    /// A gate that is shut.
    #[must_use]
    pub fn new() -> Self {
        Self { inner: Arc::new(Inner { arrived: watch::Sender::new(0), open: watch::Sender::new(false) }) }
    }

    /// Lets every call go, those that wait and those that come.
    pub fn release(&self) {
        self.inner.open.send_replace(true);
    }

    /// Waits until this many calls have come to the gate since it was made.
    pub async fn arrival(&self, calls: u64) {
        // An error would mean that the sender is gone, and `self` keeps it.
        let _ = self.inner.arrived.subscribe().wait_for(|arrived| *arrived >= calls).await;
    }

    pub(crate) async fn pass(&self) {
        self.inner.arrived.send_modify(|arrived| *arrived += 1);
        let _ = self.inner.open.subscribe().wait_for(|open| *open).await;
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}
