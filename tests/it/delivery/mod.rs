//! Delivery modes: each does what its name says, wherever a process, a connection or a message fails.

mod failing;
mod handover;
mod killed;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgonce::{
    BatchHandler, Consumed, Consumer, Database, Delivery, Epoch, ErrorKind, ExternalHandler, Handler, HandlerError,
    Message, Producer, Received, Relay, Shutdown, Worker,
};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio_postgres::{Client, Transaction};

use crate::cancellation::polled;
use crate::fixture::TestDatabase;
use crate::probe::{WAIT_MAX, create, eventually, idle_in_transaction, number, set_default_isolation, sqlstate, texts};

const TOPIC: &str = "t";
const CONSUMER: &str = "c";
/// A COMMIT of an effect passes gate 3 1, one of an offset gate 3 2: whoever holds its lock stops it there.
const TABLES: &str = "
    create table applied (id bigint generated always as identity, key text not null, nth integer not null);
    create function gate() returns trigger language plpgsql as $$
    begin
      perform pg_advisory_lock_shared(3, tg_argv[0]::integer), pg_advisory_unlock_shared(3, tg_argv[0]::integer);
      return null;
    end $$;
    create constraint trigger effects after insert on applied
    deferrable initially deferred for each row execute function gate(1);
    create constraint trigger records after insert on pgonce.progress
    deferrable initially deferred for each row execute function gate(2)";
const APPLIED: &str = "select key || nth from applied order by id";
const DEAD: &str = r#"select message_id from pgonce.dead_letters where state = 'dead' order by "offset""#;
const PARKED: &str = r#"select message_id from pgonce.parked where taken_by is null order by "offset""#;
/// What waits for one of the gates.
const WAITING: &str = "select pid from pg_locks where locktype = 'advisory' and not granted
    and database = (select oid from pg_database where datname = current_database())";
const BATCH: i32 = 5;
const MESSAGES: &str = "a0 b1 a2 b3 a4 b5 a6 b7 a8 b9 a10 b11";

#[derive(Clone, Serialize, Deserialize)]
struct Task {
    nth: i32,
    fate: String,
}

/// Notes each call in a file, where no rollback reaches it, and does what the message says.
struct Noting(PathBuf);

impl Noting {
    fn note(&self, message: &Received<Task>) -> Result<(), HandlerError> {
        let mut file = OpenOptions::new().append(true).create(true).open(&self.0)?;
        Ok(file.write_all(format!("{}\n", message.message_id).as_bytes())?)
    }

    async fn act(&self, tx: &Transaction<'_>, message: &Received<Task>) -> Result<(), HandlerError> {
        let Task { nth, fate } = &message.payload;
        let gate = "select pg_advisory_lock_shared($1, $2), pg_advisory_unlock_shared($1, $2)";
        tx.execute(gate, &[&1, nth]).await?;
        tx.execute("insert into applied (key, nth) values ($1, $2)", &[&message.key, nth]).await?;
        tx.execute(gate, &[&2, nth]).await?;
        match fate.as_str() {
            "" => Ok(()),
            "panics" => panic!("as the message says"),
            "hangs" => std::future::pending().await,
            "sleeps" => Ok(tx.batch_execute("select pg_sleep(60)").await?),
            "divides" => Ok(tx.batch_execute("select 1 / 0").await?),
            "swallows" => {
                tx.batch_execute("select 1 / 0").await.expect_err("refused");
                Ok(())
            }
            "misses" => Ok(tx.batch_execute("insert into away default values").await?),
            "is cut" => Ok(tx.batch_execute("select pg_terminate_backend(pg_backend_pid())").await?),
            "commits" => Ok(tx.batch_execute("commit").await?),
            "aborts" => std::process::abort(),
            other => Err(format!("it {other}").into()),
        }
    }
}

impl Handler for Noting {
    type Payload = Task;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Task>) -> Result<(), HandlerError> {
        self.note(&message)?;
        self.act(tx, &message).await
    }
}

impl BatchHandler for Noting {
    type Payload = Task;

    async fn handle(&self, tx: &Transaction<'_>, messages: Vec<Received<Task>>) -> Result<(), HandlerError> {
        for message in &messages {
            self.note(message)?;
        }
        for message in &messages {
            self.act(tx, message).await?;
        }
        Ok(())
    }
}

