//! Roles: each of those that the README creates may do what it is for, and nothing else.
//!
//! Roles belong to a server and not to a database, so each test gives them names of its own.

use std::collections::BTreeSet;
use std::process::Stdio;

use pgonce::{
    Consumer, Database, ErrorKind, Handler, HandlerError, Producer, Received, Relay, Schema, Shutdown, Worker,
    process_once,
};
use tokio_postgres::{Client, NoTls, Transaction};

use crate::documents::sql_of_the_readme;
use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, sqlstate, texts, word, word_counts};
use crate::programs::{Running, outcome, pgonce};

const TOPIC: &str = "words";
const CONSUMER: &str = "counter";
const PRODUCER: &[&str] = &["cancel", "enqueue", "enqueue_many"];
const WORKER: &[&str] = &[
    "ack",
    "acquire",
    "apply_statements",
    "beat",
    "bury",
    "checkpoint_if_due",
    "clear_suspicion",
    "emit",
    "emitted_id",
    "fail",
    "finish_handover",
    "hand_over",
    "leave",
    "nack",
    "open_batch",
    "open_messages",
    "peek",
    "process_once",
    "receive",
    "receive_seen",
    "record_handler_times",
    "relay",
    "release",
    "renew",
    "sample_rates",
    "seen_progress",
    "take_suspicion",
    "set_delivery",
    "try_statements",
    "watch",
];
const WORKER_READS: &[&str] = &["consumers", "received", "schema_versions", "state_tables", "topics", "word_counts"];
/// What the view `rates` is made of, and what it compares with.
const READER: &[&str] = &["current_rates", "sample_rates"];
const OPERATOR: &[&str] = &[
    "checkpoint",
    "checkpoint_difference",
    "delete_checkpoint",
    "discard_dead_letters",
    "pause_consumer",
    "pause_topic",
    "replay",
    "replay_dead_letters",
    "restore",
    "resume_consumer",
    "resume_topic",
];
const READER_READS: &[&str] = &[
    "blocked_keys",
    "checkpoint_contents",
    "checkpoint_list",
    "consumer_lag",
    "consumer_leases",
    "consumer_offsets",
    "consumers",
    "counters",
    "horizon_holders",
    "outbox_status",
    "partition_heads",
    "rates",
    "schema_versions",
    "topics",
];

/// A database with the roles of the README, by other names, and a topic with a consumer and an inbox.
struct World {
    database: TestDatabase,
    owner: Client,
    producer: String,
    worker: String,
    reader: String,
    operator: String,
}

impl World {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let owner = database.connect().await;
        let prefix = texts(&owner, "select current_database() || '_'").await.remove(0);
        let snippet = sql_of_the_readme().into_iter().find(|block| block.contains("create role")).expect("a snippet");
        owner.batch_execute(&snippet.replace("pgonce_", &prefix)).await.expect("the snippet runs");
        create(&owner, TOPIC, 2, CONSUMER).await;
        let more =
            "select pgonce.create_consumer('inbox'), pgonce.create_consumer('mail', 'words', kind => 'external')";
        owner.batch_execute(more).await.expect("created");
        let role = |name: &str| format!("{prefix}{name}");
        Self {
            database,
            owner,
            producer: role("producer"),
            worker: role("worker"),
            reader: role("reader"),
            operator: role("operator"),
        }
    }

    fn roles(&self) -> [&str; 4] {
        [&self.producer, &self.worker, &self.reader, &self.operator]
    }

    /// The URL of the database for somebody who has only that role.
    fn url(&self, role: &str) -> String {
        let url = &self.database.url;
        if !url.contains("://") {
            return format!("{url} options='-c role={role}'");
        }
        let separator = if url.contains('?') { '&' } else { '?' };
        format!("{url}{separator}options=-c%20role%3D{role}")
    }

    fn pool(&self, role: &str) -> Database {
        Database::connect(&self.url(role), Schema::default(), 4).expect("a good URL")
    }

    async fn connect(&self, role: &str) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.url(role), NoTls).await.expect("connected");
        tokio::spawn(connection);
        assert_eq!(texts(&client, "select current_user::text").await, [role]);
        client
    }

    /// Takes the roles away again, which the server would keep.
    async fn end(self) {
        let roles = self.roles().join(", ");
        let remove = format!("drop owned by {roles} cascade; drop role {roles}");
        self.owner.batch_execute(&remove).await.expect("removed");
    }
}

