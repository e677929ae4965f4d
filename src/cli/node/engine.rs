//! The database of a node: what its lines ask for, by the verbs of pgonce.
//!
//! Events go through the inbox `node`, whose state (`word_counts`, the ids, the outputs) its checkpoints hold. Messages go
//! through a topic of one partition, so that they are polled in the order of sending; what was polled or delivered is
//! recorded in a second inbox.
//!
//! Lines that only add something and stand together are one transaction; any other line is one by itself. Nothing is
//! answered before its COMMIT. A COMMIT that was not answered is looked up by its turn, under the lock, so neither is what
//! was committed done again, nor is an answer given for what was not.

use std::time::Duration;

use anyhow::Context;
use serde_json::value::RawValue;
use tokio_postgres::Transaction;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use super::protocol::{Answer, Code, Output, Refusal, Stored, Then};
use super::statements::Statements;
use crate::{
    ConsumerSettings, Database, Error, ErrorKind, Message, Producer, Session, TopicSettings, check_version,
    create_consumer, create_topic, installed, migrate,
};

/// The inbox of events.
const INBOX: &str = "node";
/// The topic of messages that are sent.
const TOPIC: &str = "node_messages";
/// The consumer of that topic.
const READER: &str = "node_reader";
/// The inbox of messages that were polled or delivered.
const DELIVERIES: &str = "node_deliveries";
/// Attempts at a transaction that others, or a lost connection, were in the way of.
const ATTEMPTS_MAX: u32 = 20;
/// The first wait between two of them; it doubles.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// The longest wait: with the attempts above, a server may be away for half a minute.
const PAUSE_MAX: Duration = Duration::from_secs(2);

type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// The tables of a node, and the way to them.
pub(super) struct Engine {
    database: Database,
    session: Option<Session>,
    statements: Statements,
    /// Names this process among those whose turns are kept.
    process: Uuid,
    turn: i64,
    /// Whether the last requests were given up since the database could not be reached.
    is_away: bool,
}

