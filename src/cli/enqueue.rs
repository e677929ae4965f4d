//! `pgonce enqueue`: messages from a file or a pipe, a line each.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, anyhow};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio_postgres::Transaction;

use super::Outcome;
use super::connection::{Connection, Installed};
use super::text::{count, print_json, say};
use crate::{Error, Message, Producer, Remedy, Sent};

/// Messages of one transaction.
const CHUNK_MESSAGES_MAX: usize = 1_000;
/// Bytes of lines after which a transaction takes no more.
const CHUNK_BYTES_MAX: usize = 8 << 20;
/// Longest line: the largest payload that a topic may take, and what is around it.
const LINE_BYTES_MAX: u64 = 66 << 20;

/// Enqueue messages from a file or from standard input, one JSON object a line.
///
/// A line is {"payload": …} and may have "key", "message_id", "headers" (an object) and "deliver_at" (as in
/// 2030-01-31T09:00:00Z). Lines are committed a thousand at a time. A bad line ends the command, with its number and what
/// is wrong; the lines before it may have been enqueued. Run it again after that, or after a crash: with a "message_id"
/// in each line, or with --source, nothing is enqueued twice.
#[expect(clippy::doc_markdown, reason = "the help shows backquotes as they are")]
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    echo '{\"payload\": {\"word\": \"once\"}, \"message_id\": \"w-1\"}' | pgonce enqueue words\n  \
    pgonce enqueue orders --source orders-2026-11-25 orders.ndjson")]
pub(super) struct Enqueue {
    /// The topic.
    topic: String,
    /// The file; standard input where none is given, or "-".
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Name of this input: a line without "message_id" gets the id NAME:LINE, so that the same input enqueues no line
    /// twice, however often it is run. Without it such a line gets a fresh id each time.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// A line as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    payload: Box<RawValue>,
    key: Option<String>,
    message_id: Option<String>,
    headers: Option<Map<String, Value>>,
    deliver_at: Option<String>,
}

/// Lines of one transaction.
#[derive(Debug, Default)]
struct Chunk {
    messages: Vec<Message>,
    /// The number of each message's line.
    lines: Vec<u64>,
    bytes: usize,
}

/// What has been done.
#[derive(Debug, Default, serde::Serialize)]
struct Done {
    enqueued: u64,
    duplicates: u64,
}

impl Enqueue {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let installed = self.connection.installed().await?;
        let input = Input::open(self.file.as_deref(), self.source.clone())?;
        // One chunk waits while another is sent, and one is read.
        let (give, mut chunks) = mpsc::channel(1);
        let reader = tokio::task::spawn_blocking(move || input.read(&give));
        let producer = Producer::in_schema(&self.topic, installed.schema());
        let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template("{spinner} {msg} {per_sec}")?);
        let mut installed = installed;
        let mut done = Done::default();
        while let Some(chunk) = chunks.recv().await {
            let sent = send(&mut installed, &producer, &chunk).await.inspect_err(|_| done.tell())?;
            let duplicates = sent.iter().filter(|sent| sent.was_duplicate).count() as u64;
            done.duplicates += duplicates;
            done.enqueued += sent.len() as u64 - duplicates;
            bar.inc(sent.len() as u64);
            bar.set_message(done.so_far());
        }
        bar.finish_and_clear();
        reader.await?.inspect_err(|_| done.tell())?;
        if self.json {
            print_json(&done)?;
        } else {
            say!("{}", done.so_far())?;
        }
        Ok(Outcome::Done)
    }
}

impl Done {
    /// For whoever has to go on after a failure.
    fn tell(&self) {
        if self.enqueued + self.duplicates > 0 {
            tracing::warn!("until then: {}", self.so_far());
        }
    }

    fn so_far(&self) -> String {
        format!("enqueued {}, refused {}", count(self.enqueued, "message"), count(self.duplicates, "duplicate"))
    }
}

/// Reads a time with its offset from UTC.
fn time(text: &str) -> anyhow::Result<SystemTime> {
    let time: jiff::Timestamp = text.parse().map_err(|error: jiff::Error| {
        anyhow!("deliver_at of {text:?} is no time such as 2030-01-31T09:00:00Z: {error}")
    })?;
    Ok(time.try_into()?)
}

