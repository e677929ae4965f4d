//! Relaying: in bounded batches, whole or not at all, and around what cannot go.

use pgonce::{Consumer, Error, ErrorKind, Producer, Relay};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{WAIT_MAX, create, drain, eventually, number, numbered, sqlstate, texts, word};

const TOPIC: &str = "t";
const QUEUED: &str = r#"select message_id || ' at ' || "offset" from pgonce.queue order by partition, "offset""#;

async fn sent(count: usize, partitions: i32, keys: &[&str]) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, partitions, "c").await;
    Producer::new(TOPIC).send_all(&client, &numbered(count, keys)).await.expect("sent");
    (database, client)
}

/// The sum that a call of `pgonce.relay` answers.
async fn relayed(client: &Client, arguments: &str) -> i64 {
    number(client, &format!("select coalesce(sum(moved), 0)::bigint from pgonce.relay({arguments})")).await
}

#[tokio::test]
async fn a_step_moves_no_more_messages_than_its_batch() {
    for partitions in [1, 8] {
        let (database, client) = sent(250, partitions, &[]).await;
        let pool = database.database(1);
        let relay = Relay::topic(TOPIC).batch_messages(100);
        let mut moved = Vec::new();
        for _ in 0..4 {
            moved.push(relay.step(&pool).await.expect("relayed").moved);
        }
        assert_eq!(moved, [100, 100, 50, 0], "{partitions} partitions");
        assert_eq!(number(&client, "select count(*) from pgonce.queue").await, 250);
        let gapless = r#"select count(*) from (select max("offset") - count(*) as holes from pgonce.queue group by partition) p where holes <> 0"#;
        assert_eq!(number(&client, gapless).await, 0);
    }
}

#[tokio::test]
async fn a_step_moves_about_as_many_bytes_as_it_may_and_at_least_one_message() {
    let (_database, client) = sent(0, 1, &[]).await;
    let same_size: Vec<_> = (0..20).map(|nth| word("same").id(format!("m{nth}"))).collect();
    Producer::new(TOPIC).send_all(&client, &same_size).await.expect("sent");
    let bytes = number(&client, "select max(bytes)::bigint from pgonce.outbox").await;
    assert_eq!(number(&client, "select min(bytes)::bigint from pgonce.outbox").await, bytes);
    assert_eq!(relayed(&client, &format!("'{TOPIC}', max_bytes => 1")).await, 1);
    assert_eq!(relayed(&client, &format!("'{TOPIC}', max_bytes => {}", bytes * 5)).await, 5);
    assert_eq!(relayed(&client, &format!("'{TOPIC}', max_bytes => {}", bytes * 5 + 1)).await, 6);
    assert_eq!(relayed(&client, &format!("'{TOPIC}', max => 3, max_bytes => {}", bytes * 5)).await, 3);
    assert_eq!(relayed(&client, &format!("'{TOPIC}'")).await, 5);
    let expected: Vec<String> = (0..20).map(|nth| format!("m{nth} at {}", nth + 1)).collect();
    assert_eq!(texts(&client, QUEUED).await, expected);
}

#[tokio::test]
async fn a_message_that_is_in_the_queue_already_is_set_aside_and_the_rest_goes_through() {
    let (database, client) = sent(5, 1, &["k"]).await;
    let pool = database.database(1);
    let relay = Relay::topic(TOPIC);
    assert_eq!(relay.step(&pool).await.expect("relayed").moved, 5);
    Producer::new(TOPIC).send(&client, &word("before").id("before").key("k")).await.expect("sent");
    let again = "update pgonce.outbox set status = 'PENDING', seq = nextval('pgonce.outbox_seq')
                 where message_id in ('m1', 'm3')";
    client.execute(again, &[]).await.expect("changed by hand");
    Producer::new(TOPIC).send(&client, &word("behind").id("behind").key("k")).await.expect("sent");

    assert_eq!(relay.step(&pool).await.expect("relayed").moved, 2);
    let queued = ["m0 at 1", "m1 at 2", "m2 at 3", "m3 at 4", "m4 at 5", "before at 6", "behind at 7"];
    assert_eq!(texts(&client, QUEUED).await, queued);
    assert_eq!(texts(&client, "select message_id from pgonce.set_aside order by seq").await, ["m1", "m3"]);
    assert_eq!(number(&client, "select set_aside from pgonce.outbox_status").await, 2);
    assert_eq!(number(&client, "select pending from pgonce.outbox_status").await, 0);
    assert_eq!(relay.step(&pool).await.expect("relayed").moved, 0);
    assert_eq!(drain(&pool, &relay, &Consumer::sql("c", "select")).await.expect("drained"), 7);
}

