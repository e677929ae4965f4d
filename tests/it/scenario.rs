//! The scenarios: what is seen, what comes out, and that nothing of them is left.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, texts, until_blocked};
use crate::programs::{Running, outcome, pgonce};

const LOST_ACK: [&str; 4] = [
    "Producer: Sending message...",
    "Queue: Message received",
    "Network: ACK lost!",
    "Producer: No ACK received, retrying...",
];
const PARTITION: [&str; 3] = [
    "Producer: Sending message...",
    "Network: Partition, the producer is cut off while its COMMIT is on the way!",
    "Producer: No ACK received, retrying on another connection...",
];
const HEALED: &str = "Network: Partition healed, the first COMMIT arrives after all";
const RECEIVED: &str = "Queue: Message received";
const ANSWERED: &str = "Producer: ACK received";
const DOUBLED: &str = "Queue: Duplicate message received!";
const REFUSED: &str = "Queue: Duplicate message detected, rejected";
const DECREMENTED: [&str; 3] = [RECEIVED, "Consumer: Processing message...", "Consumer: Inventory decremented"];
const CRASHED: &str = "Consumer: CRASH before ACK!";
const ROLLED_BACK: &str = "Database: The decrement had not committed, and is rolled back";
const REDELIVERED: [&str; 2] = ["Queue: No ACK, redelivering message...", "Consumer: Processing message..."];
const AGAIN: &str = "Consumer: Inventory decremented again!";
const ONCE: &str = "Consumer: Inventory decremented";
const DONE: &str = "Queue: ACK received";

/// The steps of a consumer that is killed: twice where its first effect had committed.
fn crash(is_twice: bool) -> Vec<&'static str> {
    if is_twice {
        [&DECREMENTED[..], &[CRASHED], &REDELIVERED, &[AGAIN, DONE]].concat()
    } else {
        [&DECREMENTED[..], &[CRASHED, ROLLED_BACK], &REDELIVERED, &[ONCE, DONE]].concat()
    }
}

/// What is to be seen of a scenario, and what is to come out.
fn expected(scenario: &str, is_naive: bool) -> (Vec<&'static str>, &'static str) {
    match (scenario, is_naive) {
        ("producer-retry", true) => ([&LOST_ACK[..], &[DOUBLED, ANSWERED]].concat(), "duplicate_messages"),
        ("producer-retry", false) => ([&LOST_ACK[..], &[REFUSED, ANSWERED]].concat(), "exactly_once"),
        ("network-partition", true) => {
            ([&PARTITION[..], &[RECEIVED, ANSWERED, HEALED, DOUBLED]].concat(), "duplicate_messages")
        }
        ("network-partition", false) => {
            let waiting = "Queue: The same message is on its way, waiting for its transaction...";
            ([&PARTITION[..], &[waiting, HEALED, RECEIVED, REFUSED, ANSWERED]].concat(), "exactly_once")
        }
        ("consumer-crash", true) => (crash(true), "duplicate_processing"),
        ("consumer-crash", false) => (crash(false), "exactly_once"),
        _ => unreachable!("there is no scenario {scenario}"),
    }
}

