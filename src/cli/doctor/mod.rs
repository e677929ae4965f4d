//! `pgonce doctor`: what keeps an installation, or a design on paper, from exactly-once semantics.
//!
//! All that is asked of a database is asked in one read-only transaction, with the rights of the caller. A check that the
//! caller may not make is a fault of its own: nothing is left out in silence.

mod checks;
mod design;
mod examine;
mod routines;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use self::checks::{Finding, Severity};
use super::connection::Connection;
use super::text::{Colour, count, in_colour, print_json, say};
use super::{Outcome, is_broken_pipe};

/// What is said where nothing is in the way.
const CAN: &str = "System can achieve exactly-once semantics";

/// Find what keeps an installation from its promises, each with its consequence and what helps.
///
/// Only reads, with the rights of the role that it connects as; the owner of the schema, with the rights of
/// `pg_read_all_stats`, sees all. docs/doctor.md lists the checks.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pgonce doctor --database-url postgresql://app@db/app\n  pgonce doctor --design shop.toml\n\n\
    Exit code 1 where there is a fault. Warnings leave it at 0."
)]
pub(super) struct Doctor {
    #[command(flatten)]
    connection: Connection,
    /// Judge a design instead, which a file declares in JSON or TOML by the switches `producerDeduplication`,
    /// `duplicateDetection`, `exactlyOnceSemantics`, `consumerDeduplication`, `atomicProcessing`, `transactionSupport` and
    /// `twoPhaseCommit`, each true or false. No database is needed.
    #[arg(long, value_name = "FILE")]
    design: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    findings: Vec<Finding>,
    can_achieve_exactly_once: bool,
}

impl Doctor {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let findings = match &self.design {
            Some(file) => design::judge(file)?,
            None => examine::examine(&self.connection).await?,
        };
        let can_achieve_exactly_once = findings.iter().all(|finding| finding.severity != Severity::Fault);
        let report = Report { findings, can_achieve_exactly_once };
        let printed = if self.json {
            print_json(&report)
        } else if self.design.is_some() {
            report.print_messages().map_err(Into::into)
        } else {
            report.print().map_err(Into::into)
        };
        // The verdict stands, whether somebody reads on or not.
        if let Err(error) = printed
            && !is_broken_pipe(&error)
        {
            return Err(error);
        }
        Ok(if can_achieve_exactly_once { Outcome::Done } else { Outcome::Faulty })
    }
}

impl Report {
    /// What a design lacks, in a line each.
    fn print_messages(&self) -> std::io::Result<()> {
        for finding in &self.findings {
            say!("{}", finding.subject)?;
        }
        if self.can_achieve_exactly_once {
            say!("{CAN}")?;
        }
        Ok(())
    }

    fn print(&self) -> std::io::Result<()> {
        let mut numbers = Vec::new();
        for (severity, colour) in [(Severity::Fault, Colour::Red), (Severity::Warning, Colour::Yellow)] {
            let of_it: Vec<&Finding> = self.findings.iter().filter(|finding| finding.severity == severity).collect();
            let (word, number) = (severity.word(), i128::try_from(of_it.len()).unwrap_or(i128::MAX));
            for finding in of_it {
                say!("{} {}: {}", in_colour(colour, word), finding.check, without_controls(&finding.subject))?;
                say!("  {}", finding.consequence)?;
                say!("  remedy: {}\n", without_controls(&finding.remedy))?;
            }
            if number > 0 {
                numbers.push(count(number, word));
            }
        }
        if self.can_achieve_exactly_once {
            say!("{}", in_colour(Colour::Green, CAN))
        } else {
            say!("{}", in_colour(Colour::Red, &numbers.join(", ")))
        }
    }
}

/// A text with names in it that anybody may have chosen, for a terminal that obeys control characters.
fn without_controls(text: &str) -> String {
    text.chars().map(|next| if next.is_control() { char::REPLACEMENT_CHARACTER } else { next }).collect()
}
