//! Misuse: one clear message that names what is wrong and what to do, a code that says whose turn it is, and no trace.

use std::fs::File;
use std::process::{Output, Stdio};

use crate::fixture::TestDatabase;
use crate::probe::create;
use crate::programs::{outcome, pgonce};

/// Checks the form of a refusal: something on standard error, nothing on standard output, no trace, and all of the words.
#[track_caller]
fn assert_refused(output: &Output, code: i32, words: &[&str], what: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}\n{said}");
    assert!(output.stdout.is_empty(), "{what} printed something");
    assert!(said.starts_with("error: "), "{what}\n{said}");
    assert!(said.len() < 1_500, "{what} says too much\n{said}");
    for trace in ["panicked", "RUST_BACKTRACE", "stack backtrace", "Error {"] {
        assert!(!said.contains(trace), "{what}\n{said}");
    }
    for word in words {
        assert!(said.contains(word), "{what} does not say {word:?}\n{said}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let url = "postgresql://127.0.0.1:1/x";
    for (arguments, words) in [
        (&["--no-such-option"] as &[&str], &["--no-such-option", "--help"] as &[&str]),
        (&["no-such-command"], &["no-such-command", "--help"]),
        (&["statsu"], &["statsu", "status"]),
        (&["--log-format", "xml", "status"], &["xml", "json"]),
        (&["run"], &["nothing to run", "--config"]),
        (&["run", "--database-url", url], &["nothing to run", "--config"]),
        (&["run", "--embedded", "--word-count", "no pair"], &["no pair", "CONSUMER=TOPIC"]),
        (&["run", "--graceful-stop-seconds", "86401", "--relay", "t"], &["86401", "86400"]),
        (&["run", "--graceful-stop-seconds", "soon", "--relay", "t"], &["soon"]),
        (&["run", "--relay", "t"], &["no database", "DATABASE_URL"]),
        (&["relay"], &["nothing to run"]),
        (&["relay", "t"], &["no database"]),
        (&["consume"], &["nothing to run"]),
        (&["consume", "c"], &["--config"]),
        (&["consume", "--word-count", "c"], &["CONSUMER=TOPIC"]),
        (&["status"], &["no database", "--database-url"]),
        (&["status", "--check", "--watch"], &["--watch"]),
        (&["status", "--check", "--max-lag", "soon"], &["soon", "60s"]),
        (&["status", "--check", "--max-lag=-5s"], &["-5s", "60s"]),
        (&["status", "--database-url", url, "--database-url-file", "x"], &["--database-url-file"]),
        (&["init"], &["no database"]),
        (&["init", "--database-url", url, "--schema", "pg_x"], &["pg_x", "letters"]),
        (&["init", "--database-url", url, "--schema", "a b"], &["a b", "letters"]),
        (&["init", "--database-url", url, "--schema", ""], &["letters"]),
        (&["topic"], &["topic"]),
        (&["topic", "create"], &["<TOPIC>"]),
        (&["topic", "create", "t", "--partitions", "many"], &["many"]),
        (&["topic", "delete", "t"], &["--yes"]),
        (&["topic", "purge", "t"], &["--yes"]),
        (&["consumer", "create", "c", "--topic", "t", "--start-at", "never"], &["never", "earliest"]),
        (&["consumer", "create", "c", "--start-at", "latest"], &["--topic"]),
        (&["consumer", "create", "c", "--topic", "t", "--failure-policy", "drop"], &["drop", "park_key"]),
        (&["consumer", "create", "c", "--failure-policy", "skip"], &["--topic"]),
        (&["consumer", "create", "c", "--topic", "t", "--attempts-max", "0"], &["--attempts-max", "1..=1000"]),
        (&["consumer", "create", "c", "--topic", "t", "--backoff-max-ms", "86400001"], &["86400001"]),
        (&["consumer", "delete", "c"], &["--yes"]),
        (&["message", "show"], &["<ID>"]),
        (&["dead-letter", "show", "first"], &["first"]),
        (&["dead-letter", "list", "--limit", "10001"], &["10001", "1..=10000"]),
        (&["dead-letter", "list", "--older-than", "soon"], &["soon", "60s"]),
        (&["dead-letter", "list", "--state", "lost"], &["lost", "replayed"]),
        (&["dead-letter", "replay", "--yes"], &["ids", "--consumer", "--all"]),
        (&["dead-letter", "discard"], &["ids", "--consumer", "--all"]),
        (&["dead-letter", "replay", "1", "--consumer", "c"], &["--consumer", "cannot be used"]),
        (&["dead-letter", "replay", "1", "--all"], &["--all", "cannot be used"]),
        (&["dead-letter", "discard", "--all", "--key", "k"], &["--key", "cannot be used"]),
        (&["message", "cancel", "m"], &["--topic"]),
        (&["enqueue"], &["<TOPIC>"]),
        (&["enqueue", "t"], &["no database"]),
        (&["completions", "csh"], &["csh", "bash"]),
        (&["demo", "--words", "0"], &["--words", "1"]),
        (&["demo", "--workers", "17"], &["17", "16"]),
        (&["scenario"], &["producer-retry", "delivery-modes"]),
        (&["scenario", "producer-crash"], &["producer-crash", "producer-retry"]),
        (&["scenario", "delivery-modes", "--naive"], &["--naive"]),
    ] {
        let output = outcome(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.starts_with("error: ") {
            assert_refused(&output, 2, words, &format!("{arguments:?}"));
        } else {
            // A command without its subcommand shows its help.
            assert_eq!(output.status.code(), Some(2), "{arguments:?}");
            assert!(said.contains("Usage: "), "{said}");
        }
    }
}

#[test]
fn a_bad_configuration_is_refused_with_the_place_or_the_nearest_key() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("pgonce.toml");
    for (text, words) in [
        ("[[topic]", &["line 1"] as &[&str]),
        ("[[topic]]\nname = 'a'\npartitons = 3", &["partitons", "did you mean partitions?", "line 3"]),
        ("[[topic]]\nname = 3", &["string", "line 2"]),
        ("[[topic]]", &["name"]),
        ("gracefull_stop_seconds = 3", &["did you mean graceful_stop_seconds?"]),
        ("graceful_stop_seconds = -3", &["line 1"]),
        ("graceful_stop_seconds = 86401", &["86401", "86400"]),
        ("[[topic]]\nname = 't'\n[[topic]]\nname = 't'", &["twice"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'sqll'", &["sqll", "word_count"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'sql'", &["\"c\"", "kind = \"sql\" needs statements"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'sql'\nstatements = '-- nothing'", &["only comments"]),
        ("[[consumer]]\nname = ''\ntopic = 't'\nkind = 'word_count'", &["1 to 255"]),
        ("[topic]\nname = 't'", &["line 1", "write [[topic]]"]),
        ("[[topic]]\nname = ''", &["1 to 255"]),
        ("[[topic]]\nname = 't'\npartitions = 0", &["\"t\"", "partitions of 0", "1024"]),
        ("[[topic]]\nname = 't'\npayload_bytes_max = 67108865", &["67108864"]),
        ("schema = 'pg_x'", &["pg_x", "letters"]),
        ("", &["has no [[topic]] and no [[consumer]]"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'word_count'\nstatements = ''", &["statements"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'word_count'\nloops = 0", &["loops", "64"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'word_count'\nstart_at = 'now'", &["now", "latest"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'word_count'\nfailure_policy = 'drop'", &["drop", "park_key"]),
        ("[[consumer]]\nname = 'c'\ntopic = 't'\nkind = 'word_count'\nattempts_max = 1001", &["attempts_max", "1000"]),
    ] {
        std::fs::write(&file, text).expect("written");
        let arguments =
            ["run", "--database-url", "postgresql://127.0.0.1:1/x", "--config", file.to_str().expect("text")];
        assert_refused(&outcome(&arguments), 2, &[words, &["pgonce.toml"]].concat(), text);
    }
    let missing = directory.path().join("missing.toml");
    let arguments =
        ["run", "--database-url", "postgresql://127.0.0.1:1/x", "--config", missing.to_str().expect("text")];
    assert_refused(&outcome(&arguments), 1, &["missing.toml", "No such file"], "a missing file");
}

#[tokio::test]
async fn a_database_that_does_not_serve_is_said_with_a_hint() {
    let empty = TestDatabase::empty().await;
    for (url, words) in [
        (empty.url.as_str(), &["pgonce init"] as &[&str]),
        ("nonsense", &["postgresql://"]),
        ("mysql://user:secret@127.0.0.1/x", &["mysql", "postgresql://"]),
        ("postgresql://user:se@cret@127.0.0.1/x", &["%40"]),
        ("postgresql:///x?host=/nowhere", &["/nowhere/.s.PGSQL.5432", "hint: "]),
        ("postgresql://127.0.0.1:1/x", &["database \"x\" at 127.0.0.1:1", "hint: "]),
        ("postgresql://user:secret@127.0.0.1:1/x", &["database \"x\" at 127.0.0.1:1", "hint: "]),
    ] {
        for arguments in [
            &["run", "--word-count", "counter=words", "--database-url", url] as &[&str],
            &["status", "--database-url", url],
            &["topic", "list", "--database-url", url],
            &["enqueue", "t", "--database-url", url],
        ] {
            let output = outcome(arguments);
            assert_refused(&output, 1, words, &format!("{arguments:?}"));
            assert!(!String::from_utf8_lossy(&output.stderr).contains("cret"), "the password is printed");
        }
    }
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, "t", 1, "c").await;
    for (arguments, words) in [
        (&["topic", "show", "none"] as &[&str], &["\"none\"", "topic list"] as &[&str]),
        (&["topic", "pause", "none"], &["'none'", "pgonce topic create", "pgonce topic list"]),
        (&["topic", "purge", "none", "--yes"], &["'none'"]),
        (&["topic", "delete", "t", "--yes"], &["'c'", "pgonce consumer delete"]),
        (&["topic", "create", "t", "--partitions", "2"], &["partitions"]),
        (&["topic", "create", "u", "--partitions", "1025"], &["1025", "1024"]),
        (&["topic", "create", ""], &["1 to 255 bytes"]),
        (&["consumer", "show", "none"], &["\"none\"", "consumer list"]),
        (&["consumer", "resume", "none"], &["'none'", "pgonce consumer list"]),
        (&["consumer", "create", "d", "--topic", "none"], &["'none'"]),
        (&["consumer", "create", "c"], &["bound"]),
        (&["consumer", "create", "c", "--topic", "t", "--failure-policy", "skip"], &["policy", "park_key"]),
        (
            &["consumer", "create", "c", "--topic", "t", "--backoff-min-ms", "2", "--backoff-max-ms", "1"],
            &["backoff_min_ms"],
        ),
        (&["message", "show", "none"], &["\"none\""]),
        (&["dead-letter", "show", "17"], &["17", "dead-letter list"]),
        (&["dead-letter", "replay", "17", "--yes"], &["17", "dead-letter list"]),
        (&["message", "cancel", "none", "--topic", "t"], &["\"none\""]),
        (&["message", "cancel", "m", "--topic", "none"], &["'none'"]),
        (&["consume", "--word-count", "d=none"], &["'none'"]),
        (&["enqueue", "t", "/"], &["cannot read /", "directory"]),
        (&["enqueue", "t", "/nowhere"], &["cannot read /nowhere"]),
    ] {
        let output = outcome(&[arguments, &["--database-url", &database.url]].concat());
        assert_refused(&output, 1, words, &format!("{arguments:?}"));
        assert!(!String::from_utf8_lossy(&output.stderr).contains("until then"), "{arguments:?} did nothing before");
    }
}

#[tokio::test]
async fn a_read_only_server_and_a_full_disk_are_said() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, "t", 1, "c").await;
    let read_only = format!("{}{}options=-cdefault_transaction_read_only%3Don", database.url, separator(&database.url));
    let output = outcome(&["topic", "create", "u", "--database-url", &read_only]);
    assert_refused(&output, 1, &["read-only", "target_session_attrs=read-write"], "a read-only server");

    let full = File::options().write(true).open("/dev/full");
    let Ok(full) = full else { return eprintln!("left out: this system has no /dev/full") };
    let mut command = pgonce(&["status", "--database-url", &database.url]);
    let child = command.stdout(full).stderr(Stdio::piped()).spawn().expect("started");
    let output = child.wait_with_output().expect("it ends");
    assert_refused(&output, 1, &["No space left"], "a full disk");
}

/// What comes between a URL and one more parameter.
fn separator(url: &str) -> &'static str {
    if url.contains('?') { "&" } else { "?" }
}
