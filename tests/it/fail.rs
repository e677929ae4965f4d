//! Failing: what waits, what flows on, what is given up, and that nothing of it is lost, doubled or reordered.

use std::time::{Duration, SystemTime};

use pgonce::{BatchHandler, Consumer, Database, Failure, Handler, HandlerError, Message, Producer, Received, Relay};
use serde_json::{Value, json};
use tokio_postgres::{Client, Transaction};

use crate::fixture::TestDatabase;
use crate::probe::{create, number, sqlstate, texts};

const TOPIC: &str = "t";
const CONSUMER: &str = "c";
const TABLE: &str = "create table applied (id bigint generated always as identity, text text not null)";
const APPLIED: &str = "select text from applied order by id";
const PARKED: &str = r#"select message_id from pgonce.parked where taken_by is null order by "offset""#;
const DEAD: &str = r#"select message_id from pgonce.dead_letters where state = 'dead' order by "offset""#;
/// Makes all that waits for its time due.
const HURRY: &str = "update pgonce.parked set due_at = clock_timestamp() where due_at is not null";
/// SQL that fails at the messages that say so.
const SQL: &str = r#"insert into applied (text)
    select case payload ->> 'fails' when 'divide' then (1 / (length(message_id) - length(message_id)))::text when 'sleep' then pg_sleep(20)::text else message_id end
    from received order by "offset""#;

/// Does what a message says: it fails, panics, hangs, or is applied.
struct Obedient;

async fn obey(transaction: &Transaction<'_>, message: Received<Value>) -> Result<(), HandlerError> {
    let text = message.message_id.to_string();
    transaction.execute("insert into applied (text) values ($1)", &[&text]).await?;
    match message.payload["fails"].as_str() {
        None => Ok(()),
        Some("permanently") => Err(Failure::permanent("never").into()),
        Some("by code") => match transaction.execute("select refuse()", &[]).await {
            Ok(_) => Ok(()),
            // Whatever a handler wraps it in.
            Err(error) => Err(pgonce::Error::from(error).into()),
        },
        Some("in an age") => Err(Failure::retry_after(Duration::MAX, "not yet").into()),
        Some("later") => Err(Failure::retry_at(SystemTime::UNIX_EPOCH, "not yet").into()),
        Some("divide") => Ok(transaction.execute("select 1 / 0", &[]).await.map(drop)?),
        Some("sleep") => Ok(transaction.execute("select pg_sleep(20)", &[]).await.map(drop)?),
        Some("hang") => std::future::pending().await,
        Some("panic") => panic!("as the message says"),
        Some(other) => Err(format!("failed: {other}").into()),
    }
}

impl Handler for Obedient {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Value>) -> Result<(), HandlerError> {
        obey(tx, message).await
    }
}

impl BatchHandler for Obedient {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, messages: Vec<Received<Value>>) -> Result<(), HandlerError> {
        for message in messages {
            obey(tx, message).await?;
        }
        Ok(())
    }
}

/// The three kinds of consumers that a database's effect can have.
fn consumers() -> [Consumer; 3] {
    [Consumer::each(CONSUMER, Obedient), Consumer::batch(CONSUMER, Obedient), Consumer::sql(CONSUMER, SQL)]
}

/// A message `id` whose key is the letter it begins with; `-` for none.
fn message(id: &str, fails: Option<&str>) -> Message {
    let payload = fails.map_or_else(|| json!({}), |fails| json!({ "fails": fails }));
    let message = Message::json(&payload).expect("JSON").id(id);
    if id.starts_with('-') { message } else { message.key(&id[..1]) }
}

/// A consumer of one partition with a policy, and messages in its queue; those that end in `!` fail by dividing.
async fn world(policy: &str, ids: &str) -> (TestDatabase, Client, Database) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, "another").await;
    let create = format!(
        "select pgonce.create_consumer('c', 't', failure_policy => '{policy}', attempts_max => 3, backoff_min_ms => 86400000, backoff_max_ms => 86400000); {TABLE}"
    );
    client.batch_execute(&create).await.expect("created");
    let pool = database.database(1);
    let messages: Vec<Message> = ids.split(' ').map(|id| message(id, id.ends_with('!').then_some("divide"))).collect();
    publish(&client, &pool, &messages).await;
    (database, client, pool)
}

