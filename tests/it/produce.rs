//! Producing: a message exists if and only if its transaction committed, once for each id, and within its bounds.

use std::time::{Duration, SystemTime};

use pgonce::{Error, ErrorKind, Message, MessageId, Producer, Relay, Schema, TopicSettings, create_topic};
use serde_json::json;
use tokio_postgres::{Client, IsolationLevel};

use crate::fixture::TestDatabase;
use crate::probe::{create, number, numbered, pid_of, sqlstate, texts, until_blocked};

const TOPIC: &str = "orders";
const OUTBOX_ROWS: &str = "select count(*) from pgonce.outbox";
const QUEUED_IDS: &str = r#"select message_id from pgonce.queue order by partition, "offset""#;

async fn topic() -> (TestDatabase, Client, Producer) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, "reader").await;
    (database, client, Producer::new(TOPIC))
}

fn message(id: &str) -> Message {
    Message::json(&json!({ "says": id })).expect("JSON").id(id)
}

#[tokio::test]
async fn a_message_exists_if_and_only_if_its_transaction_committed() {
    let (_database, mut client, producer) = topic().await;
    let transaction = client.transaction().await.expect("begun");
    producer.send(&transaction, &message("rolled-back")).await.expect("sent");
    producer.send_all(&transaction, &numbered(10, &[])).await.expect("sent");
    transaction.rollback().await.expect("rolled back");
    assert_eq!(number(&client, OUTBOX_ROWS).await, 0);

    let transaction = client.transaction().await.expect("begun");
    producer.send(&transaction, &message("committed")).await.expect("sent");
    transaction.commit().await.expect("committed");
    assert_eq!(texts(&client, "select message_id from pgonce.outbox").await, ["committed"]);
}

#[tokio::test]
async fn a_second_message_with_an_id_is_refused_and_said_to_be_a_duplicate() {
    let (_database, client, producer) = topic().await;
    let first = producer.send(&client, &message("a")).await.expect("sent");
    assert_eq!((first.message_id.as_str(), first.was_duplicate), ("a", false));
    let other = Message::json(&json!({ "says": "something else" })).expect("JSON").id("a").key("other");
    assert!(producer.send(&client, &other).await.expect("answered").was_duplicate);

    let both = [message("a"), message("b"), message("b")];
    let sent = producer.send_all(&client, &both).await.expect("answered");
    let said: Vec<_> = sent.iter().map(|sent| (sent.message_id.as_str(), sent.was_duplicate)).collect();
    assert_eq!(said, [("a", true), ("b", false), ("b", true)]);

    assert_eq!(texts(&client, "select payload ->> 'says' from pgonce.outbox order by seq").await, ["a", "b"]);
    assert_eq!(number(&client, "select duplicates from pgonce.outbox_status").await, 3);
}

#[tokio::test]
async fn a_duplicate_in_another_topic_is_none() {
    let (_database, client, producer) = topic().await;
    create(&client, "other", 1, "other reader").await;
    producer.send(&client, &message("a")).await.expect("sent");
    assert!(!Producer::new("other").send(&client, &message("a")).await.expect("sent").was_duplicate);
}

#[tokio::test]
async fn a_duplicate_waits_for_the_first_one_and_learns_how_it_ended() {
    for first_commits in [true, false] {
        let (database, mut first, producer) = topic().await;
        let (watcher, second) = (database.connect().await, database.connect().await);
        let second_pid = pid_of(&second).await;
        let transaction = first.transaction().await.expect("begun");
        producer.send(&transaction, &message("a")).await.expect("sent");
        let again = producer.clone();
        let waiting = tokio::spawn(async move { again.send(&second, &message("a")).await });
        until_blocked(&watcher, second_pid).await;
        if first_commits {
            transaction.commit().await.expect("committed");
        } else {
            transaction.rollback().await.expect("rolled back");
        }
        let sent = waiting.await.expect("no panic").expect("answered");
        assert_eq!(sent.was_duplicate, first_commits);
        assert_eq!(number(&watcher, OUTBOX_ROWS).await, 1);
    }
}

#[tokio::test]
async fn a_duplicate_above_read_committed_is_contention() {
    let (database, first, producer) = topic().await;
    let mut second = database.connect().await;
    let transaction =
        second.build_transaction().isolation_level(IsolationLevel::RepeatableRead).start().await.expect("begun");
    transaction.query_one("select count(*) from pgonce.outbox", &[]).await.expect("a snapshot");
    producer.send(&first, &message("a")).await.expect("sent");
    let error = producer.send(&transaction, &message("a")).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Contention);
}

