//! The verbs as statements with numbered parameters, for sqlx, diesel and any other client: what the library itself sends.
//!
//! Run [`ENQUEUE`] in the transaction that changes the business rows, and [`RECEIVE`] in the one that applies the effect.
//! `examples/clients` does so with sqlx.
//!
//! They are for the schema `pgonce`; [`in_schema`] gives them for another. `docs/sql.md` says what each verb promises, and
//! the errors that it raises.

use crate::schema::Schema;

/// Puts a message into the outbox: `$1` topic (text), `$2` payload (jsonb, or its text), `$3` key (text or null), `$4`
/// message id (text; null to have one made), `$5` headers (jsonb, or its text, or null), `$6` when to deliver it
/// (timestamptz, or its text, or null). Answers one row: `message_id` (text), `was_duplicate` (boolean).
pub const ENQUEUE: &str = include_str!("../sql/statements/enqueue.sql");

/// Puts up to 10,000 messages into the outbox: `$1` topic (text), `$2` payloads (jsonb[]), `$3` keys (text[] or null), `$4`
/// message ids (text[] or null), `$5` headers (jsonb[] or null), `$6` when to deliver them (timestamptz[] or null). Where
/// they are not null, the arrays are of one length. Answers a row for each, in their order: `message_id` (text),
/// `was_duplicate` (boolean).
pub const ENQUEUE_MANY: &str = include_str!("../sql/statements/enqueue_many.sql");

/// Sends a message because of one that was received, in the transaction that applies its effect; handled again, it is sent once
/// all the same: `$1` topic (text), `$2` payload (jsonb, or its text), `$3` consumer (text), `$4` id of the message that was
/// received (text), `$5` which of the messages that follow from it (integer, from 1), `$6` key (text or null), `$7` headers
/// (jsonb, or its text, or null). Answers one row: `message_id` (text), `was_duplicate` (boolean).
pub const EMIT: &str = include_str!("../sql/statements/emit.sql");

/// Takes a message back that has not been relayed: `$1` topic (text), `$2` message id (text). Answers one row: `message_id`
/// (text), `was_cancelled` (boolean).
pub const CANCEL: &str = include_str!("../sql/statements/cancel.sql");

/// Moves messages from the outbox to the queue: `$1` topic (text; null for all), `$2` how many at the most (integer).
/// Answers one row: `moved`, `blocked` (bigint).
pub const RELAY: &str = include_str!("../sql/statements/relay.sql");

/// The next messages of a consumer, recorded as processed: `$1` consumer (text), `$2` how many at the most (integer).
/// Answers them in the order of their offsets: `partition` (integer), `offset` (bigint), `message_id` (text), `key` (text or
/// null), `payload` (jsonb), `headers` (jsonb or null), `enqueued_at` (timestamptz), `attempt` (integer). Apply all of them, in later statements
/// of the same transaction.
pub const RECEIVE: &str = include_str!("../sql/statements/receive.sql");

/// Records in an inbox that a message from elsewhere is processed: `$1` consumer (text), `$2` message id (text). Answers
/// one row: `message_id` (text), `was_duplicate` (boolean).
pub const PROCESS_ONCE: &str = include_str!("../sql/statements/process_once.sql");

/// One of these statements for pgonce in a schema of another name.
///
/// ```
/// use pgonce::{Schema, sql};
///
/// let statement = sql::in_schema(sql::RECEIVE, &Schema::new("events")?);
/// assert!(statement.contains(r#"from "events".receive($1, max => $2)"#));
/// # Ok::<(), pgonce::Error>(())
/// ```
#[must_use]
pub fn in_schema(statement: &str, schema: &Schema) -> String {
    schema.sql(statement)
}
