//! The worker: relays and consumers wired into one process, and stopped together.
//!
//! Each stage is a bounded `step` and the same loop around it: step while there is work, wait a little where there is
//! none, wait longer where the database cannot be reached. A stage that found nothing a few times sleeps until its bell
//! rings; one watch for all stages looks for work (`watch.rs`). Consumers are also woken when a relay of this process has
//! moved something. A wake-up that gets lost costs a moment, since looking alone suffices.
//!
//! Deliberately absent: state. What is done and what is not stands in the database, so a worker may die at any moment
//! and another takes over where its last commit left off.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::checkpoints::Checkpoints;
use crate::consume::{Consumed, Consumer};
use crate::database::Database;
use crate::error::{Error, ErrorKind, Remedy};
use crate::member::{BEAT_EVERY, Member};
use crate::rates::Rates;
use crate::relay::Relay;
use crate::schema::check_version;
use crate::shutdown::Shutdown;
use crate::watch::{Bells, Watch};

/// Shortest pause of a stage that found nothing to do; it doubles with each empty step.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// Longest such pause. A stage that finds nothing after it sleeps.
const PAUSE_MAX: Duration = Duration::from_millis(40);
/// How long a stage sleeps at the most, should its bell not ring.
const SLEEP_MAX: Duration = Duration::from_secs(10);
/// The same for one that has leases to keep.
const SLEEP_WITH_LEASES_MAX: Duration = Duration::from_secs(1);
/// First wait after a failure; it doubles, with jitter, up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long the farewell of a worker may take.
const FAREWELL_MAX: Duration = Duration::from_secs(2);
/// Connections of the watch: one to look, one to listen.
const WATCH_CONNECTIONS: usize = 2;
/// Connections to say that the process lives.
const MEMBER_CONNECTIONS: usize = 1;
/// Loops that each consumer gets, where nothing else is said.
const LOOPS_PER_CONSUMER: usize = 2;

/// Runs relays and consumers until it is asked to stop.
///
/// ```no_run
/// # async fn example() -> Result<(), pgonce::Error> {
/// use pgonce::{Consumer, Database, Schema, Shutdown, Worker};
///
/// let database = Database::connect("postgresql://localhost/app", Schema::default(), 8)?;
/// let shutdown = Shutdown::new();
/// let report = Worker::new(database)
///     .relay("words")
///     .consumer(Consumer::word_count("counter"))
///     .run(&shutdown)
///     .await?;
/// println!("{} messages applied", report.applied);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Worker {
    database: Database,
    relays: Vec<Relay>,
    consumers: Vec<(Arc<Consumer>, usize)>,
}

/// What a worker did until it was stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Messages that its relays moved to the queue.
    pub moved: u64,
    /// Messages whose effect its consumers applied.
    pub applied: u64,
    /// Attempts of its consumers that failed.
    pub failed: u64,
}

impl Worker {
    /// A worker without stages.
    #[must_use]
    pub fn new(database: Database) -> Self {
        Self { database, relays: Vec::new(), consumers: Vec::new() }
    }

    /// Adds a relay; a topic's name is enough.
    #[must_use]
    pub fn relay(mut self, relay: impl Into<Relay>) -> Self {
        self.relays.push(relay.into());
        self
    }

    /// Adds a consumer, with two loops, each at another partition.
    #[must_use]
    pub fn consumer(self, consumer: Consumer) -> Self {
        self.consumer_with(consumer, LOOPS_PER_CONSUMER)
    }

    /// Adds a consumer with a number of loops. More than the topic has partitions are of no use.
    #[must_use]
    pub fn consumer_with(mut self, consumer: Consumer, loops: usize) -> Self {
        self.consumers.push((Arc::new(consumer), loops.max(1)));
        self
    }

    /// Connections that it uses at the same time: one a relay, one a loop of a consumer (two where its effects are not
    /// [exactly once](crate::Delivery)), two to hear of new messages, one to say that it lives, and one
    /// for checkpoints that are [scheduled](Consumer::checkpoint_every).
    #[must_use]
    pub fn connections(&self) -> usize {
        let of_consumers = self.consumers.iter().map(|(consumer, loops)| loops * consumer.connections());
        self.relays.len()
            + of_consumers.sum::<usize>()
            + WATCH_CONNECTIONS
            + MEMBER_CONNECTIONS
            + self.checkpoint_connections()
    }

