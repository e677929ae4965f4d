//! The batch that is open: what a consumer has received in its transaction, applied whole or in parts.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Json, ToSql, Type};
use tokio_postgres::{Row, Transaction};

use super::failure::{Blame, Trouble, Verdict};
use super::handler_times::HandlerTimes;
use crate::database::Database;
use crate::error::{Error, ErrorKind};
use crate::message::{MessageId, Offset, Partition, Received};

/// Messages between two savepoints, where some may fail.
const SLICE_MESSAGES: usize = 16;

/// How late a process may be, with all else that its machine does.
const SILENCE_MARGIN: Duration = Duration::from_secs(5);

/// What an effect is applied to.
pub(super) struct OpenBatch<'a> {
    pub(super) consumer: &'a str,
    pub(super) database: &'a Database,
    /// Receives, records, and counts failures.
    pub(super) records: &'a Transaction<'a>,
    /// The handler's: the same one where effects are exactly once.
    pub(super) effects: &'a Transaction<'a>,
    pub(super) scope: Scope,
    pub(super) message_timeout: Duration,
    pub(super) times: &'a HandlerTimes,
}

/// Which messages a batch may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    /// The partition; any one that is free, where nothing is said.
    pub(super) partition: Option<i32>,
    pub(super) messages_max: i32,
    /// Whether one may be among them that a process has died of.
    pub(super) suspects: bool,
}

/// What was received: the rows, or, where the payloads stay in the server, how many.
pub(super) enum Content {
    Rows(Vec<Row>),
    Opened { messages: u64, has_failed_before: bool },
}

impl Content {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Rows(rows) => rows.is_empty(),
            Self::Opened { messages, .. } => *messages == 0,
        }
    }

    pub(super) fn rows(&self) -> &[Row] {
        match self {
            Self::Rows(rows) => rows,
            Self::Opened { .. } => &[],
        }
    }

    pub(super) fn messages(&self) -> u64 {
        match self {
            Self::Rows(rows) => rows.len() as u64,
            Self::Opened { messages, .. } => *messages,
        }
    }

    /// The partition and the offsets of the rows.
    fn places(&self) -> Result<(i32, Vec<i64>), Error> {
        let slice = Slice::of_rows(&self.rows().iter().collect::<Vec<_>>())?;
        Ok((slice.partition.0, slice.offsets))
    }

    /// Whether messages among them failed before.
    pub(super) fn has_failed_before(&self) -> Result<bool, Error> {
        match self {
            Self::Rows(rows) => {
                let attempts: Vec<i32> = rows.iter().map(|row| row.try_get("attempt")).collect::<Result<_, _>>()?;
                Ok(attempts.iter().any(|attempt| *attempt > 1))
            }
            Self::Opened { has_failed_before, .. } => Ok(*has_failed_before),
        }
    }
}

/// The messages of a part: their rows, where there are any.
#[derive(Clone)]
pub(super) struct Slice<'a> {
    pub(super) partition: Partition,
    pub(super) offsets: Vec<i64>,
    pub(super) rows: Vec<&'a Row>,
    is_alone: bool,
}

/// What failed, and what the transaction has no longer received because of it.
#[derive(Default)]
pub(super) struct Failed {
    pub(super) messages: u64,
    pub(super) withdrawn: BTreeSet<i64>,
}

impl Failed {
    pub(super) fn add(&mut self, part: Self) {
        self.messages += part.messages;
        self.withdrawn.extend(part.withdrawn);
    }
}

/// What became of messages that were handed over.
#[derive(Default)]
pub(super) struct Tried {
    pub(super) failed: Vec<i64>,
    /// Why, for each that failed.
    pub(super) errors: Vec<String>,
    /// What the handler has never seen.
    pub(super) untried: Vec<i64>,
    /// What no message is to blame for, and stopped the rest.
    pub(super) elsewhere: Option<Error>,
}

impl Tried {
    pub(super) fn fail(&mut self, offsets: &[i64], text: &str) {
        self.failed.extend(offsets);
        self.errors.extend(offsets.iter().map(|_| text.to_owned()));
    }
}

