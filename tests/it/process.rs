//! The program as people and machines run it: killed, stopped, misused, and asked for reports.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgonce::{Message, Producer, Relay};
use serde_json::Value;
use tokio_postgres::{Client, NoTls};

use crate::fixture::TestDatabase;
use crate::probe::{create, drain, eventually, number, texts, word, word_counts};
use crate::programs::{Running, outcome, pgonce};

const TOPIC: &str = "words";
const CONSUMER: &str = "counter";
const WORDS: [&str; 8] = ["once", "and", "only", "once", "whatever", "happens", "to", "\u{e9}t\u{e9}"];

/// Random numbers that a seed brings back (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
    }
}

/// Produces until it is told to stop; answers how often each word was committed.
async fn produce(mut client: Client, seed: u64, stop: Arc<AtomicBool>) -> BTreeMap<String, i64> {
    let mut random = Random(seed);
    let mut committed = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let words: Vec<&str> =
            (0..=random.below(20)).map(|_| WORDS[usize::try_from(random.below(8)).expect("small")]).collect();
        let messages: Vec<Message> = words.iter().map(|text| word(text)).collect();
        let transaction = client.transaction().await.expect("begun");
        Producer::new(TOPIC).send_all(&transaction, &messages).await.expect("sent");
        if random.below(4) == 0 {
            transaction.rollback().await.expect("rolled back");
            continue;
        }
        transaction.commit().await.expect("committed");
        for word in words {
            *committed.entry(word.to_owned()).or_insert(0) += 1;
        }
        if random.below(3) == 0 {
            let again = Producer::new(TOPIC).send_all(&client, &messages).await.expect("answered");
            assert!(again.iter().all(|sent| sent.was_duplicate));
        }
    }
    committed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_are_killed_lose_and_double_nothing() {
    const KILLS: usize = 15;
    const KILL_AFTER_MS: u64 = 30;
    const KILL_WITHIN_MS: u64 = 250;
    let seed = RandomState::new().hash_one(0) | 1;
    let mut random = Random(seed);
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let start = || {
        let arguments = ["run", "--database-url", &database.url, "--word-count", "counter=words"];
        Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()))
    };
    let mut workers = [start(), start()];
    eventually("the processes have created the topic", async || {
        (number(&client, "select count(*) from pgonce.consumers").await == 1).then_some(())
    })
    .await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut producers = Vec::new();
    for nth in 0..2 {
        let client = database.connect().await;
        producers.push(tokio::spawn(produce(client, seed.wrapping_add(nth), Arc::clone(&stop))));
    }
    for _ in 0..KILLS {
        // The moment is what is random here; nothing depends on its length.
        tokio::time::sleep(Duration::from_millis(KILL_AFTER_MS + random.below(KILL_WITHIN_MS))).await;
        let victim = usize::try_from(random.below(2)).expect("small");
        workers[victim].kill();
        workers[victim] = start();
    }
    let produced = "select count(*) from pgonce.outbox";
    eventually("enough is produced", async || (number(&client, produced).await > 1_000).then_some(())).await;
    stop.store(true, Ordering::Relaxed);
    let mut expected: BTreeMap<String, i64> = BTreeMap::new();
    for producer in producers {
        for (word, count) in producer.await.expect("no panic") {
            *expected.entry(word).or_insert(0) += count;
        }
    }
    let waiting = "select ((select pending from pgonce.outbox_status) + (select lag from pgonce.consumer_lag))::bigint";
    eventually("nothing is left", async || (number(&client, waiting).await == 0).then_some(())).await;
    for worker in workers {
        worker.finish();
    }
    assert_eq!(word_counts(&client, CONSUMER).await, expected, "seed {seed}");
    let total: i64 = expected.values().sum();
    let received = number(&client, "select received from pgonce.consumer_lag").await;
    assert_eq!(received, total, "seed {seed}");
    assert!(total > 1_000, "seed {seed}: only {total} words");
}

#[tokio::test]
async fn a_daemon_ends_well_when_it_is_asked_to() {
    let database = TestDatabase::new().await;
    let arguments = ["run", "--database-url", &database.url, "--relay", "orders", "--word-count", "counter=words"];
    let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
    daemon.until_logged("running");
    daemon.finish();
    let client = database.connect().await;
    assert_eq!(number(&client, "select count(*) from pgonce.topics").await, 2);
}

