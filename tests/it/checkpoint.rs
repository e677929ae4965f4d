//! Checkpoints: what is restored is what was saved, and goes on to what an uninterrupted run would have reached.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use pgonce::{Message, Producer};
use serde_json::json;
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, numbered, sqlstate, texts};
use crate::process::Random;
use crate::programs::{Running, pgonce};
use crate::worker::TOPIC;

/// A table of effects with types whose texts depend on settings, or that no program can write.
const LEDGER: &str = "
    create table ledger (
      account text primary key,
      amount numeric(12, 2) not null,
      entry bigint generated always as identity,
      doubled numeric generated always as (amount * 2) stored,
      seen_at timestamptz not null default '2026-03-29 01:30:00.123456+00',
      waits interval not null default '-1 day +02:03:04.5',
      ratio float8 not null default 1e-7::float8 / 3,
      bytes bytea not null default '\\x00ff'::bytea,
      tags text[] not null default '[2:3]={a,\"NULL\"}',
      raw json not null default '{\"b\" : 1,  \"a\":null}')";
/// Counts the messages of each key in it.
pub(crate) const STEP: &str = "
    with received as materialized (select * from pgonce.receive('c', 10)),
    counted as (
      insert into ledger (account, amount) select key, count(*) from received group by key
      on conflict (account) do update set amount = ledger.amount + excluded.amount)
    select count(*) from received";
const STATE: &str = "
    select l::text from ledger l
    union all select format('%s/%s: %s', partition, next_offset, received) from pgonce.consumer_offsets where consumer = 'c'
    union all select message_id from pgonce.processed_ids
    union all select format('parked %s %s', message_id, attempts) from pgonce.parked where taken_by is null
    union all select format('%s %s %s', state, message_id, attempts) from pgonce.dead_letters
    order by 1";

pub(crate) async fn world(messages: usize) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 2, "another").await;
    let create = format!(
        "{LEDGER};
         select pgonce.create_consumer('c', 't', attempts_max => 2, backoff_min_ms => 86400000, backoff_max_ms => 86400000);
         select pgonce.set_state('c', '{{ledger}}')"
    );
    client.batch_execute(&create).await.expect("created");
    publish(&client, &numbered(messages, &["a", "b", "c", "d", "e"])).await;
    (database, client)
}

pub(crate) async fn publish(client: &Client, messages: &[Message]) {
    Producer::new(TOPIC).send_all(client, messages).await.expect("sent");
    client.batch_execute("select pgonce.relay()").await.expect("relayed");
}

pub(crate) async fn drain(client: &Client) {
    while number(client, STEP).await > 0 {}
}

