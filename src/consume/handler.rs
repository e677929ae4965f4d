//! Handlers: what a consumer does with messages. One message, a batch, or SQL; each inside the consumer's transaction.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tokio_postgres::{Row, Transaction};

use super::batch::{Content, Failed, OpenBatch, Slice, received};
use super::failure::Trouble;
use crate::error::Error;
use crate::message::{Offset, Received};

/// Why a handler failed: any error, or a text.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// A future on the heap, for effects of different kinds behind one interface.
pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Handles one message at a time.
///
/// ```
/// use pgonce::{Handler, HandlerError, Received};
/// use tokio_postgres::Transaction;
///
/// #[derive(serde::Deserialize)]
/// struct OrderPlaced {
///     order: i64,
/// }
///
/// struct Billing;
///
/// impl Handler for Billing {
///     type Payload = OrderPlaced;
///
///     async fn handle(&self, tx: &Transaction<'_>, message: Received<OrderPlaced>) -> Result<(), HandlerError> {
///         tx.execute("insert into invoices (order_id) values ($1)", &[&message.payload.order]).await?;
///         Ok(())
///     }
/// }
/// ```
pub trait Handler: Send + Sync + 'static {
    /// What the payload is read as.
    type Payload: DeserializeOwned + Send;

    /// Applies the effect of a message, with statements on `transaction`. It must neither commit nor roll back.
    ///
    /// An error, a panic, or to take longer than [`message_timeout`](crate::Consumer::message_timeout) undoes what it did:
    /// the message is tried again later, and becomes a dead letter after its last attempt; the others of the batch do not
    /// suffer. [`Failure`](crate::Failure) says more about an error. An error that no message can be blamed for (a lost
    /// connection, a deadlock, a table that is missing) counts as no attempt: the batch comes again.
    fn handle(
        &self,
        transaction: &Transaction<'_>,
        message: Received<Self::Payload>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// Handles a batch of messages of one partition at a time, in the order of their offsets.
pub trait BatchHandler: Send + Sync + 'static {
    /// What the payloads are read as.
    type Payload: DeserializeOwned + Send;

    /// Applies the effect of a batch, with statements on `transaction`. It must neither commit nor roll back.
    ///
    /// After an error the batch is tried in parts, until it is known which messages fail by themselves; for these it is as with
    /// [`Handler::handle`]. A call may take as long as a single message may.
    fn handle(
        &self,
        transaction: &Transaction<'_>,
        messages: Vec<Received<Self::Payload>>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// What the three kinds of handlers have in common: receive in the open transaction, and apply, whole or in parts.
pub(crate) trait Effect: Send + Sync {
    /// How many messages its handler is given in a call; nothing where it has none.
    fn messages_per_call(&self) -> Option<usize>;

    fn receive<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<Content, Error>>;

    /// Applies the batch as it came.
    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>, content: &'a Content) -> BoxFuture<'a, Result<(), Trouble>>;

    /// Applies a part of it, behind a savepoint.
    fn apply_slice<'a>(
        &'a self,
        batch: &'a OpenBatch<'a>,
        slice: &'a Slice<'a>,
    ) -> BoxFuture<'a, Result<Failed, Trouble>>;
}

/// The effect of a [`Handler`].
pub(super) struct Each<H>(pub(super) H);

impl<H: Handler> Each<H> {
    async fn handle<'r>(
        &self,
        batch: &OpenBatch<'_>,
        rows: impl Iterator<Item = &'r Row> + Send,
    ) -> Result<(), Trouble> {
        let mut heard_at = Instant::now();
        for row in rows {
            // Handlers need not send anything, and a silence of that length says to the server that nobody is there.
            if heard_at.elapsed() >= batch.message_timeout {
                batch.expect_open().await?;
                heard_at = Instant::now();
            }
            let message = received(row)?;
            let culprit = Some(message.offset);
            let handling = self.0.handle(batch.effects, message);
            batch.times.measure(bounded(batch.consumer, batch.message_timeout, culprit, handling)).await?;
        }
        Ok(())
    }
}

impl<H: Handler> Effect for Each<H> {
    fn messages_per_call(&self) -> Option<usize> {
        Some(1)
    }

