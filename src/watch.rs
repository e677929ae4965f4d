//! Watching: how a worker that has nothing to do hears of new messages, with one statement for all of its stages.
//!
//! The watch asks a few times a second which stages have something to do, and rings the bells of these. While all of them
//! sleep, it is notified in between by whoever enqueues or relays (`sql/routines/watch.sql`): a busy worker causes no
//! notifications. Where they do not arrive, as through a `PgBouncer` in transaction mode or with a pool of the caller's,
//! the watch asks more often instead; and so it does for a while where the notifications were for the stages of others.
//!
//! Invariant: a bell only says that a look may be worth it. One that rings for nothing, or is missed, costs a look or a
//! moment; correctness is in the steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_postgres::types::Type;

use crate::database::Database;
use crate::error::Error;
use crate::shutdown::Shutdown;

/// How often the watch asks while it is notified as well.
const PAUSE_NOTIFIED: Duration = Duration::from_millis(200);
/// How often it asks while it is not.
const PAUSE_ALONE: Duration = Duration::from_millis(55);
/// How long whoever enqueues keeps notifying after the watch last asked.
const NOTIFY_FOR_MS: i32 = 1_000;
/// Notifications in a row that were for others, after which the watch does without them: each look invites more.
const FRUITLESS_MAX: u32 = 3;
/// How long it does.
const DEAF_FOR: Duration = Duration::from_secs(1);
/// How long to wait until the next try to listen.
const LISTEN_RETRY: Duration = Duration::from_secs(5);

/// The bells of a worker's stages, and how many of these do not sleep.
#[derive(Debug, Default)]
pub(crate) struct Bells {
    awake: AtomicUsize,
    relays: Vec<(Option<String>, Arc<Notify>)>,
    consumers: Vec<(String, Arc<Notify>)>,
}

impl Bells {
    /// The bell of a relay of one topic, or of all.
    pub(crate) fn for_relay(&mut self, topic: Option<&str>) -> Arc<Notify> {
        let bell = Arc::new(Notify::new());
        self.relays.push((topic.map(str::to_owned), Arc::clone(&bell)));
        bell
    }

    /// The bell of a consumer's loops.
    pub(crate) fn for_consumer(&mut self, consumer: &str) -> Arc<Notify> {
        let bell = Arc::new(Notify::new());
        self.consumers.push((consumer.to_owned(), Arc::clone(&bell)));
        bell
    }

    /// A relay of this process has moved something, whoever reads it.
    pub(crate) fn ring_consumers(&self) {
        for (_, bell) in &self.consumers {
            bell.notify_waiters();
        }
    }

    /// A loop is awake while it holds this.
    pub(crate) fn awake(&self) -> Awake<'_> {
        self.awake.fetch_add(1, Ordering::Relaxed);
        Awake(self)
    }

    fn all_sleep(&self) -> bool {
        self.awake.load(Ordering::Relaxed) == 0
    }

    fn ring(&self, stage: &str, name: &str) {
        let relays = self
            .relays
            .iter()
            .filter(|(topic, _)| stage == "relay" && topic.as_deref().is_none_or(|topic| topic == name));
        let consumers = self.consumers.iter().filter(|(consumer, _)| stage == "consumer" && consumer == name);
        for bell in relays.map(|(_, bell)| bell).chain(consumers.map(|(_, bell)| bell)) {
            bell.notify_waiters();
        }
    }

    /// The topics to ask for; none where there is a relay of all.
    fn topics(&self) -> Option<Vec<&str>> {
        self.relays.iter().map(|(topic, _)| topic.as_deref()).collect()
    }
}

/// That a loop is awake, and looks for work by itself.
#[derive(Debug)]
pub(crate) struct Awake<'a>(&'a Bells);

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        self.0.awake.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The watch of a worker.
#[derive(Debug)]
pub(crate) struct Watch {
    bells: Arc<Bells>,
    heard: Arc<Heard>,
    /// Whether the next look comes of a notification.
    was_notified: bool,
    /// Notifications in a row of which a look found nothing to do.
    fruitless: u32,
    deaf_until: Option<Instant>,
}

