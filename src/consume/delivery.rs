//! Delivery modes: which of record and effect commits first, where they are not one transaction.
//!
//! * Exactly once: there is one transaction (`mod.rs`).
//! * At least once: the handler's transaction commits, then the one that received. In between a crash, or a COMMIT whose
//!   answer is lost, repeats the batch. The second one holds the offset lock all the while, so nobody else is at it.
//! * At most once: the transaction that received commits, then the handler acts in the other one. What that has not
//!   committed becomes dead letters, whatever it was that ended it (`sql/routines/handover.sql`).

use std::sync::atomic::Ordering;

use tokio_postgres::types::Type;
use tokio_postgres::{Row, Transaction};

use super::batch::{Content, OpenBatch, Scope, Slice, Tried};
use super::effect::Effect;
use super::failure::Trouble;
use super::{Consumed, Consumer};
use crate::database::Database;
use crate::error::{Error, ErrorKind};

/// How often the effect of a message happens, when processes and connections die at any moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// Once: the handler's statements are in the transaction that records the message as processed.
    #[default]
    ExactlyOnce,
    /// Once or more: the handler's transaction commits, and then another one records. A crash in between repeats a batch at
    /// the most. A step needs two connections.
    AtLeastOnce,
    /// Once or not at all: what is recorded commits first, whatever `synchronous_commit` says at least on the server's disk;
    /// then the handler is called, once, in a READ COMMITTED transaction of its own. For effects that must rather be lost
    /// than repeated. A step needs two connections.
    ///
    /// What fails is not tried again, whatever the consumer's settings say; it becomes a dead letter at once, and so does all
    /// that was at hand when a process dies. With [`Consumer::each`] an error undoes and gives up one message, with
    /// [`Consumer::batch`] all that the handler was given.
    /// [`batch_messages`](Consumer::batch_messages) says how many can be at hand. A dead letter of such a consumer
    /// may have had an effect outside of the database: a replay is the operator's decision to try it once more.
    AtMostOnce,
}

impl Delivery {
    /// Its name, as in the documents.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ExactlyOnce => "exactly_once",
            Self::AtLeastOnce => "at_least_once",
            Self::AtMostOnce => "at_most_once",
        }
    }

    /// Connections that a step needs at the same time.
    pub(super) fn connections(self) -> usize {
        match self {
            Self::ExactlyOnce => 1,
            Self::AtLeastOnce | Self::AtMostOnce => 2,
        }
    }
}

impl Consumer {
    pub(super) async fn step_at_least_once(
        &self,
        effect: &dyn Effect,
        database: &Database,
        scope: Scope,
        is_careful: bool,
    ) -> Result<Consumed, Trouble> {
        let (mut recording, mut handling) = database.session_pair().await?;
        let (records, effects) = tokio::try_join!(recording.begin(), handling.begin())?;
        let outcome = {
            let batch = self.open_batch(database, scope, &records, &effects);
            self.receive_and_apply(effect, &batch, is_careful).await
        };
        match outcome {
            Ok(consumed) => {
                effects.commit().await?;
                // Whatever ends the process here, or the connection, repeats the batch.
                records.commit().await?;
                recording.give_back();
                handling.give_back();
                Ok(consumed)
            }
            Err(trouble) => {
                if matches!(trouble, Trouble::Message(_)) {
                    tokio::try_join!(effects.rollback(), records.rollback())?;
                    recording.give_back();
                    handling.give_back();
                }
                Err(trouble)
            }
        }
    }

    pub(super) async fn step_at_most_once(
        &self,
        effect: &dyn Effect,
        database: &Database,
        scope: Scope,
    ) -> Result<Consumed, Error> {
        let (mut recording, mut handling) = database.session_pair().await?;
        let effects = handling.begin().await?;
        let records = recording.begin().await?;
        let content = self.receive_and_hand_over(effect, &self.open_batch(database, scope, &records, &effects)).await?;
        records.commit().await?;
        recording.give_back();
        let mut consumed = Consumed::default();
        let mut elsewhere = None;
        if content.is_empty() {
            effects.rollback().await?;
        } else {
            let batch = self.open_batch(database, scope, &effects, &effects);
            let tried = self.try_once(effect, &batch, &content).await?;
            batch.finish_handover(&content, &tried).await?;
            effects.commit().await?;
            consumed.failed = tried.failed.len() as u64;
            consumed.applied = content.messages() - consumed.failed - tried.untried.len() as u64;
            elsewhere = tried.elsewhere;
        }
        handling.give_back();
        elsewhere.map_or(Ok(consumed), Err)
    }

