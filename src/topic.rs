//! Topics and consumers: creating what messages go through. The rest of their verbs (drop, pause, resume) is SQL.

use tokio_postgres::GenericClient;
use tokio_postgres::types::{ToSql, Type};

use crate::error::Error;
use crate::schema::Schema;
use crate::sql;

/// Settings of a topic. What is left out is 8 partitions and payloads up to 1 MiB for a new topic, and stays as it is
/// for one that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TopicSettings {
    /// Number of partitions, 1 to 1024. It cannot change later.
    pub partitions: Option<i32>,
    /// Largest payload in bytes of its binary JSON form, up to 64 MiB.
    pub payload_bytes_max: Option<i32>,
}

/// Where a new consumer begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartAt {
    /// With the earliest message that is kept.
    #[default]
    Earliest,
    /// With the next message that the relay publishes.
    Latest,
}

/// Settings of a consumer. Where a new one begins, and what becomes of a message whose attempt failed. What is left out of
/// the latter is what its field says for a new consumer, and stays as it is for one that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsumerSettings {
    /// Where it begins; an existing consumer stays where it is.
    pub start_at: StartAt,
    /// Where its effect is; [`Transactional`](ConsumerKind::Transactional). It cannot change later.
    pub kind: Option<ConsumerKind>,
    /// What waits while a message that failed is tried again; [`ParkKey`](FailurePolicy::ParkKey). It cannot change later.
    pub failure_policy: Option<FailurePolicy>,
    /// After so many failed attempts a message becomes a dead letter, 1 to 1000; 10.
    pub attempts_max: Option<i32>,
    /// Longest wait after the first failed attempt in milliseconds, up to a day; 500. It doubles with each further one, and
    /// the wait is random up to it.
    pub backoff_min_ms: Option<i32>,
    /// Longest wait after any failed attempt in milliseconds, up to a day; 30,000.
    pub backoff_max_ms: Option<i32>,
}

/// Where the effect of a consumer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConsumerKind {
    /// In this database, in one transaction with the offset.
    #[default]
    Transactional,
    /// Elsewhere, under a lease, at least once.
    External,
}

impl ConsumerKind {
    /// Its name in SQL.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Transactional => "transactional",
            Self::External => "external",
        }
    }
}

/// What waits while a message that failed is tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailurePolicy {
    /// The later messages of its key; all others flow on.
    #[default]
    ParkKey,
    /// All that comes after it in its partition.
    Block,
    /// Nothing: later messages of its key overtake it.
    Skip,
}

impl FailurePolicy {
    /// Its name in SQL.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ParkKey => "park_key",
            Self::Block => "block",
            Self::Skip => "skip",
        }
    }
}

/// Creates a topic, or checks that it is as said.
///
/// # Errors
///
/// [`Invalid`](crate::ErrorKind::Invalid) settings; [`Conflict`](crate::ErrorKind::Conflict) if it has another number of
/// partitions; errors of the database.
pub async fn create_topic<C: GenericClient>(
    client: &C,
    schema: &Schema,
    topic: &str,
    settings: TopicSettings,
) -> Result<(), Error> {
    client
        .query_typed(
            &schema.sql(include_str!("../sql/statements/create_topic.sql")),
            &[(&topic, Type::TEXT), (&settings.partitions, Type::INT4), (&settings.payload_bytes_max, Type::INT4)],
        )
        .await?;
    Ok(())
}

/// Creates a consumer of a topic, or makes of an existing one what is said. Without a topic it is an inbox for
/// [`process_once`].
///
/// # Errors
///
/// [`UnknownTopic`](crate::ErrorKind::UnknownTopic); [`Invalid`](crate::ErrorKind::Invalid) settings;
/// [`Conflict`](crate::ErrorKind::Conflict) if it is bound to another topic, is of another kind or has another failure
/// policy; errors of the database.
pub async fn create_consumer<C: GenericClient>(
    client: &C,
    schema: &Schema,
    consumer: &str,
    topic: Option<&str>,
    settings: ConsumerSettings,
) -> Result<(), Error> {
    let start_at = match settings.start_at {
        StartAt::Earliest => "earliest",
        StartAt::Latest => "latest",
    };
    client
        .query_typed(
            &schema.sql(include_str!("../sql/statements/create_consumer.sql")),
            &[
                (&consumer, Type::TEXT),
                (&topic, Type::TEXT),
                (&start_at, Type::TEXT),
                (&settings.failure_policy.map(FailurePolicy::name), Type::TEXT),
                (&settings.attempts_max, Type::INT4),
                (&settings.backoff_min_ms, Type::INT4),
                (&settings.backoff_max_ms, Type::INT4),
                (&settings.kind.map(ConsumerKind::name), Type::TEXT),
            ],
        )
        .await?;
    Ok(())
}

/// Says which tables hold the effects of a consumer, by their names as SQL has them: its checkpoints save their rows, beside
/// those of `word_counts`. Answers whether they were others before. Who names others has to own the schema.
///
/// # Errors
///
/// [`UnknownConsumer`](crate::ErrorKind::UnknownConsumer); [`Invalid`](crate::ErrorKind::Invalid) for a table that cannot be put
/// back row by row, or is the state of another consumer; errors of the database, also where there is no such table.
pub async fn set_state<C: GenericClient>(
    client: &C,
    schema: &Schema,
    consumer: &str,
    tables: &[String],
) -> Result<bool, Error> {
    let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&consumer, Type::TEXT), (&tables, Type::TEXT_ARRAY)];
    let is_so = schema.sql(include_str!("../sql/statements/state_is.sql"));
    let is_so: bool = client.query_typed_one(&is_so, &parameters).await?.try_get("is_so")?;
    if !is_so {
        client.query_typed(&schema.sql(include_str!("../sql/statements/set_state.sql")), &parameters).await?;
    }
    Ok(!is_so)
}

/// Records in an inbox that a message from elsewhere (a webhook, another broker) is processed, in the transaction of
/// `client`, and answers `true` for the first time only: apply the effect then, in the same transaction. The pattern is
/// known as idempotent receiver.
///
/// # Errors
///
/// [`UnknownConsumer`](crate::ErrorKind::UnknownConsumer), [`WrongConsumer`](crate::ErrorKind::WrongConsumer) if it reads
/// a topic, [`TooLarge`](crate::ErrorKind::TooLarge) for an id beyond 255 bytes; errors of the database.
pub async fn process_once<C: GenericClient>(
    client: &C,
    schema: &Schema,
    consumer: &str,
    message_id: &str,
) -> Result<bool, Error> {
    let row = client
        .query_typed_one(&schema.sql(sql::PROCESS_ONCE), &[(&consumer, Type::TEXT), (&message_id, Type::TEXT)])
        .await?;
    let was_duplicate: bool = row.try_get("was_duplicate")?;
    Ok(!was_duplicate)
}
