//! `[[consumer]]`: what a consumer does, and its settings.

use std::io::Read;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use serde::Deserialize;

use super::{ATTEMPTS, BATCH_MESSAGES, WAIT_MS, check_bounds, check_name, explained};
use crate::{Consumer, ConsumerKind, ConsumerSettings, Webhook, WebhookSettings};

/// Most loops of a consumer: each needs a connection.
const LOOPS_MAX: usize = 64;
/// A larger file holds no secrets.
const SECRET_FILE_BYTES_MAX: u64 = 65_536;
/// Time between two scheduled checkpoints: a second to 30 days.
const CHECKPOINT_EVERY_MS: RangeInclusive<i64> = 1_000..=2_592_000_000;
/// Scheduled checkpoints that stay.
const CHECKPOINTS_KEPT: RangeInclusive<i32> = 1..=1_000;
/// How many stay, where nothing else is said.
const KEPT: i32 = 7;
/// Loops of a consumer, where nothing else is said.
const LOOPS: usize = 2;

/// A consumer.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConsumerEntry {
    pub(crate) name: String,
    pub(crate) topic: String,
    kind: Kind,
    /// For the kind `sql`: one statement, or several separated by semicolons.
    statements: Option<String>,
    #[serde(default)]
    start_at: StartAt,
    batch_messages: Option<i32>,
    loops: Option<usize>,
    failure_policy: Option<FailurePolicy>,
    attempts_max: Option<i32>,
    backoff_min_ms: Option<i32>,
    backoff_max_ms: Option<i32>,
    message_timeout_ms: Option<i32>,
    /// Tables that hold its effects, besides `word_counts`.
    pub(crate) state: Option<Vec<String>>,
    checkpoint_every_ms: Option<i64>,
    checkpoints_kept: Option<i32>,
    /// For the kind `webhook`: where messages are sent.
    url: Option<String>,
    /// A file that holds its secrets, and a variable of the environment that does.
    secret_file: Option<PathBuf>,
    secret_env: Option<String>,
    connect_timeout_ms: Option<i32>,
    lease_ms: Option<i32>,
    allow_http: Option<bool>,
    allow_private_addresses: Option<bool>,
}

/// What a consumer does with its messages.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Counts words into `word_counts`.
    #[default]
    WordCount,
    /// Sends the words of documents to the topic `words`.
    SplitWords,
    /// Runs SQL over `received`.
    Sql,
    /// Sends messages to an HTTP endpoint.
    Webhook,
}

/// Where a consumer begins when it is created.
#[derive(Clone, Copy, Debug, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StartAt {
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
pub(crate) enum FailurePolicy {
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

impl ConsumerEntry {
    /// A word count at its defaults.
    pub(super) fn word_count(name: &str, topic: &str) -> Self {
        Self { name: name.to_owned(), topic: topic.to_owned(), kind: Kind::WordCount, ..Self::default() }
    }

    /// Checks what no type can say. Secrets are read later, where the consumer is to run.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        check_name("name", &self.name)?;
        check_name("topic", &self.topic)?;
        check_bounds("batch_messages", self.batch_messages, BATCH_MESSAGES)?;
        check_bounds("loops", self.loops, 1..=LOOPS_MAX)?;
        check_bounds("attempts_max", self.attempts_max.map(i64::from), ATTEMPTS)?;
        for (key, value) in [
            ("backoff_min_ms", self.backoff_min_ms),
            ("backoff_max_ms", self.backoff_max_ms),
            ("message_timeout_ms", self.message_timeout_ms),
            ("connect_timeout_ms", self.connect_timeout_ms),
            ("lease_ms", self.lease_ms),
        ] {
            check_bounds(key, value.map(i64::from), WAIT_MS)?;
        }
        if let (Some(least), Some(most)) = (self.backoff_min_ms, self.backoff_max_ms)
            && least > most
        {
            bail!("backoff_min_ms of {least} is above backoff_max_ms of {most}");
        }
        check_bounds("checkpoint_every_ms", self.checkpoint_every_ms, CHECKPOINT_EVERY_MS)?;
        check_bounds("checkpoints_kept", self.checkpoints_kept, CHECKPOINTS_KEPT)?;
        ensure!(
            self.checkpoints_kept.is_none() || self.checkpoint_every_ms.is_some(),
            "checkpoints_kept goes only with checkpoint_every_ms"
        );
        self.check_kind()
    }

