//! Webhooks, against a real HTTP server: what is sent, what an answer means, and what must not be called.

mod daemon;
mod endpoint;

use std::time::{Duration, SystemTime};

use pgonce::{
    Consumer, Database, Epoch, ErrorKind, ExternalHandler, Message, MessageId, Offset, Partition, Producer, Received,
    Report, Schema, Shutdown, Webhook, WebhookSettings, Worker,
};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

use self::endpoint::{CONFIDENTIAL, ELSEWHERE, Endpoint};
use crate::fixture::TestDatabase;
use crate::lease::{TOPIC, world};
use crate::probe::{WAIT_MAX, eventually, number, texts};

const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
const NEXT_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const LAX: WebhookSettings = WebhookSettings { connect_timeout: None, allow_http: true, allow_private_addresses: true };
const NONE_WAITS: &str = "select (lag + parked = 0)::integer::bigint from pgonce.consumer_lag where consumer = 'c'";
/// Messages that wait to be tried again, with what went wrong.
const PARKED: &str = "select message_id || ': ' || error from pgonce.parked where due_at is not null order by 1";
const DEAD: &str = "select message_id || ': ' || error from pgonce.dead_letters order by 1";
/// Makes all that waits for its time due.
const HURRY: &str = "update pgonce.parked set due_at = clock_timestamp() where due_at is not null";

/// A worker that sends the messages of the consumer `c`, until it is stopped.
struct Sender(Shutdown, JoinHandle<Report>);

impl Sender {
    fn start(database: &TestDatabase, webhook: Webhook, message_timeout: Duration) -> Self {
        let database = Database::connect(&database.url, Schema::default(), 4).expect("a URL");
        let consumer = Consumer::external("c", webhook).message_timeout(message_timeout);
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        let worker = Worker::new(database).consumer(consumer);
        Self(shutdown, tokio::spawn(async move { worker.run(&stop).await.expect("it stops well") }))
    }

    async fn finish(self) -> Report {
        self.0.stop();
        self.1.await.expect("no panic")
    }
}

fn webhook(endpoint: &Endpoint) -> Webhook {
    Webhook::new(&endpoint.url(), SECRET, LAX).expect("a webhook")
}

/// A message of a key, and how the endpoint is to answer it.
fn message(id: &str, key: &str, answers: &Value) -> Message {
    Message::json(&json!({ "answers": answers })).expect("JSON").id(id).key(key)
}

async fn publish(client: &Client, messages: &[Message]) {
    Producer::new(TOPIC).send_all(client, messages).await.expect("sent");
    client.batch_execute("select pgonce.relay()").await.expect("relayed");
}

async fn until_none_waits(client: &Client) {
    eventually("all is done", async || (number(client, NONE_WAITS).await == 1).then_some(())).await;
}

