//! The commands that look after topics, consumers and messages.

use std::process::Stdio;

use pgonce::{Producer, Relay};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, drain, eventually, number, pid_of, set_default_isolation, texts, until_blocked, word};
use crate::programs::{Running, outcome, pgonce};

const TOPIC: &str = "words";
const CONSUMER: &str = "counter";

/// Runs a command on a database to a good end; what it printed.
fn said(database: &TestDatabase, arguments: &[&str]) -> String {
    let output = outcome(&[arguments, &["--database-url", &database.url]].concat());
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{arguments:?}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn report(database: &TestDatabase, arguments: &[&str]) -> Value {
    serde_json::from_str(&said(database, &[arguments, &["--json"]].concat())).expect("JSON")
}

/// A topic of two partitions with a consumer, and two messages: "sent" has been relayed, "unsent" has not.
async fn two_messages() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 2, CONSUMER).await;
    Producer::new(TOPIC).send(&client, &word("a").id("sent")).await.expect("sent");
    Relay::topic(TOPIC).step(&database.database(1)).await.expect("relayed");
    Producer::new(TOPIC).send(&client, &word("b").id("unsent")).await.expect("sent");
    (database, client)
}

#[tokio::test]
async fn topics_and_consumers_are_created_shown_paused_and_deleted() {
    let database = TestDatabase::new().await;
    said(&database, &["topic", "create", TOPIC, "--partitions", "3"]);
    let policy = ["--failure-policy", "skip", "--attempts-max", "2", "--backoff-min-ms", "3", "--backoff-max-ms", "4"];
    said(&database, &[&["consumer", "create", CONSUMER, "--topic", TOPIC], &policy[..]].concat());
    let settings =
        "select concat_ws(' ', failure_policy, attempts_max, backoff_min_ms, backoff_max_ms) from pgonce.consumers";
    assert_eq!(texts(&database.connect().await, settings).await, ["skip 2 3 4"]);
    said(&database, &["topic", "create", TOPIC, "--payload-bytes-max", "100"]);
    let topic = json!({
        "topic": TOPIC, "partitions": 3, "payload_bytes_max": 100, "paused": false, "consumers": [CONSUMER]
    });
    assert_eq!(report(&database, &["topic", "list"]), json!([topic]));
    assert_eq!(report(&database, &["topic", "show", TOPIC])["heads"].as_array().map(Vec::len), Some(3));
    said(&database, &["topic", "pause", TOPIC]);
    said(&database, &["consumer", "pause", CONSUMER]);
    assert_eq!(report(&database, &["topic", "list"])[0]["paused"], true);
    assert_eq!(report(&database, &["consumer", "list"])[0]["paused"], true);
    said(&database, &["topic", "resume", TOPIC]);
    said(&database, &["consumer", "resume", CONSUMER]);
    assert_eq!(report(&database, &["topic", "list"])[0]["paused"], false);
    let shown = report(&database, &["consumer", "show", CONSUMER]);
    assert_eq!((&shown["consumer"], &shown["paused"]), (&json!(CONSUMER), &json!(false)));
    assert_eq!(shown["partitions"].as_array().map(Vec::len), Some(3));

    let text = said(&database, &["topic", "show", TOPIC]) + &said(&database, &["consumer", "show", CONSUMER]);
    assert!(text.contains("next offset") && text.contains(CONSUMER), "{text}");
    said(&database, &["consumer", "delete", CONSUMER, "--yes"]);
    said(&database, &["topic", "delete", TOPIC, "--yes"]);
    assert_eq!(report(&database, &["topic", "list"]), json!([]));
    assert_eq!(report(&database, &["consumer", "list"]), json!([]));
}

