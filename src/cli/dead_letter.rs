//! `pgonce dead-letter`: what consumers have given up, and what is to become of it.

use std::time::{Duration, SystemTime};

use anyhow::bail;
use clap::{Args, Subcommand, ValueEnum, value_parser};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{Connection, Installed, Reading};
use super::text::{confirm, parse_duration, print_json, say, table};
use super::{Outcome, Usage};
use crate::Error;

/// Dead letters that are settled in a transaction: it holds the locks of their partitions.
const SETTLED_AT_A_TIME: usize = 1_000;
/// Most dead letters that are listed.
const LISTED_MAX: i64 = 10_000;
/// How much of an error a table shows.
const ERROR_CHARACTERS_SHOWN: usize = 60;

/// Look at dead letters, give them back to their consumers, or discard them.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce dead-letter list --consumer billing\n  \
    pgonce dead-letter replay --consumer billing --error timeout")]
pub(super) struct DeadLetter {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List dead letters, the oldest first.
    #[command(after_help = "Example:\n  pgonce dead-letter list --consumer billing --newer-than 1h")]
    List {
        #[command(flatten)]
        filters: Filters,
        /// Those that nobody has settled, or those that were.
        #[arg(long, value_enum, default_value = "dead")]
        state: State,
        /// How many, up to 10000.
        #[arg(long, value_name = "N", default_value = "100", value_parser = value_parser!(i64).range(1..=LISTED_MAX))]
        limit: i64,
        #[command(flatten)]
        reading: Reading,
    },
    /// Show a dead letter with its payload, its headers and its whole error.
    #[command(after_help = "Example:\n  pgonce dead-letter show 17")]
    Show {
        /// Its number, as the list shows it.
        id: i64,
        #[command(flatten)]
        reading: Reading,
    },
    /// Give dead letters back to their consumers, in the order of their keys and with a fresh count of attempts.
    #[command(after_help = "Examples:\n  pgonce dead-letter replay 17 18\n  \
        pgonce dead-letter replay --consumer billing --error timeout")]
    Replay(Settlement),
    /// Settle dead letters for good: they are never applied. Their rows stay, and say who did it, and when.
    #[command(after_help = "Examples:\n  pgonce dead-letter discard 17\n  \
        pgonce dead-letter discard --consumer billing --older-than 720h")]
    Discard(Settlement),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum State {
    Dead,
    Replayed,
    Discarded,
    All,
}

/// All of them have to hold.
#[derive(Clone, Debug, Args)]
#[group(id = "filters", multiple = true)]
struct Filters {
    /// Only of this consumer.
    #[arg(long)]
    consumer: Option<String>,
    /// Only of this topic.
    #[arg(long)]
    topic: Option<String>,
    /// Only of this key.
    #[arg(long)]
    key: Option<String>,
    /// Only those whose error contains this text.
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Only those whose last attempt was longer ago, such as 5m or 24h.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    older_than: Option<Duration>,
    /// Only those whose last attempt was not so long ago.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    newer_than: Option<Duration>,
}

/// Which dead letters to settle: those with these ids, or those that pass the filters.
#[derive(Debug, Args)]
struct Settlement {
    /// Their numbers, as the list shows them.
    #[arg(value_name = "ID", conflicts_with_all = ["filters", "all"])]
    ids: Vec<i64>,
    #[command(flatten)]
    filters: Filters,
    /// All dead letters of all consumers.
    #[arg(long, conflicts_with = "filters")]
    all: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Serialize)]
struct Listed {
    dead_letter_id: i64,
    consumer: String,
    topic: String,
    partition: i32,
    offset: i64,
    message_id: String,
    key: Option<String>,
    attempts: i32,
    error: String,
    failed_at: String,
    state: String,
    settled_at: Option<String>,
    settled_by: Option<String>,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    letter: Listed,
    payload: Box<RawValue>,
    headers: Option<Box<RawValue>>,
}

