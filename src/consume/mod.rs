//! Consuming: the next messages of a queue, and what a handler makes of them, in one transaction.
//!
//! A step receives (which records the ids and moves the offset), runs the handler on the same transaction, and commits:
//! dedup record, effect and offset exist together or not at all. Whatever goes wrong, and wherever the process dies, the
//! transaction is rolled back and the messages come again. (Other delivery modes have two transactions: `delivery.rs`.)
//!
//! The handler's statements run after the one that received, each with a snapshot of its own, so they see all that the
//! batch before has written.

mod batch;
mod call;
mod delivery;
mod effect;
mod external;
mod failure;
mod handler;
mod handler_times;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::database::Database;
use crate::error::{Error, ErrorKind};
use crate::lease::Holder;

use batch::{Content, Failed, OpenBatch, Scope};
pub use delivery::Delivery;
use effect::Effect;
use external::External;
pub use external::ExternalHandler;
pub use failure::Failure;
use failure::Trouble;
pub use handler::{BatchHandler, Handler, HandlerError};
use handler_times::{HandlerTimes, Taken};

/// Messages that a step receives at the most, where nothing else is said.
const BATCH_MESSAGES: i32 = 1_000;
/// Messages that a step of an external consumer looks at, where nothing else is said.
const EXTERNAL_BATCH_MESSAGES: i32 = 100;
/// How long a message may take, where nothing else is said.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to take back what was written down under suspicion.
const CLEAR_MAX: Duration = Duration::from_secs(2);
/// Steps without a failure after which batches are applied whole again.
const CAREFUL_STEPS: u32 = 8;

/// The stage that consumes a topic under one name.
///
/// Any number of steps may run at once, here or on other machines: each takes a partition that nobody is at.
pub struct Consumer {
    name: String,
    effect: Place,
    batch_messages: i32,
    message_timeout: Duration,
    delivery: Delivery,
    /// Whether the database has been told of the delivery mode.
    is_declared: AtomicBool,
    schedule: Option<Schedule>,
    /// How many steps are still to be careful, since a message failed.
    caution: AtomicU32,
    times: HandlerTimes,
}

/// Where the effect of a consumer is.
enum Place {
    /// In the transaction that receives.
    Transaction(Box<dyn Effect>),
    /// Outside of the database, under a lease.
    Outside(Box<External>),
}

/// How often a consumer is saved, and how many of these checkpoints stay.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) every: Duration,
    pub(crate) keep: i32,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consumed {
    /// Messages whose effect was applied.
    pub applied: u64,
    /// Messages that failed, and are parked or have become dead letters.
    pub failed: u64,
}

impl Consumer {
    /// A consumer whose handler takes one message at a time.
    #[must_use]
    pub fn each<H: Handler>(name: impl Into<String>, handler: H) -> Self {
        Self::with_effect(name, effect::Each(handler))
    }

    /// A consumer whose handler takes a batch at a time.
    #[must_use]
    pub fn batch<H: BatchHandler>(name: impl Into<String>, handler: H) -> Self {
        Self::with_effect(name, effect::Batch(handler))
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
        Self::with_effect(name, effect::Sql(statements.into()))
    }

    /// The built-in consumer: counts words into the table `word_counts`. Payloads are `{"word": …}`.
    #[must_use]
    pub fn word_count(name: impl Into<String>) -> Self {
        Self::sql(name, include_str!("../../sql/word_count.sql"))
    }

    /// The built-in consumer that sends on: splits documents into words, for a word count behind it. Payloads are
    /// `{"text": …}`; each word becomes a message `{"word": …}` of the topic `words`, which has to exist, by `pgonce.emit`.
    #[must_use]
    pub fn split_words(name: impl Into<String>) -> Self {
        Self::sql(name, include_str!("../../sql/split_words.sql"))
    }

    /// A consumer whose effect is outside of this database: at least once, with the message id as the idempotency key. It
    /// must have been created as such ([`ConsumerKind`](crate::ConsumerKind)).
    #[must_use]
    pub fn external<H: ExternalHandler>(name: impl Into<String>, handler: H) -> Self {
        let outside = Place::Outside(Box::new(External::new(handler)));
        Self::with_place(name, outside).batch_messages(EXTERNAL_BATCH_MESSAGES)
    }