#[tokio::test]
async fn a_daemon_says_that_messages_fail_and_not_what_they_say() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, "words", 1, "counter").await;
    let send = "select pgonce.enqueue('words', '{\"word\": {\"secret\": 1}}'); select pgonce.relay()";
    client.batch_execute("alter table pgonce.word_counts add check (word not like '%secret%')").await.expect("altered");
    client.batch_execute(send).await.expect("sent");
    let arguments = ["run", "--database-url", &database.url, "--word-count", "counter=words"];
    let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
    let line = daemon.until_logged("messages failed");
    assert!(line.contains("counter") && !line.contains("secret"), "{line}");
    daemon.finish();
}

#[tokio::test]
async fn a_daemon_whose_log_nobody_reads_ends_well_when_it_is_asked_to() {
    let database = TestDatabase::new().await;
    let arguments = ["run", "--database-url", &database.url, "--word-count", "counter=words"];
    let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
    daemon.until_logged("running");
    daemon.close_log();
    daemon.finish();
}

/// A server that a process has started: its URL and its directory.
fn private_server(line: &str) -> (String, String) {
    let url = line.strip_prefix("psql '").and_then(|rest| rest.strip_suffix('\'')).expect("a command line of psql");
    let directory = url.split(['?', '&']).find_map(|part| part.strip_prefix("host=")).expect("a directory");
    (url.to_owned(), directory.to_owned())
}

#[tokio::test]
async fn a_daemon_with_a_server_of_its_own_counts_within_a_second_and_leaves_nothing() {
    const ATTEMPTS: usize = 5;
    for is_killed in [false, true] {
        let arguments = ["run", "--embedded", "--word-count", "counter=words"];
        let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::piped()).stderr(Stdio::null()));
        let (mut daemon, line) = tokio::task::spawn_blocking(move || {
            let line = daemon.line_after("private PostgreSQL: ");
            (daemon, line)
        })
        .await
        .expect("no panic");
        let (url, directory) = private_server(&line);
        assert!(Path::new(&directory).exists());
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("the server accepts connections");
        tokio::spawn(connection);
        eventually("the consumer is there", async || {
            (number(&client, "select count(*) from pgonce.consumers").await == 1).then_some(())
        })
        .await;
        let mut quickest = Duration::MAX;
        for attempt in 1..=ATTEMPTS {
            let sent = Instant::now();
            let enqueue = r#"select * from pgonce.enqueue('words', '{"word": "once"}')"#;
            client.batch_execute(enqueue).await.expect("enqueued");
            eventually("it is counted", async || {
                let counted =
                    word_counts(&client, CONSUMER).await.get("once") == Some(&i64::try_from(attempt).expect("small"));
                counted.then_some(())
            })
            .await;
            quickest = quickest.min(sent.elapsed());
        }
        assert!(quickest < Duration::from_secs(1), "{quickest:?}");
        if is_killed {
            daemon.kill();
        } else {
            daemon.finish();
        }
        eventually("the server is gone", async || (!Path::new(&directory).exists()).then_some(())).await;
        tokio_postgres::connect(&url, NoTls).await.map(drop).expect_err("nobody listens");
    }
}

