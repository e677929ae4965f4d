//! Workers: any number at once, dropped, stopped and cut off at any moment; each message exactly once and in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{
    Consumer, ConsumerKind, ConsumerSettings, Database, Epoch, ErrorKind, ExternalHandler, Handler, HandlerError,
    Message, Producer, Received, Relay, Schema, Shutdown, Worker, create_consumer, migrate,
};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls, Transaction};

use crate::fixture::TestDatabase;
use crate::probe::{WAIT_MAX, create, eventually, number, numbered, set_default_isolation, texts, word, word_counts};
use crate::programs::outcome;

pub(crate) const TOPIC: &str = "t";
pub(crate) const CONSUMER: &str = "c";
pub(crate) const TABLE: &str =
    "create table applied (id bigint generated always as identity, key text, nth integer not null)";
pub(crate) const INSERT: &str =
    r#"insert into applied (key, nth) select key, (payload ->> 'nth')::integer from received order by "offset""#;
pub(crate) const APPLIED: &str = "select count(*) from applied";
/// Keys of which a message was applied out of order, twice, or not at all. Numbers of a key begin with 0.
pub(crate) const OUT_OF_ORDER: &str = "
    select distinct key from (
      select key, nth, row_number() over (partition by key order by id) - 1 as due from applied) a
    where nth <> due";

/// A topic with a consumer, and the table of its effects.
pub(crate) async fn prepared(partitions: i32) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, partitions, CONSUMER).await;
    client.batch_execute(TABLE).await.expect("created");
    (database, client)
}

/// The message of a key with that number.
pub(crate) fn keyed(key: &str, nth: usize) -> Message {
    Message::json(&json!({ "nth": nth })).expect("JSON").key(key).id(format!("{key} {nth}"))
}

