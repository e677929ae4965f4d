//! The processes of a play: producer and consumer, with pgonce or with a plain table.
//!
//! They are programs as anybody would write them, and know nothing of the fault that will happen to them. What they do they
//! say on standard output, a [`Line`] at a time. They end when their standard input does: the play holds its other end, so
//! none of them outlives it, however it ends.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use super::LOOK_EVERY;
use crate::cli::Outcome;
use crate::cli::connection::Connection;
use crate::cli::text::say;
use crate::{Consumer, Database, Delivery, ErrorKind, Handler, HandlerError, Message, Producer, Received};

/// The name by which this program is a process of a play. It is no subcommand, since nobody else is to call it.
pub(super) const PROGRAM: &str = "pgonce-scenario-actor";
/// How often a producer sends before it gives up.
const SENDS_MAX: usize = 5;
/// Longest life of a process of a play.
const LIFE_MAX: Duration = Duration::from_secs(120);
/// Two transactions at a time, in the delivery modes that have two.
const CONNECTIONS: usize = 2;
/// The order that all plays are about.
const ORDER: &str = "17";

/// How messages are sent and consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum Side {
    /// A row is sent, and deleted when it is done.
    Naive,
    /// By pgonce, what is recorded commits before the effect.
    AtMostOnce,
    /// By pgonce, the effect commits before what is recorded.
    AtLeastOnce,
    /// By pgonce.
    ExactlyOnce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Part {
    Producer,
    Consumer,
}

/// A process of a play.
#[derive(Debug, Parser)]
#[command(name = PROGRAM)]
pub(super) struct Actor {
    #[arg(value_enum)]
    part: Part,
    #[arg(value_enum)]
    side: Side,
    #[command(flatten)]
    connection: Connection,
}

/// What a process of a play says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// The producer begins to send.
    Sending,
    /// The producer lost its connection, and does not know what became of the message.
    Unanswered,
    /// The producer's transaction has committed.
    Answered { was_duplicate: bool },
    /// The consumer has got the message.
    Processing,
    /// The consumer has decremented the stock, which may not have committed.
    Decremented { stock: i32 },
    /// What the consumer has made of the message is recorded.
    Acknowledged,
}

/// What a message says.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    order: String,
    item: String,
}

impl Side {
    /// How pgonce delivers, where it does.
    pub(super) fn delivery(self) -> Option<Delivery> {
        match self {
            Self::Naive => None,
            Self::AtMostOnce => Some(Delivery::AtMostOnce),
            Self::AtLeastOnce => Some(Delivery::AtLeastOnce),
            Self::ExactlyOnce => Some(Delivery::ExactlyOnce),
        }
    }

    /// Its name, which is also that of the item of its play, and of topic and consumer where there are such.
    pub(super) fn name(self) -> &'static str {
        self.delivery().map_or("naive", Delivery::name)
    }

    /// What the message of its play is about, as the statements have it: an item and an order.
    pub(super) fn subject(self) -> [(&'static str, Type); 2] {
        [(self.name(), Type::TEXT), (ORDER, Type::TEXT)]
    }
}

impl Part {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Producer => "producer",
            Self::Consumer => "consumer",
        }
    }
}

impl Actor {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let database = self.connection.open(CONNECTIONS)?;
        let work = async {
            match (self.part, self.side.delivery()) {
                (Part::Producer, _) => produce(&database, self.side).await,
                (Part::Consumer, None) => consume_plainly(&database).await,
                (Part::Consumer, Some(delivery)) => consume(&database, self.side, delivery).await,
            }
        };
        // Whatever is dropped here is rolled back.
        tokio::select! {
            outcome = tokio::time::timeout(LIFE_MAX, work) => {
                outcome.with_context(|| format!("the {} is not done within {} s", self.part.name(), LIFE_MAX.as_secs()))??;
            }
            () = play_is_over() => {}
        }
        Ok(Outcome::Done)
    }
}

/// Waits for the end of standard input.
async fn play_is_over() {
    let read = || std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    // An input that cannot be read has nobody at its other end either.
    let _ = tokio::task::spawn_blocking(read).await;
}

