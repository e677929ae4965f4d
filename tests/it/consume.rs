//! Consuming: record, effect and offset are one transaction, whatever the handler is and does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use pgonce::{
    BatchHandler, Consumed, Consumer, Error, ErrorKind, Handler, HandlerError, Message, Producer, Received, Relay,
};
use serde::Deserialize;
use serde_json::json;
use tokio_postgres::{Client, Transaction};

use crate::fixture::TestDatabase;
use crate::probe::{
    create, drain, eventually, idle_in_transaction, number, numbered, sqlstate, texts, word, word_counts,
};

const TOPIC: &str = "t";
const CONSUMER: &str = "c";
const APPLIED: &str = "select text from applied order by id";

#[derive(Deserialize)]
struct Numbered {
    nth: i32,
}

/// A topic of one partition, so many numbered messages in its queue, and a table for effects.
async fn queued(count: usize) -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, CONSUMER).await;
    let table = "create table applied (id bigint generated always as identity, text text not null)";
    client.batch_execute(table).await.expect("created");
    publish(&database, &client, &numbered(count, &["k"])).await;
    (database, client)
}

async fn publish(database: &TestDatabase, client: &Client, messages: &[Message]) {
    Producer::new(TOPIC).send_all(client, messages).await.expect("sent");
    let pool = database.database(1);
    while Relay::topic(TOPIC).step(&pool).await.expect("relayed").moved > 0 {}
}

async fn applied(client: &Client) -> Vec<String> {
    texts(client, APPLIED).await
}

/// Nothing of a step is left: no effect, no record, and the offset where it was.
async fn assert_untouched(client: &Client) {
    assert_eq!(applied(client).await, [""; 0]);
    assert_eq!(number(client, "select count(*) from pgonce.processed_ids").await, 0);
    assert_eq!(number(client, "select next_offset from pgonce.consumer_offsets").await, 1);
    let ended = async || (idle_in_transaction(client).await == 0).then_some(());
    eventually("the connection of the step is closed", ended).await;
}

/// Inserts each message, and fails once at the one with the number 2.
#[derive(Default)]
struct Recording {
    has_failed: AtomicBool,
}

impl Handler for Recording {
    type Payload = Numbered;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Numbered>) -> Result<(), HandlerError> {
        let text = format!("{} {} {}", message.payload.nth, message.message_id, message.offset.0);
        tx.execute("insert into applied (text) values ($1)", &[&text]).await?;
        if message.payload.nth == 2 && !self.has_failed.swap(true, Ordering::Relaxed) {
            return Err("not this time".into());
        }
        Ok(())
    }
}

impl BatchHandler for Recording {
    type Payload = Numbered;

    async fn handle(&self, tx: &Transaction<'_>, messages: Vec<Received<Numbered>>) -> Result<(), HandlerError> {
        for message in messages {
            Handler::handle(self, tx, message).await?;
        }
        Ok(())
    }
}

#[tokio::test]
async fn an_error_of_a_handler_rolls_all_back_and_the_messages_are_tried_again_in_parts() {
    let (each, batch) = (Recording::default(), Recording::default());
    for consumer in [Consumer::each(CONSUMER, each), Consumer::batch(CONSUMER, batch)] {
        let (database, client) = queued(4).await;
        let pool = database.database(1);
        let consumed = consumer.step(&pool).await.expect("it fails at first, and then no more");
        assert_eq!((consumed.applied, consumed.failed), (4, 0));
        assert_eq!(applied(&client).await, ["0 m0 1", "1 m1 2", "2 m2 3", "3 m3 4"]);
        assert_eq!(consumer.step(&pool).await.expect("nothing to do").applied, 0);
        assert_eq!(number(&client, "select received from pgonce.consumer_lag").await, 4);
    }
}

#[tokio::test]
async fn an_error_of_sql_rolls_all_back_and_the_messages_come_again() {
    let (database, client) = queued(4).await;
    let pool = database.database(1);
    let consumer = Consumer::sql(
        CONSUMER,
        r#"insert into applied (text) select message_id from received order by "offset";
           insert into effects select message_id from received"#,
    );
    let error = consumer.step(&pool).await.expect_err("a table is missing");
    assert_eq!(error.kind(), ErrorKind::Handler);
    assert!(error.to_string().contains("effects"), "{error}");
    assert_untouched(&client).await;
    client.batch_execute("create table effects (id text primary key)").await.expect("created");
    assert_eq!(consumer.step(&pool).await.expect("applied").applied, 4);
    assert_eq!(applied(&client).await, ["m0", "m1", "m2", "m3"]);
    assert_eq!(number(&client, "select count(*) from effects").await, 4);
}

