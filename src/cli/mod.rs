//! The `pgonce` program: one file a subcommand.
//!
//! A person at a terminal gets progress and tables, a pipe gets plain text, and `--json` gets JSON. Exit codes: 0 done,
//! 1 failed, 2 wrong usage, 3 a verification found a violation.

mod checkpoint;
mod config;
mod connection;
mod consumer;
mod dead_letter;
mod demo;
mod doctor;
mod enqueue;
mod manual;
mod message;
mod migrate;
mod node;
mod run;
mod scenario;
mod status;
mod text;
mod topic;
mod version;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{Error, ErrorKind};

/// Exactly-once effects over PostgreSQL: outbox, relay, queue and consumers.
#[derive(Debug, Parser)]
#[command(name = "pgonce", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Example:\n  pgonce demo\n\n\
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a check found something wrong.")]
struct Cli {
    /// Form of the log on standard error.
    #[arg(long, global = true, value_enum, default_value = "text", env = "PGONCE_LOG_FORMAT", value_name = "FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// A JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(visible_alias = "init")]
    Migrate(migrate::Migrate),
    Run(run::Run),
    Relay(run::RelayOnly),
    Consume(run::Consume),
    Enqueue(enqueue::Enqueue),
    Status(status::Status),
    Doctor(doctor::Doctor),
    Topic(topic::Topic),
    Consumer(consumer::Consumer),
    Message(message::Message),
    DeadLetter(dead_letter::DeadLetter),
    Checkpoint(checkpoint::Checkpoint),
    Replay(checkpoint::Replay),
    Demo(demo::Demo),
    Scenario(scenario::Scenario),
    Node(node::Node),
    Completions(manual::Completions),
    Man(manual::Man),
    Version(version::Version),
}

/// What is logged where `RUST_LOG` says nothing. The pool reports each broken connection that a stage reports as well.
const LOG_FILTER: &str = "info,deadpool=off,tokio_postgres=warn";

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// The report says what is wrong.
    Faulty,
    Violated,
}

/// A failure that wrong usage is to blame for: exit code 2, as clap's own.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Runs the program with the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match scenario::Scenario::of_actor() {
        Some(actor) => Cli { log_format: LogFormat::Text, command: Command::Scenario(actor) },
        None => Cli::parse(),
    };
    log_to_stderr(cli.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::from(1);
        }
    };
    let outcome = runtime.block_on(cli.command.run());
    // What still runs on a thread of its own, as the start of a private server does after a signal, is not waited for.
    runtime.shutdown_background();
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Faulty) => ExitCode::from(1),
        Ok(Outcome::Violated) => ExitCode::from(3),
        // Nobody reads any more, as behind `head`: that is no failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

impl Command {
    async fn run(self) -> anyhow::Result<Outcome> {
        match self {
            Self::Migrate(command) => command.run().await,
            Self::Run(command) => command.run().await,
            Self::Relay(command) => command.run().await,
            Self::Consume(command) => command.run().await,
            Self::Enqueue(command) => command.run().await,
            Self::Status(command) => command.run().await,
            Self::Doctor(command) => command.run().await,
            Self::Topic(command) => command.run().await,
            Self::Consumer(command) => command.run().await,
            Self::Message(command) => command.run().await,
            Self::DeadLetter(command) => command.run().await,
            Self::Checkpoint(command) => command.run().await,
            Self::Replay(command) => command.run().await,
            Self::Demo(command) => command.run().await,
            Self::Scenario(command) => command.run().await,
            Self::Node(command) => command.run().await,
            Self::Version(command) => command.run().await,
            Self::Completions(command) => command.run(),
            Self::Man(command) => command.run(),
        }
    }
}

fn log_to_stderr(format: LogFormat) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_FILTER)))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // Where the log cannot be written there is nobody to tell.
        .log_internal_errors(false)
        .with_target(false);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    kind == Some(std::io::ErrorKind::BrokenPipe)
}

/// One clear message, its causes where they say more, and what to do.
fn report(error: &anyhow::Error) {
    let mut text = vec![format!("error: {error}")];
    // An error of the library says itself what its sources say.
    let own = error.chain().position(<dyn std::error::Error>::is::<Error>).unwrap_or(usize::MAX);
    for cause in error.chain().skip(1).take(own) {
        text.push(format!("  caused by: {cause}"));
    }
    if let Some(hint) = error.chain().find_map(|cause| hint(cause.downcast_ref()?)) {
        text.push(format!("  hint: {hint}"));
    }
    // Where it cannot be written there is nobody to tell; the exit code says that it failed.
    let _ = writeln!(std::io::stderr(), "{}", text.join("\n"));
}

/// What to do, by the commands of the program where the server's hint names functions.
fn hint(error: &Error) -> Option<&str> {
    match error.kind() {
        ErrorKind::UnknownTopic => {
            Some("See what there is: pgonce topic list. One is created by: pgonce topic create.")
        }
        ErrorKind::UnknownConsumer => {
            Some("See what there is: pgonce consumer list. One is created by: pgonce consumer create.")
        }
        ErrorKind::InUse => Some("These consumers have to be deleted first: pgonce consumer delete."),
        _ => error.hint(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTS: [&str; 8] = [
        include_str!("../../README.md"),
        include_str!("../../docs/getting-started-sql.md"),
        include_str!("../../docs/getting-started-rust.md"),
        include_str!("../../docs/getting-started-daemon.md"),
        include_str!("../../docs/operating.md"),
        include_str!("../../docs/doctor.md"),
        include_str!("../../docs/scenarios.md"),
        include_str!("../../docs/node.md"),
    ];
    /// What ends a command within a line, or stands before one.
    const AROUND: [&str; 7] = ["<<END", "|", ">", "2>", "2>>", "&", "until"];

    /// The words of a line of the shell, as far as the documents use it.
    fn words(line: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        let mut is_quoted = false;
        for next in line.chars() {
            match next {
                '\'' => is_quoted = !is_quoted,
                ' ' if !is_quoted => words.push(String::new()),
                ';' if !is_quoted => words.extend(["|".to_owned(), String::new()]),
                _ => words.last_mut().expect("there is one").push(next),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    /// Tests run the commands that end by themselves; here are also those that need more than a test has.
    #[test]
    fn the_commands_in_the_documents_are_understood() {
        let mut count = 0;
        for document in DOCUMENTS {
            let blocks = document.split("```").skip(1).step_by(2).filter(|block| block.starts_with("sh"));
            let lines: Vec<String> = blocks
                .flat_map(|block| block.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>())
                .collect();
            for line in lines {
                for command in words(&line).split(|word| AROUND.contains(&word.as_str())) {
                    if command.first().is_some_and(|program| program == "pgonce") {
                        count += 1;
                        if let Err(error) = Cli::try_parse_from(command) {
                            panic!("{line}\n{error}");
                        }
                    }
                }
            }
        }
        assert!(count > 20, "only {count} commands");
    }
}
