//! Producing: messages into the outbox, inside the transaction that changes the business rows (transactional outbox).
//!
//! A [`Producer`] has no connection of its own: it works on whatever client or transaction it is given, and leaves
//! commit and rollback to its owner. Order of a key is the order in which transactions become visible to the relay; lock
//! the key's business row before you send, and that is commit order.

use std::time::SystemTime;

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use crate::error::{Error, ErrorKind};
use crate::message::{Message, MessageId, Received, Sent};
use crate::schema::Schema;
use crate::sql;

/// Messages that go to the server in one statement.
const STATEMENT_MESSAGES_MAX: usize = 1_000;
/// Payload bytes that go to the server in one statement, if it is more than one message.
const STATEMENT_BYTES_MAX: usize = 8 << 20;

/// Sends messages to one topic.
///
/// Roll back where a statement of the transaction has failed, whoever's it was: a COMMIT does so as well, and the driver
/// answers `Ok`. Where the answer to COMMIT was lost, send the same messages again, with their ids: what was committed is
/// refused as a duplicate.
///
/// ```no_run
/// # async fn example(client: &mut tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use pgonce::{Message, Producer};
///
/// let producer = Producer::new("orders");
/// let transaction = client.transaction().await?;
/// transaction.execute("update orders set state = 'placed' where id = 17", &[]).await?;
/// let placed = Message::json(&serde_json::json!({ "order": 17 }))?.key("17").id("order-17-placed");
/// let sent = producer.send(&transaction, &placed).await?;
/// transaction.commit().await?;
/// println!("{} was sent before: {}", sent.message_id, sent.was_duplicate);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    topic: String,
    enqueue: String,
    enqueue_many: String,
    cancel: String,
    emit: String,
}

impl Producer {
    /// A producer for a topic, with pgonce in the schema `pgonce`.
    #[must_use]
    pub fn new(topic: impl Into<String>) -> Self {
        Self::in_schema(topic, &Schema::default())
    }

    /// A producer for a topic, with pgonce in a schema of another name.
    #[must_use]
    pub fn in_schema(topic: impl Into<String>, schema: &Schema) -> Self {
        Self {
            topic: topic.into(),
            enqueue: schema.sql(sql::ENQUEUE),
            enqueue_many: schema.sql(sql::ENQUEUE_MANY),
            cancel: schema.sql(sql::CANCEL),
            emit: schema.sql(sql::EMIT),
        }
    }

    /// Sends a message in the transaction of `client`. It exists if and only if that commits. A second message with an id
    /// that the topic knows is refused, and waits for the first one's transaction to end before it is told so.
    ///
    /// # Errors
    ///
    /// [`UnknownTopic`](crate::ErrorKind::UnknownTopic), [`TooLarge`](crate::ErrorKind::TooLarge),
    /// [`Payload`](crate::ErrorKind::Payload), [`Contention`](crate::ErrorKind::Contention) above READ COMMITTED; errors
    /// of the database.
    pub async fn send<C: GenericClient>(&self, client: &C, message: &Message) -> Result<Sent, Error> {
        message.check_names()?;
        let headers = message.headers_text()?;
        let row = client
            .query_typed_one(
                &self.enqueue,
                &[
                    (&self.topic, Type::TEXT),
                    (&message.payload, Type::TEXT),
                    (&message.key, Type::TEXT),
                    (&message.id.as_str(), Type::TEXT),
                    (&headers, Type::TEXT),
                    (&message.deliver_at, Type::TIMESTAMPTZ),
                ],
            )
            .await?;
        sent(&row)
    }