/// Whether the right to do that is there, whatever else comes of it. Nothing of it stays.
async fn is_permitted(client: &Client, statement: &str) -> bool {
    client.batch_execute("begin").await.expect("begun");
    let outcome = client.batch_execute(statement).await;
    client.batch_execute("rollback").await.expect("rolled back");
    outcome.err().and_then(|error| error.code().map(|code| code.code() == "42501")) != Some(true)
}

/// The names in pairs of a name and a statement for which the right is there.
async fn permitted(client: &Client, statements: &[(String, String)]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (name, statement) in statements {
        if is_permitted(client, statement).await {
            names.insert(name.clone());
        }
    }
    names
}

async fn pairs(client: &Client, query: &str) -> Vec<(String, String)> {
    let rows = client.query(query, &[]).await.expect("the query succeeds");
    assert!(rows.len() > 5, "{query}");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test]
async fn each_role_may_call_its_functions_and_no_other() {
    let world = World::new().await;
    // The arguments are null, but not so that the planner sees it: it would leave out calls of strict functions.
    let calls = pairs(
        &world.owner,
        "select p.proname::text,
                format('select pgonce.%I(%s)', p.proname, (
                  select string_agg(format('(select null::%s)', format_type(a.type, null)), ', ' order by a.nth)
                  from unnest(p.proargtypes) with ordinality a(type, nth)))
         from pg_proc p where p.pronamespace = 'pgonce'::regnamespace",
    )
    .await;
    let operator = [READER, OPERATOR].concat();
    for (role, functions) in world.roles().into_iter().zip([PRODUCER, WORKER, READER, &operator]) {
        let client = world.connect(role).await;
        assert_eq!(permitted(&client, &calls).await, set(functions), "{role}");
    }
    world.end().await;
}

#[tokio::test]
async fn no_role_writes_a_table_by_hand_but_the_worker_its_word_counts() {
    let world = World::new().await;
    for (what, statement, of_worker) in [
        ("insert", "insert into pgonce.%I default values", &["word_counts"] as &[_]),
        ("update", "update pgonce.%I set %I = default", &["word_counts"]),
        ("delete", "delete from pgonce.%I", &[]),
        ("truncate", "truncate pgonce.%I cascade", &[]),
        ("lock", "lock table pgonce.%I in share mode", &["word_counts"]),
        ("alter", "alter table pgonce.%I add column more integer", &[]),
    ] {
        let columns = if statement.matches("%I").count() == 2 { ", a.attname" } else { "" };
        let writes = format!(
            "select c.relname::text, format('{statement}', c.relname{columns})
             from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum = 1
             where c.relnamespace = 'pgonce'::regnamespace and c.relkind = 'r'"
        );
        let writes = pairs(&world.owner, &writes).await;
        for (role, tables) in world.roles().into_iter().zip([&[], of_worker, &[], &[]]) {
            let client = world.connect(role).await;
            assert_eq!(permitted(&client, &writes).await, set(tables), "{what} by {role}");
        }
    }
    for role in world.roles() {
        let client = world.connect(role).await;
        for statement in [
            "select nextval('pgonce.outbox_seq')",
            "select setval('pgonce.outbox_seq', 1)",
            "select setval('pgonce.watched_until', 1)",
            "create table pgonce.another ()",
            "create or replace function pgonce.last_drawn() returns bigint language sql as 'select 0'",
            "insert into pgonce.received default values",
        ] {
            let code = sqlstate(&client, statement).await;
            // A view of a join is no target, whoever asks.
            assert!(code == "42501" || code == "55000", "{statement} by {role}: {code}");
        }
    }
    world.end().await;
}

