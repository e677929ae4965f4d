//! How much of the speed of bare writes is left: relay and the one-statement word count against the same writes with no
//! lock, claim, order or deduplication, in one run, on one connection, batch by batch in turn, each on tables of its own
//! (an index whose end belongs to one of two topics would be faster for that one). The relay is also held against these
//! writes on an outbox as it is usually laid out: the layout is part of what makes it fast.
//!
//! Times vary from machine to machine and from minute to minute; only the ratios mean something.

use std::time::{Duration, Instant};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Message, Producer, Schema, TopicSettings, create_topic, migrate};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls};

const BATCH: usize = 1_000;
const ROUNDS: usize = 150;
const WORDS: usize = 5_000;

/// What was measured of one stage.
#[derive(Default)]
struct Stage {
    bare: Vec<Duration>,
    ours: Vec<Duration>,
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
    let (mut client, connection) = tokio_postgres::connect(&server.url("pgonce"), NoTls).await?;
    tokio::spawn(connection);
    prepare(&mut client).await?;

    println!("{ROUNDS} batches of {BATCH} messages each, in turn, on one connection");
    enqueue(&client).await?.print("enqueue_many");
    client.batch_execute("checkpoint").await?;
    relay(&client).await?.print("relay");
    client.batch_execute("checkpoint").await?;
    relay_usual(&client).await?.print("relay, usual");
    client.batch_execute("checkpoint").await?;
    count(&client).await?.print("word count");
    drop(client);
    tokio::task::spawn_blocking(move || server.stop()).await??;
    Ok(())
}

async fn prepare(client: &mut Client) -> Result<(), Box<dyn std::error::Error>> {
    let schema = Schema::default();
    migrate(client, &schema).await?;
    create_topic(client, &schema, "ours", TopicSettings { partitions: Some(1), payload_bytes_max: None }).await?;
    pgonce::create_consumer(client, &schema, "ours", Some("ours"), pgonce::ConsumerSettings::default()).await?;
    client.batch_execute(include_str!("bare.sql")).await?;
    client
        .batch_execute(
            "insert into bare.heads select * from pgonce.heads;
             insert into bare.progress select * from pgonce.progress;
             insert into usual.heads select * from pgonce.heads",
        )
        .await?;
    Ok(())
}

async fn enqueue(client: &Client) -> Result<Stage, Box<dyn std::error::Error>> {
    let mut stage = Stage::default();
    let producer = Producer::new("ours");
    let bare = "insert into bare.outbox (topic_id, partition, bytes, message_id, key, payload)
        select (select topic_id from pgonce.topics where topic = 'ours'), 0, 170, m.id, m.key, m.payload::jsonb
        from unnest($1::text[], $2::text[], $3::text[]) m(id, key, payload)";
    for round in 0..ROUNDS {
        let messages = messages(round)?;
        let started = Instant::now();
        producer.send_all(client, &messages).await?;
        stage.ours.push(started.elapsed());
        let ids: Vec<&str> = messages.iter().map(|message| message.message_id().as_str()).collect();
        let keys: Vec<String> = (0..BATCH).map(|nth| key(round, nth)).collect();
        let payloads: Vec<String> = (0..BATCH).map(|nth| payload(round, nth).to_string()).collect();
        let started = Instant::now();
        client
            .query_typed(bare, &[(&ids, Type::TEXT_ARRAY), (&keys, Type::TEXT_ARRAY), (&payloads, Type::TEXT_ARRAY)])
            .await?;
        stage.bare.push(started.elapsed());
    }
    client.batch_execute("analyze").await?;
    Ok(stage)
}

async fn relay(client: &Client) -> Result<Stage, Box<dyn std::error::Error>> {
    in_turn(
        client,
        "select bare.relay((select topic_id from pgonce.topics where topic = 'ours'), 1000)",
        "select moved::bigint from pgonce.relay('ours', max => 1000)",
    )
    .await
}

/// As [`relay`], against an outbox with a partial index on what is PENDING.
async fn relay_usual(client: &Client) -> Result<Stage, Box<dyn std::error::Error>> {
    let producer = Producer::new("ours");
    for round in ROUNDS..2 * ROUNDS {
        producer.send_all(client, &messages(round)?).await?;
    }
    client
        .batch_execute(
            "insert into usual.outbox select * from pgonce.outbox o where o.status = 'PENDING' order by o.seq;
             analyze",
        )
        .await?;
    in_turn(
        client,
        "select usual.relay((select topic_id from pgonce.topics where topic = 'ours'), 1000)",
        "select moved::bigint from pgonce.relay('ours', max => 1000)",
    )
    .await
}

async fn count(client: &Client) -> Result<Stage, Box<dyn std::error::Error>> {
    in_turn(
        client,
        "select bare.count(
            (select topic_id from pgonce.topics where topic = 'ours'),
            (select consumer_id from pgonce.consumers where consumer = 'ours'), 1000)",
        "with received as materialized (select * from pgonce.receive('ours', 1000)),
        counted as (
            insert into pgonce.word_counts as total (consumer, word, count)
            select 'ours', payload ->> 'word', count(*) from received
            group by 2 order by 2
            on conflict (consumer, word) do update set count = total.count + excluded.count
            returning 1
        )
        select count(*) from counted",
    )
    .await
}

/// Runs a bare and a real batch in turn, each a transaction of its own.
async fn in_turn(client: &Client, bare: &str, ours: &str) -> Result<Stage, Box<dyn std::error::Error>> {
    let mut stage = Stage::default();
    let bare = client.prepare(bare).await?;
    let ours = client.prepare(ours).await?;
    for _ in 0..ROUNDS {
        for (statement, times) in [(&bare, &mut stage.bare), (&ours, &mut stage.ours)] {
            let started = Instant::now();
            let done: i64 = client.query_one(statement, &[]).await?.get(0);
            times.push(started.elapsed());
            assert!(done > 0, "a batch was empty");
        }
    }
    Ok(stage)
}

impl Stage {
    fn print(&self, name: &str) {
        let (bare, ours) = (median(&self.bare), median(&self.ours));
        println!(
            "{name:<13} bare {:>8.0}/s   pgonce {:>8.0}/s   ratio {:.2}",
            rate(bare),
            rate(ours),
            bare.as_secs_f64() / ours.as_secs_f64()
        );
    }
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "a batch is a small number")]
fn rate(batch: Duration) -> f64 {
    BATCH as f64 / batch.as_secs_f64()
}

fn messages(round: usize) -> Result<Vec<Message>, pgonce::Error> {
    (0..BATCH).map(|nth| Ok(Message::json(&payload(round, nth))?.key(key(round, nth)))).collect()
}

fn key(round: usize, nth: usize) -> String {
    format!("key-{}", (round * 7919 + nth * 104_729) % 1_000)
}

fn payload(round: usize, nth: usize) -> serde_json::Value {
    let word = (round * 7919 + nth * 104_729) % WORDS;
    serde_json::json!({ "word": format!("word-{word}"), "padding": "0123456789abcdef".repeat(8) })
}