    /// Sends a message because of one that a handler has received, on the handler's transaction: it exists if and only if the
    /// effect does. `ordinal` says which it is, from 1, of those that `consumer` sends because of that one. The id follows
    /// from these three, and the message's own is not used; so a message that is handled again, after a restore or a replay,
    /// sends nothing twice. There is no time of delivery either.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send); [`Invalid`](crate::ErrorKind::Invalid) for a message with a time of delivery.
    pub async fn emit<C: GenericClient, T>(
        &self,
        client: &C,
        consumer: &str,
        received: &Received<T>,
        ordinal: i32,
        message: &Message,
    ) -> Result<Sent, Error> {
        message.check_names()?;
        if message.deliver_at.is_some() {
            return Err(Error::new(ErrorKind::Invalid, "a message that is emitted has a time of delivery")
                .with_hint("Leave deliver_at away, or send it with an id of your own."));
        }
        let headers = message.headers_text()?;
        let row = client
            .query_typed_one(
                &self.emit,
                &[
                    (&self.topic, Type::TEXT),
                    (&message.payload, Type::TEXT),
                    (&consumer, Type::TEXT),
                    (&received.message_id.as_str(), Type::TEXT),
                    (&ordinal, Type::INT4),
                    (&message.key, Type::TEXT),
                    (&headers, Type::TEXT),
                ],
            )
            .await?;
        sent(&row)
    }

    /// Sends messages in the transaction of `client`, up to 1,000 messages or 8 MiB in a statement. They are relayed in
    /// this order and answered in this order.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send). Statements before the one that failed took effect: roll back.
    pub async fn send_all<C: GenericClient>(&self, client: &C, messages: &[Message]) -> Result<Vec<Sent>, Error> {
        let mut all = Vec::with_capacity(messages.len());
        let mut rest = messages;
        while !rest.is_empty() {
            let (statement, later) = rest.split_at(statement_length(rest));
            self.send_statement(client, statement, &mut all).await?;
            rest = later;
        }
        Ok(all)
    }

    async fn send_statement<C: GenericClient>(
        &self,
        client: &C,
        messages: &[Message],
        all: &mut Vec<Sent>,
    ) -> Result<(), Error> {
        messages.iter().try_for_each(Message::check_names)?;
        let payloads: Vec<&str> = messages.iter().map(|message| message.payload.as_str()).collect();
        let keys: Vec<Option<&str>> = messages.iter().map(|message| message.key.as_deref()).collect();
        let ids: Vec<&str> = messages.iter().map(|message| message.id.as_str()).collect();
        let headers: Vec<Option<String>> = messages.iter().map(Message::headers_text).collect::<Result<_, _>>()?;
        let times: Vec<Option<SystemTime>> = messages.iter().map(|message| message.deliver_at).collect();
        let rows = client
            .query_typed(
                &self.enqueue_many,
                &[
                    (&self.topic, Type::TEXT),
                    (&payloads, Type::TEXT_ARRAY),
                    (&keys, Type::TEXT_ARRAY),
                    (&ids, Type::TEXT_ARRAY),
                    (&headers, Type::TEXT_ARRAY),
                    (&times, Type::TIMESTAMPTZ_ARRAY),
                ],
            )
            .await?;
        for row in &rows {
            all.push(sent(row)?);
        }
        Ok(())
    }

    /// Takes a message back in the transaction of `client`, and answers whether it could: only while it has not been
    /// relayed. Its id is free again then.
    ///
    /// # Errors
    ///
    /// [`UnknownTopic`](crate::ErrorKind::UnknownTopic); errors of the database.
    pub async fn cancel<C: GenericClient>(&self, client: &C, message_id: &MessageId) -> Result<bool, Error> {
        let row = client
            .query_typed_one(&self.cancel, &[(&self.topic, Type::TEXT), (&message_id.as_str(), Type::TEXT)])
            .await?;
        Ok(row.try_get("was_cancelled")?)
    }
}

fn sent(row: &tokio_postgres::Row) -> Result<Sent, Error> {
    Ok(Sent {
        message_id: MessageId::from(row.try_get::<_, String>("message_id")?),
        was_duplicate: row.try_get("was_duplicate")?,
    })
}

/// How many of the messages, at least one, go into the next statement.
fn statement_length(messages: &[Message]) -> usize {
    let mut bytes = 0;
    let fitting = messages.iter().take(STATEMENT_MESSAGES_MAX).take_while(|message| {
        bytes += message.payload.len();
        bytes <= STATEMENT_BYTES_MAX
    });
    fitting.count().max(1)
}