async fn publish(client: &Client, pool: &Database, messages: &[Message]) {
    Producer::new(TOPIC).send_all(client, messages).await.expect("sent");
    while Relay::topic(TOPIC).step(pool).await.expect("relayed").moved > 0 {}
}

/// Lets all that failed succeed from now on.
async fn mend(client: &Client) {
    let mend = format!("update pgonce.parked set payload = '{{}}'; {HURRY}");
    client.batch_execute(&mend).await.expect("mended");
}

/// Steps until there is nothing to do; answers what was applied since the last time.
async fn drain(client: &Client, pool: &Database, consumer: &Consumer) -> String {
    let before = texts(client, APPLIED).await.len();
    for _ in 0..100 {
        let step = consumer.step(pool).await.expect("a step");
        if step.applied == 0 && step.failed == 0 {
            let applied = texts(client, APPLIED).await;
            assert_books(client).await;
            return applied[before..].join(" ");
        }
    }
    panic!("there is no end to it");
}

/// What is recorded as processed is what was applied, and the counters say so.
async fn assert_books(client: &Client) {
    let of = |what: &str| format!("select {what} from pgonce.consumer_lag where consumer = 'c'");
    let applied = number(client, "select count(*) from applied").await;
    assert_eq!(number(client, "select count(distinct text) from applied").await, applied, "doubled");
    assert_eq!(number(client, &of("received")).await, applied);
    assert_eq!(number(client, "select count(*) from pgonce.processed_ids").await, applied);
}

#[tokio::test]
async fn with_park_key_a_key_waits_and_all_others_flow_on() {
    for consumer in consumers() {
        let (_database, client, pool) = world("park_key", "a1 b1! a2 b2 -3! -4 c1 b3").await;
        assert_eq!(drain(&client, &pool, &consumer).await, "a1 a2 -4 c1");
        assert_eq!(texts(&client, PARKED).await.join(" "), "b1! b2 -3! b3");
        // What comes later of the key waits as well.
        publish(&client, &pool, &[message("b4", None), message("a3", None)]).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "a3");
        let blocked =
            "select message_id || ' ' || attempts || ' ' || waiting from pgonce.blocked_keys order by message_id";
        assert_eq!(texts(&client, blocked).await, ["-3! 1 0", "b1! 1 3"]);

        client.batch_execute(HURRY).await.expect("hurried");
        assert_eq!(drain(&client, &pool, &consumer).await, "", "it fails again");
        assert_eq!(texts(&client, blocked).await, ["-3! 2 0", "b1! 2 3"]);
        mend(&client).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "b1! b2 -3! b3 b4");
        publish(&client, &pool, &[message("b5", None)]).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "b5");
        assert_eq!(texts(&client, PARKED).await, [""; 0]);
        assert_eq!(number(&client, "select failures from pgonce.consumer_lag where consumer = 'c'").await, 4);
    }
}

#[tokio::test]
async fn with_block_the_partition_waits_and_with_skip_only_the_message() {
    for consumer in consumers() {
        let (_database, client, pool) = world("block", "a1 b1! c1 b2").await;
        assert_eq!(drain(&client, &pool, &consumer).await, "a1");
        publish(&client, &pool, &[message("d1", None)]).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "");
        mend(&client).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "b1! c1 b2 d1");
    }
    for consumer in consumers() {
        let (_database, client, pool) = world("skip", "a1 b1! c1 b2").await;
        assert_eq!(drain(&client, &pool, &consumer).await, "a1 c1 b2");
        mend(&client).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "b1!");
    }
}

#[tokio::test]
async fn after_its_last_attempt_a_message_is_dead_and_its_key_flows_on() {
    for policy in ["park_key", "block", "skip"] {
        for consumer in consumers() {
            let (_database, client, pool) = world(policy, "b1! a1 b2! b3").await;
            for _ in 0..6 {
                drain(&client, &pool, &consumer).await;
                client.batch_execute(HURRY).await.expect("hurried");
            }
            assert_eq!(texts(&client, DEAD).await.join(" "), "b1! b2!", "{policy}");
            assert_eq!(texts(&client, APPLIED).await.join(" "), "a1 b3", "{policy}");
            let told = "select attempts || ' ' || error from pgonce.dead_letter_list where message_id = 'b1!'";
            assert_eq!(texts(&client, told).await, ["3 division by zero (22012)"]);
            assert_eq!(texts(&client, PARKED).await, [""; 0]);
        }
    }
}

