//! Units of work that tests disturb: each is made again after it, and then the books have to balance.

use pgonce::{
    BatchHandler, Consumed, Consumer, Database, Epoch, Error, ExternalHandler, Handler, HandlerError, Message,
    Producer, Received, Relay, Schema, Sent, Shutdown, Worker, process_once,
};
use serde::Deserialize;
use serde_json::json;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Transaction};

use crate::books::{assert_applied, assert_balanced, assert_nothing_is_held};
use crate::fixture::TestDatabase;
use crate::lease;
use crate::probe::{eventually, number, texts};
use crate::worker::{APPLIED, CONSUMER, INSERT, TABLE, TOPIC, prepared};

/// Messages of a round.
pub(crate) const ROUND: usize = 5;
/// Applies a round, where the message in the middle of key b fails at its first attempt.
const INSERT_OR_FAIL: &str = r#"
    insert into applied (key, nth)
    select key, (payload ->> 'nth')::integer / case when key = 'b' and (payload ->> 'nth')::integer % 3 = 1 and attempt = 1 then 0 else 1 end
    from received order by "offset""#;

/// Keys whose messages an external handler has not seen in order at first, or not at all.
const SEEN_OUT_OF_ORDER: &str = "
    select distinct key from (
      select key, nth, row_number() over (partition by key order by min(id)) - 1 as due from applied group by key, nth) a
    where nth <> due";

/// What is disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A transaction that sends a round of messages, and takes one back.
    Producer,
    /// A step of a relay that moves a round.
    Relay,
    /// A step of a consumer that applies a round; where it may fail, the message in the middle of key b does so at its first
    /// attempt.
    Each {
        may_fail: bool,
    },
    Batch,
    Sql {
        may_fail: bool,
    },
    WordCount,
    External,
    /// A transaction that handles a message from elsewhere.
    Inbox,
    /// A worker that relays and applies a round.
    Worker,
}

impl Work {
    pub(crate) async fn world(self) -> World {
        let world = if self == Self::External { World::outside().await } else { World::new().await };
        world.client.batch_execute("select pgonce.create_consumer('inbox')").await.expect("created");
        world
    }

    /// What there is to do.
    pub(crate) async fn prepare(self, world: &mut World) {
        world.rounds += 1;
        if self != Self::Producer && self != Self::Inbox {
            Producer::new(TOPIC).send_all(&world.client, &world.round()).await.expect("sent");
        }
        if !matches!(self, Self::Producer | Self::Inbox | Self::Relay | Self::Worker) {
            Relay::topic(TOPIC).step(&world.direct).await.expect("relayed");
        }
    }

    /// Does it, on one connection but for a worker.
    pub(crate) async fn run(self, world: &World, database: &Database) -> Result<(), Error> {
        match self {
            Self::Producer => {
                let mut session = database.session().await?;
                let sent = send(&mut session, &world.round()).await?;
                session.give_back();
                assert!(sent.iter().all(|sent| !sent.was_duplicate));
            }
            Self::Inbox => {
                let mut session = database.session().await?;
                let is_first = handle_once(&mut session, &world.rounds.to_string()).await?;
                session.give_back();
                assert!(is_first);
            }
            Self::Relay => drop(Relay::topic(TOPIC).step(database).await?),
            Self::Worker => {
                let shutdown = Shutdown::new();
                let worker = Worker::new(database.clone()).relay(TOPIC).consumer_with(self.consumer(world), 1);
                let stop = async {
                    eventually("all is applied", async || world.is_settled().await.then_some(())).await;
                    shutdown.stop();
                };
                tokio::join!(worker.run(&shutdown), stop).0?;
            }
            _ => drop(self.consumer(world).step(database).await?),
        }
        Ok(())
    }