#[tokio::test]
async fn statements_cannot_end_the_transaction_of_their_messages() {
    let (database, client) = queued(4).await;
    let pool = database.database(1);
    for statements in
        ["commit", "commit; insert into applied (text) select message_id from received", "rollback", "begin"]
    {
        let error = Consumer::sql(CONSUMER, statements).step(&pool).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Handler, "{statements}");
        assert_untouched(&client).await;
    }
}

/// Fails in SQL, and says that all is well.
struct Swallowing;

impl Handler for Swallowing {
    type Payload = Numbered;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Numbered>) -> Result<(), HandlerError> {
        if message.payload.nth == 3 {
            tx.execute("insert into applied (text) values (null)", &[]).await.expect_err("refused");
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_handler_that_swallows_an_error_of_the_database_fails_at_its_message() {
    let (database, client) = queued(4).await;
    let pool = database.database(1);
    let consumer = Consumer::each(CONSUMER, Swallowing);
    assert_eq!(consumer.step(&pool).await.expect("a step"), Consumed { applied: 3, failed: 1 });
    let error = "select \"offset\" || ' ' || error from pgonce.parked";
    assert!(texts(&client, error).await[0].starts_with("4 the handler went on after an error"), "it says so");
}

/// Ends the transaction that is not its own.
struct Ending(&'static str);

impl Handler for Ending {
    type Payload = Numbered;

    async fn handle(&self, tx: &Transaction<'_>, _: Received<Numbered>) -> Result<(), HandlerError> {
        tx.batch_execute("insert into applied (text) values ('lost')").await?;
        tx.batch_execute(self.0).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_batch_whose_handler_rolled_back_does_not_count_as_applied() {
    let (database, client) = queued(1).await;
    let pool = database.database(1);
    Consumer::each(CONSUMER, Ending("rollback")).step(&pool).await.expect_err("the transaction is gone");
    assert_untouched(&client).await;
}

/// Writes down all that it is told about a message.
struct Telling;

impl Handler for Telling {
    type Payload = serde_json::Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Self::Payload>) -> Result<(), HandlerError> {
        let age = message.enqueued_at.elapsed()?;
        assert!(age.as_secs() < 3_600);
        let Received { partition, offset, message_id, key, payload, headers, .. } = message;
        let headers = serde_json::Value::Object(headers);
        let text = format!("{} {} {message_id} {key:?} {payload} {headers}", partition.0, offset.0);
        tx.execute("insert into applied (text) values ($1)", &[&text]).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_handler_is_told_all_about_a_message() {
    let (database, client) = queued(0).await;
    let messages = [
        Message::json(&json!(["ä", 1.5])).expect("JSON").id("a").key("k").header("h", 1),
        Message::raw(" null ").expect("JSON").id("b"),
    ];
    publish(&database, &client, &messages).await;
    let pool = database.database(1);
    assert_eq!(Consumer::each(CONSUMER, Telling).step(&pool).await.expect("applied").applied, 2);
    let told = [r#"0 1 a Some("k") ["ä",1.5] {"h":1}"#, "0 2 b None null {}"];
    assert_eq!(applied(&client).await, told);
}

#[tokio::test]
async fn a_payload_that_does_not_fit_is_named_and_not_quoted() {
    for consumer in [Consumer::each(CONSUMER, Recording::default()), Consumer::batch(CONSUMER, Recording::default())] {
        let (database, client) = queued(1).await;
        let secret = Message::json(&json!({ "nth": "secret" })).expect("JSON").id("misfit");
        publish(&database, &client, &[secret]).await;
        let consumed = consumer.step(&database.database(1)).await.expect("it does not fit");
        assert_eq!((consumed.applied, consumed.failed), (1, 1));
        let error = texts(&client, "select message_id || ': ' || error from pgonce.blocked_keys").await.remove(0);
        assert_eq!(error, "misfit: the payload does not fit the handler, at column 16");
    }
}

#[tokio::test]
async fn another_relation_named_received_is_reported() {
    let (database, client) = queued(1).await;
    client.batch_execute("create table received (payload jsonb)").await.expect("created");
    let consumer = Consumer::sql(CONSUMER, "insert into applied (text) select payload::text from received");
    let error = consumer.step(&database.database(1)).await.expect_err("it would read the wrong one");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("received"), "{error}");
    assert!(error.hint().is_some());
    assert_untouched(&client).await;
}

#[tokio::test]
async fn received_shows_the_batch_and_is_empty_outside_of_it() {
    let (database, client) = queued(5).await;
    let pool = database.database(1);
    let consumer = Consumer::sql(
        CONSUMER,
        r#"with doubled as (select "offset", payload -> 'nth' as nth from received)
           insert into applied (text) select nth::text from doubled order by "offset";
           merge into applied a using received r on a.text = r.payload ->> 'nth' and r.payload ->> 'nth' = '1'
           when matched then update set text = 'merged'
           when not matched and r.payload ->> 'nth' = '0' then insert (text) values ('inserted');
           delete from applied where text in (select payload ->> 'nth' from received where key = 'k' and "offset" = 3);
           select count(*) from received"#,
    );
    assert_eq!(consumer.batch_messages(3).step(&pool).await.expect("applied").applied, 3);
    assert_eq!(applied(&client).await, ["0", "merged", "inserted"]);
    let session = pool.session().await.expect("the same connection");
    assert_eq!(number(&session, "select count(*) from pgonce.received").await, 0);
    assert_eq!(texts(&session, "show search_path").await, texts(&client, "show search_path").await);
}

#[tokio::test]
async fn one_statement_of_psql_counts_as_the_built_in_consumer_does() {
    let (database, client) = queued(0).await;
    create(&client, "unused", 1, "unused reader").await;
    client.batch_execute("select * from pgonce.create_consumer('psql', 't')").await.expect("created");
    let text = "the quick fox and the lazy dog and the end";
    let words: Vec<Message> = text.split(' ').cycle().take(1_000).map(word).collect();
    publish(&database, &client, &words).await;
    let statement = "
        with received as (select * from pgonce.receive('psql', 300))
        insert into pgonce.word_counts as total (consumer, word, count)
        select consumer, payload ->> 'word', count(*) from received group by 1, 2
        on conflict (consumer, word) do update set count = total.count + excluded.count";
    while client.execute(statement, &[]).await.expect("counted") > 0 {}
    let pool = database.database(2);
    let consumer = Consumer::word_count(CONSUMER);
    assert_eq!(drain(&pool, &Relay::topic(TOPIC), &consumer).await.expect("drained"), 1_000);

    let mut expected = BTreeMap::new();
    for word in text.split(' ').cycle().take(1_000) {
        *expected.entry(word.to_owned()).or_default() += 1;
    }
    assert_eq!(word_counts(&client, CONSUMER).await, expected);
    assert_eq!(word_counts(&client, "psql").await, expected);
}

/// Records an id as processed, as if the message had come before.
async fn process_before(client: &Client, ids: &str) {
    let statement = "
        insert into pgonce.processed_ids (consumer_id, message_id)
        select c.consumer_id, i from pgonce.consumers c, unnest($1::text[]) i where c.consumer = 'c'";
    let ids: Vec<&str> = ids.split(' ').collect();
    client.execute(statement, &[&ids]).await.expect("recorded");
}

#[tokio::test]
async fn what_was_processed_before_is_left_out_and_counted() {
    let sql = r#"insert into applied (text) select payload ->> 'nth' || ' ' || message_id || ' ' || "offset" from received order by "offset""#;
    for consumer in [Consumer::each(CONSUMER, Recording { has_failed: true.into() }), Consumer::sql(CONSUMER, sql)] {
        let (database, client) = queued(9).await;
        process_before(&client, "m0 m3 m5 m6 m7").await;
        let pool = database.database(1);
        let consumer = consumer.batch_messages(5);
        assert_eq!(consumer.step(&pool).await.expect("applied").applied, 3);
        assert_eq!(consumer.step(&pool).await.expect("applied").applied, 1);
        assert_eq!(applied(&client).await, ["1 m1 2", "2 m2 3", "4 m4 5", "8 m8 9"]);
        let lag = "select lag * 10000 + received * 100 + duplicates from pgonce.consumer_lag";
        assert_eq!(number(&client, lag).await, 405);
        assert_eq!(number(&client, "select count(*) from pgonce.processed_ids").await, 9);
    }
}

#[tokio::test]
async fn a_batch_of_nothing_but_duplicates_is_passed() {
    let (database, client) = queued(5).await;
    process_before(&client, "m0 m1 m2").await;
    let pool = database.database(1);
    let consumer = Consumer::each(CONSUMER, Recording { has_failed: true.into() }).batch_messages(3);
    let mut steps = 0;
    while consumer.step(&pool).await.expect("a step").applied == 0 {
        steps += 1;
        assert!(steps < 3, "it does not get past the duplicates");
    }
    assert_eq!(applied(&client).await, ["3 m3 4", "4 m4 5"]);
    assert_eq!(number(&client, "select duplicates from pgonce.consumer_lag").await, 3);
}

#[tokio::test]
async fn a_batch_has_about_as_many_bytes_as_it_may_and_at_least_one_message() {
    let (database, client) = queued(5).await;
    let bytes = number(&client, "select max(bytes)::bigint from pgonce.queue").await;
    for (max_bytes, messages) in [(1, 1), (bytes + 1, 2)] {
        let received = format!("select count(*) from pgonce.receive('c', max_bytes => {max_bytes})");
        assert_eq!(number(&client, &received).await, messages);
    }
    let content = "x".repeat(1_000_000);
    let large: Vec<Message> = (0..12).map(|_| Message::json(&content).expect("JSON").key("k")).collect();
    publish(&database, &client, &large).await;
    let consumer = Consumer::sql(CONSUMER, "insert into applied (text) select message_id from received");
    let pool = database.database(1);
    assert_eq!(consumer.step(&pool).await.expect("applied").applied, 2 + 9, "8 MiB and no more than a message beyond");
    assert_eq!(consumer.step(&pool).await.expect("applied").applied, 3);
}

#[tokio::test]
async fn a_hole_is_reported_and_never_jumped_over() {
    let (database, client) = queued(5).await;
    let consumer = Consumer::sql(CONSUMER, "insert into applied (text) select message_id from received");
    let pool = database.database(1);
    for hole in [3, 1] {
        client
            .execute(r#"delete from pgonce.queue where "offset" = $1"#, &[&i64::from(hole)])
            .await
            .expect("deleted by hand");
        for max in [1000, 5] {
            // A server reports an error before it lets go of the locks: until then the other finds nothing to do.
            let error = eventually("the step finds the hole", async || consumer.step(&pool).await.err()).await;
            assert_eq!(error.kind(), ErrorKind::Hole);
            assert!(error.hint().is_some());
            let receive = format!("select * from pgonce.receive('c', {max})");
            let error = eventually("the lock is let go", async || client.batch_execute(&receive).await.err()).await;
            assert_eq!(Error::from(error).kind(), ErrorKind::Hole);
        }
        assert_untouched(&client).await;
    }
}

#[tokio::test]
async fn counts_that_make_no_sense_are_refused() {
    let (database, client) = queued(1).await;
    for arguments in ["0", "10001", "null", "max_bytes => 0", "max_bytes => null", "partition => 1", "partition => -1"]
    {
        let receive = format!("select * from pgonce.receive('c', {arguments})");
        assert_eq!(sqlstate(&client, &receive).await, "PO003", "{arguments}");
    }
    let pool = database.database(1);
    for messages in [0, -1, 10_001] {
        let consumer = Consumer::word_count(CONSUMER).batch_messages(messages);
        let error = consumer.step(&pool).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let error = Consumer::word_count("elsewhere").step(&pool).await.expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownConsumer);
    assert_untouched(&client).await;
}

#[tokio::test]
async fn two_consumers_of_a_topic_know_nothing_of_each_other() {
    let (database, client) = queued(6).await;
    client.batch_execute("select * from pgonce.create_consumer('other', 't')").await.expect("created");
    let pool = database.database(1);
    for name in [CONSUMER, "other"] {
        let consumer = Consumer::sql(name, "insert into applied (text) select consumer from received");
        assert_eq!(consumer.step(&pool).await.expect("applied").applied, 6);
    }
    assert_eq!(number(&client, "select count(*) from applied").await, 12);
}
