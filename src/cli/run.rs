//! `pgonce run`, `relay` and `consume`: the daemon, whole or one stage of it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

use super::config::{Config, GRACEFUL_STOP_SECONDS_MAX};
use super::connection::Connection;
use super::text::say;
use super::{Outcome, Usage, consumer, topic};
use crate::embedded::{Options, PrivateServer};
use crate::{Database, Schema, Shutdown, TopicSettings, Worker, check_version, migrate};

/// How long batches may take to finish after the first signal, where nothing else is said.
const GRACEFUL_STOP_SECONDS: u64 = 30;
/// What a file lacks that names nothing to run.
const SECTIONS: &[&str] = &["no [[topic]]", "no [[consumer]]"];

/// Run relays and consumers until a signal comes.
///
/// The stages come from a file, from the command line, or from both. Topics and consumers that do not exist are created,
/// and settings that differ are changed, if the role may do that. SIGTERM or Ctrl-C finishes the batches at hand; a second signal, or 30 seconds, drops them,
/// and they come again at the next start.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    pgonce run --embedded --word-count counter=words\n  \
    pgonce run --database-url postgresql://app@db/app --config config/pgonce.toml")]
pub(super) struct Run {
    #[command(flatten)]
    daemon: Daemon,
    /// Start a private PostgreSQL for this run; it is removed at the end. The database's URL is ignored.
    #[arg(long)]
    embedded: bool,
    /// Relay this topic; may be given several times.
    #[arg(long, value_name = "TOPIC")]
    relay: Vec<String>,
    /// Count the words of a topic under the name of a consumer; may be given several times.
    #[arg(long, value_name = "CONSUMER=TOPIC", value_parser = parse_pair)]
    word_count: Vec<(String, String)>,
}

/// Relay topics until a signal comes, for hosts that do nothing else.
///
/// A topic that does not exist is created, if the role may do that, and the log says so.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce relay orders payments\n  pgonce relay --config config/pgonce.toml")]
pub(super) struct RelayOnly {
    #[command(flatten)]
    daemon: Daemon,
    /// Topics; those of the file where none are given.
    #[arg(value_name = "TOPIC")]
    topics: Vec<String>,
}

/// Run consumers until a signal comes, for hosts that do nothing else.
///
/// A consumer that does not exist is created, if the role may do that, and the log says so. Its topic has to exist.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce consume --config config/pgonce.toml ledger")]
pub(super) struct Consume {
    #[command(flatten)]
    daemon: Daemon,
    /// Consumers of the file; all of them where none are given.
    #[arg(value_name = "CONSUMER", requires = "config")]
    consumers: Vec<String>,
    /// Count the words of a topic under the name of a consumer; may be given several times.
    #[arg(long, value_name = "CONSUMER=TOPIC", value_parser = parse_pair)]
    word_count: Vec<(String, String)>,
}

/// What all three have in common.
#[derive(Debug, Args)]
struct Daemon {
    #[command(flatten)]
    connection: Connection,
    /// Read topics, consumers and settings from this file.
    #[arg(long, value_name = "FILE", env = "PGONCE_CONFIG")]
    config: Option<PathBuf>,
    /// How long batches may take to finish after the first signal [default: 30].
    #[arg(long, value_name = "SECONDS", env = "PGONCE_GRACEFUL_STOP_SECONDS",
          value_parser = clap::value_parser!(u64).range(..=GRACEFUL_STOP_SECONDS_MAX))]
    graceful_stop_seconds: Option<u64>,
}

impl Run {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let mut config = self.daemon.read()?;
        let shutdown = self.daemon.shutdown(&config)?;
        for topic in self.relay.iter().chain(self.word_count.iter().map(|(_, topic)| topic)) {
            config.add_topic(topic);
        }
        for (name, topic) in &self.word_count {
            config.add_word_count(name, topic);
        }
        if !self.embedded {
            return self.daemon.run(&config, &shutdown, SECTIONS).await;
        }
        let schema = self.daemon.schema(&config)?;
        // The start may be dropped: the server's guardian removes what is there when this process has ended.
        let server = tokio::select! {
            server = start_server(schema.clone()) => server?,
            () = shutdown.stopping() => bail!("interrupted"),
        };
        let mut daemon = self.daemon;
        daemon.connection =
            Connection { database_url: Some(server.url("pgonce")), database_url_file: None, schema: Some(schema) };
        let outcome = daemon.run(&config, &shutdown, SECTIONS).await;
        tokio::task::spawn_blocking(move || server.stop()).await??;
        outcome
    }
}

impl RelayOnly {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let mut config = self.daemon.read()?;
        let shutdown = self.daemon.shutdown(&config)?;
        config.consumers.clear();
        if !self.topics.is_empty() {
            config.topics.retain(|topic| self.topics.contains(&topic.name));
            self.topics.iter().for_each(|topic| config.add_topic(topic));
        }
        self.daemon.run(&config, &shutdown, &SECTIONS[..1]).await
    }
}

impl Consume {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let mut config = self.daemon.read()?;
        let shutdown = self.daemon.shutdown(&config)?;
        config.topics.clear();
        let known = |name: &String| config.consumers.iter().any(|consumer| consumer.name == *name);
        if let Some(unknown) = self.consumers.iter().find(|name| !known(name)) {
            return Err(Usage(format!("the configuration has no consumer {unknown:?}")).into());
        }
        if !self.consumers.is_empty() {
            config.consumers.retain(|consumer| self.consumers.contains(&consumer.name));
        }
        for (name, topic) in &self.word_count {
            config.add_word_count(name, topic);
        }
        self.daemon.run(&config, &shutdown, &SECTIONS[1..]).await
    }
}