    /// Receives, and notes that the handler's transaction has it from here on.
    async fn receive_and_hand_over(&self, effect: &dyn Effect, batch: &OpenBatch<'_>) -> Result<Content, Error> {
        // The number of the one transaction is to be lower than that of the other (`sql/routines/handover.sql`).
        let handler = batch.open_effects_and_number().await?;
        let content = effect.receive(batch).await?;
        if !content.is_empty() {
            batch.hand_over(&content, &handler).await?;
        }
        batch.clear_suspicion().await?;
        Ok(content)
    }

    /// Calls the handler, once for each message, or once for all.
    async fn try_once(&self, effect: &dyn Effect, batch: &OpenBatch<'_>, content: &Content) -> Result<Tried, Error> {
        let rows: Vec<&Row> = content.rows().iter().collect();
        let chunks = rows.chunks(effect.messages_per_call().unwrap_or(1));
        let mut parts = chunks.rev().map(Slice::of_rows).collect::<Result<Vec<_>, _>>()?;
        let mut tried = Tried::default();
        batch.set_savepoint().await?;
        while let Some(part) = parts.pop() {
            let outcome = match effect.apply_slice(batch, &part).await {
                // Fails where the handler has swallowed an error.
                Ok(_) => batch.move_savepoint().await,
                Err(trouble) => Err(trouble),
            };
            let Err(trouble) = outcome else { continue };
            if let Err(error) = batch.roll_back().await {
                // What came first says more.
                return Err(if let Trouble::Elsewhere(first) = trouble { first } else { error });
            }
            match trouble {
                // A handler of a batch has seen none of it where a message is named: it could not be read.
                Trouble::Message(blame) => {
                    let failed = blame.culprit.map_or_else(|| part.offsets.clone(), |culprit| vec![culprit.0]);
                    let rest = part.without(&failed.iter().copied().collect());
                    tried.fail(&failed, &blame.text);
                    parts.extend((!rest.offsets.is_empty()).then_some(rest));
                }
                Trouble::Elsewhere(error) => {
                    tried.fail(&part.offsets, &error.to_string());
                    tried.untried = parts.iter().rev().flat_map(|part| part.offsets.iter().copied()).collect();
                    tried.elsewhere = Some(error);
                    break;
                }
            }
        }
        Ok(tried)
    }

    pub(super) fn open_batch<'a>(
        &'a self,
        database: &'a Database,
        scope: Scope,
        records: &'a Transaction<'a>,
        effects: &'a Transaction<'a>,
    ) -> OpenBatch<'a> {
        OpenBatch {
            consumer: &self.name,
            database,
            records,
            effects,
            scope,
            message_timeout: self.message_timeout,
            times: &self.times,
        }
    }

    /// Writes the mode down before a step, for those who look whether an installation keeps all promises: exactly once when
    /// it begins, and a weaker one each time, so that it stands there whoever else runs the consumer.
    pub(super) async fn declare_delivery(&self, database: &Database) -> Result<(), Error> {
        if self.delivery == Delivery::ExactlyOnce && self.is_declared.load(Ordering::Relaxed) {
            return Ok(());
        }
        let session = database.session().await?;
        let statement = database.schema().sql(include_str!("../../sql/statements/set_delivery.sql"));
        let mode = self.delivery.name();
        let row = session.run_one(&statement, &[(&self.name, Type::TEXT), (&mode, Type::TEXT)]).await?;
        session.give_back();
        self.is_declared.store(row.try_get("is_written")?, Ordering::Relaxed);
        Ok(())
    }

    /// Refuses a delivery mode that its kind cannot have.
    pub(crate) fn check_delivery(&self) -> Result<(), Error> {
        let effect = match &self.effect {
            super::Place::Transaction(effect) => effect,
            super::Place::Outside(_) => {
                return match self.delivery {
                    Delivery::ExactlyOnce => Ok(()),
                    mode => Err(self.refused(
                        mode,
                        "is external",
                        "Its effects are at least once, as all outside of the database.",
                    )),
                };
            }
        };
        if self.delivery == Delivery::ExactlyOnce || effect.messages_per_call().is_some() {
            return Ok(());
        }
        Err(self.refused(
            self.delivery,
            "is of SQL",
            "Its statements are exactly once. A Handler or a BatchHandler can have another mode.",
        ))
    }

    fn refused(&self, mode: Delivery, what: &str, hint: &str) -> Error {
        Error::new(ErrorKind::Invalid, format!("delivery {} of consumer {:?}, which {what}", mode.name(), self.name))
            .with_hint(hint)
    }
}
