//! `pgonce.toml`: the stages that `pgonce run` runs.

use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::Consumer;

/// Most loops of a consumer: each needs a connection.
const LOOPS_MAX: usize = 64;

/// The whole file. Unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// Topics to relay; they are created where they do not exist.
    #[serde(default, rename = "topic")]
    pub(super) topics: Vec<Topic>,
    /// Consumers to run; they are created where they do not exist.
    #[serde(default, rename = "consumer")]
    pub(super) consumers: Vec<ConsumerEntry>,
}

/// A topic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Topic {
    pub(super) name: String,
    pub(super) partitions: Option<i32>,
    pub(super) payload_bytes_max: Option<i32>,
}

/// A consumer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConsumerEntry {
    pub(super) name: String,
    pub(super) topic: String,
    pub(super) kind: Kind,
    /// For the kind `sql`: one statement, or several separated by semicolons.
    pub(super) statements: Option<String>,
    pub(super) batch_messages: Option<i32>,
    pub(super) loops: Option<usize>,
}

/// What a consumer does with its messages.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// Counts words into `word_counts`.
    WordCount,
    /// Runs SQL over `received`.
    Sql,
}

impl Config {
    /// Reads and checks a file.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: Self =
            toml::from_str(&text).with_context(|| format!("{} is not a configuration of pgonce", path.display()))?;
        for consumer in &config.consumers {
            if consumer.loops.is_some_and(|loops| !(1..=LOOPS_MAX).contains(&loops)) {
                bail!("{}: consumer {:?}: loops are 1 to {LOOPS_MAX}", path.display(), consumer.name);
            }
            let needs_statements = matches!(consumer.kind, Kind::Sql);
            if needs_statements != consumer.statements.is_some() {
                bail!(
                    "{}: consumer {:?}: statements go with kind = \"sql\", and only with it",
                    path.display(),
                    consumer.name
                );
            }
        }
        Ok(config)
    }
}

impl ConsumerEntry {
    /// The stage that this entry describes.
    pub(super) fn stage(&self) -> Consumer {
        let stage = match &self.kind {
            Kind::WordCount => Consumer::word_count(&self.name),
            Kind::Sql => Consumer::sql(&self.name, self.statements.as_deref().unwrap_or_default()),
        };
        match self.batch_messages {
            Some(messages) => stage.batch_messages(messages),
            None => stage,
        }
    }
}