#[tokio::test]
async fn an_external_consumer_is_created_and_told_from_others() {
    let database = TestDatabase::new().await;
    said(&database, &["topic", "create", TOPIC]);
    let create = ["consumer", "create", "outside", "--topic", TOPIC, "--kind"];
    let kinds = |kind| [&create[..], &[kind]].concat();
    assert_eq!(said(&database, &kinds("external")), "created consumer outside\n");
    assert_eq!(said(&database, &kinds("external")), "consumer outside is there\n");
    assert_eq!(said(&database, &create[..5]), "consumer outside is there\n");
    let refused = outcome(&[&kinds("transactional")[..], &["--database-url", &database.url]].concat());
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && why.contains("is external"), "{why}");
    said(&database, &["consumer", "create", "within", "--topic", TOPIC]);
    let kinds = |report: &Value| [report[0]["kind"].clone(), report[1]["kind"].clone()];
    let both = [json!("external"), json!("transactional")];
    assert_eq!(kinds(&report(&database, &["consumer", "list"])), both);
    assert_eq!(kinds(&report(&database, &["status"])["consumers"]), both);
    assert_eq!(report(&database, &["consumer", "show", "outside"])["kind"], "external");
    for command in [&["consumer", "list"] as &[&str], &["consumer", "show", "outside"], &["status"]] {
        assert!(said(&database, command).contains(" external "), "{command:?}");
    }
}

#[tokio::test]
async fn what_is_created_is_said_and_what_is_there_is_told_from_it() {
    let database = TestDatabase::new().await;
    for (arguments, words) in [
        (&["relay", "ordrs"] as &[&str], "created topic ordrs"),
        (&["consume", "--word-count", "counter=ordrs"], "created consumer counter"),
    ] {
        let arguments = [arguments, &["--database-url", &database.url]].concat();
        let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
        daemon.until_logged(words);
        daemon.finish();
    }
    for (arguments, words) in [
        (&["topic", "create", "ordrs", "--partitions", "8"] as &[&str], "topic ordrs is there\n"),
        (&["topic", "create", "orders"], "created topic orders\n"),
        (&["topic", "create", "orders", "--payload-bytes-max", "100"], "topic orders is there\n"),
        (&["consumer", "create", "counter", "--topic", "ordrs"], "consumer counter is there\n"),
        (&["consumer", "create", "webhooks"], "created consumer webhooks\n"),
        (&["consumer", "create", "webhooks"], "consumer webhooks is there\n"),
    ] {
        assert_eq!(said(&database, arguments), words, "{arguments:?}");
    }
    let client = database.connect().await;
    Producer::new("orders").send(&client, &pgonce::Message::json(&1).expect("JSON").id("m")).await.expect("sent");
    let shown = said(&database, &["message", "show", "m"]);
    assert!(shown.contains("no consumer reads this topic") && !shown.contains("ahead"), "{shown}");
}

#[tokio::test]
async fn what_somebody_else_creates_meanwhile_is_there_whatever_isolation_a_database_sets() {
    let database = TestDatabase::new().await;
    let (client, other) = (database.connect().await, database.connect().await);
    set_default_isolation(&client, "serializable").await;
    for (made, command, expected) in [
        ("create_topic('words')", &["topic", "create", TOPIC][..], "created topic words"),
        ("create_consumer('counter')", &["consumer", "create", CONSUMER], "created consumer counter"),
    ] {
        other.batch_execute(&format!("begin; select pgonce.{made}")).await.expect("not committed yet");
        let arguments = [command, &["--database-url", &database.url]].concat();
        let program = pgonce(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
        let blocked = "select count(*) from pg_stat_activity
                       where datname = current_database() and cardinality(pg_blocking_pids(pid)) > 0";
        eventually("it waits", async || (number(&client, blocked).await == 1).then_some(())).await;
        other.batch_execute("commit").await.expect("created");
        let output = program.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected);
    }
}

