//! Leases: effects outside of the database, at least once, by one owner of each partition at a time.

use std::process::{Command, Stdio};
use std::time::Duration;

use pgonce::{
    Consumer, ConsumerKind, ConsumerSettings, Database, Epoch, ErrorKind, ExternalHandler, Failure, HandlerError,
    Message, Producer, Received, Schema, Shutdown, Worker, create_consumer,
};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, idle_in_transaction, number, pid_of, sqlstate, texts};

const TOPIC: &str = "t";
const ONE: &str = "11111111-1111-4111-8111-111111111111";
const OTHER: &str = "22222222-2222-4222-8222-222222222222";
/// Time that no test outlasts.
const LONG: i32 = 3_600_000;
/// Ends the time of all leases.
const EXPIRE: &str = "update pgonce.leases set leased_until = '-infinity' where owner is not null";
/// Makes all that waits for its time due.
const HURRY: &str = "update pgonce.parked set due_at = clock_timestamp() where due_at is not null";
/// What the database knows of the consumer, but for the counter of refused writes.
const BOOKS: &str = r"
    select p::text from pgonce.progress p
    union all select p::text from pgonce.parked p
    union all select p::text from pgonce.processed_ids p
    union all select d::text from pgonce.dead_letters d
    union all select jsonb_set(to_jsonb(l), '{fenced}', '0')::text from pgonce.leases l
    order by 1";

/// The same without the leases.
const BOOKS_BUT_LEASES: &str = "
    select p::text from pgonce.progress p
    union all select p::text from pgonce.parked p
    union all select p::text from pgonce.processed_ids p
    union all select d::text from pgonce.dead_letters d
    order by 1";
/// Names the database to the child.
const URL: &str = "PGONCE_TEST_CHILD_URL";

/// An external consumer with messages whose keys are the letters with which their ids begin; `-` for none.
async fn world(partitions: i32, policy: &str, ids: &str) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, partitions, "another").await;
    let create = format!(
        "select pgonce.create_consumer('c', 't', kind => 'external', failure_policy => '{policy}', attempts_max => 3,
                                       backoff_min_ms => 86400000, backoff_max_ms => 86400000)"
    );
    client.batch_execute(&create).await.expect("created");
    if !ids.is_empty() {
        publish(&client, ids).await;
    }
    (database, client)
}

async fn publish(client: &Client, ids: &str) {
    let enqueue = "select pgonce.enqueue('t', '{}', key => nullif(left(id, 1), '-'), message_id => id)
                   from unnest(string_to_array($1, ' ')) with ordinality as i(id, nth) order by nth";
    client.execute(enqueue, &[&ids]).await.expect("sent");
    client.batch_execute("select pgonce.relay()").await.expect("relayed");
}

/// Takes what there is; answers partitions and epochs.
async fn acquire(client: &Client, member: &str) -> Vec<String> {
    let acquire = format!(
        "select partition || ' ' || epoch from pgonce.acquire('c', '{member}', 1024, {LONG}) order by partition"
    );
    texts(client, &acquire).await
}

/// The ids that peek answers for partition 0.
async fn peek(client: &Client, epoch: i64) -> String {
    texts(client, &format!("select message_id from pgonce.peek('c', 0, {epoch})")).await.join(" ")
}

async fn ack(client: &Client, epoch: i64, from: i64, to: i64) -> String {
    let ack = format!(
        "select outcome || ' ' || coalesce(next_offset::text, '') from pgonce.ack('c', 0, {epoch}, {from}, {to})"
    );
    texts(client, &ack).await.remove(0)
}

async fn nack(client: &Client, epoch: i64, offset: i64) -> String {
    texts(client, &format!("select outcome from pgonce.nack('c', 0, {epoch}, {offset}, 'bad')")).await.remove(0)
}

