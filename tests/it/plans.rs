//! Plans: relay, receive and fail read no more than their batch, whatever the planner knows or believes about the tables.

use std::collections::BTreeMap;

use pgonce::{Message, Producer};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, number, numbered};

const TOPIC: &str = "t";
const BATCH: i64 = 100;
const RELAY: &str = "select coalesce(sum(moved), 0)::bigint from pgonce.relay('t', max => 100)";
const RECEIVE: &str = "select count(*) from pgonce.receive('c', 100)";
/// Index tuples that a batch may fetch from a table. A claim reads each row a few times.
const FETCHES_MAX: i64 = 5 * BATCH;
/// Index tuples that a poll may fetch from a table when there is nothing to do.
const IDLE_FETCHES_MAX: i64 = BATCH;
/// Messages of a table that has grown.
const GROWN: usize = 60_000;
/// Of these, so many are relayed and received before anything is measured.
const DONE: usize = 30_000;
/// Messages of a table that grows under the eyes of a session.
const GROWING: usize = 3_000;

/// What a statement read of a table: sequential scans, and tuples by way of an index.
type Reads = BTreeMap<String, (i64, i64)>;

/// What the transaction at hand, and others before it that are not accounted for yet, have read.
async fn counters(client: &Client) -> Reads {
    let query = "
        select relname::text, seq_scan, coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables
        where schemaname = 'pgonce' and relname in ('outbox', 'queue', 'processed_ids', 'parked')";
    let rows = client.query(query, &[]).await.expect("counters");
    rows.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect()
}

/// Runs a statement in a transaction of its own, which answers the number that is due, and says what it read.
async fn reads(client: &Client, statement: &str, due: i64) -> Reads {
    client.batch_execute("begin").await.expect("begun");
    let before = counters(client).await;
    assert_eq!(number(client, statement).await, due, "{statement}");
    let mut reads = counters(client).await;
    client.batch_execute("commit").await.expect("committed");
    for (table, (scans, fetches)) in &mut reads {
        *scans -= before[table].0;
        *fetches -= before[table].1;
    }
    reads
}

/// Runs a statement some times: it never scans a table, and fetches no more than it may.
///
/// What counts is the least of the times: when a transaction has ended that was open, in any database of the server,
/// while its rows might have been passed, the relay looks behind it once.
async fn assert_bounded(client: &Client, state: &str, statements: &[&str], due: i64, fetches_max: i64, times: usize) {
    let mut least: BTreeMap<(&str, String), i64> = BTreeMap::new();
    for _ in 0..times {
        for statement in statements {
            for (table, (scans, fetches)) in reads(client, statement, due).await {
                assert_eq!(scans, 0, "{state}: {statement} scanned {table}");
                let least = least.entry((statement, table)).or_insert(i64::MAX);
                *least = fetches.min(*least);
            }
        }
    }
    for ((statement, table), fetches) in least {
        assert!(fetches <= fetches_max, "{state}: {statement} fetched {fetches} rows of {table}");
    }
}

async fn topic(analyzed: bool) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, "c").await;
    let settings = "
        alter table pgonce.outbox set (autovacuum_enabled = off);
        alter table pgonce.queue set (autovacuum_enabled = off);
        alter table pgonce.processed_ids set (autovacuum_enabled = off)";
    client.batch_execute(settings).await.expect("statistics are what the test says");
    if analyzed {
        client.batch_execute("analyze").await.expect("analyzed");
    }
    (database, client)
}

async fn send(client: &Client, from: usize, to: usize) {
    let messages = numbered(to, &["a", "b", "c", "d", "e", "f", "g"]).split_off(from);
    Producer::new(TOPIC).send_all(client, &messages).await.expect("sent");
}

async fn work_off_relay(client: &Client) {
    while number(client, &RELAY.replace("100", "10000")).await > 0 {}
}

async fn work_off(client: &Client) {
    work_off_relay(client).await;
    while number(client, &RECEIVE.replace("100", "10000")).await > 0 {}
}

#[tokio::test]
async fn a_batch_reads_itself_only_with_plans_that_were_made_for_empty_tables() {
    for analyzed in [false, true] {
        let (_database, client) = topic(analyzed).await;
        let state = if analyzed { "analyzed while empty" } else { "never analyzed" };
        send(&client, 0, 200).await;
        assert_bounded(&client, state, &[RELAY, RECEIVE], BATCH, FETCHES_MAX, 1).await;
        // The session has its plans now, and keeps them while the tables grow, as a worker's does.
        send(&client, 200, GROWING).await;
        work_off(&client).await;
        send(&client, GROWING, GROWING + 1_000).await;
        assert_bounded(&client, state, &[RELAY, RECEIVE], BATCH, FETCHES_MAX, 5).await;
    }
}

