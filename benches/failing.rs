//! How much of its rate a consumer keeps while one message in a hundred fails, again and again: the same batches with and
//! without such messages, in one run, on one connection, in turn. Keys are all different, settings are the defaults.
//!
//! Times vary from machine to machine and from minute to minute; only the ratios mean something.

use std::time::{Duration, Instant};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{
    Consumer, ConsumerSettings, Database, Handler, HandlerError, Message, Producer, Received, Relay, Schema,
    TopicSettings, create_consumer, create_topic, migrate,
};
use serde::Deserialize;
use tokio_postgres::Transaction;

const MESSAGES: usize = 60_000;
const BATCH: usize = 1_000;
const EVERY: usize = 100;
/// Inserts each message; the division fails for some.
const SQL: &str =
    "insert into applied (message_id, value) select message_id, 1 / (payload ->> 'divisor')::integer from received";

#[derive(Deserialize)]
struct Division {
    divisor: i32,
}

/// Inserts each message; some fail.
struct Inserting;

impl Handler for Inserting {
    type Payload = Division;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Division>) -> Result<(), HandlerError> {
        if message.payload.divisor == 0 {
            return Err("division by zero".into());
        }
        let insert = "insert into applied (message_id, value) values ($1, 1)";
        tx.execute(insert, &[&message.message_id.as_str()]).await?;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = tokio::task::spawn_blocking(|| {
        let settings = [("shared_buffers", "1GB"), ("max_wal_size", "8GB"), ("autovacuum", "off")];
        PrivateServer::start(&Options {
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        })
    })
    .await??;
    let database = Database::connect(&server.url("pgonce"), Schema::default(), 1)?;
    let mut session = database.session().await?;
    migrate(&mut session, &Schema::default()).await?;
    session.batch_execute("create table applied (message_id text not null, value integer not null)").await?;
    for (topic, every) in [("clean", None), ("failing", Some(EVERY))] {
        let settings = TopicSettings { partitions: Some(1), payload_bytes_max: None };
        create_topic(&*session, &Schema::default(), topic, settings).await?;
        for kind in ["each", "sql"] {
            let name = format!("{topic} {kind}");
            create_consumer(&*session, &Schema::default(), &name, Some(topic), ConsumerSettings::default()).await?;
        }
        let messages: Vec<Message> = (0..MESSAGES)
            .map(|nth| {
                let divisor = i32::from(every.is_none_or(|every| nth % every != every / 2));
                Ok(Message::json(&serde_json::json!({ "divisor": divisor }))?.key(nth.to_string()))
            })
            .collect::<Result<_, pgonce::Error>>()?;
        for chunk in messages.chunks(BATCH) {
            Producer::new(topic).send_all(&*session, chunk).await?;
        }
    }
    session.give_back();
    while Relay::all().step(&database).await?.moved > 0 {}

    println!("{MESSAGES} messages in batches of {BATCH}, with and without one in {EVERY} that fails, in turn");
    ratio("each", &database, |name| Consumer::each(name, Inserting)).await?;
    ratio("sql", &database, |name| Consumer::sql(name, SQL)).await?;
    drop(database);
    tokio::task::spawn_blocking(move || server.stop()).await??;
    Ok(())
}

/// Steps with both consumers in turn until nothing is left but what waits to be tried again.
async fn ratio(kind: &str, database: &Database, consumer: impl Fn(String) -> Consumer) -> Result<(), pgonce::Error> {
    let consumers = ["clean", "failing"].map(|topic| consumer(format!("{topic} {kind}")));
    let mut applied = [0; 2];
    let mut took = [Duration::ZERO; 2];
    let due = [MESSAGES as u64, (MESSAGES - MESSAGES / EVERY) as u64];
    while applied != due {
        for (nth, consumer) in consumers.iter().enumerate() {
            if applied[nth] < due[nth] {
                let started = Instant::now();
                applied[nth] += consumer.step(database).await?.applied;
                took[nth] += started.elapsed();
            }
        }
    }
    // Of the rates, the number of messages cancels out but for the one in a hundred.
    let [clean, failing] = took.map(|took| took.as_secs_f64());
    println!("{kind:<5} {clean:.2} s clean, {failing:.2} s failing: {:.2} of the rate", clean / failing * 0.99);
    Ok(())
}
