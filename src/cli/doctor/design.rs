//! A design on paper: what it lacks for exactly-once semantics. For teaching; it needs no database.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};
use serde_json::Value;

use super::super::Usage;
use super::checks::{Finding, Severity};

/// Largest design that is read, in bytes.
const DESIGN_BYTES_MAX: u64 = 65_536;
/// How alike two keys are at least, of 1, where one is taken for a misspelling of the other.
const LIKENESS_MIN: f64 = 0.7;

/// What a design has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent switches of a file")]
struct Design {
    producer_deduplication: bool,
    duplicate_detection: bool,
    exactly_once_semantics: bool,
    consumer_deduplication: bool,
    atomic_processing: bool,
    transaction_support: bool,
    two_phase_commit: bool,
}

/// Something that a design may lack.
struct Rule {
    name: &'static str,
    message: &'static str,
    is_broken: fn(Design) -> bool,
    consequence: &'static str,
    remedy: &'static str,
}

const RULES: [Rule; 7] = [
    Rule {
        name: "producer-idempotence",
        message: "Producer must be idempotent",
        is_broken: |design| {
            !design.producer_deduplication && !design.duplicate_detection && !design.exactly_once_semantics
        },
        consequence: "A producer that sends again after a lost acknowledgement makes a second message.",
        remedy: "Give each message an id, and let the producer or the queue refuse an id that it knows.",
    },
    Rule {
        name: "producer-deduplication",
        message: "Producer needs deduplication",
        is_broken: |design| !design.producer_deduplication,
        consequence: "A business transaction that is repeated makes its messages anew.",
        remedy: "Derive the message id from the business event, and write the message in its transaction: an outbox.",
    },
    Rule {
        name: "consumer-idempotence",
        message: "Consumer must be idempotent",
        is_broken: |design| !design.consumer_deduplication && !design.atomic_processing,
        consequence: "A message that comes again after a crash is applied again.",
        remedy: "Record what is processed, and apply effect and record in one transaction.",
    },
    Rule {
        name: "consumer-deduplication",
        message: "Consumer needs deduplication",
        is_broken: |design| !design.consumer_deduplication,
        consequence: "A message that stands in the queue twice is applied twice.",
        remedy: "Record the ids that were processed under a unique constraint.",
    },
    Rule {
        name: "consumer-atomicity",
        message: "Consumer needs atomic processing",
        is_broken: |design| !design.atomic_processing,
        consequence: "A crash between effect and record loses the one or repeats the other.",
        remedy: "Let effect, record and offset commit in one transaction.",
    },
    Rule {
        name: "transactions",
        message: "Need transaction support or 2PC",
        is_broken: |design| !design.transaction_support && !design.two_phase_commit,
        consequence: "Nothing makes two writes into one: a crash in between leaves half of them.",
        remedy: "Keep effect, record and offset in one database, or commit over two by two-phase commit.",
    },
    Rule {
        name: "queue-deduplication",
        message: "Queue must detect duplicates",
        is_broken: |design| {
            !(design.consumer_deduplication || design.duplicate_detection && design.exactly_once_semantics)
        },
        consequence: "A message that was stored twice is delivered twice, and nobody behind the queue notices.",
        remedy: "Let the queue refuse an id that it knows, or let the consumer deduplicate.",
    },
];

/// The switches as they are written, and where they are kept.
type Switch = (&'static str, &'static str, fn(&mut Design) -> &mut bool);

const SWITCHES: [Switch; 7] = [
    ("producerDeduplication", "producer_deduplication", |design| &mut design.producer_deduplication),
    ("duplicateDetection", "duplicate_detection", |design| &mut design.duplicate_detection),
    ("exactlyOnceSemantics", "exactly_once_semantics", |design| &mut design.exactly_once_semantics),
    ("consumerDeduplication", "consumer_deduplication", |design| &mut design.consumer_deduplication),
    ("atomicProcessing", "atomic_processing", |design| &mut design.atomic_processing),
    ("transactionSupport", "transaction_support", |design| &mut design.transaction_support),
    ("twoPhaseCommit", "two_phase_commit", |design| &mut design.two_phase_commit),
];

/// What the design in a file lacks.
pub(super) fn judge(file: &Path) -> anyhow::Result<Vec<Finding>> {
    let refused = |why: String| Usage(format!("{} is not a design: {why}", file.display()));
    let cannot_read = |error: std::io::Error| Usage(format!("cannot read {}: {error}", file.display()));
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(cannot_read)?;
    opened.take(DESIGN_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(cannot_read)?;
    if bytes.len() as u64 > DESIGN_BYTES_MAX {
        return Err(refused(format!("it has more than {DESIGN_BYTES_MAX} bytes")).into());
    }
    let text = String::from_utf8(bytes).map_err(|_| refused("it is no UTF-8".to_owned()))?;
    // A byte order mark, as some editors write it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let extension = file.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
    let entries = match extension.as_deref() {
        Some("json") => read_json(text),
        Some("toml") => read_toml(text),
        // What begins so is JSON in either case: its error is the one that helps.
        _ if text.trim_start().starts_with('{') => read_json(text),
        _ => read_toml(text),
    };
    let design = entries.and_then(Design::of).map_err(refused)?;
    Ok(design.findings())
}

impl Design {
    fn of(entries: Entries) -> Result<Self, String> {
        let mut design = Self::default();
        let mut given: Vec<&str> = Vec::new();
        for (key, value) in entries.0 {
            let Some((camel, _, place)) = SWITCHES.iter().find(|(camel, snake, _)| key == *camel || key == *snake)
            else {
                return Err(unknown(&key));
            };
            if given.contains(camel) {
                return Err(format!("{camel} is given twice"));
            }
            given.push(camel);
            let Value::Bool(is_on) = value else {
                return Err(format!("{camel} is {}, and has to be true or false", kind(&value)));
            };
            *place(&mut design) = is_on;
        }
        Ok(design)
    }

    fn findings(self) -> Vec<Finding> {
        let broken = RULES.iter().filter(|rule| (rule.is_broken)(self));
        let finding = |rule: &Rule| Finding {
            check: rule.name,
            severity: Severity::Fault,
            subject: rule.message.to_owned(),
            consequence: rule.consequence,
            remedy: rule.remedy.to_owned(),
        };
        broken.map(finding).collect()
    }
}

/// Keys and values as a file has them, the same key twice where it stands there twice.
#[derive(Debug)]
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("switches by their names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let value = map.next_value().map_err(|error| A::Error::custom(format!("{key:.60}: {error}")))?;
                    entries.push((key, value));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

fn read_json(text: &str) -> Result<Entries, String> {
    serde_json::from_str(text).map_err(|error| format!("as JSON: {error}"))
}

fn read_toml(text: &str) -> Result<Entries, String> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().map_or(0, |span| span.start);
        let line = 1 + text.bytes().take(before).filter(|byte| *byte == b'\n').count();
        format!("as TOML: line {line}: {}", error.message())
    })
}

fn unknown(key: &str) -> String {
    let names = SWITCHES.iter().flat_map(|(camel, snake, _)| [*camel, *snake]);
    let nearest = names
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN);
    let shown: String = key.chars().take(60).collect();
    if let Some((_, name)) = nearest {
        return format!("there is no switch {shown:?}: did you mean {name}?");
    }
    let all: Vec<&str> = SWITCHES.iter().map(|(camel, ..)| *camel).collect();
    format!("there is no switch {shown:?}: there are {}", all.join(", "))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}
