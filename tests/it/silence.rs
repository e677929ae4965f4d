//! Silence: of a worker that stopped in the middle of a batch the server hears nothing, and gives its partition to others.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgonce::{Consumer, Database, Handler, HandlerError, Producer, Received, Relay, Schema, Shutdown, Worker, migrate};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::Value;
use tokio_postgres::{Client, Transaction};

use crate::books::assert_applied;
use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, texts};
use crate::programs::{Running, outcome};
use crate::worker::{APPLIED, CONSUMER, INSERT, TOPIC, keyed, prepared};

/// Names the database to the child.
const URL: &str = "PGONCE_TEST_CHILD_URL";
const MESSAGES: usize = 12;

async fn published() -> (TestDatabase, Client) {
    let (database, client) = prepared(1).await;
    let messages: Vec<_> = (0..MESSAGES).map(|nth| keyed("k", nth)).collect();
    Producer::new(TOPIC).send_all(&client, &messages).await.expect("sent");
    Relay::topic(TOPIC).step(&database.database(1)).await.expect("relayed");
    (database, client)
}

async fn insert(tx: &Transaction<'_>, message: &Received<Value>) -> Result<(), HandlerError> {
    let nth = i32::try_from(message.payload["nth"].as_i64().ok_or("a number")?)?;
    tx.execute("insert into applied (key, nth) values ($1, $2)", &[&message.key, &nth]).await?;
    Ok(())
}

/// Stops its process in the middle of its first batch.
struct Stopping(AtomicBool);

impl Handler for Stopping {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Value>) -> Result<(), HandlerError> {
        insert(tx, &message).await?;
        if message.payload["nth"] == 5 && !self.0.swap(true, Ordering::Relaxed) {
            kill_process(getpid(), Signal::STOP)?;
        }
        Ok(())
    }
}

/// The process that is stopped: this test binary once more, with this test alone.
#[tokio::test]
#[ignore = "the child of another test"]
async fn child() {
    let Ok(url) = std::env::var(URL) else { return };
    let database = Database::connect(&url, Schema::default(), 4).expect("a URL");
    let shutdown = Shutdown::on_signals(Duration::from_secs(10)).expect("signals");
    let consumer = Consumer::each(CONSUMER, Stopping(false.into())).message_timeout(Duration::from_millis(500));
    Worker::new(database).consumer(consumer).run(&shutdown).await.expect("it stops well");
}

#[tokio::test]
async fn who_stops_in_an_open_batch_loses_it_and_goes_on_well() {
    let (database, client) = published().await;
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", "--ignored", "silence::child"]).env(URL, &database.url);
    let child = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let free = "select count(*) from (select from pgonce.consumer_partitions for no key update skip locked) p";
    eventually("it has begun a batch", async || (number(&client, free).await == 0).then_some(())).await;
    let pool = database.database(1);
    let consumer = Consumer::sql(CONSUMER, INSERT);
    assert_eq!(consumer.step(&pool).await.expect("a step").applied, 0, "it still has the partition");
    let all = i64::try_from(MESSAGES).expect("a number");
    eventually("another one has it", async || {
        consumer.step(&pool).await.expect("a step");
        // Not in one step, where the child was so slow that a message took too long.
        (number(&client, APPLIED).await == all).then_some(())
    })
    .await;
    kill_process(child.pid(), Signal::CONT).expect("continued");
    Producer::new(TOPIC).send(&client, &keyed("k", MESSAGES)).await.expect("sent");
    Relay::topic(TOPIC).step(&pool).await.expect("relayed");
    eventually("it goes on", async || (number(&client, APPLIED).await == all + 1).then_some(())).await;
    child.finish();
    assert_applied(&client, MESSAGES + 1).await;
}

/// Sends nothing to the database, and takes its time.
struct Silent;

impl Handler for Silent {
    type Payload = Value;

