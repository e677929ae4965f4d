//! Handlers: what a consumer does with messages. One message, a batch, or SQL; each inside the consumer's transaction.

use std::future::Future;
use std::pin::Pin;

use serde::de::DeserializeOwned;
use tokio_postgres::Transaction;

use super::{Batch as OpenBatch, received};
use crate::error::{Error, ErrorKind};
use crate::message::Received;

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
    /// An error rolls the whole batch back, and its messages come again.
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
    /// An error rolls the whole batch back, and its messages come again.
    fn handle(
        &self,
        transaction: &Transaction<'_>,
        messages: Vec<Received<Self::Payload>>,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// What the three kinds of handlers have in common: receive in the open transaction, apply, say how many.
pub(crate) trait Effect: Send + Sync {
    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<u64, Error>>;
}

/// The effect of a [`Handler`].
pub(super) struct Each<H>(pub(super) H);

impl<H: Handler> Effect for Each<H> {
    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<u64, Error>> {
        Box::pin(async move {
            let rows = batch.receive().await?;
            let applied = rows.len() as u64;
            for row in rows {
                let message = received(&row)?;
                let id = message.message_id.clone();
                self.0.handle(batch.transaction, message).await.map_err(|error| {
                    failed(&batch.consumer.name, error).with_hint(format!("The message was {id}. It comes again."))
                })?;
            }
            Ok(applied)
        })
    }
}

/// The effect of a [`BatchHandler`].
pub(super) struct Batch<H>(pub(super) H);

impl<H: BatchHandler> Effect for Batch<H> {
    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<u64, Error>> {
        Box::pin(async move {
            let rows = batch.receive().await?;
            let applied = rows.len() as u64;
            if applied > 0 {
                let messages = rows.iter().map(received).collect::<Result<_, _>>()?;
                self.0
                    .handle(batch.transaction, messages)
                    .await
                    .map_err(|error| failed(&batch.consumer.name, error))?;
            }
            Ok(applied)
        })
    }
}

/// The effect of SQL statements.
pub(super) struct Sql(pub(super) String);

impl Effect for Sql {
    fn apply<'a>(&'a self, batch: &'a OpenBatch<'a>) -> BoxFuture<'a, Result<u64, Error>> {
        Box::pin(async move {
            let applied = batch.open().await?;
            if applied > 0 {
                batch.run(&self.0).await.map_err(|error| match error.kind() {
                    ErrorKind::Contention | ErrorKind::Unavailable => error,
                    _ => failed(&batch.consumer.name, Box::new(error)),
                })?;
            }
            Ok(applied)
        })
    }
}

fn failed(consumer: &str, error: HandlerError) -> Error {
    // The driver's own text for what the server reports says nothing ("db error").
    let error = match error.downcast::<tokio_postgres::Error>() {
        Ok(error) => Box::new(Error::from(*error)),
        Err(error) => error,
    };
    Error::new(ErrorKind::Handler, format!("handler of consumer {consumer:?} failed: {error}")).with_source(error)
}
