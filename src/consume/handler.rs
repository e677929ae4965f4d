//! Handlers: what a user of the library writes for a consumer, one message at a time or a batch.

use std::future::Future;

use serde::de::DeserializeOwned;
use tokio_postgres::Transaction;

use crate::message::Received;

/// Why a handler failed: any error, or a text.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

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

    /// Applies the effect of a message, with statements on `transaction`, which is READ COMMITTED whatever the database's
    /// default is. It must neither commit nor roll back.
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
