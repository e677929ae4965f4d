//! `pgonce message`: what became of one message.

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::Outcome;
use super::connection::{Connection, Installed};
use super::text::{print_json, say, table};
use crate::{Error, MessageId, Producer};

/// Look at a message, or take one back.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce message show order-17-placed\n  \
    pgonce message cancel order-17-placed --topic orders")]
pub(super) struct Message {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show where a message is, and what each consumer has made of it.
    ///
    /// Reads the tables of pgonce, so it is for their owner, or for whom the owner lets read them.
    #[command(after_help = "Example:\n  pgonce message show order-17-placed --topic orders --payload")]
    Show {
        /// Its id.
        id: String,
        /// Only in this topic.
        #[arg(long)]
        topic: Option<String>,
        /// Show the payload as well.
        #[arg(long)]
        payload: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Take a message back that has not been relayed. Its id is free again then.
    Cancel {
        /// Its id.
        id: String,
        /// Its topic.
        #[arg(long)]
        topic: String,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Serialize)]
struct Shown {
    topic: String,
    message_id: String,
    state: String,
    partition: i32,
    offset: Option<i64>,
    key: Option<String>,
    bytes: i32,
    enqueued_at: String,
    deliver_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
    consumers: Vec<Made>,
}

/// What a consumer has made of a message: `processed`; `parked`, to be tried again or behind one that is; `dead`, or `discarded`;
/// `waiting`; `passed` (before the consumer began, or purged); `not sent`.
#[derive(Debug, Serialize)]
struct Made {
    consumer: String,
    state: String,
    processed_at: Option<String>,
    /// Messages of the partition that come before it.
    ahead: Option<i64>,
}

impl Message {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        match self.action {
            Action::Show { id, topic, payload, json, connection } => {
                let installed = connection.installed().await?;
                let found = find(&installed, &id, topic.as_deref(), payload).await?;
                if found.is_empty() {
                    bail!("no message has the id {id:?}: it was never committed, or was cancelled or purged");
                }
                if json {
                    print_json(&found)?;
                } else {
                    found.iter().try_for_each(Shown::print)?;
                }
            }
            Action::Cancel { id, topic, connection } => {
                let installed = connection.installed().await?;
                let producer = Producer::in_schema(&topic, installed.schema());
                if !producer.cancel(&*installed.session, &MessageId::from(id.clone())).await? {
                    bail!("message {id:?} is not to be cancelled: topic {topic:?} has relayed it, or does not know it");
                }
                say!("cancelled {id}")?;
            }
        }
        Ok(Outcome::Done)
    }
}

async fn find(installed: &Installed, id: &str, topic: Option<&str>, payload: bool) -> anyhow::Result<Vec<Shown>> {
    let statement = include_str!("../../sql/statements/message_show.sql");
    let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
        [(&id, Type::TEXT), (&topic, Type::TEXT), (&payload, Type::BOOL)];
    let mut found = Vec::new();
    for row in installed.rows(statement, &parameters).await? {
        let topic: String = row.try_get("topic")?;
        let payload: Option<String> = row.try_get("payload")?;
        found.push(Shown {
            message_id: id.to_owned(),
            state: row.try_get("state")?,
            partition: row.try_get("partition")?,
            offset: row.try_get("offset")?,
            key: row.try_get("key")?,
            bytes: row.try_get("bytes")?,
            enqueued_at: row.try_get("enqueued_at")?,
            deliver_at: row.try_get("deliver_at")?,
            payload: payload.map(RawValue::from_string).transpose()?,
            consumers: consumers(installed, id, &topic).await?,
            topic,
        });
    }
    Ok(found)
}

async fn consumers(installed: &Installed, id: &str, topic: &str) -> Result<Vec<Made>, Error> {
    let statement = include_str!("../../sql/statements/message_consumers.sql");
    let read = |row: &Row| {
        Ok(Made {
            consumer: row.try_get("consumer")?,
            state: row.try_get("state")?,
            processed_at: row.try_get("processed_at")?,
            ahead: row.try_get::<_, Option<i64>>("ahead")?.filter(|ahead| *ahead >= 0),
        })
    };
    installed.rows(statement, &[(&id, Type::TEXT), (&topic, Type::TEXT)]).await?.iter().map(read).collect()
}

impl Shown {
    fn print(&self) -> std::io::Result<()> {
        let mut facts = vec![
            ("topic", self.topic.clone()),
            ("message", self.message_id.clone()),
            ("state", self.state.clone()),
            ("partition", self.partition.to_string()),
        ];
        facts.extend(self.offset.map(|offset| ("offset", offset.to_string())));
        facts.extend(self.key.clone().map(|key| ("key", key)));
        facts.push(("bytes", self.bytes.to_string()));
        facts.push(("enqueued", self.enqueued_at.clone()));
        facts.extend(self.deliver_at.clone().map(|at| ("due", at)));
        facts.extend(self.payload.as_ref().map(|payload| ("payload", payload.get().to_owned())));
        for (name, value) in facts {
            say!("{name:<10} {value}")?;
        }
        if self.consumers.is_empty() {
            return say!("\nno consumer reads this topic\n");
        }
        let rows = self.consumers.iter().map(|made| {
            let ahead = made.ahead.map_or_else(String::new, |ahead| ahead.to_string());
            vec![made.consumer.clone(), made.state.clone(), made.processed_at.clone().unwrap_or_default(), ahead]
        });
        say!("\n{}\n", table(&["consumer", "state", "processed", "ahead"], rows))
    }
}