/// Begins a transaction that does not last where the program is stopped: whoever sends the same ids waits for its end.
async fn begin(installed: &mut Installed) -> Result<Transaction<'_>, Error> {
    let transaction = installed.session.begin().await?;
    transaction.query_typed(include_str!("../../sql/statements/limit_silence.sql"), &[]).await?;
    Ok(transaction)
}

/// Sends a chunk in a transaction of its own, whole or not at all.
async fn send(installed: &mut Installed, producer: &Producer, chunk: &Chunk) -> anyhow::Result<Vec<Sent>> {
    let transaction = begin(installed).await?;
    let error = match producer.send_all(&transaction, &chunk.messages).await {
        Ok(sent) => {
            transaction.commit().await.map_err(Error::from)?;
            return Ok(sent);
        }
        Err(error) if error.kind().remedy() != Remedy::Reject => return Err(error.into()),
        Err(error) => error,
    };
    transaction.rollback().await.map_err(Error::from)?;
    // One of them is refused: which?
    let transaction = begin(installed).await?;
    for (message, line) in chunk.messages.iter().zip(&chunk.lines) {
        if let Err(error) = producer.send(&transaction, message).await {
            return Err(anyhow::Error::from(error).context(format!("line {line} is refused")));
        }
    }
    Err(error.into())
}

/// What lines are read from.
struct Input {
    lines: Box<dyn BufRead + Send>,
    /// Where they come from, for an error.
    origin: String,
    source: Option<String>,
}

impl Input {
    fn open(file: Option<&Path>, source: Option<String>) -> anyhow::Result<Self> {
        let file = file.filter(|file| *file != Path::new("-"));
        let origin = file.map_or_else(|| "standard input".to_owned(), |path| path.display().to_string());
        let lines: Box<dyn BufRead + Send> = match file {
            Some(path) => Box::new(BufReader::new(File::open(path).with_context(|| format!("cannot read {origin}"))?)),
            None => Box::new(BufReader::new(std::io::stdin())),
        };
        Ok(Self { lines, origin, source })
    }

    /// Reads all lines and gives them away in chunks; those before a bad line, too.
    fn read(mut self, give: &mpsc::Sender<Chunk>) -> anyhow::Result<()> {
        let mut chunk = Chunk::default();
        let mut outcome = Ok(());
        for number in 1.. {
            let line = match self.line() {
                Ok(line) if line.is_empty() => break,
                Ok(line) => line,
                Err(error) => {
                    outcome = Err(error).with_context(|| format!("cannot read {}", self.origin));
                    break;
                }
            };
            match self.message(&line, number) {
                Ok(message) => {
                    chunk.bytes += line.len();
                    chunk.lines.extend(message.as_ref().map(|_| number));
                    chunk.messages.extend(message);
                }
                Err(error) => {
                    outcome = Err(error.context(format!("line {number} is refused")));
                    break;
                }
            }
            let is_full = chunk.messages.len() >= CHUNK_MESSAGES_MAX || chunk.bytes >= CHUNK_BYTES_MAX;
            if is_full && give.blocking_send(std::mem::take(&mut chunk)).is_err() {
                return Ok(());
            }
        }
        if !chunk.messages.is_empty() {
            // Nobody takes it where the sending failed, which is reported there.
            let _ = give.blocking_send(chunk);
        }
        outcome
    }

    /// The next line with its end, or so much of it that it is seen to be too long; empty when all are read.
    fn line(&mut self) -> std::io::Result<Vec<u8>> {
        let mut line = Vec::new();
        self.lines.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line)?;
        Ok(line)
    }

    /// The message of a line; none where it is blank.
    fn message(&self, line: &[u8], number: u64) -> anyhow::Result<Option<Message>> {
        if line.len() as u64 > LINE_BYTES_MAX {
            return Err(anyhow!("it is longer than {LINE_BYTES_MAX} bytes"));
        }
        let text = std::str::from_utf8(line).context("it is not UTF-8")?.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let line: Line = serde_json::from_str(text)?;
        let mut message = Message::raw(line.payload.get())?;
        if let Some(key) = line.key {
            message = message.key(key);
        }
        if let Some(id) = line.message_id.or_else(|| self.source.as_ref().map(|source| format!("{source}:{number}"))) {
            message = message.id(id);
        }
        for (name, value) in line.headers.unwrap_or_default() {
            message = message.header(name, value);
        }
        if let Some(at) = line.deliver_at {
            message = message.deliver_at(time(&at)?);
        }
        Ok(Some(message))
    }
}
