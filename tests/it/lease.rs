//! Leases: effects outside of the database, at least once, by one owner of each partition at a time.

use pgonce::{ConsumerKind, ConsumerSettings, ErrorKind, Schema, create_consumer};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, pid_of, sqlstate, texts};

pub(crate) const TOPIC: &str = "t";
const ONE: &str = "11111111-1111-4111-8111-111111111111";
const OTHER: &str = "22222222-2222-4222-8222-222222222222";
/// Time that no test outlasts.
const LONG: i32 = 3_600_000;
/// Ends the time of all leases.
const EXPIRE: &str = "update pgonce.leases set leased_until = '-infinity' where owner is not null";
/// Makes all that waits for its time due.
const HURRY: &str = "update pgonce.parked set due_at = clock_timestamp() where due_at is not null";
/// What the database knows of the consumer, but for the counter of refused writes.
const BOOKS: &str = r"
    select p::text from pgonce.progress p
    union all select p::text from pgonce.parked p
    union all select p::text from pgonce.processed_ids p
    union all select d::text from pgonce.dead_letters d
    union all select jsonb_set(to_jsonb(l), '{fenced}', '0')::text from pgonce.leases l
    order by 1";

/// An external consumer with messages whose keys are the letters with which their ids begin; `-` for none.
pub(crate) async fn world(partitions: i32, policy: &str, ids: &str) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, partitions, "another").await;
    let create = format!(
        "select pgonce.create_consumer('c', 't', kind => 'external', failure_policy => '{policy}', attempts_max => 3,
                                       backoff_min_ms => 86400000, backoff_max_ms => 86400000)"
    );
    client.batch_execute(&create).await.expect("created");
    if !ids.is_empty() {
        publish(&client, ids).await;
    }
    (database, client)
}

async fn publish(client: &Client, ids: &str) {
    let enqueue = "select pgonce.enqueue('t', '{}', key => nullif(left(id, 1), '-'), message_id => id)
                   from unnest(string_to_array($1, ' ')) with ordinality as i(id, nth) order by nth";
    client.execute(enqueue, &[&ids]).await.expect("sent");
    client.batch_execute("select pgonce.relay()").await.expect("relayed");
}

/// Takes what there is; answers partitions and epochs.
async fn acquire(client: &Client, member: &str) -> Vec<String> {
    let acquire = format!(
        "select partition || ' ' || epoch from pgonce.acquire('c', '{member}', 1024, {LONG}) order by partition"
    );
    texts(client, &acquire).await
}

/// The ids that peek answers for partition 0.
async fn peek(client: &Client, epoch: i64) -> String {
    texts(client, &format!("select message_id from pgonce.peek('c', 0, {epoch})")).await.join(" ")
}

async fn ack(client: &Client, epoch: i64, from: i64, to: i64) -> String {
    let ack = format!(
        "select outcome || ' ' || coalesce(next_offset::text, '') from pgonce.ack('c', 0, {epoch}, {from}, {to})"
    );
    texts(client, &ack).await.remove(0)
}

async fn nack(client: &Client, epoch: i64, offset: i64) -> String {
    texts(client, &format!("select outcome from pgonce.nack('c', 0, {epoch}, {offset}, 'bad')")).await.remove(0)
}

