//! `pgonce status`: backlog, lag, duplicates and rates, and what is in the way.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::Outcome;
use super::connection::{Connection, Installed};
use super::text::{count, parse_duration, print_json, say, seconds, state, table};
use crate::{Error, Shutdown};

/// Columns of the table of consumers.
const CONSUMER_HEADS: [&str; 12] = [
    "consumer",
    "topic",
    "kind",
    "state",
    "lag",
    "oldest",
    "received",
    "duplicates",
    "failures",
    "parked",
    "dead",
    "sessions",
];
/// Columns of the table of rates.
const RATE_HEADS: [&str; 11] = [
    "per minute",
    "name",
    "received",
    "applied",
    "duplicates",
    "retries",
    "dead letters",
    "fenced",
    "over",
    "handler p50",
    "p99",
];
/// How often the report is printed anew.
const WATCH_EVERY: Duration = Duration::from_secs(2);
/// Clears a terminal and goes to its upper left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Show what waits, what lags behind, what was refused as a duplicate, how much comes in a minute, and what is in the way.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce status --watch\n  pgonce status --check --max-lag 60s\n\n\
    Exit code 3 if --check finds something that waits for longer than --max-lag.")]
pub(super) struct Status {
    #[command(flatten)]
    connection: Connection,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Print it again every 2 seconds, until a signal comes. The rates need no worker then.
    #[arg(long, conflicts_with = "check")]
    watch: bool,
    /// For health checks: print only what waits for too long.
    #[arg(long)]
    check: bool,
    /// With --check: how long the oldest message may wait, such as 60s or 5m.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration, requires = "check")]
    max_lag: Duration,
}

/// The state of all topics and consumers.
#[derive(Debug, Serialize)]
struct Report {
    topics: Vec<TopicBacklog>,
    consumers: Vec<ConsumerLag>,
    rates: Vec<Rate>,
    /// The oldest messages that failed and are to be tried again.
    blocked_keys: Vec<Blocked>,
    /// What keeps dead rows alive for longer than a minute.
    horizon_holders: Vec<Holder>,
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
    /// Pending messages on which another session holds, or held, a lock.
    touched: i64,
    oldest_pending_seconds: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct ConsumerLag {
    pub(super) consumer: String,
    topic: Option<String>,
    /// `transactional`, or `external`.
    kind: String,
    paused: bool,
    lag: i64,
    received: i64,
    duplicates: i64,
    /// Attempts that failed, ever.
    failures: i64,
    /// Messages that wait to be tried again, or behind one that does.
    parked: i64,
    /// Dead letters that nobody has settled.
    dead: i64,
    /// Connections that bear its name, where it is one that they can bear.
    sessions: Option<i64>,
    oldest_seconds: f64,
}

/// What happens at a topic (stage `relay`) or consumer: in all, and in a minute.
#[derive(Debug, Serialize)]
struct Rate {
    stage: String,
    name: String,
    /// Over so many seconds; nothing where nobody has taken a sample.
    seconds: Option<f64>,
    received: Option<i64>,
    applied: Option<i64>,
    duplicates: i64,
    retries: Option<i64>,
    dead_letters: Option<i64>,
    fenced: Option<i64>,
    received_per_minute: Option<f64>,
    applied_per_minute: Option<f64>,
    duplicates_per_minute: Option<f64>,
    retries_per_minute: Option<f64>,
    dead_letters_per_minute: Option<f64>,
    fenced_per_minute: Option<f64>,
    /// What half of the calls of the handler took, at the most.
    handler_p50_ms: Option<f64>,
    /// What 99 of 100 took.
    handler_p99_ms: Option<f64>,
    /// What one may take.
    handler_limit_ms: Option<i64>,
    handler_nears_limit: bool,
}

#[derive(Debug, Serialize)]
struct Blocked {
    consumer: String,
    partition: i32,
    key: Option<String>,
    message_id: String,
    attempts: i32,
    /// Messages of its key that wait behind it.
    waiting: i64,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Holder {
    kind: String,
    name: String,
    application_name: Option<String>,
    state: Option<String>,
    transactions: i64,
    seconds: Option<f64>,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let installed = self.connection.installed().await?;
        if self.check {
            return check(&installed, self.max_lag, self.json).await;
        } else if !self.watch {
            self.print(&Report::read(&installed).await?)?;
            return Ok(Outcome::Done);
        }
        let shutdown = Shutdown::on_signals(Duration::ZERO).context("cannot listen for signals")?;
        let mut may_sample = true;
        loop {
            // A reader of a replica, or without the right to do so, sees the rates of those who have it.
            may_sample =
                may_sample && installed.rows(include_str!("../../sql/statements/sample_rates.sql"), &[]).await.is_ok();
            let report = Report::read(&installed).await?;
            if std::io::stdout().is_terminal() && !self.json {
                say!("{CLEAR}")?;
            }
            self.print(&report)?;
            // Both arms only wait.
            tokio::select! {
                () = shutdown.stopping() => return Ok(Outcome::Done),
                () = tokio::time::sleep(WATCH_EVERY) => {}
            }
        }
    }

