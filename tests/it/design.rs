//! Designs on paper, and what the doctor says of them.

use std::path::Path;

use serde_json::Value;

use crate::doctor::{CAN, findings};
use crate::programs::outcome;

/// What a design lacks, told in another way than the program does: by numbers of what there is.
fn lacks(switches: [bool; 7]) -> Vec<&'static str> {
    let [producer, detection, semantics, consumer, atomic, transactions, two_phases] = switches;
    let number = |of: &[bool]| of.iter().filter(|is_on| **is_on).count();
    let mut lines = Vec::new();
    let mut say_unless = |enough: bool, line| {
        if !enough {
            lines.push(line);
        }
    };
    say_unless(number(&[producer, detection, semantics]) >= 1, "Producer must be idempotent");
    say_unless(producer, "Producer needs deduplication");
    say_unless(number(&[consumer, atomic]) >= 1, "Consumer must be idempotent");
    say_unless(consumer, "Consumer needs deduplication");
    say_unless(atomic, "Consumer needs atomic processing");
    say_unless(number(&[transactions, two_phases]) >= 1, "Need transaction support or 2PC");
    say_unless(consumer || number(&[detection, semantics]) == 2, "Queue must detect duplicates");
    lines
}

const CAMEL: [&str; 7] = [
    "producerDeduplication",
    "duplicateDetection",
    "exactlyOnceSemantics",
    "consumerDeduplication",
    "atomicProcessing",
    "transactionSupport",
    "twoPhaseCommit",
];
const SNAKE: [&str; 7] = [
    "producer_deduplication",
    "duplicate_detection",
    "exactly_once_semantics",
    "consumer_deduplication",
    "atomic_processing",
    "transaction_support",
    "two_phase_commit",
];

/// What the doctor says of a design in a file: exit code, standard output and standard error.
fn judge(file: &Path, more: &[&str]) -> (Option<i32>, String, String) {
    let output = outcome(&[&["doctor", "--design", file.to_str().expect("text")], more].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn every_design_is_judged_by_the_rules() {
    let directory = tempfile::tempdir().expect("a directory");
    for bits in 0..128_u32 {
        let switches = std::array::from_fn(|nth| bits >> nth & 1 == 1);
        let names = if bits.count_ones() % 2 == 0 { CAMEL } else { SNAKE };
        // One that is off is left out of every other file.
        let given = || (0..7).filter(|&nth| switches[nth] || bits % 3 > 0).map(|nth| (names[nth], switches[nth]));
        let object = given().map(|(name, is_on)| (name.to_owned(), Value::Bool(is_on)));
        let json = Value::Object(object.collect()).to_string();
        let toml = given().map(|(name, is_on)| format!("{name} = {is_on}")).collect::<Vec<_>>().join("\n");
        let expected = lacks(switches);
        let said = if expected.is_empty() { format!("{CAN}\n") } else { format!("{}\n", expected.join("\n")) };
        for (name, text) in
            [("design.json", &json), ("design.toml", &toml), ("design", if bits % 2 == 0 { &json } else { &toml })]
        {
            let file = directory.path().join(name);
            std::fs::write(&file, text).expect("written");
            let code = Some(i32::from(!expected.is_empty()));
            assert_eq!(judge(&file, &[]), (code, said.clone(), String::new()), "{name}: {text}");
        }
        // Some editors write a byte order mark.
        let file = directory.path().join("design.json");
        std::fs::write(&file, format!("\u{feff}{json}")).expect("written");
        let (_, report, _) = judge(&file, &["--json"]);
        let report: Value = serde_json::from_str(&report).expect("JSON");
        let told: Vec<&str> =
            findings(&report).iter().map(|finding| finding["subject"].as_str().expect("text")).collect();
        assert_eq!(told, expected);
        assert_eq!(report["can_achieve_exactly_once"], expected.is_empty());
    }
}

#[test]
fn a_file_that_is_no_design_is_refused_by_what_is_wrong_with_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let deep = format!("{{\"twoPhaseCommit\": {}", "[".repeat(60_000));
    let large = format!("{{{}}}", " ".repeat(70_000));
    for (name, text, why) in [
        ("a.json", &b""[..], "as JSON"),
        ("a.json", b"[true]", "switches by their names"),
        ("a.json", b"true", "switches by their names"),
        ("a.json", b"{\"twoPhaseCommit\": true", "as JSON"),
        ("a.json", b"{\"twoPhaseCommit\": true} {}", "as JSON"),
        ("a.json", b"twoPhaseCommit = true", "as JSON"),
        ("a.toml", b"{\"twoPhaseCommit\": true}", "as TOML"),
        ("a.toml", b"\n\ntwoPhaseCommit = yes", "line 3"),
        ("a.json", deep.as_bytes(), "recursion limit"),
        ("a.json", large.as_bytes(), "more than 65536 bytes"),
        ("a.json", b"\xff\xfe", "no UTF-8"),
        ("a.json", b"{\"twoPhaseCommmit\": true}", "did you mean twoPhaseCommit?"),
        ("a.toml", b"two_phase_comit = true", "did you mean two_phase_commit?"),
        ("a.json", b"{\"xyzzy\": true}", "there are producerDeduplication, "),
        ("a.json", b"{\"twoPhaseCommit\": \"true\"}", "twoPhaseCommit is a text"),
        ("a.json", b"{\"twoPhaseCommit\": null}", "twoPhaseCommit is null"),
        ("a.json", b"{\"atomic_processing\": 1}", "atomicProcessing is a number"),
        ("a.json", b"{\"atomicProcessing\": {\"a\": []}}", "atomicProcessing is a table"),
        ("a.toml", b"atomicProcessing = 1979-05-27", "atomicProcessing is a table"),
        ("a.toml", b"atomicProcessing = nan", "atomicProcessing is "),
        ("a.toml", b"[producer]\ndeduplication = true", "did you mean producer"),
        ("a.json", b"{\"twoPhaseCommit\": true, \"twoPhaseCommit\": false}", "twoPhaseCommit is given twice"),
        ("a.json", b"{\"twoPhaseCommit\": true, \"two_phase_commit\": true}", "twoPhaseCommit is given twice"),
        ("a.toml", b"twoPhaseCommit = true\ntwoPhaseCommit = true", "duplicate key"),
    ] {
        let file = directory.path().join(name);
        std::fs::write(&file, text).expect("written");
        let (code, said, error) = judge(&file, &[]);
        let shown = String::from_utf8_lossy(&text[..text.len().min(80)]).into_owned();
        assert_eq!((code, said), (Some(2), String::new()), "{shown}: {error}");
        assert!(error.contains(why) && error.contains(name), "{shown}: {error}");
        assert!(error.len() < 1_000, "{shown}: {} bytes", error.len());
    }
    for missing in [directory.path().join("none.json"), directory.path().to_owned()] {
        let (code, _, error) = judge(&missing, &[]);
        assert!(code == Some(2) && error.contains("cannot read"), "{error}");
    }
}
