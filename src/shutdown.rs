//! How everything stops: softly, so that what was begun is finished; or hard, so that it is dropped. Either way no
//! message is lost or doubled, because a batch commits whole or not at all.

use std::future::Future;

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

    /// Stops softly at the first Ctrl-C, and hard at the second.
    ///
    /// Must be called within a Tokio runtime. From then on, Ctrl-C does not end the process by itself.
    #[must_use]
    pub fn on_ctrl_c() -> Self {
        let shutdown = Self::new();
        let told = shutdown.clone();
        tokio::spawn(async move {
            for act in [Self::stop, Self::abort] {
                if tokio::signal::ctrl_c().await.is_err() {
                    return;
                }
                act(&told);
            }
        });
        shutdown
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