impl OpenBatch<'_> {
    /// Receives the batch, with its payloads.
    pub(super) async fn receive(&self) -> Result<Content, Error> {
        let rows = self
            .records
            .query_typed(
                &self.database.schema().sql(include_str!("../../sql/statements/receive_some.sql")),
                &[
                    (&self.consumer, Type::TEXT),
                    (&self.scope.messages_max, Type::INT4),
                    (&self.scope.partition, Type::INT4),
                    (&self.scope.suspects, Type::BOOL),
                    (&milliseconds(self.message_timeout), Type::TEXT),
                    (&milliseconds(self.silence_max()), Type::TEXT),
                ],
            )
            .await?;
        Ok(Content::Rows(rows))
    }

    /// Receives the batch into the relation `received`.
    pub(super) async fn open(&self) -> Result<Content, Error> {
        let schema = self.database.schema();
        let row = self
            .records
            .query_typed_one(
                &schema.sql(include_str!("../../sql/statements/open_batch.sql")),
                &[
                    (&self.consumer, Type::TEXT),
                    (&self.scope.messages_max, Type::INT4),
                    (&schema.name(), Type::TEXT),
                    (&milliseconds(self.message_timeout), Type::TEXT),
                    (&self.scope.partition, Type::INT4),
                    (&self.scope.suspects, Type::BOOL),
                    (&milliseconds(self.silence_max()), Type::TEXT),
                ],
            )
            .await?;
        let finds_received: bool = row.try_get("finds_received")?;
        if !finds_received {
            return Err(Error::new(ErrorKind::Conflict, "another relation in the search_path has the name received")
                .with_hint("Rename it, or give the role of this program a search_path without it."));
        }
        let messages: i64 = row.try_get("messages")?;
        Ok(Content::Opened { messages: messages.unsigned_abs(), has_failed_before: row.try_get("has_failed_before")? })
    }

    /// After so long without a statement the server ends the session: whoever stopped, or was cut off from the server, holds
    /// the partition no longer.
    ///
    /// A handler may be silent for its time, and is not begun after a silence of that length ([`Each`](super::effect::Each)).
    fn silence_max(&self) -> Duration {
        self.message_timeout.saturating_mul(2).saturating_add(SILENCE_MARGIN)
    }

    /// Prepares the handler's transaction, where it is not the one that receives.
    pub(super) async fn open_effects(&self) -> Result<(), Error> {
        let statement = include_str!("../../sql/statements/open_effects.sql");
        let (timeout, silence) = (milliseconds(self.message_timeout), milliseconds(self.silence_max()));
        self.effects.query_typed(statement, &[(&timeout, Type::TEXT), (&silence, Type::TEXT)]).await?;
        Ok(())
    }

    /// The same, and the number of that transaction.
    pub(super) async fn open_effects_and_number(&self) -> Result<String, Error> {
        let statement = include_str!("../../sql/statements/transaction_id.sql");
        let number = async { self.effects.query_typed_one(statement, &[]).await.map_err(Error::from) };
        // Sent one after the other, and answered together.
        let ((), row) = tokio::try_join!(self.open_effects(), number)?;
        Ok(row.try_get("transaction_id")?)
    }

    /// Notes that a handler whose transaction has that number has what was received.
    pub(super) async fn hand_over(&self, content: &Content, handler: &str) -> Result<(), Error> {
        let statement = self.database.schema().sql(include_str!("../../sql/statements/hand_over.sql"));
        let (partition, offsets) = content.places()?;
        let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
            (&self.consumer, Type::TEXT),
            (&partition, Type::INT4),
            (&offsets, Type::INT8_ARRAY),
            (&handler, Type::TEXT),
        ];
        self.records.query_typed(&statement, &parameters).await?;
        Ok(())
    }

    /// Says at the end of the handler's transaction what became of what it was handed over.
    pub(super) async fn finish_handover(&self, content: &Content, tried: &Tried) -> Result<(), Error> {
        let statement = self.database.schema().sql(include_str!("../../sql/statements/finish_handover.sql"));
        let (partition, _) = content.places()?;
        let parameters: [(&(dyn ToSql + Sync), Type); 5] = [
            (&self.consumer, Type::TEXT),
            (&partition, Type::INT4),
            (&tried.failed, Type::INT8_ARRAY),
            (&tried.errors, Type::TEXT_ARRAY),
            (&tried.untried, Type::INT8_ARRAY),
        ];
        let is_finished: bool = self.effects.query_typed_one(&statement, &parameters).await?.try_get("is_finished")?;
        if !is_finished {
            return Err(self.was_ended());
        }
        for offset in &tried.failed {
            // Not the error: it may quote the message. The dead letters have it.
            tracing::warn!(
                consumer.name = self.consumer,
                message.partition = partition,
                message.offset = offset,
                "a message failed and is dead"
            );
        }
        Ok(())
    }

    /// Takes back what was written down before, where a process may have died of it.
    pub(super) async fn clear_suspicion(&self) -> Result<(), Error> {
        let Some(partition) = self.scope.partition else { return Ok(()) };
        let statement = self.database.schema().sql(include_str!("../../sql/statements/clear_suspicion.sql"));
        self.records.query_typed(&statement, &[(&self.consumer, Type::TEXT), (&partition, Type::INT4)]).await?;
        Ok(())
    }

    /// A handler that swallowed an error left an aborted transaction, whose COMMIT would roll back and report success; one
    /// that ended the transaction itself left none. A statement tells.
    pub(super) async fn expect_open(&self) -> Result<(), Trouble> {
        self.expect_one_open(self.effects).await?;
        Ok(self.hear_of_records().await?)
    }

    /// Looks at constraints that are deferred, of a batch that is complete: COMMIT could blame no message.
    pub(super) async fn check_constraints(&self) -> Result<(), Trouble> {
        let check = self.effects.batch_execute(include_str!("../../sql/statements/check_constraints.sql"));
        check.await.map_err(|error| self.of_constraint(error))
    }

    /// What is found only when the effect of messages is complete.
    fn of_constraint(&self, error: tokio_postgres::Error) -> Trouble {
        match error.code() {
            Some(code) if code == &SqlState::IN_FAILED_SQL_TRANSACTION => or_swallowed(error),
            _ => Trouble::of_handler(self.consumer, None, error.into()),
        }
    }

    /// Where the transaction that received is another one: it is silent meanwhile, and may be so for no longer than any. Were it
    /// gone, a batch would be repeated for ever.
    async fn hear_of_records(&self) -> Result<(), Error> {
        if std::ptr::eq(self.records, self.effects) {
            return Ok(());
        }
        match self.expect_one_open(self.records).await {
            Ok(()) => Ok(()),
            Err(Trouble::Elsewhere(error)) => Err(error),
            Err(Trouble::Message(_)) => Err(self.was_ended()),
        }
    }

    async fn expect_one_open(&self, transaction: &Transaction<'_>) -> Result<(), Trouble> {
        let is_open = transaction.query_typed_one(include_str!("../../sql/statements/batch_is_open.sql"), &[]).await;
        let is_open: Option<bool> = is_open.map_err(or_swallowed)?.try_get("is_open")?;
        if is_open == Some(true) { Ok(()) } else { Err(self.was_ended().into()) }
    }

    fn was_ended(&self) -> Error {
        let message = format!("handler of consumer {:?} ended the transaction that it was given", self.consumer);
        Error::new(ErrorKind::Handler, message).with_hint(
            "It must neither commit nor roll back: what it received may be committed without the rest of its effect.",
        )
    }

    /// Runs statements, none of which can end the transaction.
    pub(super) async fn run(&self, statements: &str) -> Result<(), Error> {
        let statement = self.database.schema().sql(include_str!("../../sql/statements/apply_statements.sql"));
        self.effects.query_typed(&statement, &[(&statements, Type::TEXT)]).await?;
        Ok(())
    }

    /// Runs statements over a slice. Messages that fail by themselves are found, and failed, in the server.
    pub(super) async fn try_statements(&self, slice: &Slice<'_>, statements: &str) -> Result<Failed, Error> {
        let row = self
            .effects
            .query_typed_one(
                &self.database.schema().sql(include_str!("../../sql/statements/try_statements.sql")),
                &[
                    (&self.consumer, Type::TEXT),
                    (&slice.partition.0, Type::INT4),
                    (&slice.offsets, Type::INT8_ARRAY),
                    (&statements, Type::TEXT),
                ],
            )
            .await?;
        let failed: i32 = row.try_get("failed")?;
        if failed > 0 {
            // Not the errors: they may quote the messages. The view blocked_keys and the dead letters have them.
            tracing::warn!(
                consumer.name = self.consumer,
                message.partition = slice.partition.0,
                messages.failed = failed,
                "messages failed and are parked or dead"
            );
        }
        let withdrawn: Vec<i64> = row.try_get("withdrawn")?;
        Ok(Failed { messages: failed.unsigned_abs().into(), withdrawn: withdrawn.into_iter().collect() })
    }

    /// The batch in parts, in its order: small ones, and what failed before, and will do so again as likely as not, by
    /// itself. Of a batch whose payloads stay in the server it is the server that finds out what fails: that is one part.
    pub(super) async fn slices<'c>(&self, content: &'c Content) -> Result<Vec<Slice<'c>>, Error> {
        let mut slices: Vec<Slice<'c>> = Vec::new();
        match content {
            Content::Rows(rows) => {
                for row in rows {
                    let is_alone = row.try_get::<_, i32>("attempt")? > 1;
                    let is_full = |slice: &Slice<'_>| slice.is_alone || slice.offsets.len() >= SLICE_MESSAGES;
                    if is_alone || slices.last().is_none_or(is_full) {
                        let partition = Partition(row.try_get("partition")?);
                        slices.push(Slice { partition, offsets: Vec::new(), rows: Vec::new(), is_alone });
                    }
                    let slice = slices.last_mut().expect("there is one");
                    slice.offsets.push(row.try_get("offset")?);
                    slice.rows.push(row);
                }
            }
            Content::Opened { .. } => {
                let statement = self.database.schema().sql(include_str!("../../sql/statements/batch_offsets.sql"));
                let row = self.records.query_typed_one(&statement, &[]).await?;
                let partition = Partition(row.try_get("partition")?);
                slices.push(Slice { partition, offsets: row.try_get("offsets")?, rows: Vec::new(), is_alone: false });
            }
        }
        Ok(slices)
    }

    /// Sets a mark to which a failure goes back.
    pub(super) async fn set_savepoint(&self) -> Result<(), Error> {
        Ok(self.effects.batch_execute(include_str!("../../sql/statements/savepoint_set.sql")).await?)
    }

    /// Moves the mark behind what was done since. A message is to blame where that has aborted the transaction, or violates a
    /// constraint that is deferred.
    pub(super) async fn move_savepoint(&self) -> Result<(), Trouble> {
        let moved = self.effects.batch_execute(include_str!("../../sql/statements/savepoint_move.sql")).await;
        moved.map_err(|error| match error.code().map(SqlState::code) {
            // There is no such mark, or no transaction.
            Some("3B001" | "25P01") => self.was_ended().into(),
            _ => self.of_constraint(error),
        })?;
        Ok(self.hear_of_records().await?)
    }

    /// Goes back to the mark, which stays.
    pub(super) async fn roll_back(&self) -> Result<(), Error> {
        self.effects.batch_execute(include_str!("../../sql/statements/savepoint_roll_back.sql")).await?;
        self.hear_of_records().await
    }

    /// Fails a message that this transaction has received, after its effect was rolled back.
    pub(super) async fn fail(&self, partition: Partition, offset: i64, blame: &Blame) -> Result<Failed, Error> {
        let (retry_at, retry_after) = blame.verdict.retry();
        let row = self
            .records
            .query_typed_one(
                &self.database.schema().sql(include_str!("../../sql/statements/fail.sql")),
                &[
                    (&self.consumer, Type::TEXT),
                    (&partition.0, Type::INT4),
                    (&offset, Type::INT8),
                    (&blame.text, Type::TEXT),
                    (&(blame.verdict == Verdict::Permanent), Type::BOOL),
                    (&retry_at, Type::TIMESTAMPTZ),
                    (&retry_after.map(|wait| wait.as_secs_f64()), Type::FLOAT8),
                ],
            )
            .await?;
        let (outcome, attempts): (String, Option<i32>) = (row.try_get("outcome")?, row.try_get("attempts")?);
        // Not the error: it may quote the message. The view blocked_keys and the dead letters have it.
        tracing::warn!(
            consumer.name = self.consumer,
            message.partition = partition.0,
            message.offset = offset,
            message.attempts = attempts,
            "a message failed and is {outcome}"
        );
        let withdrawn: Vec<i64> = row.try_get("withdrawn")?;
        Ok(Failed { messages: 1, withdrawn: withdrawn.into_iter().collect() })
    }
}

