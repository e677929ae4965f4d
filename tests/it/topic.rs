//! Topics, consumers and inboxes: what they are made of stays as it was made, and no `search_path` reaches inside.

use pgonce::{
    Consumer, ConsumerSettings, ErrorKind, FailurePolicy, Handler, HandlerError, Producer, Received, Relay, Schema,
    StartAt, TopicSettings, create_consumer, create_topic, process_once,
};
use tokio_postgres::{Client, Transaction};

use crate::fixture::TestDatabase;
use crate::probe::{create, number, numbered, pid_of, sqlstate, texts, until_blocked, word, word_counts};

async fn client() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    (database, client)
}

#[tokio::test]
async fn creating_the_same_twice_changes_nothing_and_other_partitions_are_refused() {
    let (_database, client) = client().await;
    let schema = Schema::default();
    let settings = TopicSettings { partitions: Some(4), payload_bytes_max: Some(1_000) };
    let all = "select t::text from pgonce.topics t";
    create_topic(&client, &schema, "t", settings).await.expect("created");
    let before = texts(&client, all).await;
    for same in [settings, TopicSettings::default()] {
        create_topic(&client, &schema, "t", same).await.expect("the same");
        assert_eq!(texts(&client, all).await, before);
    }
    let fewer = TopicSettings { partitions: Some(3), ..settings };
    let error = create_topic(&client, &schema, "t", fewer).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(sqlstate(&client, "select * from pgonce.create_topic('t', 5)").await, "PO005");
    let larger = TopicSettings { payload_bytes_max: Some(2_000), ..settings };
    create_topic(&client, &schema, "t", larger).await.expect("the limit may change");
    assert_eq!(number(&client, "select payload_bytes_max::bigint from pgonce.topics").await, 2_000);
    assert_eq!(number(&client, "select count(*) from pgonce.partitions").await, 4);
}

#[tokio::test]
async fn a_new_topic_has_eight_partitions_and_takes_a_mebibyte() {
    let (_database, client) = client().await;
    create_topic(&client, &Schema::default(), "t", TopicSettings::default()).await.expect("created");
    let row = client.query_one("select partitions, payload_bytes_max from pgonce.topics", &[]).await.expect("a row");
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i32>(1)), (8, 1 << 20));
}

#[tokio::test]
async fn names_and_settings_beyond_their_bounds_are_refused() {
    let (_database, client) = client().await;
    for (code, call) in [
        ("PO003", "create_topic('')"),
        ("PO003", "create_topic(null)"),
        ("PO003", "create_topic(repeat('x', 256))"),
        ("PO003", "create_topic('t', 0)"),
        ("PO003", "create_topic('t', 1025)"),
        ("PO003", "create_topic('t', payload_bytes_max => 0)"),
        ("PO003", "create_topic('t', payload_bytes_max => 67108865)"),
        ("PO003", "create_consumer('')"),
        ("PO003", "create_consumer(null)"),
        ("PO003", "create_consumer('c', start_at => 'never')"),
        ("PO001", "create_consumer('c', 'unknown')"),
        ("PO001", "drop_topic('unknown')"),
        ("PO001", "pause_topic('unknown')"),
        ("PO001", "resume_topic('unknown')"),
        ("PO001", "relay('unknown')"),
        ("PO002", "drop_consumer('unknown')"),
        ("PO002", "pause_consumer('unknown')"),
        ("PO002", "resume_consumer('unknown')"),
        ("PO002", "receive('unknown')"),
        ("PO002", "process_once('unknown', 'a')"),
    ] {
        assert_eq!(sqlstate(&client, &format!("select * from pgonce.{call}")).await, code, "{call}");
    }
    client.batch_execute("select * from pgonce.create_topic(repeat('x', 255), 1024)").await.expect("at the bounds");
}

#[tokio::test]
async fn a_topic_goes_with_its_messages_and_not_while_it_is_read() {
    let (_database, client) = client().await;
    create(&client, "t", 2, "c").await;
    Producer::new("t").send_all(&client, &numbered(5, &[])).await.expect("sent");
    assert_eq!(sqlstate(&client, "select * from pgonce.drop_topic('t')").await, "PO008");
    client.batch_execute("select * from pgonce.relay('t', max => 3)").await.expect("relayed");
    client.batch_execute("select * from pgonce.receive('c', 1)").await.expect("received");
    client.batch_execute("select * from pgonce.drop_consumer('c')").await.expect("dropped");
    client.batch_execute("select * from pgonce.drop_topic('t')").await.expect("dropped");
    for table in [
        "topics",
        "partitions",
        "heads",
        "outbox",
        "queue",
        "consumers",
        "consumer_partitions",
        "progress",
        "processed_ids",
    ] {
        assert_eq!(number(&client, &format!("select count(*) from pgonce.{table}")).await, 0, "{table}");
    }
    // The same names again are another topic and another consumer.
    create(&client, "t", 1, "c").await;
    let sent = Producer::new("t").send_all(&client, &numbered(5, &[])).await.expect("sent");
    assert!(sent.iter().all(|sent| !sent.was_duplicate));
}