struct World {
    database: TestDatabase,
    client: Client,
    directory: TempDir,
}

impl World {
    /// Messages `a0 a1! b2`: the first letter is the key, and what follows `!` the fate.
    async fn new(partitions: i32, messages: &str) -> Self {
        let database = TestDatabase::new().await;
        let client = database.connect().await;
        create(&client, TOPIC, partitions, "another").await;
        let create =
            "select pgonce.create_consumer('c', 't', attempts_max => 3, backoff_min_ms => 1, backoff_max_ms => 1)";
        client.batch_execute(&format!("{create}; {TABLES}")).await.expect("created");
        let world = Self { database, client, directory: tempfile::tempdir().expect("a directory") };
        world.publish(messages).await;
        world
    }

    async fn publish(&self, messages: &str) {
        let message = |text: &str| {
            let (id, fate) = text.split_once('!').unwrap_or((text, ""));
            let task = Task { nth: id[1..].parse().expect("a number"), fate: fate.replace('_', " ") };
            Message::json(&task).expect("JSON").id(id).key(&id[..1])
        };
        let messages: Vec<Message> = messages.split_whitespace().map(message).collect();
        Producer::new(TOPIC).send_all(&self.client, &messages).await.expect("sent");
        let pool = self.database.database(1);
        while Relay::topic(TOPIC).step(&pool).await.expect("relayed").moved > 0 {}
    }

    fn calls(&self) -> PathBuf {
        self.directory.path().join("calls")
    }

    fn consumer(&self, delivery: Delivery, is_batch: bool) -> Consumer {
        consumer(&self.calls(), delivery, is_batch)
    }

    /// How often each message was handed to a handler.
    fn called(&self) -> BTreeMap<String, usize> {
        let mut called = BTreeMap::new();
        for id in std::fs::read_to_string(self.calls()).unwrap_or_default().lines() {
            *called.entry(id.to_owned()).or_default() += 1;
        }
        called
    }

    async fn joined(&self, query: &str) -> String {
        texts(&self.client, query).await.join(" ")
    }

    /// Closes a gate, until the session ends that is answered.
    async fn close_gate(&self, gate: (i32, i32)) -> Client {
        let holder = self.database.connect().await;
        holder.execute("select pg_advisory_lock($1, $2)", &[&gate.0, &gate.1]).await.expect("locked");
        holder
    }

    async fn until_waiting(&self) -> i32 {
        eventually("somebody waits at the gate", async || {
            self.client.query(WAITING, &[]).await.expect("an answer").first().map(|row| row.get(0))
        })
        .await
    }

    /// What is recorded as processed is neither parked nor dead, and the counters say so.
    async fn assert_books(&self) {
        let books = "
            select array[
              (select received from pgonce.consumer_lag where consumer = 'c'),
              (select dead from pgonce.consumer_lag where consumer = 'c')]
            = array[
              (select count(*) from pgonce.processed_ids p join pgonce.consumers c using (consumer_id) where c.consumer = 'c'),
              (select count(*) from pgonce.dead_letters where state = 'dead')]
            and not exists (select from pgonce.consumer_partitions p
              cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) n where n.handler is not null)
            and not exists (
              select from pgonce.processed_ids p
              join (select message_id, consumer_id from pgonce.dead_letters where state = 'dead'
                    union all select message_id, consumer_id from pgonce.parked where taken_by is null) o
              using (consumer_id, message_id))";
        assert!(self.client.query_one(books, &[]).await.expect("the books").get::<_, bool>(0));
    }
}

fn consumer(calls: &Path, delivery: Delivery, is_batch: bool) -> Consumer {
    let handler = Noting(calls.to_owned());
    let consumer = if is_batch { Consumer::batch(CONSUMER, handler) } else { Consumer::each(CONSUMER, handler) };
    consumer.delivery(delivery).batch_messages(BATCH).message_timeout(Duration::from_secs(20))
}