#[tokio::test]
async fn every_acquisition_raises_the_epoch_and_a_stale_one_changes_nothing() {
    let (_database, client) = world(1, "park_key", "a1 b1 a2").await;
    assert_eq!(acquire(&client, ONE).await, ["0 1"]);
    assert_eq!(acquire(&client, OTHER).await, [""; 0], "its time is not over");
    assert_eq!(peek(&client, 1).await, "a1 b1 a2");
    client.batch_execute(EXPIRE).await.expect("expired");
    // Nobody else has acquired it: it is still his.
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 2");
    assert_eq!(acquire(&client, OTHER).await, ["0 2"]);
    let books = texts(&client, BOOKS).await;
    assert_eq!(peek(&client, 1).await, "");
    assert_eq!(ack(&client, 1, 2, 2).await, "fenced ");
    assert_eq!(nack(&client, 1, 2).await, "fenced");
    for call in ["renew('c', 0, 1, 1000)", "release('c', 0, 1)"] {
        assert_eq!(texts(&client, &format!("select outcome from pgonce.{call}")).await, ["fenced"], "{call}");
    }
    assert_eq!(texts(&client, BOOKS).await, books);
    assert_eq!(number(&client, "select fenced from pgonce.consumer_leases").await, 5);
    assert_eq!(texts(&client, "select outcome from pgonce.release('c', 0, 2)").await, ["released"]);
    assert_eq!(ack(&client, 2, 2, 2).await, "fenced ", "it was given back");
    assert_eq!(acquire(&client, ONE).await, ["0 3"]);
}

#[tokio::test]
async fn what_fails_again_takes_turns_with_what_is_new() {
    let (_database, client) = world(1, "park_key", "a1 b1").await;
    acquire(&client, ONE).await;
    assert_eq!(nack(&client, 1, 1).await, "parked");
    assert_eq!(peek(&client, 1).await, "b1");
    assert_eq!(ack(&client, 1, 2, 2).await, "acked 3");
    publish(&client, "c1").await;
    client.batch_execute(HURRY).await.expect("due");
    assert_eq!(peek(&client, 1).await, "a1");
    assert_eq!(nack(&client, 1, 1).await, "parked");
    client.batch_execute(HURRY).await.expect("due");
    assert_eq!(peek(&client, 1).await, "c1");
    assert_eq!(ack(&client, 1, 3, 3).await, "acked 4");
    assert_eq!(peek(&client, 1).await, "a1");
}

#[tokio::test]
async fn the_verbs_of_one_kind_refuse_the_other() {
    let (_database, client) = world(1, "park_key", "a1").await;
    client.batch_execute("select pgonce.create_consumer('inbox')").await.expect("created");
    for call in [
        "receive('c')",
        "open_batch('c')",
        "fail('c', 0, 1, 'bad')",
        "process_once('c', 'a1')",
        "acquire('another', gen_random_uuid(), 1, 1000)",
        "peek('another', 0, 1)",
        "ack('another', 0, 1, 1, 1)",
        "nack('another', 0, 1, 1, 'bad')",
        "renew('another', 0, 1, 1000)",
        "release('another', 0, 1)",
        "acquire('inbox', gen_random_uuid(), 1, 1000)",
    ] {
        assert_eq!(sqlstate(&client, &format!("select pgonce.{call}")).await, "PO007", "{call}");
    }
    for (call, code) in [
        ("create_consumer('c', 't', kind => 'transactional')", "PO006"),
        ("create_consumer('another', 't', kind => 'external')", "PO006"),
        ("create_consumer('new', kind => 'external')", "PO003"),
        ("create_consumer('new', 't', kind => 'both')", "PO003"),
        ("acquire('c', null, 1, 1000)", "PO003"),
        ("acquire('c', gen_random_uuid(), 0, 1000)", "PO003"),
        ("acquire('c', gen_random_uuid(), 1, 0)", "PO003"),
        ("peek('c', 0, 1, 0)", "PO003"),
        ("peek('c', 1, 1)", "PO003"),
        ("ack('c', 0, 1, 2, 1)", "PO003"),
        ("renew('c', 0, 1, null)", "PO003"),
        ("acquire('unknown', gen_random_uuid(), 1, 1000)", "PO002"),
    ] {
        assert_eq!(sqlstate(&client, &format!("select pgonce.{call}")).await, code, "{call}");
    }
    client
        .batch_execute("select pgonce.create_consumer('c', 't'), pgonce.create_consumer('c', 't', kind => 'external')")
        .await
        .expect("as it is");
    for verb in
        ["acquire('c', gen_random_uuid(), 1, 1000)", "peek('c', 0, 1)", "ack('c', 0, 1, 1, 1)", "renew('c', 0, 1, 1)"]
    {
        let above = format!("begin isolation level repeatable read; select pgonce.{verb}");
        assert_eq!(sqlstate(&client, &above).await, "PO010", "{verb}");
        client.batch_execute("rollback").await.expect("rolled back");
    }
    let (schema, external) = (Schema::default(), Some(ConsumerKind::External));
    let settings = ConsumerSettings { kind: external, ..ConsumerSettings::default() };
    create_consumer(&client, &schema, "c", Some(TOPIC), settings).await.expect("as it is");
    let error = create_consumer(&client, &schema, "another", Some(TOPIC), settings).await;
    assert_eq!(error.expect_err("transactional").kind(), ErrorKind::Conflict);
    client.batch_execute("select pgonce.drop_consumer('c')").await.expect("dropped");
    assert_eq!(number(&client, "select count(*) from pgonce.leases").await, 0);
}

