//! Dumps: a database that was dumped in mid-flow goes on where it was restored, here or on another server.

use std::path::Path;
use std::process::{Command, Stdio};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Consumer, Database, Message, Producer, Relay, Schema};
use tokio_postgres::{Client, NoTls};

use crate::fixture::TestDatabase;
use crate::probe::{create, drain, number, numbered, texts};
use crate::programs::postgresql;

const TOPIC: &str = "t";
const CONSUMER: &str = "c";
const INSERT: &str = r#"insert into applied (message_id) select message_id from received order by "offset""#;

fn run(program: &Path, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("it can be started");
    assert!(output.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
}

fn named(prefix: &str, count: usize) -> Vec<Message> {
    (0..count).map(|nth| Message::json(&nth).expect("JSON").key("k").id(format!("{prefix}{nth}"))).collect()
}

/// Goes on in a restored database, and checks that it holds what was committed, once.
async fn goes_on(url: &str, state: &str) {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the server accepts connections");
    tokio::spawn(connection);
    let pool = Database::connect(url, Schema::default(), 2).expect("a good URL");
    let producer = Producer::new(TOPIC);
    let again = producer.send_all(&client, &numbered(60, &["k"])).await.expect("answered");
    assert!(again.iter().all(|sent| sent.was_duplicate), "{state}: an id was forgotten");
    let new = producer.send_all(&client, &named("new ", 5)).await.expect("sent");
    assert!(new.iter().all(|sent| !sent.was_duplicate), "{state}");
    drain(&pool, &Relay::topic(TOPIC).batch_messages(7), &Consumer::sql(CONSUMER, INSERT)).await.expect("drained");
    let mut expected: Vec<String> = (0..60).map(|nth| format!("m{nth}")).collect();
    expected.extend((0..5).map(|nth| format!("new {nth}")));
    assert_eq!(texts(&client, "select message_id from applied order by id").await, expected, "{state}");
}

/// 20 messages applied, 20 in the queue, 20 in the outbox, and 10 in a transaction that stays open.
async fn mid_flow(database: &TestDatabase, client: &Client) -> Client {
    create(client, TOPIC, 1, CONSUMER).await;
    let table = "create table applied (id bigint generated always as identity, message_id text not null)";
    client.batch_execute(table).await.expect("created");
    let messages = numbered(60, &["k"]);
    let pool = database.database(1);
    let producer = Producer::new(TOPIC);
    producer.send_all(client, &messages[..20]).await.expect("sent");
    let consumer = Consumer::sql(CONSUMER, INSERT);
    drain(&pool, &Relay::topic(TOPIC).batch_messages(7), &consumer).await.expect("drained");
    let open = database.connect().await;
    open.batch_execute("begin").await.expect("begun");
    producer.send_all(&open, &named("open ", 10)).await.expect("sent");
    producer.send_all(client, &messages[20..40]).await.expect("sent");
    // The open transaction is listed in the heads that are dumped.
    for _ in 0..4 {
        Relay::topic(TOPIC).batch_messages(7).step(&pool).await.expect("relayed");
    }
    assert_eq!(number(client, "select count(*) from pgonce.queue").await, 40);
    producer.send_all(client, &messages[40..]).await.expect("sent");
    open
}

#[tokio::test]
async fn a_dump_in_mid_flow_goes_on_where_it_is_restored() {
    let (Some(pg_dump), Some(psql)) = (postgresql("pg_dump"), postgresql("psql")) else {
        println!("left out: there is no pg_dump or no psql on this machine");
        return;
    };
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let open = mid_flow(&database, &client).await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("dump.sql");
    let file = file.to_str().expect("text");
    let url = database.url.clone();
    run(&pg_dump, &["--no-owner", "--file", file, "--dbname", &url]);

    let beside = TestDatabase::empty().await;
    let restore = |url: &str| run(&psql, &["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--file", file, url]);
    restore(&beside.url);
    goes_on(&beside.url, "beside the original").await;

    // Another server is at lower transaction ids than those that stand in the dump.
    let start = || PrivateServer::start(&Options::default()).expect("a server starts");
    let elsewhere = tokio::task::spawn_blocking(start).await.expect("no panic");
    restore(&elsewhere.url("pgonce"));
    goes_on(&elsewhere.url("pgonce"), "on another server").await;
    tokio::task::spawn_blocking(move || elsewhere.stop()).await.expect("no panic").expect("it stops");

    // The original is none the worse.
    open.batch_execute("rollback").await.expect("rolled back");
    goes_on(&database.url, "the original").await;
}
