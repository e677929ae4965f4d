//! The `pgonce` program: one file a subcommand.
//!
//! A person at a terminal gets progress and tables, a pipe gets plain text, and `--json` gets JSON. Exit codes: 0 done,
//! 1 failed, 2 wrong usage, 3 a verification found a violation.

mod config;
mod connection;
mod demo;
mod init;
mod run;
mod signals;
mod status;
mod text;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::Error;

/// Exactly-once effects over PostgreSQL: outbox, relay, queue and consumers.
#[derive(Debug, Parser)]
#[command(name = "pgonce", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Init),
    Run(run::Run),
    Status(status::Status),
    Demo(demo::Demo),
}

/// What is logged where `RUST_LOG` says nothing. The pool reports each broken connection that a stage reports as well.
const LOG_FILTER: &str = "info,deadpool=off";

/// How a command ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
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
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_FILTER)))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no runtime: {error}");
            return ExitCode::from(1);
        }
    };
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Init(command) => command.run().await,
            Command::Run(command) => command.run().await,
            Command::Status(command) => command.run().await,
            Command::Demo(command) => command.run().await,
        }
    });
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Violated) => ExitCode::from(3),
        Err(error) => {
            report(&error);
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// One clear message, its causes where they say more, and what to do.
fn report(error: &anyhow::Error) {
    eprintln!("error: {error}");
    // An error of the library says itself what its sources say.
    let own = error.chain().position(<dyn std::error::Error>::is::<Error>).unwrap_or(usize::MAX);
    for cause in error.chain().skip(1).take(own) {
        eprintln!("  caused by: {cause}");
    }
    if let Some(hint) = error.chain().find_map(|cause| cause.downcast_ref::<Error>()?.hint()) {
        eprintln!("  hint: {hint}");
    }
}