    fn receive<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<Content, Error>> {
        Box::pin(batch.receive())
    }

    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>, content: &'a Content) -> BoxFuture<'a, Result<(), Trouble>> {
        Box::pin(self.handle(batch, content.rows().iter()))
    }

    fn apply_slice<'a>(
        &'a self,
        batch: &'a OpenBatch<'a>,
        slice: &'a Slice<'a>,
    ) -> BoxFuture<'a, Result<Failed, Trouble>> {
        Box::pin(async move {
            self.handle(batch, slice.rows.iter().copied()).await?;
            Ok(Failed::default())
        })
    }
}

/// The effect of a [`BatchHandler`].
pub(super) struct Batch<H>(pub(super) H);

impl<H: BatchHandler> Batch<H> {
    async fn handle<'r>(
        &self,
        batch: &OpenBatch<'_>,
        rows: impl Iterator<Item = &'r Row> + Send,
    ) -> Result<(), Trouble> {
        let messages = rows.map(received).collect::<Result<Vec<_>, _>>()?;
        let handling = self.0.handle(batch.effects, messages);
        batch.times.measure(bounded(batch.consumer, batch.message_timeout, None, handling)).await
    }
}

impl<H: BatchHandler> Effect for Batch<H> {
    fn messages_per_call(&self) -> Option<usize> {
        Some(usize::MAX)
    }

    fn receive<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<Content, Error>> {
        Box::pin(batch.receive())
    }

    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>, content: &'a Content) -> BoxFuture<'a, Result<(), Trouble>> {
        Box::pin(self.handle(batch, content.rows().iter()))
    }

    fn apply_slice<'a>(
        &'a self,
        batch: &'a OpenBatch<'a>,
        slice: &'a Slice<'a>,
    ) -> BoxFuture<'a, Result<Failed, Trouble>> {
        Box::pin(async move {
            self.handle(batch, slice.rows.iter().copied()).await?;
            Ok(Failed::default())
        })
    }
}

/// The effect of SQL statements.
pub(super) struct Sql(pub(super) String);

impl Effect for Sql {
    fn messages_per_call(&self) -> Option<usize> {
        None
    }

    fn receive<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<Content, Error>> {
        Box::pin(batch.open())
    }

    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>, _: &'a Content) -> BoxFuture<'a, Result<(), Trouble>> {
        Box::pin(async move {
            batch
                .times
                .measure(batch.run(&self.0))
                .await
                .map_err(|error| Trouble::of_handler(batch.consumer, None, error.into()))
        })
    }

    fn apply_slice<'a>(
        &'a self,
        batch: &'a OpenBatch<'a>,
        slice: &'a Slice<'a>,
    ) -> BoxFuture<'a, Result<Failed, Trouble>> {
        Box::pin(async move {
            let outcome = batch.times.measure(batch.try_statements(slice, &self.0)).await;
            // What is left over is a statement that took too long.
            outcome.map_err(|error| Trouble::of_handler(batch.consumer, None, error.into()))
        })
    }
}

/// Runs a handler for as long as a message may take. A panic of it is a failure like any other.
pub(super) async fn bounded(
    consumer: &str,
    message_timeout: Duration,
    culprit: Option<Offset>,
    handling: impl Future<Output = Result<(), HandlerError>> + Send,
) -> Result<(), Trouble> {
    let mut handling = pin!(handling);
    let caught = poll_fn(|context| {
        // Whatever the handler left half done is rolled back to the savepoint, and its own state is its own affair.
        match catch_unwind(AssertUnwindSafe(|| handling.as_mut().poll(context))) {
            Ok(poll) => poll,
            Err(_) => Poll::Ready(Err("the handler panicked".into())),
        }
    });
    // A statement that is under way when the handler is dropped ends by itself: the session's statement_timeout is the same.
    match tokio::time::timeout(message_timeout, caught).await {
        Ok(outcome) => outcome.map_err(|error| Trouble::of_handler(consumer, culprit, error)),
        Err(_) => Err(Trouble::timeout(culprit, message_timeout)),
    }
}