    fn check_kind(&self) -> anyhow::Result<()> {
        for (key, is_there, kind, name) in [
            ("statements", self.statements.is_some(), Kind::Sql, "sql"),
            ("url", self.url.is_some(), Kind::Webhook, "webhook"),
            ("secret_file", self.secret_file.is_some(), Kind::Webhook, "webhook"),
            ("secret_env", self.secret_env.is_some(), Kind::Webhook, "webhook"),
            ("connect_timeout_ms", self.connect_timeout_ms.is_some(), Kind::Webhook, "webhook"),
            ("lease_ms", self.lease_ms.is_some(), Kind::Webhook, "webhook"),
            ("allow_http", self.allow_http.is_some(), Kind::Webhook, "webhook"),
            ("allow_private_addresses", self.allow_private_addresses.is_some(), Kind::Webhook, "webhook"),
        ] {
            if is_there && self.kind != kind {
                bail!("{key} goes only with kind = \"{name}\"");
            }
        }
        match (self.kind, &self.statements, &self.url) {
            (Kind::Sql, None, _) => bail!("kind = \"sql\" needs statements"),
            (Kind::Sql, Some(statements), _) if is_comment(statements) => {
                bail!("kind = \"sql\" needs statements, and there are only comments and blanks")
            }
            (Kind::Webhook, _, None) => bail!("kind = \"webhook\" needs url, such as \"https://shop.example/hooks\""),
            (Kind::Webhook, _, Some(_)) if self.holds_a_secret() => {
                // Not quoted.
                bail!("secret_file or secret_env is a secret itself: they name a file that holds it, or a variable")
            }
            (Kind::Webhook, _, Some(_)) if self.secret_file.is_none() && self.secret_env.is_none() => {
                bail!(
                    "kind = \"webhook\" needs a secret: secret_file names a file that holds it, secret_env a variable"
                )
            }
            (Kind::Webhook, _, Some(url)) => {
                self.webhook_settings().endpoint(url).map(drop).map_err(|error| explained(&error)).context("url")
            }
            (Kind::Sql, Some(_), _) | (Kind::WordCount | Kind::SplitWords, ..) => Ok(()),
        }
    }

    /// The stage that this entry describes.
    pub(crate) fn stage(&self) -> anyhow::Result<Consumer> {
        let mut stage = match self.kind {
            Kind::WordCount => Consumer::word_count(&self.name),
            Kind::SplitWords => Consumer::split_words(&self.name),
            Kind::Sql => Consumer::sql(&self.name, self.statements.as_deref().unwrap_or_default()),
            Kind::Webhook => Consumer::external(&self.name, self.webhook()?),
        };
        if let Some(messages) = self.batch_messages {
            stage = stage.batch_messages(messages);
        }
        if let Some(longest) = self.message_timeout_ms.and_then(milliseconds) {
            stage = stage.message_timeout(longest);
        }
        if let Some(longest) = self.lease_ms.and_then(milliseconds) {
            stage = stage.lease(longest);
        }
        if let Some(every) = self.checkpoint_every_ms.and_then(|number| u64::try_from(number).ok()) {
            let keep = self.checkpoints_kept.unwrap_or(KEPT);
            stage = stage.checkpoint_every(Duration::from_millis(every), keep);
        }
        Ok(stage)
    }

    fn webhook(&self) -> anyhow::Result<Webhook> {
        let url = self.url.as_deref().unwrap_or_default();
        Webhook::new(url, &self.secrets()?, self.webhook_settings()).map_err(|error| explained(&error))
    }

    fn webhook_settings(&self) -> WebhookSettings {
        WebhookSettings {
            connect_timeout: self.connect_timeout_ms.and_then(milliseconds),
            allow_http: self.allow_http.unwrap_or_default(),
            allow_private_addresses: self.allow_private_addresses.unwrap_or_default(),
        }
    }

    /// Whether a secret stands where its place is to be named.
    fn holds_a_secret(&self) -> bool {
        let file = self.secret_file.as_ref().is_some_and(|file| file.to_string_lossy().starts_with("whsec_"));
        file || self.secret_env.as_ref().is_some_and(|name| name.starts_with("whsec_"))
    }

    /// From the environment, which wins, or from the file.
    fn secrets(&self) -> anyhow::Result<String> {
        let name = self.secret_env.as_deref().unwrap_or_default();
        let given = self.secret_env.as_ref().and_then(std::env::var_os).filter(|secrets| !secrets.is_empty());
        match (given, &self.secret_file) {
            (Some(secrets), _) => {
                secrets.into_string().map_err(|_| anyhow!("secret_env: the variable {name} holds no text"))
            }
            (None, Some(file)) => {
                let mut secrets = String::new();
                let read = std::fs::File::open(file)
                    .and_then(|file| file.take(SECRET_FILE_BYTES_MAX + 1).read_to_string(&mut secrets));
                let length = read.with_context(|| format!("secret_file: cannot read {}", file.display()))?;
                ensure!(
                    length as u64 <= SECRET_FILE_BYTES_MAX,
                    "secret_file: {} is larger than {SECRET_FILE_BYTES_MAX} bytes, and holds no secrets",
                    file.display()
                );
                Ok(secrets)
            }
            (None, None) => Err(anyhow!(
                "secret_env: the environment has no variable {name}, or it is empty; set it, or name a file with secret_file"
            )),
        }
    }