#[tokio::test]
async fn an_empty_poll_reads_next_to_nothing() {
    for analyzed in [false, true] {
        let (_database, client) = topic(analyzed).await;
        let state = if analyzed { "analyzed while empty" } else { "never analyzed" };
        assert_bounded(&client, "empty", &[RELAY, RECEIVE], 0, IDLE_FETCHES_MAX, 1).await;
        send(&client, 0, GROWING).await;
        work_off(&client).await;
        assert_bounded(&client, state, &[RELAY, RECEIVE], 0, IDLE_FETCHES_MAX, 5).await;
    }
}

#[tokio::test]
async fn neither_a_batch_nor_a_failure_reads_all_that_is_parked() {
    const FAIL: &str = "select count(*) from pgonce.fail('c', 0, 1, 'why')";
    for analyzed in [false, true] {
        let (_database, client) = topic(analyzed).await;
        let state = if analyzed { "analyzed while empty" } else { "never analyzed" };
        let settings = "
            alter table pgonce.parked set (autovacuum_enabled = off);
            update pgonce.consumers set backoff_min_ms = 86400000, backoff_max_ms = 86400000";
        client.batch_execute(settings).await.expect("set");
        let mut parked = 0;
        // The session makes its plans while little is parked, and keeps them.
        for more in [20, 2_000] {
            let key = |nth: usize| if nth.is_multiple_of(2) { "busy".to_owned() } else { nth.to_string() };
            let message = |nth: usize| Message::json(&nth).expect("JSON").key(key(nth));
            let messages: Vec<Message> = (parked..parked + more).map(message).collect();
            Producer::new(TOPIC).send_all(&client, &messages).await.expect("sent");
            work_off_relay(&client).await;
            let fail = format!(
                "select count(*) from generate_series({parked} + 1, {parked} + {more}) o, lateral pgonce.fail('c', 0, o, 'why')"
            );
            assert_eq!(number(&client, &fail).await, i64::try_from(more).expect("small"));
            parked += more;
            assert_eq!(number(&client, &RECEIVE.replace("100", "10000")).await, 0, "all is parked");

            let due = "update pgonce.parked set due_at = now() where \"offset\" in (
                select \"offset\" from pgonce.parked where key <> 'busy' order by \"offset\" limit 4)";
            client.batch_execute(due).await.expect("due");
            let key = |nth: usize| if nth.is_multiple_of(2) { "busy" } else { "another" };
            let others: Vec<Message> = (0..100).map(|nth| Message::json(&nth).expect("JSON").key(key(nth))).collect();
            Producer::new(TOPIC).send_all(&client, &others).await.expect("sent");
            work_off_relay(&client).await;
            client.batch_execute("begin").await.expect("begun");
            for (statement, due) in [(RECEIVE, 4), (RECEIVE, 50), (FAIL, 1)] {
                let before = counters(&client).await;
                assert_eq!(number(&client, statement).await, due, "{statement}");
                let after = counters(&client).await;
                let fetches = after["parked"].1 - before["parked"].1;
                assert_eq!(after["parked"].0, before["parked"].0, "{state}: {statement} scanned what is parked");
                assert!(fetches <= FETCHES_MAX, "{state}: {statement} fetched {fetches} of {parked} parked rows");
            }
            client.batch_execute("rollback").await.expect("rolled back");
            // What was sent for one round is of no use for the next.
            work_off(&client).await;
            parked = usize::try_from(number(&client, "select max(\"offset\") from pgonce.queue").await).expect("small");
        }
    }
}

#[tokio::test]
async fn a_batch_reads_itself_only_on_tables_that_have_grown() {
    let (_database, client) = topic(true).await;
    send(&client, 0, GROWN).await;
    let relay = "select * from pgonce.relay('t', max => 10000, max_bytes => 1 << 30)";
    let receive = "select count(*) from pgonce.receive('c', 10000)";
    for _ in 0..DONE / 10_000 {
        client.batch_execute(relay).await.expect("relayed");
        client.batch_execute(receive).await.expect("received");
    }
    // Bounds are adopted by the call that follows.
    let one = "select * from pgonce.relay('t', max => 1); select * from pgonce.receive('c', 1)";
    client.batch_execute(one).await.expect("moved on");
    for state in ["grown with the statistics of an empty table", "analyzed", "vacuumed"] {
        match state {
            "analyzed" => client.batch_execute("analyze").await.expect("analyzed"),
            "vacuumed" => client.batch_execute("vacuum analyze").await.expect("vacuumed"),
            _ => {}
        }
        assert_bounded(&client, state, &[RELAY, RECEIVE], BATCH, FETCHES_MAX, 4).await;
    }
}