/// What the listener tells the watch.
#[derive(Debug, Default)]
struct Heard {
    bell: Notify,
    /// Whether notifications are known to arrive.
    arrives: AtomicBool,
}

impl Watch {
    pub(crate) fn new(bells: Arc<Bells>) -> Self {
        Self { bells, heard: Arc::default(), was_notified: false, fruitless: 0, deaf_until: None }
    }

    /// Whether it wants to be notified: only while all sleep, and not for others' messages all the time.
    fn wants_notifications(&self) -> bool {
        self.bells.all_sleep() && self.deaf_until.is_none_or(|until| until <= Instant::now())
    }

    /// Asks once, and rings the bells of the stages that have something to do.
    ///
    /// # Errors
    ///
    /// Errors of the database.
    pub(crate) async fn step(&mut self, database: &Database) -> Result<(), Error> {
        let session = database.session().await?;
        let notify_for_ms = if self.wants_notifications() { NOTIFY_FOR_MS } else { 0 };
        let consumers: Vec<&str> = self.bells.consumers.iter().map(|(consumer, _)| consumer.as_str()).collect();
        let due = session
            .run(
                &database.schema().sql(include_str!("../sql/statements/watch.sql")),
                &[
                    (&self.bells.topics(), Type::TEXT_ARRAY),
                    (&consumers, Type::TEXT_ARRAY),
                    (&notify_for_ms, Type::INT4),
                ],
            )
            .await?;
        for row in &due {
            self.bells.ring(row.try_get("stage")?, row.try_get("name")?);
        }
        session.give_back();
        self.fruitless = if self.was_notified && due.is_empty() { self.fruitless + 1 } else { 0 };
        if self.fruitless >= FRUITLESS_MAX {
            self.fruitless = 0;
            self.deaf_until = Some(Instant::now() + DEAF_FOR);
        }
        Ok(())
    }

    /// Waits until the next look is due, or a notification has come while all sleep.
    pub(crate) async fn pause(&mut self) {
        let notified = self.wants_notifications() && self.heard.arrives.load(Ordering::Relaxed);
        self.was_notified = false;
        // Either arm may be dropped: a notification that was not taken stays.
        tokio::select! {
            () = self.heard.bell.notified(), if notified => self.was_notified = true,
            () = tokio::time::sleep(if notified { PAUSE_NOTIFIED } else { PAUSE_ALONE }) => {}
        }
    }

    /// Listens until it is asked to stop. Where it cannot, the watch goes on alone.
    pub(crate) fn listen(&self, database: Database, shutdown: Shutdown) -> impl Future<Output = ()> + Send + 'static {
        let heard = Arc::clone(&self.heard);
        async move {
            while !shutdown.is_stopping() {
                // Whatever is dropped here, the connection closes and the server forgets that it listened.
                tokio::select! {
                    () = shutdown.stopping() => {}
                    outcome = hear(&database, &heard) => match outcome {
                        Ok(()) => return,
                        Err(error) => tracing::debug!(error.kind = ?error.kind(), "not notified: {error}"),
                    },
                }
                heard.arrives.store(false, Ordering::Relaxed);
                tokio::select! {
                    () = shutdown.stopping() => {}
                    () = tokio::time::sleep(LISTEN_RETRY) => {}
                }
            }
        }
    }
}

/// Listens on a connection of its own for as long as that lasts. Answers at once where there can be none.
async fn hear(database: &Database, heard: &Heard) -> Result<(), Error> {
    let Some(mut listener) = database.listener().await? else {
        return Ok(());
    };
    listener.client().batch_execute(&database.schema().sql(include_str!("../sql/statements/listen.sql"))).await?;
    // One to itself, by way of the pool: whether it arrives tells whether any will.
    let session = database.session().await?;
    session.query_typed(&database.schema().sql(include_str!("../sql/statements/notify.sql")), &[]).await?;
    session.give_back();
    loop {
        listener.notification().await?;
        heard.arrives.store(true, Ordering::Relaxed);
        heard.bell.notify_one();
    }
}
