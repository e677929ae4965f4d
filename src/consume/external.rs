//! External effects: a handler that acts outside of the database, under a lease, at least once.
//!
//! Invariants: no transaction is open while the handler is at work. What it did is acknowledged afterwards, so a process
//! that dies, stalls beyond its lease or loses the answer repeats messages, with their ids, and never loses one. Messages of
//! a key are handled one after the other. After a failure the rest of what was handed out is dropped and asked for anew,
//! since some of it may have to wait now; so nothing here knows the failure policies.
//!
//! The loops of a consumer share the leases of their process: each takes a partition that none of the others is at.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::Row;
use uuid::Uuid;

use super::Consumed;
use super::batch::received;
use super::call::{BoxFuture, bounded};
use super::failure::{Blame, Trouble, Verdict};
use super::handler::HandlerError;
use super::handler_times::HandlerTimes;
use crate::error::Error;
use crate::lease::{Epoch, Holder, Lease, Outcome};
use crate::message::{Offset, Partition, Received};

/// How long a lease lasts, where nothing else is said.
pub(super) const LEASE: Duration = Duration::from_secs(30);
/// Longest time until a lease is renewed: by then its holder hears that it holds too many.
const RENEW_EVERY_MAX: Duration = Duration::from_secs(2);
/// How often a consumer looks for partitions that are free.
const ACQUIRE_EVERY: Duration = Duration::from_secs(1);
/// How long a step goes on with the messages that it has, so that they are acknowledged now and then.
const STEP_MAX: Duration = Duration::from_secs(1);

/// Handles messages by acting outside of the database: a call of another service, a mail, a device.
///
/// ```
/// use pgonce::{Epoch, ExternalHandler, HandlerError, Received};
///
/// #[derive(serde::Deserialize)]
/// struct OrderPlaced {
///     order: i64,
/// }
///
/// struct Payments;
///
/// impl ExternalHandler for Payments {
///     type Payload = OrderPlaced;
///
///     async fn handle(&self, message: Received<OrderPlaced>, _: Epoch) -> Result<(), HandlerError> {
///         charge(message.payload.order, message.message_id.as_str()).await
///     }
/// }
/// # async fn charge(_: i64, _idempotency_key: &str) -> Result<(), HandlerError> { Ok(()) }
/// ```
pub trait ExternalHandler: Send + Sync + 'static {
    /// What the payload is read as.
    type Payload: DeserializeOwned + Send;

    /// Acts on a message. It is called at least once for each: again after a crash, a lost answer, or a stall beyond the
    /// lease. Hand the message id on as the idempotency key, and the epoch where the receiver can refuse a lower one than it
    /// has seen.
    ///
    /// An error, a panic, or to take longer than [`message_timeout`](crate::Consumer::message_timeout) counts as an attempt:
    /// the message is tried again later, and becomes a dead letter after its last attempt. [`Failure`](crate::Failure) says
    /// more about an error. The call is dropped half way when somebody else has taken the partition.
    fn handle(
        &self,
        message: Received<Self::Payload>,
        epoch: Epoch,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// A handler of any payload.
pub(super) trait Call: Send + Sync {
    fn call<'a>(&'a self, row: &'a Row, epoch: Epoch, limits: Limits<'a>) -> BoxFuture<'a, Result<(), Trouble>>;
}

impl<H: ExternalHandler> Call for H {
    fn call<'a>(&'a self, row: &'a Row, epoch: Epoch, limits: Limits<'a>) -> BoxFuture<'a, Result<(), Trouble>> {
        Box::pin(async move {
            let message = received(row)?;
            let culprit = Some(message.offset);
            let handling = bounded(limits.consumer, limits.message_timeout, culprit, self.handle(message, epoch));
            limits.times.measure(handling).await
        })
    }
}

/// What bounds a step.
#[derive(Clone, Copy)]
pub(super) struct Limits<'a> {
    pub(super) consumer: &'a str,
    pub(super) batch_messages: i32,
    pub(super) message_timeout: Duration,
    pub(super) times: &'a HandlerTimes,
}

/// The effect, and the leases that this process has for it.
pub(super) struct External {
    effect: Box<dyn Call>,
    /// Who holds them, unless a worker does.
    pub(super) member: Uuid,
    pub(super) lease: Duration,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    partitions: BTreeMap<Partition, Place>,
    acquire_at: Option<Instant>,
    /// Number of times that a partition was taken up.
    turns: u64,
}