/// Fails the next message, which is not received.
async fn fail_next(client: &Client, permanent: bool) {
    let fail = format!(
        "select outcome from pgonce.consumer_offsets o,
                pgonce.fail('c', o.partition, o.next_offset, 'bad', permanent => {permanent})
         where o.consumer = 'c' and exists (
           select from pgonce.queue q where q.partition = o.partition and q.\"offset\" = o.next_offset)
         limit 1"
    );
    assert_eq!(texts(client, &fail).await, [if permanent { "dead" } else { "parked" }]);
}

#[tokio::test]
async fn a_restored_consumer_is_what_it_was_and_goes_on_to_what_it_would_have_been() {
    let (_database, client) = world(100).await;
    number(&client, STEP).await;
    number(&client, STEP).await;
    fail_next(&client, false).await;
    fail_next(&client, true).await;
    number(&client, STEP).await;
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    let saved = texts(&client, STATE).await;
    drain(&client).await;
    // Sequences go on: a row that is inserted again has another number.
    let without_entry = STATE.replace("l::text", "(to_jsonb(l) - 'entry')::text");
    let reached = texts(&client, &without_entry).await;
    // However the session that restores reads and writes values.
    let settings = "set datestyle = 'SQL, MDY'; set intervalstyle = 'sql_standard'; set timezone = 'Asia/Kolkata';
                    set extra_float_digits = 0; set bytea_output = 'escape'";
    client.batch_execute(settings).await.expect("set");
    client.batch_execute("select pgonce.restore('c', 'one')").await.expect("restored");
    client.batch_execute("reset all").await.expect("reset");
    assert_eq!(texts(&client, STATE).await, saved);
    drain(&client).await;
    assert_eq!(texts(&client, &without_entry).await, reached);
}

#[tokio::test]
async fn the_difference_is_what_a_restore_changes() {
    let (_database, client) = world(40).await;
    number(&client, STEP).await;
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    let difference = "
        select concat_ws(' ', name, messages, added, removed, changed, samples::text)
        from pgonce.checkpoint_difference('c', 'one', 1)
        where messages > 0 or added + removed + changed > 0 order by part, name";
    assert_eq!(texts(&client, difference).await, [""; 0]);
    drain(&client).await;
    let edits = "
        delete from ledger where account = (
          select min((saved::ledger).account) from pgonce.checkpoint_rows where relation = 'ledger'::regclass);
        insert into ledger (account, amount) values ('z', 1)";
    client.batch_execute(edits).await.expect("edited");
    let counts = "
        select concat_ws(' ', added, removed, samples[1], samples[array_length(samples, 1)])
        from pgonce.checkpoint_difference('c', 'one', 1) where name = 'public.ledger'";
    let lines = texts(&client, counts).await;
    assert!(lines[0].contains("added (") && lines[0].contains("removed ("), "{lines:?}");
    let before = texts(&client, difference).await;
    assert!(!before.is_empty());
    assert_eq!(texts(&client, difference).await, before, "it changes nothing");
    let again = "select sum(messages)::bigint from pgonce.checkpoint_difference('c', 'one')";
    let messages = number(&client, again).await;
    let restored = number(&client, "select sum(messages)::bigint from pgonce.restore('c', 'one')").await;
    assert_eq!(messages, restored);
    assert!(messages > 0);
    assert_eq!(texts(&client, difference).await, [""; 0]);
}

#[tokio::test]
async fn a_checkpoint_is_of_one_moment_while_the_consumer_runs() {
    let (database, client) = world(1_000).await;
    let other = database.connect().await;
    let work = async { drain(&other).await };
    let saves = async {
        for nth in 0..20 {
            client.execute("select pgonce.checkpoint('c', $1)", &[&nth.to_string()]).await.expect("saved");
        }
    };
    tokio::join!(work, saves);
    let torn = "
        select c.checkpoint
        from pgonce.checkpoints c
        where (select coalesce(sum((r.saved::ledger).amount), 0) from pgonce.checkpoint_rows r
               where r.checkpoint = c.checkpoint and r.relation = 'ledger'::regclass)
           <> (select sum(o.received) from pgonce.checkpoint_offsets o where o.checkpoint_id = c.checkpoint_id)";
    assert_eq!(texts(&client, torn).await, [""; 0]);
    let moments = "
        select count(distinct s) from (
          select sum(o.received) as s from pgonce.checkpoint_offsets o group by o.checkpoint_id) m";
    println!("{} moments", number(&client, moments).await);
}

#[tokio::test]
async fn what_cannot_be_restored_is_refused_beforehand() {
    let (_database, client) = world(20).await;
    number(&client, STEP).await;
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    let since = 20 - number(&client, "select sum(received)::bigint from pgonce.checkpoint_offsets").await;
    for (statement, code) in [
        ("select pgonce.checkpoint('c', 'one')", "PO006"),
        ("select pgonce.checkpoint('c', '')", "PO003"),
        ("select pgonce.checkpoint('nobody', 'x')", "PO002"),
        ("select pgonce.restore('c', 'two')", "PO015"),
        ("select pgonce.delete_checkpoint('c', 'two')", "PO015"),
        ("select pgonce.checkpoint_difference('c', 'two')", "PO015"),
        ("select pgonce.checkpoint_difference('c', 'one', 1001)", "PO003"),
        ("select pgonce.replay('c', 0)", "PO003"),
        ("select pgonce.replay('c', partition => 7)", "PO003"),
        ("select pgonce.checkpoint_if_due('c', '0 s', 1)", "PO003"),
        ("begin isolation level repeatable read; select pgonce.restore('c', 'one')", "PO010"),
    ] {
        assert_eq!(sqlstate(&client, statement).await, code, "{statement}");
        client.batch_execute("rollback").await.expect("over");
    }
    client.batch_execute("alter table ledger add remark text").await.expect("altered");
    assert_eq!(sqlstate(&client, "select pgonce.restore('c', 'one')").await, "PO006", "other columns");
    client.batch_execute("alter table ledger drop remark").await.expect("altered");
    client.batch_execute("select pgonce.set_state('c', '{}')").await.expect("set");
    assert_eq!(sqlstate(&client, "select pgonce.restore('c', 'one')").await, "PO006", "other tables");
    client
        .batch_execute("select pgonce.set_state('c', '{ledger}'); select pgonce.restore('c', 'one')")
        .await
        .expect("restored");
    drain(&client).await;
    client.batch_execute("select pgonce.purge_topic('t')").await.expect("purged");
    let before = texts(&client, STATE).await;
    assert_eq!(sqlstate(&client, "select pgonce.restore('c', 'one')").await, "PO014", "its messages are gone");
    assert_eq!(sqlstate(&client, "select pgonce.replay('c', 1)").await, "PO014");
    assert_eq!(texts(&client, STATE).await, before);
    assert_eq!(number(&client, "select gone from pgonce.checkpoint_list").await, since);
}

#[tokio::test]
async fn a_table_that_cannot_be_put_back_is_no_state() {
    let (_database, client) = world(0).await;
    let prepare = "
        create table keyless (id int);
        create unlogged table fleeting (id int primary key);
        create table parent (id int primary key);
        create table child () inherits (parent);
        create table owner (id int primary key);
        create table owned (id int primary key, owner int references owner on delete cascade);
        create table watched (id int primary key);
        create function ring() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger ring after insert on watched for each row execute function ring();
        create table guarded (id int primary key);
        alter table guarded enable row level security;
        create view shown as select * from owner;
        create table split (id int primary key) partition by range (id);
        create table fine (id int primary key, owner int references owner)";
    client.batch_execute(prepare).await.expect("created");
    for table in
        ["keyless", "fleeting", "parent", "owner", "watched", "guarded", "shown", "split", "pg_class", "pgonce.queue"]
    {
        let set = format!("select pgonce.set_state('c', '{{{table}}}')");
        assert_eq!(sqlstate(&client, &set).await, "PO003", "{table}");
    }
    let set = "select relation::text from pgonce.set_state('c', '{fine,owned,fine}') order by 1";
    assert_eq!(texts(&client, set).await, ["fine", "owned"]);
}

#[tokio::test]
async fn an_inbox_is_restored_with_what_it_has_processed() {
    let (_database, client) = world(0).await;
    let prepare = "
        select pgonce.create_consumer('inbox');
        select pgonce.set_state('c', '{}');
        select pgonce.set_state('inbox', '{ledger}');
        select pgonce.process_once('inbox', 'one');
        insert into ledger (account, amount) values ('one', 1);
        select pgonce.checkpoint('inbox', 'then');
        select pgonce.process_once('inbox', 'two');
        insert into ledger (account, amount) values ('two', 1)";
    client.batch_execute(prepare).await.expect("processed");
    assert_eq!(number(&client, "select count(*) from pgonce.restore('inbox', 'then')").await, 0);
    assert_eq!(texts(&client, "select account from ledger").await, ["one"]);
    let again = "select was_duplicate::text from unnest(array['one', 'two']) m, pgonce.process_once('inbox', m)";
    assert_eq!(texts(&client, again).await, ["true", "false"]);
    assert_eq!(sqlstate(&client, "select pgonce.replay('inbox')").await, "PO007");
}

#[tokio::test]
async fn who_held_a_lease_before_a_restore_is_fenced() {
    let (_database, client) = world(10).await;
    let prepare = "
        select pgonce.create_consumer('mail', 't', kind => 'external');
        select pgonce.checkpoint('mail', 'then');
        select pgonce.acquire('mail', '00000000-0000-4000-8000-000000000001', 2, 600000)";
    client.batch_execute(prepare).await.expect("acquired");
    let ack = "select outcome from pgonce.consumer_leases l, pgonce.ack('mail', l.partition, 1, 1, 1) where l.consumer = 'mail' order by l.partition";
    let peeked = "select count(*) from pgonce.peek('mail', 0, 1)";
    assert_ne!(number(&client, peeked).await, 0);
    client.batch_execute("select pgonce.restore('mail', 'then')").await.expect("restored");
    assert_eq!(texts(&client, ack).await, ["fenced", "fenced"]);
    assert_eq!(number(&client, peeked).await, 0);
    let epochs = "select epoch::text from pgonce.acquire('mail', '00000000-0000-4000-8000-000000000002', 2, 600000)";
    assert_eq!(texts(&client, epochs).await, ["3", "3"]);
}

#[tokio::test]
async fn while_a_handler_is_at_what_was_recorded_first_nothing_is_restored() {
    let (database, client) = world(10).await;
    client.batch_execute("select pgonce.checkpoint('c', 'then')").await.expect("saved");
    let handler = database.connect().await;
    handler.batch_execute("begin").await.expect("begun");
    let xid = texts(&handler, "select pg_current_xact_id()::text").await.remove(0);
    let hand_over = format!(
        "begin; select pgonce.receive('c', 10, partition => 0); select pgonce.hand_over('c', 0, '{{1}}', '{xid}'::xid8); commit"
    );
    client.batch_execute(&hand_over).await.expect("handed over");
    let restore = "select pgonce.restore('c', 'then')";
    assert_eq!(sqlstate(&client, restore).await, "55P03", "it is not taken from a handler that lives");
    handler.batch_execute("rollback").await.expect("rolled back");
    client.batch_execute(restore).await.expect("restored");
    assert_eq!(number(&client, "select count(*) from pgonce.dead_letters").await, 0);
    drain(&client).await;
    assert_eq!(number(&client, "select sum(amount)::bigint from ledger").await, 10);
}

#[tokio::test]
async fn a_replay_applies_effects_once_more_and_only_when_told_to() {
    let (_database, client) = world(30).await;
    fail_next(&client, true).await;
    drain(&client).await;
    let before = texts(&client, STATE).await;
    assert_eq!(number(&client, "select sum(messages)::bigint from pgonce.replay('c')").await, 30);
    assert_eq!(texts(&client, STATE).await, before, "it was only said");
    let applied = number(&client, "select sum(amount)::bigint from ledger").await;
    assert_eq!(applied, 29);
    assert_eq!(
        number(&client, "select sum(messages)::bigint from pgonce.replay('c', reapply_effects => true)").await,
        30
    );
    drain(&client).await;
    assert_eq!(number(&client, "select sum(amount)::bigint from ledger").await, 29 + 30);
    assert_eq!(number(&client, "select count(*) from pgonce.dead_letters").await, 0, "it has another try");
    assert_eq!(number(&client, "select count(*) from pgonce.processed_ids").await, 30);
}

#[tokio::test]
async fn scheduled_checkpoints_are_taken_when_they_are_due_and_some_are_kept() {
    let (_database, client) = world(0).await;
    client.batch_execute("select pgonce.checkpoint('c', 'by hand')").await.expect("saved");
    let due = "select count(*) from pgonce.checkpoint_if_due('c', '1 hour', 2)";
    for _ in 0..3 {
        assert_eq!(number(&client, due).await, 1);
        assert_eq!(number(&client, due).await, 0, "the last one is new");
        client
            .batch_execute("update pgonce.checkpoints set taken_at = taken_at - interval '2 hours'")
            .await
            .expect("set back");
    }
    let kept = "select count(*) from pgonce.checkpoint_list where is_scheduled";
    assert_eq!(number(&client, kept).await, 2);
    assert_eq!(number(&client, "select count(*) from pgonce.checkpoint_list where checkpoint = 'by hand'").await, 1);
    let orphans = "select count(*) from pgonce.checkpoint_tables t where not exists (select from pgonce.checkpoints c where c.checkpoint_id = t.checkpoint_id)";
    assert_eq!(number(&client, orphans).await, 0);
}

const WORDS: [&str; 8] = ["once", "twice", "never", "always", "maybe", "often", "seldom", "again"];
const DOCUMENTS: usize = 400;
/// Restores in CI; `PGONCE_TEST_RESTORES` says otherwise.
const RESTORES: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restored_at_any_moment_two_hops_end_where_an_uninterrupted_run_does() {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let restores =
        variable("PGONCE_TEST_RESTORES").map_or(RESTORES, |restores| usize::try_from(restores).expect("small"));
    let seed = variable("PGONCE_TEST_SEED").unwrap_or(20_261_127) | 1;
    println!("PGONCE_TEST_SEED={seed} PGONCE_TEST_RESTORES={restores}");
    let mut random = Random(seed);
    let mut below = |most: usize| usize::try_from(random.below(most as u64)).expect("small");
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("pgonce.toml");
    let stages = toml::toml! {
        topic = [{ name = "documents", partitions = 3 }, { name = "words", partitions = 3 }]
        consumer = [
          { name = "splitter", topic = "documents", kind = "split_words", batch_messages = 7, attempts_max = 2, backoff_min_ms = 1, backoff_max_ms = 1 },
          { name = "counter", topic = "words", kind = "word_count", batch_messages = 20 },
        ]
    };
    std::fs::write(&config, stages.to_string()).expect("written");
    let config = config.to_str().expect("text");
    let arguments = ["run", "--database-url", &database.url, "--config", config];
    let start = || Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()));
    let mut daemon = start();
    eventually("the daemon has created what it runs", async || {
        let created = "select count(*) from pgonce.consumers";
        (number(&client, created).await == 2).then_some(())
    })
    .await;

    let (mut sent, mut poison) = (0, 0);
    let mut expected: BTreeMap<String, i64> = BTreeMap::new();
    let mut saved = Vec::new();
    for restored in 0..restores {
        // Some documents, a checkpoint of each consumer at a moment of its own, and a death or two.
        let until = DOCUMENTS * (restored + 1) / restores;
        let mut documents = Vec::new();
        while sent < until {
            let is_poison = below(40) == 0;
            let words: Vec<&str> = (0..=below(6)).map(|_| WORDS[below(WORDS.len())]).collect();
            let text = if is_poison { json!({ "txt": 0 }) } else { json!({ "text": words.join(" ") }) };
            if is_poison {
                poison += 1;
            } else {
                for word in &words {
                    *expected.entry((*word).to_owned()).or_default() += 1;
                }
            }
            documents.push(Message::json(&text).expect("JSON").id(format!("d{sent}")).key(format!("k{}", below(9))));
            sent += 1;
        }
        Producer::new("documents").send_all(&client, &documents).await.expect("sent");
        for consumer in ["splitter", "counter"] {
            tokio::time::sleep(Duration::from_millis(below(120) as u64)).await;
            let name = format!("{restored}");
            client.execute("select pgonce.checkpoint($1, $2)", &[&consumer, &name]).await.expect("saved");
            saved.push((consumer, name));
        }
        if below(2) == 0 {
            daemon.kill();
            daemon = start();
        }
        tokio::time::sleep(Duration::from_millis(below(200) as u64)).await;
        let (consumer, name) = &saved[below(saved.len())];
        client.execute("select pgonce.restore($1, $2)", &[consumer, name]).await.expect("restored");
    }
    let total: i64 = expected.values().sum();
    eventually("everything is counted again", async || {
        let counted = number(&client, "select coalesce(sum(count), 0)::bigint from pgonce.word_counts").await;
        let dead = number(&client, "select count(*) from pgonce.dead_letters").await;
        let left = number(&client, "select coalesce(sum(lag) + sum(parked), 0)::bigint from pgonce.consumer_lag").await;
        let unsent = number(&client, "select coalesce(sum(pending), 0)::bigint from pgonce.outbox_status").await;
        (counted >= total && dead >= poison && left == 0 && unsent == 0).then_some(())
    })
    .await;
    daemon.finish();
    let counts = client.query("select word, count from pgonce.word_counts", &[]).await.expect("counts");
    let counts: BTreeMap<String, i64> = counts.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(counts, expected, "seed {seed}");
    assert_eq!(number(&client, "select count(*) from pgonce.dead_letters").await, poison, "seed {seed}");
    let words = "select count(*) from pgonce.queue join pgonce.topics using (topic_id) where topic = 'words'";
    assert_eq!(number(&client, words).await, total, "seed {seed}: emitted twice, or not at all");
    println!("{restores} restores, {sent} documents, {total} words, {poison} dead");
}