#[tokio::test]
async fn a_pause_holds_until_it_is_ended() {
    let (database, client) = client().await;
    create(&client, "t", 1, "c").await;
    let pool = database.database(2);
    let (relay, consumer) = (Relay::topic("t"), Consumer::word_count("c"));
    Producer::new("t").send(&client, &word("a")).await.expect("sent");
    client.batch_execute("select * from pgonce.pause_topic('t')").await.expect("paused");
    assert_eq!(relay.step(&pool).await.expect("a step").moved, 0);
    Producer::new("t").send(&client, &word("b")).await.expect("sending goes on");
    client.batch_execute("select * from pgonce.resume_topic('t')").await.expect("resumed");
    assert_eq!(relay.step(&pool).await.expect("a step").moved, 2);
    client.batch_execute("select * from pgonce.pause_consumer('c')").await.expect("paused");
    assert_eq!(consumer.step(&pool).await.expect("a step").applied, 0);
    client.batch_execute("select * from pgonce.resume_consumer('c')").await.expect("resumed");
    assert_eq!(consumer.step(&pool).await.expect("a step").applied, 2);
}

#[tokio::test]
async fn a_consumer_is_bound_to_its_topic_and_starts_where_it_was_told() {
    let (database, client) = client().await;
    let schema = Schema::default();
    create(&client, "t", 1, "early").await;
    create(&client, "u", 1, "of u").await;
    Producer::new("t").send(&client, &word("before")).await.expect("sent");
    let pool = database.database(2);
    Relay::topic("t").step(&pool).await.expect("relayed");
    let latest = ConsumerSettings { start_at: StartAt::Latest, ..ConsumerSettings::default() };
    create_consumer(&client, &schema, "late", Some("t"), latest).await.expect("created");
    create_consumer(&client, &schema, "late", Some("t"), ConsumerSettings::default()).await.expect("the same");
    Producer::new("t").send(&client, &word("after")).await.expect("sent");
    Relay::topic("t").step(&pool).await.expect("relayed");
    for (consumer, words) in [("early", vec!["after", "before"]), ("late", vec!["after"])] {
        Consumer::word_count(consumer).step(&pool).await.expect("consumed");
        assert_eq!(word_counts(&client, consumer).await.into_keys().collect::<Vec<_>>(), words);
    }
    for topic in [Some("u"), None] {
        let error =
            create_consumer(&client, &schema, "late", topic, ConsumerSettings::default()).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
    }
    assert_eq!(sqlstate(&client, "select * from pgonce.create_consumer('late', 'u')").await, "PO006");
}