#[tokio::test]
async fn what_destroys_wants_a_yes() {
    let (database, client) = two_messages().await;
    for arguments in [
        ["topic", "purge", TOPIC, "--database-url", &database.url],
        ["topic", "delete", TOPIC, "--database-url", &database.url],
        ["consumer", "delete", CONSUMER, "--database-url", &database.url],
    ] {
        let output = outcome(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--yes"), "{arguments:?}");
    }
    assert_eq!(number(&client, "select count(*) from pgonce.outbox").await, 2);
    assert_eq!(number(&client, "select count(*) from pgonce.consumers").await, 1);
}

#[tokio::test]
async fn a_message_is_followed_from_the_outbox_to_its_consumers() {
    let (database, client) = two_messages().await;
    let unsent = report(&database, &["message", "show", "unsent"]);
    assert_eq!((&unsent[0]["state"], &unsent[0]["offset"]), (&json!("PENDING"), &Value::Null));
    assert_eq!(unsent[0]["consumers"][0]["state"], "not sent");
    let sent = report(&database, &["message", "show", "sent", "--topic", TOPIC, "--payload"]);
    assert_eq!((&sent[0]["state"], &sent[0]["offset"]), (&json!("SENT"), &json!(1)));
    assert_eq!(sent[0]["payload"], json!({ "word": "a" }));
    assert_eq!(sent[0]["consumers"][0]["state"], "waiting");

    said(&database, &["message", "cancel", "unsent", "--topic", TOPIC]);
    let late = outcome(&["message", "cancel", "sent", "--topic", TOPIC, "--database-url", &database.url]);
    assert_eq!(late.status.code(), Some(1));
    let pool = database.database(1);
    drain(&pool, &Relay::topic(TOPIC), &pgonce::Consumer::word_count(CONSUMER)).await.expect("drained");
    said(&database, &["consumer", "create", "later", "--topic", TOPIC, "--start-at", "latest"]);
    let processed = report(&database, &["message", "show", "sent"]);
    assert_eq!(processed[0]["consumers"][0]["state"], "processed");
    assert_eq!(processed[0]["consumers"][1]["state"], "passed");
    assert!(said(&database, &["message", "show", "sent"]).contains("processed"));
    assert_eq!(number(&client, "select count(*) from pgonce.word_counts").await, 1);
}

#[tokio::test]
async fn a_purge_deletes_all_messages_and_offsets_go_on() {
    let (database, client) = two_messages().await;
    let text = said(&database, &["topic", "purge", TOPIC, "--yes"]);
    assert!(text.contains("1 unsent and 1 queued"), "{text}");
    assert_eq!(report(&database, &["consumer", "list"])[0]["lag"], 0);
    assert_eq!(report(&database, &["message", "show", "sent"])[0]["consumers"][0]["state"], "passed");
    assert!(Producer::new(TOPIC).send(&client, &word("a").id("sent")).await.expect("answered").was_duplicate);
    Producer::new(TOPIC).send(&client, &word("a").id("next")).await.expect("sent");
    let pool = database.database(1);
    let applied = drain(&pool, &Relay::topic(TOPIC), &pgonce::Consumer::word_count(CONSUMER)).await.expect("drained");
    assert_eq!(applied, 1);
    let place = "select \"offset\" from pgonce.queue where message_id = 'next'";
    assert_eq!(number(&client, place).await, 2, "the key of the message that was purged had offset 1");
}

#[tokio::test]
async fn a_consumer_that_is_created_during_a_purge_starts_behind_it() {
    let (database, mut client) = two_messages().await;
    let purge = client.transaction().await.expect("begun");
    purge.batch_execute("select pgonce.purge_topic('words')").await.expect("purged");
    let creator = database.connect().await;
    let pid = pid_of(&creator).await;
    let creating = tokio::spawn(async move {
        creator.batch_execute("select pgonce.create_consumer('late', 'words')").await.expect("created");
    });
    until_blocked(&database.connect().await, pid).await;
    purge.commit().await.expect("committed");
    creating.await.expect("no panic");

    Producer::new(TOPIC).send(&client, &word("a").id("next")).await.expect("sent");
    let pool = database.database(1);
    Relay::topic(TOPIC).step(&pool).await.expect("relayed");
    let received = pgonce::Consumer::word_count("late").step(&pool).await.expect("no hole");
    assert_eq!(received.applied, 1);
}

#[tokio::test]
async fn a_check_of_the_status_fails_where_a_message_waits_for_too_long() {
    let (database, _client) = two_messages().await;
    let check = |lag: &str| {
        let output = outcome(&["status", "--check", "--max-lag", lag, "--database-url", &database.url]);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(check("1h"), (Some(0), String::new()));
    let (code, text) = check("0s");
    assert_eq!(code, Some(3));
    assert!(text.contains("topic words") && text.contains("consumer counter"), "{text}");
    let text = said(&database, &["status"]);
    assert!(text.contains("nobody seems to run consumer counter"), "{text}");
}

#[tokio::test]
async fn a_message_that_failed_is_told_of_by_status_consumer_and_message() {
    let (database, client) = two_messages().await;
    let state = |id: &str| report(&database, &["message", "show", id])[0]["consumers"][0]["state"].clone();
    let partition = report(&database, &["message", "show", "sent"])[0]["partition"].clone();
    let fail = |how: &str| format!("select pgonce.fail('counter', {partition}, 1, 'it quotes a secret', {how})");
    client.batch_execute(&fail("retry_at => 'infinity'")).await.expect("failed");
    assert_eq!(state("sent"), "parked");
    let status = report(&database, &["status"]);
    let blocked = &status["blocked_keys"][0];
    assert_eq!(
        (&blocked["message_id"], &blocked["key"], &blocked["attempts"]),
        (&json!("sent"), &json!("a"), &json!(1))
    );
    let text = said(&database, &["status"]);
    assert!(
        text.contains(r#"counter has failed 1 times at message sent of key "a""#) && !text.contains("secret"),
        "{text}"
    );
    let counts = || {
        let shown = report(&database, &["consumer", "show", CONSUMER]);
        ["failures", "parked", "dead"].map(|count| shown[count].as_i64().expect("a count"))
    };
    assert_eq!(counts(), [1, 1, 0]);

    client.batch_execute(&fail("permanent => true")).await.expect("failed");
    assert_eq!((state("sent"), counts()), (json!("dead"), [2, 0, 1]));
    assert_eq!(report(&database, &["status"])["blocked_keys"], json!([]));
    said(&database, &["dead-letter", "replay", "1", "--yes"]);
    assert_eq!((state("sent"), counts()), (json!("parked"), [2, 1, 0]));
    client.batch_execute(&fail("permanent => true")).await.expect("failed");
    assert_eq!(state("sent"), "dead");
    said(&database, &["dead-letter", "discard", "2", "--yes"]);
    assert_eq!((state("sent"), counts()), (json!("discarded"), [3, 0, 0]));
    let text = said(&database, &["consumer", "show", CONSUMER]);
    assert!(text.contains("failures") && text.contains("parked") && text.contains("dead"), "{text}");
}

#[tokio::test]
async fn status_names_who_keeps_dead_rows_alive() {
    let (database, mut client) = two_messages().await;
    let holder = client.transaction().await.expect("begun");
    holder
        .batch_execute("set local application_name = 'forgotten'; select pg_current_xact_id()")
        .await
        .expect("an xid");
    let other = database.connect().await;
    let held = "select count(*) from pgonce.horizon_holders
                where application_name = 'forgotten' and state = 'idle in transaction' and transactions >= 0";
    assert_eq!(number(&other, held).await, 1);
    holder.rollback().await.expect("let go");
    assert_eq!(number(&other, held).await, 0);
}

#[test]
fn completions_and_manual_pages_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = outcome(&["completions", shell]);
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("enqueue"), "{shell}");
    }
    let directory = tempfile::tempdir().expect("a directory");
    assert!(outcome(&["man", directory.path().to_str().expect("text")]).status.success());
    let page = std::fs::read_to_string(directory.path().join("pgonce-run.1")).expect("a page");
    assert!(page.contains("graceful"), "{page}");
    for file in ["pgonce.1", "pgonce-topic-purge.1", "pgonce-message-show.1"] {
        assert!(directory.path().join(file).is_file(), "{file}");
    }
}

#[test]
fn each_command_shows_an_example() {
    let help = outcome(&["-h"]);
    let help = String::from_utf8(help.stdout).expect("text");
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let mut count = 0;
    // A line that goes on is indented further.
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()));
    for command in names.filter(|command| *command != "help") {
        let text = String::from_utf8(outcome(&[command, "--help"]).stdout).expect("text");
        assert!(text.contains("Example"), "{command}");
        count += 1;
    }
    assert!(count > 10, "{help}");
    for command in [["topic", "create"], ["consumer", "create"], ["message", "show"]] {
        let text = String::from_utf8(outcome(&[&command[..], &["--help"]].concat()).stdout).expect("text");
        assert!(text.contains("Example"), "{command:?}");
    }
}

#[test]
fn the_help_says_what_is_created_and_quotes_keys_as_they_are_written() {
    for (command, words) in [("relay", "is created"), ("consume", "is created"), ("enqueue", "\"message_id\"")] {
        let text = String::from_utf8(outcome(&[command, "--help"]).stdout).expect("text");
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = pgonce(&["completions", "bash"]).stdout(std::process::Stdio::piped()).spawn().expect("started");
    drop(child.stdout.take());
    assert!(child.wait().expect("it ends").success());
}
