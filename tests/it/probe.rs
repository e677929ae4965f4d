//! Probes: what tests ask of a database, and how they wait until it answers what they expect.

use std::collections::BTreeMap;
use std::time::Duration;

use pgonce::{
    Consumer, ConsumerSettings, Database, Error, Message, Relay, Schema, TopicSettings, create_consumer, create_topic,
};
use tokio_postgres::Client;

/// Longest wait for another process or session. Only a defect takes as long.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Rounds of relay and receive until nothing is left. Only a defect takes as many.
const DRAIN_ROUNDS_MAX: usize = 2_000;

/// Looks again and again until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(answer) = look().await {
                return answer;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let answer = tokio::time::timeout(WAIT_MAX, looking).await;
    answer.unwrap_or_else(|_elapsed| panic!("not within {} s: {what}", WAIT_MAX.as_secs()))
}

/// The one number that a query answers.
pub(crate) async fn number(client: &Client, query: &str) -> i64 {
    client.query_one(query, &[]).await.expect("the query succeeds").get(0)
}

/// The texts that a query answers, in its order.
pub(crate) async fn texts(client: &Client, query: &str) -> Vec<String> {
    let rows = client.query(query, &[]).await.expect("the query succeeds");
    rows.iter().map(|row| row.get(0)).collect()
}

/// The SQLSTATE with which statements fail, in the simple protocol.
pub(crate) async fn sqlstate(client: &Client, statements: &str) -> String {
    let Err(error) = client.batch_execute(statements).await else { panic!("this does not fail: {statements}") };
    error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned())
}

/// Sets the isolation of transactions that do not choose theirs, for whoever connects from now on.
pub(crate) async fn set_default_isolation(client: &Client, level: &str) {
    let set = format!(
        "do $$ begin execute format(
           'alter database %I set default_transaction_isolation = %L', current_database(), '{level}'); end $$"
    );
    client.batch_execute(&set).await.expect("set");
}

/// Creates a topic with so many partitions, and a consumer of it.
pub(crate) async fn create(client: &Client, topic: &str, partitions: i32, consumer: &str) {
    let schema = Schema::default();
    let settings = TopicSettings { partitions: Some(partitions), ..TopicSettings::default() };
    create_topic(client, &schema, topic, settings).await.expect("a new topic");
    create_consumer(client, &schema, consumer, Some(topic), ConsumerSettings::default()).await.expect("a new consumer");
}

/// A message for the word count.
pub(crate) fn word(word: &str) -> Message {
    Message::json(&serde_json::json!({ "word": word })).expect("JSON").key(word)
}

/// Messages with the keys of a list in turn, and their place in it as the payload `{"nth": …}` and the id `m0`, `m1`, ….
pub(crate) fn numbered(count: usize, keys: &[&str]) -> Vec<Message> {
    let message = |nth: usize| {
        let message = Message::json(&serde_json::json!({ "nth": nth })).expect("JSON").id(format!("m{nth}"));
        if keys.is_empty() { message } else { message.key(keys[nth % keys.len()]) }
    };
    (0..count).map(message).collect()
}

/// Relays and consumes until nothing is left, and answers how many messages were applied.
pub(crate) async fn drain(database: &Database, relay: &Relay, consumer: &Consumer) -> Result<u64, Error> {
    let mut applied = 0;
    for _ in 0..DRAIN_ROUNDS_MAX {
        relay.step(database).await?;
        applied += consumer.step(database).await?.applied;
        let session = database.session().await?;
        let waiting = number(
            &session,
            "select ((select coalesce(sum(pending), 0) from pgonce.outbox_status)
                   + (select coalesce(sum(lag), 0) from pgonce.consumer_lag))::bigint",
        )
        .await;
        session.give_back();
        if waiting == 0 {
            return Ok(applied);
        }
    }
    panic!("something is left after {DRAIN_ROUNDS_MAX} rounds");
}

/// What the built-in consumer has counted.
pub(crate) async fn word_counts(client: &Client, consumer: &str) -> BTreeMap<String, i64> {
    let rows = client
        .query("select word, count from pgonce.word_counts where consumer = $1", &[&consumer])
        .await
        .expect("the table is there");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Sessions in a database that are inside a transaction and do nothing.
pub(crate) async fn idle_in_transaction(client: &Client) -> i64 {
    number(
        client,
        "select count(*) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid() and state like 'idle in transaction%'",
    )
    .await
}

/// Waits until the session with that process id waits for another one.
pub(crate) async fn until_blocked(client: &Client, pid: i32) {
    eventually("the session waits for another one", async || {
        let row = client.query_one("select cardinality(pg_blocking_pids($1)) > 0", &[&pid]).await.expect("an answer");
        row.get::<_, bool>(0).then_some(())
    })
    .await;
}

/// The process id of a session's backend.
pub(crate) async fn pid_of(client: &Client) -> i32 {
    client.query_one("select pg_backend_pid()", &[]).await.expect("an answer").get(0)
}