#[tokio::test]
async fn with_park_key_a_key_waits_in_order_and_all_others_flow_on() {
    let (_database, client) = world(1, "park_key", "a1 b1 a2 b2 -3 c1").await;
    acquire(&client, ONE).await;
    assert_eq!(peek(&client, 1).await, "a1 b1 a2 b2 -3 c1");
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 2");
    assert_eq!(nack(&client, 1, 2).await, "parked");
    assert_eq!(peek(&client, 1).await, "a2 -3 c1");
    // Acknowledged with what was left out among them.
    assert_eq!(ack(&client, 1, 3, 6).await, "acked 7");
    assert_eq!(ack(&client, 1, 3, 6).await, "gone 7", "its answer was lost");
    assert_eq!(ack(&client, 1, 8, 9).await, "gone 7");
    publish(&client, "b3 d1").await;
    assert_eq!(peek(&client, 1).await, "d1");
    assert_eq!(ack(&client, 1, 8, 8).await, "acked 9");
    for (expected, offset) in [("b1", 2), ("b2", 4), ("b3", 7)] {
        assert_eq!(peek(&client, 1).await, if offset == 2 { "" } else { expected }, "not due yet");
        client.batch_execute(HURRY).await.expect("hurried");
        assert_eq!(peek(&client, 1).await, expected);
        assert_eq!(ack(&client, 1, offset, offset).await, "acked 9");
        assert_eq!(ack(&client, 1, offset, offset).await, "gone 9");
    }
    let lag = "select lag || ' ' || received || ' ' || failures || ' ' || parked from pgonce.consumer_lag where consumer = 'c'";
    assert_eq!(texts(&client, lag).await, ["0 8 1 0"]);
    assert_eq!(number(&client, "select count(*) from pgonce.processed_ids").await, 8);
}

#[tokio::test]
async fn what_waits_at_the_offset_never_hides_what_is_behind_it() {
    let (_database, client) = world(1, "park_key", "a1 a2 a3 b1 a4").await;
    acquire(&client, ONE).await;
    assert_eq!(nack(&client, 1, 1).await, "parked");
    // Looked at in pieces that are all of the key that waits.
    let one_by_one = "select message_id from pgonce.peek('c', 0, 1, max => 1)";
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.extend(texts(&client, one_by_one).await);
    }
    assert_eq!(seen, ["b1", "b1"]);
    // Where the failed one stands alone at the end, it comes back all the same.
    assert_eq!(ack(&client, 1, 4, 4).await, "acked 5");
    peek(&client, 1).await;
    client.batch_execute(HURRY).await.expect("hurried");
    for (id, offset) in [("a1", 1), ("a2", 2), ("a3", 3), ("a4", 5)] {
        assert_eq!(peek(&client, 1).await, id);
        assert_eq!(ack(&client, 1, offset, offset).await, "acked 6");
    }
}

