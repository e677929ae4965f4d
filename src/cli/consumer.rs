//! `pgonce consumer`: who reads a topic, and how far.

use anyhow::bail;
use clap::{Args, Subcommand, value_parser};
use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::Outcome;
use super::config::{ATTEMPTS, FailurePolicy, StartAt, WAIT_MS};
use super::connection::{Connection, Destroyed, Installed, Named, Reading};
use super::status::{ConsumerLag, consumer_lags, print_consumers};
use super::text::{confirm, print_json, say, table};
use crate::{
    ConsumerKind, ConsumerSettings, Error, FailurePolicy as Policy, Schema, Session, create_consumer, set_state,
};

/// Create, look at, pause and delete consumers.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce consumer create billing --topic orders --start-at latest")]
pub(super) struct Consumer {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a consumer, or make of an existing one what is said.
    #[command(after_help = "Examples:\n  pgonce consumer create billing --topic orders --start-at latest\n  \
        pgonce consumer create shop-hooks --topic orders --kind external\n  \
        pgonce consumer create inbox")]
    Create {
        /// Its name, 1 to 255 bytes.
        consumer: String,
        /// The topic that it reads; without one it is an inbox for messages that come from elsewhere.
        #[arg(long)]
        topic: Option<String>,
        /// Where a new consumer begins.
        #[arg(long, value_enum, default_value = "earliest", requires = "topic")]
        start_at: StartAt,
        /// Where its effects are; it cannot change later [default: transactional].
        #[arg(long, value_enum, requires = "topic")]
        kind: Option<Kind>,
        #[command(flatten)]
        failures: Failures,
        /// Tables that hold its effects, besides `word_counts`: checkpoints save their rows.
        #[arg(long, value_name = "TABLE", value_delimiter = ',')]
        state: Option<Vec<String>>,
        #[command(flatten)]
        connection: Connection,
    },
    /// List all consumers with their lag.
    List(Reading),
    /// Show a consumer with its partitions.
    Show {
        /// Its name.
        consumer: String,
        #[command(flatten)]
        reading: Reading,
    },
    /// Let a consumer receive nothing, from its next batch on.
    Pause(Named),
    /// End a pause.
    Resume(Named),
    /// Delete a consumer with its offsets and its record of what it has processed. Effects in your tables stay.
    Delete(Destroyed),
}

/// Where the effects of a consumer are.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// In this database, in the transaction that receives.
    Transactional,
    /// Elsewhere, under a lease, at least once.
    External,
}

impl From<Kind> for ConsumerKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Transactional => Self::Transactional,
            Kind::External => Self::External,
        }
    }
}

/// What becomes of a message whose attempt failed.
#[derive(Debug, Args)]
struct Failures {
    /// What waits while a message that failed is tried again; it cannot change later [default: `park_key`].
    #[arg(long, value_enum, requires = "topic")]
    failure_policy: Option<FailurePolicy>,
    /// After so many failed attempts a message becomes a dead letter, 1 to 1000 [default: 10].
    #[arg(long, value_name = "N", requires = "topic", value_parser = value_parser!(i32).range(ATTEMPTS))]
    attempts_max: Option<i32>,
    /// Longest wait after the first failed attempt; it doubles with each further one [default: 500].
    #[arg(long, value_name = "MILLISECONDS", requires = "topic", value_parser = value_parser!(i32).range(WAIT_MS))]
    backoff_min_ms: Option<i32>,
    /// Longest wait after any failed attempt, up to 86400000 (a day) [default: 30000].
    #[arg(long, value_name = "MILLISECONDS", requires = "topic", value_parser = value_parser!(i32).range(WAIT_MS))]
    backoff_max_ms: Option<i32>,
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
            Action::Create { consumer, topic, start_at, kind, failures, state, connection } => {
                let mut installed = connection.installed().await?;
                let schema = installed.schema().clone();
                let settings = ConsumerSettings {
                    kind: kind.map(Into::into),
                    start_at: start_at.into(),
                    failure_policy: failures.failure_policy.map(Into::into),
                    attempts_max: failures.attempts_max,
                    backoff_min_ms: failures.backoff_min_ms,
                    backoff_max_ms: failures.backoff_max_ms,
                };
                if create(&mut installed.session, &schema, &consumer, topic.as_deref(), settings).await? {
                    say!("created consumer {consumer}")?;
                } else {
                    say!("consumer {consumer} is there")?;
                }
                if let Some(state) = state
                    && name_state(&mut installed.session, &schema, &consumer, &state).await?
                {
                    say!("its state is in {}", state.join(", "))?;
                }
            }
            Action::List(Reading { json, connection }) => {
                let consumers = consumer_lags(&connection.installed().await?).await?;
                if json { print_json(&consumers)? } else { print_consumers(&consumers)? }
            }
            Action::Show { consumer, reading: Reading { json, connection } } => {
                let shown = show(&connection.installed().await?, &consumer).await?;
                if json { print_json(&shown)? } else { shown.print()? }
            }
            Action::Pause(consumer) => {
                consumer.apply(include_str!("../../sql/statements/pause_consumer.sql")).await?;
                say!("consumer {} is paused", consumer.name)?;
            }
            Action::Resume(consumer) => {
                consumer.apply(include_str!("../../sql/statements/resume_consumer.sql")).await?;
                say!("consumer {} goes on", consumer.name)?;
            }
            Action::Delete(Destroyed { named: consumer, yes }) => {
                let question =
                    format!("Really delete consumer {} with its record of what it has processed?", consumer.name);
                confirm(&question, yes)?;
                consumer.apply(include_str!("../../sql/statements/drop_consumer.sql")).await?;
                say!("deleted consumer {}", consumer.name)?;
            }
        }
        Ok(Outcome::Done)
    }
}

/// Creates a consumer, or sees to it that it is as said, and answers whether it was not there. Where it is as said it only
/// reads, so that the role of a worker suffices.
pub(super) async fn create(
    session: &mut Session,
    schema: &Schema,
    consumer: &str,
    topic: Option<&str>,
    settings: ConsumerSettings,
) -> Result<bool, Error> {
    let statement = schema.sql(include_str!("../../sql/statements/consumer_is_there.sql"));
    let transaction = session.begin().await?;
    let found = transaction
        .query_typed_opt(
            &statement,
            &[
                (&consumer, Type::TEXT),
                (&topic, Type::TEXT),
                (&settings.failure_policy.map(Policy::name), Type::TEXT),
                (&settings.attempts_max, Type::INT4),
                (&settings.backoff_min_ms, Type::INT4),
                (&settings.backoff_max_ms, Type::INT4),
                (&settings.kind.map(ConsumerKind::name), Type::TEXT),
            ],
        )
        .await?;
    let is_as_said = found.as_ref().map(|row| row.try_get("is_as_said")).transpose()?.flatten().unwrap_or(false);
    if !is_as_said {
        create_consumer(&transaction, schema, consumer, topic, settings).await?;
    }
    transaction.commit().await?;
    Ok(found.is_none())
}

/// Says which tables hold its effects, in a transaction of its own, and answers whether they were others.
pub(super) async fn name_state(
    session: &mut Session,
    schema: &Schema,
    consumer: &str,
    tables: &[String],
) -> Result<bool, Error> {
    let transaction = session.begin().await?;
    let were_others = set_state(&transaction, schema, consumer, tables).await?;
    transaction.commit().await?;
    Ok(were_others)
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
