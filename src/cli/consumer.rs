//! `pgonce consumer`: who reads a topic, and how far.

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::Outcome;
use super::connection::{Connection, Installed};
use super::status::{ConsumerLag, consumer_lags, print_consumers};
use super::text::{confirm, print_json, say, table};
use crate::{Error, StartAt, create_consumer};

/// Create, look at, pause and delete consumers.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce consumer create billing --topic orders --start-at latest")]
pub(super) struct Consumer {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a consumer, or check that it is as said.
    Create {
        /// Its name, 1 to 255 bytes.
        consumer: String,
        /// The topic that it reads; without one it is an inbox for messages that come from elsewhere.
        #[arg(long)]
        topic: Option<String>,
        /// Where a new consumer begins.
        #[arg(long, value_enum, default_value = "earliest", requires = "topic")]
        start_at: Start,
        #[command(flatten)]
        connection: Connection,
    },
    /// List all consumers with their lag.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Show a consumer with its partitions.
    Show {
        /// Its name.
        consumer: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        connection: Connection,
    },
    /// Let a consumer receive nothing, from its next batch on.
    Pause(Named),
    /// End a pause.
    Resume(Named),
    /// Delete a consumer with its offsets and its record of what it has processed. Effects in your tables stay.
    Delete {
        /// Its name.
        consumer: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Args)]
struct Named {
    /// Its name.
    consumer: String,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Start {
    /// With the earliest message that is kept.
    Earliest,
    /// With the next message that is relayed.
    Latest,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    lag: ConsumerLag,
    partitions: Vec<Place>,
}

#[derive(Debug, Serialize)]
struct Place {
    partition: i32,
    next_offset: i64,
    lag: i64,
    received: i64,
    duplicates: i64,
}

impl Consumer {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        match self.action {
            Action::Create { consumer, topic, start_at, connection } => {
                let installed = connection.installed().await?;
                let start_at = match start_at {
                    Start::Earliest => StartAt::Earliest,
                    Start::Latest => StartAt::Latest,
                };
                create_consumer(&*installed.session, installed.schema(), &consumer, topic.as_deref(), start_at).await?;
                say!("consumer {consumer} is there")?;
            }
            Action::List { json, connection } => {
                let consumers = consumer_lags(&connection.installed().await?).await?;
                if json { print_json(&consumers)? } else { print_consumers(&consumers)? }
            }
            Action::Show { consumer, json, connection } => {
                let shown = show(&connection.installed().await?, &consumer).await?;
                if json { print_json(&shown)? } else { shown.print()? }
            }
            Action::Pause(Named { consumer, connection }) => {
                apply(include_str!("../../sql/statements/pause_consumer.sql"), &consumer, &connection).await?;
                say!("consumer {consumer} is paused")?;
            }
            Action::Resume(Named { consumer, connection }) => {
                apply(include_str!("../../sql/statements/resume_consumer.sql"), &consumer, &connection).await?;
                say!("consumer {consumer} goes on")?;
            }
            Action::Delete { consumer, yes, connection } => {
                confirm(&format!("Really delete consumer {consumer} with its record of what it has processed?"), yes)?;
                apply(include_str!("../../sql/statements/drop_consumer.sql"), &consumer, &connection).await?;
                say!("deleted consumer {consumer}")?;
            }
        }
        Ok(Outcome::Done)
    }
}

async fn apply(statement: &str, consumer: &str, connection: &Connection) -> anyhow::Result<()> {
    connection.installed().await?.rows(statement, &[(&consumer, Type::TEXT)]).await?;
    Ok(())
}

async fn show(installed: &Installed, consumer: &str) -> anyhow::Result<Shown> {
    let Some(lag) = consumer_lags(installed).await?.into_iter().find(|lag| lag.consumer == consumer) else {
        bail!("consumer {consumer:?} does not exist; pgonce consumer list shows what there is");
    };
    let statement = include_str!("../../sql/statements/consumer_partitions.sql");
    let read = |row: &Row| {
        Ok(Place {
            partition: row.try_get("partition")?,
            next_offset: row.try_get("next_offset")?,
            lag: row.try_get("lag")?,
            received: row.try_get("received")?,
            duplicates: row.try_get("duplicates")?,
        })
    };
    let rows = installed.rows(statement, &[(&consumer, Type::TEXT)]).await?;
    Ok(Shown { lag, partitions: rows.iter().map(read).collect::<Result<_, Error>>()? })
}

impl Shown {
    fn print(&self) -> std::io::Result<()> {
        print_consumers(std::slice::from_ref(&self.lag))?;
        let rows = self.partitions.iter().map(|place| {
            [i64::from(place.partition), place.next_offset, place.lag, place.received, place.duplicates]
                .map(|number| number.to_string())
                .into()
        });
        say!("\n{}", table(&["partition", "next offset", "lag", "received", "duplicates"], rows))
    }
}
