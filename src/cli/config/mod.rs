//! `pgonce.toml`: what the daemon runs. `config/pgonce.toml` shows every key.

mod consumer;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use serde::Deserialize;

use self::consumer::ConsumerEntry;
pub(super) use self::consumer::{FailurePolicy, StartAt};
use super::Usage;
use crate::{Error, Relay, Schema};

/// Messages that a stage may take at a time.
const BATCH_MESSAGES: RangeInclusive<i32> = 1..=10_000;
/// Bytes of the name of a topic or a consumer.
const NAME_BYTES: RangeInclusive<usize> = 1..=255;
/// Partitions of a topic.
const PARTITIONS: RangeInclusive<i32> = 1..=1024;
/// Largest payload that a topic may be set to take, in bytes.
const PAYLOAD_BYTES_MAX: RangeInclusive<i32> = 1..=67_108_864;
/// Failed attempts after which a message may become a dead letter.
pub(super) const ATTEMPTS: RangeInclusive<i64> = 1..=1_000;
/// How long a wait, or a message, may take, in milliseconds: up to a day.
pub(super) const WAIT_MS: RangeInclusive<i64> = 1..=86_400_000;
/// Longest graceful stop, in seconds: a day.
pub(super) const GRACEFUL_STOP_SECONDS_MAX: u64 = 86_400;
/// How alike two keys are at least, of 1, where one is taken for a misspelling of the other.
const LIKENESS_MIN: f64 = 0.7;

/// The whole file. Unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    /// Where pgonce is installed.
    pub(super) schema: Option<String>,
    /// A file that holds the URL of the database.
    pub(super) database_url_file: Option<PathBuf>,
    /// How long batches may take to finish after the first signal.
    pub(super) graceful_stop_seconds: Option<u64>,
    /// Topics to relay; they are created where they do not exist.
    #[serde(default, rename = "topic")]
    pub(super) topics: Vec<Topic>,
    /// Consumers to run; they are created where they do not exist.
    #[serde(default, rename = "consumer")]
    pub(super) consumers: Vec<ConsumerEntry>,
}

/// A topic.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Topic {
    pub(super) name: String,
    pub(super) partitions: Option<i32>,
    pub(super) payload_bytes_max: Option<i32>,
    pub(super) relay_batch_messages: Option<i32>,
}

impl Config {
    /// Reads and checks a file.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: Self = toml::from_str(&text).map_err(|error| {
            let hint = hint(error.message()).map_or_else(String::new, |hint| format!("\n  {hint}"));
            // Not the line itself, which its own text quotes: somebody may have written a secret there.
            let before = error.span().map_or(0, |span| span.start);
            let line = 1 + text.bytes().take(before).filter(|byte| *byte == b'\n').count();
            Usage(format!(
                "{} is not a configuration of pgonce: line {line}: {}{hint}",
                path.display(),
                error.message()
            ))
        })?;
        config
            .check()
            .map_err(|error| Usage(format!("{} is not a configuration of pgonce: {error:#}", path.display())))?;
        Ok(config)
    }

    /// Checks what no type can say.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if let Some(seconds) = self.graceful_stop_seconds.filter(|seconds| *seconds > GRACEFUL_STOP_SECONDS_MAX) {
            bail!("graceful_stop_seconds of {seconds}: 0 to {GRACEFUL_STOP_SECONDS_MAX} are possible");
        }
        if let Some(name) = &self.schema {
            Schema::new(name).map_err(|error| explained(&error))?;
        }
        let mut names = BTreeSet::new();
        for topic in &self.topics {
            topic.check().with_context(|| format!("topic {:?}", topic.name))?;
            if !names.insert(&topic.name) {
                bail!("topic {:?} stands there twice", topic.name);
            }
        }
        let mut names = BTreeSet::new();
        for consumer in &self.consumers {
            consumer.check().with_context(|| format!("consumer {:?}", consumer.name))?;
            if !names.insert(&consumer.name) {
                bail!("consumer {:?} stands there twice", consumer.name);
            }
        }
        Ok(())
    }

    /// Adds a topic that is relayed at its defaults, unless it is there.
    pub(super) fn add_topic(&mut self, name: &str) {
        if self.topics.iter().all(|known| known.name != name) {
            self.topics.push(Topic { name: name.to_owned(), ..Topic::default() });
        }
    }

    /// Adds a word count at its defaults.
    pub(super) fn add_word_count(&mut self, name: &str, topic: &str) {
        self.consumers.push(ConsumerEntry::word_count(name, topic));
    }
}

