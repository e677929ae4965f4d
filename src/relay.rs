//! Relaying: committed messages from the outbox to the queue, in order.
//!
//! All that is subtle about it is in `sql/routines/relay.sql`, `relay_claim.sql` and `relay_bound.sql`; a step is one statement and one short transaction. Any
//! number of relays may run: a partition that one of them is at is passed over by the others.

use tokio_postgres::types::Type;

use crate::database::Database;
use crate::error::Error;
use crate::sql;

/// Messages that a step moves at the most, where nothing else is said.
const BATCH_MESSAGES: i32 = 1_000;

/// The stage that relays one topic, or all.
#[derive(Clone, Debug)]
pub struct Relay {
    topic: Option<String>,
    batch_messages: i32,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relayed {
    /// Messages moved to the queue.
    pub moved: u64,
    /// Messages that wait, because another session holds a lock on them or on an earlier one of their key.
    pub blocked: u64,
}

impl Relay {
    /// Relays one topic.
    #[must_use]
    pub fn topic(topic: impl Into<String>) -> Self {
        Self { topic: Some(topic.into()), batch_messages: BATCH_MESSAGES }
    }

    /// Relays all topics.
    #[must_use]
    pub fn all() -> Self {
        Self { topic: None, batch_messages: BATCH_MESSAGES }
    }

    /// The topic that it relays; none where it relays all.
    #[must_use]
    pub fn topic_name(&self) -> Option<&str> {
        self.topic.as_deref()
    }

    /// Moves up to this many messages in a step, 1 to 10,000; 1,000 where nothing is said.
    #[must_use]
    pub fn batch_messages(mut self, messages: i32) -> Self {
        self.batch_messages = messages;
        self
    }

    /// Moves what is there, up to a batch of messages or 8 MiB. Dropping the future is safe: the batch either
    /// committed or did not.
    ///
    /// # Errors
    ///
    /// [`UnknownTopic`](crate::ErrorKind::UnknownTopic), [`Invalid`](crate::ErrorKind::Invalid) batch size; errors of the
    /// database.
    pub async fn step(&self, database: &Database) -> Result<Relayed, Error> {
        let session = database.session().await?;
        let row = session
            .run_one(
                &database.schema().sql(sql::RELAY),
                &[(&self.topic, Type::TEXT), (&self.batch_messages, Type::INT4)],
            )
            .await?;
        let moved: i64 = row.try_get("moved")?;
        let blocked: i64 = row.try_get("blocked")?;
        session.give_back();
        Ok(Relayed { moved: moved.unsigned_abs(), blocked: blocked.unsigned_abs() })
    }
}

impl From<&str> for Relay {
    fn from(topic: &str) -> Self {
        Self::topic(topic)
    }
}
