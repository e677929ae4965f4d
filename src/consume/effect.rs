//! Effects: how the batch that is open is given to a handler, or to statements of SQL, inside the consumer's transaction.

use std::time::Instant;

use tokio_postgres::Row;

use super::batch::{Content, Failed, OpenBatch, Slice, received};
use super::call::{BoxFuture, bounded};
use super::failure::Trouble;
use super::handler::{BatchHandler, Handler};
use crate::error::Error;

/// What the three kinds of handlers have in common: receive in the open transaction, and apply, whole or in parts.
pub(super) trait Effect: Send + Sync {
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