/// How a transaction ended that has no answers.
enum Failure {
    /// It was rolled back.
    Failed(Error),
    /// Somebody has emptied the tables.
    Emptied,
    /// Nobody knows: its COMMIT was not answered.
    Unknown(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl Engine {
    /// Connects, and makes what is missing; the schema of pgonce as well, where there is none. `fresh` empties the tables.
    pub(super) async fn open(database: Database, fresh: bool) -> anyhow::Result<Self> {
        let statements = Statements::of(database.schema())?;
        let mut engine = Self { database, session: None, statements, process: Uuid::now_v7(), turn: 0, is_away: false };
        let mut session = engine.database.session().await?;
        let schema = engine.database.schema();
        if installed(&*session, schema).await?.is_none() {
            migrate(&mut session, schema).await?;
        }
        check_version(&*session, schema).await?;
        session.give_back();
        let mut attempt = 1;
        while let Err(error) = engine.set_up(fresh).await {
            if error.kind() != ErrorKind::Contention || attempt == ATTEMPTS_MAX {
                return Err(error).context("cannot set up the tables of the node");
            }
            tracing::warn!(error.kind = ?error.kind(), "trying again: {error}");
            pause_after(attempt).await;
            attempt += 1;
        }
        Ok(engine)
    }

    /// Answers requests in their order.
    pub(super) async fn answer(&mut self, requests: &[&Stored]) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(requests.len());
        for unit in requests.chunk_by(|a, b| is_adding(a) && is_adding(b)) {
            let mut parts = vec![unit];
            while let Some(part) = parts.pop() {
                match self.persist(part).await {
                    Ok(several) => answers.extend(several),
                    // One of them is to blame, and is found by halves: the others have a right to their answers.
                    Err(refusal) if part.len() > 1 && refusal.is_of_request() => {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                    }
                    Err(refusal) => answers.extend(part.iter().map(|_| refusal.clone().into())),
                }
            }
        }
        answers
    }

    /// Makes a transaction of requests, again where that may help.
    async fn persist(&mut self, unit: &[&Stored]) -> Result<Vec<Answer>, Refusal> {
        let mut attempt = 1;
        loop {
            let error = match self.transact(unit).await {
                Ok(answers) => {
                    self.is_away = false;
                    return Ok(answers);
                }
                Err(Failure::Failed(error)) => error,
                Err(Failure::Emptied) => match self.set_up(false).await {
                    Ok(()) => Error::new(ErrorKind::Contention, "the tables were emptied"),
                    Err(error) => error,
                },
                Err(Failure::Unknown(error)) => {
                    tracing::error!("a COMMIT was not answered, and cannot be looked up: {error}");
                    self.is_away = error.kind() == ErrorKind::Unavailable;
                    return Err(Refusal::new(Code::Timeout, format!("it may have been committed: {error}")));
                }
            };
            let is_unavailable = error.kind() == ErrorKind::Unavailable;
            let is_transient = is_unavailable || error.kind() == ErrorKind::Contention;
            // Whoever waited for it in vain has waited for those behind as well: they try it once each.
            if !is_transient || attempt == ATTEMPTS_MAX || is_unavailable && self.is_away {
                self.is_away = is_unavailable;
                return Err(Refusal::of(&error));
            }
            tracing::warn!(error.kind = ?error.kind(), "trying again: {error}");
            pause_after(attempt).await;
            attempt += 1;
        }
    }

    async fn transact(&mut self, unit: &[&Stored]) -> Result<Vec<Answer>, Failure> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.database.session().await?,
        };
        self.turn += 1;
        let transaction = self.begin(&mut session).await?;
        if !self.lock(&transaction).await? {
            return Err(Failure::Emptied);
        }
        let turn: [Parameter; 2] = [(&self.process, Type::UUID), (&self.turn, Type::INT8)];
        if transaction.execute_typed(&self.statements.take_turn, &turn).await? != 1 {
            let message = format!("turn {} of this process is taken already", self.turn);
            return Err(Error::new(ErrorKind::Defect, message).into());
        }
        let answers = match self.apply(&transaction, unit).await {
            Ok(answers) => answers,
            Err(error) => {
                transaction.rollback().await?;
                self.session = Some(session);
                return Err(error.into());
            }
        };
        match transaction.commit().await.map_err(Error::from) {
            Ok(()) => {
                self.session = Some(session);
                Ok(answers)
            }
            Err(error) if error.kind() == ErrorKind::Unavailable => {
                drop(session);
                if self.was_committed().await? { Ok(answers) } else { Err(Failure::Failed(error)) }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A transaction that does not last where the program is stopped: others wait for its end.
    async fn begin<'a>(&self, session: &'a mut Session) -> Result<Transaction<'a>, Error> {
        let transaction = session.begin().await?;
        transaction.query_typed(include_str!("../../../sql/statements/limit_silence.sql"), &[]).await?;
        Ok(transaction)
    }

    /// Takes the lock, behind whoever has it; false where the tables were emptied.
    async fn lock(&self, transaction: &Transaction<'_>) -> Result<bool, Error> {
        Ok(!transaction.query_typed(&self.statements.lock, &[(&INBOX, Type::TEXT)]).await?.is_empty())
    }

