//! Signals: the first asks for a soft stop, the second, or a deadline, for a hard one.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Shutdown;

/// SIGINT, SIGTERM and SIGHUP, as one stream.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    /// Takes the signals over; from now on none of them ends the process by itself.
    pub(super) fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next of them.
    pub(super) async fn next(&mut self) {
        // Receiving a signal is safe to cancel: one that was not taken stays.
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }

    /// Turns signals into wishes to stop, until it is dropped. Batches may take so long to finish after the first one.
    pub(super) async fn drive(mut self, shutdown: Shutdown, graceful_stop_max: Duration) {
        self.next().await;
        shutdown.stop();
        tracing::info!("stopping: finishing the batches at hand; a second signal drops them");
        // Either arm may be dropped: both only wait.
        tokio::select! {
            () = self.next() => tracing::warn!("dropping the batches at hand; they come again"),
            () = tokio::time::sleep(graceful_stop_max) => tracing::warn!("not finished in time: dropping the batches at hand; they come again"),
        }
        shutdown.abort();
    }
}