impl DeadLetter {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        match self.action {
            Action::List { filters, state, limit, reading: Reading { json, connection } } => {
                let rows = filters.page(&connection.installed().await?, state, None, 0, limit).await?;
                let letters = rows.iter().map(Listed::from_row).collect::<Result<Vec<_>, _>>()?;
                if json {
                    print_json(&letters)?;
                } else {
                    print_list(&letters)?;
                    if usize::try_from(limit).is_ok_and(|limit| limit == letters.len()) {
                        say!("\nthere may be more: see --limit")?;
                    }
                }
            }
            Action::Show { id, reading: Reading { json, connection } } => {
                let shown = show(&connection.installed().await?, id).await?;
                if json { print_json(&shown)? } else { shown.print()? }
            }
            Action::Replay(settlement) => {
                let statement = include_str!("../../sql/statements/replay_dead_letters.sql");
                settlement.settle("replay", "replayed", statement).await?;
            }
            Action::Discard(settlement) => {
                let statement = include_str!("../../sql/statements/discard_dead_letters.sql");
                settlement.settle("discard", "discarded", statement).await?;
            }
        }
        Ok(Outcome::Done)
    }
}

impl Filters {
    fn is_empty(&self) -> bool {
        self.consumer.is_none()
            && self.topic.is_none()
            && self.key.is_none()
            && self.error.is_none()
            && self.older_than.is_none()
            && self.newer_than.is_none()
    }

    /// Those that pass, from one id on, and failed up to a moment (up to now, if none is given).
    async fn page(
        &self,
        installed: &Installed,
        state: State,
        looked_at: Option<SystemTime>,
        after: i64,
        limit: i64,
    ) -> Result<Vec<Row>, Error> {
        let state = match state {
            State::Dead => "dead",
            State::Replayed => "replayed",
            State::Discarded => "discarded",
            State::All => "all",
        };
        let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 10] = [
            (&after, Type::INT8),
            (&state, Type::TEXT),
            (&self.consumer, Type::TEXT),
            (&self.topic, Type::TEXT),
            (&self.key, Type::TEXT),
            (&self.error, Type::TEXT),
            (&self.older_than.map(|span| span.as_secs_f64()), Type::FLOAT8),
            (&self.newer_than.map(|span| span.as_secs_f64()), Type::FLOAT8),
            (&looked_at, Type::TIMESTAMPTZ),
            (&limit, Type::INT8),
        ];
        installed.rows(include_str!("../../sql/statements/dead_letters.sql"), &parameters).await
    }

    /// How many pass that nobody has settled, and the moment at which that was so.
    async fn count(&self, installed: &Installed) -> anyhow::Result<(i64, SystemTime)> {
        let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 6] = [
            (&self.consumer, Type::TEXT),
            (&self.topic, Type::TEXT),
            (&self.key, Type::TEXT),
            (&self.error, Type::TEXT),
            (&self.older_than.map(|span| span.as_secs_f64()), Type::FLOAT8),
            (&self.newer_than.map(|span| span.as_secs_f64()), Type::FLOAT8),
        ];
        let rows = installed.rows(include_str!("../../sql/statements/dead_letter_count.sql"), &parameters).await?;
        let Some(row) = rows.first() else { bail!("the server does not know the time") };
        Ok((row.try_get("count")?, row.try_get("looked_at")?))
    }
}

impl Settlement {
    /// Settles all of them, so many in a transaction that any number of them works; whoever is interrupted goes on with the same
    /// command.
    async fn settle(mut self, verb: &str, done: &str, statement: &str) -> anyhow::Result<()> {
        if self.ids.is_empty() && self.filters.is_empty() && !self.all {
            let question =
                format!("which dead letters? Give ids, or filters such as --consumer, or --all to {verb} every one");
            return Err(Usage(question).into());
        }
        let installed = self.connection.installed().await?;
        let (mut settled, mut too_late) = (0, 0);
        if self.ids.is_empty() {
            let (count, looked_at) = self.filters.count(&installed).await?;
            if count > 0 {
                confirm(&format!("Really {verb} {count} dead letters?"), self.yes)?;
            }
            let page_size = i64::try_from(SETTLED_AT_A_TIME)?;
            let mut after = 0;
            loop {
                let rows = self.filters.page(&installed, State::Dead, Some(looked_at), after, page_size).await?;
                let ids = rows.iter().map(|row| row.try_get("dead_letter_id")).collect::<Result<Vec<i64>, _>>()?;
                let Some(last) = ids.last() else { break };
                after = *last;
                let part = settle(&installed, statement, &ids).await?;
                settled += part;
                too_late += ids.len() - part;
            }
        } else {
            self.ids.sort_unstable();
            self.ids.dedup();
            let missing = include_str!("../../sql/statements/dead_letters_missing.sql");
            if let Some(row) = installed.rows(missing, &[(&self.ids, Type::INT8_ARRAY)]).await?.first() {
                let id: i64 = row.try_get("dead_letter_id")?;
                return Err(unknown(id));
            }
            confirm(&format!("Really {verb} {} dead letters?", self.ids.len()), self.yes)?;
            for ids in self.ids.chunks(SETTLED_AT_A_TIME) {
                let part = settle(&installed, statement, ids).await?;
                settled += part;
                too_late += ids.len() - part;
            }
        }
        say!("{done} {settled} dead letters; {too_late} had been settled by somebody else")?;
        Ok(())
    }
}