fn tell(line: Line) -> anyhow::Result<()> {
    say!("{}", serde_json::to_string(&line)?)?;
    Ok(())
}

async fn produce(database: &Database, side: Side) -> anyhow::Result<()> {
    tell(Line::Sending)?;
    for _ in 0..SENDS_MAX {
        match send(database, side).await {
            Ok(was_duplicate) => return tell(Line::Answered { was_duplicate }),
            Err(error) if error.kind() == ErrorKind::Unavailable => tell(Line::Unanswered)?,
            Err(error) => return Err(error.into()),
        }
    }
    bail!("no answer after {SENDS_MAX} attempts to send");
}

/// Sends the message of a play, and answers whether it was known already. A plain table never knows.
pub(super) async fn send(database: &Database, side: Side) -> Result<bool, crate::Error> {
    let order = Order { order: ORDER.to_owned(), item: side.name().to_owned() };
    let mut session = database.session().await?;
    let transaction = session.begin().await?;
    let was_duplicate = if side.delivery().is_some() {
        // The id says what happened, and is the same whoever sends it again.
        let placed = Message::json(&order)?.key(ORDER).id(format!("order-{ORDER}-placed"));
        Producer::in_schema(side.name(), database.schema()).send(&transaction, &placed).await?.was_duplicate
    } else {
        let statement = database.schema().sql(include_str!("../../../sql/scenario/plain_send.sql"));
        let payload = Message::json(&order)?.payload;
        transaction.query_typed(&statement, &[(&payload, Type::TEXT)]).await?;
        false
    };
    transaction.commit().await?;
    session.give_back();
    Ok(was_duplicate)
}

/// Effect and acknowledgement are a transaction each.
async fn consume_plainly(database: &Database) -> anyhow::Result<()> {
    let schema = database.schema();
    let take = schema.sql(include_str!("../../../sql/scenario/plain_take.sql"));
    let acknowledge = schema.sql(include_str!("../../../sql/scenario/plain_acknowledge.sql"));
    let warehouse = Warehouse::new(database);
    let mut session = database.session().await?;
    let message = loop {
        if let Some(row) = session.query_typed_opt(&take, &[]).await? {
            break row;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    tell(Line::Processing)?;
    let order: Order = serde_json::from_str(message.try_get("payload")?)?;
    let transaction = session.begin().await?;
    let stock = warehouse.decrement(&transaction, &order).await?;
    transaction.commit().await?;
    tell(Line::Decremented { stock })?;
    let transaction = session.begin().await?;
    transaction.query_typed(&acknowledge, &[(&message.try_get::<_, i64>("id")?, Type::INT8)]).await?;
    transaction.commit().await?;
    session.give_back();
    tell(Line::Acknowledged)
}

async fn consume(database: &Database, side: Side, delivery: Delivery) -> anyhow::Result<()> {
    let consumer = Consumer::each(side.name(), Warehouse::new(database)).delivery(delivery);
    loop {
        let step = consumer.step(database).await?;
        if step.failed > 0 {
            bail!("the message failed: see the dead letters");
        }
        if step.applied > 0 {
            return tell(Line::Acknowledged);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Takes what was ordered out of the inventory.
struct Warehouse {
    decrement: String,
}

impl Warehouse {
    fn new(database: &Database) -> Self {
        Self { decrement: database.schema().sql(include_str!("../../../sql/scenario/decrement.sql")) }
    }

    /// Answers what is left.
    async fn decrement(&self, transaction: &Transaction<'_>, order: &Order) -> Result<i32, tokio_postgres::Error> {
        transaction.query_typed_one(&self.decrement, &[(&order.item, Type::TEXT)]).await?.try_get("stock")
    }
}

impl Handler for Warehouse {
    type Payload = Order;

    async fn handle(&self, transaction: &Transaction<'_>, message: Received<Order>) -> Result<(), HandlerError> {
        tell(Line::Processing)?;
        let stock = self.decrement(transaction, &message.payload).await?;
        tell(Line::Decremented { stock })?;
        Ok(())
    }
}