#[tokio::test]
async fn an_error_can_say_that_it_is_permanent_or_when_to_try_again() {
    let consumer = Consumer::each(CONSUMER, Obedient);
    let (_database, client, pool) = world("park_key", "a1").await;
    let fails = [("b1", "permanently"), ("c1", "later"), ("d1", "in an age")].map(|(id, how)| message(id, Some(how)));
    publish(&client, &pool, &fails).await;
    publish(&client, &pool, &[message("b2", None)]).await;
    assert_eq!(consumer.step(&pool).await.expect("a step").failed, 3);
    assert_eq!(texts(&client, DEAD).await, ["b1"]);
    assert_eq!(texts(&client, APPLIED).await.join(" "), "a1 b2");
    // However long a handler asks to wait: a time that the server can store.
    let due = "select concat_ws(' ', attempts, due_at < now(), due_at < now() + interval '11 years')
               from pgonce.parked order by message_id";
    assert_eq!(texts(&client, due).await, ["1 t t", "1 f t"]);
}

#[tokio::test]
async fn statements_say_by_their_sqlstate_that_an_error_is_permanent() {
    let refuse = "create function refuse() returns text language plpgsql
        as $$ begin raise exception using errcode = 'PO013', message = 'never'; end $$";
    let sql =
        "insert into applied (text) select case when payload ? 'fails' then refuse() else message_id end from received";
    let [each, batch, _] = consumers();
    for consumer in [each, batch, Consumer::sql(CONSUMER, sql)] {
        let (_database, client, pool) = world("park_key", "a1").await;
        client.batch_execute(refuse).await.expect("created");
        publish(&client, &pool, &[message("a2", Some("by code")), message("a3", None)]).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "a1 a3");
        assert_eq!(
            texts(&client, "select message_id || ': ' || error from pgonce.dead_letters").await,
            ["a2: never (PO013)"]
        );
    }
}

#[tokio::test]
async fn a_few_executions_tell_which_messages_statements_fail_at() {
    let divide = "case when payload ->> 'fails' = 'divide' then (1 / (length(message_id) - length(message_id)))::text else message_id end";
    let fails = |nth: i32| matches!(nth, 0 | 100 | 101 | 377 | 599);
    let messages: Vec<Message> = (0..600)
        .map(|nth| {
            let payload = if fails(nth) { json!({ "fails": "divide" }) } else { json!({}) };
            Message::json(&payload).expect("JSON").id(nth.to_string())
        })
        .collect();
    // Statements that look at one row after the other, and statements that look at all rows before they fail.
    for (from, executions_max) in [("received", 30), ("(select * from received order by payload) r", 130)] {
        let (_database, client, pool) = world("park_key", "-").await;
        client.batch_execute("create sequence executions").await.expect("created");
        publish(&client, &pool, &messages).await;
        let sql = format!("select nextval('executions'); insert into applied (text) select {divide} from {from}");
        let step = Consumer::sql(CONSUMER, sql).step(&pool).await.expect("a step");
        assert_eq!((step.applied, step.failed), (596, 5), "{from}");
        let executions = number(&client, "select last_value from executions").await;
        assert!(executions <= executions_max, "{executions} executions over {from}");
    }
}

#[tokio::test]
async fn what_fails_again_and_again_delays_nothing_by_more_than_a_batch() {
    for consumer in consumers() {
        let consumer = consumer.batch_messages(2);
        let (_database, client, pool) = world("park_key", "a1! b1! c1! d1! e1! f1!").await;
        client.batch_execute("update pgonce.consumers set attempts_max = 1000").await.expect("changed");
        drain(&client, &pool, &consumer).await;
        let others: Vec<Message> = (0..6).map(|nth| message(&format!("x{nth}"), None)).collect();
        publish(&client, &pool, &others).await;
        let mut applied = 0;
        for _ in 0..6 {
            client.batch_execute(HURRY).await.expect("due");
            applied += consumer.step(&pool).await.expect("a step").applied;
        }
        assert_eq!(applied, 6, "{consumer:?}");
        assert_eq!(
            number(&client, "select max(attempts)::bigint from pgonce.parked").await,
            2,
            "and they get their turns"
        );
    }
}