    /// Makes it again, if it was not done, and looks whether it was done once.
    pub(crate) async fn judge(self, world: &mut World) {
        match self {
            Self::Producer => {
                // It waits for the first one to end, and so knows what became of it.
                let round = world.round();
                let again = send(&mut world.client, &round).await.expect("sent again");
                let known = again.iter().filter(|sent| sent.was_duplicate).count();
                assert!(known == 0 || known == ROUND, "{known} of {ROUND} were there");
            }
            Self::Inbox => {
                let id = world.rounds.to_string();
                handle_once(&mut world.client, &id).await.expect("handled again");
                assert_eq!(number(&world.client, APPLIED).await, of(world.rounds));
                assert_eq!(number(&world.client, "select count(*) from pgonce.processed_ids").await, of(world.rounds));
                return assert_nothing_is_held(&world.client).await;
            }
            Self::External => {
                let other = world.database.database(1);
                let step = async |_: &Database| {
                    let expire = "update pgonce.leases set leased_until = '-infinity' where owner is not null";
                    world.client.batch_execute(expire).await.expect("the time of whoever was disturbed is over");
                    self.consumer(world).step(&other).await
                };
                world.settle(step).await;
                let farewell = "update pgonce.leases set owner = null, leased_until = null, careful_until = 0";
                world.client.batch_execute(farewell).await.expect("free again");
                let seen = "select count(*) from (select distinct key, nth from applied) a";
                assert_eq!(number(&world.client, seen).await, of(world.sent()));
                assert_eq!(texts(&world.client, SEEN_OUT_OF_ORDER).await, [""; 0]);
                assert_balanced(&world.client, world.sent()).await;
                return world.assert_failures(1).await;
            }
            _ => {}
        }
        let consumer = self.consumer(world);
        world.settle(async |direct| consumer.step(direct).await).await;
        if self == Self::WordCount {
            let counted = "select sum(count)::bigint from pgonce.word_counts where consumer = 'c'";
            assert_eq!(number(&world.client, counted).await, of(world.sent()));
            assert_balanced(&world.client, world.sent()).await;
        } else {
            assert_applied(&world.client, world.sent()).await;
        }
        let may_fail = matches!(self, Self::Each { may_fail: true } | Self::Batch | Self::Sql { may_fail: true });
        world.assert_failures(may_fail.into()).await;
    }

    /// A consumer, as a process has it that has just begun.
    fn consumer(self, world: &World) -> Consumer {
        match self {
            Self::Each { may_fail } => Consumer::each(CONSUMER, Noting { may_fail }),
            Self::Batch => Consumer::batch(CONSUMER, Noting { may_fail: true }),
            Self::WordCount => Consumer::word_count(CONSUMER),
            Self::External => Consumer::external(CONSUMER, Outside(world.direct.clone())),
            Self::Sql { may_fail: true } => Consumer::sql(CONSUMER, INSERT_OR_FAIL),
            _ => Consumer::sql(CONSUMER, INSERT),
        }
    }
}

/// A topic, its consumer, and how many rounds of messages have been sent.
pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) client: Client,
    /// A way to the server that nobody cuts.
    pub(crate) direct: Database,
    pub(crate) rounds: usize,
}

impl World {
    pub(crate) async fn new() -> Self {
        let (database, client) = prepared(1).await;
        Self::of(database, client).await
    }

    /// The same with an external consumer.
    async fn outside() -> Self {
        let (database, client) = lease::world(1, "park_key", "").await;
        client.batch_execute(TABLE).await.expect("created");
        Self::of(database, client).await
    }

    async fn of(database: TestDatabase, client: Client) -> Self {
        let soon = "select pgonce.create_consumer('c', 't', backoff_min_ms => 1, backoff_max_ms => 1)";
        client.batch_execute(soon).await.expect("changed");
        let direct = database.database(1);
        Self { database, client, direct, rounds: 0 }
    }

    pub(crate) fn sent(&self) -> usize {
        self.rounds * ROUND
    }

    /// The messages of the last round: of two keys, in turn.
    fn round(&self) -> Vec<Message> {
        let (a, b) = (2 * self.rounds - 2, 3 * self.rounds - 3);
        let message = |(key, nth): (&str, usize)| {
            let payload = json!({ "nth": nth, "word": key });
            Message::json(&payload).expect("JSON").key(key).id(format!("{key} {nth}"))
        };
        [("b", b), ("a", a), ("b", b + 1), ("a", a + 1), ("b", b + 2)].map(message).to_vec()
    }