/// Steps until there is nothing to do; answers what all of them did.
async fn drain(pool: &Database, consumer: &Consumer) -> Consumed {
    let mut all = Consumed::default();
    let mut idle = 0;
    for _ in 0..200 {
        let step = consumer.step(pool).await.expect("a step");
        all.applied += step.applied;
        all.failed += step.failed;
        // What failed is due again after a millisecond at the most.
        idle = if step == Consumed::default() { idle + 1 } else { 0 };
        if idle == 3 {
            return all;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("there is no end to it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_keep_their_order_with_many_loops() {
    const PER_KEY: usize = 60;
    let ids: Vec<String> =
        (0..PER_KEY).flat_map(|nth| ["a", "b", "c", "d", "e"].map(|key| format!("{key}{nth}"))).collect();
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let world = World::new(3, &ids.join(" ")).await;
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        let worker = Worker::new(world.database.database(4));
        let worker = worker.consumer_with(world.consumer(delivery, false), 6);
        assert_eq!(worker.connections(), 2 * 6 + 3);
        let running = tokio::spawn(async move { worker.run(&stop).await });
        let total = i64::try_from(ids.len()).expect("few");
        eventually("all is applied", async || {
            (number(&world.client, "select count(*) from applied").await == total).then_some(())
        })
        .await;
        shutdown.stop();
        let report = running.await.expect("no panic").expect("it stops well");
        assert_eq!((report.applied, report.failed), (total.unsigned_abs(), 0));
        let out_of_order = "
            select key || nth from (
              select key, nth, row_number() over (partition by key order by id) - 1 as due from applied) a
            where nth <> due";
        assert_eq!(texts(&world.client, out_of_order).await, [""; 0], "{delivery:?}");
        world.assert_books().await;
    }
}

#[tokio::test]
async fn steps_that_need_two_connections_do_not_wait_for_each_other_for_ever() {
    let world = World::new(4, MESSAGES).await;
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let pool = world.database.database(2);
        let consumer = world.consumer(delivery, false);
        let step = || consumer.step(&pool);
        let steps = tokio::join!(step(), step(), step(), step(), step(), step());
        for step in [steps.0, steps.1, steps.2, steps.3, steps.4, steps.5] {
            step.expect("two connections were free in time");
        }
        let error = consumer.step(&world.database.database(1)).await.expect_err("one is not enough");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    eventually("no transaction is open", async || (idle_in_transaction(&world.client).await == 0).then_some(())).await;
}

#[tokio::test]
async fn effects_are_rolled_back_where_they_could_not_be_recorded_any_more() {
    let world = World::new(1, "a0 a1").await;
    let holder = world.close_gate((2, 1)).await;
    let pool = world.database.database(2);
    let consumer = world.consumer(Delivery::AtLeastOnce, false);
    let (step, ()) = tokio::join!(consumer.step(&pool), async {
        let handling = world.until_waiting().await;
        // The session that has received is idle meanwhile, and an operator, or a timeout, may end it.
        let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity
            where datname = current_database() and state = 'idle in transaction' and pid <> $1";
        assert_eq!(world.client.query_one(end, &[&handling]).await.expect("ended").get::<_, i64>(0), 1);
        drop(holder);
    });
    step.expect_err("its transaction is gone");
    eventually("the other one is rolled back", async || (idle_in_transaction(&world.client).await == 0).then_some(()))
        .await;
    assert_eq!(world.joined(APPLIED).await, "");
    assert_eq!(drain(&pool, &consumer).await.applied, 2);
    assert_eq!(world.joined(APPLIED).await, "a0 a1");
}

#[tokio::test]
async fn steps_that_are_dropped_at_any_moment_keep_to_their_mode() {
    const ROUNDS: usize = 60;
    const POLLS_MAX: usize = 30;
    let ids: Vec<String> = (0..200).map(|nth| format!("{}{nth}", ["a", "b", "c"][nth % 3])).collect();
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let world = World::new(1, &ids.join(" ")).await;
        let pool = world.database.database(2);
        let consumer = world.consumer(delivery, false).batch_messages(2);
        let mut dropped = 0;
        for round in 0..ROUNDS {
            let step = polled(1 + round * 7 % POLLS_MAX, consumer.step(&pool)).await;
            dropped += usize::from(step.inspect(|step| assert!(step.is_ok(), "{step:?}")).is_none());
        }
        assert!(dropped > ROUNDS / 2, "{dropped} dropped");
        // What was dropped last may still be at it.
        eventually("all is settled", async || {
            let step = consumer.step(&pool).await.expect("a step");
            let left = "select lag + parked from pgonce.consumer_lag where consumer = 'c'";
            (step == Consumed::default() && number(&world.client, left).await == 0).then_some(())
        })
        .await;
        world.assert_books().await;
        let applied = number(&world.client, "select count(distinct nth) from applied").await;
        let dead = number(&world.client, "select count(*) from pgonce.dead_letters").await;
        assert_eq!(applied + dead, 200, "{delivery:?}");
        if delivery == Delivery::AtMostOnce {
            assert_eq!(number(&world.client, "select count(*) from applied").await, applied, "doubled");
            assert!(world.called().values().all(|&times| times == 1));
        } else {
            assert_eq!(dead, 0);
        }
    }
}

#[tokio::test]
async fn the_isolation_level_that_is_set_for_a_database_does_not_matter() {
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let world = World::new(1, "a0 b1!fails a2 b3 a4 a5 a6").await;
        set_default_isolation(&world.client, "repeatable read").await;
        let consumer = world.consumer(delivery, false);
        assert_eq!(drain(&world.database.database(2), &consumer).await.applied, 6);
        assert_eq!(world.joined(DEAD).await, "b1", "{delivery:?}");
        world.assert_books().await;
    }
}