/// Plays a scenario to its end, as JSON and as text, and sees that nothing of it is left in the database.
async fn played(arguments: &[&str]) -> (Value, String) {
    let database = TestDatabase::empty().await;
    let arguments = [&["scenario"], arguments, &["--database-url", &database.url]].concat();
    let play = |more: &[&str]| {
        let output = outcome(&[&arguments, more].concat());
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let report = tokio::task::block_in_place(|| play(&["--json"]));
    let text = tokio::task::block_in_place(|| play(&[]));
    assert_nothing_is_left(&database.connect().await).await;
    (serde_json::from_str(&report).expect("one JSON value and nothing else"), text)
}

async fn assert_nothing_is_left(client: &Client) {
    assert_eq!(schemas(client).await, Vec::<String>::new());
    let sessions = "select count(*) from pg_stat_activity
         where datname = current_database() and application_name like 'pgonce\\_scenario%'";
    eventually("no session is left", async || (number(client, sessions).await == 0).then_some(())).await;
}

async fn schemas(client: &Client) -> Vec<String> {
    texts(client, "select nspname::text from pg_namespace where nspname like 'pgonce%'").await
}

/// Plays it both ways.
async fn both_ways(scenario: &str) {
    for is_naive in [true, false] {
        let (steps, result) = expected(scenario, is_naive);
        let arguments: &[&str] = if is_naive { &[scenario, "--naive"] } else { &[scenario] };
        let (report, text) = played(arguments).await;
        let name = scenario.replace('-', "_");
        assert_eq!(report, json!({ "scenario": name, "steps": steps, "result": result }));
        assert_eq!(text, format!("{}\n\nResult: {result}\n", steps.join("\n")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_whose_acknowledgement_is_lost_is_there_once_or_naively_twice() {
    both_ways("producer-retry").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_consumer_did_happens_once_or_naively_twice() {
    both_ways("consumer-crash").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_a_partition_delays_is_there_once_or_naively_twice() {
    both_ways("network-partition").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delivery_modes_differ_in_how_often_an_effect_survives_the_same_crash() {
    let lost = [
        &DECREMENTED[..],
        &[
            "Consumer: CRASH after ACK!",
            ROLLED_BACK,
            "Queue: ACK was received, no redelivery",
            "Queue: Message is a dead letter, its effect is lost!",
        ],
    ]
    .concat();
    let modes = [("at_most_once", lost), ("at_least_once", crash(true)), ("exactly_once", crash(false))];
    let steps: Vec<String> =
        modes.iter().flat_map(|(mode, steps)| steps.iter().map(move |step| format!("{mode}: {step}"))).collect();
    let (report, text) = played(&["delivery-modes"]).await;
    let result = json!({
        "at_most_once": "lost", "at_least_once": "duplicate_processing", "exactly_once": "exactly_once",
    });
    assert_eq!(report, json!({ "scenario": "delivery_modes", "steps": steps, "result": result }));
    let (said, table) = text.split_once("\n\n").expect("steps and a table");
    assert_eq!(said.lines().collect::<Vec<_>>(), steps);
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [
            ["MODE", "RESULT"],
            ["at_most_once", "lost"],
            ["at_least_once", "duplicate_processing"],
            ["exactly_once", "exactly_once"]
        ]
    );
}

#[test]
fn without_a_database_a_scenario_has_a_server_of_its_own() {
    let directory = tempfile::tempdir().expect("a directory");
    // A database that is in the environment is somebody's, and no place to play.
    let mut command = pgonce(&["scenario", "producer-retry", "--json"]);
    command.env("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none").env("PGONCE_DATABASE_URL_FILE", "/none");
    let output = command.current_dir(&directory).output().expect("the program can be started");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["result"], "exactly_once");
}

/// A play that has come to the consumer's decrement, and stays there: it waits for a lock that the test holds.
struct Halted {
    database: TestDatabase,
    client: Client,
    play: Running,
    /// Where it has its temporary directory.
    directory: TempDir,
}

/// Statements by which a function is called at every update of the inventory of a play.
fn on_inventory(function: &str) -> String {
    format!(
        r"create function public.on_inventory() returns event_trigger language plpgsql as $$
          declare
            created text;
          begin
            select c.object_identity into created from pg_event_trigger_ddl_commands() c
            where c.object_type = 'table' and c.object_identity like 'pgonce\_scenario\_%.inventory';
            if found then
              execute format('create trigger hook before update on %s for each row execute function public.{function}()', created);
            end if;
          end $$;
          create event trigger on_inventory on ddl_command_end when tag in ('CREATE TABLE')
            execute function public.on_inventory()"
    )
}

impl Halted {
    async fn start() -> Self {
        let database = TestDatabase::empty().await;
        let client = database.connect().await;
        let halt = "
            create function public.halt() returns trigger language plpgsql as
              'begin perform pg_advisory_xact_lock(17); return new; end';
            select pg_advisory_lock(17)";
        client.batch_execute(&[halt, &on_inventory("halt")].join(";")).await.expect("a superuser may");
        let arguments = ["scenario", "consumer-crash", "--database-url", &database.url];
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = pgonce(&arguments);
        command.env("TMPDIR", directory.path()).stdout(Stdio::null()).stderr(Stdio::piped());
        let play = Running::start(&mut command);
        let waiting = "select pid from pg_stat_activity
             where datname = current_database() and application_name like 'pgonce\\_scenario%' and query like '%inventory%'";
        let pid = eventually("the consumer decrements", async || {
            client.query_opt(waiting, &[]).await.expect("an answer").map(|row| row.get(0))
        })
        .await;
        until_blocked(&client, pid).await;
        Self { database, client, play, directory }
    }

    /// Plays something else beside it, or after it, to the end.
    fn play_another(&self) {
        let arguments = ["scenario", "producer-retry", "--naive", "--database-url", &self.database.url];
        let output = pgonce(&arguments).env("TMPDIR", self.directory.path()).output().expect("it can be started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
    }

    /// What there is in the temporary directory.
    fn directories(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.directory).expect("readable");
        entries.map(|entry| entry.expect("readable").path()).collect()
    }
}

/// Waits until no process of a play is there.
async fn until_gone(schema: &str) {
    eventually("its processes have ended", async || (!has_process(schema)).then_some(())).await;
}

/// Whether there is a process with that argument.
fn has_process(argument: &str) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    processes.flatten().any(|process| {
        let arguments = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).any(|found| found == argument.as_bytes())
    })
}

#[tokio::test]
async fn the_result_is_what_the_tables_hold_and_pgonce_answers_for_it() {
    let database = TestDatabase::empty().await;
    let client = database.connect().await;
    let twice = "
        create function public.twice() returns trigger language plpgsql as
          'begin new.stock := new.stock - 1; return new; end'";
    client.batch_execute(&[twice, &on_inventory("twice")].join(";")).await.expect("a superuser may");
    for (side, code) in [(&["--naive"] as &[&str], 0), (&[], 3)] {
        let arguments = [&["scenario", "consumer-crash", "--json", "--database-url", &database.url], side].concat();
        let output = outcome(&arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(report["result"], "duplicate_processing");
    }
    assert_nothing_is_left(&client).await;
}

#[tokio::test]
async fn a_scenario_that_is_interrupted_leaves_nothing() {
    let mut halted = Halted::start().await;
    let schema = schemas(&halted.client).await.pop().expect("that of the play");
    assert!(has_process(&schema) || !Path::new("/proc/self/cmdline").exists());
    halted.play.terminate();
    halted.play.until_logged("error: interrupted");
    assert_eq!(halted.play.end().code(), Some(1));
    until_gone(&schema).await;
    assert_nothing_is_left(&halted.database.connect().await).await;
}

#[tokio::test]
async fn the_processes_of_a_scenario_that_is_killed_end() {
    let mut halted = Halted::start().await;
    let schema = schemas(&halted.client).await.pop().expect("that of the play");
    halted.play.kill();
    until_gone(&schema).await;
}

#[tokio::test]
async fn what_a_killed_scenario_left_goes_with_the_next_one() {
    let mut halted = Halted::start().await;
    let schema = schemas(&halted.client).await.pop().expect("that of the play");
    let holder = pid_with_claim(&halted.client, &schema).await.expect("a play has a claim");
    halted.play.kill();
    assert_eq!((schemas(&halted.client).await.len(), halted.directories().len()), (1, 1));
    // The server ends its session at once, but not within the kill.
    let alive = format!("select count(*) from pg_stat_activity where pid = {holder}");
    eventually("its claim is gone", async || (number(&halted.client, &alive).await == 0).then_some(())).await;
    halted.play_another();
    assert_nothing_is_left(&halted.client).await;
    assert_eq!(halted.directories(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_scenario_removes_nothing_that_is_in_use_or_no_scenarios() {
    let mut halted = Halted::start().await;
    let own = schemas(&halted.client).await.pop().expect("that of the play");
    let directory = halted.directories();
    let another = "0".repeat(32);
    let kept = [
        // Not what a play makes.
        (format!("pgonce_scenario_{another}"), "inventory", None),
        // Not a name of a play.
        ("pgonce_scenario_mine".to_owned(), "plain_queue", None),
        (format!("my_pgonce_scenario_{another}"), "plain_queue", None),
        // Not this role's.
        (format!("pgonce_scenario_{}", "1".repeat(32)), "plain_queue", Some("pg_monitor")),
    ];
    for (schema, table, owner) in &kept {
        let made = format!("create schema {schema}; create table {schema}.{table} ()");
        halted.client.batch_execute(&made).await.expect("a superuser may");
        if let Some(owner) = owner {
            halted.client.batch_execute(&format!("alter schema {schema} owner to {owner}")).await.expect("given away");
        }
    }
    let stale = halted.directory.path().join("pgonce-scenario-mine");
    std::fs::create_dir(&stale).expect("created");
    let before = texts(&halted.client, "select nspname::text from pg_namespace order by 1").await;
    assert!(before.contains(&own) && kept.iter().all(|(schema, ..)| before.contains(schema)), "{before:?}");
    halted.play_another();
    assert_eq!(texts(&halted.client, "select nspname::text from pg_namespace order by 1").await, before);
    assert!(stale.is_dir() && directory.iter().all(|directory| directory.join(".s.PGSQL.5432").exists()));
    // It goes on as if nobody had been there.
    halted.client.batch_execute("select pg_advisory_unlock(17)").await.expect("unlocked");
    assert!(halted.play.end().success());
}

/// The session by which a play says that its schema is in use.
async fn pid_with_claim(client: &Client, schema: &str) -> Option<i32> {
    let holder =
        "select l.pid from pg_locks l join pg_database d on d.oid = l.database and d.datname = current_database()
         where l.locktype = 'advisory' and l.granted
           and (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended($1, 0)";
    client.query_opt(holder, &[&schema]).await.expect("an answer").map(|row| row.get(0))
}

#[test]
fn a_process_of_a_play_is_nothing_that_a_shell_offers() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = String::from_utf8(outcome(&["completions", shell]).stdout).expect("text");
        assert!(script.contains("delivery-modes") && !script.contains("actor"), "{shell}");
    }
    let output = outcome(&["scenario", "actor", "consumer", "exactly_once"]);
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test]
async fn a_process_of_a_play_ends_when_nobody_holds_its_input() {
    let database = TestDatabase::new().await;
    create(&database.connect().await, "exactly_once", 1, "exactly_once").await;
    let mut command = pgonce(&["consumer", "exactly_once", "--database-url", &database.url]);
    let mut consumer =
        Running::start(command.arg0("pgonce-scenario-actor").stdout(Stdio::null()).stderr(Stdio::null()));
    // Its input is empty from the start.
    assert!(consumer.end().success());
}

#[tokio::test]
async fn a_scenario_that_cannot_be_played_says_why_and_leaves_nothing() {
    let database = TestDatabase::empty().await;
    let client = database.connect().await;
    let arguments = |url: &str| {
        let output = outcome(&["scenario", "consumer-crash", "--naive", "--database-url", url]);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = arguments("postgresql://app@127.0.0.1:1/app?sslmode=require");
    assert!(code == Some(2) && said.contains("sslmode=disable"), "{code:?} {said}");
    let (code, said) = arguments("postgresql://app@127.0.0.1:1/app");
    assert!(code == Some(1) && said.contains("127.0.0.1:1") && !said.contains("drop schema"), "{code:?} {said}");
    let refuse = "
        create function public.refuse() returns trigger language plpgsql as
          'begin raise exception ''out of stock''; end'";
    client.batch_execute(&[refuse, &on_inventory("refuse")].join(";")).await.expect("a superuser may");
    let (code, said) = arguments(&database.url);
    let words = ["out of stock", "the consumer ended before the play was over"];
    assert!(code == Some(1) && words.iter().all(|word| said.contains(word)), "{code:?} {said}");
    assert_nothing_is_left(&client).await;
}
