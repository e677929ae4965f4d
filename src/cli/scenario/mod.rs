//! `pgonce scenario`: the classic failures, played on a real database, with pgonce and without.
//!
//! Producer and consumer are processes of their own (`actor.rs`), killed with SIGKILL (`player.rs`); the network between them
//! and the server is one that is really cut (`link.rs`). A play says what it has seen: what a process has said, what the
//! link has let through, what the tables hold. The result is counted in the tables at the end.

mod actor;
mod consumer_crash;
mod link;
mod network_partition;
mod player;
mod producer_retry;
mod stage;

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::Outcome;
use super::text::{Colour, in_colour, say, table};
use crate::Shutdown;

use actor::{Actor, Side};
use stage::Stage;

/// Longest wait for what a play expects next. Only a defect, or a machine that stands still, takes as long.
const STEP_MAX: Duration = Duration::from_secs(30);
/// How often a play looks whether it has happened.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Play a classic failure with real processes, and see what pgonce makes of it.
///
/// Starts a private PostgreSQL, which is removed at the end, unless a database is given; `DATABASE_URL` is not read. Exit
/// code 3 if pgonce does not keep what it promises.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    pgonce scenario producer-retry --naive\n  \
    pgonce scenario producer-retry\n  \
    pgonce scenario delivery-modes --json")]
pub(super) struct Scenario {
    #[command(subcommand)]
    scenario: Name,
}

#[derive(Debug, Subcommand)]
enum Name {
    /// An acknowledgement is lost, and the producer sends its message again.
    ProducerRetry(Play),
    /// A consumer is killed between its effect and its acknowledgement.
    ConsumerCrash(Play),
    /// A producer is cut off while its COMMIT is on the way, and sends again; then the first one arrives after all.
    NetworkPartition(Play),
    /// At most once, at least once and exactly once side by side: consumers killed before their last COMMIT.
    DeliveryModes(Place),
    #[command(skip)]
    Actor(Actor),
}

/// A failure that is played on one of two sides.
#[derive(Debug, Args)]
struct Play {
    /// With a plain table for a queue, and without pgonce.
    #[arg(long)]
    naive: bool,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
struct Place {
    /// Use this database, in a schema of its own that is removed at the end, instead of a private one.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Plot {
    ProducerRetry,
    ConsumerCrash,
    NetworkPartition,
    DeliveryModes,
}

/// What the tables hold at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Finding {
    ExactlyOnce,
    DuplicateMessages,
    DuplicateProcessing,
    Lost,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Report<'a> {
    scenario: Plot,
    steps: &'a [String],
    result: Findings,
}

/// Of one play, or of one for each delivery mode.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Findings {
    One(Finding),
    Modes { at_most_once: Finding, at_least_once: Finding, exactly_once: Finding },
}

/// What was seen so far. It is shown at once, unless the whole is to be JSON.
struct Steps {
    seen: Vec<String>,
    /// What stands before each.
    mode: Option<&'static str>,
    json: bool,
}

impl Scenario {
    /// The part of this process in a play, where it was started for one.
    pub(super) fn of_actor() -> Option<Self> {
        let is_actor = std::env::args_os().next().is_some_and(|name| name == actor::PROGRAM);
        is_actor.then(|| Self { scenario: Name::Actor(Actor::parse()) })
    }

    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let (plot, sides, place) = match self.scenario {
            Name::ProducerRetry(play) => (Plot::ProducerRetry, play.sides(), play.place),
            Name::ConsumerCrash(play) => (Plot::ConsumerCrash, play.sides(), play.place),
            Name::NetworkPartition(play) => (Plot::NetworkPartition, play.sides(), play.place),
            Name::DeliveryModes(place) => {
                (Plot::DeliveryModes, vec![Side::AtMostOnce, Side::AtLeastOnce, Side::ExactlyOnce], place)
            }
            Name::Actor(actor) => return actor.run().await,
        };
        let interrupted = Shutdown::on_signals(Duration::MAX).context("cannot listen for signals")?;
        // The start may be dropped: a private server's guardian removes what is there when this process has ended.
        let stage = tokio::select! {
            stage = Stage::open(place.database_url.as_deref()) => stage?,
            () = interrupted.stopping() => bail!("interrupted"),
        };
        // Not dropped: a schema that is half made might be committed after it was looked for.
        let mut outcome = stage.set(&sides).await.map(|()| Outcome::Done);
        if outcome.is_ok() {
            // The play may be dropped at any point: its processes die with it, and the schema is removed below.
            outcome = tokio::select! {
                biased;
                () = interrupted.stopping() => Err(anyhow::anyhow!("interrupted")),
                outcome = plot.play(&stage, &sides, place.json) => outcome,
            };
        }
        let removed = stage.remove().await;
        if let (Err(_), Err(also)) = (&outcome, &removed) {
            // What went wrong first is what the program ends with.
            eprintln!("error: {also:#}");
        }
        let outcome = outcome?;
        removed.map(|()| outcome)
    }
}

