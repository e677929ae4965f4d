//! `pgonce checkpoint`: a consumer as it was; and `pgonce replay`: its messages once more.

use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::connection::{Connection, Installed, Reading};
use super::consumer::name_state;
use super::text::{confirm, count, print_json, say, table};
use super::{Outcome, Usage};
use crate::Error;

/// How often the time that something takes is shown.
const TICK: Duration = Duration::from_millis(100);

/// Save a consumer as it is, look at what was saved, and go back to it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce checkpoint save counter before-release\n  \
    pgonce checkpoint diff counter before-release\n  pgonce checkpoint restore counter before-release")]
pub(super) struct Checkpoint {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Save a consumer as it is in this moment: offsets, parked and dead messages, and the rows of its state tables. It
    /// need not stop.
    #[command(after_help = "Example:\n  pgonce checkpoint save counter before-release")]
    Save {
        #[command(flatten)]
        named: Named,
        /// Tables that hold the effects of the consumer, besides its word counts; from now on all its checkpoints hold
        /// them.
        #[arg(long, value_name = "TABLE", value_delimiter = ',')]
        state: Option<Vec<String>>,
        #[command(flatten)]
        reading: Reading,
    },
    /// List checkpoints, of one consumer or all.
    #[command(after_help = "Example:\n  pgonce checkpoint list counter")]
    List {
        /// Only of this consumer.
        consumer: Option<String>,
        #[command(flatten)]
        reading: Reading,
    },
    /// Show a checkpoint: its offsets, and how many rows it holds of each table.
    #[command(after_help = "Example:\n  pgonce checkpoint show counter before-release")]
    Show {
        #[command(flatten)]
        named: Named,
        #[command(flatten)]
        reading: Reading,
    },
    /// Say what a restore would change.
    #[command(after_help = "Example:\n  pgonce checkpoint diff counter before-release --samples 20")]
    Diff {
        #[command(flatten)]
        named: Named,
        /// Keys that are shown of each kind of change, up to 1000.
        #[arg(long, value_name = "N", default_value = "5")]
        samples: i32,
        #[command(flatten)]
        reading: Reading,
    },
    /// Make a consumer what it was at a checkpoint. What it has processed since comes again. Workers need not stop.
    #[command(after_help = "Example:\n  pgonce checkpoint restore counter before-release")]
    Restore {
        #[command(flatten)]
        named: Named,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        reading: Reading,
    },
    /// Delete a checkpoint.
    #[command(after_help = "Example:\n  pgonce checkpoint delete counter before-release")]
    Delete {
        #[command(flatten)]
        named: Named,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        connection: Connection,
    },
}

/// One checkpoint.
#[derive(Debug, Args)]
struct Named {
    /// The consumer.
    consumer: String,
    /// The name of the checkpoint, 1 to 255 bytes.
    checkpoint: String,
}

#[derive(Debug, Serialize)]
struct Saved {
    consumer: String,
    checkpoint: String,
    taken_at: String,
    rows: i64,
}

#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    saved: Saved,
    taken_by: String,
    is_scheduled: bool,
    messages: i64,
    gone: i64,
}

#[derive(Debug, Serialize)]
struct Shown {
    consumer: String,
    checkpoint: String,
    partitions: Vec<Place>,
    tables: Vec<Held>,
}

#[derive(Debug, Serialize)]
struct Place {
    partition: String,
    next_offset: i64,
    messages: i64,
    gone: i64,
}

#[derive(Debug, Serialize)]
struct Held {
    table: String,
    rows: i64,
}

/// What a restore would change, in a partition or a table.
#[derive(Debug, Serialize)]
struct Change {
    part: String,
    name: String,
    messages: Option<i64>,
    added: Option<i64>,
    removed: Option<i64>,
    changed: Option<i64>,
    samples: Option<Vec<String>>,
}

/// Where a partition goes on.
#[derive(Debug, Serialize)]
struct Rewound {
    partition: i32,
    next_offset: i64,
    messages: i64,
}