    fn with_effect(name: impl Into<String>, effect: impl Effect + 'static) -> Self {
        Self::with_place(name, Place::Transaction(Box::new(effect)))
    }

    fn with_place(name: impl Into<String>, effect: Place) -> Self {
        Self {
            name: name.into(),
            effect,
            batch_messages: BATCH_MESSAGES,
            message_timeout: MESSAGE_TIMEOUT,
            delivery: Delivery::default(),
            is_declared: AtomicBool::new(false),
            schedule: None,
            caution: AtomicU32::new(0),
            times: HandlerTimes::new(),
        }
    }

    /// Receives up to this many messages in a step, 1 to 10,000; 1,000 where nothing is said, 100 for an external consumer.
    #[must_use]
    pub fn batch_messages(mut self, messages: i32) -> Self {
        self.batch_messages = messages;
        self
    }

    /// Lets a [`Worker`](crate::Worker) save the consumer by itself (`pgonce.checkpoint`): so often, by the database's clock
    /// and over all workers of this consumer, and so that 1 to 1000 of these checkpoints stay. A second is the least.
    #[must_use]
    pub fn checkpoint_every(mut self, every: Duration, keep: i32) -> Self {
        self.schedule = Some(Schedule { every, keep });
        self
    }

    /// How long a handler may take for a message, and all statements of SQL together for a batch; 30 s where nothing is said. After
    /// twice that and 5 s without a word from this process, as where it was stopped, the server gives its batch to others.
    #[must_use]
    pub fn message_timeout(mut self, longest: Duration) -> Self {
        self.message_timeout = longest;
        self
    }