    fn checkpoint_connections(&self) -> usize {
        usize::from(self.consumers.iter().any(|(consumer, _)| consumer.schedule().is_some()))
    }

    /// Runs all stages until `shutdown` asks to stop, or one of them fails in a way that time does not mend (an unknown
    /// topic, no schema) or panics; then all are stopped softly, and that error is returned.
    ///
    /// Failures that time may mend (no connection, a server that restarts, a table that a handler misses) are logged and
    /// tried again, after 0.1 s at first and 5 s at the most. Messages that fail are the consumers' affair, whatever their
    /// handlers do. Dropping the future drops the batches at hand.
    ///
    /// # Errors
    ///
    /// The first error that ends a stage: an unknown topic or consumer, a schema that is missing or of another version, an
    /// argument out of bounds, or a panic.
    pub async fn run(self, shutdown: &Shutdown) -> Result<Report, Error> {
        // A failure of this worker stops its own stages, not others that share the caller's wish.
        let stop = shutdown.child();
        let mut bells = Bells::default();
        let mut stages = Vec::new();
        for relay in self.relays {
            let bell = bells.for_relay(relay.topic_name());
            let database = self.database.for_stage("relay", 1)?;
            stages.push((Work::Relay(relay), bell, database));
        }
        let rates = Rates::new(self.consumers.iter().map(|(consumer, _)| Arc::clone(consumer)).collect());
        let checkpoints = Checkpoints::of(self.consumers.iter().map(|(consumer, _)| consumer));
        let names = self.consumers.iter().map(|(consumer, _)| consumer.name().to_owned()).collect();
        for (consumer, loops) in self.consumers {
            let bell = bells.for_consumer(consumer.name());
            consumer.check_delivery()?;
            let database = self.database.for_stage(consumer.name(), loops * consumer.connections())?;
            for _ in 0..loops {
                stages.push((Work::Consumer(Arc::clone(&consumer)), Arc::clone(&bell), database.clone()));
            }
        }
        let bells = Arc::new(bells);
        let member = Arc::new(Member::new(names));
        let is_over = CancellationToken::new();
        let mut loops = JoinSet::new();
        let mut companions = 0;
        if !stages.is_empty() {
            let database = self.database.for_stage("watch", 1)?;
            if member.has_consumers() {
                // By its own connection: who lost it would be taken for dead.
                let its_own = self.database.for_stage("member", MEMBER_CONNECTIONS)?;
                loops.spawn(member_loop(Arc::clone(&member), its_own, is_over.clone()));
            }
            let keeping = rates.keep(database.clone(), is_over.clone());
            loops.spawn(async move {
                keeping.await;
                Ok(Report::default())
            });
            companions = loops.len();
            if !checkpoints.is_empty() {
                let keeping = checkpoints.keep(self.database.for_stage("checkpoint", 1)?, stop.clone());
                loops.spawn(async move {
                    keeping.await;
                    Ok(Report::default())
                });
            }
            let watch = Watch::new(Arc::clone(&bells));
            let listening = watch.listen(database.clone(), stop.clone());
            loops.spawn(async move {
                listening.await;
                Ok(Report::default())
            });
            loops.spawn(watch_loop(watch, database, stop.clone()));
            let stopping = stop.clone();
            loops.spawn(async move {
                stopping.stopping().await;
                tracing::info!("stopping: finishing the batches at hand");
                Ok(Report::default())
            });
        }
        for (work, bell, database) in stages {
            loops.spawn(run_loop(
                Stage { work, bell, bells: Arc::clone(&bells), member: Arc::clone(&member) },
                database,
                stop.clone(),
            ));
        }
        let mut report = Report::default();
        let mut first_error = None;
        while let Some(ended) = loops.join_next().await {
            if loops.len() <= companions {
                // Only those are left that end last.
                is_over.cancel();
            }
            let ended = ended.unwrap_or_else(|panicked| {
                Err(Error::new(ErrorKind::Defect, "a stage of the worker panicked").with_source(panicked))
            });
            match ended {
                Ok(part) => {
                    report.moved += part.moved;
                    report.applied += part.applied;
                    report.failed += part.failed;
                }
                Err(error) => {
                    stop.stop();
                    // The first one is the caller's to report.
                    if first_error.is_some() {
                        tracing::error!(error.kind = ?error.kind(), error.hint = error.hint(), "failed as well: {error}");
                    }
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(report), Err)
    }
}

/// What a loop does.
enum Work {
    Relay(Relay),
    Consumer(Arc<Consumer>),
}

/// One loop's work, the bell that wakes it, and those that it may ring.
struct Stage {
    work: Work,
    bell: Arc<Notify>,
    bells: Arc<Bells>,
    member: Arc<Member>,
}

impl Stage {
    fn name(&self) -> &str {
        match &self.work {
            Work::Relay(_) => "relay",
            Work::Consumer(consumer) => consumer.name(),
        }
    }

    /// How long it sleeps at the most.
    fn sleep_max(&self) -> Duration {
        match &self.work {
            Work::Consumer(consumer) if consumer.is_external() => SLEEP_WITH_LEASES_MAX,
            Work::Relay(_) | Work::Consumer(_) => SLEEP_MAX,
        }
    }

    /// Gives back what it holds beyond a step. Where that fails, others find out by themselves that it is free.
    async fn release(&self, database: &Database) {
        if let Work::Consumer(consumer) = &self.work
            && let Err(error) = consumer.release(database, self.member.id()).await
        {
            tracing::debug!(stage.name = self.name(), error.kind = ?error.kind(), "kept its leases: {error}");
        }
    }

    /// One step; answers what it did, or nothing where there was nothing to do.
    async fn step(&self, database: &Database) -> Result<Report, Error> {
        match &self.work {
            Work::Relay(relay) => {
                let relayed = relay.step(database).await?;
                if relayed.moved > 0 {
                    self.bells.ring_consumers();
                }
                Ok(Report { moved: relayed.moved, ..Report::default() })
            }
            Work::Consumer(consumer) => {
                let mut done = None;
                if self.member.suspects(consumer.name()) {
                    done = consumer.step_under_suspicion(database, self.member.id()).await?;
                }
                let Consumed { applied, failed } = match done {
                    Some(done) => done,
                    None => consumer.step_of_member(database, self.member.id()).await?,
                };
                Ok(Report { moved: 0, applied, failed })
            }
        }
    }
}

async fn run_loop(stage: Stage, database: Database, shutdown: Shutdown) -> Result<Report, Error> {
    let mut done = Report::default();
    let mut pause = PAUSE_MIN;
    let mut failures = Failures::default();
    if matches!(stage.work, Work::Consumer(_)) {
        // Both arms only wait.
        tokio::select! {
            () = stage.member.joined() => {}
            () = shutdown.stopping() => {}
        }
    }
    let mut awake = Some(stage.bells.awake());
    while !shutdown.is_stopping() {
        // Registered before looking, so that what comes between the look and the wait still wakes.
        let rung = stage.bell.notified();
        let Some(outcome) = shutdown.or_aborted(stage.step(&database)).await else {
            tracing::warn!(stage.name = stage.name(), "dropped what was at hand");
            break;
        };
        let wait = match outcome {
            Ok(step) => {
                // Where a handler fails, to find nothing may mean that another loop is at what it fails at.
                if step != Report::default() || !failures.are_of_a_handler {
                    failures.end(stage.name());
                }
                done.moved += step.moved;
                done.applied += step.applied;
                done.failed += step.failed;
                if step != Report::default() {
                    pause = PAUSE_MIN;
                    continue;
                }
                let wait = pause;
                pause = if pause < PAUSE_MAX { (pause * 2).min(PAUSE_MAX) } else { stage.sleep_max() };
                if failures.are_going_on() { wait.min(RETRY_MAX) } else { wait }
            }
            Err(error) => failures.add(stage.name(), error, &database).await?,
        };
        if wait > PAUSE_MAX {
            awake = None;
        }
        // Each arm may be dropped: none has taken anything up.
        tokio::select! {
            () = shutdown.stopping() => {}
            () = rung, if !failures.are_going_on() => pause = PAUSE_MIN,
            () = tokio::time::sleep(wait) => {}
        }
        awake.get_or_insert_with(|| stage.bells.awake());
    }
    shutdown.or_aborted(stage.release(&database)).await;
    Ok(done)
}

/// Says that the worker lives, until all else is over, and bids farewell.
async fn member_loop(member: Arc<Member>, database: Database, is_over: CancellationToken) -> Result<Report, Error> {
    let mut failures = Failures::default();
    while !is_over.is_cancelled() {
        // Whatever is dropped here is one statement, and is said again or not needed any more.
        let wait = tokio::select! {
            () = is_over.cancelled() => break,
            outcome = member.beat(&database) => match outcome {
                Ok(()) => {
                    failures.end("member");
                    BEAT_EVERY
                }
                Err(error) => failures.add("member", error, &database).await?,
            },
        };
        // Both arms only wait.
        tokio::select! {
            () = is_over.cancelled() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
    // Whoever goes without it is suspected for nothing.
    match tokio::time::timeout(FAREWELL_MAX, member.leave(&database)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(error.kind = ?error.kind(), "left without a farewell: {error}"),
        Err(_) => tracing::debug!("left without a farewell: no answer in time"),
    }
    Ok(Report::default())
}

/// Looks for work, for all stages, until it is asked to stop.
async fn watch_loop(mut watch: Watch, database: Database, shutdown: Shutdown) -> Result<Report, Error> {
    let mut failures = Failures::default();
    while !shutdown.is_stopping() {
        let wait = match shutdown.or_aborted(watch.step(&database)).await {
            None => break,
            Some(Ok(())) => {
                failures.end("watch");
                None
            }
            Some(Err(error)) => Some(failures.add("watch", error, &database).await?),
        };
        // Each arm may be dropped: all of them only wait.
        tokio::select! {
            () = shutdown.stopping() => {}
            () = watch.pause(), if wait.is_none() => {}
            () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    }
    Ok(Report::default())
}

/// The failures of a loop since it last worked, and how long to wait after each.
#[derive(Default)]
struct Failures {
    delays: Option<backon::ExponentialBackoff>,
    /// Whether the last one was a handler's, and not one of the database.
    are_of_a_handler: bool,
}

impl Failures {
    fn are_going_on(&self) -> bool {
        self.delays.is_some()
    }

    /// It has worked.
    fn end(&mut self, stage: &str) {
        self.are_of_a_handler = false;
        if self.delays.take().is_some() {
            tracing::info!(stage.name = stage, "works again");
        }
    }

    /// It has failed: answers how long to wait, or the error where time does not mend it.
    async fn add(&mut self, stage: &str, error: Error, database: &Database) -> Result<Duration, Error> {
        if !mends_by_itself(&error, database).await {
            return Err(error);
        }
        self.are_of_a_handler = error.kind() == ErrorKind::Handler;
        let delays = self.delays.get_or_insert_with(|| {
            ExponentialBuilder::new()
                .with_min_delay(RETRY_MIN)
                .with_max_delay(RETRY_MAX)
                .with_jitter()
                .without_max_times()
                .build()
        });
        let wait = delays.next().unwrap_or(RETRY_MAX).min(RETRY_MAX);
        tracing::warn!(
            stage.name = stage,
            error.kind = ?error.kind(),
            error.hint = error.hint(),
            retry.after_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            "failed, will try again: {error}"
        );
        Ok(wait)
    }
}

/// Whether a stage goes on after an error. A payload that does not fit the handler or an error that the database reports
/// for its statement stops a batch, not the worker: other partitions go on, and somebody may mend it meanwhile.
async fn mends_by_itself(error: &Error, database: &Database) -> bool {
    match error.kind() {
        // Of a call in the very moment of an upgrade, too.
        ErrorKind::SchemaMissing => is_installed(database).await,
        ErrorKind::Payload | ErrorKind::Database | ErrorKind::Hole | ErrorKind::Defect => true,
        kind => kind.remedy() == Remedy::Retry,
    }
}

async fn is_installed(database: &Database) -> bool {
    let Ok(session) = database.session().await else { return false };
    let is_installed = check_version(&*session, database.schema()).await.is_ok();
    if is_installed {
        session.give_back();
    }
    is_installed
}