impl Checkpoint {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        match self.action {
            Action::Save { named, state, reading: Reading { json, connection } } => {
                let mut installed = connection.installed().await?;
                if let Some(state) = state {
                    let schema = installed.schema().clone();
                    name_state(&mut installed.session, &schema, &named.consumer, &state).await?;
                }
                let save = include_str!("../../sql/statements/checkpoint.sql");
                let rows = while_it_takes("saving", named.rows(&installed, save)).await?;
                for row in &rows {
                    let saved = Saved::from_row(&named.consumer, row)?;
                    if json {
                        print_json(&saved)?;
                    } else {
                        say!(
                            "saved checkpoint {} of consumer {}: {}",
                            saved.checkpoint,
                            saved.consumer,
                            count(saved.rows, "row")
                        )?;
                    }
                }
            }
            Action::List { consumer, reading: Reading { json, connection } } => {
                let installed = connection.installed().await?;
                let list = include_str!("../../sql/statements/checkpoints.sql");
                let rows = installed.rows(list, &[(&consumer, Type::TEXT)]).await?;
                let listed = rows.iter().map(Listed::from_row).collect::<Result<Vec<_>, _>>()?;
                if json { print_json(&listed)? } else { print_list(&listed)? }
            }
            Action::Show { named, reading: Reading { json, connection } } => {
                let shown = named.show(&connection.installed().await?).await?;
                if json { print_json(&shown)? } else { shown.print()? }
            }
            Action::Diff { named, samples, reading: Reading { json, connection } } => {
                let changes = named.changes(&connection.installed().await?, samples).await?;
                if json { print_json(&changes)? } else { print_changes(&changes)? }
            }
            Action::Restore { named, yes, reading: Reading { json, connection } } => {
                let installed = connection.installed().await?;
                if !yes {
                    let changes = named.changes(&installed, 0).await?;
                    if !json {
                        print_changes(&changes)?;
                    }
                }
                confirm(
                    &format!("Really restore consumer {} to checkpoint {}?", named.consumer, named.checkpoint),
                    yes,
                )?;
                let restore = include_str!("../../sql/statements/restore.sql");
                let rewound = rewound(&while_it_takes("restoring", named.rows(&installed, restore)).await?)?;
                if json {
                    print_json(&rewound)?;
                } else {
                    print_rewound(&rewound)?;
                    say!("restored consumer {} to checkpoint {}", named.consumer, named.checkpoint)?;
                }
            }
            Action::Delete { named, yes, connection } => {
                let installed = connection.installed().await?;
                confirm(
                    &format!("Really delete checkpoint {} of consumer {}?", named.checkpoint, named.consumer),
                    yes,
                )?;
                named.rows(&installed, include_str!("../../sql/statements/delete_checkpoint.sql")).await?;
                say!("deleted checkpoint {} of consumer {}", named.checkpoint, named.consumer)?;
            }
        }
        Ok(Outcome::Done)
    }
}

impl Named {
    /// Runs a statement of `sql/statements/` whose parameters are the consumer and the checkpoint.
    async fn rows(&self, installed: &Installed, statement: &str) -> Result<Vec<Row>, Error> {
        installed.rows(statement, &[(&self.consumer, Type::TEXT), (&self.checkpoint, Type::TEXT)]).await
    }

    async fn changes(&self, installed: &Installed, samples: i32) -> Result<Vec<Change>, Error> {
        let statement = include_str!("../../sql/statements/checkpoint_difference.sql");
        let parameters =
            [(&self.consumer as _, Type::TEXT), (&self.checkpoint as _, Type::TEXT), (&samples as _, Type::INT4)];
        let rows = while_it_takes("comparing", installed.rows(statement, &parameters)).await?;
        rows.iter().map(Change::from_row).collect()
    }

    async fn show(self, installed: &Installed) -> anyhow::Result<Shown> {
        let rows = self.rows(installed, include_str!("../../sql/statements/checkpoint_contents.sql")).await?;
        if rows.is_empty() {
            bail!(
                "checkpoint {} of consumer {} does not exist; pgonce checkpoint list shows which there are",
                self.checkpoint,
                self.consumer
            );
        }
        let (mut partitions, mut tables) = (Vec::new(), Vec::new());
        for row in &rows {
            match row.try_get("part")? {
                "partition" => partitions.push(Place::from_row(row)?),
                _ => tables.push(Held::from_row(row)?),
            }
        }
        Ok(Shown { partitions, tables, consumer: self.consumer, checkpoint: self.checkpoint })
    }
}

