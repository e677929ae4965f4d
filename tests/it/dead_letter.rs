//! `pgonce dead-letter`: what it lists, what it gives back or discards, and how much of it at a time.

use pgonce::{Message, Producer, Relay};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, number, texts};
use crate::programs::outcome;

const SETTLED: &str = "select concat_ws(' ', message_id, state) from pgonce.dead_letters order by dead_letter_id";

/// Runs `pgonce dead-letter` to a good end; what it printed.
fn said(database: &TestDatabase, arguments: &[&str]) -> String {
    let output = outcome(&[&["dead-letter"], arguments, &["--database-url", &database.url]].concat());
    assert!(output.status.success(), "{arguments:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The ids of the messages that are listed.
fn listed(database: &TestDatabase, arguments: &[&str]) -> String {
    let text = said(database, &[&["list", "--json"], arguments].concat());
    let letters: Value = serde_json::from_str(&text).expect("JSON");
    let ids = letters.as_array().expect("an array").iter().map(|letter| letter["message_id"].as_str().expect("an id"));
    ids.collect::<Vec<_>>().join(" ")
}

/// Three dead letters of two topics: `a1` is an hour old, and `b1` and `c1` are new.
async fn world() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    for (topic, consumer, ids) in [("t", "c", &["a1", "b1"] as &[&str]), ("u", "d", &["c1"])] {
        create(&client, topic, 1, consumer).await;
        for id in ids {
            let message = Message::json(&json!({ "secret": id })).expect("JSON").id(*id).key(&id[..1]);
            let message = message.header("trace", "17");
            Producer::new(topic).send(&client, &message).await.expect("sent");
        }
    }
    Relay::all().step(&database.database(1)).await.expect("relayed");
    let fail = "
        select pgonce.fail('c', 0, 1, 'no route', permanent => true);
        select pgonce.fail('c', 0, 2, 'timeout of 5 s', permanent => true);
        select pgonce.fail('d', 0, 1, E'timeout\nof 6 s', permanent => true);
        update pgonce.dead_letters set failed_at = clock_timestamp() - interval '1 hour' where message_id = 'a1'";
    client.batch_execute(fail).await.expect("failed");
    (database, client)
}

#[tokio::test]
async fn dead_letters_are_listed_by_what_they_have_in_common() {
    let (database, client) = world().await;
    client.batch_execute("select pgonce.discard_dead_letters('{3}')").await.expect("discarded");
    for (filters, ids) in [
        (&[] as &[&str], "a1 b1"),
        (&["--consumer", "c"], "a1 b1"),
        (&["--consumer", "d"], ""),
        (&["--topic", "t"], "a1 b1"),
        (&["--topic", "u"], ""),
        (&["--key", "b"], "b1"),
        (&["--error", "of 5"], "b1"),
        (&["--error", "%"], ""),
        (&["--older-than", "30m"], "a1"),
        (&["--older-than", "2h"], ""),
        (&["--newer-than", "30m"], "b1"),
        (&["--newer-than", "2h", "--error", "route"], "a1"),
        (&["--state", "discarded"], "c1"),
        (&["--state", "replayed"], ""),
        (&["--state", "all"], "a1 b1 c1"),
        (&["--state", "all", "--limit", "2"], "a1 b1"),
    ] {
        assert_eq!(listed(&database, filters), ids, "{filters:?}");
    }
    let text = said(&database, &["list", "--limit", "1"]);
    assert!(text.contains("no route") && text.contains("there may be more") && !text.contains("secret"), "{text}");
    assert!(!said(&database, &["list"]).contains("there may be more"));
}

#[tokio::test]
async fn a_dead_letter_is_shown_with_all_that_is_known() {
    let (database, client) = world().await;
    client.batch_execute("select pgonce.discard_dead_letters('{3}')").await.expect("discarded");
    let shown: Value = serde_json::from_str(&said(&database, &["show", "3", "--json"])).expect("JSON");
    for (name, value) in [
        ("dead_letter_id", json!(3)),
        ("consumer", json!("d")),
        ("topic", json!("u")),
        ("partition", json!(0)),
        ("offset", json!(1)),
        ("message_id", json!("c1")),
        ("key", json!("c")),
        ("attempts", json!(1)),
        ("error", json!("timeout\nof 6 s")),
        ("state", json!("discarded")),
        ("payload", json!({ "secret": "c1" })),
        ("headers", json!({ "trace": "17" })),
    ] {
        assert_eq!(shown[name], value, "{name}");
    }
    assert!(shown["settled_by"].is_string() && shown["settled_at"].is_string(), "{shown}");
    let text = said(&database, &["show", "1"]);
    assert!(text.contains("no route") && text.contains(r#"{"secret": "a1"}"#) && text.contains("trace"), "{text}");
}

#[tokio::test]
async fn what_is_named_or_passes_the_filters_is_settled_and_nothing_else() {
    let (database, client) = world().await;
    let text = said(&database, &["discard", "--consumer", "d", "--error", "timeout", "--yes"]);
    assert_eq!(text, "discarded 1 dead letters; 0 had been settled by somebody else\n");
    assert_eq!(texts(&client, SETTLED).await, ["a1 dead", "b1 dead", "c1 discarded"]);
    let text = said(&database, &["replay", "3", "2", "2", "--yes"]);
    assert_eq!(text, "replayed 1 dead letters; 1 had been settled by somebody else\n");
    assert_eq!(texts(&client, SETTLED).await, ["a1 dead", "b1 replayed", "c1 discarded"]);
    assert_eq!(texts(&client, "select message_id from pgonce.parked").await, ["b1"]);
    said(&database, &["replay", "--newer-than", "30m", "--yes"]);
    assert_eq!(texts(&client, SETTLED).await, ["a1 dead", "b1 replayed", "c1 discarded"]);
    // Where nothing is to be settled there is nothing to confirm.
    assert!(said(&database, &["replay", "--topic", "u"]).starts_with("replayed 0 "));
    said(&database, &["replay", "--all", "--yes"]);
    assert_eq!(texts(&client, SETTLED).await, ["a1 replayed", "b1 replayed", "c1 discarded"]);
}

#[tokio::test]
async fn nothing_is_settled_without_a_yes_or_beside_an_id_that_is_unknown() {
    let (database, client) = world().await;
    for (arguments, code, word) in [
        (&["replay", "1"] as &[&str], 2, "--yes"),
        (&["replay", "--consumer", "c"], 2, "Really replay 2 dead letters?"),
        (&["discard", "--all"], 2, "Really discard 3 dead letters?"),
        (&["discard", "1", "17", "--yes"], 1, "17"),
    ] {
        let output = outcome(&[&["dead-letter"], arguments, &["--database-url", &database.url]].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(word), "{arguments:?}");
    }
    assert_eq!(texts(&client, SETTLED).await, ["a1 dead", "b1 dead", "c1 dead"]);
}

#[tokio::test]
async fn any_number_is_settled_a_thousand_in_a_transaction() {
    let (database, client) = world().await;
    let many = r#"
        insert into pgonce.dead_letters (
          "offset", enqueued_at, consumer_id, partition, attempts, bytes, message_id, error, payload)
        select n, now(), (select consumer_id from pgonce.consumers where consumer = 'c'), 0, 1, 1, 'm' || n, 'x', '1'
        from generate_series(101, 2300) n"#;
    client.batch_execute(many).await.expect("inserted");
    let text = said(&database, &["discard", "--consumer", "c", "--error", "x", "--yes"]);
    assert!(text.starts_with("discarded 2200 "), "{text}");
    let parts = "select count(*) from (
                   select 1 from pgonce.dead_letters where state = 'discarded' group by xmin
                   having count(*) <= 1000) parts";
    assert_eq!(number(&client, parts).await, 3);
    assert_eq!(listed(&database, &[]), "a1 b1 c1");
}
