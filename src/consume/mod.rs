//! Consuming: the next messages of a queue, and what a handler makes of them, in one transaction.
//!
//! A step receives (which records the ids and moves the offset), runs the handler on the same transaction, and commits:
//! dedup record, effect and offset exist together or not at all. Whatever goes wrong, and wherever the process dies, the
//! transaction is rolled back and the messages come again.
//!
//! The handler's statements run after the one that received, each with a snapshot of its own, so they see all that the
//! batch before has written.

mod handler;

use tokio_postgres::types::{Json, Type};
use tokio_postgres::{Row, Transaction};

use crate::database::Database;
use crate::error::{Error, ErrorKind};
use crate::message::{MessageId, Offset, Partition, Received};
use crate::sql;

use handler::Effect;
pub use handler::{BatchHandler, Handler, HandlerError};

/// Messages that a step receives at the most, where nothing else is said.
const BATCH_MESSAGES: i32 = 1_000;

/// The stage that consumes a topic under one name.
///
/// Any number of steps may run at once, here or on other machines: each takes a partition that nobody is at.
pub struct Consumer {
    name: String,
    effect: Box<dyn Effect>,
    batch_messages: i32,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consumed {
    /// Messages whose effect was applied.
    pub applied: u64,
}

impl Consumer {
    /// A consumer whose handler takes one message at a time.
    #[must_use]
    pub fn each<H: Handler>(name: impl Into<String>, handler: H) -> Self {
        Self::with_effect(name, handler::Each(handler))
    }

    /// A consumer whose handler takes a batch at a time.
    #[must_use]
    pub fn batch<H: BatchHandler>(name: impl Into<String>, handler: H) -> Self {
        Self::with_effect(name, handler::Batch(handler))
    }

    /// A consumer whose effect is SQL: one statement or several, separated by semicolons, over the relation `received`
    /// (`consumer`, `partition`, `offset`, `message_id`, `key`, `payload`, `headers`, `enqueued_at`). Payloads never leave the server.
    ///
    /// They run inside the consumer's transaction, in which COMMIT and ROLLBACK fail.
    /// Every row of `received` counts as applied: a filter or an inner join that drops rows drops messages. Aggregate
    /// per target row before an UPDATE … FROM.
    ///
    /// ```
    /// use pgonce::Consumer;
    ///
    /// let ledger = Consumer::sql("ledger", "insert into ledger (id, amount)
    ///     select message_id, (payload ->> 'amount')::numeric from received");
    /// # drop(ledger);
    /// ```
    #[must_use]
    pub fn sql(name: impl Into<String>, statements: impl Into<String>) -> Self {
        Self::with_effect(name, handler::Sql(statements.into()))
    }

    /// The built-in consumer: counts words into the table `word_counts`. Payloads are `{"word": …}`.
    #[must_use]
    pub fn word_count(name: impl Into<String>) -> Self {
        Self::sql(name, include_str!("../../sql/word_count.sql"))
    }

    fn with_effect(name: impl Into<String>, effect: impl Effect + 'static) -> Self {
        Self { name: name.into(), effect: Box::new(effect), batch_messages: BATCH_MESSAGES }
    }