    async fn handle(&self, _: &Transaction<'_>, _: Received<Value>) -> Result<(), HandlerError> {
        tokio::time::sleep(Duration::from_millis(650)).await;
        Ok(())
    }
}

#[tokio::test]
async fn a_batch_of_silent_handlers_may_take_longer_than_a_silence() {
    let (database, client) = published().await;
    let pool = database.database(1);
    let consumer = Consumer::each(CONSUMER, Silent).message_timeout(Duration::from_secs(1));
    // Should one take too long by mistake, it comes again.
    while number(&client, "select lag + parked from pgonce.consumer_lag").await > 0 {
        consumer.step(&pool).await.expect("the connection is not lost");
    }
    let received = number(&client, "select received from pgonce.consumer_lag").await;
    assert_eq!(received, i64::try_from(MESSAGES).expect("a number"));
}

/// Writes down what limits its transaction.
struct Asking;

impl Handler for Asking {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, _: Received<Value>) -> Result<(), HandlerError> {
        tx.batch_execute(ASK).await?;
        Ok(())
    }
}

const SETTINGS: &str = "
    select current_setting('statement_timeout') || ' ' || current_setting('idle_in_transaction_session_timeout')";
const ASK: &str = "
    insert into applied (key, nth)
    select current_setting('statement_timeout') || ' ' || current_setting('idle_in_transaction_session_timeout'), 0";

#[tokio::test]
async fn a_batch_has_its_limits_and_the_session_keeps_its_own() {
    for consumer in [Consumer::each(CONSUMER, Asking), Consumer::sql(CONSUMER, ASK)] {
        let (database, client) = published().await;
        let pool = database.database(1);
        let session = pool.session().await.expect("a session");
        session.batch_execute("set idle_in_transaction_session_timeout = '7s'").await.expect("set");
        session.give_back();
        consumer.step(&pool).await.expect("applied");
        assert_eq!(texts(&client, "select distinct key from applied").await, ["30s 65s"]);
        let session = pool.session().await.expect("the same session");
        assert_eq!(texts(&session, SETTINGS).await, ["0 7s"]);
    }
}

#[tokio::test]
async fn an_installation_a_chunk_of_lines_and_a_statement_of_a_worker_have_their_limits() {
    let note = "
        create table public.noted (silence text not null);
        create function public.note() returns event_trigger language plpgsql as $$
        begin
          insert into public.noted values (current_setting('idle_in_transaction_session_timeout'));
        end $$;
        create event trigger note on ddl_command_end execute function public.note()";
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    client.batch_execute(note).await.expect("created");
    migrate(&mut client, &Schema::default()).await.expect("installed");
    let noted = "select distinct silence from public.noted";
    assert_eq!(texts(&client, noted).await, ["30s"]);

    create(&client, TOPIC, 1, CONSUMER).await;
    let note = "
        drop event trigger note;
        truncate public.noted;
        create function public.note_row() returns trigger language plpgsql as $$
        begin
          insert into public.noted values (current_setting('idle_in_transaction_session_timeout'));
          return new;
        end $$;
        create trigger note before insert on pgonce.outbox for each row execute function public.note_row()";
    client.batch_execute(note).await.expect("created");
    let directory = tempfile::tempdir().expect("a directory");
    let lines = directory.path().join("lines");
    std::fs::write(&lines, r#"{"payload": 1}"#).expect("written");
    let output = outcome(&["enqueue", TOPIC, lines.to_str().expect("text"), "--database-url", &database.url]);
    assert!(output.status.success());
    assert_eq!(texts(&client, noted).await, ["30s"]);

    let note = "
        truncate public.noted;
        create trigger note before insert on pgonce.queue for each row execute function public.note_row()";
    client.batch_execute(note).await.expect("created");
    assert_eq!(Relay::topic(TOPIC).step(&database.database(1)).await.expect("relayed").moved, 1);
    assert_eq!(texts(&client, noted).await, ["30s"]);
}