    /// Whether the turn whose COMMIT was not answered was committed. Its backend may live on and commit, or be rolled back:
    /// the lock waits for that.
    async fn was_committed(&mut self) -> Result<bool, Failure> {
        let mut attempt = 1;
        loop {
            let error = match self.look_up().await {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            if attempt == ATTEMPTS_MAX {
                return Err(Failure::Unknown(error));
            }
            pause_after(attempt).await;
            attempt += 1;
        }
    }

    async fn look_up(&mut self) -> Result<bool, Error> {
        let mut session = self.database.session().await?;
        let transaction = self.begin(&mut session).await?;
        self.lock(&transaction).await?;
        let found = transaction.query_typed_opt(&self.statements.turn, &[(&self.process, Type::UUID)]).await?;
        transaction.rollback().await?;
        self.session = Some(session);
        let turn: Option<i64> = found.map(|row| row.try_get("turn")).transpose()?;
        Ok(turn == Some(self.turn))
    }

    /// Makes tables, topic and consumers, where they are missing; with `fresh` after it has dropped what was there.
    async fn set_up(&mut self, fresh: bool) -> Result<(), Error> {
        let mut session = self.database.session().await?;
        let transaction = self.begin(&mut session).await?;
        transaction.batch_execute(&self.statements.install).await?;
        if fresh {
            for consumer in [INBOX, READER, DELIVERIES] {
                transaction.query_typed(&self.statements.drop_consumer, &[(&consumer, Type::TEXT)]).await?;
            }
            transaction.query_typed(&self.statements.drop_topic, &[(&TOPIC, Type::TEXT)]).await?;
            transaction.query_typed(&self.statements.empty_outputs, &[]).await?;
        }
        let schema = self.database.schema();
        let one = TopicSettings { partitions: Some(1), ..TopicSettings::default() };
        create_topic(&transaction, schema, TOPIC, one).await?;
        for (consumer, topic) in [(INBOX, None), (READER, Some(TOPIC)), (DELIVERIES, None)] {
            create_consumer(&transaction, schema, consumer, topic, ConsumerSettings::default()).await?;
        }
        let tables: &[&str] = &[&self.statements.outputs_table];
        let state: [Parameter; 2] = [(&INBOX, Type::TEXT), (&tables, Type::TEXT_ARRAY)];
        transaction.query_typed(&self.statements.set_state, &state).await?;
        transaction.commit().await?;
        self.session = Some(session);
        Ok(())
    }

    async fn apply(&self, transaction: &Transaction<'_>, unit: &[&Stored]) -> Result<Vec<Answer>, Error> {
        let mut answers = Vec::with_capacity(unit.len());
        for alike in unit.chunk_by(|a, b| std::mem::discriminant(*a) == std::mem::discriminant(*b)) {
            match alike[0] {
                Stored::Process { .. } => self.process(transaction, alike, &mut answers).await?,
                Stored::Send { .. } => self.send(transaction, alike, &mut answers).await?,
                Stored::Deliver(_) => self.deliver(transaction, alike, &mut answers).await?,
                Stored::Checkpoint(id) => answers.push(self.checkpoint(transaction, id).await?),
                Stored::Restore(id) => answers.push(self.restore(transaction, id).await?),
                Stored::Commit => {
                    let output_count = transaction.execute_typed(&self.statements.commit, &[]).await?;
                    answers.push(Answer::Committed { output_count });
                }
                Stored::Rollback => {
                    let output_count = transaction.execute_typed(&self.statements.rollback, &[]).await?;
                    answers.push(Answer::RolledBack { output_count });
                }
                Stored::Outputs => answers.push(self.outputs(transaction).await?),
                Stored::Poll { max } => answers.push(self.poll(transaction, *max).await?),
            }
        }
        if answers.len() != unit.len() {
            let message = format!("{} answers to {} requests", answers.len(), unit.len());
            return Err(Error::new(ErrorKind::Defect, message));
        }
        Ok(answers)
    }

    async fn process(
        &self,
        transaction: &Transaction<'_>,
        events: &[&Stored],
        answers: &mut Vec<Answer>,
    ) -> Result<(), Error> {
        let (mut ids, mut words) = (Vec::new(), Vec::new());
        for event in events {
            if let Stored::Process { event_id, word } = event {
                ids.push(event_id);
                words.push(word);
            }
        }
        let parameters: [Parameter; 3] = [(&INBOX, Type::TEXT), (&ids, Type::TEXT_ARRAY), (&words, Type::TEXT_ARRAY)];
        let rows = transaction.query_typed(&self.statements.process, &parameters).await?;
        for (row, word) in rows.iter().zip(words) {
            answers.push(Answer::Processed {
                word: word.clone(),
                count: row.try_get("count")?,
                was_duplicate: row.try_get("was_duplicate")?,
            });
        }
        Ok(())
    }

    async fn send(
        &self,
        transaction: &Transaction<'_>,
        requests: &[&Stored],
        answers: &mut Vec<Answer>,
    ) -> Result<(), Error> {
        let (mut messages, mut wishes): (Vec<Message>, _) = (Vec::new(), Vec::new());
        for request in requests {
            if let Stored::Send { id, message, then } = request {
                messages.push(message.clone());
                wishes.push((id.clone(), *then));
            }
        }
        let producer = Producer::in_schema(TOPIC, self.database.schema());
        let sent = producer.send_all(transaction, &messages).await?;
        answers.extend(sent.iter().zip(wishes).map(|(sent, (message_id, then))| match then {
            Then::Sent if sent.was_duplicate => Answer::DuplicateDetected { message_id, action: "rejected" },
            Then::Sent => Answer::Sent { message_id },
            Then::Ack => Answer::Ack { message_id },
            Then::AckLost => Answer::AckLost { message_id, action: "retry" },
        }));
        Ok(())
    }

    async fn deliver(
        &self,
        transaction: &Transaction<'_>,
        requests: &[&Stored],
        answers: &mut Vec<Answer>,
    ) -> Result<(), Error> {
        let ids: Vec<&String> = requests
            .iter()
            .filter_map(|request| if let Stored::Deliver(id) = request { Some(id) } else { None })
            .collect();
        let parameters: [Parameter; 2] = [(&DELIVERIES, Type::TEXT), (&ids, Type::TEXT_ARRAY)];
        let rows = transaction.query_typed(&self.statements.deliver, &parameters).await?;
        for (row, id) in rows.iter().zip(ids) {
            let was_duplicate = row.try_get("was_duplicate")?;
            answers.push(Answer::Delivered { message_id: id.clone(), was_duplicate });
        }
        Ok(())
    }

    /// Hands out the next messages that were not delivered yet, up to `max`.
    async fn poll(&self, transaction: &Transaction<'_>, max: i32) -> Result<Answer, Error> {
        let relay: [Parameter; 2] = [(&TOPIC, Type::TEXT), (&max, Type::INT4)];
        let receive: [Parameter; 3] = [(&READER, Type::TEXT), (&max, Type::INT4), (&DELIVERIES, Type::TEXT)];
        let mut messages: Vec<Box<RawValue>> = Vec::new();
        transaction.query_typed(&self.statements.lock_topic, &[(&TOPIC, Type::TEXT)]).await?;
        // Each round passes what it receives, so they end.
        loop {
            transaction.query_typed(&self.statements.relay, &relay).await?;
            let rows = transaction.query_typed(&self.statements.poll, &receive).await?;
            for row in &rows {
                if !row.try_get::<_, bool>("was_duplicate")? {
                    let text: String = row.try_get("message")?;
                    messages.push(RawValue::from_string(text).map_err(|error| {
                        Error::new(ErrorKind::Payload, format!("a message is not JSON: {error}")).with_source(error)
                    })?);
                }
            }
            if rows.is_empty() || !messages.is_empty() {
                break;
            }
        }
        let row = transaction.query_typed_one(&self.statements.offset, &[(&READER, Type::TEXT)]).await?;
        Ok(Answer::Polled { messages, offset: row.try_get("passed")? })
    }

    async fn checkpoint(&self, transaction: &Transaction<'_>, id: &str) -> Result<Answer, Error> {
        let parameters: [Parameter; 2] = [(&INBOX, Type::TEXT), (&id, Type::TEXT)];
        transaction.query_typed(&self.statements.forget_checkpoint, &parameters).await?;
        transaction.query_typed(&self.statements.checkpoint, &parameters).await?;
        Ok(Answer::CheckpointSaved { checkpoint_id: id.to_owned() })
    }

    async fn restore(&self, transaction: &Transaction<'_>, id: &str) -> Result<Answer, Error> {
        let parameters: [Parameter; 2] = [(&INBOX, Type::TEXT), (&id, Type::TEXT)];
        transaction.query_typed(&self.statements.restore, &parameters).await?;
        let rows = transaction.query_typed(&self.statements.word_counts, &[(&INBOX, Type::TEXT)]).await?;
        let counts = rows.iter().map(|row| Ok((row.try_get("word")?, row.try_get("count")?)));
        Ok(Answer::Restored { counts: counts.collect::<Result<_, Error>>()? })
    }

    async fn outputs(&self, transaction: &Transaction<'_>) -> Result<Answer, Error> {
        let rows = transaction.query_typed(&self.statements.outputs, &[]).await?;
        let outputs = rows.iter().map(|row| {
            Ok(Output { event_id: row.try_get("event_id")?, word: row.try_get("word")?, count: row.try_get("count")? })
        });
        Ok(Answer::OutputsOk { outputs: outputs.collect::<Result<_, Error>>()? })
    }
}

/// Waits before the next of several attempts.
async fn pause_after(attempt: u32) {
    tokio::time::sleep(PAUSE_MIN.saturating_mul(2_u32.saturating_pow(attempt - 1)).min(PAUSE_MAX)).await;
}

/// Whether a request may share its transaction with others like it.
pub(super) fn is_adding(request: &Stored) -> bool {
    matches!(request, Stored::Process { .. } | Stored::Send { .. } | Stored::Deliver(_))
}