/// Shows a person how long something takes; a pipe gets nothing.
async fn while_it_takes<T>(what: &'static str, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let spinner = ProgressBar::no_length().with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(TICK);
    let outcome = work.await;
    spinner.finish_and_clear();
    outcome
}

impl Saved {
    fn from_row(consumer: &str, row: &Row) -> Result<Self, Error> {
        Ok(Self {
            consumer: consumer.to_owned(),
            checkpoint: row.try_get("checkpoint")?,
            taken_at: row.try_get("taken_at")?,
            rows: row.try_get("row_count")?,
        })
    }
}

impl Listed {
    fn from_row(row: &Row) -> Result<Self, Error> {
        Ok(Self {
            saved: Saved::from_row(row.try_get("consumer")?, row)?,
            taken_by: row.try_get("taken_by")?,
            is_scheduled: row.try_get("is_scheduled")?,
            messages: row.try_get("messages")?,
            gone: row.try_get("gone")?,
        })
    }
}

impl Place {
    fn from_row(row: &Row) -> Result<Self, Error> {
        Ok(Self {
            partition: row.try_get("name")?,
            next_offset: row.try_get("next_offset")?,
            messages: row.try_get("messages")?,
            gone: row.try_get("gone")?,
        })
    }
}

impl Held {
    fn from_row(row: &Row) -> Result<Self, Error> {
        Ok(Self { table: row.try_get("name")?, rows: row.try_get("row_count")? })
    }
}

impl Change {
    fn from_row(row: &Row) -> Result<Self, Error> {
        Ok(Self {
            part: row.try_get("part")?,
            name: row.try_get("name")?,
            messages: row.try_get("messages")?,
            added: row.try_get("added")?,
            removed: row.try_get("removed")?,
            changed: row.try_get("changed")?,
            samples: row.try_get("samples")?,
        })
    }
}

impl Shown {
    fn print(&self) -> std::io::Result<()> {
        say!("checkpoint {} of consumer {}", self.checkpoint, self.consumer)?;
        if !self.partitions.is_empty() {
            let rows = self.partitions.iter().map(|offset| {
                let numbers = [offset.next_offset, offset.messages, offset.gone].map(|number| number.to_string());
                [&[offset.partition.clone()][..], &numbers].concat()
            });
            say!("{}", table(&["PARTITION", "NEXT OFFSET", "MESSAGES SINCE", "GONE"], rows))?;
        }
        let rows = self.tables.iter().map(|held| vec![held.table.clone(), held.rows.to_string()]);
        say!("{}", table(&["TABLE", "ROWS"], rows))
    }
}

fn print_list(listed: &[Listed]) -> std::io::Result<()> {
    let rows = listed.iter().map(|listed| {
        vec![
            listed.saved.consumer.clone(),
            listed.saved.checkpoint.clone(),
            listed.saved.taken_at.clone(),
            listed.taken_by.clone(),
            listed.saved.rows.to_string(),
            listed.messages.to_string(),
            if listed.gone == 0 { "yes".to_owned() } else { format!("no: {} are gone", listed.gone) },
        ]
    });
    let head = ["CONSUMER", "CHECKPOINT", "TAKEN AT", "BY", "ROWS", "MESSAGES SINCE", "CAN BE RESTORED"];
    say!("{}", table(&head, rows))
}