#[tokio::test]
async fn every_acquisition_raises_the_epoch_and_a_stale_one_changes_nothing() {
    let (_database, client) = world(1, "park_key", "a1 b1 a2").await;
    assert_eq!(acquire(&client, ONE).await, ["0 1"]);
    assert_eq!(acquire(&client, OTHER).await, [""; 0], "its time is not over");
    assert_eq!(peek(&client, 1).await, "a1 b1 a2");
    client.batch_execute(EXPIRE).await.expect("expired");
    // Nobody else has acquired it: it is still his.
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 2");
    assert_eq!(acquire(&client, OTHER).await, ["0 2"]);
    let books = texts(&client, BOOKS).await;
    assert_eq!(peek(&client, 1).await, "");
    assert_eq!(ack(&client, 1, 2, 2).await, "fenced ");
    assert_eq!(nack(&client, 1, 2).await, "fenced");
    for call in ["renew('c', 0, 1, 1000)", "release('c', 0, 1)"] {
        assert_eq!(texts(&client, &format!("select outcome from pgonce.{call}")).await, ["fenced"], "{call}");
    }
    assert_eq!(texts(&client, BOOKS).await, books);
    assert_eq!(number(&client, "select fenced from pgonce.consumer_leases").await, 5);
    assert_eq!(texts(&client, "select outcome from pgonce.release('c', 0, 2)").await, ["released"]);
    assert_eq!(ack(&client, 2, 2, 2).await, "fenced ", "it was given back");
    assert_eq!(acquire(&client, ONE).await, ["0 3"]);
}

#[tokio::test]
async fn the_verbs_of_one_kind_refuse_the_other() {
    let (_database, client) = world(1, "park_key", "a1").await;
    client.batch_execute("select pgonce.create_consumer('inbox')").await.expect("created");
    for call in [
        "receive('c')",
        "open_batch('c')",
        "fail('c', 0, 1, 'bad')",
        "process_once('c', 'a1')",
        "acquire('another', gen_random_uuid(), 1, 1000)",
        "peek('another', 0, 1)",
        "ack('another', 0, 1, 1, 1)",
        "nack('another', 0, 1, 1, 'bad')",
        "renew('another', 0, 1, 1000)",
        "release('another', 0, 1)",
        "acquire('inbox', gen_random_uuid(), 1, 1000)",
    ] {
        assert_eq!(sqlstate(&client, &format!("select pgonce.{call}")).await, "PO007", "{call}");
    }
    for (call, code) in [
        ("create_consumer('c', 't', kind => 'transactional')", "PO006"),
        ("create_consumer('another', 't', kind => 'external')", "PO006"),
        ("create_consumer('new', kind => 'external')", "PO003"),
        ("create_consumer('new', 't', kind => 'both')", "PO003"),
        ("acquire('c', null, 1, 1000)", "PO003"),
        ("acquire('c', gen_random_uuid(), 0, 1000)", "PO003"),
        ("acquire('c', gen_random_uuid(), 1, 0)", "PO003"),
        ("peek('c', 0, 1, 0)", "PO003"),
        ("peek('c', 1, 1)", "PO003"),
        ("ack('c', 0, 1, 2, 1)", "PO003"),
        ("renew('c', 0, 1, null)", "PO003"),
        ("acquire('unknown', gen_random_uuid(), 1, 1000)", "PO002"),
    ] {
        assert_eq!(sqlstate(&client, &format!("select pgonce.{call}")).await, code, "{call}");
    }
    client
        .batch_execute("select pgonce.create_consumer('c', 't'), pgonce.create_consumer('c', 't', kind => 'external')")
        .await
        .expect("as it is");
    for verb in
        ["acquire('c', gen_random_uuid(), 1, 1000)", "peek('c', 0, 1)", "ack('c', 0, 1, 1, 1)", "renew('c', 0, 1, 1)"]
    {
        let above = format!("begin isolation level repeatable read; select pgonce.{verb}");
        assert_eq!(sqlstate(&client, &above).await, "PO010", "{verb}");
        client.batch_execute("rollback").await.expect("rolled back");
    }
    let (schema, external) = (Schema::default(), Some(ConsumerKind::External));
    let settings = ConsumerSettings { kind: external, ..ConsumerSettings::default() };
    create_consumer(&client, &schema, "c", Some(TOPIC), settings).await.expect("as it is");
    let error = create_consumer(&client, &schema, "another", Some(TOPIC), settings).await;
    assert_eq!(error.expect_err("transactional").kind(), ErrorKind::Conflict);
    client.batch_execute("select pgonce.drop_consumer('c')").await.expect("dropped");
    assert_eq!(number(&client, "select count(*) from pgonce.leases").await, 0);
}

