//! `pgonce demo`: the whole way of many messages, on real text, while workers are killed.
//!
//! Words are produced in business transactions, some of which are rolled back and some sent twice; worker processes
//! relay and count them and are killed with SIGKILL meanwhile; at the end the counts in the database are held against a
//! count in memory that knows nothing of pgonce.

mod production;
mod texts;
mod workers;
mod world;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Outcome;
use super::text::{say, table};
use crate::{Database, Shutdown};

use production::Produced;
use texts::Document;
use world::World;

/// Name of the topic.
const TOPIC: &str = "words";
/// Name of the consumer.
const CONSUMER: &str = "counter";
/// How often the backlog is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long nothing may move before the demo gives up.
const STALL_MAX: Duration = Duration::from_secs(60);

/// Count the words of texts, kill workers meanwhile, and check that nothing was lost or doubled.
///
/// Starts a private PostgreSQL, which is removed at the end, unless a database is given; `DATABASE_URL` is not read. Exit
/// code 3 if a number is wrong.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce demo\n  pgonce demo --json novel.txt essays/*.txt")]
pub(super) struct Demo {
    /// Texts to count; this project's own documents where none are given.
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Go through the texts again until this many words were produced.
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    words: u64,
    /// Worker processes.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    workers: u8,
    /// Use this database, in a schema `pgonce_demo` that must not exist, instead of a private one.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    /// Leave the database as it is at the end, to look around.
    #[arg(long)]
    keep: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Report {
    documents: u64,
    words: u64,
    kills: u64,
    duplicates_refused: u64,
    lost: u64,
    doubled: u64,
    words_per_second: u64,
}

impl Demo {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let interrupted = Shutdown::on_signals(Duration::MAX).context("cannot listen for signals")?;
        let documents = texts::read(&self.files, self.words)?;
        // The start may be dropped: a private server's guardian removes what is there when this process has ended.
        let world = tokio::select! {
            world = World::create(self.database_url.as_deref()) => world?,
            () = interrupted.stopping() => bail!("interrupted"),
        };
        // The measured work may be dropped at any point: the workers die with it, and the world is removed below.
        let outcome = tokio::select! {
            outcome = self.measure(&world, &documents) => outcome,
            () = interrupted.stopping() => Err(anyhow::anyhow!("interrupted")),
        };
        let keep = self.keep && outcome.is_ok();
        if keep && !self.json {
            say!("")?;
        }
        let left = if keep { Some(world.keep()?) } else { world.remove().await.map(|()| None)? };
        if let Some(left) = left {
            eprintln!("{left}");
        }
        outcome
    }

    async fn measure(&self, world: &World, documents: &[Document]) -> anyhow::Result<Outcome> {
        let expected = texts::count(documents);
        let words: u64 = expected.values().sum();
        let progress = progress_bar(words);
        let started = Instant::now();
        let stop = Shutdown::new();
        let (produced, kills) = {
            let produce = production::produce(world.database(), documents);
            let kill = workers::run_and_kill(world, usize::from(self.workers), &stop);
            let finish = async {
                let produced = produce.await?;
                drained(world.database(), words, &progress).await?;
                stop.stop();
                anyhow::Ok(produced)
            };
            // Either both end well, or the first failure drops the other.
            tokio::try_join!(finish, kill)?
        };
        let elapsed = started.elapsed();
        progress.finish_and_clear();

        let counted = world.word_counts(CONSUMER).await?;
        let stored = world.documents().await?;
        let report = report(&expected, &counted, &produced, kills, elapsed);
        if self.json {
            say!("{}", serde_json::to_string(&report)?)?;
        } else {
            print(&report)?;
        }
        if stored != produced.documents {
            eprintln!("error: {stored} documents stored, {} expected", produced.documents);
            return Ok(Outcome::Violated);
        }
        if report.duplicates_refused != produced.duplicates_sent {
            eprintln!("error: {} duplicates refused, {} sent", report.duplicates_refused, produced.duplicates_sent);
            return Ok(Outcome::Violated);
        }
        Ok(if report.lost == 0 && report.doubled == 0 { Outcome::Done } else { Outcome::Violated })
    }
}

/// Waits until all is relayed and consumed, and shows how far it is.
async fn drained(database: &Database, words: u64, progress: &ProgressBar) -> anyhow::Result<()> {
    let mut moved = (Instant::now(), 0);
    loop {
        let backlog = world::backlog(database).await?;
        progress.set_position(backlog.received.min(words));
        if backlog.pending == 0 && backlog.lag == 0 {
            return Ok(());
        }
        if backlog.received != moved.1 {
            moved = (Instant::now(), backlog.received);
        } else if moved.0.elapsed() > STALL_MAX {
            bail!("nothing moved for {} s: {} pending, lag {}", STALL_MAX.as_secs(), backlog.pending, backlog.lag);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn report(
    expected: &BTreeMap<String, u64>,
    counted: &BTreeMap<String, u64>,
    produced: &Produced,
    kills: u64,
    elapsed: Duration,
) -> Report {
    let mut report = Report {
        documents: produced.documents,
        words: expected.values().sum(),
        kills,
        duplicates_refused: produced.duplicates_refused,
        lost: 0,
        doubled: 0,
        words_per_second: 0,
    };
    for word in expected.keys().chain(counted.keys().filter(|word| !expected.contains_key(*word))) {
        let due = expected.get(word).copied().unwrap_or(0);
        let got = counted.get(word).copied().unwrap_or(0);
        report.lost += due.saturating_sub(got);
        report.doubled += got.saturating_sub(due);
    }
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    report.words_per_second = report.words.saturating_mul(1_000) / millis;
    report
}

fn print(report: &Report) -> std::io::Result<()> {
    let rows = [
        ("documents", report.documents),
        ("words", report.words),
        ("kills", report.kills),
        ("duplicates refused", report.duplicates_refused),
        ("lost", report.lost),
        ("doubled", report.doubled),
        ("words a second", report.words_per_second),
    ];
    say!("{}", table(&[], rows.map(|(name, value)| vec![name.to_owned(), value.to_string()])))
}

/// A bar on a terminal, nothing elsewhere.
fn progress_bar(words: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40.cyan} {human_pos}/{human_len} words counted, {per_sec}")
        .expect("the template is well formed");
    ProgressBar::new(words).with_style(style)
}