#[tokio::test]
async fn a_locked_message_keeps_back_its_key_and_no_other() {
    let (database, mut client) = sent(30, 1, &["hot", "a", "b"]).await;
    let pool = database.database(1);
    let holder = client.transaction().await.expect("begun");
    holder.batch_execute("select from pgonce.outbox where message_id = 'm3' for update").await.expect("locked");
    let relay = Relay::topic(TOPIC).batch_messages(4);
    let mut moved = 0;
    loop {
        let step = relay.step(&pool).await.expect("relayed");
        if step.moved == 0 {
            assert!(step.blocked > 0);
            break;
        }
        moved += step.moved;
    }
    assert_eq!(moved, 21, "all of the other keys, and the message before the locked one");
    holder.rollback().await.expect("let go");
    while relay.step(&pool).await.expect("relayed").moved > 0 {}
    let hot = r#"select message_id from pgonce.queue where key = 'hot' order by "offset""#;
    let expected: Vec<String> = (0..10).map(|nth| format!("m{}", nth * 3)).collect();
    assert_eq!(texts(&client, hot).await, expected);
}

/// Holds the relay at the first row that it marks until [`let_go`], so that something can happen to the rows behind it.
const HOLD: &str = "
    create function public.hold() returns trigger language plpgsql as $$
    begin
      perform pg_try_advisory_lock_shared(1);
      loop
        exit when exists (select from pg_locks where locktype = 'advisory' and objid = 2
                          and database = (select oid from pg_database where datname = current_database()));
        perform pg_sleep(0.001);
      end loop;
      return new;
    end $$;
    create trigger hold before update on pgonce.outbox for each row when (old.message_id = 'm0') execute function public.hold()";

/// Waits until a relay is held.
async fn until_held(client: &Client) {
    eventually("the relay is at its first row", async || {
        let held = "select count(*) from pg_locks where locktype = 'advisory' and objid = 1
                    and database = (select oid from pg_database where datname = current_database())";
        (number(client, held).await > 0).then_some(())
    })
    .await;
}

async fn let_go(client: &Client) {
    client.batch_execute("select pg_advisory_lock_shared(2)").await.expect("let go");
}

#[tokio::test]
async fn a_row_that_is_locked_after_the_look_at_the_page_is_not_waited_for() {
    let (database, client) = sent(5, 1, &["a", "b", "c"]).await;
    client.batch_execute(HOLD).await.expect("created");
    // Without the timeout for the instant that is left, it must get along by itself.
    client.batch_execute("alter function pgonce.relay_page set lock_timeout = 0").await.expect("altered");
    let pool = database.database(1);
    let relay = tokio::spawn(async move { Relay::topic(TOPIC).step(&pool).await });
    until_held(&client).await;
    let mut other = database.connect().await;
    let holder = other.transaction().await.expect("begun");
    holder.batch_execute("select from pgonce.outbox where message_id = 'm1' for share").await.expect("locked");
    let_go(&client).await;

    let step = tokio::time::timeout(WAIT_MAX, relay).await.expect("it does not wait for the lock").expect("it ran");
    let step = step.expect("relayed");
    assert_eq!((step.moved, step.blocked), (3, 2));
    assert_eq!(texts(&client, QUEUED).await, ["m0 at 1", "m2 at 2", "m3 at 3"]);
    holder.rollback().await.expect("let go");
    assert_eq!(relayed(&client, "'t'").await, 2);
    assert_eq!(texts(&client, QUEUED).await, ["m0 at 1", "m2 at 2", "m3 at 3", "m1 at 4", "m4 at 5"]);
}