    /// How often the effect of a message happens, when processes die; exactly once where nothing is said. Only handlers of
    /// single messages and of batches can have another mode; a step of any other consumer fails then, and a
    /// [`Worker`](crate::Worker) does not start.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// How long an external consumer keeps a partition without a word: so long others leave it alone. 30 s where nothing
    /// is said. It is renewed in time, also while a handler is at work.
    #[must_use]
    pub fn lease(mut self, longest: Duration) -> Self {
        if let Place::Outside(external) = &mut self.effect {
            external.lease = longest;
        }
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Applies what is there in one partition, up to a batch of messages or 8 MiB. Dropping the future is safe: the
    /// batch either committed or did not ([at most once](Delivery::AtMostOnce), what was at hand becomes dead letters).
    ///
    /// Where a message fails, the batch is applied once more, in parts: what fails by itself is parked or becomes a
    /// dead letter, all else is applied. So are the next few batches, since failures seldom come alone.
    ///
    /// # Errors
    ///
    /// What no message is to blame for: [`UnknownConsumer`](ErrorKind::UnknownConsumer),
    /// [`WrongConsumer`](ErrorKind::WrongConsumer); [`Handler`](ErrorKind::Handler) if the handler ended its transaction;
    /// errors of the database. The messages come again, unless they are delivered [at most once](Delivery::AtMostOnce); where
    /// the answer to COMMIT was lost, only if it was not committed.
    /// [`Invalid`](ErrorKind::Invalid) for a delivery mode that the consumer cannot have.
    pub async fn step(&self, database: &Database) -> Result<Consumed, Error> {
        self.check_delivery()?;
        match &self.effect {
            Place::Transaction(effect) => self.step_in(&**effect, database, self.anywhere(true)).await,
            Place::Outside(external) => self.step_outside(external, database, external.member).await,
        }
    }

    /// The same for a member, which leaves to [`step_under_suspicion`](Self::step_under_suspicion) what may kill it.
    pub(crate) async fn step_of_member(&self, database: &Database, member: Uuid) -> Result<Consumed, Error> {
        match &self.effect {
            Place::Transaction(effect) => self.step_in(&**effect, database, self.anywhere(false)).await,
            Place::Outside(external) => self.step_outside(external, database, member).await,
        }
    }

    /// Gives back the partitions of an external consumer that no step is at.
    pub(crate) async fn release(&self, database: &Database, member: Uuid) -> Result<(), Error> {
        match &self.effect {
            Place::Transaction(_) => Ok(()),
            Place::Outside(external) => external.release(self.holder(external, database, member)).await,
        }
    }

    /// What the calls of its handler took since this was last asked.
    pub(crate) fn take_handler_times(&self) -> Taken {
        self.times.take()
    }

    /// How long a call of its handler may take. Under a lease that is renewed meanwhile, but not by a process that stalls.
    pub(crate) fn handler_limit(&self) -> Duration {
        match &self.effect {
            Place::Transaction(_) => self.message_timeout,
            Place::Outside(external) => self.message_timeout.min(external.lease),
        }
    }

    /// When a worker is to save it.
    pub(crate) fn schedule(&self) -> Option<Schedule> {
        self.schedule
    }

    /// Connections that a step needs at the same time.
    pub(crate) fn connections(&self) -> usize {
        self.delivery.connections()
    }

    /// Whether its effect is outside of the database.
    pub(crate) fn is_external(&self) -> bool {
        matches!(self.effect, Place::Outside(_))
    }

    fn anywhere(&self, suspects: bool) -> Scope {
        Scope { partition: None, messages_max: self.batch_messages, suspects }
    }

    async fn step_outside(&self, external: &External, database: &Database, member: Uuid) -> Result<Consumed, Error> {
        let limits = external::Limits {
            consumer: &self.name,
            batch_messages: self.batch_messages,
            message_timeout: self.message_timeout,
            times: &self.times,
        };
        external.step(self.holder(external, database, member), limits).await
    }

    fn holder<'a>(&'a self, external: &External, database: &'a Database, member: Uuid) -> Holder<'a> {
        Holder { database, consumer: &self.name, member, lease_ms: external.lease_ms() }
    }

    /// Tries what a process may have died of, a range that is written down first. Nothing where there is none to try.
    pub(crate) async fn step_under_suspicion(
        &self,
        database: &Database,
        member: Uuid,
    ) -> Result<Option<Consumed>, Error> {
        // Of an external one it is the leases that tell (`sql/routines/lease.sql`).
        let Place::Transaction(effect) = &self.effect else { return Ok(None) };
        let session = database.session().await?;
        let statement = database.schema().sql(include_str!("../../sql/statements/take_suspicion.sql"));
        let range = session.run(&statement, &[(&self.name, Type::TEXT), (&member, Type::UUID)]).await?;
        session.give_back();
        let Some(range) = range.first() else {
            return Ok(None);
        };
        let messages: i32 = range.try_get("messages")?;
        let scope = Scope {
            partition: Some(range.try_get("partition")?),
            messages_max: match self.delivery {
                Delivery::ExactlyOnce | Delivery::AtLeastOnce => messages.min(self.batch_messages),
                // What it dies of does not come again. Nothing is to die with it.
                Delivery::AtMostOnce => 1,
            },
            suspects: range.try_get("is_suspect")?,
        };
        let outcome = self.step_in(&**effect, database, scope).await;
        if let (Err(_), Some(partition)) = (&outcome, scope.partition) {
            // Where this fails as well, what was written down stands until the next attempt.
            let _ = tokio::time::timeout(CLEAR_MAX, self.clear_suspicion(database, partition)).await;
        }
        outcome.map(Some)
    }

    /// It lives: should it die before the next attempt, then not of what it has tried.
    async fn clear_suspicion(&self, database: &Database, partition: i32) -> Result<(), Error> {
        let session = database.session().await?;
        let statement = database.schema().sql(include_str!("../../sql/statements/clear_suspicion.sql"));
        session.run(&statement, &[(&self.name, Type::TEXT), (&partition, Type::INT4)]).await?;
        session.give_back();
        Ok(())
    }

    async fn step_in(&self, effect: &dyn Effect, database: &Database, scope: Scope) -> Result<Consumed, Error> {
        self.declare_delivery(database).await?;
        if self.delivery == Delivery::AtMostOnce {
            return self.step_at_most_once(effect, database, scope).await;
        }
        let is_careful = self.caution.load(Ordering::Relaxed) > 0;
        let mut outcome = self.step_once(effect, database, scope, is_careful).await;
        if matches!(outcome, Err(Trouble::Message(_))) {
            self.caution.store(CAREFUL_STEPS, Ordering::Relaxed);
            outcome = self.step_once(effect, database, scope, true).await;
        } else if is_careful && outcome.as_ref().is_ok_and(|consumed| consumed.applied > 0 || consumed.failed > 0) {
            let clean = outcome.as_ref().is_ok_and(|consumed| consumed.failed == 0);
            let steps = if clean { self.caution.load(Ordering::Relaxed).saturating_sub(1) } else { CAREFUL_STEPS };
            self.caution.store(steps, Ordering::Relaxed);
        }
        outcome.map_err(|trouble| match trouble {
            Trouble::Elsewhere(error) => error,
            Trouble::Message(blame) => Error::new(ErrorKind::Defect, "a message failed, and not alone")
                .with_source(std::io::Error::other(blame.text)),
        })
    }

    async fn step_once(
        &self,
        effect: &dyn Effect,
        database: &Database,
        scope: Scope,
        is_careful: bool,
    ) -> Result<Consumed, Trouble> {
        if self.delivery == Delivery::AtLeastOnce {
            return self.step_at_least_once(effect, database, scope, is_careful).await;
        }
        let mut session = database.session().await?;
        let transaction = session.begin().await?;
        let batch = self.open_batch(database, scope, &transaction, &transaction);
        let outcome = self.receive_and_apply(effect, &batch, is_careful).await;
        match outcome {
            // Also without messages: a batch of nothing but duplicates has moved the offset.
            Ok(_) => transaction.commit().await?,
            Err(Trouble::Message(_)) => transaction.rollback().await?,
            Err(Trouble::Elsewhere(_)) => return outcome,
        }
        session.give_back();
        outcome
    }

    /// Receives a batch, and applies it whole or, if carefully, in parts.
    async fn receive_and_apply(
        &self,
        effect: &dyn Effect,
        batch: &OpenBatch<'_>,
        is_careful: bool,
    ) -> Result<Consumed, Trouble> {
        let content = effect.receive(batch).await?;
        let mut consumed = Consumed { applied: content.messages(), failed: 0 };
        if !content.is_empty() {
            if self.delivery == Delivery::AtLeastOnce {
                // After receive: whatever the isolation level, it sees what the batch before has written.
                batch.open_effects().await?;
            }
            if is_careful || content.has_failed_before()? {
                let failed = self.apply_in_slices(effect, batch, &content).await?;
                consumed.applied -= failed.withdrawn.len() as u64;
                consumed.failed = failed.messages;
            } else {
                effect.apply(batch, &content).await?;
                batch.check_constraints().await?;
            }
            batch.expect_open().await?;
        }
        batch.clear_suspicion().await?;
        Ok(consumed)
    }

    /// Applies a batch in parts, each behind a savepoint, so that what fails takes nothing else along.
    async fn apply_in_slices(
        &self,
        effect: &dyn Effect,
        batch: &OpenBatch<'_>,
        content: &Content,
    ) -> Result<Failed, Trouble> {
        let mut failed = Failed::default();
        let mut slices = batch.slices(content).await?;
        slices.reverse();
        batch.set_savepoint().await?;
        while let Some(slice) = slices.pop() {
            let slice = slice.without(&failed.withdrawn);
            if slice.offsets.is_empty() {
                continue;
            }
            let outcome = match effect.apply_slice(batch, &slice).await {
                // Fails where the handler has swallowed an error.
                Ok(part) => batch.move_savepoint().await.map(|()| part),
                Err(trouble) => Err(trouble),
            };
            match outcome {
                Ok(part) => failed.add(part),
                Err(Trouble::Message(blame)) => {
                    let alone = slice.offsets.first().copied().filter(|_| slice.offsets.len() == 1);
                    if let Some(offset) = blame.culprit.map(|offset| offset.0).or(alone) {
                        // Sent one after the other, and answered together.
                        let ((), part) =
                            tokio::try_join!(batch.roll_back(), batch.fail(slice.partition, offset, &blame))?;
                        if !part.withdrawn.contains(&offset) {
                            let message =
                                format!("offset {offset} of consumer {:?} failed, and is still received", self.name);
                            return Err(Error::new(ErrorKind::Defect, message).into());
                        }
                        failed.add(part);
                        batch.move_savepoint().await?;
                        slices.push(slice);
                    } else {
                        batch.roll_back().await?;
                        slices.extend(slice.parts().into_iter().rev());
                    }
                }
                Err(elsewhere) => return Err(elsewhere),
            }
        }
        Ok(failed)
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