#[tokio::test]
async fn with_park_key_a_key_waits_in_order_and_all_others_flow_on() {
    let (_database, client) = world(1, "park_key", "a1 b1 a2 b2 -3 c1").await;
    acquire(&client, ONE).await;
    assert_eq!(peek(&client, 1).await, "a1 b1 a2 b2 -3 c1");
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 2");
    assert_eq!(nack(&client, 1, 2).await, "parked");
    assert_eq!(peek(&client, 1).await, "a2 -3 c1");
    // Acknowledged with what was left out among them.
    assert_eq!(ack(&client, 1, 3, 6).await, "acked 7");
    assert_eq!(ack(&client, 1, 3, 6).await, "gone 7", "its answer was lost");
    assert_eq!(ack(&client, 1, 8, 9).await, "gone 7");
    publish(&client, "b3 d1").await;
    assert_eq!(peek(&client, 1).await, "d1");
    assert_eq!(ack(&client, 1, 8, 8).await, "acked 9");
    assert_eq!(ack(&client, 1, 4, 4).await, "gone 9", "it waits behind another one");
    for (expected, offset) in [("b1", 2), ("b2", 4), ("b3", 7)] {
        assert_eq!(peek(&client, 1).await, if offset == 2 { "" } else { expected }, "not due yet");
        client.batch_execute(HURRY).await.expect("hurried");
        assert_eq!(peek(&client, 1).await, expected);
        assert_eq!(ack(&client, 1, offset, offset).await, "acked 9");
        assert_eq!(ack(&client, 1, offset, offset).await, "gone 9");
    }
    let lag = "select lag || ' ' || received || ' ' || failures || ' ' || parked from pgonce.consumer_lag where consumer = 'c'";
    assert_eq!(texts(&client, lag).await, ["0 8 1 0"]);
    assert_eq!(number(&client, "select count(*) from pgonce.processed_ids").await, 8);
}

#[tokio::test]
async fn what_waits_at_the_offset_never_hides_what_is_behind_it() {
    let (_database, client) = world(1, "park_key", "a1 a2 a3 b1 a4").await;
    acquire(&client, ONE).await;
    assert_eq!(nack(&client, 1, 1).await, "parked");
    // Looked at in pieces that are all of the key that waits.
    let one_by_one = "select message_id from pgonce.peek('c', 0, 1, max => 1)";
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.extend(texts(&client, one_by_one).await);
    }
    assert_eq!(seen, ["b1", "b1"]);
    // Where the failed one stands alone at the end, it comes back all the same.
    assert_eq!(ack(&client, 1, 4, 4).await, "acked 5");
    peek(&client, 1).await;
    client.batch_execute(HURRY).await.expect("hurried");
    for (id, offset) in [("a1", 1), ("a2", 2), ("a3", 3), ("a4", 5)] {
        assert_eq!(peek(&client, 1).await, id);
        assert_eq!(ack(&client, 1, offset, offset).await, "acked 6");
    }
}