#[tokio::test]
async fn many_messages_keep_their_order_over_several_statements() {
    let (database, client, producer) = topic().await;
    let many = numbered(2_500, &["k"]);
    let sent = producer.send_all(&client, &many).await.expect("sent");
    assert!(sent.iter().zip(&many).all(|(sent, message)| sent.message_id == *message.message_id()));
    // More than one statement by their bytes, too.
    let content = "x".repeat(900_000);
    let large: Vec<_> =
        (0..12).map(|nth| Message::json(&content).expect("JSON").key("k").id(format!("large{nth}"))).collect();
    assert_eq!(producer.send_all(&client, &large).await.expect("sent").len(), 12);

    let pool = database.database(1);
    let relay = Relay::topic(TOPIC).batch_messages(700);
    while relay.step(&pool).await.expect("relayed").moved > 0 {}
    let expected: Vec<String> = many.iter().chain(&large).map(|message| message.message_id().to_string()).collect();
    assert_eq!(texts(&client, QUEUED_IDS).await, expected);
}

#[tokio::test]
async fn a_delayed_message_takes_its_place_when_its_time_has_come() {
    let (database, client, producer) = topic().await;
    let pool = database.database(1);
    let later = SystemTime::now() + Duration::from_secs(3_600);
    producer.send(&client, &message("delayed").key("k").deliver_at(later)).await.expect("sent");
    producer.send_all(&client, &[message("delayed too").key("k").deliver_at(later)]).await.expect("sent");
    producer.send(&client, &message("in time").key("k").deliver_at(SystemTime::UNIX_EPOCH)).await.expect("sent");
    let relay = Relay::topic(TOPIC);
    assert_eq!(relay.step(&pool).await.expect("relayed").moved, 1);
    assert_eq!(number(&client, "select scheduled from pgonce.outbox_status").await, 2);

    producer.send(&client, &message("before").key("k")).await.expect("sent");
    let due = "update pgonce.outbox set deliver_at = clock_timestamp() where message_id = 'delayed'";
    client.execute(due, &[]).await.expect("the time has come");
    assert_eq!(relay.step(&pool).await.expect("relayed").moved, 2);
    assert_eq!(texts(&client, QUEUED_IDS).await, ["in time", "before", "delayed"]);
    assert_eq!(number(&client, "select scheduled from pgonce.outbox_status").await, 1);
}

#[tokio::test]
async fn a_message_can_be_taken_back_until_it_is_relayed_and_its_id_is_free_again() {
    let (database, client, producer) = topic().await;
    let id = MessageId::from("a");
    let later = SystemTime::now() + Duration::from_secs(3_600);
    for message in [message("a"), message("a").deliver_at(later)] {
        assert!(!producer.send(&client, &message).await.expect("sent").was_duplicate);
        assert!(producer.cancel(&client, &id).await.expect("answered"));
        assert!(!producer.cancel(&client, &id).await.expect("answered"));
        assert_eq!(number(&client, OUTBOX_ROWS).await, 0);
    }
    producer.send(&client, &message("a")).await.expect("sent");
    assert_eq!(Relay::topic(TOPIC).step(&database.database(1)).await.expect("relayed").moved, 1);
    assert!(!producer.cancel(&client, &id).await.expect("answered"));
    assert!(producer.send(&client, &message("a")).await.expect("answered").was_duplicate);
}

#[tokio::test]
async fn what_is_beyond_its_bound_is_refused_with_a_hint() {
    let (_database, client, producer) = topic().await;
    let settings = TopicSettings { payload_bytes_max: Some(1_000), ..TopicSettings::default() };
    create_topic(&client, &Schema::default(), TOPIC, settings).await.expect("a smaller limit");
    let text = |bytes: usize| "x".repeat(bytes);
    let refused = [
        Message::json(&text(1_000)).expect("JSON"),
        message("a").key(text(256)),
        message("a").key(""),
        message("a").key("ä".repeat(128)),
        message(&text(256)),
        message(""),
        message("a").header("h", text(16_384)),
    ];
    for message in &refused {
        for error in [
            producer.send(&client, message).await.expect_err("refused"),
            producer.send_all(&client, &[self::message("good"), message.clone()]).await.expect_err("refused"),
        ] {
            assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
            assert!(error.hint().is_some(), "{error}");
        }
    }
    assert_eq!(number(&client, OUTBOX_ROWS).await, 0);
    // A string of n bytes has a binary form of n + 12 at the most.
    let accepted = [
        Message::json(&text(988)).expect("JSON"),
        message("b").key(text(255)),
        message(&text(255)),
        message(&"ä".repeat(127)),
        message("c").header("h", text(16_000)),
    ];
    for message in &accepted {
        assert!(!producer.send(&client, message).await.expect("accepted").was_duplicate);
    }
}

