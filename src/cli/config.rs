//! `pgonce.toml`: what the daemon runs. `config/pgonce.toml` shows every key.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Deserialize;

use super::Usage;
use crate::{Consumer, ConsumerSettings, Relay, Schema};

/// Most loops of a consumer: each needs a connection.
const LOOPS_MAX: usize = 64;
/// Loops of a consumer, where nothing else is said.
const LOOPS: usize = 2;
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

/// A consumer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConsumerEntry {
    pub(super) name: String,
    pub(super) topic: String,
    pub(super) kind: Kind,
    /// For the kind `sql`: one statement, or several separated by semicolons.
    pub(super) statements: Option<String>,
    #[serde(default)]
    pub(super) start_at: StartAt,
    pub(super) batch_messages: Option<i32>,
    pub(super) loops: Option<usize>,
    pub(super) failure_policy: Option<FailurePolicy>,
    pub(super) attempts_max: Option<i32>,
    pub(super) backoff_min_ms: Option<i32>,
    pub(super) backoff_max_ms: Option<i32>,
    pub(super) message_timeout_ms: Option<i32>,
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

/// Where a consumer begins when it is created.
#[derive(Clone, Copy, Debug, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(super) enum StartAt {
    /// With the earliest message that is kept.
    #[default]
    Earliest,
    /// With the next message that is relayed.
    Latest,
}

impl From<StartAt> for crate::StartAt {
    fn from(start_at: StartAt) -> Self {
        match start_at {
            StartAt::Earliest => Self::Earliest,
            StartAt::Latest => Self::Latest,
        }
    }
}

/// What waits while a message that failed is tried again.
#[derive(Clone, Copy, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(super) enum FailurePolicy {
    /// The later messages of its key.
    ParkKey,
    /// All that comes after it in its partition.
    Block,
    /// Nothing: later messages of its key overtake it.
    Skip,
}

impl From<FailurePolicy> for crate::FailurePolicy {
    fn from(policy: FailurePolicy) -> Self {
        match policy {
            FailurePolicy::ParkKey => Self::ParkKey,
            FailurePolicy::Block => Self::Block,
            FailurePolicy::Skip => Self::Skip,
        }
    }
}

