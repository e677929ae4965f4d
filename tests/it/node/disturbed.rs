//! A node that loses its connection, or has others beside it: at its tables, its topic, and its locks.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio_postgres::Client;

use super::{Running, TRANSCRIPTS, answers, blocking, node, pipelined, process, state, transcript};
use crate::fixture::TestDatabase;
use crate::probe::{eventually, number, pid_of, texts};
use crate::proxy::{Cut, Proxy, Towards};

/// The connection is lost at each message that the node, or the server, sends after the start; the answers of whose
/// COMMIT was lost as well are those of a node that lost nothing.
#[tokio::test]
async fn a_node_may_lose_its_connection_at_any_message() {
    const STRIDE: usize = 10;
    let input = [&process(1, 1), r#"{"type": "commit"}"#].join("\n");
    let expected = [
        r#"{"type": "processed", "in_reply_to": 1, "word": "w1", "count": 1, "was_duplicate": false}"#,
        r#"{"type": "committed", "output_count": 1}"#,
    ];
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    for towards in [Towards::Server, Towards::Client] {
        let (mut after, mut survived) = (0, 0);
        loop {
            let mut cut = Some(Cut { towards, after });
            let proxy = Proxy::start(&database.url, move |_| cut.take()).await;
            let (url, input) = (proxy.url.clone(), input.clone());
            let output = blocking(move || pipelined(&mut node(&["--database-url", &url, "--fresh"]), input)).await;
            let answered = String::from_utf8(output.stdout).expect("text");
            if output.status.success() {
                survived += 1;
                assert_eq!(answered.lines().collect::<Vec<_>>(), expected, "{after} towards {towards:?}");
                assert_eq!(state(&client).await, ["e1", "output e1 w1 1 t", "w1 1"], "{after} towards {towards:?}");
            } else {
                // It was not ready yet.
                assert_eq!((answered.as_str(), survived), ("", 0), "{after} towards {towards:?}");
            }
            if proxy.cuts() == 0 {
                break;
            }
            after += if survived == 0 { STRIDE } else { 1 };
        }
        assert!(survived > 30, "{survived} towards {towards:?}");
    }
}

#[tokio::test]
async fn an_outage_is_waited_for_once_and_not_by_each_line() {
    // As many as a transaction has, less the first.
    const AGAIN: usize = 19;
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    // So many connections to come are refused.
    let refused = Arc::new(AtomicUsize::new(0));
    let left = Arc::clone(&refused);
    let one_less = |left: usize| left.checked_sub(1);
    let proxy = Proxy::start(&database.url, move |_| {
        let is_refused = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok();
        is_refused.then_some(Cut { towards: Towards::Server, after: 0 })
    })
    .await;
    let url = proxy.url.clone();
    let mut command = node(&["--database-url", &url]);
    let mut node = Running::of(command.stderr(Stdio::piped()));
    let log = node.child.stderr.take().expect("it is piped");
    let logged = tokio::task::spawn_blocking(move || std::io::read_to_string(log).expect("text"));
    let mut node = blocking(move || {
        node.ask(&process(1, 1));
        node
    })
    .await;
    let lose = "select pg_terminate_backend(a.pid, 60000) from pg_stat_activity a
        where a.datname = current_database() and a.pid <> pg_backend_pid()";
    refused.store(usize::MAX, Ordering::SeqCst);
    client.batch_execute(lose).await.expect("a superuser may");
    // A transaction each.
    let commit = r#"{"type": "commit"}"#;
    let lines = [&process(2, 1), commit, &process(3, 1), commit, ""].join("\n");
    let mut node = blocking(move || {
        node.send(&lines);
        for _ in 0..4 {
            let answer = node.answer();
            assert!(answer.contains(r#""code": 11"#), "{answer}");
        }
        node
    })
    .await;
    // It is there again, and what is lost then is waited for again.
    for refusals in [0, 2] {
        refused.store(refusals, Ordering::SeqCst);
        client.batch_execute(lose).await.expect("a superuser may");
        node = blocking(move || {
            let answer = node.ask(commit);
            assert!(answer.starts_with(r#"{"type": "committed""#), "{answer}");
            node
        })
        .await;
    }
    blocking(move || node.finish()).await;
    let logged = logged.await.expect("no panic");
    // The last line met its lost session first, and then the refusals.
    assert_eq!(logged.matches("trying again").count(), AGAIN + 3, "{logged}");
}

#[tokio::test]
async fn what_a_lost_commit_did_not_do_is_done_again() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let url = database.url.clone();
    let mut node = blocking(move || {
        let mut node = Running::start(&["--database-url", &url]);
        node.ask(&process(1, 1));
        node
    })
    .await;
    // A sequence is not rolled back: it is once that the session ends within its COMMIT.
    let end_once = "create sequence commits;
        create function end_once() returns trigger language plpgsql as $$
        begin
          if nextval('commits') = 1 then
            perform pg_terminate_backend(pg_backend_pid());
            perform pg_sleep(60);
          end if;
          return null;
        end $$;
        create constraint trigger end_once after update on pgonce_node.turns
        deferrable initially deferred for each row execute function end_once();";
    client.batch_execute(end_once).await.expect("created");
    let counted = blocking(move || node.ask(&process(2, 1))).await;
    assert!(counted.ends_with(r#""count": 2, "was_duplicate": false}"#), "{counted}");
    assert_eq!(texts(&client, "select last_value::text from commits").await, ["2"]);
    assert_eq!(state(&client).await, ["e1", "e2", "output e1 w1 1 f", "output e2 w1 2 f", "w1 2"]);
}

/// Waits until another session waits for a lock that this one has.
async fn is_waited_for(holder: &Client, watcher: &Client) {
    let pid = pid_of(holder).await;
    let waiting = "select exists (select from pg_stat_activity a where $1 = any (pg_blocking_pids(a.pid)))";
    eventually("somebody waits", async || {
        watcher.query_one(waiting, &[&pid]).await.expect("a row").get::<_, bool>(0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_node_that_starts_beside_a_busy_one_waits_before_it_locks_the_tables() {
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    blocking(move || answers(&["--database-url", &url], process(1, 1))).await;
    let (busy, watcher) = (database.connect().await, database.connect().await);
    let lock = "begin; select from pgonce.consumers where consumer = 'node' for no key update";
    busy.batch_execute(lock).await.expect("locked");
    let url = database.url.clone();
    let started = tokio::task::spawn_blocking(move || answers(&["--database-url", &url], process(2, 1)));
    is_waited_for(&busy, &watcher).await;
    let write = "lock table pgonce_node.outputs, pgonce_node.turns in row exclusive mode nowait; commit";
    busy.batch_execute(write).await.expect("nobody has the tables");
    let answered = started.await.expect("no panic");
    assert!(answered[0].ends_with(r#""count": 2, "was_duplicate": false}"#), "{answered:?}");
}

#[tokio::test]
async fn the_isolation_that_a_database_sets_does_not_matter() {
    for (name, text) in TRANSCRIPTS {
        let (sent, expected) = transcript(text);
        let database = TestDatabase::new().await;
        let isolate = "do $$ begin
            execute format('alter database %I set default_transaction_isolation to ''repeatable read''', current_database());
        end $$";
        database.connect().await.batch_execute(isolate).await.expect("set");
        let (url, whole) = (database.url.clone(), sent.join("\n"));
        assert_eq!(blocking(move || answers(&["--database-url", &url], whole)).await, expected, "{name}");
    }
}

#[tokio::test]
async fn what_somebody_else_has_made_in_its_place_is_refused() {
    let table = "create table pgonce_node.outputs (
        \"position\" bigint generated always as identity primary key,
        event_id text not null, word text not null, count bigint not null, is_visible boolean not null default false);";
    let foreign_schema = "create schema pgonce_node authorization pg_monitor;";
    let foreign_table =
        format!("create schema pgonce_node; {table} alter table pgonce_node.outputs owner to pg_monitor;");
    let own = format!("create schema pgonce_node; {table}");
    for (made, refusal) in [
        (foreign_schema, Some("schema pgonce_node belongs to pg_monitor")),
        (&foreign_table, Some("table pgonce_node.outputs belongs to pg_monitor")),
        (&own, None),
    ] {
        let database = TestDatabase::new().await;
        database.connect().await.batch_execute(made).await.expect("made");
        let url = database.url.clone();
        let output = blocking(move || pipelined(&mut node(&["--database-url", &url]), process(1, 1))).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), refusal.is_none(), "{made}: {said}");
        assert!(said.contains(refusal.unwrap_or_default()), "{made}: {said}");
        assert_eq!(output.stdout.is_empty(), refusal.is_some(), "{made}");
    }
}

#[tokio::test]
async fn a_poll_looks_past_any_number_of_duplicates() {
    const DELIVERED: usize = 150;
    let mut lines = Vec::new();
    for nth in 0..=DELIVERED {
        let message = json!({ "id": format!("m{nth}") });
        lines.push(json!({ "type": "send", "message": message }).to_string());
        if nth < DELIVERED {
            lines.push(json!({ "type": "deliver", "message": message }).to_string());
        }
    }
    lines.push(r#"{"type": "poll", "max": 1}"#.to_owned());
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    let answered = blocking(move || answers(&["--database-url", &url], lines.join("\n"))).await;
    let last = answered.last().expect("answers");
    assert_eq!(last, r#"{"type": "polled", "messages": [{"id": "m150"}], "offset": 151}"#);
}

#[tokio::test]
async fn a_poll_waits_for_another_relay_of_its_topic() {
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    let mut node = blocking(move || {
        let mut node = Running::start(&["--database-url", &url]);
        node.ask(r#"{"type": "send", "message": {"id": "m"}}"#);
        node
    })
    .await;
    let (relay, watcher) = (database.connect().await, database.connect().await);
    relay.batch_execute("begin; select from pgonce.relay('node_messages')").await.expect("relayed");
    let polled = tokio::task::spawn_blocking(move || node.ask(r#"{"type": "poll"}"#));
    is_waited_for(&relay, &watcher).await;
    relay.batch_execute("commit").await.expect("committed");
    let answer = polled.await.expect("no panic");
    assert_eq!(answer, r#"{"type": "polled", "messages": [{"id": "m"}], "offset": 1}"#);
}

#[tokio::test]
async fn a_request_that_comes_before_init_may_be_answered_by_an_envelope() {
    const LINES: [&str; 4] = [
        r#"{"src":"c1","dest":"n1","body":{"type":"echo","msg_id":7,"echo":1}}"#,
        r#"{"type":"echo","msg_id":8,"echo":1}"#,
        r#"{"src":"c1","body":{"type":"what"}}"#,
        r#"{"src":"c0","dest":"n1","body":{"type":"init","msg_id":1,"node_id":"n1","node_ids":["n1"]}}"#,
    ];
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    let answered = blocking(move || answers(&["--envelopes", "--database-url", &url], LINES.join("\n"))).await;
    assert_eq!(
        answered,
        [
            r#"{"src":"n1","dest":"c1","body":{"type":"echo_ok","in_reply_to":7,"echo":1,"msg_id":0}}"#,
            r#"{"type": "echo_ok", "in_reply_to": 8, "echo": 1}"#,
            r#"{"type": "error", "code": 10, "text": "type \"what\" is not supported"}"#,
            r#"{"src":"n1","dest":"c0","body":{"type":"init_ok","in_reply_to":1,"msg_id":1}}"#,
        ]
    );
}

#[tokio::test]
async fn a_line_that_the_database_refuses_costs_its_neighbours_few_transactions() {
    const LINES: usize = 500;
    const REFUSED: [usize; 3] = [0, LINES / 2, LINES - 1];
    let mut lines: Vec<String> = (0..LINES)
        .map(|nth| {
            // No numeric of PostgreSQL's is as large.
            let number = if REFUSED.contains(&nth) { "1e200000" } else { "1" };
            format!(r#"{{"type": "send", "msg_id": {nth}, "message": {{"id": "m{nth}", "number": {number}}}}}"#)
        })
        .collect();
    lines.push(r#"{"type": "poll", "max": 1000}"#.to_owned());
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    let mut answered = blocking(move || answers(&["--database-url", &url], lines.join("\n"))).await;
    let polled: Value = serde_json::from_str(&answered.pop().expect("answers")).expect("JSON");
    for (nth, answer) in answered.iter().enumerate() {
        let expected = if REFUSED.contains(&nth) {
            format!(
                r#"{{"type": "error", "in_reply_to": {nth}, "code": 12, "text": "value overflows numeric format"}}"#
            )
        } else {
            format!(r#"{{"type": "sent", "in_reply_to": {nth}, "message_id": "m{nth}"}}"#)
        };
        assert_eq!(answer, &expected);
    }
    let sent =
        (0..LINES).filter(|nth| !REFUSED.contains(nth)).map(|nth| json!({ "id": format!("m{nth}"), "number": 1 }));
    assert_eq!(polled["messages"], Value::Array(sent.collect()));
    let transactions = number(&database.connect().await, "select turn from pgonce_node.turns").await;
    assert!(transactions < 100, "{transactions}");
}
