//! `pgonce status`: backlog, lag and duplicates.

use clap::Args;
use serde::Serialize;

use super::Outcome;
use super::connection::Connection;
use super::text::table;
use crate::{Database, Error, check_version};

/// Show what waits, what lags behind, and what was refused as a duplicate.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce status --database-url postgresql://app@db/app --json")]
pub(super) struct Status {
    #[command(flatten)]
    connection: Connection,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The state of all topics and consumers.
#[derive(Debug, Serialize)]
struct Report {
    topics: Vec<TopicBacklog>,
    consumers: Vec<ConsumerLag>,
}

#[derive(Debug, Serialize)]
struct TopicBacklog {
    topic: String,
    paused: bool,
    scheduled: i64,
    pending: i64,
    sent: i64,
    duplicates: i64,
    set_aside: i64,
    oldest_pending_seconds: f64,
}

#[derive(Debug, Serialize)]
struct ConsumerLag {
    consumer: String,
    topic: Option<String>,
    paused: bool,
    lag: i64,
    received: i64,
    duplicates: i64,
    oldest_seconds: f64,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let database = self.connection.open(1)?;
        let report = Report::read(&database).await?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            report.print();
        }
        Ok(Outcome::Done)
    }
}

impl Report {
    async fn read(database: &Database) -> Result<Self, Error> {
        let session = database.session().await?;
        let schema = database.schema();
        check_version(&*session, schema).await?;
        let topics = session
            .query_typed(&schema.sql(include_str!("../../sql/statements/status_topics.sql")), &[])
            .await?
            .iter()
            .map(TopicBacklog::from_row)
            .collect::<Result<_, _>>()?;
        let consumers = session
            .query_typed(&schema.sql(include_str!("../../sql/statements/status_consumers.sql")), &[])
            .await?
            .iter()
            .map(ConsumerLag::from_row)
            .collect::<Result<_, _>>()?;
        session.give_back();
        Ok(Self { topics, consumers })
    }

    fn print(&self) {
        let topics = self.topics.iter().map(|topic| {
            vec![
                topic.topic.clone(),
                state(topic.paused),
                topic.scheduled.to_string(),
                topic.pending.to_string(),
                seconds(topic.oldest_pending_seconds),
                topic.sent.to_string(),
                topic.duplicates.to_string(),
                topic.set_aside.to_string(),
            ]
        });
        let heads = ["topic", "state", "scheduled", "pending", "oldest", "sent", "duplicates", "set aside"];
        println!("{}", table(&heads, topics));
        let consumers = self.consumers.iter().map(|consumer| {
            vec![
                consumer.consumer.clone(),
                consumer.topic.clone().unwrap_or_else(|| "(inbox)".to_owned()),
                state(consumer.paused),
                consumer.lag.to_string(),
                seconds(consumer.oldest_seconds),
                consumer.received.to_string(),
                consumer.duplicates.to_string(),
            ]
        });
        let heads = ["consumer", "topic", "state", "lag", "oldest", "received", "duplicates"];
        println!("\n{}", table(&heads, consumers));
    }
}

impl TopicBacklog {
    fn from_row(row: &tokio_postgres::Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            topic: row.try_get("topic")?,
            paused: row.try_get("paused")?,
            scheduled: row.try_get("scheduled")?,
            pending: row.try_get("pending")?,
            sent: row.try_get("sent")?,
            duplicates: row.try_get("duplicates")?,
            set_aside: row.try_get("set_aside")?,
            oldest_pending_seconds: row.try_get("oldest_pending_seconds")?,
        })
    }
}

impl ConsumerLag {
    fn from_row(row: &tokio_postgres::Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            consumer: row.try_get("consumer")?,
            topic: row.try_get("topic")?,
            paused: row.try_get("paused")?,
            lag: row.try_get("lag")?,
            received: row.try_get("received")?,
            duplicates: row.try_get("duplicates")?,
            oldest_seconds: row.try_get("oldest_seconds")?,
        })
    }
}

fn state(paused: bool) -> String {
    if paused { "paused" } else { "running" }.to_owned()
}

fn seconds(age: f64) -> String {
    format!("{age:.1} s")
}
