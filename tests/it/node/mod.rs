//! `pgonce node`: it answers as its page says, byte for byte, whatever is sent, and however often it is killed.

mod disturbed;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::texts;
use crate::programs::pgonce;

/// Lines that are sent, each with the answer behind it.
const TRANSCRIPTS: [(&str, &str); 3] = [
    ("processing", include_str!("../../transcripts/processing.jsonl")),
    ("messages", include_str!("../../transcripts/messages.jsonl")),
    ("envelopes", include_str!("../../transcripts/envelopes.jsonl")),
];

/// What is sent in a transcript, and what is answered.
fn transcript(text: &str) -> (Vec<&str>, Vec<&str>) {
    let lines: Vec<&str> = text.lines().collect();
    (lines.iter().copied().step_by(2).collect(), lines.iter().copied().skip(1).step_by(2).collect())
}

fn node(arguments: &[&str]) -> Command {
    pgonce(&[&["node"], arguments].concat())
}

/// A node to which lines are sent one by one; killed when dropped.
struct Running {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        Self::of(node(arguments).stderr(Stdio::null()))
    }

    fn of(command: &mut Command) -> Self {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped.spawn().expect("the program can be started");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        Self { child, answers }
    }

    /// Sends lines. Blocks where the node takes no more.
    fn send(&mut self, lines: &str) {
        let input = self.child.stdin.as_mut().expect("it is piped");
        input.write_all(lines.as_bytes()).expect("the node reads");
    }

    /// The next answer. Blocks.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("text");
        assert!(line.ends_with('\n'), "the node has ended: {line:?}");
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        self.send(&format!("{line}\n"));
        self.answer()
    }

    /// Closes its input, and checks that it ends well and says no more.
    fn finish(mut self) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.answers.read_to_string(&mut rest).expect("text");
        assert_eq!(rest, "");
        assert!(self.child.wait().expect("a child can be waited for").success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends everything at once, and waits for the end.
fn pipelined(command: &mut Command, input: impl Into<Vec<u8>>) -> Output {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("the program can be started");
    let mut to_node = child.stdin.take().expect("it is piped");
    let input = input.into();
    // The node may end before it has read all.
    let sender = std::thread::spawn(move || drop(to_node.write_all(&input)));
    let output = child.wait_with_output().expect("a child can be waited for");
    sender.join().expect("no panic");
    output
}

/// The answers to lines that are sent at once, by a node that ends well.
fn answers(arguments: &[&str], input: impl Into<Vec<u8>>) -> Vec<String> {
    let output = pipelined(&mut node(arguments), input);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect()
}

/// Runs what blocks, beside what does not.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("no panic")
}

fn process(event: usize, word: usize) -> String {
    json!({ "type": "process", "msg_id": event, "event_id": format!("e{event}"), "word": format!("w{word}") })
        .to_string()
}

/// All that events have left: counts, seen events and outputs.
async fn state(client: &Client) -> Vec<String> {
    texts(
        client,
        "select word || ' ' || count from pgonce.word_counts where consumer = 'node'
         union all
         select message_id from pgonce.processed_ids join pgonce.consumers using (consumer_id) where consumer = 'node'
         union all
         select concat_ws(' ', 'output', event_id, word, count, is_visible) from pgonce_node.outputs
         order by 1",
    )
    .await
}

#[tokio::test]
async fn transcripts_are_answered_byte_for_byte() {
    for (name, text) in TRANSCRIPTS {
        let (sent, expected) = transcript(text);
        let whole = sent.join("\n");
        let database = TestDatabase::new().await;
        let url = database.url.clone();
        let answered = blocking(move || answers(&["--database-url", &url], whole)).await;
        assert_eq!(answered, expected, "{name}, at once");
        let url = database.url.clone();
        let answered = blocking(move || {
            let mut node = Running::start(&["--database-url", &url, "--fresh"]);
            let answered: Vec<String> = sent.iter().map(|line| node.ask(line)).collect();
            node.finish();
            answered
        })
        .await;
        assert_eq!(answered, expected, "{name}, one by one");
    }
}

