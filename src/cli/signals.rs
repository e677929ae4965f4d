//! Signals: the first asks for a soft stop, the second, or a deadline, for a hard one.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Shutdown;

/// How long batches may take to finish after the first signal.
const GRACEFUL_STOP_MAX: Duration = Duration::from_secs(30);

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

    /// Turns signals into wishes to stop, until it is dropped.
    pub(super) async fn drive(mut self, shutdown: Shutdown) {
        self.next().await;
        tracing::info!("stopping: finishing the batches at hand; a second signal drops them");
        shutdown.stop();
        // Either arm may be dropped: both only wait.
        tokio::select! {
            () = self.next() => tracing::warn!("dropping the batches at hand; they come again"),
            () = tokio::time::sleep(GRACEFUL_STOP_MAX) => tracing::warn!("not finished in time: dropping the batches at hand; they come again"),
        }
        shutdown.abort();
    }
}