impl Topic {
    fn check(&self) -> anyhow::Result<()> {
        check_name("name", &self.name)?;
        check_bounds("partitions", self.partitions, PARTITIONS)?;
        check_bounds("payload_bytes_max", self.payload_bytes_max, PAYLOAD_BYTES_MAX)?;
        check_bounds("relay_batch_messages", self.relay_batch_messages, BATCH_MESSAGES)
    }

    /// The stage that relays it.
    pub(super) fn stage(&self) -> Relay {
        let relay = Relay::topic(&self.name);
        match self.relay_batch_messages {
            Some(messages) => relay.batch_messages(messages),
            None => relay,
        }
    }
}

/// An error with its hint.
fn explained(error: &Error) -> anyhow::Error {
    anyhow!("{error}. {}", error.hint().unwrap_or_default())
}

fn check_name(key: &str, name: &str) -> anyhow::Result<()> {
    if NAME_BYTES.contains(&name.len()) {
        return Ok(());
    }
    let (least, most) = NAME_BYTES.into_inner();
    bail!("{key} of {} bytes: {least} to {most} are possible", name.len())
}

fn check_bounds<T: PartialOrd + Display>(key: &str, value: Option<T>, bounds: RangeInclusive<T>) -> anyhow::Result<()> {
    match value.filter(|value| !bounds.contains(value)) {
        Some(value) => bail!("{key} of {value}: {} to {} are possible", bounds.start(), bounds.end()),
        None => Ok(()),
    }
}

/// What was probably meant, for an error of the parser.
fn hint(message: &str) -> Option<String> {
    if message.starts_with("invalid type: map, expected a sequence") {
        return Some("write [[topic]] and [[consumer]], in double brackets".to_owned());
    }
    nearest_key(message).map(|key| format!("did you mean {key}?"))
}