#[test]
fn without_a_database_it_starts_one_and_does_not_look_for_others() {
    let (sent, expected) = transcript(TRANSCRIPTS[0].1);
    let mut command = node(&[]);
    command.env("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing").env("RUST_LOG", "debug");
    let output = pipelined(&mut command, sent.join("\n"));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let answered = String::from_utf8(output.stdout).expect("text");
    assert_eq!(answered.lines().collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn a_database_without_the_schema_gets_it_and_several_nodes_may_start_at_once() {
    let database = TestDatabase::empty().await;
    let starts: Vec<_> = (0..3)
        .map(|nth| {
            let url = database.url.clone();
            let arguments = ["--database-url".to_owned(), url, "--schema".to_owned(), "Events".to_owned()];
            tokio::task::spawn_blocking(move || {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                answers(&arguments, process(nth, 0))
            })
        })
        .collect();
    let mut counts = Vec::new();
    for start in starts {
        let answered = start.await.expect("no panic");
        let answer: Value = serde_json::from_str(&answered[0]).expect("JSON");
        counts.push(answer["count"].as_i64().expect("a number"));
    }
    counts.sort_unstable();
    assert_eq!(counts, [1, 2, 3]);
    let outputs = texts(&database.connect().await, "select word from \"Events_node\".outputs").await;
    assert_eq!(outputs, ["w0", "w0", "w0"]);
}

#[tokio::test]
async fn pipelined_lines_are_answered_in_order() {
    const LINES: usize = 5_000;
    const WORDS: usize = 7;
    let database = TestDatabase::new().await;
    let mut input = String::new();
    let mut expected = Vec::new();
    for nth in 0..LINES {
        // Every third event comes again, at once or in a later batch.
        let event = if nth % 3 == 2 { nth - 2 } else { nth };
        let line = if nth % 100 == 99 {
            expected.push(json!({ "type": "echo_ok", "in_reply_to": nth, "echo": nth }));
            json!({ "type": "echo", "msg_id": nth, "echo": nth })
        } else {
            let word = event % WORDS;
            let is_event = |nth: usize| nth % 3 != 2 && nth % 100 != 99 && nth % WORDS == word;
            // What was passed over for an echo counts where it comes again.
            let late = (2..=nth).step_by(3).filter(|nth| nth % 100 != 99 && (nth - 2) % 100 == 99);
            let late = late.filter(|nth| (nth - 2) % WORDS == word).count();
            let count = (0..=nth).filter(|nth| is_event(*nth)).count() + late;
            let was_duplicate = event != nth && event % 100 != 99;
            let word = format!("w{word}");
            expected.push(json!({
                "type": "processed", "in_reply_to": nth, "word": word, "count": count, "was_duplicate": was_duplicate
            }));
            json!({ "type": "process", "msg_id": nth, "event_id": format!("e{event}"), "word": word })
        };
        writeln!(input, "{line}").expect("a string grows");
    }
    let url = database.url.clone();
    let answered = blocking(move || answers(&["--database-url", &url], input)).await;
    let answered: Vec<Value> = answered.iter().map(|answer| serde_json::from_str(answer).expect("JSON")).collect();
    assert_eq!(answered.len(), expected.len());
    for (answered, expected) in answered.iter().zip(&expected) {
        assert_eq!(answered, expected);
    }
}

/// Lines of which a client sends the consecutive events at once, and waits for each other one.
fn long_script() -> Vec<Vec<String>> {
    let mut script: Vec<Vec<String>> = vec![Vec::new()];
    for nth in 0..600 {
        script.last_mut().expect("it is never empty").push(process(nth, nth % 7));
        let other = match nth {
            200 => json!({ "type": "checkpoint", "checkpoint_id": "cp" }),
            400 => json!({ "type": "restore", "checkpoint_id": "cp" }),
            _ if nth % 50 == 0 => json!({ "type": "rollback" }),
            _ if nth % 30 == 0 => json!({ "type": "commit" }),
            _ => continue,
        };
        script.extend([vec![other.to_string()], Vec::new()]);
    }
    script
}

#[tokio::test]
async fn a_node_that_is_killed_goes_on_where_it_was() {
    const KILL_EVERY: usize = 71;
    let [calm, stormy] = [TestDatabase::new().await, TestDatabase::new().await];
    let url = calm.url.clone();
    let lines: Vec<String> = long_script().concat();
    let count = lines.len();
    let answered = blocking(move || answers(&["--database-url", &url], lines.join("\n"))).await;
    assert_eq!(answered.len(), count);
    assert!(!answered.iter().any(|answer| answer.contains("error")), "{answered:?}");

    let url = stormy.url.clone();
    let kills = blocking(move || {
        let start = || Running::start(&["--database-url", &url]);
        let (mut node, mut heard, mut kills) = (start(), 0, 0);
        for window in long_script() {
            let mut rest = &window[..];
            while !rest.is_empty() {
                node.send(&(rest.join("\n") + "\n"));
                let mut is_killed = false;
                while let [_, later @ ..] = rest {
                    heard += 1;
                    if heard % KILL_EVERY == 0 {
                        // What is unanswered may be committed, or under way, or neither.
                        node = start();
                        (is_killed, kills) = (true, kills + 1);
                        break;
                    }
                    node.answer();
                    rest = later;
                }
                assert!(is_killed || rest.is_empty());
            }
        }
        node.finish();
        kills
    })
    .await;
    assert!(kills >= 8, "{kills}");
    assert_eq!(state(&stormy.connect().await).await, state(&calm.connect().await).await);
}

#[tokio::test]
async fn several_nodes_share_a_database() {
    const EVENTS: usize = 2_000;
    let database = TestDatabase::new().await;
    let nodes: Vec<_> = [1, EVENTS - 1]
        .map(|step| {
            let url = database.url.clone();
            let lines = (0..EVENTS).map(|nth| nth * step % EVENTS).map(|event| process(event, event % 5) + "\n");
            let input: String = lines.collect();
            tokio::task::spawn_blocking(move || answers(&["--database-url", &url], input))
        })
        .into();
    let mut counts = Vec::new();
    for node in nodes {
        let answered = node.await.expect("no panic");
        assert_eq!(answered.len(), EVENTS);
        for answer in answered {
            let answer: Value = serde_json::from_str(&answer).expect("JSON");
            if answer["was_duplicate"] == false {
                counts.push((answer["word"].to_string(), answer["count"].as_u64().expect("a number")));
            }
        }
    }
    counts.sort();
    let expected: Vec<_> =
        (0..5).flat_map(|word| (1..=400).map(move |count| (format!("\"w{word}\""), count))).collect();
    assert_eq!(counts, expected);
}

#[tokio::test]
async fn bad_lines_are_answered_and_change_nothing() {
    const DEEP: usize = 100_000;
    let deep = "[".repeat(DEEP) + &"]".repeat(DEEP);
    let process = |event: &str, word: &str| json!({ "type": "process", "event_id": event, "word": word }).to_string();
    let send = |payload: &str| format!(r#"{{"type": "send", "message": {{"id": "m", "payload": {payload}}}}}"#);
    let bad: Vec<(Vec<u8>, u64)> = [
        (String::new(), 12),
        (" \t\r".to_owned(), 12),
        ("hello".to_owned(), 12),
        ("{".to_owned(), 12),
        ("3".to_owned(), 12),
        ("null".to_owned(), 12),
        ("{}".to_owned(), 12),
        (r#"["process", 1, "e", "w"]"#.to_owned(), 12),
        (r#"{"src": "c", "dest": "n", "body": ["commit"]}"#.to_owned(), 12),
        (r#"{"src": 1, "body": {"type": "commit"}}"#.to_owned(), 12),
        (r#"{"type": 1}"#.to_owned(), 12),
        (r#"{"src": "c", "dest": "n", "body": null}"#.to_owned(), 12),
        (r#"{"type": "commit", "type": "commit"}"#.to_owned(), 12),
        (r#"{"type": "commit", "msg_id": "1"}"#.to_owned(), 12),
        (r#"{"type": "commit"} {"type": "commit"}"#.to_owned(), 12),
        (r#"{"type": "process", "event_id": "e"}"#.to_owned(), 12),
        (r#"{"type": "process", "event_id": 1, "word": "w"}"#.to_owned(), 12),
        (r#"{"type": "checkpoint", "checkpoint_id": null}"#.to_owned(), 12),
        (r#"{"type": "poll", "max": 0}"#.to_owned(), 12),
        (r#"{"type": "poll", "max": 1e99}"#.to_owned(), 12),
        (r#"{"type": "send", "message": "m"}"#.to_owned(), 12),
        (r#"{"type": "send", "message": ["m"]}"#.to_owned(), 12),
        (r#"{"type": "deliver", "message": {}}"#.to_owned(), 12),
        (r#"{"type": "transfer"}"#.to_owned(), 10),
        (process("", "w"), 12),
        (process(&"e".repeat(256), "w"), 12),
        (process("e\0", "w"), 12),
        (process("e", "w\0"), 12),
        (process("e", &"w".repeat(3_000)), 12),
        (r#"{"type": "process", "event_id": "\ud800", "word": "w"}"#.to_owned(), 12),
        (send(r#""\u0000""#), 12),
        // These the database refuses, in a transaction with the lines around them.
        (send(r#""\ud800""#), 12),
        (send("1e200000"), 12),
        (send(&format!("\"{}\"", "x".repeat(2 << 20))), 12),
        (deep.clone(), 12),
        (format!(r#"{{"type": "echo", "echo": {deep}}}"#), 12),
        (format!("\"{}", "x".repeat(20 << 20)), 12),
    ]
    .map(|(line, code)| (line.into_bytes(), code))
    .into_iter()
    .chain([(b"{\"type\": \"\xff\"}".to_vec(), 12)])
    .collect();
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    let codes: Vec<u64> = bad.iter().map(|(_, code)| *code).collect();
    let shown: Vec<String> =
        bad.iter().map(|(line, _)| String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned()).collect();
    let mut input = Vec::new();
    for (nth, (line, _)) in bad.iter().enumerate() {
        // A good line before each.
        input.extend_from_slice(process(&format!("good {nth}"), "good").as_bytes());
        input.push(b'\n');
        input.extend_from_slice(line);
        input.push(b'\n');
    }
    let answered = blocking(move || answers(&["--database-url", &url], input)).await;
    assert_eq!(answered.len(), 2 * codes.len());
    for (nth, pair) in answered.chunks(2).enumerate() {
        let [good, bad]: [Value; 2] = [0, 1].map(|nth| serde_json::from_str(&pair[nth]).expect("JSON"));
        assert_eq!((&good["count"], &good["was_duplicate"]), (&json!(nth + 1), &json!(false)), "before {}", shown[nth]);
        assert_eq!((&bad["type"], &bad["code"]), (&json!("error"), &json!(codes[nth])), "{}: {bad}", shown[nth]);
        assert!(bad["text"].as_str().is_some_and(|text| (10..1_000).contains(&text.len())), "{bad}");
    }
    let client = database.connect().await;
    assert_eq!(texts(&client, "select message_id from pgonce.outbox").await, [""; 0]);
    assert_eq!(texts(&client, "select word from pgonce.word_counts").await, ["good"]);
}

#[tokio::test]
async fn fresh_empties_the_tables_also_of_a_node_that_runs() {
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    blocking(move || {
        let arguments = ["--database-url", &url];
        let mut before = Running::start(&arguments);
        for line in [
            &process(1, 1),
            r#"{"type": "commit"}"#,
            r#"{"type": "checkpoint", "checkpoint_id": "cp"}"#,
            r#"{"type": "send", "message": {"id": "m"}}"#,
            r#"{"type": "deliver", "message": {"id": "m"}}"#,
        ] {
            assert!(!before.ask(line).contains("error"), "{line}");
        }
        let mut fresh = Running::start(&[&arguments[..], &["--fresh"]].concat());
        for (line, answer) in [
            (r#"{"type": "outputs"}"#, r#"{"type": "outputs_ok", "outputs": []}"#),
            (r#"{"type": "poll"}"#, r#"{"type": "polled", "messages": [], "offset": 0}"#),
            (r#"{"type": "send", "message": {"id": "m"}}"#, r#"{"type": "sent", "message_id": "m"}"#),
            (r#"{"type": "poll"}"#, r#"{"type": "polled", "messages": [{"id": "m"}], "offset": 1}"#),
        ] {
            assert_eq!(fresh.ask(line), answer);
        }
        let unknown = fresh.ask(r#"{"type": "restore", "checkpoint_id": "cp"}"#);
        assert!(unknown.contains(r#""code": 20"#), "{unknown}");
        let counted = before.ask(&process(1, 1));
        assert!(counted.ends_with(r#""word": "w1", "count": 1, "was_duplicate": false}"#), "{counted}");
        before.finish();
        fresh.finish();
    })
    .await;
}

#[tokio::test]
async fn a_node_whose_tables_were_dropped_makes_them_again() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let url = database.url.clone();
    let mut node = blocking(move || {
        let mut node = Running::start(&["--database-url", &url]);
        node.ask(&process(1, 1));
        node
    })
    .await;
    client.batch_execute("select * from pgonce.drop_consumer('node')").await.expect("dropped");
    let counted = blocking(move || node.ask(&process(1, 1))).await;
    assert!(counted.ends_with(r#""count": 1, "was_duplicate": false}"#), "{counted}");
}

#[test]
fn what_needs_no_database_does_not_wait_for_it_and_a_signal_ends_it() {
    // Nobody ever answers here.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = silent.local_addr().expect("it is bound").port();
    let url = format!("postgresql://pgonce@127.0.0.1:{port}/pgonce?sslmode=disable&connect_timeout=600");
    let mut node = Running::start(&["--database-url", &url]);
    let init = r#"{"src":"c0","dest":"n1","body":{"type":"init","msg_id":1,"node_id":"n1","node_ids":["n1"]}}"#;
    // What needs the database is in the same batch, perhaps.
    node.send(&format!("{init}\n{}\n", process(1, 1)));
    assert_eq!(node.answer(), r#"{"src":"n1","dest":"c0","body":{"type":"init_ok","in_reply_to":1,"msg_id":0}}"#);
    let pid = i32::try_from(node.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, Signal::TERM).expect("a child can be signalled");
    assert!(node.child.wait().expect("a child can be waited for").success());
}

#[test]
fn a_database_that_cannot_be_reached_is_an_error() {
    let output = pipelined(&mut node(&["--database-url", "postgresql://pgonce@127.0.0.1:1/pgonce"]), "");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    assert!(String::from_utf8_lossy(&output.stderr).contains("127.0.0.1"));
}

#[tokio::test]
async fn a_signal_ends_it_well_between_lines() {
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    blocking(move || {
        let mut node = Running::start(&["--database-url", &url]);
        node.ask(&process(1, 1));
        let pid = i32::try_from(node.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, Signal::TERM).expect("a child can be signalled");
        assert!(node.child.wait().expect("a child can be waited for").success());
    })
    .await;
}

#[tokio::test]
async fn it_ends_well_when_nobody_reads_its_answers() {
    let database = TestDatabase::new().await;
    let url = database.url.clone();
    let output = blocking(move || {
        let mut command = node(&["--database-url", &url]);
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("the program can be started");
        drop(child.stdout.take());
        let mut input = child.stdin.take().expect("it is piped");
        input.write_all((process(1, 1) + "\n").as_bytes()).expect("the node reads");
        let output = child.wait_with_output().expect("a child can be waited for");
        drop(input);
        output
    })
    .await;
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
