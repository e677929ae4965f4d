//! `pgonce.toml`: the stages that `pgonce run` runs.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use crate::Consumer;

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
    #[serde(flatten)]
    pub(super) kind: Kind,
    pub(super) batch_messages: Option<i32>,
    pub(super) loops: Option<usize>,
}

/// What a consumer does with its messages.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Kind {
    /// Counts words into `word_counts`.
    WordCount,
    /// Runs SQL over `received`.
    Sql {
        /// One statement, or several separated by semicolons.
        statements: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not a configuration of pgonce", path.display()))
    }
}

impl ConsumerEntry {
    /// The stage that this entry describes.
    pub(super) fn stage(&self) -> Consumer {
        let stage = match &self.kind {
            Kind::WordCount => Consumer::word_count(&self.name),
            Kind::Sql { statements } => Consumer::sql(&self.name, statements),
        };
        match self.batch_messages {
            Some(messages) => stage.batch_messages(messages),
            None => stage,
        }
    }
}