#[tokio::test]
async fn with_block_the_partition_waits_and_with_skip_only_the_message() {
    for (policy, first, then) in [("block", "", "b1"), ("skip", "c1 b2", "b1")] {
        let (_database, client) = world(1, policy, "a1 b1 c1 b2").await;
        acquire(&client, ONE).await;
        assert_eq!(ack(&client, 1, 1, 1).await, "acked 2");
        assert_eq!(nack(&client, 1, 2).await, "parked");
        peek(&client, 1).await;
        assert_eq!(peek(&client, 1).await, first, "{policy}");
        client.batch_execute(HURRY).await.expect("hurried");
        assert_eq!(peek(&client, 1).await, then, "{policy}");
        assert_eq!(ack(&client, 1, 2, 2).await, "acked 3");
        assert_eq!(peek(&client, 1).await, "c1 b2", "{policy}");
        assert_eq!(ack(&client, 1, 3, 4).await, "acked 5");
    }
}

#[tokio::test]
async fn after_its_last_attempt_a_message_is_dead_and_can_be_replayed() {
    let (_database, client) = world(1, "park_key", "a1 a2").await;
    acquire(&client, ONE).await;
    for outcome in ["parked", "parked", "dead", "gone"] {
        assert_eq!(nack(&client, 1, 1).await, outcome);
    }
    assert_eq!(peek(&client, 1).await, "a2");
    let replay = "select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    client.batch_execute(replay).await.expect("replayed");
    // It was handed out before the other one began to wait: it is done.
    assert_eq!(ack(&client, 1, 2, 2).await, "acked 3");
    assert_eq!(peek(&client, 1).await, "a1");
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 3");
    assert_eq!(peek(&client, 1).await, "");
}

#[tokio::test]
async fn a_lost_ack_repeats_the_message_with_the_same_id_and_counts_no_attempt() {
    let (_database, client) = world(1, "park_key", "a1").await;
    acquire(&client, ONE).await;
    let look = |epoch: i64| format!("select message_id || ' ' || attempt from pgonce.peek('c', 0, {epoch})");
    assert_eq!(texts(&client, &look(1)).await, ["a1 1"]);
    client.batch_execute("begin; select pgonce.ack('c', 0, 1, 1, 1); rollback").await.expect("lost");
    assert_eq!(texts(&client, &look(1)).await, ["a1 1"]);
    client.batch_execute(EXPIRE).await.expect("expired");
    acquire(&client, OTHER).await;
    assert_eq!(texts(&client, &look(2)).await, ["a1 1"]);
}

