//! How much of its rate a consumer keeps while a checkpoint of a million rows of state is taken: periods without
//! any before and after several, in one run. And how long it takes to save, compare and restore them.
//! Between two checkpoints the consumer makes up for what it could not clear away while one was taken.
//!
//! Times vary from machine to machine and from minute to minute; only the ratios mean something.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{
    Consumer, ConsumerSettings, Database, Relay, Schema, TopicSettings, create_consumer, create_topic, migrate,
};
use tokio_postgres::Client;

const STATE_ROWS: i64 = 1_000_000;
const MESSAGES: i64 = 3_000_000;
/// Messages that are enqueued in a transaction.
const CHUNK: i64 = 10_000;
const CHECKPOINTS: u32 = 8;
/// How long the consumer runs without checkpoints, each time.
const PERIOD: Duration = Duration::from_secs(8);
/// From one checkpoint to the next.
const PAUSE: Duration = Duration::from_secs(1);
const STATE: &str = "
    insert into pgonce.word_counts (consumer, word, count)
    select 'counter', 'word ' || n, 1 from generate_series(1, $1::bigint) n";
const SEND: &str = "
    select count(*) from pgonce.enqueue_many(
      'words',
      array(select jsonb_build_object('word', 'word ' || (n * 7919) % $2::bigint) from generate_series(1, $1::bigint) n),
      keys => array(select (n % 1000)::text from generate_series(1, $1::bigint) n))";

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = tokio::task::spawn_blocking(|| {
        let settings = [("shared_buffers", "1GB"), ("max_wal_size", "8GB"), ("fsync", "on")];
        PrivateServer::start(&Options {
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        })
    })
    .await??;
    let database = Database::connect(&server.url("pgonce"), Schema::default(), 3)?;
    let mut session = database.session().await?;
    migrate(&mut session, &Schema::default()).await?;
    let settings = TopicSettings { partitions: Some(4), payload_bytes_max: None };
    create_topic(&*session, &Schema::default(), "words", settings).await?;
    create_consumer(&*session, &Schema::default(), "counter", Some("words"), ConsumerSettings::default()).await?;
    session.execute(STATE, &[&STATE_ROWS]).await?;
    for _ in 0..MESSAGES / CHUNK {
        session.query_one(SEND, &[&CHUNK, &STATE_ROWS]).await?;
        while Relay::all().step(&database).await?.moved > 0 {}
    }
    session.batch_execute("vacuum analyze").await?;

    println!("{STATE_ROWS} rows of state, a word count of {MESSAGES} messages, with and without checkpoints");
    let applied = AtomicU64::new(0);
    let consumer = Consumer::word_count("counter");
    let consume = async {
        loop {
            match consumer.step(&database).await {
                Ok(step) => applied.fetch_add(step.applied, Ordering::Relaxed),
                Err(error) => return error,
            };
        }
    };
    tokio::select! {
        error = consume => return Err(error.into()),
        measured = measure(&session, &applied) => measured?,
    }
    println!("compare {:6.2} s", timed(&session, "select pgonce.checkpoint_difference('counter', '0')").await?);
    println!("restore {:6.2} s", timed(&session, "select pgonce.restore('counter', '0')").await?);
    println!("delete  {:6.2} s", timed(&session, "select pgonce.delete_checkpoint('counter', '0')").await?);
    session.give_back();
    drop(database);
    tokio::task::spawn_blocking(move || server.stop()).await??;
    Ok(())
}

/// What was applied in some time.
#[derive(Default)]
struct Applied {
    messages: u64,
    seconds: f64,
}

impl Applied {
    /// Adds what is applied while something goes on.
    async fn during<T>(&mut self, applied: &AtomicU64, work: impl Future<Output = T>) -> T {
        let (before, started) = (applied.load(Ordering::Relaxed), Instant::now());
        let result = work.await;
        self.messages += applied.load(Ordering::Relaxed) - before;
        self.seconds += started.elapsed().as_secs_f64();
        result
    }

    fn rate(&self) -> f64 {
        f64::from(u32::try_from(self.messages).unwrap_or(u32::MAX)) / self.seconds
    }
}

/// A period without checkpoints, one with many, and another one without.
async fn measure(client: &Client, applied: &AtomicU64) -> Result<(), tokio_postgres::Error> {
    let (mut clean, mut saving, mut between) = (Applied::default(), Applied::default(), Applied::default());
    tokio::time::sleep(PERIOD).await;
    clean.during(applied, tokio::time::sleep(PERIOD)).await;
    for nth in 0..CHECKPOINTS {
        let save = format!("select pgonce.checkpoint('counter', '{nth}')");
        saving.during(applied, client.batch_execute(&save)).await?;
        between.during(applied, tokio::time::sleep(PAUSE)).await;
    }
    clean.during(applied, tokio::time::sleep(PERIOD)).await;
    println!("save    {:6.2} s", saving.seconds / f64::from(CHECKPOINTS));
    println!("clean   {:6.0} messages a second", clean.rate());
    println!("saving  {:6.0} messages a second, {:.2} of the rate", saving.rate(), saving.rate() / clean.rate());
    println!("between {:6.0} messages a second, {:.2} of the rate", between.rate(), between.rate() / clean.rate());
    Ok(())
}

async fn timed(client: &Client, statement: &str) -> Result<f64, tokio_postgres::Error> {
    let started = Instant::now();
    client.batch_execute(statement).await?;
    Ok(started.elapsed().as_secs_f64())
}