struct Place {
    epoch: Epoch,
    renew_at: Instant,
    is_at_hand: bool,
    /// When its turn was, last.
    turn: u64,
}

/// A partition that a loop is at, until this is dropped.
struct AtHand<'a> {
    external: &'a External,
    lease: Lease,
}

impl Drop for AtHand<'_> {
    fn drop(&mut self) {
        let mut held = self.external.held();
        // Not where it was acquired anew meanwhile, and another loop is at it.
        if let Some(place) = held.partitions.get_mut(&self.lease.partition).filter(|p| p.epoch == self.lease.epoch) {
            place.is_at_hand = false;
        }
    }
}

impl External {
    pub(super) fn new(effect: impl Call + 'static) -> Self {
        Self { effect: Box::new(effect), member: Uuid::now_v7(), lease: LEASE, held: Mutex::default() }
    }

    pub(super) fn lease_ms(&self) -> i32 {
        i32::try_from(self.lease.as_millis()).unwrap_or(i32::MAX)
    }

    /// Handles what is there in one partition.
    pub(super) async fn step(&self, holder: Holder<'_>, limits: Limits<'_>) -> Result<Consumed, Error> {
        self.keep(holder).await?;
        for partition in self.partitions() {
            let Some(at_hand) = self.take_up(partition) else { continue };
            let consumed = self.work(holder, limits, &at_hand).await?;
            if consumed != Consumed::default() {
                return Ok(consumed);
            }
        }
        Ok(Consumed::default())
    }

    /// Gives back all partitions that no loop is at.
    pub(super) async fn release(&self, holder: Holder<'_>) -> Result<(), Error> {
        for partition in self.partitions() {
            let Some(at_hand) = self.take_up(partition) else { continue };
            self.forget(at_hand.lease);
            holder.release(at_hand.lease).await?;
        }
        Ok(())
    }

    /// Takes what is free, renews what it has, and gives up what it has too many of.
    async fn keep(&self, holder: Holder<'_>) -> Result<(), Error> {
        if self.may_acquire() {
            for lease in holder.acquire().await? {
                tracing::debug!(consumer.name = holder.consumer, lease.partition = lease.partition.0, "acquired");
                let place = Place { epoch: lease.epoch, renew_at: self.renew_at(), is_at_hand: false, turn: 0 };
                self.held().partitions.insert(lease.partition, place);
            }
        }
        for partition in self.partitions() {
            if self.held().partitions.get(&partition).is_some_and(|place| place.renew_at > Instant::now()) {
                continue;
            }
            let Some(at_hand) = self.take_up(partition) else { continue };
            match self.renew(holder, at_hand.lease).await? {
                Outcome::Done(false) => {}
                Outcome::Done(true) => {
                    self.forget(at_hand.lease);
                    holder.release(at_hand.lease).await?;
                }
                Outcome::Fenced => self.forget(at_hand.lease),
            }
        }
        Ok(())
    }

    /// Handles messages of a partition, until they are done, one fails, or the step has taken long enough.
    async fn work(&self, holder: Holder<'_>, limits: Limits<'_>, at_hand: &AtHand<'_>) -> Result<Consumed, Error> {
        let lease = at_hand.lease;
        let rows = holder.peek(lease, limits.batch_messages).await?;
        let began = Instant::now();
        let mut done =
            Done { external: self, holder, lease, new: None, consumed: Consumed::default(), is_fenced: false };
        for row in &rows {
            let offset = Offset(row.try_get("offset")?);
            // Either may be dropped: a renewal is made again, and the handler is told that it may be.
            let handled = tokio::select! {
                handled = self.effect.call(row, lease.epoch, limits) => Some(handled),
                () = self.until_fenced(holder, lease) => None,
            };
            match handled {
                Some(Ok(())) if row.try_get("was_parked")? => done.ack(offset, offset, 1).await?,
                Some(Ok(())) => done.add_new(offset),
                Some(Err(trouble)) => {
                    done.ack_new().await?;
                    match trouble {
                        Trouble::Elsewhere(error) => return Err(error),
                        Trouble::Message(_) if done.is_fenced => {}
                        Trouble::Message(blame) => done.nack(offset, &blame).await?,
                    }
                    break;
                }
                None => {
                    done.fenced();
                    break;
                }
            }
            if done.is_fenced || began.elapsed() >= STEP_MAX {
                break;
            }
        }
        if !done.is_fenced {
            done.ack_new().await?;
        }
        Ok(done.consumed)
    }

