//! Suspicion: a message that kills its process ends in the dead letters, and nobody else suffers.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pgonce::{Consumer, Database, Handler, HandlerError, Message, Producer, Received, Relay, Schema, Shutdown, Worker};
use serde_json::{Value, json};
use tokio_postgres::{Client, Transaction};

use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, texts};

const TOPIC: &str = "t";
const CONSUMER: &str = "c";
const TABLE: &str = "create table applied (id bigint generated always as identity, text text not null)";
/// Names the database to the child.
const URL: &str = "PGONCE_TEST_CHILD_URL";
const EVIL: usize = 137;
const MESSAGES: usize = 400;

/// Aborts its process at a message that says so.
struct Mortal;

impl Handler for Mortal {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Value>) -> Result<(), HandlerError> {
        if message.payload["aborts"] == true {
            std::process::abort();
        }
        tx.execute("insert into applied (text) values ($1)", &[&message.message_id.as_str()]).await?;
        Ok(())
    }
}

/// The process that dies: this test binary once more, with this test alone.
#[tokio::test]
#[ignore = "the child of the other tests"]
async fn child() {
    let Ok(url) = std::env::var(URL) else { return };
    let database = Database::connect(&url, Schema::default(), 4).expect("a URL");
    let shutdown = Shutdown::on_signals(Duration::from_secs(10)).expect("signals");
    let worker = Worker::new(database).consumer(Consumer::each(CONSUMER, Mortal).batch_messages(100));
    worker.run(&shutdown).await.expect("it stops well");
}

fn start(url: &str) -> Child {
    Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", "--ignored", "suspicion::child"])
        .env(URL, url)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}

async fn world() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 2, "another").await;
    let create = format!(
        "select pgonce.create_consumer('c', 't', attempts_max => 3, backoff_min_ms => 1, backoff_max_ms => 1); {TABLE}"
    );
    client.batch_execute(&create).await.expect("created");
    (database, client)
}

async fn publish(database: &TestDatabase, client: &Client, evil: &[usize]) {
    let messages: Vec<Message> = (0..MESSAGES)
        .map(|nth| {
            let payload = if evil.contains(&nth) { json!({ "aborts": true }) } else { json!({}) };
            Message::json(&payload).expect("JSON").id(format!("m{nth}")).key((nth % 7).to_string())
        })
        .collect();
    Producer::new(TOPIC).send_all(client, &messages).await.expect("sent");
    let pool = database.database(1);
    while Relay::topic(TOPIC).step(&pool).await.expect("relayed").moved > 0 {}
}

#[tokio::test]
async fn a_message_that_aborts_its_process_becomes_a_dead_letter_and_all_else_is_applied() {
    let (database, client) = world().await;
    publish(&database, &client, &[EVIL]).await;
    let mut child = start(&database.url);
    let mut deaths = 0;
    let applied = i64::try_from(MESSAGES - 1).expect("a number");
    eventually("all else is applied", async || {
        if child.try_wait().expect("a child").is_some() {
            deaths += 1;
            child = start(&database.url);
        }
        let done = number(&client, "select count(*) from applied").await == applied
            && number(&client, "select count(*) from pgonce.dead_letters").await == 1;
        done.then_some(())
    })
    .await;
    child.kill().expect("killed");
    child.wait().expect("waited for");
    println!("{deaths} deaths");
    let dead = "select message_id || ' ' || attempts || ' ' || error from pgonce.dead_letters";
    assert_eq!(texts(&client, dead).await, [format!("m{EVIL} 3 the process that tried it died")]);
    assert_eq!(number(&client, "select count(distinct text) from applied").await, applied);
    let out_of_order = "
        select a.text from (
          select text, substr(text, 2)::integer as nth,
                 lag(substr(text, 2)::integer) over (partition by substr(text, 2)::integer % 7 order by id) as before
          from applied) a
        where a.nth < a.before";
    assert_eq!(texts(&client, out_of_order).await, [""; 0]);
}

#[tokio::test]
async fn a_death_while_one_waits_that_killed_its_process_begins_a_new_suspicion() {
    let (database, client) = world().await;
    publish(&database, &client, &[]).await;
    // One has been passed, but for a message that is parked, and the other has not.
    let deaths = "
        insert into pgonce.suspicions (consumer_id, partition, until_offset, messages)
        select consumer_id, partition, case partition when 0 then next_offset else 500 end, 1
        from pgonce.consumer_offsets where consumer = 'c';
        insert into pgonce.members (member_id, pid, consumers) values (gen_random_uuid(), -1, '{c}');
        select pgonce.beat(gen_random_uuid(), '{c}')";
    client.batch_execute(deaths).await.expect("noticed");
    let ranges = "select messages || ' before ' || until_offset from pgonce.suspicions order by partition";
    assert_eq!(texts(&client, ranges).await, ["1000 before 10001", "1 before 500"]);
}