/// The known key that an unknown one was meant to be. The parser's message quotes the unknown key and then all known ones.
fn nearest_key(message: &str) -> Option<&str> {
    let mut quoted = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    let (likeness, key) = quoted
        .map(|key| (strsim::jaro_winkler(unknown, key), key))
        .max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (likeness >= LIKENESS_MIN).then_some(key)
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory};

    use super::*;

    fn refusal(text: &str) -> String {
        toml::from_str::<Config>(text).expect_err("refused").message().to_owned()
    }

    #[test]
    fn the_nearest_key_is_named() {
        let message = refusal("[[topic]]\nname = 'a'\npartitons = 3");
        assert_eq!(nearest_key(&message), Some("partitions"), "{message}");
        assert_eq!(nearest_key(&refusal("gracefull_stop = 3")), Some("graceful_stop_seconds"));
        assert_eq!(nearest_key(&refusal("xyzzy = 3")), None);
        assert_eq!(nearest_key(&refusal("[[topic]]\nname = 3")), None);
    }

    /// The keys of the file, and those of each entry of a section.
    fn keys() -> Vec<(&'static str, Vec<String>)> {
        let known = |section: &str| {
            let message = refusal(&format!("{section}no_such_key = 1"));
            let keys: Vec<String> = message.split('`').skip(1).step_by(2).skip(1).map(str::to_owned).collect();
            assert!(keys.len() > 3, "{message}");
            keys
        };
        ["", "[[topic]]\n", "[[consumer]]\n"].map(|section| (section, known(section))).into()
    }

    #[test]
    fn the_sample_file_shows_every_key() {
        let sample = include_str!("../../../config/pgonce.toml");
        for (_, keys) in keys() {
            for key in keys {
                let is_shown = sample.lines().any(|line| {
                    let setting = line.trim_start_matches('#');
                    setting == format!("[[{key}]]") || setting.starts_with(&format!("{key} = "))
                });
                assert!(is_shown, "config/pgonce.toml does not show {key}");
            }
        }
    }

    /// What the tables of a part of the reference begin their rows with.
    fn listed(heading: &str) -> BTreeSet<String> {
        let reference = include_str!("../../../docs/configuration.md");
        let part = reference.split("\n## ").find(|part| part.starts_with(heading)).expect("a part");
        let first = |line: &str| line.strip_prefix("| `")?.split('`').next().map(str::to_owned);
        part.lines().filter_map(first).collect()
    }

    #[test]
    fn the_reference_lists_the_keys_as_they_are() {
        for (section, keys) in keys() {
            let heading = if section.is_empty() { "The file" } else { section.trim_end() };
            let tables = ["topic", "consumer"];
            let keys = keys.into_iter().filter(|key| !section.is_empty() || !tables.contains(&key.as_str()));
            assert_eq!(listed(heading), keys.collect(), "{heading}");
        }
    }

    #[test]
    fn the_reference_lists_the_flags_and_variables_as_they_are() {
        let reference = include_str!("../../../docs/configuration.md");
        let root = crate::cli::Cli::command();
        let mut flags = BTreeSet::new();
        let mut variables = BTreeSet::new();
        let daemons = ["run", "relay", "consume"].map(|name| root.find_subcommand(name).expect("it is there"));
        for argument in daemons.into_iter().flat_map(Command::get_arguments).chain(root.get_arguments()) {
            flags.extend(argument.get_long().map(|long| format!("--{long}")));
            variables.extend(argument.get_env().and_then(|name| name.to_str()).map(str::to_owned));
        }
        assert!(flags.len() > 5 && variables.len() > 3, "{flags:?} {variables:?}");
        assert_eq!(listed("Flags"), flags);
        for variable in &variables {
            assert!(reference.contains(&format!("`{variable}`")), "docs/configuration.md does not name {variable}");
        }
        let named = reference.split('`').skip(1).step_by(2).filter(|word| word.starts_with("PGONCE_"));
        for variable in named {
            assert!(variables.contains(variable), "there is no {variable}");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for (text, reason) in [
            ("[[topic]]\nname = 'a'\n[[topic]]\nname = 'a'", "twice"),
            ("graceful_stop_seconds = 100000", "86400"),
            ("[[topic]]\nname = 'a'\nrelay_batch_messages = 0", "10000"),
            ("[[consumer]]\nname = 'a'\ntopic = 't'\nkind = 'word_count'\nbatch_messages = 10001", "10000"),
            ("[[consumer]]\nname = 'a'\ntopic = 't'\nkind = 'sql'\nstatements = ' '", "statements"),
            ("[[consumer]]\nname = 'a'\ntopic = 't'\nkind = 'sql'", "kind = \"sql\" needs statements"),
            ("[[consumer]]\nname = 'a'\ntopic = 't'\nkind = 'sql'\nstatements = '-- a'", "comments"),
            ("[[consumer]]\nname = ''\ntopic = 't'\nkind = 'word_count'", "name of 0 bytes"),
            ("[[consumer]]\nname = 'a'\ntopic = ''\nkind = 'word_count'", "topic of 0 bytes"),
            ("[[topic]]\nname = 'a'\npartitions = 1025", "1024"),
            ("[[topic]]\nname = 'a'\npayload_bytes_max = 0", "67108864"),
            ("schema = 'a b'", "letters"),
            ("[[consumer]]\nname = 'a'\ntopic = 't'\nkind = 'word_count'\nloops = 65", "64"),
        ] {
            let config: Config = toml::from_str(text).expect("it can be read");
            let error = format!("{:#}", config.check().expect_err("refused"));
            assert!(error.contains(reason), "{error}");
        }
    }
}
