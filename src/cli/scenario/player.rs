//! A process of a play, as the play sees it: started, heard, killed.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};

use anyhow::{Context, bail};
use clap::ValueEnum;
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::actor::{Line, PROGRAM, Part, Side};
use super::within;
use crate::Schema;

/// A process; killed when dropped.
pub(super) struct Player {
    part: Part,
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Player {
    /// Starts a process of this program, which connects by the URL that is given.
    pub(super) fn start(part: Part, side: Side, url: &str, schema: &Schema) -> anyhow::Result<Self> {
        let side = side.to_possible_value().expect("none is hidden");
        let mut process = Command::new(std::env::current_exe().context("cannot find the own program")?)
            .arg0(PROGRAM)
            .args([part.name(), side.get_name(), "--schema", schema.name()])
            .env("DATABASE_URL", url)
            .env_remove("PGONCE_DATABASE_URL_FILE")
            .env("RUST_LOG", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Out of reach of the terminal's Ctrl-C: the play ends it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start the {}", part.name()))?;
        let output = process.stdout.take().expect("it is piped");
        Ok(Self { part, process, lines: BufReader::new(output).lines() })
    }

    /// What it says next. Dropping the future is safe.
    pub(super) async fn heard(&mut self) -> anyhow::Result<Line> {
        let name = self.part.name();
        let line =
            within(&format!("the {name} says what it does"), async { Ok(self.lines.next_line().await?) }).await?;
        let Some(line) = line else { bail!("the {name} ended before the play was over") };
        serde_json::from_str(&line).with_context(|| format!("the {name} says {line:?}"))
    }

    /// Waits until it says so.
    pub(super) async fn says(&mut self, expected: Line) -> anyhow::Result<()> {
        match self.heard().await? {
            line if line == expected => Ok(()),
            line => bail!("the {} says {line:?} in place of {expected:?}", self.part.name()),
        }
    }

    /// Waits until the consumer says that it has decremented the stock, and answers what is left.
    pub(super) async fn decrements(&mut self) -> anyhow::Result<i32> {
        match self.heard().await? {
            Line::Decremented { stock } => Ok(stock),
            line => bail!("the {} says {line:?} and does not decrement", self.part.name()),
        }
    }

    /// Waits until the producer has its answer, and says whether the message was known.
    pub(super) async fn is_answered(&mut self) -> anyhow::Result<bool> {
        match self.heard().await? {
            Line::Answered { was_duplicate } => Ok(was_duplicate),
            line => bail!("the {} says {line:?} and has no answer", self.part.name()),
        }
    }

    /// Kills it with SIGKILL, and sees that it died of it.
    pub(super) async fn kill(mut self) -> anyhow::Result<()> {
        self.process.start_kill().with_context(|| format!("cannot kill the {}", self.part.name()))?;
        let status = self.ended().await?;
        if status.signal() != Some(Signal::KILL.as_raw()) {
            bail!("the {} did not die of SIGKILL: {status}", self.part.name());
        }
        Ok(())
    }

    /// Lets it end, and sees that it ends well.
    pub(super) async fn end(mut self) -> anyhow::Result<()> {
        drop(self.process.stdin.take());
        let status = self.ended().await?;
        if !status.success() {
            bail!("the {} failed: {status}", self.part.name());
        }
        Ok(())
    }

    async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        within(&format!("the {} ends", self.part.name()), async { Ok(self.process.wait().await?) }).await
    }
}
