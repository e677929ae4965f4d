//! `pgonce node`: the verbs behind newline-delimited JSON on standard input and output, as Maelstrom's nodes speak.
//!
//! What has arrived is answered together and in order, each answer after the COMMIT that it tells of. Standard output holds
//! answers and nothing else. Mode and counter of the answers belong to the process, all else to the database: one that is
//! killed, and started again, goes on.

mod engine;
mod input;
mod protocol;
mod statements;

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Outcome;
use super::connection::parse_schema;
use crate::embedded::{Options, PrivateServer};
use crate::{Database, Schema, Shutdown};

use engine::Engine;
use input::Bytes;
use protocol::{Conversation, Line, Refusal, Request, Stored};

/// Most lines of one transaction.
const BATCH_LINES_MAX: usize = 1_000;
/// How long the lines at hand may take after the first signal.
const GRACEFUL_STOP: Duration = Duration::from_secs(5);

/// Answer requests on standard input, a JSON object a line, on standard output, as a node of Maelstrom.
///
/// Without --database-url it starts a private PostgreSQL, which is removed at the end; `DATABASE_URL` is not read. A
/// database that is given gets the schema of pgonce where it has none, and keeps what the node has stored: killed and
/// started again on it, the node goes on. An answer is written when what it tells of is committed. Ends at the end of its
/// input.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    echo '{\"type\": \"process\", \"msg_id\": 1, \"event_id\": \"e1\", \"word\": \"hello\"}' | pgonce node\n  \
    maelstrom test -w echo --bin ./node.sh --node-count 1    # node.sh: exec pgonce node")]
pub(super) struct Node {
    /// Use this database instead of a private one. Several nodes may share it.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    /// Schema that holds the tables and functions of pgonce [default: pgonce].
    #[arg(long, value_name = "NAME", value_parser = parse_schema)]
    schema: Option<Schema>,
    /// Answer envelopes by envelopes before `init` too: Maelstrom reads nothing else, and a node that it has killed and started
    /// again may get requests before its `init`.
    #[arg(long)]
    envelopes: bool,
    /// Empty the tables of the node first.
    #[arg(long)]
    fresh: bool,
}

/// What stands behind the answers.
struct World {
    engine: Engine,
    server: Option<PrivateServer>,
}

/// The world, and what makes it.
struct Opening {
    task: JoinHandle<anyhow::Result<World>>,
    opened: Option<World>,
}

impl Node {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let shutdown = Shutdown::on_signals(GRACEFUL_STOP).context("cannot listen for signals")?;
        let conversation = Conversation::new(self.envelopes);
        let mut opening = Opening { task: tokio::spawn(self.open()), opened: None };
        // Dropped at any point it is as if it were killed: a batch is committed or not, and its lines are not answered. What is
        // not opened yet is removed by the server's guardian when this process has ended.
        let outcome = shutdown.or_aborted(converse(conversation, &mut opening, &shutdown)).await;
        if let Some(World { server: Some(server), .. }) = opening.opened {
            tokio::task::spawn_blocking(move || server.stop()).await??;
        }
        outcome.unwrap_or(Ok(Outcome::Done))
    }

    async fn open(self) -> anyhow::Result<World> {
        let (server, url) = if let Some(url) = self.database_url {
            (None, url)
        } else {
            let server = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default())).await??;
            let url = server.url("pgonce");
            (Some(server), url)
        };
        let database = Database::connect(&url, self.schema.unwrap_or_default(), 1)?;
        Ok(World { engine: Engine::open(database, self.fresh).await?, server })
    }
}

impl Opening {
    async fn engine(&mut self) -> anyhow::Result<&mut Engine> {
        if self.opened.is_none() {
            self.opened = Some((&mut self.task).await??);
        }
        self.opened.as_mut().map(|world| &mut world.engine).context("there is no database")
    }
}

/// Answers lines until their end, or until it is asked to stop. What needs no database does not wait for it to be opened.
async fn converse(
    mut conversation: Conversation,
    opening: &mut Opening,
    shutdown: &Shutdown,
) -> anyhow::Result<Outcome> {
    // Some lines wait while others are answered.
    let (give, mut arrived) = mpsc::channel(1);
    let reader = tokio::task::spawn_blocking(move || input::read(std::io::stdin(), &give));
    loop {
        let is_opening = opening.opened.is_none();
        // All arms only wait: lines that were not taken stay, and so does the task that opens.
        let lines = tokio::select! {
            biased;
            () = shutdown.stopping() => return Ok(Outcome::Done),
            opened = opening.engine(), if is_opening => {
                opened?;
                continue;
            }
            lines = arrived.recv() => lines,
        };
        let Some(lines) = lines else { break };
        for batch in lines.chunks(BATCH_LINES_MAX) {
            let requests: Vec<_> = batch.iter().map(read).collect();
            let at_once = if opening.opened.is_some() {
                0
            } else {
                requests.iter().position(|(_, request)| stored(request).is_some()).unwrap_or(requests.len())
            };
            let (at_once, later) = requests.split_at(at_once);
            write(conversation.write_all(at_once, Vec::new())?).await?;
            if !later.is_empty() {
                // Both only wait. Lines at hand are answered where that can be.
                let engine = tokio::select! {
                    biased;
                    engine = opening.engine() => engine?,
                    () = shutdown.stopping() => return Ok(Outcome::Done),
                };
                // What is committed is answered before the next transaction begins.
                for unit in later.chunk_by(|(_, a), (_, b)| !stands_alone(a) && !stands_alone(b)) {
                    let unit_stored: Vec<&Stored> = unit.iter().filter_map(|(_, request)| stored(request)).collect();
                    let answers = engine.answer(&unit_stored).await;
                    write(conversation.write_all(unit, answers)?).await?;
                }
            }
        }
    }
    // An end of the input hides no failure of the database.
    tokio::select! {
        biased;
        engine = opening.engine() => { engine?; }
        () = shutdown.stopping() => return Ok(Outcome::Done),
    }
    reader.await?.context("cannot read standard input")?;
    Ok(Outcome::Done)
}

fn read(bytes: &Bytes) -> (Line, Result<Request, Refusal>) {
    match bytes {
        Some(bytes) => protocol::read(bytes),
        None => (Line::default(), Err(protocol::too_long())),
    }
}

/// What a request asks of the database.
fn stored(request: &Result<Request, Refusal>) -> Option<&Stored> {
    if let Ok(Request::Stored(stored)) = request { Some(stored) } else { None }
}

/// Whether a request is a transaction by itself.
fn stands_alone(request: &Result<Request, Refusal>) -> bool {
    stored(request).is_some_and(|stored| !engine::is_adding(stored))
}

/// Where nobody reads, a thread waits and not the runtime: a signal still ends it.
async fn write(answers: String) -> anyhow::Result<()> {
    let written = tokio::task::spawn_blocking(move || {
        let mut output = std::io::stdout().lock();
        output.write_all(answers.as_bytes())?;
        output.flush()
    });
    Ok(written.await??)
}