/// Sends one message without a database; answers why it failed.
async fn failure(webhook: &Webhook) -> String {
    let message = Received {
        partition: Partition(0),
        offset: Offset(1),
        message_id: MessageId::from("m"),
        key: None,
        payload: RawValue::from_string("{}".to_owned()).expect("JSON"),
        headers: Map::new(),
        enqueued_at: SystemTime::UNIX_EPOCH,
        attempt: 1,
    };
    let handled = tokio::time::timeout(WAIT_MAX, webhook.handle(message, Epoch(1))).await.expect("it ends");
    let error = handled.expect_err("it fails");
    let chain = std::iter::successors(Some(&*error as &dyn std::error::Error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[tokio::test]
async fn a_message_is_sent_as_it_is_stored_and_signed_with_each_secret() {
    let (database, client) = world(1, "park_key", "").await;
    let endpoint = Endpoint::start().await;
    let payload = r#"{"text": "é\n", "number": 12345678901234567890.50, "a": [ ]}"#;
    let odd = Message::raw(payload).expect("JSON").id("a 1.\u{fc}%").key("k 1.%\u{fc}").header("secret", "h");
    publish(&client, &[odd, Message::raw("7").expect("JSON").id("plain")]).await;
    let both = Webhook::new(&endpoint.url(), &format!("{SECRET}\n{NEXT_SECRET}\n"), LAX).expect("a webhook");
    let sender = Sender::start(&database, both, Duration::from_secs(30));
    until_none_waits(&client).await;
    assert_eq!(sender.finish().await.applied, 2);

    let calls = endpoint.calls();
    let stored = texts(&client, r#"select payload::text from pgonce.queue order by "offset""#).await;
    let epoch = number(&client, "select epoch from pgonce.consumer_leases").await;
    let sent: Vec<_> = calls.iter().map(|call| String::from_utf8_lossy(&call.body)).collect();
    assert_eq!(sent, stored);
    for call in &calls {
        for secret in [SECRET, NEXT_SECRET] {
            let theirs = standardwebhooks::Webhook::new(secret).expect("a secret");
            theirs.verify(&call.body, &call.headers).expect("the signature and the timestamp are good");
        }
        let stranger = standardwebhooks::Webhook::new(&SECRET.replace('C', "D")).expect("a secret");
        stranger.verify(&call.body, &call.headers).expect_err("another secret");
        assert_eq!((call.method.as_str(), call.path.as_str()), ("POST", "/hooks?token=t"));
        assert_eq!(call.header("content-type"), "application/json");
        assert_eq!(call.header("user-agent"), concat!("pgonce/", env!("CARGO_PKG_VERSION")));
        assert_eq!(call.header("pgonce-epoch"), epoch.to_string());
        assert_eq!((call.header("pgonce-partition"), call.header("pgonce-attempt")), ("0", "1"));
        assert_eq!(call.header("webhook-signature").split(' ').count(), 2);
        assert!(call.headers.values().all(|value| value != "h"));
    }
    assert_eq!(calls[0].header("webhook-id"), "a%201%2E%C3%BC%25");
    assert_eq!(calls[0].header("pgonce-key"), "k%201.%25%C3%BC");
    assert_eq!((calls[1].header("webhook-id"), calls[1].headers.get("pgonce-key")), ("plain", None));
}

#[tokio::test]
async fn what_the_endpoint_refuses_for_good_is_dead_and_all_else_is_tried_again_with_the_same_id() {
    const FOR_GOOD: [u16; 8] = [400, 401, 403, 404, 410, 418, 422, 499];
    const FOR_NOW: [u16; 11] = [300, 302, 307, 399, 408, 425, 429, 500, 502, 503, 599];
    let (database, client) = world(1, "park_key", "").await;
    let endpoint = Endpoint::start().await;
    let mut messages = Vec::new();
    for status in FOR_GOOD.into_iter().chain(FOR_NOW) {
        messages.push(message(&status.to_string(), &status.to_string(), &json!([status, 204])));
    }
    publish(&client, &messages).await;
    let sender = Sender::start(&database, webhook(&endpoint), Duration::from_secs(30));
    eventually("each was tried", async || {
        (number(&client, "select lag from pgonce.consumer_lag where consumer = 'c'").await == 0).then_some(())
    })
    .await;
    let parked = texts(&client, PARKED).await;
    assert_eq!(parked.len(), FOR_NOW.len(), "{parked:?}");
    for (status, why) in FOR_NOW.iter().zip(&parked) {
        assert!(why.starts_with(&format!("{status}: the endpoint answered {status}")), "{why}");
        assert_eq!(why.contains("redirects are not followed"), *status < 400, "{why}");
    }
    client.batch_execute(HURRY).await.expect("hurried");
    until_none_waits(&client).await;
    assert_eq!(sender.finish().await.applied, FOR_NOW.len() as u64);

    let dead = texts(&client, DEAD).await;
    assert_eq!(dead.len(), FOR_GOOD.len(), "{dead:?}");
    for (status, why) in FOR_GOOD.iter().zip(&dead) {
        assert!(why.starts_with(&format!("{status}: the endpoint answered {status}")), "{why}");
        assert_eq!(endpoint.attempts_of(&status.to_string()), format!("{status}:1"));
    }
    for status in FOR_NOW {
        assert_eq!(endpoint.attempts_of(&status.to_string()), format!("{status}:1 {status}:2"));
    }
    assert!(endpoint.calls().iter().all(|call| call.path != ELSEWHERE), "a redirect was followed");
    // It may say anything about the message, and the reader of a log need not know it.
    assert!(parked.iter().chain(&dead).all(|why| !why.contains(CONFIDENTIAL)), "{parked:?} {dead:?}");
}

#[tokio::test]
async fn a_message_waits_for_as_long_as_the_endpoint_asks_for_up_to_a_day() {
    let (database, client) = world(1, "park_key", "").await;
    // The backoff is short, so that a wait is the endpoint's.
    let quick = "select pgonce.create_consumer('c', 't', backoff_min_ms => 1, backoff_max_ms => 1)";
    client.batch_execute(quick).await.expect("changed");
    let endpoint = Endpoint::start().await;
    let asks = |status: u16, wait: &str| json!([{ "status": status, "retry-after": wait }, 200]);
    let in_two_hours = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(7_200));
    publish(
        &client,
        &[
            message("seconds", "a", &asks(429, "3600")),
            message("date", "b", &asks(503, &in_two_hours)),
            message("long", "c", &asks(302, "864000")),
            message("past", "d", &asks(503, "Sun, 06 Nov 1994 08:49:37 GMT")),
            message("nonsense", "e", &asks(503, "soon")),
        ],
    )
    .await;
    let sender = Sender::start(&database, webhook(&endpoint), Duration::from_secs(30));
    let waits =
        "select message_id || ' ' || round(extract(epoch from due_at - parked_at) / 600) from pgonce.parked order by 1";
    eventually("those that do not wait are there", async || {
        (number(&client, "select count(*) from pgonce.processed_ids").await == 2).then_some(())
    })
    .await;
    assert_eq!(texts(&client, waits).await, ["date 12", "long 144", "seconds 6"]);
    client.batch_execute(HURRY).await.expect("hurried");
    until_none_waits(&client).await;
    assert_eq!(sender.finish().await.applied, 5);
}

#[tokio::test]
async fn messages_of_a_key_reach_a_failing_endpoint_in_their_order() {
    let (database, client) = world(2, "park_key", "").await;
    let settings = "select pgonce.create_consumer('c', 't', backoff_min_ms => 1, backoff_max_ms => 1)";
    client.batch_execute(settings).await.expect("changed");
    let endpoint = Endpoint::start().await;
    let mut messages = Vec::new();
    for nth in 1..=4 {
        for key in ["a", "b", "c", "d"] {
            let answers = match (key, nth) {
                ("a", 1 | 3) => json!([500, 503, 200]),
                ("b", 2) => json!([404]),
                ("c", _) => json!([503]),
                _ => json!([200]),
            };
            messages.push(message(&format!("{key}{nth}"), key, &answers));
        }
    }
    publish(&client, &messages).await;
    let sender = Sender::start(&database, webhook(&endpoint), Duration::from_secs(30));
    until_none_waits(&client).await;
    sender.finish().await;
    assert_eq!(endpoint.attempts_of("a"), "a1:1 a1:2 a1:3 a2:1 a3:1 a3:2 a3:3 a4:1");
    assert_eq!(endpoint.attempts_of("b"), "b1:1 b2:1 b3:1 b4:1");
    assert_eq!(endpoint.attempts_of("c"), "c1:1 c1:2 c1:3 c2:1 c2:2 c2:3 c3:1 c3:2 c3:3 c4:1 c4:2 c4:3");
    assert_eq!(endpoint.attempts_of("d"), "d1:1 d2:1 d3:1 d4:1");
    let dead = "select message_id from pgonce.dead_letters order by 1";
    assert_eq!(texts(&client, dead).await.join(" "), "b2 c1 c2 c3 c4");
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_in_time_has_failed() {
    let (database, client) = world(1, "park_key", "").await;
    client.batch_execute("select pgonce.create_consumer('c', 't', attempts_max => 1000)").await.expect("changed");
    let endpoint = Endpoint::start().await;
    publish(&client, &[message("slow", "a", &json!(["hang", 200]))]).await;
    let sender = Sender::start(&database, webhook(&endpoint), Duration::from_millis(500));
    let why = eventually("it has failed", async || texts(&client, PARKED).await.pop()).await;
    assert_eq!(why, "slow: it took longer than 500ms");
    eventually("it is delivered", async || {
        client.batch_execute(HURRY).await.expect("hurried");
        (number(&client, NONE_WAITS).await == 1).then_some(())
    })
    .await;
    assert_eq!(sender.finish().await.applied, 1);
    assert!(endpoint.attempts_of("a").starts_with("slow:1 slow:2"));
}

#[tokio::test]
async fn an_endpoint_whose_answer_never_ends_has_the_message() {
    let (database, client) = world(1, "park_key", "").await;
    let endpoint = Endpoint::start().await;
    publish(&client, &[message("endless", "a", &json!(["endless"])), message("next", "a", &json!([200]))]).await;
    let sender = Sender::start(&database, webhook(&endpoint), Duration::from_secs(30));
    until_none_waits(&client).await;
    assert_eq!(sender.finish().await.applied, 2);
    assert_eq!(endpoint.attempts_of("a"), "endless:1 next:1");
}

#[tokio::test]
async fn a_name_that_leads_to_a_private_address_is_not_called() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let settings = WebhookSettings { allow_http: true, ..WebhookSettings::default() };
    // A name, and forms of 127.0.0.1 that only a resolver understands.
    for host in ["localhost", "0x7f.1", "2130706433", "127.1", "0177.0.0.1"] {
        let webhook = Webhook::new(&format!("http://{host}:{port}/"), SECRET, settings).expect("a name");
        let why = failure(&webhook).await;
        assert!(why.starts_with(&format!("no answer from {host}: ")), "{why}");
        assert!(why.contains("not public") && why.contains("allow_private_addresses"), "{host}: {why}");
    }
    let nobody = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
    assert!(nobody.is_err(), "somebody connected");
    for host in
        ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254", "[fd00:ec2::254]", "0.0.0.0"]
    {
        let error = Webhook::new(&format!("http://{host}:{port}/"), SECRET, settings).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.hint().is_some_and(|hint| hint.contains("allow_private_addresses")), "{error}");
    }
}

#[tokio::test]
async fn a_connection_that_nobody_accepts_is_given_up() {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    // Nobody accepts, and no more than these may wait.
    let listener = socket.listen(1).expect("it listens");
    let address = listener.local_addr().expect("an address");
    let mut waiting = Vec::new();
    while let Ok(connected) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        waiting.push(connected.expect("accepted by the kernel"));
        assert!(waiting.len() < 100, "the kernel accepts any number");
    }
    let settings = WebhookSettings { connect_timeout: Some(Duration::from_millis(50)), ..LAX };
    let webhook = Webhook::new(&format!("http://{address}/"), SECRET, settings).expect("a webhook");
    let why = failure(&webhook).await;
    assert!(why.contains("connect") && why.contains("elapsed"), "{why}");
}

#[tokio::test]
async fn a_refusal_to_connect_is_told_without_the_path() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/geheim?token=geheim", listener.local_addr().expect("an address"));
    drop(listener);
    let webhook = Webhook::new(&url, SECRET, LAX).expect("a webhook");
    let why = failure(&webhook).await;
    assert!(why.starts_with("no answer from 127.0.0.1: ") && why.contains("refused"), "{why}");
    assert!(!why.contains("geheim") && !format!("{webhook:?}").contains("geheim"), "{why}");
    assert!(!format!("{webhook:?}").contains("whsec"));
}
