//! The daemon over a server that goes away: restarted, killed, and cut off from the network, in a container.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgonce::{Message, Producer, Schema, migrate};
use tokio_postgres::{Client, NoTls};

use crate::docker::Container;
use crate::probe::{create, eventually, number, texts};
use crate::programs::{Running, pgonce};
use crate::worker::{APPLIED, CONSUMER, INSERT, OUT_OF_ORDER, TABLE, TOPIC, keyed};

/// How often the server goes away.
const FAULTS: usize = 3;
/// Messages that have to pass before it goes away again.
const BETWEEN_FAULTS: i64 = 60;
/// Messages of a transaction.
const AT_ONCE: usize = 5;

/// After so long without an answer a producer connects anew: of a connection that is cut nobody may ever say so.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sends messages of a key until it is told to stop; answers how many. What fails is sent again as it was, since a lost
/// connection leaves open whether it was committed.
async fn produce(url: &str, key: &str, is_over: &AtomicBool) -> i64 {
    let mut client = None;
    let mut sent = 0;
    while !is_over.load(Ordering::Relaxed) {
        let messages: Vec<Message> = (sent..sent + AT_ONCE).map(|nth| keyed(key, nth)).collect();
        eventually("the messages are committed", async || {
            if client.is_none() {
                client = connect(url).await;
            }
            let sent = tokio::time::timeout(PATIENCE, send(client.as_mut()?, &messages)).await;
            let is_committed = matches!(sent, Ok(Ok(())));
            if !is_committed {
                client = None;
            }
            is_committed.then_some(())
        })
        .await;
        sent += AT_ONCE;
    }
    i64::try_from(sent).expect("small")
}

async fn send(client: &mut Client, messages: &[Message]) -> Result<(), pgonce::Error> {
    let transaction = client.transaction().await?;
    Producer::new(TOPIC).send_all(&transaction, messages).await?;
    Ok(transaction.commit().await?)
}

async fn connect(url: &str) -> Option<Client> {
    let (client, connection) = tokio::time::timeout(PATIENCE, tokio_postgres::connect(url, NoTls)).await.ok()?.ok()?;
    tokio::spawn(connection);
    Some(client)
}

/// How many messages are applied, once the server can be asked and there are so many.
async fn until_applied(url: &str, at_least: i64) -> i64 {
    eventually("messages are applied", async || {
        let client = connect(url).await?;
        let answer = tokio::time::timeout(PATIENCE, client.query_one(APPLIED, &[])).await;
        let applied: i64 = answer.ok()?.ok()?.get(0);
        (applied >= at_least).then_some(applied)
    })
    .await
}

/// Runs producers and a daemon while the server goes away again and again, and checks that everything that was committed
/// was applied, once and in the order of its key, by the same process.
async fn each_message_is_applied_once_through(container: Container, fault: impl AsyncFn(&Container)) {
    let url = container.url.clone();
    let mut client = connect(&url).await.expect("the server accepts connections");
    migrate(&mut client, &Schema::default()).await.expect("the schema can be installed");
    create(&client, TOPIC, 3, CONSUMER).await;
    client.batch_execute(TABLE).await.expect("created");
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("pgonce.toml");
    let stages = toml::toml! {
        topic = [{ name = TOPIC }]
        consumer = [{ name = CONSUMER, topic = TOPIC, kind = "sql", batch_messages = 20, statements = INSERT }]
    };
    std::fs::write(&config, stages.to_string()).expect("written");
    let config = config.to_str().expect("text");
    let arguments = ["run", "--database-url", &url, "--config", config];
    let daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()));

    let is_over = AtomicBool::new(false);
    let producer = |key| produce(&url, key, &is_over);
    let faults = async {
        for _ in 0..FAULTS {
            // Counted from after the fault before: a fault that comes before anybody is back disturbs nobody.
            let applied = until_applied(&url, 0).await;
            until_applied(&url, applied + BETWEEN_FAULTS).await;
            fault(&container).await;
        }
        is_over.store(true, Ordering::Relaxed);
    };
    let (spring, summer, autumn, ()) = tokio::join!(producer("spring"), producer("summer"), producer("autumn"), faults);
    let sent = spring + summer + autumn;
    until_applied(&url, sent).await;
    daemon.finish();
    let client = connect(&url).await.expect("the server accepts connections");
    assert_eq!(texts(&client, OUT_OF_ORDER).await, Vec::<String>::new());
    assert_eq!(number(&client, APPLIED).await, sent);
    assert_eq!(number(&client, "select count(*) from pgonce.queue").await, sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_goes_on_when_its_server_is_restarted() {
    let Some(container) = Container::or_left_out("a restarted server").await else { return };
    each_message_is_applied_once_through(container, async |container| container.end_and_start("INT").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_goes_on_when_its_server_is_killed() {
    let Some(container) = Container::or_left_out("a killed server").await else { return };
    each_message_is_applied_once_through(container, async |container| container.end_and_start("KILL").await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_goes_on_when_it_is_cut_off_from_its_server() {
    let Some(container) = Container::or_left_out("a network cut").await else { return };
    each_message_is_applied_once_through(container, async |container| {
        container.cut_off().await;
        eventually("nobody reaches the server", async || connect(&container.url).await.is_none().then_some(())).await;
        container.reconnect().await;
    })
    .await;
}