/// Waits until so many were applied.
async fn until_applied(client: &Client, count: i64) {
    eventually("all is applied", async || (number(client, APPLIED).await >= count).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_workers_apply_each_message_once_and_in_the_order_of_its_key() {
    const PRODUCERS: usize = 5;
    const KEYS_PER_PRODUCER: usize = 10;
    const PER_KEY: usize = 400;
    let (database, client) = prepared(8).await;
    let shutdown = Shutdown::new();
    let mut workers = JoinSet::new();
    for _ in 0..8 {
        let stop = shutdown.clone();
        let consumer = Consumer::sql(CONSUMER, INSERT).batch_messages(300);
        let worker = Worker::new(database.database(2)).relay(Relay::topic(TOPIC).batch_messages(400));
        workers.spawn(async move { worker.consumer_with(consumer, 1).run(&stop).await.expect("it stops well") });
    }
    let mut producers = JoinSet::new();
    for producer in 0..PRODUCERS {
        let mut client = database.connect().await;
        producers.spawn(async move {
            let keys: Vec<String> = (0..KEYS_PER_PRODUCER).map(|key| format!("{producer} {key}")).collect();
            for nth in (0..PER_KEY).step_by(5) {
                for will_commit in [nth % 3 != 0, true] {
                    let transaction = client.transaction().await.expect("begun");
                    let batch: Vec<Message> =
                        (nth..nth + 5).flat_map(|nth| keys.iter().map(move |key| keyed(key, nth))).collect();
                    Producer::new(TOPIC).send_all(&transaction, &batch).await.expect("sent");
                    if will_commit {
                        transaction.commit().await.expect("committed");
                        break;
                    }
                    transaction.rollback().await.expect("rolled back");
                }
            }
        });
    }
    producers.join_all().await;
    let total = (PRODUCERS * KEYS_PER_PRODUCER * PER_KEY) as u64;
    until_applied(&client, i64::try_from(total).expect("a number")).await;
    shutdown.stop();
    let reports = workers.join_all().await;
    assert_eq!(reports.iter().map(|report| report.moved).sum::<u64>(), total);
    assert_eq!(reports.iter().map(|report| report.applied).sum::<u64>(), total);
    assert_eq!(number(&client, APPLIED).await.unsigned_abs(), total);
    assert_eq!(texts(&client, OUT_OF_ORDER).await, [""; 0]);
}

/// Counts its calls.
struct Outside(Arc<AtomicUsize>);

impl ExternalHandler for Outside {
    type Payload = serde_json::Value;

    async fn handle(&self, _: Received<Self::Payload>, _: Epoch) -> Result<(), HandlerError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_isolation_level_that_a_database_sets_does_not_matter() {
    for level in ["repeatable read", "serializable"] {
        let (database, client) = prepared(4).await;
        let external = ConsumerSettings { kind: Some(ConsumerKind::External), ..ConsumerSettings::default() };
        create_consumer(&client, &Schema::default(), "outside", Some(TOPIC), external).await.expect("created");
        set_default_isolation(&client, level).await;
        let mut sent: Vec<Message> = (0..300).map(|nth| keyed(&format!("k{}", nth % 10), nth / 10)).collect();
        sent.push(Message::json(&json!({ "nth": "no number" })).expect("JSON").key("other").id("fails"));
        Producer::new(TOPIC).send_all(&client, &sent).await.expect("sent");
        client.batch_execute("update pgonce.consumers set attempts_max = 1").await.expect("set");
        let (calls, shutdown) = (Arc::new(AtomicUsize::default()), Shutdown::new());
        let consumer = Consumer::sql(CONSUMER, INSERT).batch_messages(20).checkpoint_every(Duration::from_secs(1), 1);
        let worker = Worker::new(database.database(8))
            .relay(Relay::topic(TOPIC).batch_messages(50))
            .consumer_with(consumer, 2)
            .consumer(Consumer::external("outside", Outside(Arc::clone(&calls))));
        let stop = shutdown.clone();
        let running = tokio::spawn(async move { worker.run(&stop).await });
        eventually("all is done", async || {
            assert!(!running.is_finished(), "{level}: it ended by itself");
            let done =
                "select concat_ws(' ', (select count(*) from applied), (select count(*) from pgonce.dead_letters),
                exists (select from pgonce.checkpoints), exists (select from pgonce.samples))";
            (texts(&client, done).await == ["300 1 t t"] && calls.load(Ordering::Relaxed) >= 301).then_some(())
        })
        .await;
        shutdown.stop();
        assert_eq!(running.await.expect("no panic").expect("it stops well").applied, 300 + 301, "{level}");
        assert_eq!(texts(&client, OUT_OF_ORDER).await, [""; 0], "{level}");
        for command in [["topic", "purge", TOPIC], ["consumer", "delete", CONSUMER], ["consumer", "delete", "outside"]]
        {
            let arguments = [&command[..], &["--yes", "--database-url", &database.url]].concat();
            let output = outcome(&arguments);
            assert!(output.status.success(), "{level}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Says that it has begun, and goes on when it is let.
struct Gated {
    begun: Arc<Semaphore>,
    gate: Arc<Semaphore>,
}

impl Handler for Gated {
    type Payload = serde_json::Value;

    async fn handle(&self, tx: &Transaction<'_>, _: Received<Self::Payload>) -> Result<(), HandlerError> {
        tx.batch_execute("insert into applied (nth) values (0)").await?;
        self.begun.add_permits(1);
        self.gate.acquire().await?.forget();
        Ok(())
    }
}

#[tokio::test]
async fn a_soft_stop_finishes_the_batch_and_a_hard_stop_drops_it() {
    for is_soft in [true, false] {
        let (database, client) = prepared(1).await;
        Producer::new(TOPIC).send_all(&client, &numbered(3, &[])).await.expect("sent");
        let pool = database.database(3);
        Relay::topic(TOPIC).step(&pool).await.expect("relayed");
        let (begun, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let handler = Gated { begun: Arc::clone(&begun), gate: Arc::clone(&gate) };
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        let worker = Worker::new(pool.clone()).relay(TOPIC).consumer(Consumer::each(CONSUMER, handler));
        let running = tokio::spawn(async move { worker.run(&stop).await });
        begun.acquire().await.expect("the handler is at it").forget();
        // Whatever ends another one of its connections, it is not taken for dead.
        let its_own = "
            select count(*) from pgonce.members join pg_stat_activity using (pid) where application_name like '% member'";
        assert_eq!(number(&client, its_own).await, 1);
        if is_soft {
            shutdown.stop();
            gate.add_permits(3);
        } else {
            shutdown.abort();
        }
        let report = tokio::time::timeout(WAIT_MAX, running).await.expect("it ends").expect("no panic").expect("well");
        let applied = if is_soft { 3 } else { 0 };
        assert_eq!(report.applied, applied);
        eventually("the transaction has ended", async || {
            let holding = "select count(*) from pg_stat_activity where datname = current_database() and backend_xid is not null and pid <> pg_backend_pid()";
            (number(&client, holding).await == 0).then_some(())
        })
        .await;
        assert_eq!(number(&client, APPLIED).await.unsigned_abs(), applied);
        let consumer = Consumer::sql(CONSUMER, "insert into applied (nth) select 1 from received");
        // A receive that was under way when it was dropped may still hold the partition for a moment.
        eventually("the rest comes again", async || {
            consumer.step(&pool).await.expect("a step");
            (number(&client, APPLIED).await == 3).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn what_time_does_not_mend_ends_the_worker_and_all_its_stages() {
    let (database, client) = prepared(1).await;
    let shutdown = Shutdown::new();
    let worker =
        Worker::new(database.database(4)).relay("elsewhere").relay(TOPIC).consumer(Consumer::word_count(CONSUMER));
    let error = tokio::time::timeout(WAIT_MAX, worker.run(&shutdown)).await.expect("it ends").expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownTopic);
    let worker = Worker::new(database.database(4)).relay(TOPIC).consumer(Consumer::word_count("nobody"));
    let error =
        tokio::time::timeout(WAIT_MAX, worker.run(&Shutdown::new())).await.expect("it ends").expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownConsumer);
    client.batch_execute("drop schema pgonce cascade").await.expect("dropped");
    let worker = Worker::new(database.database(1)).relay(TOPIC);
    let error =
        tokio::time::timeout(WAIT_MAX, worker.run(&Shutdown::new())).await.expect("it ends").expect_err("no schema");
    assert_eq!(error.kind(), ErrorKind::SchemaMissing);
}

/// Panics.
struct Panicking;

impl Handler for Panicking {
    type Payload = serde_json::Value;

    async fn handle(&self, _: &Transaction<'_>, _: Received<Self::Payload>) -> Result<(), HandlerError> {
        panic!("a defect of the handler");
    }
}

#[tokio::test]
async fn a_panic_of_a_handler_is_a_failure_of_its_message() {
    let (database, client) = prepared(1).await;
    Producer::new(TOPIC).send_all(&client, &numbered(3, &[])).await.expect("sent");
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = Worker::new(database.database(3)).relay(TOPIC).consumer(Consumer::each(CONSUMER, Panicking));
    let running = tokio::spawn(async move { worker.run(&stop).await });
    let parked = "select count(*) from pgonce.blocked_keys where error = 'the handler panicked'";
    eventually("all are parked", async || (number(&client, parked).await == 3).then_some(())).await;
    shutdown.stop();
    let report = running.await.expect("no panic").expect("it stops well");
    assert_eq!(report.applied, 0);
    assert!(report.failed >= 3, "{report:?}");
}

#[tokio::test]
async fn a_failure_that_is_mended_later_is_got_over() {
    let (database, client) = prepared(1).await;
    client.batch_execute("alter table applied rename to away").await.expect("in the way");
    Producer::new(TOPIC).send_all(&client, &(0..3).map(|nth| keyed("k", nth)).collect::<Vec<_>>()).await.expect("sent");
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = Worker::new(database.database(3)).relay(TOPIC).consumer(Consumer::sql(CONSUMER, INSERT));
    let running = tokio::spawn(async move { worker.run(&stop).await });
    // The relay is not held up by a consumer that fails.
    eventually("it is relayed", async || {
        (number(&client, "select sent from pgonce.outbox_status").await == 3).then_some(())
    })
    .await;
    client.batch_execute("alter table away rename to applied").await.expect("mended");
    until_applied(&client, 3).await;
    shutdown.stop();
    let report = running.await.expect("no panic").expect("it stops well");
    assert_eq!((report.moved, report.applied), (3, 3));
    assert_eq!(texts(&client, OUT_OF_ORDER).await, [""; 0]);
}

/// Sends a word until the server has said that it has it.
async fn send_for_sure(pool: &Database, message: &Message) {
    eventually("the server takes a message", async || {
        let session = pool.session().await.ok()?;
        let sent = Producer::new(TOPIC).send(&*session, message).await.ok()?;
        session.give_back();
        Some(sent)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_survives_the_crash_of_the_server_by_itself() {
    const WORDS: usize = 1_500;
    const CRASHES_AFTER: [usize; 2] = [400, 900];
    let start = || PrivateServer::start(&Options::default()).expect("a server starts");
    let server = tokio::task::spawn_blocking(start).await.expect("no panic");
    let url = server.url("pgonce");
    let pool = Database::connect(&url, Schema::default(), 6).expect("a good URL");
    let mut session = pool.session().await.expect("a session");
    migrate(&mut session, pool.schema()).await.expect("migrated");
    create(&session, TOPIC, 4, CONSUMER).await;
    session.give_back();

    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = Worker::new(pool.clone()).relay(TOPIC).consumer(Consumer::word_count(CONSUMER).batch_messages(50));
    let running = tokio::spawn(async move { worker.run(&stop).await });
    let texts = ["one", "two", "three", "four", "five", "six", "seven"];
    let mut expected = BTreeMap::new();
    let mut restarted = tokio::spawn(async move { server });
    for nth in 0..WORDS {
        if CRASHES_AFTER.contains(&nth) {
            let mut server = restarted.await.expect("no panic");
            // Sending goes on meanwhile.
            restarted = tokio::task::spawn_blocking(move || {
                server.restart_hard().expect("it starts again");
                server
            });
        }
        let text = texts[nth % texts.len()];
        send_for_sure(&pool, &word(text).id(format!("w{nth}"))).await;
        *expected.entry(text.to_owned()).or_insert(0) += 1;
    }
    let server = restarted.await.expect("no panic");
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("the server is back");
    tokio::spawn(connection);
    let counted = "select coalesce(sum(count), 0)::bigint from pgonce.word_counts";
    let total = i64::try_from(WORDS).expect("a number");
    eventually("all words are counted", async || (number(&client, counted).await >= total).then_some(())).await;
    shutdown.stop();
    tokio::time::timeout(WAIT_MAX, running).await.expect("it ends").expect("no panic").expect("it stops well");
    assert_eq!(word_counts(&client, CONSUMER).await, expected);
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("the server stops");
}

#[tokio::test]
async fn a_consumer_is_woken_by_a_relay_of_its_process() {
    const ROUNDS: usize = 10;
    let (database, client) = prepared(1).await;
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = Worker::new(database.database(3)).relay(TOPIC).consumer(Consumer::sql(CONSUMER, INSERT));
    let running = tokio::spawn(async move { worker.run(&stop).await });
    let lagging = "select extract(epoch from max(clock_timestamp() - q.enqueued_at))::float8 from pgonce.queue q";
    let mut least = f64::MAX;
    for nth in 0..ROUNDS {
        Producer::new(TOPIC).send(&client, &keyed("k", nth)).await.expect("sent");
        until_applied(&client, i64::try_from(nth + 1).expect("a number")).await;
        let row = client.query_one(&format!("{lagging} where q.\"offset\" = {}", nth + 1), &[]).await.expect("a row");
        least = least.min(row.get(0));
    }
    shutdown.stop();
    running.await.expect("no panic").expect("it stops well");
    assert!(least < Duration::from_secs(1).as_secs_f64(), "the quickest of {ROUNDS} messages took {least} s");
}
