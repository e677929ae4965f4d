//! `pgonce run`: the daemon.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::config::{Config, ConsumerEntry, Kind, Topic};
use super::connection::SchemaArg;
use super::signals::Signals;
use super::{Outcome, Usage};
use crate::embedded::{Options, PrivateServer};
use crate::{
    Database, Relay, Shutdown, StartAt, TopicSettings, Worker, check_version, create_consumer, create_topic, migrate,
};

/// Loops of a consumer, where nothing else is said.
const LOOPS: usize = 2;

/// Run relays and consumers until a signal comes.
///
/// The stages come from the command line or from a file. Topics and consumers that do not exist are created. SIGTERM or
/// Ctrl-C finishes the batches at hand; a second signal, or 30 seconds, drops them, and they come again at the next start.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    pgonce run --embedded --word-count counter=words\n  \
    pgonce run --database-url postgresql://app@db/app --config config/pgonce.toml")]
pub(super) struct Run {
    /// The database, such as `postgresql://user@host:5432/app`.
    #[arg(
        long,
        value_name = "URL",
        env = "DATABASE_URL",
        hide_env_values = true,
        required_unless_present = "embedded"
    )]
    database_url: Option<String>,
    /// Start a private PostgreSQL for this run; it is removed at the end. `DATABASE_URL` is ignored.
    #[arg(long)]
    embedded: bool,
    #[command(flatten)]
    schema: SchemaArg,
    /// Read topics and consumers from this file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["relay", "word_count"])]
    config: Option<PathBuf>,
    /// Relay this topic; may be given several times.
    #[arg(long, value_name = "TOPIC")]
    relay: Vec<String>,
    /// Count the words of a topic under the name of a consumer; may be given several times.
    #[arg(long, value_name = "CONSUMER=TOPIC", value_parser = parse_pair)]
    word_count: Vec<(String, String)>,
}

impl Run {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let signals = Signals::listen().context("cannot listen for signals")?;
        let config = self.stages()?;
        let server = if self.embedded { Some(start_server(&self.schema).await?) } else { None };
        let url = match &server {
            Some(server) => server.url("pgonce"),
            None => self.database_url.clone().unwrap_or_default(),
        };
        let shutdown = Shutdown::new();
        let driver = tokio::spawn(signals.drive(shutdown.clone()));
        let outcome = serve(&url, &self.schema, &config, &shutdown).await;
        driver.abort();
        if let Some(server) = server {
            tokio::task::spawn_blocking(move || server.stop()).await??;
        }
        outcome
    }

    /// The stages that the file or the command line names.
    fn stages(&self) -> anyhow::Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        let consumed = self.word_count.iter().map(|(_, topic)| topic);
        for topic in self.relay.iter().chain(consumed) {
            if config.topics.iter().all(|known| known.name != *topic) {
                config.topics.push(Topic { name: topic.clone(), partitions: None, payload_bytes_max: None });
            }
        }
        for (name, topic) in &self.word_count {
            config.consumers.push(ConsumerEntry {
                name: name.clone(),
                topic: topic.clone(),
                kind: Kind::WordCount,
                statements: None,
                batch_messages: None,
                loops: None,
            });
        }
        if config.topics.is_empty() && config.consumers.is_empty() {
            return Err(Usage(
                "nothing to run: give --config FILE, --relay TOPIC or --word-count CONSUMER=TOPIC".to_owned(),
            )
            .into());
        }
        Ok(config)
    }
}

async fn start_server(schema: &SchemaArg) -> anyhow::Result<PrivateServer> {
    let server = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default())).await??;
    let database = Database::connect(&server.url("pgonce"), schema.schema.clone(), 1)?;
    let mut session = database.session().await?;
    migrate(&mut session, database.schema()).await?;
    println!("private PostgreSQL: {}", server.psql_command("pgonce"));
    Ok(server)
}

async fn serve(url: &str, schema: &SchemaArg, config: &Config, shutdown: &Shutdown) -> anyhow::Result<Outcome> {
    let loops: usize = config.consumers.iter().map(|consumer| consumer.loops.unwrap_or(LOOPS)).sum();
    let database = Database::connect(url, schema.schema.clone(), config.topics.len() + loops + 1)?;
    // Dropped half way it leaves nothing: each of its statements is a transaction.
    tokio::select! {
        prepared = prepare(&database, config) => prepared?,
        () = shutdown.stopping() => return Ok(Outcome::Done),
    }
    let mut worker = Worker::new(database);
    for topic in &config.topics {
        worker = worker.relay(Relay::topic(&topic.name));
    }
    for consumer in &config.consumers {
        worker = worker.consumer_with(consumer.stage(), consumer.loops.unwrap_or(LOOPS));
    }
    tracing::info!(worker.relays = config.topics.len(), worker.consumers = config.consumers.len(), "running");
    let report = worker.run(shutdown).await?;
    tracing::info!(worker.moved = report.moved, worker.applied = report.applied, "stopped");
    Ok(Outcome::Done)
}

/// Checks the schema, and creates what the configuration declares.
async fn prepare(database: &Database, config: &Config) -> Result<(), crate::Error> {
    let session = database.session().await?;
    let schema = database.schema();
    check_version(&*session, schema).await?;
    for topic in &config.topics {
        let settings = TopicSettings { partitions: topic.partitions, payload_bytes_max: topic.payload_bytes_max };
        create_topic(&*session, schema, &topic.name, settings).await?;
    }
    for consumer in &config.consumers {
        create_consumer(&*session, schema, &consumer.name, Some(&consumer.topic), StartAt::Earliest).await?;
    }
    session.give_back();
    Ok(())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((consumer, topic)) if !consumer.is_empty() && !topic.is_empty() => {
            Ok((consumer.to_owned(), topic.to_owned()))
        }
        _ => Err("expected CONSUMER=TOPIC, such as counter=words".to_owned()),
    }
}
