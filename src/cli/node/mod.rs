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

use anyhow::{Context, bail};
use clap::Args;
use tokio::sync::mpsc;

use super::Outcome;
use super::connection::parse_schema;
use crate::embedded::{Options, PrivateServer};
use crate::{Database, Schema, Shutdown};

use engine::Engine;
use input::Bytes;
use protocol::{Answer, Conversation, Request};

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
    maelstrom test -w echo --bin node.sh --node-count 1    # node.sh: exec pgonce node")]
pub(super) struct Node {
    /// Use this database instead of a private one. Several nodes may share it.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    /// Schema that holds the tables and functions of pgonce [default: pgonce].
    #[arg(long, value_name = "NAME", value_parser = parse_schema)]
    schema: Option<Schema>,
    /// Empty the tables of the node first.
    #[arg(long)]
    fresh: bool,
}

impl Node {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let shutdown = Shutdown::on_signals(GRACEFUL_STOP).context("cannot listen for signals")?;
        let (server, url) = if let Some(url) = self.database_url {
            (None, url)
        } else {
            // The start may be dropped: the server's guardian removes what is there when this process has ended.
            let start = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default()));
            let server = tokio::select! {
                server = start => server??,
                () = shutdown.stopping() => bail!("interrupted"),
            };
            let url = server.url("pgonce");
            (Some(server), url)
        };
        let database = Database::connect(&url, self.schema.unwrap_or_default(), 1)?;
        // Dropped at any point it is as if it were killed: a batch is committed or not, and its lines are not answered.
        let outcome = shutdown.or_aborted(converse(database, self.fresh, &shutdown)).await;
        if let Some(server) = server {
            tokio::task::spawn_blocking(move || server.stop()).await??;
        }
        outcome.unwrap_or(Ok(Outcome::Done))
    }
}

/// Answers lines until their end, or until it is asked to stop.
async fn converse(database: Database, fresh: bool, shutdown: &Shutdown) -> anyhow::Result<Outcome> {
    let mut engine = Engine::open(database, fresh).await?;
    let mut conversation = Conversation::default();
    // Some lines wait while others are answered.
    let (give, mut arrived) = mpsc::channel(1);
    let reader = tokio::task::spawn_blocking(move || input::read(std::io::stdin(), &give));
    loop {
        // Receiving is safe to cancel: lines that were not taken stay, and are not answered.
        let lines = tokio::select! {
            biased;
            () = shutdown.stopping() => return Ok(Outcome::Done),
            lines = arrived.recv() => lines,
        };
        let Some(lines) = lines else { break };
        for batch in lines.chunks(BATCH_LINES_MAX) {
            let answers = answer(&mut engine, &mut conversation, batch).await?;
            tokio::task::spawn_blocking(move || write(&answers)).await??;
        }
    }
    reader.await?.context("cannot read standard input")?;
    Ok(Outcome::Done)
}

/// The answers to some lines, a line each.
async fn answer(engine: &mut Engine, conversation: &mut Conversation, batch: &[Bytes]) -> anyhow::Result<String> {
    let read = |bytes: &Bytes| match bytes {
        Some(bytes) => protocol::read(bytes),
        None => (protocol::Line::default(), Err(protocol::too_long())),
    };
    let requests: Vec<_> = batch.iter().map(read).collect();
    let stored: Vec<_> = requests
        .iter()
        .filter_map(|(_, request)| if let Ok(Request::Stored(stored)) = request { Some(stored) } else { None })
        .collect();
    let mut stored = engine.answer(&stored).await.into_iter();
    let mut text = String::new();
    for (line, request) in requests {
        let answer = match request {
            Ok(Request::Init { node_id }) => {
                conversation.begin(&node_id);
                Answer::InitOk {}
            }
            Ok(Request::Echo(echo)) => Answer::EchoOk { echo },
            Ok(Request::Stored(_)) => stored.next().context("a request has no answer")?,
            Err(refusal) => refusal.into(),
        };
        conversation.write(&line, &answer, &mut text)?;
    }
    Ok(text)
}

fn write(answers: &str) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(answers.as_bytes())?;
    output.flush()
}