#[tokio::test]
async fn with_block_a_suspect_waits_for_what_is_replayed_in_front_of_it() {
    let (_database, client, pool) = world("block", "a1 a2").await;
    let suspect = "
        select pgonce.fail('c', 0, 1, 'why', permanent => true);
        select pgonce.fail('c', 0, 2, 'why');
        select pgonce.receive('c');
        update pgonce.parked set is_suspect = true, due_at = clock_timestamp();
        select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    client.batch_execute(suspect).await.expect("replayed");
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "a1 a2");
}

#[tokio::test]
async fn statements_are_tried_over_nothing_but_what_is_received() {
    let (_database, client, _pool) = world("park_key", "a1 b1").await;
    for open in ["", "select pgonce.open_batch('c', 1);"] {
        let r#try = format!("begin; {open} select pgonce.try_statements('c', 0, '{{1,2}}', 'select 1/0')");
        assert_eq!(sqlstate(&client, &r#try).await, "PO003", "{open}");
        client.batch_execute("rollback").await.expect("rolled back");
    }
}

#[tokio::test]
async fn what_violates_a_deferred_constraint_fails_alone() {
    let sql = "insert into applied (text) select coalesce(payload ->> 'text', message_id) from received";
    for is_sql in [false, true] {
        let (_database, client, pool) = world("park_key", "a1 b1").await;
        let constraint = "
            create function refuse() returns trigger language plpgsql as $$
            begin raise exception using errcode = 'check_violation', message = 'at once or at the end'; end $$;
            create constraint trigger late after insert on applied deferrable initially deferred
            for each row when (new.text = 'c1') execute function refuse()";
        client.batch_execute(constraint).await.expect("added");
        publish(&client, &pool, &[message("c1", None), message("d1", None)]).await;
        let consumer = if is_sql { Consumer::sql(CONSUMER, sql) } else { Consumer::each(CONSUMER, Obedient) };
        assert_eq!(drain(&client, &pool, &consumer).await, "a1 b1 d1", "sql: {is_sql}");
        let parked = "select message_id || ' ' || (error like 'at once or at the end%') from pgonce.parked";
        assert_eq!(texts(&client, parked).await, ["c1 true"], "sql: {is_sql}");
    }
}

#[tokio::test]
async fn what_hangs_or_panics_fails_alone() {
    for (consumer, evil) in consumers().into_iter().zip([&["sleep", "hang", "panic"][..], &["hang"], &["sleep"]]) {
        let consumer = consumer.message_timeout(Duration::from_millis(300));
        for evil in evil {
            let (_database, client, pool) = world("park_key", "a1").await;
            publish(&client, &pool, &[message("b1", Some(evil)), message("c1", None), message("b2", None)]).await;
            assert_eq!(drain(&client, &pool, &consumer).await, "a1 c1", "{evil}");
            assert_eq!(texts(&client, PARKED).await.join(" "), "b1 b2", "{evil}");
        }
    }
}

#[tokio::test]
async fn a_dead_letter_is_replayed_once_in_the_order_of_its_key() {
    for consumer in consumers() {
        let (_database, client, pool) = world("park_key", "b1! b2! a1").await;
        for _ in 0..3 {
            drain(&client, &pool, &consumer).await;
            client.batch_execute(HURRY).await.expect("hurried");
        }
        // The first is dead; the second has failed for the first time, and the third waits behind it.
        drain(&client, &pool, &consumer).await;
        publish(&client, &pool, &[message("b3", None)]).await;
        drain(&client, &pool, &consumer).await;
        assert_eq!(
            (texts(&client, DEAD).await.join(" ").as_str(), texts(&client, PARKED).await.join(" ").as_str()),
            ("b1!", "b2! b3")
        );
        let replay = "select count(*) filter (where was_settled) from pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
        assert_eq!(number(&client, replay).await, 1);
        assert_eq!(number(&client, replay).await, 0);
        assert_eq!(
            texts(&client, "select state || ' ' || (settled_by = current_user) from pgonce.dead_letters").await,
            ["replayed true"]
        );
        mend(&client).await;
        assert_eq!(drain(&client, &pool, &consumer).await, "b1! b2! b3");
    }
}

#[tokio::test]
async fn what_is_discarded_never_comes_back() {
    let (_database, client, pool) = world("park_key", "a1! a2").await;
    // Ahead of the consumer.
    let fail = "select outcome from pgonce.fail('c', 0, 1, 'by hand', permanent => true)";
    assert_eq!(texts(&client, fail).await, ["dead"]);
    assert_eq!(texts(&client, fail).await, ["gone"]);
    let discard = "select count(*) filter (where was_settled) from pgonce.discard_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    assert_eq!((number(&client, discard).await, number(&client, discard).await), (1, 0));
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "a2");
}

#[tokio::test]
async fn a_message_can_be_failed_before_and_after_it_is_received() {
    let (_database, client, pool) = world("park_key", "a1 b1 a2 b2 a3").await;
    let fail =
        |offset: i64| format!("select outcome || ' ' || withdrawn::text from pgonce.fail('c', 0, {offset}, 'by hand')");
    let received = r#"select string_agg(message_id, ' ' order by "offset") from pgonce.receive('c', 4)"#;
    // Ahead: it is left out when the consumer gets there, and the rest of its key waits.
    assert_eq!(texts(&client, &fail(3)).await, ["parked {}"]);
    client.batch_execute("begin").await.expect("begun");
    assert_eq!(texts(&client, received).await, ["a1 b1 b2"]);
    // In the transaction that received it, which has it no longer.
    assert_eq!(texts(&client, &fail(2)).await, ["parked {2,4}"]);
    client.batch_execute("insert into applied (text) values ('a1'); commit").await.expect("committed");
    assert_books(&client).await;
    // What was processed cannot fail any more.
    assert_eq!(texts(&client, &fail(1)).await, [r"gone {}"]);
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "");
    assert_eq!(texts(&client, PARKED).await.join(" "), "b1 a2 b2 a3");
    mend(&client).await;
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "b1 a2 b2 a3");
    assert_eq!(
        sqlstate(&client, "begin isolation level repeatable read; select pgonce.fail('c', 0, 1, 'x')").await,
        "PO010"
    );
}