#[tokio::test]
async fn with_block_the_partition_waits_and_with_skip_only_the_message() {
    for (policy, first, then) in [("block", "", "b1"), ("skip", "c1 b2", "b1")] {
        let (_database, client) = world(1, policy, "a1 b1 c1 b2").await;
        acquire(&client, ONE).await;
        assert_eq!(ack(&client, 1, 1, 1).await, "acked 2");
        assert_eq!(nack(&client, 1, 2).await, "parked");
        peek(&client, 1).await;
        assert_eq!(peek(&client, 1).await, first, "{policy}");
        client.batch_execute(HURRY).await.expect("hurried");
        assert_eq!(peek(&client, 1).await, then, "{policy}");
        assert_eq!(ack(&client, 1, 2, 2).await, "acked 3");
        assert_eq!(peek(&client, 1).await, "c1 b2", "{policy}");
        assert_eq!(ack(&client, 1, 3, 4).await, "acked 5");
    }
}

#[tokio::test]
async fn after_its_last_attempt_a_message_is_dead_and_can_be_replayed() {
    let (_database, client) = world(1, "park_key", "a1 a2").await;
    acquire(&client, ONE).await;
    for outcome in ["parked", "parked", "dead", "gone"] {
        assert_eq!(nack(&client, 1, 1).await, outcome);
    }
    assert_eq!(peek(&client, 1).await, "a2");
    let replay = "select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    client.batch_execute(replay).await.expect("replayed");
    // It was handed out before the other one began to wait: it is done.
    assert_eq!(ack(&client, 1, 2, 2).await, "acked 3");
    assert_eq!(peek(&client, 1).await, "a1");
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 3");
    assert_eq!(peek(&client, 1).await, "");
}

#[tokio::test]
async fn what_is_at_hand_is_done_though_a_replay_is_put_in_front_of_it() {
    let (_database, client) = world(1, "park_key", "a1 a2").await;
    acquire(&client, ONE).await;
    for outcome in ["parked", "parked", "dead"] {
        assert_eq!(nack(&client, 1, 1).await, outcome);
    }
    assert_eq!(peek(&client, 1).await, "a2");
    assert_eq!(nack(&client, 1, 2).await, "parked");
    assert_eq!(peek(&client, 1).await, "", "it passes over what is parked");
    client.batch_execute(HURRY).await.expect("hurried");
    assert_eq!(peek(&client, 1).await, "a2");
    let replay = "select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    client.batch_execute(replay).await.expect("replayed");
    assert_eq!(peek(&client, 1).await, "a1", "the other one waits behind it");
    assert_eq!(ack(&client, 1, 2, 2).await, "acked 3", "but its effect is there");
    assert_eq!(ack(&client, 1, 1, 1).await, "acked 3");
    client.batch_execute(HURRY).await.expect("hurried");
    assert_eq!(peek(&client, 1).await, "", "none comes again");
}

#[tokio::test]
async fn a_lost_ack_repeats_the_message_with_the_same_id_and_counts_no_attempt() {
    let (_database, client) = world(1, "park_key", "a1").await;
    acquire(&client, ONE).await;
    let look = |epoch: i64| format!("select message_id || ' ' || attempt from pgonce.peek('c', 0, {epoch})");
    assert_eq!(texts(&client, &look(1)).await, ["a1 1"]);
    client.batch_execute("begin; select pgonce.ack('c', 0, 1, 1, 1); rollback").await.expect("lost");
    assert_eq!(texts(&client, &look(1)).await, ["a1 1"]);
    client.batch_execute(EXPIRE).await.expect("expired");
    acquire(&client, OTHER).await;
    assert_eq!(texts(&client, &look(2)).await, ["a1 1"]);
}