    /// Receives up to this many messages in a step, 1 to 10,000; 1,000 where nothing is said.
    #[must_use]
    pub fn batch_messages(mut self, messages: i32) -> Self {
        self.batch_messages = messages;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Applies what is there in one partition, up to a batch of messages or 8 MiB. Dropping the future is safe: the
    /// batch either committed or did not.
    ///
    /// # Errors
    ///
    /// [`Handler`](ErrorKind::Handler) if the handler failed, [`Payload`](ErrorKind::Payload) if a payload has another
    /// form than the handler takes; the messages come again. [`UnknownConsumer`](ErrorKind::UnknownConsumer),
    /// [`WrongConsumer`](ErrorKind::WrongConsumer); errors of the database.
    pub async fn step(&self, database: &Database) -> Result<Consumed, Error> {
        let mut session = database.session().await?;
        let transaction = session.transaction().await?;
        let batch = Batch { consumer: self, database, transaction: &transaction };
        let applied = self.effect.apply(&batch).await?;
        if applied > 0 {
            // A handler that swallowed an error left an aborted transaction, whose COMMIT would roll back and report
            // success; one that ended the transaction itself left none. A statement in front of COMMIT tells.
            let row = transaction.query_typed_one(include_str!("../../sql/statements/batch_is_open.sql"), &[]).await?;
            let is_open: Option<bool> = row.try_get("is_open")?;
            if is_open != Some(true) {
                let message = format!("handler of consumer {:?} ended the transaction that it was given", self.name);
                return Err(Error::new(ErrorKind::Handler, message).with_hint(
                    "It must neither commit nor roll back: what it received may be committed without the rest of its effect.",
                ));
            }
        }
        // Also without messages: a batch of nothing but duplicates has moved the offset.
        transaction.commit().await?;
        session.give_back();
        Ok(Consumed { applied })
    }
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consumer")
            .field("name", &self.name)
            .field("batch_messages", &self.batch_messages)
            .finish_non_exhaustive()
    }
}

/// One batch of a consumer, in its transaction: what an effect is applied to.
pub(crate) struct Batch<'a> {
    consumer: &'a Consumer,
    database: &'a Database,
    transaction: &'a Transaction<'a>,
}

impl Batch<'_> {
    /// Receives the batch, with its payloads.
    async fn receive(&self) -> Result<Vec<Row>, Error> {
        let rows = self
            .transaction
            .query_typed(
                &self.database.schema().sql(sql::RECEIVE),
                &[(&self.consumer.name, Type::TEXT), (&self.consumer.batch_messages, Type::INT4)],
            )
            .await?;
        Ok(rows)
    }

    /// Runs statements, none of which can end the transaction.
    async fn run(&self, statements: &str) -> Result<(), Error> {
        let statement = self.database.schema().sql(include_str!("../../sql/statements/apply_statements.sql"));
        self.transaction.query_typed(&statement, &[(&statements, Type::TEXT)]).await?;
        Ok(())
    }

    /// Receives the batch into the relation `received`, and answers the number of its messages.
    async fn open(&self) -> Result<u64, Error> {
        let schema = self.database.schema();
        let row = self
            .transaction
            .query_typed_one(
                &schema.sql(include_str!("../../sql/statements/open_batch.sql")),
                &[
                    (&self.consumer.name, Type::TEXT),
                    (&self.consumer.batch_messages, Type::INT4),
                    (&schema.name(), Type::TEXT),
                ],
            )
            .await?;
        let finds_received: bool = row.try_get("finds_received")?;
        if !finds_received {
            return Err(Error::new(ErrorKind::Conflict, "another relation in the search_path has the name received")
                .with_hint("Rename it, or give the role of this program a search_path without it."));
        }
        let messages: i64 = row.try_get("messages")?;
        Ok(messages.unsigned_abs())
    }
}

/// Reads a received message from its row.
fn received<T: serde::de::DeserializeOwned>(row: &Row) -> Result<Received<T>, Error> {
    let message_id = MessageId::from(row.try_get::<_, String>("message_id")?);
    let offset = Offset(row.try_get("offset")?);
    let partition = Partition(row.try_get("partition")?);
    let payload: Json<&serde_json::value::RawValue> = row.try_get("payload")?;
    let payload = serde_json::from_str(payload.0.get()).map_err(|error| {
        // The error's text may quote the payload; only its place goes into messages and logs.
        Error::new(
            ErrorKind::Payload,
            format!(
                "payload of message {message_id} (partition {}, offset {}) does not fit the handler, at column {}",
                partition.0,
                offset.0,
                error.column()
            ),
        )
    })?;
    let headers: Option<Json<serde_json::Map<String, serde_json::Value>>> = row.try_get("headers")?;
    Ok(Received {
        partition,
        offset,
        message_id,
        key: row.try_get("key")?,
        payload,
        headers: headers.map(|headers| headers.0).unwrap_or_default(),
        enqueued_at: row.try_get("enqueued_at")?,
    })
}