#[tokio::test]
async fn whoever_dies_of_a_message_again_and_again_leaves_it_dead_and_all_else_done() {
    let (_database, client) = world(1, "park_key", "a1 b1 a2 c1").await;
    acquire(&client, ONE).await;
    assert_eq!(peek(&client, 1).await, "a1 b1 a2 c1");
    let mut done = Vec::new();
    let mut epoch = 1;
    for _ in 0..40 {
        let message =
            client.query_opt(&format!(r#"select message_id, "offset" from pgonce.peek('c', 0, {epoch})"#), &[]).await;
        // The first owner has died with several at hand.
        let message = if epoch == 1 { None } else { message.expect("at most one") };
        match message {
            Some(row) if row.get::<_, &str>(0) != "b1" => {
                assert!(ack(&client, epoch, row.get(1), row.get(1)).await.starts_with("acked"));
                done.push(row.get::<_, String>(0));
            }
            Some(_) | None => {
                client.batch_execute(EXPIRE).await.expect("dead");
                client.batch_execute(HURRY).await.expect("hurried");
                let member = if epoch % 2 == 0 { ONE } else { OTHER };
                epoch += 1;
                assert_eq!(acquire(&client, member).await, [format!("0 {epoch}")]);
            }
        }
    }
    assert_eq!(done, ["a1", "a2", "c1"]);
    let dead = "select message_id || ' ' || attempts from pgonce.dead_letters";
    assert_eq!(texts(&client, dead).await, ["b1 3"]);
}

/// Says that members live.
async fn beat(client: &Client, members: &[&str]) {
    for member in members {
        client.batch_execute(&format!("select pgonce.beat('{member}', '{{c}}')")).await.expect("beaten");
    }
}

/// Keeps its partitions, and gives up what it has too many of; answers how many that are.
async fn renew(client: &Client, member: &str) -> usize {
    let held = format!(
        "select partition || ', ' || epoch from pgonce.consumer_leases where owner = '{member}' order by partition"
    );
    let mut given_up = 0;
    for lease in texts(client, &held).await {
        let row = client
            .query_one(&format!("select outcome, is_surplus from pgonce.renew('c', {lease}, {LONG})"), &[])
            .await
            .expect("renewed");
        assert_eq!(row.get::<_, &str>(0), "renewed");
        if row.get(1) {
            client.batch_execute(&format!("select pgonce.release('c', {lease})")).await.expect("released");
            given_up += 1;
        }
    }
    given_up
}

#[tokio::test]
async fn partitions_are_shared_by_the_members_that_live() {
    let (database, client) = world(8, "park_key", "a1").await;
    let mut others = database.connect().await;
    beat(&client, &[ONE]).await;
    assert_eq!(acquire(&client, ONE).await.len(), 8);
    assert_eq!(renew(&client, ONE).await, 0);
    // One more comes: the first keeps no more than half.
    beat(&others, &[OTHER]).await;
    assert_eq!(acquire(&others, OTHER).await.len(), 0);
    assert_eq!(renew(&client, ONE).await, 4);
    assert_eq!(acquire(&client, ONE).await.len(), 0);
    assert_eq!(acquire(&others, OTHER).await.len(), 4);
    let held = texts(&client, "select partition || owner::text || epoch from pgonce.consumer_leases").await;
    for (client, member) in [(&client, ONE), (&others, OTHER)] {
        assert_eq!((renew(client, member).await, acquire(client, member).await.len()), (0, 0), "who has, keeps");
    }
    assert_eq!(texts(&client, "select partition || owner::text || epoch from pgonce.consumer_leases").await, held);
    // It says farewell without giving anything back, or is silent for too long, or its session ends.
    others.batch_execute(&format!("select pgonce.leave('{OTHER}')")).await.expect("left");
    assert_eq!(acquire(&client, ONE).await.len(), 4);
    for how in ["silent", "ended"] {
        beat(&others, &[OTHER]).await;
        renew(&client, ONE).await;
        assert_eq!(acquire(&others, OTHER).await.len(), 4, "{how}");
        if how == "silent" {
            let silence =
                format!("update pgonce.members set beat_at = now() - interval '6 s' where member_id = '{OTHER}'");
            client.batch_execute(&silence).await.expect("silent");
        } else {
            let pid = pid_of(&others).await;
            drop(others);
            let gone = format!("select count(*) from pg_stat_activity where pid = {pid}");
            eventually("the session has ended", async || (number(&client, &gone).await == 0).then_some(())).await;
            others = database.connect().await;
        }
        assert_eq!(acquire(&client, ONE).await.len(), 4, "{how}");
    }
}

/// Notes each call in a table, as a service outside would, and then does what the message says.
struct Outside(Database);

impl ExternalHandler for Outside {
    type Payload = Value;

    async fn handle(&self, message: Received<Value>, epoch: Epoch) -> Result<(), HandlerError> {
        let session = self.0.session().await?;
        let note = "insert into calls (text, epoch, attempt) values ($1, $2, $3)";
        let attempt = i32::try_from(message.attempt)?;
        session.execute(note, &[&message.message_id.as_str(), &epoch.0, &attempt]).await?;
        session.give_back();
        match message.payload["fails"].as_str() {
            Some("once") if message.attempt == 1 => Err("not at the first time".into()),
            Some("permanently") => Err(Failure::permanent("never").into()),
            Some("hang") => std::future::pending().await,
            Some("panic") => panic!("as the message says"),
            Some("gate") => loop {
                let session = self.0.session().await?;
                let is_open = session.query_one("select exists (select from gate)", &[]).await?.get(0);
                session.give_back();
                if is_open {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            },
            _ => Ok(()),
        }
    }
}

const OUTSIDE: &str = "
    create table calls (id bigint generated always as identity, text text not null, epoch bigint not null, attempt integer not null);
    create table gate ()";
const DONE: &str = "select ((select lag + parked from pgonce.consumer_lag where consumer = 'c') = 0)::integer::bigint";

async fn outside(partitions: i32) -> (TestDatabase, Client) {
    let (database, client) = world(partitions, "park_key", "").await;
    client.batch_execute(OUTSIDE).await.expect("created");
    let quick = "select pgonce.create_consumer('c', 't', backoff_min_ms => 1, backoff_max_ms => 1)";
    client.batch_execute(quick).await.expect("changed");
    (database, client)
}

/// Messages whose keys are the letters with which their ids begin, and what becomes of each.
async fn say(client: &Client, messages: &[(&str, Option<&str>)]) {
    let message = |(id, fails): &(&str, Option<&str>)| {
        Message::json(&json!({ "fails": fails })).expect("JSON").id(*id).key(&id[..1])
    };
    let messages: Vec<Message> = messages.iter().map(message).collect();
    Producer::new(TOPIC).send_all(client, &messages).await.expect("sent");
    client.batch_execute("select pgonce.relay()").await.expect("relayed");
}

fn worker(url: &str, consumer: impl FnOnce(Consumer) -> Consumer) -> Worker {
    let open = || Database::connect(url, Schema::default(), 4).expect("a URL");
    Worker::new(open()).consumer(consumer(Consumer::external("c", Outside(open()))))
}

async fn until_done(client: &Client) {
    eventually("all is done", async || (number(client, DONE).await == 1).then_some(())).await;
}

#[tokio::test]
async fn a_worker_handles_all_in_order_and_gives_its_partitions_back() {
    let (database, client) = outside(2).await;
    say(&client, &[("a1", None), ("b1", Some("once")), ("a2", None), ("b2", None), ("c1", Some("permanently"))]).await;
    say(&client, &[("d1", Some("hang")), ("c2", None), ("e1", Some("panic")), ("d2", None), ("b3", None)]).await;
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = worker(&database.url, |consumer| consumer.message_timeout(Duration::from_millis(200)));
    let worker = tokio::spawn(async move { worker.run(&stop).await });
    until_done(&client).await;
    shutdown.stop();
    let report = worker.await.expect("no panic").expect("it stops well");
    assert_eq!((report.applied, report.failed), (7, 1 + 1 + 3 + 3));
    let of = |key: &str| format!("select text || attempt from calls where text like '{key}%' order by id");
    assert_eq!(texts(&client, &of("a")).await.join(" "), "a11 a21");
    assert_eq!(texts(&client, &of("b")).await.join(" "), "b11 b12 b21 b31");
    assert_eq!(texts(&client, &of("c")).await.join(" "), "c11 c21");
    assert_eq!(texts(&client, &of("d")).await.join(" "), "d11 d12 d13 d21");
    let dead = "select message_id from pgonce.dead_letters order by 1";
    assert_eq!(texts(&client, dead).await.join(" "), "c1 d1 e1");
    let held = "select count(*) from pgonce.leases where owner is not null or fenced > 0";
    assert_eq!(number(&client, held).await, 0);
    assert_eq!(number(&client, "select count(*) from pgonce.processed_ids").await, 7);
}

#[tokio::test]
async fn no_transaction_is_open_and_the_lease_is_renewed_while_a_handler_is_at_work() {
    let (database, client) = outside(1).await;
    say(&client, &[("a1", Some("gate"))]).await;
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = worker(&database.url, |consumer| consumer.lease(Duration::from_millis(300)));
    let worker = tokio::spawn(async move { worker.run(&stop).await });
    eventually("it is called", async || (number(&client, "select count(*) from calls").await == 1).then_some(())).await;
    let lease = "select (extract(epoch from leased_until) * 1000)::bigint from pgonce.leases";
    let first = number(&client, lease).await;
    eventually("its lease was renewed beyond its first time", async || {
        assert_eq!(idle_in_transaction(&client).await, 0);
        (number(&client, lease).await > first + 1_000).then_some(())
    })
    .await;
    assert_eq!(number(&client, "select epoch from pgonce.leases").await, 1);
    client.batch_execute("insert into gate default values").await.expect("opened");
    until_done(&client).await;
    shutdown.stop();
    assert_eq!(worker.await.expect("no panic").expect("it stops well").applied, 1);
}

/// The process that is stopped: this test binary once more, with this test alone.
#[tokio::test]
#[ignore = "the child of another test"]
async fn child() {
    let Ok(url) = std::env::var(URL) else { return };
    let shutdown = Shutdown::on_signals(Duration::from_secs(10)).expect("signals");
    let worker = worker(&url, |consumer| consumer.lease(Duration::from_secs(1)));
    worker.run(&shutdown).await.expect("it stops well");
}

#[tokio::test]
async fn whoever_is_stopped_beyond_its_lease_and_goes_on_changes_nothing() {
    let (database, client) = outside(1).await;
    say(&client, &[("a1", Some("gate")), ("a2", None), ("b1", None)]).await;
    let mut child = Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", "--ignored", "lease::child"])
        .env(URL, &database.url)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    eventually("it is called", async || (number(&client, "select count(*) from calls").await == 1).then_some(())).await;
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    client.batch_execute("insert into gate default values").await.expect("opened");
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = worker(&database.url, |consumer| consumer);
    let worker = tokio::spawn(async move { worker.run(&stop).await });
    until_done(&client).await;
    let books = texts(&client, BOOKS_BUT_LEASES).await;
    assert_eq!(number(&client, "select fenced from pgonce.leases").await, 0);

    rustix::process::kill_process(pid, rustix::process::Signal::CONT).expect("continued");
    eventually("it was refused", async || {
        (number(&client, "select fenced from pgonce.leases").await > 0).then_some(())
    })
    .await;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("told to end");
    assert!(child.wait().expect("it ends").success(), "to be fenced is no error");
    assert_eq!(texts(&client, BOOKS_BUT_LEASES).await, books);
    // Outside, the same id came under two epochs.
    let calls = "select text || ' ' || epoch from calls where text = 'a1' order by id";
    let calls = texts(&client, calls).await;
    assert_eq!((calls.len(), calls[0].as_str()), (2, "a1 1"));
    assert_ne!(calls[1], "a1 1");
    shutdown.stop();
    assert_eq!(worker.await.expect("no panic").expect("it stops well").applied, 3);
}

#[tokio::test]
async fn workers_share_the_partitions_when_one_arrives_and_when_one_dies() {
    let (database, client) = outside(6).await;
    let held = "select count(distinct owner) * 100 + coalesce(max(n), 0) from (
                  select owner, count(*) as n from pgonce.leases where owner is not null group by owner) o";
    let start = |url: &str| {
        let shutdown = Shutdown::new();
        let (stop, worker) = (shutdown.clone(), worker(url, |consumer| consumer));
        (shutdown, tokio::spawn(async move { worker.run(&stop).await }))
    };
    let seconds = Duration::from_secs(15);
    let (first, first_ends) = start(&database.url);
    eventually("the first has all", async || (number(&client, held).await == 106).then_some(())).await;
    let began = std::time::Instant::now();
    let (_second, second_ends) = start(&database.url);
    eventually("each has its half", async || (number(&client, held).await == 203).then_some(())).await;
    assert!(began.elapsed() < seconds, "{:?}", began.elapsed());
    let began = std::time::Instant::now();
    // Nothing is said and nothing given back: its leases go on for half a minute.
    second_ends.abort();
    eventually("the first has all again", async || {
        let all =
            number(&client, "select max(n) from (select count(*) as n from pgonce.leases group by owner) o").await;
        (all == 6).then_some(())
    })
    .await;
    assert!(began.elapsed() < seconds, "{:?}", began.elapsed());
    first.stop();
    first_ends.await.expect("no panic").expect("it stops well");
}