impl Play {
    fn sides(&self) -> Vec<Side> {
        vec![if self.naive { Side::Naive } else { Side::ExactlyOnce }]
    }
}

impl Plot {
    async fn play(self, stage: &Stage, sides: &[Side], json: bool) -> anyhow::Result<Outcome> {
        let mut steps = Steps { seen: Vec::new(), mode: None, json };
        let mut found = Vec::new();
        for &side in sides {
            steps.mode = (self == Self::DeliveryModes).then_some(side.name());
            found.push(match self {
                Self::ProducerRetry => producer_retry::play(stage, side, &mut steps).await?,
                Self::NetworkPartition => network_partition::play(stage, side, &mut steps).await?,
                Self::ConsumerCrash | Self::DeliveryModes => consumer_crash::play(stage, side, &mut steps).await?,
            });
        }
        let result = match *found {
            [at_most_once, at_least_once, exactly_once] => {
                Findings::Modes { at_most_once, at_least_once, exactly_once }
            }
            [one] => Findings::One(one),
            _ => bail!("{} results of {self:?}", found.len()),
        };
        let is_kept = sides.iter().zip(&found).all(|(side, found)| side.allows(*found));
        let report = Report { scenario: self, steps: &steps.seen, result };
        if json {
            say!("{}", serde_json::to_string(&report)?)?;
        } else {
            print(&report.result)?;
        }
        Ok(if is_kept { Outcome::Done } else { Outcome::Violated })
    }
}

impl Side {
    /// Whether that may come out on this side.
    fn allows(self, found: Finding) -> bool {
        match self {
            Self::Naive => true,
            Self::AtMostOnce => matches!(found, Finding::ExactlyOnce | Finding::Lost),
            Self::AtLeastOnce => matches!(found, Finding::ExactlyOnce | Finding::DuplicateProcessing),
            Self::ExactlyOnce => found == Finding::ExactlyOnce,
        }
    }
}

impl Finding {
    /// By how often the message is in the queue.
    fn of_copies(copies: i64) -> Self {
        match copies {
            ..=0 => Self::Lost,
            1 => Self::ExactlyOnce,
            2.. => Self::DuplicateMessages,
        }
    }

    /// By how often the inventory was decremented.
    fn of_decrements(decrements: i32) -> Self {
        match decrements {
            ..=0 => Self::Lost,
            1 => Self::ExactlyOnce,
            2.. => Self::DuplicateProcessing,
        }
    }

    fn colour(self) -> Colour {
        if self == Self::ExactlyOnce { Colour::Green } else { Colour::Red }
    }

    /// Its name, as JSON has it.
    fn name(self) -> &'static str {
        match self {
            Self::ExactlyOnce => "exactly_once",
            Self::DuplicateMessages => "duplicate_messages",
            Self::DuplicateProcessing => "duplicate_processing",
            Self::Lost => "lost",
        }
    }
}

impl Steps {
    fn seen(&mut self, what: &str) -> std::io::Result<()> {
        let step = self.mode.map_or_else(|| what.to_owned(), |mode| format!("{mode}: {what}"));
        if !self.json {
            say!("{step}")?;
        }
        self.seen.push(step);
        Ok(())
    }

    /// What became of a message that was sent a second time.
    fn duplicate(&mut self, was_duplicate: bool, copies: i64) -> std::io::Result<()> {
        if copies > 1 {
            return self.seen("Queue: Duplicate message received!");
        }
        if was_duplicate { self.seen("Queue: Duplicate message detected, rejected") } else { Ok(()) }
    }
}

fn print(result: &Findings) -> std::io::Result<()> {
    match *result {
        Findings::One(found) => say!("\n{}", in_colour(found.colour(), &format!("Result: {}", found.name()))),
        Findings::Modes { at_most_once, at_least_once, exactly_once } => {
            let rows = [
                (Side::AtMostOnce, at_most_once),
                (Side::AtLeastOnce, at_least_once),
                (Side::ExactlyOnce, exactly_once),
            ];
            let rows = rows.map(|(side, found)| vec![side.name().to_owned(), in_colour(found.colour(), found.name())]);
            say!("\n{}", table(&["MODE", "RESULT"], rows))
        }
    }
}

/// Waits for what is to happen next.
async fn within<T>(what: &str, happening: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let happened = tokio::time::timeout(STEP_MAX, happening).await;
    happened.unwrap_or_else(|_elapsed| bail!("not within {} s: {what}", STEP_MAX.as_secs()))
}

/// Waits until the network is so far.
async fn reached(what: &str, point: &CancellationToken) -> anyhow::Result<()> {
    let reaching = async {
        point.cancelled().await;
        Ok(())
    };
    within(what, reaching).await
}