#[tokio::test]
async fn a_reader_reads_no_payload_and_a_producer_nothing_but_the_version() {
    let world = World::new().await;
    let reads = pairs(
        &world.owner,
        "select c.relname::text, format('select count(*) from pgonce.%I', c.relname) from pg_class c
         where c.relnamespace = 'pgonce'::regnamespace and c.relkind in ('r', 'v', 'S')",
    )
    .await;
    let operator = [READER_READS, &["dead_letter_list"]].concat();
    for (role, relations) in
        world.roles().into_iter().zip([&["schema_versions"], WORKER_READS, READER_READS, &operator])
    {
        let client = world.connect(role).await;
        assert_eq!(permitted(&client, &reads).await, set(relations), "{role}");
    }
    // An error may quote a payload.
    let errors = "select error from pgonce.blocked_keys";
    assert!(!is_permitted(&world.connect(&world.reader).await, errors).await);
    assert!(is_permitted(&world.connect(&world.operator).await, errors).await);
    let with_payload = "
        select c.relname::text from pg_class c join pg_attribute a on a.attrelid = c.oid
        where c.relnamespace = 'pgonce'::regnamespace and a.attname = 'payload'";
    let with_payload: BTreeSet<String> = texts(&world.owner, with_payload).await.into_iter().collect();
    assert!(with_payload.contains("outbox") && with_payload.is_disjoint(&set(READER_READS)), "{with_payload:?}");
    world.end().await;
}

/// Counts a word into the table of the built-in consumer, as a role without a right on anything else.
struct Counting;

