//! How everything stops: softly, so that what was begun is finished; or hard, so that it is dropped. Either way no
//! message is lost or doubled, because a batch commits whole or not at all.

use std::future::Future;
use std::time::Duration;

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The wish to stop, shared by all that has to hear of it. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    soft: CancellationToken,
    hard: CancellationToken,
}

impl Shutdown {
    /// Nothing is to stop yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One that hears what is asked here, and asks nothing of others.
    pub(crate) fn child(&self) -> Self {
        Self { soft: self.soft.child_token(), hard: self.hard.child_token() }
    }

    /// Stops softly at the first SIGINT (Ctrl-C), SIGTERM or SIGHUP, and hard at the second, or when the soft stop has
    /// taken longer than `graceful_stop_max`.
    ///
    /// Must be called within a Tokio runtime. From then on, these signals do not end the process by themselves. (Where
    /// there are no such signals, it is Ctrl-C alone.)
    ///
    /// # Errors
    ///
    /// If the signals cannot be heard.
    pub fn on_signals(graceful_stop_max: Duration) -> std::io::Result<Self> {
        let shutdown = Self::new();
        let told = shutdown.clone();
        let mut signals = Signals::listen()?;
        tokio::spawn(async move {
            signals.next().await;
            told.stop();
            // Either arm may be dropped: both only wait.
            tokio::select! {
                () = signals.next() => {}
                () = tokio::time::sleep(graceful_stop_max) => {}
            }
            told.abort();
        });
        Ok(shutdown)
    }

    /// Asks to take up nothing new, finish the batches at hand, and end.
    pub fn stop(&self) {
        self.soft.cancel();
    }

    /// Asks to drop the batches at hand and end now.
    pub fn abort(&self) {
        self.soft.cancel();
        self.hard.cancel();
    }

    /// Whether it was asked to stop, softly or hard.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.soft.is_cancelled()
    }

    /// Ends when it is asked to stop, softly or hard.
    pub async fn stopping(&self) {
        self.soft.cancelled().await;
    }

    /// Runs a future to its end, or drops it when it is asked to abort.
    pub async fn or_aborted<F: Future>(&self, work: F) -> Option<F::Output> {
        // The caller says by choosing this method that `work` may be dropped at any await.
        tokio::select! {
            biased;
            () = self.hard.cancelled() => None,
            output = work => Some(output),
        }
    }
}

/// SIGINT, SIGTERM and SIGHUP, as one stream.
#[cfg(unix)]
struct Signals([Signal; 3]);

#[cfg(unix)]
impl Signals {
    fn listen() -> std::io::Result<Self> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        // Receiving a signal is safe to cancel: one that was not taken stays.
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Ctrl-C.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "as on Unix")]
    fn listen() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
