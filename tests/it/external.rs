//! External handlers: a worker that acts outside of the database, under leases.

use std::process::{Command, Stdio};
use std::time::Duration;

use pgonce::{
    Consumer, Database, Epoch, ExternalHandler, Failure, HandlerError, Message, Producer, Received, Schema, Shutdown,
    Worker,
};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::lease::{TOPIC, world};
use crate::probe::{eventually, idle_in_transaction, number, texts};

/// What the database knows of the consumer, but for its leases.
const BOOKS_BUT_LEASES: &str = "
    select p::text from pgonce.progress p
    union all select p::text from pgonce.parked p
    union all select p::text from pgonce.processed_ids p
    union all select d::text from pgonce.dead_letters d
    order by 1";
/// Names the database to the child.
const URL: &str = "PGONCE_TEST_CHILD_URL";

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
        .args(["--exact", "--ignored", "external::child"])
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
