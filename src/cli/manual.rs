//! `pgonce completions` and `pgonce man`: what shells and `man` know of the program.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::text::say;
use super::{Cli, Outcome};

/// Print completions for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce completions bash > /etc/bash_completion.d/pgonce")]
pub(super) struct Completions {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Write the manual pages.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce man /usr/local/share/man/man1")]
pub(super) struct Man {
    /// Directory that is there; a page a command goes into it.
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
}

impl Completions {
    pub(super) fn run(self) -> anyhow::Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "pgonce", &mut script);
        say!("{}", String::from_utf8(script)?.trim_end())?;
        Ok(Outcome::Done)
    }
}

impl Man {
    pub(super) fn run(self) -> anyhow::Result<Outcome> {
        clap_mangen::generate_to(Cli::command(), &self.directory)
            .with_context(|| format!("cannot write to {}", self.directory.display()))?;
        Ok(Outcome::Done)
    }
}