#[tokio::test]
async fn who_is_killed_from_outside_leaves_no_dead_letter_and_no_suspicion_for_long() {
    const KILLS: usize = 4;
    let (database, client) = world().await;
    let mut child = start(&database.url);
    for round in 1..=KILLS {
        eventually("it has joined", async || {
            (number(&client, "select count(*) from pgonce.members where pid in (select pid from pg_stat_activity)")
                .await
                == 1)
                .then_some(())
        })
        .await;
        if round == 2 {
            publish(&database, &client, &[]).await;
        }
        child.kill().expect("killed");
        child.wait().expect("waited for");
        child = start(&database.url);
    }
    let applied = i64::try_from(MESSAGES).expect("a number");
    eventually("all is applied", async || {
        (number(&client, "select count(*) from applied").await == applied).then_some(())
    })
    .await;
    eventually("nothing is under suspicion", async || {
        (number(&client, "select count(*) from pgonce.suspicions").await == 0).then_some(())
    })
    .await;
    assert_eq!(number(&client, "select count(*) from pgonce.dead_letters").await, 0);
    child.kill().expect("killed");
    child.wait().expect("waited for");
}

#[tokio::test]
async fn what_fails_while_its_process_lives_is_not_what_the_process_dies_of_later() {
    let (database, client) = world().await;
    publish(&database, &client, &[]).await;
    let suspicion = "
        insert into pgonce.suspicions (consumer_id, partition, until_offset, messages)
        select consumer_id, partition, next_offset + 10000, 1 from pgonce.consumer_offsets where consumer = 'c'";
    client.batch_execute(suspicion).await.expect("under suspicion");
    // Nobody is to blame: it is tried again and again.
    let consumer = Consumer::sql(CONSUMER, "select pg_sleep(0.3); insert into missing select message_id from received");
    let shutdown = Shutdown::new();
    let worker = Worker::new(database.database(4)).consumer_with(consumer, 1);
    let tried = "select count(*) from pgonce.suspicions where tried_by is not null";
    let looks = async {
        for is_tried in [true, false, true, false] {
            eventually("it is written down, and taken back", async || {
                ((number(&client, tried).await > 0) == is_tried).then_some(())
            })
            .await;
        }
        shutdown.stop();
    };
    let (report, ()) = tokio::join!(worker.run(&shutdown), looks);
    assert_eq!(report.expect("stopped well").applied, 0);
}

#[tokio::test]
async fn a_range_that_is_passed_after_a_death_ends_the_suspicion() {
    let (database, client) = world().await;
    publish(&database, &client, &[]).await;
    let suspicion = "
        insert into pgonce.suspicions (consumer_id, partition, until_offset, messages)
        select consumer_id, partition, next_offset + 10000, 40 from pgonce.consumer_offsets
        where consumer = 'c' and partition = 0";
    client.batch_execute(suspicion).await.expect("under suspicion");
    // None of them is a member: who has written it down last is dead.
    let take = |member: u8| {
        format!(
            "
            update pgonce.suspicions set tried_at = '-infinity';
            select * from pgonce.take_suspicion('c', '00000000-0000-4000-8000-00000000000{member}')"
        )
    };
    let range = "select messages || ' before ' || until_offset from pgonce.suspicions";
    client.batch_execute(&take(1)).await.expect("written down");
    assert_eq!(texts(&client, range).await, ["40 before 10001"]);
    client.batch_execute(&take(2)).await.expect("halved");
    assert_eq!(texts(&client, range).await, ["20 before 41"]);
    for left in [1, 0] {
        let pass = "
            begin;
            select pgonce.receive('c', 20, partition => 0);
            select pgonce.clear_suspicion('c', 0);
            commit";
        client.batch_execute(pass).await.expect("passed");
        assert_eq!(number(&client, "select count(*) from pgonce.suspicions").await, left);
    }
}

#[tokio::test]
async fn whose_session_is_there_is_not_dead_though_nobody_says_that_it_lives() {
    let (database, client) = world().await;
    publish(&database, &client, &[]).await;
    let take = |member: u8| {
        format!(
            "select coalesce(sum(messages), 0)::bigint from pgonce.take_suspicion('c', '00000000-0000-4000-8000-00000000000{member}')"
        )
    };
    let suspicion = "
        insert into pgonce.suspicions (consumer_id, partition, until_offset, messages)
        select consumer_id, partition, next_offset + 10000, 1 from pgonce.consumer_offsets where consumer = 'c' limit 1";
    client.batch_execute(suspicion).await.expect("under suspicion");
    let charged = "select failures from pgonce.consumer_lag where consumer = 'c'";
    // None of them is a member.
    let first = database.connect().await;
    assert_eq!(number(&first, &take(1)).await, 1);
    let just_now = "update pgonce.suspicions set tried_at = 'infinity'";
    client.batch_execute(just_now).await.expect("however slow this machine is");
    assert_eq!(number(&client, &take(2)).await, 0, "it may be at work");
    assert_eq!(number(&client, charged).await, 0);
    drop(first);
    eventually("its session is gone, and it is charged", async || {
        number(&client, &take(2)).await;
        (number(&client, charged).await == 1).then_some(())
    })
    .await;
}
