//! `pgonce enqueue`: lines into messages, once each, however often it is run.

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, number, texts};
use crate::programs::pgonce;

const TOPIC: &str = "t";
const IDS: &str = "select message_id from pgonce.outbox order by seq";

async fn prepared() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, "c").await;
    (database, client)
}

/// Pipes lines into the command.
fn enqueue(database: &TestDatabase, lines: &str, arguments: &[&str]) -> Output {
    let arguments = [&["enqueue", TOPIC, "--database-url", &database.url], arguments].concat();
    let mut command = pgonce(&arguments);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("started");
    let mut input = child.stdin.take().expect("piped");
    let lines = lines.to_owned();
    // It may end before it has read all.
    let writer = std::thread::spawn(move || drop(input.write_all(lines.as_bytes())));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic");
    output
}

fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn a_line_may_say_all_that_a_message_has() {
    let (database, client) = prepared().await;
    let line = r#"{"payload": {"a": 1}, "key": "k", "message_id": "m", "headers": {"h": [2]}, "deliver_at": "2100-01-31T09:00:00+01:00"}"#;
    let output = enqueue(&database, &format!("{line}\n\n{{\"payload\": null}}"), &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "enqueued 2 messages, refused 0 duplicates\n");
    let written = "
        select concat_ws(' ', message_id, key, payload, headers, status, deliver_at at time zone 'UTC')
        from pgonce.outbox where key is not null";
    assert_eq!(texts(&client, written).await, [r#"m k {"a": 1} {"h": [2]} SCHEDULED 2100-01-31 08:00:00"#]);
}

#[tokio::test]
async fn the_same_input_again_enqueues_nothing_twice() {
    let (database, client) = prepared().await;
    let lines: Vec<String> = (0..2500).map(|nth| format!("{{\"payload\": {nth}}}")).collect();
    let lines = lines.join("\n");
    let first = enqueue(&database, &lines, &["--source", "day-1", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&first.stdout).expect("JSON");
    assert_eq!((&report["enqueued"], &report["duplicates"]), (&2500.into(), &0.into()));
    let again = enqueue(&database, &lines, &["--source", "day-1", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&again.stdout).expect("JSON");
    assert_eq!((&report["enqueued"], &report["duplicates"]), (&0.into(), &2500.into()));
    assert_eq!(number(&client, "select count(*) from pgonce.outbox").await, 2500);
    assert_eq!(texts(&client, IDS).await[2499], "day-1:2500");
}

#[tokio::test]
async fn a_bad_line_is_named_and_the_lines_before_it_are_there() {
    let (database, client) = prepared().await;
    for (nth, (bad, reason)) in [
        ("{\"payload\": ", "EOF"),
        ("[]", "invalid"),
        ("{\"key\": \"k\"}", "payload"),
        ("{\"payload\": 1, \"kye\": \"k\"}", "unknown field `kye`"),
        ("{\"payload\": \"\\u0000\"}", "u0000"),
        ("{\"payload\": 1, \"deliver_at\": \"soon\"}", "deliver_at"),
    ]
    .into_iter()
    .enumerate()
    {
        let good = format!("{{\"payload\": 0, \"message_id\": \"{nth}\"}}");
        let said = refusal(&enqueue(&database, &format!("{good}\n{bad}\n{good}\n"), &[]));
        assert!(said.contains("line 2 is refused") && said.contains(reason), "{said}");
        assert_eq!(number(&client, "select count(*) from pgonce.outbox").await, i64::try_from(nth).expect("few") + 1);
    }
}

#[tokio::test]
async fn a_line_that_the_server_refuses_is_named_and_takes_nothing_of_its_transaction_along() {
    let (database, client) = prepared().await;
    client.batch_execute("select * from pgonce.create_topic('t', payload_bytes_max => 100)").await.expect("altered");
    let large = format!("{{\"payload\": \"{}\"}}", "x".repeat(200));
    let said = refusal(&enqueue(&database, &format!("{{\"payload\": 1}}\n\n{large}\n"), &[]));
    assert!(said.contains("line 3 is refused") && said.contains("topic 't' takes 100"), "{said}");
    assert_eq!(number(&client, "select count(*) from pgonce.outbox").await, 0);
}

#[tokio::test]
async fn a_file_is_read_and_one_that_is_missing_is_named() {
    let (database, client) = prepared().await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("lines.ndjson");
    std::fs::write(&file, "{\"payload\": 1, \"message_id\": \"one\"}").expect("written");
    let name = |file: &Path| file.to_str().expect("text").to_owned();
    assert!(enqueue(&database, "", &[&name(&file)]).status.success());
    assert_eq!(texts(&client, IDS).await, ["one"]);
    let missing = name(&directory.path().join("missing"));
    assert!(refusal(&enqueue(&database, "", &[&missing])).contains(&missing));
}