    /// Relays and consumes what is left.
    pub(crate) async fn settle(&self, consume: impl AsyncFn(&Database) -> Result<Consumed, Error>) {
        eventually("nothing is left", async || {
            Relay::topic(TOPIC).step(&self.direct).await.expect("a step of the relay");
            while consume(&self.direct).await.expect("a step of the consumer") != Consumed::default() {}
            self.is_settled().await.then_some(())
        })
        .await;
    }

    pub(crate) async fn is_settled(&self) -> bool {
        let received = "select received from pgonce.consumer_lag where consumer = 'c'";
        number(&self.client, received).await == of(self.sent())
    }

    async fn assert_failures(&self, of_a_round: usize) {
        let failures = "select failures from pgonce.consumer_lag where consumer = 'c'";
        assert_eq!(number(&self.client, failures).await, of(self.rounds * of_a_round));
    }
}

fn of(count: usize) -> i64 {
    i64::try_from(count).expect("a number")
}

#[derive(Deserialize)]
struct Numbered {
    nth: i32,
}

/// Notes what it is told; where it is to, it fails at the message in the middle of key b at its first attempt.
#[derive(Clone, Copy)]
struct Noting {
    may_fail: bool,
}

impl Noting {
    async fn note(self, tx: &Transaction<'_>, message: &Received<Numbered>) -> Result<(), HandlerError> {
        self.check(message)?;
        let note = "insert into applied (key, nth) values ($1, $2)";
        tx.query_typed(note, &[(&message.key, Type::TEXT), (&message.payload.nth, Type::INT4)]).await?;
        Ok(())
    }

    fn check(self, message: &Received<Numbered>) -> Result<(), HandlerError> {
        let is_in_the_middle = message.key.as_deref() == Some("b") && message.payload.nth % 3 == 1;
        if self.may_fail && is_in_the_middle && message.attempt == 1 {
            return Err("not at the first attempt".into());
        }
        Ok(())
    }
}

impl Handler for Noting {
    type Payload = Numbered;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Numbered>) -> Result<(), HandlerError> {
        self.note(tx, &message).await
    }
}

impl BatchHandler for Noting {
    type Payload = Numbered;

    async fn handle(&self, tx: &Transaction<'_>, messages: Vec<Received<Numbered>>) -> Result<(), HandlerError> {
        for message in &messages {
            self.note(tx, message).await?;
        }
        Ok(())
    }
}

/// Notes by a connection of its own, as a service outside would.
struct Outside(Database);

impl ExternalHandler for Outside {
    type Payload = Numbered;

    async fn handle(&self, message: Received<Numbered>, _: Epoch) -> Result<(), HandlerError> {
        Noting { may_fail: true }.check(&message)?;
        let session = self.0.session().await?;
        let note = "insert into applied (key, nth) values ($1, $2)";
        session.query_typed(note, &[(&message.key, Type::TEXT), (&message.payload.nth, Type::INT4)]).await?;
        session.give_back();
        Ok(())
    }
}

/// Sends messages in a transaction, and one that it takes back.
async fn send(client: &mut Client, messages: &[Message]) -> Result<Vec<Sent>, Error> {
    let producer = Producer::new(TOPIC);
    let transaction = client.transaction().await?;
    let taken_back = Message::json(&json!({})).expect("JSON").id("taken back");
    producer.send(&transaction, &taken_back).await?;
    let sent = producer.send_all(&transaction, messages).await?;
    assert!(producer.cancel(&transaction, taken_back.message_id()).await?);
    transaction.commit().await?;
    Ok(sent)
}

/// Handles a message from elsewhere, in a transaction; answers whether it was the first time.
async fn handle_once(client: &mut Client, id: &str) -> Result<bool, Error> {
    let transaction = client.transaction().await?;
    let is_first = process_once(&transaction, &Schema::default(), "inbox", id).await?;
    if is_first {
        transaction.query_typed("insert into applied (nth) values (0)", &[]).await?;
    }
    transaction.commit().await?;
    Ok(is_first)
}
