//! `pgonce topic`: what messages go through.

use anyhow::bail;
use clap::{Args, Subcommand};
use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::Outcome;
use super::connection::{Connection, Destroyed, Installed, Named, Reading};
use super::text::{confirm, print_json, say, state, table};
use crate::{Error, Schema, Session, TopicSettings, create_topic};

/// Create, look at, pause, purge and delete topics.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce topic create orders --partitions 16")]
pub(super) struct Topic {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a topic, or check that it is as said.
    #[command(after_help = "Example:\n  pgonce topic create orders --partitions 16 --payload-bytes-max 100000")]
    Create {
        /// Its name, 1 to 255 bytes.
        topic: String,
        /// Number of partitions, 1 to 1024; it cannot change later [default: 8].
        #[arg(long, value_name = "N")]
        partitions: Option<i32>,
        /// Largest payload in bytes, up to 67108864 (64 MiB) [default: 1048576].
        #[arg(long, value_name = "BYTES")]
        payload_bytes_max: Option<i32>,
        #[command(flatten)]
        connection: Connection,
    },
    /// List all topics.
    List(Reading),
    /// Show a topic with its partitions.
    Show {
        /// Its name.
        topic: String,
        #[command(flatten)]
        reading: Reading,
    },
    /// Leave a topic alone in the relay; messages can be enqueued all the same.
    Pause(Named),
    /// End a pause.
    Resume(Named),
    /// Delete all messages of a topic, sent and unsent, and take its consumers past them.
    Purge(Destroyed),
    /// Delete a topic with all its messages. Its consumers have to be deleted first.
    Delete(Destroyed),
}

#[derive(Debug, Serialize)]
struct Settings {
    topic: String,
    partitions: i32,
    payload_bytes_max: i32,
    paused: bool,
    consumers: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    settings: Settings,
    heads: Vec<Head>,
}

#[derive(Debug, Serialize)]
struct Head {
    partition: i32,
    earliest_offset: i64,
    next_offset: i64,
    moved: i64,
}

impl Topic {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        match self.action {
            Action::Create { topic, partitions, payload_bytes_max, connection } => {
                let mut installed = connection.installed().await?;
                let schema = installed.schema().clone();
                let settings = TopicSettings { partitions, payload_bytes_max };
                if create(&mut installed.session, &schema, &topic, settings).await? {
                    say!("created topic {topic}")?;
                } else {
                    say!("topic {topic} is there")?;
                }
            }
            Action::List(Reading { json, connection }) => {
                let topics = settings(&connection.installed().await?, None).await?;
                if json { print_json(&topics)? } else { print_list(&topics)? }
            }
            Action::Show { topic, reading: Reading { json, connection } } => {
                let shown = show(&connection.installed().await?, &topic).await?;
                if json { print_json(&shown)? } else { shown.print()? }
            }
            Action::Pause(topic) => {
                topic.apply(include_str!("../../sql/statements/pause_topic.sql")).await?;
                say!("topic {} is paused", topic.name)?;
            }
            Action::Resume(topic) => {
                topic.apply(include_str!("../../sql/statements/resume_topic.sql")).await?;
                say!("topic {} goes on", topic.name)?;
            }
            Action::Purge(Destroyed { named: topic, yes }) => {
                confirm(&format!("Really delete all messages of topic {}?", topic.name), yes)?;
                for row in topic.apply(include_str!("../../sql/statements/purge_topic.sql")).await? {
                    let (unsent, queued): (i64, i64) = (row.try_get("unsent")?, row.try_get("queued")?);
                    say!("deleted {unsent} unsent and {queued} queued messages of topic {}", topic.name)?;
                }
            }
            Action::Delete(Destroyed { named: topic, yes }) => {
                confirm(&format!("Really delete topic {} with all its messages?", topic.name), yes)?;
                topic.apply(include_str!("../../sql/statements/drop_topic.sql")).await?;
                say!("deleted topic {}", topic.name)?;
            }
        }
        Ok(Outcome::Done)
    }
}

/// Creates a topic, or sees to it that it is as said, and answers whether it was not there. Where it is as said it only reads,
/// so that the role of a worker suffices.
pub(super) async fn create(
    session: &mut Session,
    schema: &Schema,
    topic: &str,
    settings: TopicSettings,
) -> Result<bool, Error> {
    let statement = schema.sql(include_str!("../../sql/statements/topic_is_there.sql"));
    let TopicSettings { partitions, payload_bytes_max } = settings;
    let parameters: [(&(dyn ToSql + Sync), Type); 3] =
        [(&topic, Type::TEXT), (&partitions, Type::INT4), (&payload_bytes_max, Type::INT4)];
    let transaction = session.begin().await?;
    let found = transaction.query_typed_opt(&statement, &parameters).await?;
    let is_as_said = found.as_ref().map(|row| row.try_get("is_as_said")).transpose()?.unwrap_or(false);
    if !is_as_said {
        create_topic(&transaction, schema, topic, settings).await?;
    }
    transaction.commit().await?;
    Ok(found.is_none())
}

async fn settings(installed: &Installed, topic: Option<&str>) -> Result<Vec<Settings>, Error> {
    let statement = include_str!("../../sql/statements/topic_settings.sql");
    let read = |row: &Row| {
        Ok(Settings {
            topic: row.try_get("topic")?,
            partitions: row.try_get("partitions")?,
            payload_bytes_max: row.try_get("payload_bytes_max")?,
            paused: row.try_get("paused")?,
            consumers: row.try_get("consumers")?,
        })
    };
    installed.rows(statement, &[(&topic, Type::TEXT)]).await?.iter().map(read).collect()
}

async fn show(installed: &Installed, topic: &str) -> anyhow::Result<Shown> {
    let Some(settings) = settings(installed, Some(topic)).await?.pop() else {
        bail!("topic {topic:?} does not exist; pgonce topic list shows what there is");
    };
    let statement = include_str!("../../sql/statements/topic_partitions.sql");
    let read = |row: &Row| {
        Ok(Head {
            partition: row.try_get("partition")?,
            earliest_offset: row.try_get("earliest_offset")?,
            next_offset: row.try_get("next_offset")?,
            moved: row.try_get("moved")?,
        })
    };
    let heads =
        installed.rows(statement, &[(&topic, Type::TEXT)]).await?.iter().map(read).collect::<Result<_, Error>>()?;
    Ok(Shown { settings, heads })
}

fn print_list(topics: &[Settings]) -> std::io::Result<()> {
    let rows = topics.iter().map(|topic| {
        vec![
            topic.topic.clone(),
            state(topic.paused),
            topic.partitions.to_string(),
            topic.payload_bytes_max.to_string(),
            topic.consumers.join(", "),
        ]
    });
    say!("{}", table(&["topic", "state", "partitions", "payload bytes", "consumers"], rows))
}

impl Shown {
    fn print(&self) -> std::io::Result<()> {
        print_list(std::slice::from_ref(&self.settings))?;
        let rows = self.heads.iter().map(|head| {
            [i64::from(head.partition), head.earliest_offset, head.next_offset, head.moved]
                .map(|n| n.to_string())
                .into()
        });
        say!("\n{}", table(&["partition", "earliest offset", "next offset", "relayed"], rows))
    }
}