impl Handler for Counting {
    type Payload = serde_json::Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Self::Payload>) -> Result<(), HandlerError> {
        let count = "insert into pgonce.word_counts as total (consumer, word, count) values ('each', $1, 1)
                     on conflict (consumer, word) do update set count = total.count + 1";
        tx.execute(count, &[&message.payload["word"].as_str()]).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_producer_a_worker_and_a_reader_are_all_that_the_word_count_takes() {
    let world = World::new().await;
    world.owner.batch_execute("select pgonce.create_consumer('each', 'words')").await.expect("created");
    let mut producing = world.connect(&world.producer).await;
    let producer = Producer::new(TOPIC);
    let transaction = producing.transaction().await.expect("begun");
    producer.send(&transaction, &word("a").id("first")).await.expect("sent");
    let words = ["a", "b", "c"].map(word);
    producer.send_all(&transaction, &words).await.expect("sent");
    transaction.commit().await.expect("committed");
    assert!(producer.send(&producing, &word("a").id("first")).await.expect("answered").was_duplicate);
    let taken_back = producer.send(&producing, &word("never")).await.expect("sent");
    assert!(producer.cancel(&producing, &taken_back.message_id).await.expect("answered"));

    let shutdown = Shutdown::new();
    let worker = Worker::new(world.pool(&world.worker))
        .relay(Relay::all())
        .consumer(Consumer::word_count(CONSUMER))
        .consumer(Consumer::each("each", Counting));
    let stop = shutdown.clone();
    let worker = tokio::spawn(async move { worker.run(&stop).await });
    let counted = "select count(*) from pgonce.consumer_lag where consumer in ('counter', 'each') and received = 4";
    let reading = world.connect(&world.reader).await;
    eventually("all is counted", async || (number(&reading, counted).await == 2).then_some(())).await;
    shutdown.stop();
    assert_eq!(worker.await.expect("no panic").expect("it stops well").applied, 8);
    let expected = [("a", 2), ("b", 1), ("c", 1)].map(|(word, count)| (word.to_owned(), count));
    for consumer in [CONSUMER, "each"] {
        assert_eq!(word_counts(&world.owner, consumer).await, expected.clone().into(), "{consumer}");
    }

    let working = world.connect(&world.worker).await;
    for is_first in [true, false] {
        let processed = process_once(&working, &Schema::default(), "inbox", "evt").await.expect("answered");
        assert_eq!(processed, is_first);
    }
    drop((producing, reading, working));
    world.end().await;
}

#[tokio::test]
async fn a_worker_that_may_not_write_numbers_down_does_all_else() {
    let world = World::new().await;
    let revoke = format!(
        "revoke execute on function pgonce.sample_rates, pgonce.record_handler_times from {}, {}",
        world.worker, world.reader
    );
    world.owner.batch_execute(&revoke).await.expect("revoked");
    Producer::new(TOPIC).send(&world.owner, &word("a")).await.expect("sent");
    let shutdown = Shutdown::new();
    let worker = Worker::new(world.pool(&world.worker)).relay(Relay::all()).consumer(Consumer::word_count(CONSUMER));
    let stop = shutdown.clone();
    let worker = tokio::spawn(async move { worker.run(&stop).await });
    eventually("it is counted", async || (!word_counts(&world.owner, CONSUMER).await.is_empty()).then_some(())).await;
    let arguments = ["status", "--watch", "--database-url", &world.url(&world.reader)];
    let mut watch = Running::start(pgonce(&arguments).stdout(Stdio::piped()));
    watch.line_after(" topic");
    watch.kill();
    shutdown.stop();
    assert_eq!(worker.await.expect("no panic").expect("it stops well").applied, 1);
    assert_eq!(number(&world.owner, "select count(*) from pgonce.samples").await, 0);
    world.end().await;
}

#[tokio::test]
async fn a_role_without_a_right_is_told_so_and_what_helps() {
    let world = World::new().await;
    let client = world.connect(&world.reader).await;
    let error = Producer::new(TOPIC).send(&client, &word("a")).await.expect_err("denied");
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.hint().is_some_and(|hint| hint.contains("Roles")), "{error}");
    let worker = Worker::new(world.pool(&world.producer)).relay(TOPIC);
    assert_eq!(worker.run(&Shutdown::new()).await.expect_err("denied").kind(), ErrorKind::Denied);
    // To create a consumer is no right to have any table written by a restore.
    let may_create = format!("grant execute on function pgonce.create_consumer to {}", world.reader);
    world.owner.batch_execute(&may_create).await.expect("granted");
    client.batch_execute("select pgonce.create_consumer('inbox')").await.expect("it may");
    assert_eq!(sqlstate(&client, "select pgonce.create_consumer('inbox', state => '{pg_class}')").await, "42501");
    drop(client);
    let name = texts(&world.owner, "select current_database()::text").await.remove(0);
    let nobody = format!("{name}_nobody");
    world.owner.batch_execute(&format!("create role {nobody}")).await.expect("created");
    for (schema, words) in [
        ("pgonce", vec![format!("role {nobody:?}: permission denied for schema pgonce")]),
        ("another", vec![format!("role {nobody} may not"), format!("grant create on database {name} to {nobody}")]),
    ] {
        let output = outcome(&["init", "--schema", schema, "--database-url", &world.url(&nobody)]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for word in words {
            assert!(said.contains(&word), "{said}");
        }
    }
    world.owner.batch_execute(&format!("drop role {nobody}")).await.expect("removed");
    world.end().await;
}

#[tokio::test]
async fn the_programs_run_with_the_role_that_is_for_them() {
    let world = World::new().await;
    let (reader, worker) = (world.url(&world.reader), world.url(&world.worker));
    let status = outcome(&["status", "--database-url", &reader]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));

    let input = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(&input, "{\"payload\": {\"word\": \"a\"}}").expect("written");
    let path = input.path().to_str().expect("text");
    let enqueue = outcome(&["enqueue", TOPIC, path, "--database-url", &world.url(&world.producer)]);
    assert_eq!(String::from_utf8_lossy(&enqueue.stdout), "enqueued 1 message, refused 0 duplicates\n", "{enqueue:?}");

    // Where nothing is to do, an installation at each start needs no more rights than a worker has.
    let init = outcome(&["init", "--database-url", &worker]);
    assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));

    // Of a consumer that is not there the worker's role is told that it may not create it.
    let arguments = ["run", "--database-url", &worker, "--word-count", "another=words"];
    let mut refused = Running::start(pgonce(&arguments).stderr(Stdio::piped()));
    assert_eq!(refused.end().code(), Some(1));
    refused.until_logged("permission denied for function create_consumer");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("pgonce.toml");
    let consumer = "[[consumer]]\nname = 'counter'\ntopic = 'words'\nkind = 'word_count'\nattempts_max = ";
    std::fs::write(&file, format!("{consumer} 11")).expect("written");
    let arguments = ["run", "--database-url", &worker, "--config", file.to_str().expect("text")];
    let mut refused = Running::start(pgonce(&arguments).stderr(Stdio::piped()));
    assert_eq!(refused.end().code(), Some(1));
    refused.until_logged("permission denied for function create_consumer");
    // Where all is as the configuration says, nothing is created.
    std::fs::write(&file, format!("{consumer} 10\nfailure_policy = 'park_key'\nbackoff_max_ms = 30000"))
        .expect("written");
    let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
    daemon.until_logged("running");
    daemon.finish();
    world.end().await;
}