    fn print(&self, report: &Report) -> anyhow::Result<()> {
        match (self.json, self.watch) {
            // A line a report.
            (true, true) => say!("{}", serde_json::to_string(report)?)?,
            (true, false) => print_json(report)?,
            (false, _) => report.print()?,
        }
        Ok(())
    }
}

/// Prints what waits for longer than it may.
async fn check(installed: &Installed, max_lag: Duration, json: bool) -> anyhow::Result<Outcome> {
    let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&max_lag.as_secs_f64(), Type::FLOAT8)];
    let mut late = Vec::new();
    for row in installed.rows(include_str!("../../sql/statements/late_topics.sql"), &parameters).await? {
        let (topic, pending): (&str, i64) = (row.try_get("topic")?, row.try_get("pending")?);
        let waits = seconds(row.try_get("seconds")?);
        late.push(format!(
            "topic {topic}: {} waiting for the relay, the oldest for {waits}",
            count(pending, "message")
        ));
    }
    for row in installed.rows(include_str!("../../sql/statements/late_consumers.sql"), &parameters).await? {
        let (consumer, lag): (&str, i64) = (row.try_get("consumer")?, row.try_get("lag")?);
        let (parked, waits): (i64, f64) = (row.try_get("parked")?, row.try_get("seconds")?);
        let lag = count(lag, "message");
        let failing = if parked == 0 { String::new() } else { format!(", {} parked", count(parked, "message")) };
        late.push(format!("consumer {consumer}: lags {lag} behind{failing}, the oldest waits for {}", seconds(waits)));
    }
    if json {
        print_json(&serde_json::json!({ "healthy": late.is_empty(), "late": late }))?;
    } else {
        for line in &late {
            say!("{line}")?;
        }
    }
    Ok(if late.is_empty() { Outcome::Done } else { Outcome::Violated })
}

impl Report {
    async fn read(installed: &Installed) -> Result<Self, Error> {
        let topics = installed.rows(include_str!("../../sql/statements/status_topics.sql"), &[]).await?;
        let rates = installed.rows(include_str!("../../sql/statements/status_rates.sql"), &[]).await?;
        let blocked = installed.rows(include_str!("../../sql/statements/status_blocked.sql"), &[]).await?;
        let holders = installed.rows(include_str!("../../sql/statements/status_horizon.sql"), &[]).await?;
        Ok(Self {
            topics: topics.iter().map(TopicBacklog::from_row).collect::<Result<_, _>>()?,
            consumers: consumer_lags(installed).await?,
            rates: rates.iter().map(Rate::from_row).collect::<Result<_, _>>()?,
            blocked_keys: blocked.iter().map(Blocked::from_row).collect::<Result<_, _>>()?,
            horizon_holders: holders.iter().map(Holder::from_row).collect::<Result<_, _>>()?,
        })
    }

    fn print(&self) -> std::io::Result<()> {
        let topics = self.topics.iter().map(|topic| {
            vec![
                topic.topic.clone(),
                state(topic.paused),
                topic.scheduled.to_string(),
                topic.pending.to_string(),
                seconds(topic.oldest_pending_seconds),
                topic.touched.to_string(),
                topic.sent.to_string(),
                topic.duplicates.to_string(),
                topic.set_aside.to_string(),
            ]
        });
        let heads = ["topic", "state", "scheduled", "pending", "oldest", "touched", "sent", "duplicates", "set aside"];
        say!("{}\n", table(&heads, topics))?;
        print_consumers(&self.consumers)?;
        say!("\n{}", table(&RATE_HEADS, self.rates.iter().map(Rate::cells)))?;
        let unattended = self.consumers.iter().filter(|consumer| consumer.sessions == Some(0) && consumer.lag > 0);
        for consumer in unattended {
            say!("\nnobody seems to run consumer {}: no connection bears its name", consumer.consumer)?;
        }
        for rate in &self.rates {
            if let (true, Some(p99_ms), Some(limit_ms)) =
                (rate.handler_nears_limit, rate.handler_p99_ms, rate.handler_limit_ms)
            {
                say!(
                    "\nthe handler of consumer {} takes up to {} in 99 of 100 calls, more than half of the {limit_ms} ms that it may take",
                    rate.name,
                    milliseconds(p99_ms)
                )?;
            }
        }
        for blocked in &self.blocked_keys {
            let key = blocked.key.as_ref().map_or_else(String::new, |key| format!(" of key {key:?}"));
            say!(
                "\nconsumer {} has failed {} times at message {}{key} for {}; {} wait behind it",
                blocked.consumer,
                blocked.attempts,
                blocked.message_id,
                seconds(blocked.seconds),
                blocked.waiting
            )?;
        }
        for holder in &self.horizon_holders {
            let name = holder.application_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("unnamed");
            let age = holder.seconds.map_or_else(String::new, |age| format!(" for {}", seconds(age)));
            say!(
                "\n{} {} ({name}) keeps dead rows alive{age}: {} transactions have begun since",
                holder.kind,
                holder.name,
                holder.transactions
            )?;
        }
        Ok(())
    }
}