/// Settles some in a transaction; answers how many of them nobody had settled before.
async fn settle(installed: &Installed, statement: &str, ids: &[i64]) -> anyhow::Result<usize> {
    let rows = installed.rows(statement, &[(&ids, Type::INT8_ARRAY)]).await?;
    let settled: i64 = rows.iter().map(|row| row.try_get::<_, i64>("settled")).sum::<Result<_, _>>()?;
    Ok(usize::try_from(settled)?)
}

fn unknown(id: i64) -> anyhow::Error {
    anyhow::anyhow!("dead letter {id} does not exist; pgonce dead-letter list --state all shows what there is")
}

async fn show(installed: &Installed, id: i64) -> anyhow::Result<Shown> {
    let rows = installed.rows(include_str!("../../sql/statements/dead_letter_show.sql"), &[(&id, Type::INT8)]).await?;
    let Some(row) = rows.first() else { return Err(unknown(id)) };
    let headers: Option<String> = row.try_get("headers")?;
    Ok(Shown {
        letter: Listed::from_row(row)?,
        payload: RawValue::from_string(row.try_get("payload")?)?,
        headers: headers.map(RawValue::from_string).transpose()?,
    })
}

fn print_list(letters: &[Listed]) -> std::io::Result<()> {
    let rows = letters.iter().map(|letter| {
        vec![
            letter.dead_letter_id.to_string(),
            letter.consumer.clone(),
            letter.message_id.clone(),
            letter.key.clone().unwrap_or_default(),
            letter.state.clone(),
            letter.attempts.to_string(),
            letter.failed_at.clone(),
            letter.error.lines().next().unwrap_or_default().chars().take(ERROR_CHARACTERS_SHOWN).collect(),
        ]
    });
    say!("{}", table(&["id", "consumer", "message", "key", "state", "attempts", "failed", "error"], rows))
}

impl Listed {
    fn from_row(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            dead_letter_id: row.try_get("dead_letter_id")?,
            consumer: row.try_get("consumer")?,
            topic: row.try_get("topic")?,
            partition: row.try_get("partition")?,
            offset: row.try_get("offset")?,
            message_id: row.try_get("message_id")?,
            key: row.try_get("key")?,
            attempts: row.try_get("attempts")?,
            error: row.try_get("error")?,
            failed_at: row.try_get("failed_at")?,
            state: row.try_get("state")?,
            settled_at: row.try_get("settled_at")?,
            settled_by: row.try_get("settled_by")?,
        })
    }
}

impl Shown {
    fn print(&self) -> std::io::Result<()> {
        let letter = &self.letter;
        let mut facts = vec![
            ("id", letter.dead_letter_id.to_string()),
            ("consumer", letter.consumer.clone()),
            ("topic", letter.topic.clone()),
            ("partition", letter.partition.to_string()),
            ("offset", letter.offset.to_string()),
            ("message", letter.message_id.clone()),
        ];
        facts.extend(letter.key.clone().map(|key| ("key", key)));
        facts.push(("attempts", letter.attempts.to_string()));
        facts.push(("failed", letter.failed_at.clone()));
        facts.push(("state", letter.state.clone()));
        facts.extend(letter.settled_at.clone().map(|at| ("settled", at)));
        facts.extend(letter.settled_by.clone().map(|by| ("by", by)));
        facts.push(("error", letter.error.clone()));
        facts.push(("payload", self.payload.get().to_owned()));
        facts.extend(self.headers.as_ref().map(|headers| ("headers", headers.get().to_owned())));
        facts.iter().try_for_each(|(name, value)| say!("{name:<10} {value}"))
    }
}