impl<'a> Slice<'a> {
    /// The messages of these rows, which are of one partition.
    pub(super) fn of_rows(rows: &[&'a Row]) -> Result<Self, Error> {
        let partition = rows.first().map_or(Ok(0), |row| row.try_get("partition"))?;
        let offsets = rows.iter().map(|row| row.try_get("offset")).collect::<Result<_, _>>()?;
        Ok(Self { partition: Partition(partition), offsets, rows: rows.to_vec(), is_alone: false })
    }

    /// Without what the transaction no longer has.
    pub(super) fn without(mut self, withdrawn: &BTreeSet<i64>) -> Self {
        if !self.rows.is_empty() {
            let kept = self.offsets.iter().map(|offset| !withdrawn.contains(offset));
            self.rows = self.rows.iter().zip(kept).filter_map(|(row, is_kept)| is_kept.then_some(*row)).collect();
        }
        self.offsets.retain(|offset| !withdrawn.contains(offset));
        self
    }

    /// Smaller ones, in its order: the two halves of a small one.
    pub(super) fn parts(&self) -> Vec<Self> {
        let size = SLICE_MESSAGES.min(self.offsets.len().div_ceil(2));
        let part = |from: usize| {
            let range = from..self.offsets.len().min(from + size);
            Self {
                partition: self.partition,
                offsets: self.offsets[range.clone()].to_vec(),
                rows: self.rows.get(range).map(<[&'a Row]>::to_vec).unwrap_or_default(),
                is_alone: false,
            }
        };
        (0..self.offsets.len()).step_by(size).map(part).collect()
    }
}

/// The transaction was aborted, though the handler had nothing to complain of: a message is to blame.
fn or_swallowed(error: tokio_postgres::Error) -> Trouble {
    if error.code() != Some(&SqlState::IN_FAILED_SQL_TRANSACTION) {
        return error.into();
    }
    let text = "the handler went on after an error of the database, which had aborted its transaction".to_owned();
    Trouble::Message(Blame { culprit: None, text, verdict: Verdict::Retry })
}

/// A time as the server's settings have it, for which zero is no limit.
fn milliseconds(time: Duration) -> String {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX).max(1).to_string()
}

/// Reads a received message from its row.
pub(super) fn received<T: serde::de::DeserializeOwned>(row: &Row) -> Result<Received<T>, Trouble> {
    let message_id = MessageId::from(row.try_get::<_, String>("message_id")?);
    let offset = Offset(row.try_get("offset")?);
    let partition = Partition(row.try_get("partition")?);
    let payload: Json<&serde_json::value::RawValue> = row.try_get("payload")?;
    let payload = serde_json::from_str(payload.0.get()).map_err(|error| {
        // The error's text may quote the payload; only its place goes into messages and logs.
        let text = format!("the payload does not fit the handler, at column {}", error.column());
        Trouble::Message(Blame { culprit: Some(offset), text, verdict: Verdict::Retry })
    })?;
    let headers: Option<Json<serde_json::Map<String, serde_json::Value>>> = row.try_get("headers")?;
    let attempt: i32 = row.try_get("attempt")?;
    Ok(Received {
        partition,
        offset,
        message_id,
        key: row.try_get("key")?,
        payload,
        headers: headers.map(|headers| headers.0).unwrap_or_default(),
        enqueued_at: row.try_get("enqueued_at")?,
        attempt: attempt.unsigned_abs(),
    })
}