impl Config {
    /// Reads and checks a file.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: Self = toml::from_str(&text).map_err(|error| {
            let hint = hint(error.message()).map_or_else(String::new, |hint| format!("\n  {hint}"));
            Usage(format!(
                "{} is not a configuration of pgonce: {}{hint}",
                path.display(),
                error.to_string().trim_end()
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
            Schema::new(name).map_err(|error| anyhow!("{error}. {}", error.hint().unwrap_or_default()))?;
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
            consumer.check_failures()?;
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
        self.consumers.push(ConsumerEntry {
            name: name.to_owned(),
            topic: topic.to_owned(),
            kind: Kind::WordCount,
            statements: None,
            start_at: StartAt::default(),
            batch_messages: None,
            loops: None,
            failure_policy: None,
            attempts_max: None,
            backoff_min_ms: None,
            backoff_max_ms: None,
            message_timeout_ms: None,
        });
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

impl ConsumerEntry {
    fn check(&self) -> anyhow::Result<()> {
        check_name("name", &self.name)?;
        check_name("topic", &self.topic)?;
        check_bounds("batch_messages", self.batch_messages, BATCH_MESSAGES)?;
        check_bounds("loops", self.loops, 1..=LOOPS_MAX)?;
        match (&self.kind, &self.statements) {
            (Kind::Sql, None) => bail!("kind = \"sql\" needs statements"),
            (Kind::Sql, Some(statements)) if is_comment(statements) => {
                bail!("kind = \"sql\" needs statements, and there are only comments and blanks")
            }
            (Kind::WordCount, Some(_)) => bail!("statements go only with kind = \"sql\""),
            (Kind::Sql, Some(_)) | (Kind::WordCount, None) => Ok(()),
        }
    }

    /// The stage that this entry describes.
    pub(super) fn stage(&self) -> Consumer {
        let stage = match &self.kind {
            Kind::WordCount => Consumer::word_count(&self.name),
            Kind::Sql => Consumer::sql(&self.name, self.statements.as_deref().unwrap_or_default()),
        };
        let stage = match self.batch_messages {
            Some(messages) => stage.batch_messages(messages),
            None => stage,
        };
        match self.message_timeout_ms.and_then(|longest| u64::try_from(longest).ok()) {
            Some(longest) => stage.message_timeout(Duration::from_millis(longest)),
            None => stage,
        }
    }

    /// How it is created, and what an existing one is to be.
    pub(super) fn settings(&self) -> ConsumerSettings {
        ConsumerSettings {
            kind: None,
            start_at: self.start_at.into(),
            failure_policy: self.failure_policy.map(Into::into),
            attempts_max: self.attempts_max,
            backoff_min_ms: self.backoff_min_ms,
            backoff_max_ms: self.backoff_max_ms,
        }
    }

    fn check_failures(&self) -> anyhow::Result<()> {
        for (key, value, bounds) in [
            ("attempts_max", self.attempts_max, ATTEMPTS),
            ("backoff_min_ms", self.backoff_min_ms, WAIT_MS),
            ("backoff_max_ms", self.backoff_max_ms, WAIT_MS),
            ("message_timeout_ms", self.message_timeout_ms, WAIT_MS),
        ] {
            if let Some(value) = value.filter(|value| !bounds.contains(&i64::from(*value))) {
                let (least, most) = bounds.into_inner();
                bail!("consumer {:?}: {key} of {value}: {least} to {most} are possible", self.name);
            }
        }
        if let (Some(least), Some(most)) = (self.backoff_min_ms, self.backoff_max_ms)
            && least > most
        {
            bail!("consumer {:?}: backoff_min_ms of {least} is above backoff_max_ms of {most}", self.name);
        }
        Ok(())
    }

    /// How many of it run at the same time.
    pub(super) fn loops(&self) -> usize {
        self.loops.unwrap_or(LOOPS)
    }
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

/// Whether SQL is nothing but comments, blanks and semicolons.
fn is_comment(sql: &str) -> bool {
    let mut rest = sql;
    loop {
        rest = rest.trim_start_matches(|next: char| next.is_whitespace() || next == ';');
        let end = match rest.get(..2) {
            Some("--") => "\n",
            Some("/*") => "*/",
            _ => return rest.is_empty(),
        };
        rest = rest.split_once(end).map_or("", |(_, after)| after);
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
        let sample = include_str!("../../config/pgonce.toml");
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
        let reference = include_str!("../../docs/configuration.md");
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
        let reference = include_str!("../../docs/configuration.md");
        let root = super::super::Cli::command();
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

    #[test]
    fn sql_is_told_from_comments() {
        for sql in ["", " ;\n", "-- nothing", "--\n-- select 1\n;", "/* select 1 */ -- x", "/* open"] {
            assert!(is_comment(sql), "{sql}");
        }
        for sql in ["select 1", "-- a\nselect 1", "/* a */ select 1 /* b */", "- 1", "ä"] {
            assert!(!is_comment(sql), "{sql}");
        }
    }

    #[test]
    fn settings_of_failures_are_bounded() {
        for (setting, reason) in [
            ("attempts_max = 0", "attempts_max of 0: 1 to 1000"),
            ("attempts_max = 1001", "attempts_max of 1001: 1 to 1000"),
            ("backoff_min_ms = 0", "backoff_min_ms of 0: 1 to 86400000"),
            ("backoff_max_ms = 86400001", "backoff_max_ms of 86400001: 1 to 86400000"),
            ("message_timeout_ms = 0", "message_timeout_ms of 0: 1 to 86400000"),
            ("backoff_min_ms = 2\nbackoff_max_ms = 1", "backoff_min_ms of 2 is above backoff_max_ms of 1"),
        ] {
            let text = format!("[[consumer]]\nname = 'a'\ntopic = 't'\nkind = 'word_count'\n{setting}");
            let config: Config = toml::from_str(&text).expect("it can be read");
            let error = config.check().expect_err("refused").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