    /// How it is created, and what an existing one is to be.
    pub(crate) fn settings(&self) -> ConsumerSettings {
        ConsumerSettings {
            kind: Some(match self.kind {
                Kind::WordCount | Kind::SplitWords | Kind::Sql => ConsumerKind::Transactional,
                Kind::Webhook => ConsumerKind::External,
            }),
            start_at: self.start_at.into(),
            failure_policy: self.failure_policy.map(Into::into),
            attempts_max: self.attempts_max,
            backoff_min_ms: self.backoff_min_ms,
            backoff_max_ms: self.backoff_max_ms,
        }
    }

    /// How many of it run at the same time.
    pub(crate) fn loops(&self) -> usize {
        self.loops.unwrap_or(LOOPS)
    }
}

fn milliseconds(number: i32) -> Option<Duration> {
    u64::try_from(number).ok().map(Duration::from_millis)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::config::Config;

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
            let error = format!("{:#}", config.check().expect_err("refused"));
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn settings_of_a_webhook_are_checked() {
        let good = "kind = 'webhook'\nurl = 'https://shop.example/hooks'\nsecret_env = 'S'";
        let sql = "kind = 'sql'\nstatements = 'select'";
        for (settings, reason) in [
            ("kind = 'webhook'\nsecret_env = 'S'", "needs url"),
            ("kind = 'webhook'\nurl = 'https://shop.example'", "secret_file names a file"),
            ("kind = 'webhook'\nurl = 'https://shop.example'\nsecret_env = 'whsec_abc'", "is a secret itself"),
            ("kind = 'webhook'\nurl = 'https://shop.example'\nsecret_file = 'whsec_abc'", "is a secret itself"),
            ("kind = 'webhook'\nurl = 'https://shop.example:99999'\nsecret_env = 'S'", "has no port behind its colon"),
            ("kind = 'webhook'\nurl = 'https://shop.example:abc/'\nsecret_env = 'S'", "has no port behind its colon"),
            ("kind = 'webhook'\nurl = 'https://shop.example:/'\nsecret_env = 'S'", "has no port behind its colon"),
            ("kind = 'webhook'\nurl = 'https://shop.example:0/'\nsecret_env = 'S'", "has no port behind its colon"),
            (
                "kind = 'webhook'\nurl = 'https://a:b@shop.example'\nsecret_env = 'S'",
                "url: a webhook's url holds a user",
            ),
            ("kind = 'webhook'\nurl = 'gopher://shop.example'\nsecret_env = 'S'", "gopher://. It begins with https://"),
            ("kind = 'webhook'\nurl = 'http://shop.example'\nsecret_env = 'S'", "allow_http = true"),
            ("kind = 'webhook'\nurl = 'https://[::1]/'\nsecret_env = 'S'", "allow_private_addresses = true"),
            (&format!("{good}\nstatements = 'select 1'"), "statements goes only with kind = \"sql\""),
            (&format!("{good}\nlease_ms = 0"), "lease_ms of 0: 1 to 86400000"),
            (&format!("{good}\nconnect_timeout_ms = 86400001"), "connect_timeout_ms of 86400001: 1 to 86400000"),
            (&format!("{sql}\nurl = 'https://shop.example'"), "url goes only with kind = \"webhook\""),
            (&format!("{sql}\nsecret_file = 's'"), "secret_file goes only with"),
            (&format!("{sql}\nsecret_env = 's'"), "secret_env goes only with"),
            (&format!("{sql}\nlease_ms = 1"), "lease_ms goes only with"),
            (&format!("{sql}\nconnect_timeout_ms = 1"), "connect_timeout_ms goes only with"),
            (&format!("{sql}\nallow_http = false"), "allow_http goes only with"),
            (&format!("{sql}\nallow_private_addresses = true"), "allow_private_addresses goes only with"),
        ] {
            let text = format!("[[consumer]]\nname = 'a'\ntopic = 't'\n{settings}");
            let config: Config = toml::from_str(&text).expect("it can be read");
            let error = format!("{:#}", config.check().expect_err("refused"));
            assert!(error.contains(reason), "{error}");
        }
        for more in ["", "allow_http = true\nallow_private_addresses = true\nlease_ms = 1000\nconnect_timeout_ms = 1"] {
            let text = format!("[[consumer]]\nname = 'a'\ntopic = 't'\n{good}\n{more}");
            toml::from_str::<Config>(&text).expect("it can be read").check().expect("it is good");
        }
    }
}