#[tokio::test]
async fn whoever_dies_of_a_message_again_and_again_leaves_it_dead_and_all_else_done() {
    let (_database, client) = world(1, "park_key", "a1 b1 a2 c1").await;
    acquire(&client, ONE).await;
    assert_eq!(peek(&client, 1).await, "a1 b1 a2 c1");
    let mut done = Vec::new();
    let mut epoch = 1;
    for _ in 0..40 {
        let message =
            client.query_opt(&format!(r#"select message_id, "offset" from pgonce.peek('c', 0, {epoch})"#), &[]).await;
        // The first owner has died with several at hand.
        let message = if epoch == 1 { None } else { message.expect("at most one") };
        match message {
            Some(row) if row.get::<_, &str>(0) != "b1" => {
                assert!(ack(&client, epoch, row.get(1), row.get(1)).await.starts_with("acked"));
                done.push(row.get::<_, String>(0));
            }
            Some(_) | None => {
                client.batch_execute(EXPIRE).await.expect("dead");
                client.batch_execute(HURRY).await.expect("hurried");
                let member = if epoch % 2 == 0 { ONE } else { OTHER };
                epoch += 1;
                assert_eq!(acquire(&client, member).await, [format!("0 {epoch}")]);
            }
        }
    }
    assert_eq!(done, ["a1", "a2", "c1"]);
    let dead = "select message_id || ' ' || attempts from pgonce.dead_letters";
    assert_eq!(texts(&client, dead).await, ["b1 3"]);
}

/// Says that members live.
async fn beat(client: &Client, members: &[&str]) {
    for member in members {
        client.batch_execute(&format!("select pgonce.beat('{member}', '{{c}}')")).await.expect("beaten");
    }
}

/// Keeps its partitions, and gives up what it has too many of; answers how many that are.
async fn renew(client: &Client, member: &str) -> usize {
    let held = format!(
        "select partition || ', ' || epoch from pgonce.consumer_leases where owner = '{member}' order by partition"
    );
    let mut given_up = 0;
    for lease in texts(client, &held).await {
        let row = client
            .query_one(&format!("select outcome, is_surplus from pgonce.renew('c', {lease}, {LONG})"), &[])
            .await
            .expect("renewed");
        assert_eq!(row.get::<_, &str>(0), "renewed");
        if row.get(1) {
            client.batch_execute(&format!("select pgonce.release('c', {lease})")).await.expect("released");
            given_up += 1;
        }
    }
    given_up
}

#[tokio::test]
async fn partitions_are_shared_by_the_members_that_live() {
    let (database, client) = world(8, "park_key", "a1").await;
    let mut others = database.connect().await;
    beat(&client, &[ONE]).await;
    assert_eq!(acquire(&client, ONE).await.len(), 8);
    assert_eq!(renew(&client, ONE).await, 0);
    // One more comes: the first keeps no more than half.
    beat(&others, &[OTHER]).await;
    assert_eq!(acquire(&others, OTHER).await.len(), 0);
    assert_eq!(renew(&client, ONE).await, 4);
    assert_eq!(acquire(&client, ONE).await.len(), 0);
    assert_eq!(acquire(&others, OTHER).await.len(), 4);
    let held = texts(&client, "select partition || owner::text || epoch from pgonce.consumer_leases").await;
    for (client, member) in [(&client, ONE), (&others, OTHER)] {
        assert_eq!((renew(client, member).await, acquire(client, member).await.len()), (0, 0), "who has, keeps");
    }
    assert_eq!(texts(&client, "select partition || owner::text || epoch from pgonce.consumer_leases").await, held);
    // It says farewell without giving anything back, or is silent for too long, or its session ends.
    others.batch_execute(&format!("select pgonce.leave('{OTHER}')")).await.expect("left");
    assert_eq!(acquire(&client, ONE).await.len(), 4);
    for how in ["silent", "ended"] {
        beat(&others, &[OTHER]).await;
        renew(&client, ONE).await;
        assert_eq!(acquire(&others, OTHER).await.len(), 4, "{how}");
        if how == "silent" {
            let silence =
                format!("update pgonce.members set beat_at = now() - interval '6 s' where member_id = '{OTHER}'");
            client.batch_execute(&silence).await.expect("silent");
        } else {
            let pid = pid_of(&others).await;
            drop(others);
            let gone = format!("select count(*) from pg_stat_activity where pid = {pid}");
            eventually("the session has ended", async || (number(&client, &gone).await == 0).then_some(())).await;
            others = database.connect().await;
        }
        assert_eq!(acquire(&client, ONE).await.len(), 4, "{how}");
    }
}