#[tokio::test]
async fn what_nobody_could_read_as_text_is_refused_however_small_it_is() {
    let (_database, client, _) = topic().await;
    let numbers = |count: usize| format!("('[' || repeat('1e131071,', {}) || '1e131071]')::jsonb", count - 1);
    // 131 kB are more than the 1 GB that PostgreSQL can hold, 80 kB are not; what comes out of a table is compressed.
    client
        .batch_execute(&format!("create temp table given as select {} as payload", numbers(8_200)))
        .await
        .expect("made");
    for call in [
        format!("enqueue('orders', {})", numbers(8_200)),
        format!("enqueue_many('orders', array['1', {}])", numbers(5_000)),
        "enqueue('orders', (select payload from given))".to_owned(),
    ] {
        let error = client.query(&format!("select * from pgonce.{call}"), &[]).await.expect_err("refused");
        let error = Error::from(error);
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{call}: {error}");
        assert!(error.to_string().contains("536870912") && error.hint().is_some(), "{call}: {error}");
    }
    // Below and above the size from which on it is looked at.
    for count in [2_000, 2_100] {
        client
            .query(&format!("select * from pgonce.enqueue('orders', {})", numbers(count)), &[])
            .await
            .expect("accepted");
    }
    let as_text = "select sum(octet_length(payload::text)) from pgonce.outbox";
    assert_eq!(number(&client, as_text).await, 4_100 * (131_072 + 2));
}

#[tokio::test]
async fn arguments_that_make_no_sense_are_refused() {
    let (_database, client, _) = topic().await;
    for (code, call) in [
        ("PO003", "enqueue('orders', '{}', headers => '[1]')"),
        ("PO003", "enqueue('orders', '{}', headers => '\"text\"')"),
        ("PO003", "enqueue('orders', null)"),
        ("PO003", "enqueue('orders', '{}', deliver_at => 'infinity')"),
        ("PO001", "enqueue('unknown', '{}')"),
        ("PO001", "enqueue(null, '{}')"),
        ("PO001", "enqueue_many('unknown', '{}')"),
        ("PO003", "enqueue_many('orders', array['{}', '{}']::jsonb[], keys => array['a'])"),
        ("PO003", "enqueue_many('orders', array['{}']::jsonb[], message_ids => array['a', 'b'])"),
        ("PO003", "enqueue_many('orders', array['{}']::jsonb[], headers => '{}')"),
        ("PO003", "enqueue_many('orders', array['{}', null]::jsonb[])"),
        ("PO003", "enqueue_many('orders', array_fill('{}'::jsonb, array[10001]))"),
        ("PO004", "enqueue_many('orders', array['{}']::jsonb[], keys => array[''])"),
        ("PO001", "cancel('unknown', 'a')"),
    ] {
        assert_eq!(sqlstate(&client, &format!("select * from pgonce.{call}")).await, code, "{call}");
    }
    assert_eq!(number(&client, OUTBOX_ROWS).await, 0);
    let most = "select * from pgonce.enqueue_many('orders', array_fill('{}'::jsonb, array[10000]))";
    client.batch_execute(most).await.expect("10000 are not too many");
    assert_eq!(number(&client, OUTBOX_ROWS).await, 10_000);
}

#[tokio::test]
async fn an_unknown_topic_is_named() {
    let (_database, client, _) = topic().await;
    let producer = Producer::new("elsewhere");
    let errors: [Error; 3] = [
        producer.send(&client, &message("a")).await.expect_err("refused"),
        producer.send_all(&client, &[message("a")]).await.expect_err("refused"),
        producer.cancel(&client, &MessageId::from("a")).await.expect_err("refused"),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::UnknownTopic);
        assert!(error.to_string().contains("elsewhere"), "{error}");
        assert!(error.hint().is_some());
    }
}

#[tokio::test]
async fn nul_is_refused_before_it_reaches_the_server() {
    let (_database, mut client, producer) = topic().await;
    assert_eq!(Message::json("a\0").expect_err("refused").kind(), ErrorKind::Payload);
    let transaction = client.transaction().await.expect("begun");
    for message in [message("a").id("a\0"), message("a").key("\0"), message("a").header("h", "\0")] {
        let error = producer.send(&transaction, &message).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Payload);
        assert!(error.hint().is_some());
        producer.send_all(&transaction, &[message]).await.expect_err("refused");
    }
    producer.send(&transaction, &message("b")).await.expect("the transaction is not aborted");
    transaction.commit().await.expect("committed");
    assert_eq!(number(&client, OUTBOX_ROWS).await, 1);
}

#[tokio::test]
async fn a_refusal_aborts_the_transaction_up_to_the_savepoint_and_no_further() {
    let (_database, client, producer) = topic().await;
    client.batch_execute("begin").await.expect("begun");
    producer.send(&client, &message("before")).await.expect("sent");
    client.batch_execute("savepoint here").await.expect("set");
    producer.send(&client, &message("a").key("x".repeat(256))).await.expect_err("refused");
    assert_eq!(sqlstate(&client, "select 1").await, "25P02");
    client.batch_execute("rollback to savepoint here").await.expect("back");
    producer.send(&client, &message("after")).await.expect("sent");
    client.batch_execute("commit").await.expect("committed");
    assert_eq!(texts(&client, "select message_id from pgonce.outbox order by seq").await, ["before", "after"]);
}