/// Runs the demo, and answers its report.
fn demo(arguments: &[&str]) -> Value {
    let mut command = pgonce(&[&["demo", "--json"], arguments].concat());
    // What is there for daemons is not for the demo.
    command.env("PGONCE_DATABASE_URL_FILE", "/none").env("PGONCE_CONFIG", "/none");
    let output = command.output().expect("the program can be started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    serde_json::from_slice(&output.stdout).expect("one JSON value and nothing else")
}

#[test]
fn the_demo_loses_and_doubles_nothing() {
    let report = demo(&["--words", "3000"]);
    let keys = ["documents", "words", "kills", "duplicates_refused", "lost", "doubled", "words_per_second"];
    let report = report.as_object().expect("an object");
    assert!(keys.iter().all(|key| report[*key].is_u64()), "{report:?}");
    assert_eq!(report.len(), keys.len(), "{report:?}");
    assert_eq!((&report["lost"], &report["doubled"]), (&Value::from(0), &Value::from(0)));
    assert!(report["words"].as_u64() >= Some(3_000));
}

#[tokio::test]
async fn the_demo_counts_files_in_a_database_of_the_users_and_cleans_up() {
    let database = TestDatabase::empty().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("text.txt");
    std::fs::write(&file, "Once more: once, and once only.").expect("written");
    let url = database.url.clone();
    let report = tokio::task::spawn_blocking(move || {
        demo(&["--words", "1", "--database-url", &url, file.to_str().expect("text")])
    })
    .await
    .expect("no panic");
    assert_eq!(report["words"], 6);
    assert_eq!(report["documents"], 1);
    let client = database.connect().await;
    assert_eq!(number(&client, "select count(*) from pg_namespace where nspname like 'pgonce%'").await, 0);
}

#[tokio::test]
async fn a_changed_configuration_changes_consumers_that_are_there() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("pgonce.toml");
    let start = |settings: &str| {
        let text = format!(
            "[[topic]]\nname = 'words'\n[[consumer]]\nname = 'counter'\ntopic = 'words'\nkind = 'sql'\n\
             statements = 'select pg_sleep(60) from received'\n{settings}"
        );
        std::fs::write(&file, text).expect("written");
        let arguments = ["run", "--database-url", &database.url, "--config", file.to_str().expect("text")];
        let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
        daemon.until_logged("running");
        daemon
    };
    let settings =
        "select concat_ws(' ', failure_policy, attempts_max, backoff_min_ms, backoff_max_ms) from pgonce.consumers";
    start("failure_policy = 'skip'\nattempts_max = 7\nbackoff_min_ms = 2\nbackoff_max_ms = 3").finish();
    assert_eq!(texts(&client, settings).await, ["skip 7 2 3"]);
    start("").finish();
    assert_eq!(texts(&client, settings).await, ["skip 7 2 3"]);
    let daemon = start("attempts_max = 1\nmessage_timeout_ms = 100");
    assert_eq!(texts(&client, settings).await, ["skip 1 2 3"]);
    Producer::new(TOPIC).send(&client, &word("a")).await.expect("sent");
    eventually("the message took too long", async || {
        (number(&client, "select count(*) from pgonce.dead_letters").await == 1).then_some(())
    })
    .await;
    daemon.finish();
    // One at a time, so that each is seen to be compared.
    for (setting, expected) in [("backoff_min_ms = 3", "skip 1 3 3"), ("backoff_max_ms = 9", "skip 1 3 9")] {
        start(setting).finish();
        assert_eq!(texts(&client, settings).await, [expected]);
    }
}

#[tokio::test]
async fn status_tells_what_waits_and_what_lags_behind() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, CONSUMER).await;
    client.batch_execute("select * from pgonce.create_consumer('inbox')").await.expect("created");
    let producer = Producer::new(TOPIC);
    producer.send_all(&client, &[word("a").id("a"), word("b"), word("c"), word("a").id("a")]).await.expect("sent");
    let pool = database.database(1);
    Relay::topic(TOPIC).batch_messages(2).step(&pool).await.expect("relayed");
    let json = outcome(&["status", "--json", "--database-url", &database.url]);
    let report: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let topic = &report["topics"][0];
    for (name, value) in [("scheduled", 0), ("pending", 1), ("sent", 2), ("duplicates", 1), ("set_aside", 0)] {
        assert_eq!(topic[name], value, "{name}");
    }
    assert!(topic["oldest_pending_seconds"].as_f64() > Some(0.0));
    let counter = &report["consumers"][0];
    assert_eq!((&counter["consumer"], &counter["topic"]), (&Value::from(CONSUMER), &Value::from(TOPIC)));
    assert_eq!((&counter["lag"], &counter["received"]), (&Value::from(2), &Value::from(0)));
    assert_eq!(report["consumers"][1]["topic"], Value::Null);

    let consumer = pgonce::Consumer::word_count(CONSUMER);
    drain(&pool, &Relay::topic(TOPIC), &consumer).await.expect("drained");
    let text = outcome(&["status", "--database-url", &database.url]);
    let text = String::from_utf8(text.stdout).expect("text");
    assert!(text.contains(TOPIC) && text.contains(CONSUMER) && text.contains("(inbox)"), "{text}");
    let report = outcome(&["status", "--json", "--database-url", &database.url]);
    let report: Value = serde_json::from_slice(&report.stdout).expect("JSON");
    assert_eq!(report["consumers"][0]["lag"], 0);
    assert_eq!(report["consumers"][0]["oldest_seconds"], 0.0);
}

#[tokio::test]
async fn init_says_what_it_did() {
    let database = TestDatabase::empty().await;
    for said in ["created schema events", "has version 1 already"] {
        let output = outcome(&["init", "--schema", "events", "--database-url", &database.url]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(said), "{text}");
    }
}
