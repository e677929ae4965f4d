//! The watch: an idle worker asks little, hears at once, and needs no notification to hear.

use std::time::Instant;

use pgonce::{Consumer, Database, Producer, Relay, Report, Schema, Shutdown, Worker, deadpool_postgres};
use tokio_postgres::Client;

use crate::probe::{WAIT_MAX, eventually, number, sqlstate, texts};
use crate::worker::{APPLIED, CONSUMER, INSERT, TOPIC, keyed, prepared};

const IS_WATCHED: &str = "select coalesce(pgonce.is_watched(), false)::integer::bigint";
/// Transactions that sessions of this database have ended, each a statement of an idle worker.
const STATEMENTS: &str = "select xact_commit from pg_stat_database where datname = current_database()";

/// A worker with a relay and a consumer, until it is told to stop.
struct Working {
    shutdown: Shutdown,
    running: tokio::task::JoinHandle<Result<Report, pgonce::Error>>,
}

impl Working {
    fn start(worker: Worker) -> Self {
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        Self { shutdown, running: tokio::spawn(async move { worker.run(&stop).await }) }
    }

    async fn stop(self) {
        self.shutdown.stop();
        let ended = tokio::time::timeout(WAIT_MAX, self.running).await.expect("it ends");
        ended.expect("no panic").expect("it stops well");
    }
}

fn worker(database: Database) -> Worker {
    Worker::new(database).relay(TOPIC).consumer(Consumer::sql(CONSUMER, INSERT))
}

async fn until_asleep(client: &Client) {
    eventually("the worker sleeps", async || (number(client, IS_WATCHED).await == 1).then_some(())).await;
}

async fn until_applied(client: &Client, count: i64) {
    eventually("all is applied", async || (number(client, APPLIED).await == count).then_some(())).await;
}

/// Watches for a moment, and answers the stages that are due.
async fn due(client: &Client) -> Vec<String> {
    texts(client, "select stage || ' ' || name from pgonce.watch(null, '{c}', 0) order by 1").await
}

#[tokio::test]
async fn an_idle_worker_asks_less_than_20_times_a_second_and_applies_within_50_ms() {
    const ROUNDS: usize = 20;
    let (database, client) = prepared(8).await;
    client.batch_execute("alter table applied add at timestamptz default clock_timestamp()").await.expect("altered");
    let working = Working::start(worker(database.database(1)));
    until_asleep(&client).await;
    let (before, since) = (number(&client, STATEMENTS).await, Instant::now());
    // A slow machine only makes them fewer.
    eventually("three seconds have passed", async || (since.elapsed().as_secs() >= 3).then_some(())).await;
    let statements = number(&client, STATEMENTS).await - before;
    let most = 20 * i64::try_from(since.elapsed().as_secs() + 1).expect("a number");
    assert!(statements <= most, "{statements} statements where {most} are allowed");

    let mut least = f64::MAX;
    for nth in 0..ROUNDS {
        until_asleep(&client).await;
        Producer::new(TOPIC).send(&client, &keyed("k", nth)).await.expect("sent");
        let committed = client.query_one("select clock_timestamp()", &[]).await.expect("a row");
        let committed: std::time::SystemTime = committed.get(0);
        until_applied(&client, i64::try_from(nth + 1).expect("a number")).await;
        let row = client
            .query_one("select extract(epoch from max(at) - $1)::float8 from applied", &[&committed])
            .await
            .expect("a row");
        least = least.min(row.get(0));
    }
    assert!(least < 0.05, "the quickest of {ROUNDS} messages took {least} s");
    working.stop().await;
}

#[tokio::test]
async fn a_worker_is_not_kept_awake_by_the_messages_of_others() {
    const OTHERS: usize = 300;
    let (database, client) = prepared(1).await;
    client.batch_execute("select pgonce.create_topic('others', 1)").await.expect("created");
    let working = Working::start(worker(database.database(1)));
    until_asleep(&client).await;
    let (before, since) = (number(&client, STATEMENTS).await, Instant::now());
    for _ in 0..OTHERS {
        client.batch_execute("select pgonce.enqueue('others', '{}')").await.expect("enqueued");
        client.batch_execute("select pgonce.relay('others')").await.expect("relayed");
    }
    eventually("a second has passed", async || (since.elapsed().as_secs() >= 1).then_some(())).await;
    let statements = number(&client, STATEMENTS).await - before - 2 * i64::try_from(OTHERS).expect("a number");
    let most = 40 * i64::try_from(since.elapsed().as_secs() + 1).expect("a number");
    assert!(statements <= most, "{statements} statements where {most} are allowed");
    working.stop().await;
}

#[tokio::test]
async fn a_worker_that_cannot_be_notified_hears_all_the_same() {
    let (database, client) = prepared(2).await;
    let config: deadpool_postgres::Config = deadpool_postgres::Config {
        url: Some(database.url.clone()),
        pool: Some(deadpool_postgres::PoolConfig::new(5)),
        ..Default::default()
    };
    let pool = config.create_pool(None, tokio_postgres::NoTls).expect("a pool");
    let working = Working::start(worker(Database::new(pool, Schema::default())));
    for nth in 0..3 {
        until_asleep(&client).await;
        Producer::new(TOPIC).send(&client, &keyed("k", nth)).await.expect("sent");
        until_applied(&client, i64::try_from(nth + 1).expect("a number")).await;
    }
    working.stop().await;
}

#[tokio::test]
async fn a_watch_names_what_is_due_and_relay_ends_it() {
    let (database, client) = prepared(2).await;
    assert!(due(&client).await.is_empty());
    Producer::new(TOPIC).send(&client, &keyed("k", 0)).await.expect("sent");
    assert_eq!(due(&client).await, ["relay t"]);
    client.batch_execute("select pgonce.pause_topic('t')").await.expect("paused");
    assert!(due(&client).await.is_empty());
    client.batch_execute("select pgonce.resume_topic('t')").await.expect("resumed");

    client.batch_execute("select pgonce.watch('{}', '{}', 60000)").await.expect("watched");
    assert_eq!(number(&client, IS_WATCHED).await, 1);
    let pool = database.database(1);
    assert_eq!(Relay::topic(TOPIC).step(&pool).await.expect("relayed").moved, 1);
    assert_eq!(number(&client, IS_WATCHED).await, 0);
    // The relay has one more look to take, for its lower bound; more where transactions of other tests are open.
    assert_eq!(due(&client).await, ["consumer c", "relay t"]);
    eventually("the relay has nothing to do", async || {
        Relay::topic(TOPIC).step(&pool).await.expect("relayed");
        (due(&client).await == ["consumer c"]).then_some(())
    })
    .await;
    assert_eq!(Consumer::sql(CONSUMER, INSERT).step(&pool).await.expect("received").applied, 1);
    // The relay has another look to take when a transaction of another test ends.
    assert!(!due(&client).await.contains(&"consumer c".to_owned()));
    assert_eq!(sqlstate(&client, "select pgonce.watch(null, null, 60001)").await, "PO003");
}