#[tokio::test]
async fn the_mode_is_written_down_and_waits_for_nobody() {
    const DECLARED: &str = "select delivery from pgonce.consumers where consumer = 'c'";
    let world = World::new(1, "a0 a1 a2 a3 a4 a5").await;
    let pool = world.database.database(2);
    let holder = world.database.connect().await;
    let mut before = "exactly_once".to_owned();
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce, Delivery::ExactlyOnce] {
        let consumer = world.consumer(delivery, false).batch_messages(1);
        holder.batch_execute("begin; select from pgonce.consumers for no key update").await.expect("locked");
        assert_eq!(consumer.step(&pool).await.expect("nobody waits").applied, 1);
        assert_eq!(world.joined(DECLARED).await, before);
        holder.batch_execute("rollback").await.expect("free");
        assert_eq!(consumer.step(&pool).await.expect("a step").applied, 1);
        delivery.name().clone_into(&mut before);
        assert_eq!(world.joined(DECLARED).await, before);
    }
    // Of two that run it the weaker one counts, whoever began later.
    let weaker = world.consumer(Delivery::AtMostOnce, false);
    for _ in 0..2 {
        weaker.step(&pool).await.expect("a step");
        assert_eq!(world.joined(DECLARED).await, "at_most_once");
        world.consumer(Delivery::ExactlyOnce, false).step(&pool).await.expect("a step");
        assert_eq!(world.joined(DECLARED).await, "exactly_once");
    }
    for (arguments, expected) in [
        ("'c', 'twice'", "PO003"),
        ("'c', null", "PO003"),
        ("null, 'exactly_once'", "PO002"),
        ("'inbox', 'exactly_once'", "PO007"),
    ] {
        let set = format!("select pgonce.create_consumer('inbox'); select pgonce.set_delivery({arguments})");
        assert_eq!(sqlstate(&world.client, &set).await, expected, "{arguments}");
    }
}

struct Outside;

impl ExternalHandler for Outside {
    type Payload = Task;

    async fn handle(&self, _: Received<Task>, _: Epoch) -> Result<(), HandlerError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_mode_that_a_consumer_cannot_have_is_refused() {
    let world = World::new(1, "a0").await;
    let pool = world.database.database(2);
    for delivery in [Delivery::AtLeastOnce, Delivery::AtMostOnce] {
        let consumers = || {
            [Consumer::sql(CONSUMER, "select"), Consumer::word_count(CONSUMER), Consumer::external(CONSUMER, Outside)]
        };
        for consumer in consumers() {
            let error = consumer.delivery(delivery).step(&pool).await.expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(delivery.name()) && error.hint().is_some(), "{error}");
        }
        for consumer in consumers() {
            let worker = Worker::new(pool.clone()).consumer(consumer.delivery(delivery));
            let ended = tokio::time::timeout(WAIT_MAX, worker.run(&Shutdown::new())).await;
            let error = ended.expect("it does not start").expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
    assert_eq!(number(&world.client, "select count(*) from pgonce.processed_ids").await, 0);
}