/// The lag of all consumers.
pub(super) async fn consumer_lags(installed: &Installed) -> Result<Vec<ConsumerLag>, Error> {
    let rows = installed.rows(include_str!("../../sql/statements/status_consumers.sql"), &[]).await?;
    Ok(rows.iter().map(ConsumerLag::from_row).collect::<Result<_, _>>()?)
}

pub(super) fn print_consumers(consumers: &[ConsumerLag]) -> std::io::Result<()> {
    let rows = consumers.iter().map(|consumer| {
        vec![
            consumer.consumer.clone(),
            consumer.topic.clone().unwrap_or_else(|| "(inbox)".to_owned()),
            consumer.kind.clone(),
            state(consumer.paused),
            consumer.lag.to_string(),
            seconds(consumer.oldest_seconds),
            consumer.received.to_string(),
            consumer.duplicates.to_string(),
            consumer.failures.to_string(),
            consumer.parked.to_string(),
            consumer.dead.to_string(),
            consumer.sessions.map_or_else(|| "?".to_owned(), |sessions| sessions.to_string()),
        ]
    });
    say!("{}", table(&CONSUMER_HEADS, rows))
}

impl TopicBacklog {
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            topic: row.try_get("topic")?,
            paused: row.try_get("paused")?,
            scheduled: row.try_get("scheduled")?,
            pending: row.try_get("pending")?,
            sent: row.try_get("sent")?,
            duplicates: row.try_get("duplicates")?,
            set_aside: row.try_get("set_aside")?,
            touched: row.try_get("touched")?,
            oldest_pending_seconds: row.try_get("oldest_pending_seconds")?,
        })
    }
}

impl ConsumerLag {
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            consumer: row.try_get("consumer")?,
            topic: row.try_get("topic")?,
            kind: row.try_get("kind")?,
            paused: row.try_get("paused")?,
            lag: row.try_get("lag")?,
            received: row.try_get("received")?,
            duplicates: row.try_get("duplicates")?,
            failures: row.try_get("failures")?,
            parked: row.try_get("parked")?,
            dead: row.try_get("dead")?,
            sessions: row.try_get("sessions")?,
            oldest_seconds: row.try_get("oldest_seconds")?,
        })
    }
}

impl Rate {
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            stage: row.try_get("stage")?,
            name: row.try_get("name")?,
            seconds: row.try_get("seconds")?,
            received: row.try_get("received")?,
            applied: row.try_get("applied")?,
            duplicates: row.try_get("duplicates")?,
            retries: row.try_get("retries")?,
            dead_letters: row.try_get("dead_letters")?,
            fenced: row.try_get("fenced")?,
            received_per_minute: row.try_get("received_per_minute")?,
            applied_per_minute: row.try_get("applied_per_minute")?,
            duplicates_per_minute: row.try_get("duplicates_per_minute")?,
            retries_per_minute: row.try_get("retries_per_minute")?,
            dead_letters_per_minute: row.try_get("dead_letters_per_minute")?,
            fenced_per_minute: row.try_get("fenced_per_minute")?,
            handler_p50_ms: row.try_get("handler_p50_ms")?,
            handler_p99_ms: row.try_get("handler_p99_ms")?,
            handler_limit_ms: row.try_get("handler_limit_ms")?,
            handler_nears_limit: row.try_get("handler_nears_limit")?,
        })
    }

    fn cells(&self) -> Vec<String> {
        let or_none = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
        let per_minute = |rate: Option<f64>| or_none(rate.map(|rate| format!("{rate:.1}")));
        vec![
            self.stage.clone(),
            self.name.clone(),
            per_minute(self.received_per_minute),
            per_minute(self.applied_per_minute),
            per_minute(self.duplicates_per_minute),
            per_minute(self.retries_per_minute),
            per_minute(self.dead_letters_per_minute),
            per_minute(self.fenced_per_minute),
            or_none(self.seconds.map(seconds)),
            or_none(self.handler_p50_ms.map(milliseconds)),
            or_none(self.handler_p99_ms.map(milliseconds)),
        ]
    }
}

/// What a call took.
fn milliseconds(took: f64) -> String {
    if took < 10.0 { format!("{took:.2} ms") } else { format!("{took:.0} ms") }
}

impl Blocked {
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            consumer: row.try_get("consumer")?,
            partition: row.try_get("partition")?,
            key: row.try_get("key")?,
            message_id: row.try_get("message_id")?,
            attempts: row.try_get("attempts")?,
            waiting: row.try_get("waiting")?,
            seconds: row.try_get("seconds")?,
        })
    }
}

impl Holder {
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            kind: row.try_get("kind")?,
            name: row.try_get("name")?,
            application_name: row.try_get("application_name")?,
            state: row.try_get("state")?,
            transactions: row.try_get("transactions")?,
            seconds: row.try_get("seconds")?,
        })
    }
}
