//! Topics and consumers: creating what messages go through. The rest of their verbs (drop, pause, resume) is SQL.

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

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

/// Creates a consumer of a topic, or checks that it is as said. Without a topic it is an inbox for [`process_once`].
///
/// # Errors
///
/// [`UnknownTopic`](crate::ErrorKind::UnknownTopic); [`Conflict`](crate::ErrorKind::Conflict) if it is bound to another
/// topic; errors of the database.
pub async fn create_consumer<C: GenericClient>(
    client: &C,
    schema: &Schema,
    consumer: &str,
    topic: Option<&str>,
    start_at: StartAt,
) -> Result<(), Error> {
    let start_at = match start_at {
        StartAt::Earliest => "earliest",
        StartAt::Latest => "latest",
    };
    client
        .query_typed(
            &schema.sql(include_str!("../sql/statements/create_consumer.sql")),
            &[(&consumer, Type::TEXT), (&topic, Type::TEXT), (&start_at, Type::TEXT)],
        )
        .await?;
    Ok(())
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
