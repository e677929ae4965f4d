//! How much of its rate a consumer keeps while one message in a hundred fails, once and for all or again and again: the same
//! batches with and without such messages, in one run, on one connection, in turn. Keys are all different, settings are the
//! defaults.
//!
//! Times vary from machine to machine and from minute to minute; only the ratios mean something.

use std::time::{Duration, Instant};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{
    Consumer, ConsumerSettings, Database, Failure, Handler, HandlerError, Message, Producer, Received, Relay, Schema,
    TopicSettings, create_consumer, create_topic, migrate,
};
use serde::Deserialize;
use tokio_postgres::Transaction;

const MESSAGES: usize = 60_000;
const BATCH: usize = 1_000;
const EVERY: usize = 100;
/// Topics, and the SQLSTATE with which some of their messages fail.
const TOPICS: [(&str, Option<&str>); 3] =
    [("clean", None), ("failing for good", Some("PO013")), ("failing each time", Some("22023"))];
const LEDGER: &str =
    "create table ledger (consumer text, id text, amount numeric not null, primary key (consumer, id))";
/// Books each message; `amount_of` refuses some.
const SQL: &str =
    "insert into ledger (consumer, id, amount) select consumer, message_id, amount_of(payload) from received";
/// Raises an SQLSTATE for amounts below zero: `PO013` says that it is no use to try again.
const AMOUNT_OF: &str = "create function amount_of(payload jsonb) returns numeric language plpgsql immutable as $$
    begin
        if (payload ->> 'amount')::numeric < 0 then
            raise exception using errcode = payload ->> 'sqlstate', message = 'an amount below zero';
        end if;
        return (payload ->> 'amount')::numeric;
    end $$";

#[derive(Deserialize)]
struct Booking {
    amount: i32,
    sqlstate: String,
}

/// Books each message for a consumer; some fail.
struct Booker(String);

impl Handler for Booker {
    type Payload = Booking;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Booking>) -> Result<(), HandlerError> {
        if message.payload.amount < 0 {
            return Err(match message.payload.sqlstate.as_str() {
                "PO013" => Failure::permanent("an amount below zero").into(),
                _ => "an amount below zero".into(),
            });
        }
        let insert = "insert into ledger (consumer, id, amount) values ($1, $2, $3::integer)";
        tx.execute(insert, &[&self.0, &message.message_id.as_str(), &message.payload.amount]).await?;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let server = tokio::task::spawn_blocking(|| {
        let settings = [("shared_buffers", "1GB"), ("max_wal_size", "8GB"), ("fsync", "on")];
        PrivateServer::start(&Options {
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        })
    })
    .await??;
    let database = Database::connect(&server.url("pgonce"), Schema::default(), 1)?;
    let mut session = database.session().await?;
    migrate(&mut session, &Schema::default()).await?;
    session.batch_execute(LEDGER).await?;
    session.batch_execute(AMOUNT_OF).await?;
    for (topic, sqlstate) in TOPICS {
        let settings = TopicSettings { partitions: Some(1), payload_bytes_max: None };
        create_topic(&*session, &Schema::default(), topic, settings).await?;
        for kind in ["each", "sql"] {
            let name = format!("{topic} {kind}");
            create_consumer(&*session, &Schema::default(), &name, Some(topic), ConsumerSettings::default()).await?;
        }
        let messages: Vec<Message> = (0..MESSAGES)
            .map(|nth| {
                let amount = if sqlstate.is_some() && nth % EVERY == EVERY / 2 { -1 } else { 1 };
                let booking = serde_json::json!({ "amount": amount, "sqlstate": sqlstate.unwrap_or_default() });
                Ok(Message::json(&booking)?.key(nth.to_string()))
            })
            .collect::<Result<_, pgonce::Error>>()?;
        for chunk in messages.chunks(BATCH) {
            Producer::new(topic).send_all(&*session, chunk).await?;
        }
    }
    session.give_back();
    while Relay::all().step(&database).await?.moved > 0 {}

    println!("{MESSAGES} messages in batches of {BATCH}, with and without one in {EVERY} that fails, in turn");
    rates("each", &database, |name| Consumer::each(name.clone(), Booker(name))).await?;
    rates("sql", &database, |name| Consumer::sql(name, SQL)).await?;
    drop(database);
    tokio::task::spawn_blocking(move || server.stop()).await??;
    Ok(())
}

/// Steps with the consumers of all topics in turn, until nothing is left but what waits to be tried again.
async fn rates(kind: &str, database: &Database, consumer: impl Fn(String) -> Consumer) -> Result<(), pgonce::Error> {
    let consumers = TOPICS.map(|(topic, _)| consumer(format!("{topic} {kind}")));
    let due = TOPICS.map(|(_, sqlstate)| (MESSAGES - sqlstate.map_or(0, |_| MESSAGES / EVERY)) as u64);
    let mut applied = [0; TOPICS.len()];
    let mut took = [Duration::ZERO; TOPICS.len()];
    while applied != due {
        for (nth, consumer) in consumers.iter().enumerate() {
            if applied[nth] < due[nth] {
                let started = Instant::now();
                applied[nth] += consumer.step(database).await?.applied;
                took[nth] += started.elapsed();
            }
        }
    }
    let seconds = took.map(|took| took.as_secs_f64());
    for (nth, (topic, _)) in TOPICS.iter().enumerate() {
        // Of the rates, the number of messages cancels out but for the one in a hundred.
        let messages = if nth == 0 { 1.0 } else { 0.99 };
        println!(
            "{kind:<4} {topic:<17} {:6.2} s, {:.2} of the rate",
            seconds[nth],
            messages * seconds[0] / seconds[nth]
        );
    }
    Ok(())
}