    /// Renews a lease in time, until it is another's.
    async fn until_fenced(&self, holder: Holder<'_>, lease: Lease) {
        loop {
            let renew_at = self.held().partitions.get(&lease.partition).map(|place| place.renew_at);
            sleep_until(renew_at.unwrap_or_else(Instant::now)).await;
            match self.renew(holder, lease).await {
                Ok(Outcome::Done(_)) => {}
                Ok(Outcome::Fenced) => return,
                // The handler goes on: as long as nobody takes the partition, it is ours.
                Err(error) => tracing::debug!(error.kind = ?error.kind(), "a lease was not renewed: {error}"),
            }
        }
    }

    async fn renew(&self, holder: Holder<'_>, lease: Lease) -> Result<Outcome<bool>, Error> {
        // Beforehand, so that a failure is not repeated at once.
        if let Some(place) = self.held().partitions.get_mut(&lease.partition) {
            place.renew_at = self.renew_at();
        }
        holder.renew(lease).await
    }

    fn renew_at(&self) -> Instant {
        Instant::now() + (self.lease / 3).min(RENEW_EVERY_MAX)
    }

    fn may_acquire(&self) -> bool {
        let now = Instant::now();
        let mut held = self.held();
        let may = held.acquire_at.is_none_or(|at| at <= now);
        if may {
            held.acquire_at = Some(now + ACQUIRE_EVERY);
        }
        may
    }

    /// The partitions that it has, the one whose turn was longest ago first.
    fn partitions(&self) -> Vec<Partition> {
        let held = self.held();
        let mut partitions: Vec<_> =
            held.partitions.iter().map(|(partition, place)| (place.turn, *partition)).collect();
        partitions.sort_unstable();
        partitions.into_iter().map(|(_, partition)| partition).collect()
    }

    fn take_up(&self, partition: Partition) -> Option<AtHand<'_>> {
        let mut held = self.held();
        held.turns += 1;
        let turn = held.turns;
        let place = held.partitions.get_mut(&partition).filter(|place| !place.is_at_hand)?;
        place.is_at_hand = true;
        place.turn = turn;
        Some(AtHand { external: self, lease: Lease { partition, epoch: place.epoch } })
    }

    fn forget(&self, lease: Lease) {
        let mut held = self.held();
        if held.partitions.get(&lease.partition).is_some_and(|place| place.epoch == lease.epoch) {
            held.partitions.remove(&lease.partition);
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a step has handled of a partition.
struct Done<'a> {
    external: &'a External,
    holder: Holder<'a>,
    lease: Lease,
    /// The first and the last new message that is not acknowledged yet, and how many were handled from the one to the other.
    new: Option<(Offset, Offset, u64)>,
    consumed: Consumed,
    /// Whether somebody else has taken the partition.
    is_fenced: bool,
}

impl Done<'_> {
    fn add_new(&mut self, offset: Offset) {
        self.new = Some(self.new.map_or((offset, offset, 1), |(first, _, messages)| (first, offset, messages + 1)));
    }

    async fn ack_new(&mut self) -> Result<(), Error> {
        match self.new.take() {
            Some((from, to, messages)) => self.ack(from, to, messages).await,
            None => Ok(()),
        }
    }

    async fn ack(&mut self, from: Offset, to: Offset, messages: u64) -> Result<(), Error> {
        match self.holder.ack(self.lease, from, to).await? {
            Outcome::Done(()) => self.consumed.applied += messages,
            Outcome::Fenced => self.fenced(),
        }
        Ok(())
    }

    async fn nack(&mut self, offset: Offset, blame: &Blame) -> Result<(), Error> {
        let (retry_at, retry_after) = blame.verdict.retry();
        let is_permanent = blame.verdict == Verdict::Permanent;
        match self.holder.nack(self.lease, offset, &blame.text, is_permanent, retry_at, retry_after).await? {
            Outcome::Done((outcome, attempts)) => {
                self.consumed.failed += 1;
                // Not the error: it may quote the message. The view blocked_keys and the dead letters have it.
                tracing::warn!(
                    consumer.name = self.holder.consumer,
                    message.partition = self.lease.partition.0,
                    message.offset = offset.0,
                    message.attempts = attempts,
                    "a message failed and is {outcome}"
                );
            }
            Outcome::Fenced => self.fenced(),
        }
        Ok(())
    }

    fn fenced(&mut self) {
        self.is_fenced = true;
        self.external.forget(self.lease);
        tracing::info!(
            consumer.name = self.holder.consumer,
            lease.partition = self.lease.partition.0,
            "another process has taken the partition: dropped what was at hand"
        );
    }
}