#[tokio::test]
async fn of_a_consumers_settings_all_but_the_policy_can_change() {
    let (_database, client) = client().await;
    let schema = Schema::default();
    create(&client, "t", 1, "c").await;
    let settings =
        "select concat_ws(' ', failure_policy, attempts_max, backoff_min_ms, backoff_max_ms) from pgonce.consumers";
    assert_eq!(texts(&client, settings).await, ["park_key 10 500 30000"]);
    let changed = ConsumerSettings {
        failure_policy: Some(FailurePolicy::ParkKey),
        attempts_max: Some(3),
        backoff_min_ms: Some(40_000),
        ..ConsumerSettings::default()
    };
    create_consumer(&client, &schema, "c", Some("t"), changed).await.expect("changed");
    assert_eq!(texts(&client, settings).await, ["park_key 3 40000 40000"]);
    create_consumer(&client, &schema, "c", Some("t"), ConsumerSettings::default()).await.expect("nothing is said");
    assert_eq!(texts(&client, settings).await, ["park_key 3 40000 40000"]);
    for policy in [FailurePolicy::Block, FailurePolicy::Skip] {
        let another = ConsumerSettings { failure_policy: Some(policy), ..ConsumerSettings::default() };
        let error = create_consumer(&client, &schema, "c", Some("t"), another).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
    }
    let too_many = ConsumerSettings { attempts_max: Some(1_001), ..ConsumerSettings::default() };
    let error = create_consumer(&client, &schema, "c", Some("t"), too_many).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn an_inbox_takes_each_id_once() {
    let (database, mut client) = client().await;
    let schema = Schema::default();
    create(&client, "t", 1, "c").await;
    create_consumer(&client, &schema, "inbox", None, ConsumerSettings::default()).await.expect("created");
    assert!(process_once(&client, &schema, "inbox", "a").await.expect("answered"));
    assert!(!process_once(&client, &schema, "inbox", "a").await.expect("answered"));
    let transaction = client.transaction().await.expect("begun");
    assert!(process_once(&transaction, &schema, "inbox", "b").await.expect("answered"));
    transaction.rollback().await.expect("rolled back");
    assert!(process_once(&client, &schema, "inbox", "b").await.expect("answered"));
    let lag = "select received * 100 + duplicates from pgonce.consumer_lag where consumer = 'inbox'";
    assert_eq!(number(&client, lag).await, 201);

    assert_eq!(sqlstate(&client, "select * from pgonce.receive('inbox')").await, "PO007");
    let pool = database.database(1);
    let error = Consumer::word_count("inbox").step(&pool).await.expect_err("an inbox");
    assert_eq!(error.kind(), ErrorKind::WrongConsumer);
    let error = process_once(&client, &schema, "c", "a").await.expect_err("reads a topic");
    assert_eq!(error.kind(), ErrorKind::WrongConsumer);
    for id in [String::new(), "x".repeat(256)] {
        let error = process_once(&client, &schema, "inbox", &id).await.expect_err("out of bounds");
        assert_eq!(error.kind(), ErrorKind::TooLarge);
    }
}

#[tokio::test]
async fn an_inbox_waits_for_the_first_to_end() {
    for first_commits in [true, false] {
        let (database, mut first) = client().await;
        let schema = Schema::default();
        create_consumer(&first, &schema, "inbox", None, ConsumerSettings::default()).await.expect("created");
        let (watcher, second) = (database.connect().await, database.connect().await);
        let pid = pid_of(&second).await;
        let transaction = first.transaction().await.expect("begun");
        assert!(process_once(&transaction, &schema, "inbox", "a").await.expect("answered"));
        let waiting = tokio::spawn(async move { process_once(&second, &Schema::default(), "inbox", "a").await });
        until_blocked(&watcher, pid).await;
        if first_commits {
            transaction.commit().await.expect("committed");
        } else {
            transaction.rollback().await.expect("rolled back");
        }
        assert_eq!(waiting.await.expect("no panic").expect("answered"), !first_commits);
    }
}

/// Partitions of keys at 1, 7, 8 and 1024 of them, computed with Python's hashlib and integers.
const PARTITIONS: &[(&str, [i32; 4])] = &[
    ("", [0, 1, 4, 20]),
    ("a", [0, 4, 2, 458]),
    ("customer-3", [0, 5, 5, 173]),
    ("order-17", [0, 1, 0, 464]),
    ("ключ", [0, 6, 0, 416]),
    ("鍵", [0, 5, 3, 723]),
    ("🔑", [0, 4, 5, 245]),
    ("\u{e9}", [0, 3, 3, 851]),
    ("e\u{301}", [0, 3, 2, 690]),
    ("msg-1", [0, 1, 7, 407]),
    ("0192f0c1-7b1e-7000-8000-000000000001", [0, 2, 7, 31]),
    ("hello world", [0, 1, 0, 520]),
    ("\n", [0, 1, 1, 1001]),
];

#[tokio::test]
async fn a_key_belongs_to_the_partition_that_its_hash_says() {
    let (_database, client) = client().await;
    for (key, partitions) in PARTITIONS {
        let row = client
            .query_one("select array(select pgonce.partition_of($1, n) from unnest(array[1, 7, 8, 1024]) n)", &[key])
            .await
            .expect("an answer");
        assert_eq!(row.get::<_, Vec<i32>>(0), partitions, "{key:?}");
    }
    // Against arithmetic that needs no sign.
    let differing = "
        select count(*)
        from generate_series(1, 20000) n,
        lateral (select md5(n::text) as key, 1 + n % 1024 as partitions) k,
        lateral (select sum(get_byte(sha256(k.key::bytea), b)::numeric * 256::numeric ^ (7 - b)) as hash from generate_series(0, 7) b) h
        where pgonce.partition_of(k.key, k.partitions) <> trunc(h.hash) % k.partitions";
    assert_eq!(number(&client, differing).await, 0);
}

#[tokio::test]
async fn a_message_goes_where_its_key_belongs_and_without_one_where_its_id_does() {
    let (_database, client) = client().await;
    create(&client, "t", 7, "c").await;
    let keyed = numbered(1, &["hello world"]);
    let keyless = numbered(1, &[]).remove(0).id("ключ");
    for messages in [vec![keyed[0].clone(), keyless.clone()], vec![keyed[0].clone().id("n"), keyless.id("鍵")]] {
        Producer::new("t").send_all(&client, &messages).await.expect("sent");
    }
    Producer::new("t").send(&client, &numbered(1, &["a"]).remove(0).id("one")).await.expect("sent");
    let placed = "select partition::text from pgonce.outbox order by seq";
    assert_eq!(texts(&client, placed).await, ["1", "6", "1", "5", "4"]);
}

#[tokio::test]
async fn a_hostile_search_path_changes_nothing() {
    let (database, client) = client().await;
    create(&client, "t", 4, "c").await;
    client.batch_execute(include_str!("hostile.sql")).await.expect("the trap is set");
    for statement in [
        "select * from pgonce.create_topic('t', 4)",
        "select * from pgonce.create_topic('u', 3)",
        "select * from pgonce.create_consumer('d', 't')",
        "select * from pgonce.create_consumer('inbox')",
        "select * from pgonce.enqueue('t', '{\"word\": \"a\"}', 'k', 'first', '{\"h\": 1}', '2000-01-01')",
        "select * from pgonce.enqueue('t', '{\"word\": \"a\"}', 'k', 'first')",
        "select * from pgonce.enqueue('t', '{\"word\": \"a\"}', 'k', 'gone')",
        "select * from pgonce.enqueue('t', '{\"word\": \"a\"}')",
        "select * from pgonce.enqueue_many('t', '{1, 2}', '{k, null}', '{second, third}', '{null, null}', '{null, 2000-01-01}')",
        "select * from pgonce.enqueue_many('t', '{1}')",
        "select * from pgonce.cancel('t', 'gone')",
        "select * from pgonce.relay('t')",
        "select * from pgonce.relay()",
        "select * from pgonce.receive('c', 1)",
        "select pgonce.open_batch('c')",
        "select * from pgonce.receive('c')",
        "select * from pgonce.receive('c')",
        "select * from pgonce.receive('c')",
        "select * from pgonce.process_once('inbox', 'a')",
        "select * from pgonce.process_once('inbox', 'a')",
        "select * from pgonce.pause_consumer('c'), pgonce.resume_consumer('c')",
        "select * from pgonce.pause_topic('t'), pgonce.resume_topic('t')",
        "select * from pgonce.outbox_status, pgonce.consumer_lag, pgonce.partition_heads, pgonce.consumer_offsets",
        "select * from pgonce.drop_consumer('inbox')",
        "select * from pgonce.drop_topic('u')",
    ] {
        if let Err(error) = client.batch_execute(statement).await {
            panic!("{statement}: {error:?}");
        }
    }
    client.batch_execute("reset search_path").await.expect("reset");
    assert_eq!(number(&client, "select count(*) from pgonce.queue").await, 5);
    let lag = "select lag * 100 + received from pgonce.consumer_lag where consumer = 'c'";
    assert_eq!(number(&client, lag).await, 5);
    drop(database);
}

#[tokio::test]
async fn a_hostile_search_path_changes_nothing_for_the_library_either() {
    let (database, client) = client().await;
    create(&client, "t", 2, "c").await;
    client.batch_execute(include_str!("hostile.sql")).await.expect("the trap is set");
    let name = texts(&client, "select current_database()::text").await.remove(0);
    let path = format!("alter database {name:?} set search_path = evil, pg_catalog, public");
    client.batch_execute(&path).await.expect("it holds for new sessions");
    let pool = database.database(1);
    let session = pool.session().await.expect("a session");
    Producer::new("t").send_all(&*session, &[word("a"), word("b"), word("a")]).await.expect("sent");
    session.give_back();
    assert_eq!(Relay::topic("t").step(&pool).await.expect("relayed").moved, 3);
    let consumer = Consumer::each("c", Taking);
    let mut applied = 0;
    for _ in 0..10 {
        applied += consumer.step(&pool).await.expect("consumed").applied;
    }
    assert_eq!(applied, 3);
}

/// Has no effect.
struct Taking;

impl Handler for Taking {
    type Payload = serde_json::Value;

    async fn handle(&self, _: &Transaction<'_>, _: Received<Self::Payload>) -> Result<(), HandlerError> {
        Ok(())
    }
}