#[tokio::test]
async fn an_older_snapshot_than_a_replay_or_a_failure_gets_40001() {
    let begin = "begin isolation level repeatable read; select count(*) from pgonce.parked";
    // A replay that it does not see puts a message between two parked ones: the later one must not become due.
    let (database, client, pool) = world("park_key", "a1 a2 a3").await;
    let setup =
        "select pgonce.fail('c', 0, 1, 'x'); select pgonce.receive('c'); select pgonce.fail('c', 0, 2, 'x', true)";
    client.batch_execute(&format!("{setup}; {HURRY}")).await.expect("set up");
    let other = database.connect().await;
    other.batch_execute(begin).await.expect("begun");
    let replay = "select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    client.batch_execute(replay).await.expect("replayed");
    assert_eq!(sqlstate(&other, "select pgonce.receive('c', 1)").await, "40001");
    other.batch_execute("rollback").await.expect("rolled back");
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "a1 a2 a3");

    // A failure ahead of the consumer touches nothing else of what it takes.
    let (database, client, _pool) = world("park_key", "a1 b1 c1").await;
    let setup = "select pgonce.fail('c', 0, 1, 'x'); select pgonce.receive('c', 2)";
    client.batch_execute(&format!("{setup}; {HURRY}")).await.expect("set up");
    let other = database.connect().await;
    other.batch_execute(begin).await.expect("begun");
    client.batch_execute("select pgonce.fail('c', 0, 3, 'x')").await.expect("failed");
    assert_eq!(sqlstate(&other, "select pgonce.receive('c')").await, "40001");
}