#[tokio::test]
async fn an_operator_looks_at_dead_letters_and_settles_them() {
    let world = World::new().await;
    Producer::new(TOPIC).send(&world.owner, &word("a")).await.expect("sent");
    Relay::all().step(&world.database.database(1)).await.expect("relayed");
    let fail = "select pgonce.fail('counter', partition, 1, 'by hand', permanent => true) from pgonce.queue";
    world.owner.batch_execute(fail).await.expect("failed");
    let operator = world.url(&world.operator);
    for arguments in [
        &["dead-letter", "list"] as &[&str],
        &["dead-letter", "show", "1"],
        &["dead-letter", "replay", "--all", "--yes"],
        &["consumer", "pause", CONSUMER],
        &["consumer", "resume", CONSUMER],
        &["status"],
    ] {
        let output = outcome(&[arguments, &["--database-url", &operator]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(number(&world.owner, "select count(*) from pgonce.parked").await, 1);
    world.end().await;
}

#[tokio::test]
async fn who_sets_traps_never_gets_the_rights_of_the_owner() {
    let world = World::new().await;
    let attacker = world.producer.clone();
    let name = texts(&world.owner, "select current_database()::text").await.remove(0);
    let arm = format!("grant create on database {name:?} to {attacker}; grant {} to {attacker}", world.worker);
    world.owner.batch_execute(&arm).await.expect("a dangerous role");
    let client = world.connect(&attacker).await;
    client.batch_execute(include_str!("hostile.sql")).await.expect("the trap is set");
    let types = "
        create domain pg_temp.text as pg_catalog.text check (evil.trap() > 0);
        create domain pg_temp.jsonb as pg_catalog.jsonb check (evil.trap() > 0);
        create domain pg_temp.regclass as pg_catalog.regclass check (evil.trap() > 0);
        set search_path = pg_temp, evil, pg_catalog";
    client.batch_execute(types).await.expect("the other trap is set");
    for statement in [
        "select * from pgonce.enqueue('words', '{\"word\": \"a\"}', 'k', 'first', '{\"h\": 1}', '2000-01-01')",
        "select * from pgonce.enqueue('words', '{\"word\": \"a\"}', 'k', 'first')",
        "select * from pgonce.enqueue('words', '{\"word\": \"a\"}', 'k', 'gone')",
        "select * from pgonce.enqueue_many('words', '{1, 2}', '{k, null}', '{second, third}', '{null, null}')",
        "select * from pgonce.cancel('words', 'gone')",
        "select * from pgonce.watch(null, '{counter}', 1000)",
        "select * from pgonce.relay()",
        "select pgonce.open_batch('counter', 1)",
        "select * from pgonce.receive('counter')",
        "select * from pgonce.receive('counter')",
        "select * from pgonce.receive('counter')",
        "select * from pgonce.process_once('inbox', 'a')",
        "select * from pgonce.process_once('inbox', 'a')",
        "select * from pgonce.acquire('mail', 'a9f6e2a4-6bd5-4a51-9f1e-0d5c3f5b7c11', 2, 60000)",
        "select pgonce.peek('mail', p, 1) from (values (0), (1)) v(p)",
        "select pgonce.nack('mail', p, 1, 1, 'not now') from (values (0), (1)) v(p)",
        "select pgonce.ack('mail', partition, 1, \"offset\", \"offset\") from pgonce.peek('mail', 0, 1, 1)",
        "select * from pgonce.renew('mail', 0, 1, 60000)",
        "select * from pgonce.release('mail', 0, 1)",
        "select pgonce.sample_rates()",
        "select pgonce.record_handler_times('mail', 1, '{1}', '{1}')",
    ] {
        if let Err(error) = client.batch_execute(statement).await {
            panic!("{statement}: {error:?}");
        }
    }
    for (count, expected) in [
        ("select count(*) from pgonce.queue", 3),
        ("select received from pgonce.consumer_lag where consumer = 'counter'", 3),
        ("select duplicates from pgonce.outbox_status", 1),
        ("select count(*) from pgonce.processed_ids where partition is null", 1),
    ] {
        assert_eq!(number(&world.owner, count).await, expected, "{count}");
    }
    drop(client);
    world.end().await;
}