fn print_changes(changes: &[Change]) -> std::io::Result<()> {
    let number = |number: Option<i64>| number.map_or_else(String::new, |number| number.to_string());
    let (partitions, tables): (Vec<_>, Vec<_>) = changes.iter().partition(|change| change.part == "partition");
    if !partitions.is_empty() {
        let rows = partitions.iter().map(|change| vec![change.name.clone(), number(change.messages)]);
        say!("{}", table(&["PARTITION", "MESSAGES THAT COME AGAIN"], rows))?;
    }
    let rows = tables
        .iter()
        .map(|change| vec![change.name.clone(), number(change.added), number(change.removed), number(change.changed)]);
    say!("{}", table(&["TABLE", "ADDED SINCE", "REMOVED SINCE", "CHANGED SINCE"], rows))?;
    for change in tables {
        for sample in change.samples.iter().flatten() {
            say!("{}: {sample}", change.name)?;
        }
    }
    Ok(())
}

fn rewound(rows: &[Row]) -> Result<Vec<Rewound>, Error> {
    let rewound = |row: &Row| {
        Ok(Rewound {
            partition: row.try_get("partition")?,
            next_offset: row.try_get("next_offset")?,
            messages: row.try_get("messages")?,
        })
    };
    rows.iter().map(rewound).collect()
}

fn print_rewound(rewound: &[Rewound]) -> std::io::Result<()> {
    if rewound.is_empty() {
        return Ok(());
    }
    let rows = rewound
        .iter()
        .map(|place| vec![place.partition.to_string(), place.next_offset.to_string(), place.messages.to_string()]);
    say!("{}", table(&["PARTITION", "NEXT OFFSET", "MESSAGES THAT COME AGAIN"], rows))
}

/// Give a consumer messages again that it has processed, so that their effects happen once more.
///
/// What became of them is forgotten: records, parked messages, dead letters. To take effects back as well, restore a
/// checkpoint.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pgonce replay counter --from earliest\n  \
    pgonce replay counter --partition 3 --from 1200 --reapply-effects")]
pub(super) struct Replay {
    /// The consumer.
    consumer: String,
    /// The first offset, or `earliest`: the earliest that is kept.
    #[arg(long, value_name = "OFFSET", value_parser = parse_from)]
    from: From,
    /// Only of this partition.
    #[arg(long, value_name = "N")]
    partition: Option<i32>,
    /// Do it; without this flag it is only said what would be done.
    #[arg(long)]
    reapply_effects: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    reading: Reading,
}

#[derive(Clone, Copy, Debug)]
enum From {
    Earliest,
    Offset(i64),
}

fn parse_from(text: &str) -> Result<From, Usage> {
    match text.parse() {
        _ if text == "earliest" => Ok(From::Earliest),
        Ok(offset) => Ok(From::Offset(offset)),
        Err(_) => Err(Usage(format!("{text:?} is no offset: write a number, or earliest"))),
    }
}

impl Replay {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let installed = self.reading.connection.installed().await?;
        let plan = self.replay(&installed, false).await?;
        if !self.reading.json {
            print_rewound(&plan)?;
        }
        if !self.reapply_effects {
            if self.reading.json {
                print_json(&plan)?;
            } else {
                say!(
                    "nothing was done: with --reapply-effects these messages come again, and their effects happen once more"
                )?;
            }
            return Ok(Outcome::Done);
        }
        let messages: i64 = plan.iter().map(|place| place.messages).sum();
        let question = format!("Really apply {} of consumer {} once more?", count(messages, "message"), self.consumer);
        confirm(&question, self.yes)?;
        let done = self.replay(&installed, true).await?;
        if self.reading.json {
            print_json(&done)?;
        } else {
            let messages: i64 = done.iter().map(|place| place.messages).sum();
            say!("{} of consumer {} come again", count(messages, "message"), self.consumer)?;
        }
        Ok(Outcome::Done)
    }

    async fn replay(&self, installed: &Installed, reapply_effects: bool) -> Result<Vec<Rewound>, Error> {
        let from = match self.from {
            From::Earliest => None,
            From::Offset(offset) => Some(offset),
        };
        let rows = installed
            .rows(
                include_str!("../../sql/statements/replay.sql"),
                &[
                    (&self.consumer, Type::TEXT),
                    (&from, Type::INT8),
                    (&self.partition, Type::INT4),
                    (&reapply_effects, Type::BOOL),
                ],
            )
            .await?;
        rewound(&rows)
    }
}
