//! Tables and colours for people, JSON for programs, questions, and time spans.

use std::fmt::Arguments;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use comfy_table::{Table, presets};
use serde::Serialize;

use super::Usage;

/// Prints a line to standard output. Unlike `println!`, it does not panic where nobody reads any more or the disk is full.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::text::write_line(format_args!($($text)*)) };
}
pub(super) use say;

pub(super) fn write_line(text: Arguments<'_>) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{text}")?;
    output.flush()
}

/// A table with a head; plain enough for a pipe.
pub(super) fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !head.is_empty() {
        table.set_header(head);
    }
    for row in rows {
        table.add_row(row);
    }
    table
}

/// What stands out on a terminal.
#[derive(Clone, Copy, Debug)]
pub(super) enum Colour {
    Red,
    Green,
    Yellow,
}

/// A text in a colour, where standard output is a terminal and nobody has set `NO_COLOR`.
pub(super) fn in_colour(colour: Colour, text: &str) -> String {
    if !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        return text.to_owned();
    }
    let code = match colour {
        Colour::Red => 31,
        Colour::Green => 32,
        Colour::Yellow => 33,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// What a topic or consumer is doing, in a word.
pub(super) fn state(paused: bool) -> String {
    if paused { "paused" } else { "running" }.to_owned()
}

/// How many there are of something, whose plural has an s.
pub(super) fn count(number: impl Into<i128>, what: &str) -> String {
    match number.into() {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    }
}

/// An age.
pub(super) fn seconds(age: f64) -> String {
    format!("{age:.1} s")
}

/// A time span as people write it.
pub(super) fn parse_duration(text: &str) -> Result<Duration, Usage> {
    let parsed: Option<jiff::SignedDuration> = text.parse().ok();
    let duration = parsed.and_then(|duration| Duration::try_from(duration).ok());
    duration.ok_or_else(|| Usage(format!("{text:?} is no time span: write 60s, 5m or 1h 30m")))
}

/// Prints a report as JSON.
pub(super) fn print_json<T: Serialize>(report: &T) -> anyhow::Result<()> {
    say!("{}", serde_json::to_string_pretty(report)?)?;
    Ok(())
}

/// Asks before something is destroyed, unless the answer was given on the command line.
pub(super) fn confirm(question: &str, yes: bool) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Usage(format!("{question} Say so with --yes: there is no terminal to ask at")).into());
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Usage("not confirmed: nothing was done".to_owned()).into())
}