#[tokio::test]
async fn an_id_that_was_processed_in_another_place_is_not_applied_from_the_parked_ones() {
    let (_database, client, _pool) = world("park_key", "a1 a2 a3").await;
    // As if an earlier message of that id had been cleaned up since.
    let setup = r#"select pgonce.fail('c', 0, 1, 'x'); select pgonce.receive('c');
        insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
        select 900, consumer_id, 0, 'a2' from pgonce.consumers where consumer = 'c'"#;
    client.batch_execute(&format!("{setup}; {HURRY}; begin; select pgonce.open_batch('c')")).await.expect("opened");
    assert_eq!(texts(&client, r#"select message_id from pgonce.received order by "offset""#).await, ["a1", "a3"]);
    let fail = "select withdrawn::text from pgonce.fail('c', 0, 1, 'x')";
    assert_eq!(texts(&client, fail).await, ["{1,3}"]);
    client.batch_execute("commit").await.expect("committed");
    assert_eq!(texts(&client, r#"select message_id || "offset" from pgonce.processed_ids"#).await, ["a2900"]);
    let counted = "select received * 10 + duplicates from pgonce.consumer_lag where consumer = 'c'";
    assert_eq!(number(&client, counted).await, 1);
}

#[tokio::test]
async fn a_message_can_be_failed_and_received_again_in_one_transaction() {
    let (_database, client, pool) = world("park_key", "a1 b1 a2").await;
    let again = "begin; select pgonce.receive('c'); select pgonce.fail('c', 0, 3, 'x', retry_at => '-infinity')";
    client.batch_execute(again).await.expect("failed");
    assert_eq!(texts(&client, "select message_id from pgonce.receive('c')").await, ["a2"]);
    let fail = "select withdrawn::text from pgonce.fail('c', 0, 1, 'x')";
    assert_eq!(texts(&client, fail).await, ["{1,3}"]);
    client.batch_execute("insert into applied (text) values ('b1'); commit").await.expect("committed");
    mend(&client).await;
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "a1 a2");
}

#[tokio::test]
async fn a_second_batch_of_a_transaction_shows_nothing_of_the_first() {
    let (_database, client, pool) = world("skip", "a1 b1 c1").await;
    let one_is_due = "select pgonce.fail('c', 0, n, 'x') from generate_series(1, 3) n; select pgonce.receive('c');
        update pgonce.parked set due_at = '-infinity' where message_id = 'b1'";
    client.batch_execute(one_is_due).await.expect("set up");
    client.batch_execute("begin").await.expect("begun");
    let mut shown = Vec::new();
    for opened in [1, 0] {
        assert_eq!(number(&client, "select pgonce.open_batch('c')").await, opened);
        shown.extend(
            texts(&client, "insert into applied (text) select message_id from pgonce.received returning text").await,
        );
        client.batch_execute(HURRY).await.expect("hurried");
    }
    client.batch_execute("commit").await.expect("committed");
    assert_eq!(shown, ["b1"]);
    assert_eq!(drain(&client, &pool, &Consumer::sql(CONSUMER, SQL)).await, "a1 c1");
}

#[tokio::test]
async fn generations_are_forgotten_and_never_the_one_that_a_transaction_found() {
    let ids: Vec<String> = (0..300).map(|nth| format!("-{nth}")).collect();
    let (_database, client, _pool) = world("skip", &ids.join(" ")).await;
    let receive = "select pgonce.receive('c', 1)";
    client.batch_execute(receive).await.expect("received");
    let many = "begin; do $$ begin for n in 1 .. 200 loop perform pgonce.receive('c', 1); end loop; end $$";
    client.batch_execute(many).await.expect("received");
    assert_eq!(texts(&client, "select outcome from pgonce.fail('c', 0, 1, 'x')").await, ["gone"]);
    client.batch_execute("commit").await.expect("committed");

    client.batch_execute("select pgonce.create_consumer('c', 't', attempts_max => 1000)").await.expect("changed");
    let many = "do $$ begin for n in 1 .. 300 loop perform pgonce.fail('c', 0, 300, 'x'); commit; end loop; end $$";
    client.batch_execute(many).await.expect("failed");
    assert!(number(&client, "select count(*) from pgonce.progress where generation > 0").await < 200);
}

#[tokio::test]
async fn statements_that_fail_without_messages_blame_none() {
    let sql = r#"insert into applied (text)
        select string_agg(case when payload ->> 'fails' = 'divide' then (1 / (length(message_id) - length(message_id)))::text else message_id end, ' ' order by "offset")
        from received"#;
    for policy in ["park_key", "block"] {
        let (_database, client, pool) = world(policy, "b1! b2 b3").await;
        let step = Consumer::sql(CONSUMER, sql).step(&pool).await.expect("a step");
        assert_eq!((step.applied, step.failed), (0, 1), "{policy}");
        assert_eq!(
            texts(&client, "select message_id from pgonce.parked where attempts > 0").await,
            ["b1!"],
            "{policy}"
        );
    }
}