impl Daemon {
    fn read(&self) -> anyhow::Result<Config> {
        self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)
    }

    /// Where it is said on the command line or in the environment, else in the file.
    fn connection(&self, config: &Config) -> anyhow::Result<Connection> {
        let mut connection = self.connection.clone();
        if connection.database_url.is_none() && connection.database_url_file.is_none() {
            connection.database_url_file.clone_from(&config.database_url_file);
        }
        connection.schema = Some(self.schema(config)?);
        Ok(connection)
    }

    fn schema(&self, config: &Config) -> anyhow::Result<Schema> {
        match (&self.connection.schema, &config.schema) {
            (Some(schema), _) => Ok(schema.clone()),
            (None, Some(name)) => Ok(Schema::new(name)?),
            (None, None) => Ok(Schema::default()),
        }
    }

    /// Listens for signals, and gives batches so long to finish after the first.
    fn shutdown(&self, config: &Config) -> anyhow::Result<Shutdown> {
        let seconds = self.graceful_stop_seconds.or(config.graceful_stop_seconds).unwrap_or(GRACEFUL_STOP_SECONDS);
        Shutdown::on_signals(Duration::from_secs(seconds)).context("cannot listen for signals")
    }

    /// Runs what the file and the command line name. The sections are those of the file that count.
    async fn run(&self, config: &Config, shutdown: &Shutdown, sections: &[&str]) -> anyhow::Result<Outcome> {
        if config.topics.is_empty() && config.consumers.is_empty() {
            return Err(Usage(match &self.config {
                Some(file) => format!("nothing to run: {} has {}", file.display(), sections.join(" and ")),
                None => "nothing to run: give --config FILE, or name topics or consumers (see --help)".to_owned(),
            })
            .into());
        }
        config.check().map_err(|error| Usage(format!("{error:#}")))?;
        serve(self.connection(config)?.open(1)?, config, shutdown).await
    }
}

async fn start_server(schema: Schema) -> anyhow::Result<PrivateServer> {
    let server = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default())).await??;
    let database = Database::connect(&server.url("pgonce"), schema, 1)?;
    let mut session = database.session().await?;
    migrate(&mut session, database.schema()).await?;
    say!("private PostgreSQL: {}", server.psql_command("pgonce"))?;
    Ok(server)
}

async fn serve(database: Database, config: &Config, shutdown: &Shutdown) -> anyhow::Result<Outcome> {
    let mut worker = Worker::new(database.clone());
    for topic in &config.topics {
        worker = worker.relay(topic.stage());
    }
    for consumer in &config.consumers {
        let stage = consumer.stage().with_context(|| format!("consumer {:?}", consumer.name));
        worker = worker.consumer_with(stage.map_err(|error| Usage(format!("{error:#}")))?, consumer.loops());
    }
    // Dropped half way it leaves nothing: each of its statements is a transaction.
    tokio::select! {
        prepared = prepare(&database, config, worker.connections()) => prepared?,
        () = shutdown.stopping() => return Ok(Outcome::Done),
    }
    tracing::info!(
        worker.relays = config.topics.len(),
        worker.consumers = config.consumers.len(),
        worker.connections = worker.connections(),
        "running"
    );
    let report = worker.run(shutdown).await?;
    tracing::info!(worker.moved = report.moved, worker.applied = report.applied, "stopped");
    Ok(Outcome::Done)
}

/// Checks the schema and the connections, and creates what the configuration declares, or changes it where it says something
/// else. Where all of that is there it only reads, so that the role of a worker suffices.
async fn prepare(database: &Database, config: &Config, connections: usize) -> anyhow::Result<()> {
    let mut session = database.session().await?;
    let schema = database.schema();
    check_version(&*session, schema).await?;
    let row = session.query_typed_one(include_str!("../../sql/statements/connections_free.sql"), &[]).await?;
    let (most, free): (i64, i64) = (row.try_get("most")?, row.try_get("free")?);
    let needed = i64::try_from(connections).unwrap_or(i64::MAX);
    if needed > free {
        // No refusal: a PgBouncer in between may have more connections than the server.
        tracing::warn!(
            connections.needed = needed,
            connections.free = free,
            connections.most = most,
            "the server has fewer free connections than the stages need, and unless a PgBouncer pools them some will wait: \
             raise max_connections, or run fewer loops"
        );
    }
    for topic in &config.topics {
        let settings = TopicSettings { partitions: topic.partitions, payload_bytes_max: topic.payload_bytes_max };
        if topic::create(&mut session, schema, &topic.name, settings).await? {
            tracing::info!("created topic {}", topic.name);
        }
    }
    for consumer in &config.consumers {
        let (topic, settings) = (Some(&*consumer.topic), consumer.settings());
        if consumer::create(&mut session, schema, &consumer.name, topic, settings).await? {
            tracing::info!("created consumer {}", consumer.name);
        }
        if let Some(state) = &consumer.state {
            let what = || format!("state of consumer {}", consumer.name);
            if consumer::name_state(&mut session, schema, &consumer.name, state).await.with_context(what)? {
                tracing::info!("consumer {} has the state {}", consumer.name, state.join(", "));
            }
        }
    }
    // Not given back: the stages have pools of their own, and nobody would use the connection again.
    drop(session);
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