#[tokio::test]
async fn a_message_that_is_cancelled_while_its_batch_is_being_marked_is_not_sent() {
    let (database, client) = sent(5, 1, &["a"]).await;
    client.batch_execute(HOLD).await.expect("created");
    let pool = database.database(1);
    let relay = tokio::spawn(async move { Relay::topic(TOPIC).step(&pool).await });
    until_held(&client).await;
    assert_eq!(texts(&client, "select was_cancelled::text from pgonce.cancel('t', 'm2')").await, ["true"]);
    let_go(&client).await;

    assert_eq!(relay.await.expect("it ran").expect("relayed").moved, 4);
    assert_eq!(texts(&client, QUEUED).await, ["m0 at 1", "m1 at 2", "m3 at 3", "m4 at 4"]);
    Producer::new(TOPIC).send(&client, &word("next").id("next")).await.expect("sent");
    assert_eq!(relayed(&client, "'t'").await, 1);
    assert_eq!(number(&client, r#"select max("offset") from pgonce.queue"#).await, 5);
}

#[tokio::test]
async fn a_relay_that_comes_after_a_quicker_one_keeps_its_bound() {
    let (_database, client) = sent(3, 1, &[]).await;
    for _ in 0..2 {
        relayed(&client, "'t'").await;
    }
    let bound = "select scanned from pgonce.partition_heads";
    assert_eq!(number(&client, bound).await, 3);
    let late = "select from pgonce.relay_partition((select topic_id from pgonce.topics), 0, 1000, 8388608, 1, false)";
    client.batch_execute(late).await.expect("relayed");
    assert_eq!(number(&client, bound).await, 3);
}

#[tokio::test]
async fn a_relay_of_all_topics_relays_all_topics() {
    let (database, client) = sent(5, 2, &[]).await;
    create(&client, "other", 3, "of other").await;
    Producer::new("other").send_all(&client, &numbered(5, &[])).await.expect("sent");
    assert_eq!(Relay::all().step(&database.database(1)).await.expect("relayed").moved, 10);
}

#[tokio::test]
async fn counts_that_make_no_sense_are_refused() {
    let (database, client) = sent(1, 2, &[]).await;
    for arguments in [
        "'t', max => 0",
        "'t', max => 10001",
        "'t', max => null",
        "'t', max_bytes => 0",
        "'t', max_bytes => null",
        "'t', 2",
        "'t', -1",
        "null, 0",
    ] {
        assert_eq!(
            sqlstate(&client, &format!("select * from pgonce.relay({arguments})")).await,
            "PO003",
            "{arguments}"
        );
    }
    let pool = database.database(1);
    for messages in [0, -1, 10_001] {
        let error = Relay::topic(TOPIC).batch_messages(messages).step(&pool).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.hint().is_some());
    }
    let error = Relay::topic("elsewhere").step(&pool).await.expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownTopic);
    assert_eq!(Relay::topic(TOPIC).batch_messages(10_000).step(&pool).await.expect("relayed").moved, 1);
}

#[tokio::test]
async fn a_relay_above_read_committed_is_refused() {
    let (_database, client) = sent(1, 1, &[]).await;
    for level in ["repeatable read", "serializable"] {
        client.batch_execute(&format!("begin isolation level {level}")).await.expect("begun");
        let error = client.query("select * from pgonce.relay()", &[]).await.expect_err("refused");
        assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("PO010"));
        assert_eq!(Error::from(error).kind(), ErrorKind::Isolation);
        client.batch_execute("rollback").await.expect("rolled back");
    }
    assert_eq!(relayed(&client, "").await, 1);
}

#[tokio::test]
async fn a_relay_that_is_rolled_back_has_moved_nothing() {
    let (_database, mut client) = sent(10, 1, &["k"]).await;
    let transaction = client.transaction().await.expect("begun");
    transaction.batch_execute("select * from pgonce.relay()").await.expect("relayed");
    transaction.rollback().await.expect("rolled back");
    assert_eq!(number(&client, "select count(*) from pgonce.queue").await, 0);
    assert_eq!(number(&client, "select pending from pgonce.outbox_status").await, 10);
    assert_eq!(relayed(&client, "").await, 10);
}

#[tokio::test]
async fn an_empty_poll_writes_nothing() {
    let (_database, client) = sent(10, 4, &[]).await;
    while relayed(&client, "").await > 0 {}
    while number(&client, "select count(*) from pgonce.receive('c')").await > 0 {}
    let transaction = "begin; select * from pgonce.relay(); select * from pgonce.receive('c', 1000)";
    let has_xid = "select count(pg_current_xact_id_if_assigned()) from (select) one";
    // Bounds are adopted by the calls that follow the last message, and by more where transactions of other tests are open.
    eventually("an empty poll writes nothing", async || {
        client.batch_execute(transaction).await.expect("an empty poll");
        let wrote = number(&client, has_xid).await;
        client.batch_execute("commit").await.expect("committed");
        (wrote == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_sequence_that_fell_behind_hides_no_message() {
    // As after the promotion of a logical replica, which does not carry sequences.
    let fall_behind = "select setval('pgonce.outbox_seq', 1, false)";
    for is_first in [true, false] {
        let (_database, client) = sent(10, 1, &[]).await;
        while relayed(&client, "").await > 0 {}
        relayed(&client, "").await;
        number(&client, fall_behind).await;
        Producer::new(TOPIC).send(&client, &word("late")).await.expect("sent");
        client
            .batch_execute(if is_first { "begin" } else { "begin; select pg_current_xact_id()" })
            .await
            .expect("begun");
        assert_eq!(relayed(&client, "").await, 1, "first in its transaction: {is_first}");
        client.batch_execute("commit").await.expect("committed");
    }

    let (_database, client) = sent(10, 1, &[]).await;
    while relayed(&client, "").await > 0 {}
    relayed(&client, "").await;
    number(&client, fall_behind).await;
    number(&client, "select pgonce.restore_sequence()").await;
    Producer::new(TOPIC).send_all(&client, &numbered(30, &[])[20..]).await.expect("sent");
    assert_eq!(number(&client, "select min(seq) from pgonce.outbox where status = 'PENDING'").await, 11);
    assert_eq!(relayed(&client, "").await, 10);
}
