//! What the documents show works: their commands and their SQL run in their order, and print what they say.

use std::fmt::Write;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pgonce::embedded::{Options, PrivateServer};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::fixture::TestDatabase;
use crate::probe::create;
use crate::programs::{Running, postgresql};

/// The database of an imaginary reader, in place of which the test's is taken.
const URL_OF_THE_READER: &str = "postgresql://app@db/app";
/// A line by which the output of one block is told from that of the next.
const MARK: &str = "== the next block ==";
/// Longest document that is still read.
const LINES_MAX: usize = 300;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The README and everything in `docs/` but the decisions.
pub(crate) fn documents() -> Vec<String> {
    let mut found = vec!["README.md".to_owned()];
    for entry in std::fs::read_dir(root().join("docs")).expect("a directory") {
        let path = entry.expect("readable").path();
        if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path.strip_prefix(root()).expect("below the root").display().to_string());
        }
    }
    found.sort();
    found
}

/// A fenced block: what stands behind the fence, and what is in it.
struct Block {
    info: String,
    text: String,
}

impl Block {
    fn is(&self, language: &str) -> bool {
        self.info == language
    }
}

fn blocks(markdown: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut is_inside = false;
    for line in markdown.lines() {
        if let Some(info) = line.trim_start().strip_prefix("```") {
            if !is_inside {
                found.push(Block { info: info.trim().to_owned(), text: String::new() });
            }
            is_inside = !is_inside;
        } else if is_inside {
            let block = found.last_mut().expect("one was begun");
            block.text.push_str(line);
            block.text.push('\n');
        }
    }
    assert!(!is_inside, "a block without an end");
    found
}

/// The blocks of SQL in the README, in its order.
pub(crate) fn sql_of_the_readme() -> Vec<String> {
    let sql: Vec<String> =
        blocks(&text("README.md")).into_iter().filter(|block| block.is("sql")).map(|block| block.text).collect();
    assert!(!sql.is_empty(), "the README shows no SQL");
    sql
}

/// Whether a text reads as shown, where `…` stands for anything.
fn reads_as(said: &str, shown: &str) -> bool {
    let (said, shown) = (without_trailing_space(said), without_trailing_space(shown));
    let mut parts = shown.split('…');
    let Some(mut rest) = said.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn without_trailing_space(text: &str) -> String {
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n").trim_matches('\n').to_owned()
}

#[test]
fn what_is_left_out_stands_for_anything() {
    for (said, shown, is_alike) in [
        ("a  \nb\n", "a\nb", true),
        ("a 17 s\nb", "a … s\nb", true),
        ("a\nb\nc", "…c", true),
        ("a\nb\nc", "a\n…", true),
        ("a 17", "a 18", false),
        ("a 17 s", "a … m", false),
        ("aba", "a…ba…a", false),
        ("a\nb", "a", false),
    ] {
        assert_eq!(reads_as(said, shown), is_alike, "{said:?} and {shown:?}");
    }
}

/// Ends whatever a guide left running.
struct Group(Pid);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

/// The blocks of a document as one script, so that each finds what those before it left, and what each block should print.
fn script(document: &str) -> (String, Vec<(String, Option<String>)>) {
    let mut script = "set -eu\n".to_owned();
    let mut steps = Vec::new();
    let all = blocks(&text(document));
    for (nth, block) in all.iter().enumerate() {
        let commands = block.text.replace(URL_OF_THE_READER, "\"$DATABASE_URL\"");
        if block.is("sh") {
            script.push_str(&commands);
        } else if block.is("sql") {
            write!(script, "psql -X -q -v ON_ERROR_STOP=1 \"$DATABASE_URL\" <<'END OF SQL'\n{commands}END OF SQL\n")
                .expect("into memory");
        } else {
            continue;
        }
        writeln!(script, "echo '{MARK}'").expect("into memory");
        let shown = all.get(nth + 1).filter(|next| next.is("text")).map(|next| next.text.clone());
        steps.push((block.text.clone(), shown));
    }
    (script, steps)
}

/// Does what a document says, in a directory in which only `config` is: runs its blocks `sh` and `sql` in their order, and
/// compares what each prints with the block `text` behind it. Blocks like `sh,no_run` need something that a test has not.
/// Blocks the thread.
fn follow(document: &str, url: &str) {
    let Some(psql) = postgresql("psql") else {
        eprintln!("SKIPPED: {document}: there is no psql on this machine");
        return;
    };
    let (script, steps) = script(document);
    assert!(!steps.is_empty(), "{document} shows nothing that can be run");
    let directory = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(root().join("config"), directory.path().join("config")).expect("linked");
    let program = Path::new(env!("CARGO_BIN_EXE_pgonce"));
    let mut path: Vec<PathBuf> =
        [program, &psql].map(|program| program.parent().expect("a directory").to_owned()).into();
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let (said, complaints) = (directory.path().join("said"), directory.path().join("complaints"));
    let mut command = Command::new("sh");
    command.args(["-c", &script]).current_dir(&directory).stdin(Stdio::null()).process_group(0);
    command.env("PATH", std::env::join_paths(path).expect("no colons")).env("DATABASE_URL", url).env_remove("RUST_LOG");
    command.stdout(File::create(&said).expect("created")).stderr(File::create(&complaints).expect("created"));
    let mut shell = Running::start(&mut command);
    let _group = Group(shell.pid());
    let status = shell.end();

    let read = |file: &Path| String::from_utf8_lossy(&std::fs::read(file).expect("read")).into_owned();
    let (said, complaints) = (read(&said), read(&complaints));
    let mark = format!("{MARK}\n");
    let mut outputs = said.split_terminator(&mark);
    for (commands, shown) in steps {
        let Some(output) = outputs.next() else { panic!("{document}: {status}\n{commands}\n{complaints}") };
        if let Some(shown) = shown {
            assert!(
                reads_as(output, &shown),
                "{document}:\n{commands}\nprints\n{output}\nand not\n{shown}\n{complaints}"
            );
        }
    }
    assert!(status.success(), "{document}: {status}\n{said}\n{complaints}");
}

/// Follows a guide from an empty database to its end.
async fn follow_guide(document: &'static str) {
    let database = TestDatabase::empty().await;
    let url = database.url.clone();
    tokio::task::spawn_blocking(move || follow(document, &url)).await.expect("no panic");
}

#[tokio::test]
async fn the_guide_to_sql_can_be_followed() {
    follow_guide("docs/getting-started-sql.md").await;
}

#[tokio::test]
async fn the_guide_to_the_daemon_can_be_followed() {
    follow_guide("docs/getting-started-daemon.md").await;
}

#[tokio::test]
async fn the_guide_to_webhooks_can_be_followed() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED: docs/webhooks.md: there is no Python on this machine");
        return;
    }
    follow_guide("docs/webhooks.md").await;
}

#[tokio::test]
async fn the_scenarios_are_played_as_shown() {
    follow_guide("docs/scenarios.md").await;
}

#[tokio::test]
async fn the_page_of_the_node_can_be_followed() {
    follow_guide("docs/node.md").await;
}

#[tokio::test]
async fn what_is_said_about_operating_can_be_run() {
    let database = TestDatabase::new().await;
    create(&database.connect().await, "orders", 1, "billing").await;
    let url = database.url.clone();
    tokio::task::spawn_blocking(move || follow("docs/operating.md", &url)).await.expect("no panic");
}

#[tokio::test]
async fn the_readme_runs_in_its_order() {
    // On a server of its own: it creates roles, which all databases of a server share.
    let run = || {
        let server = PrivateServer::start(&Options::default()).expect("a server starts");
        follow("README.md", &server.url("pgonce"));
        server.stop().expect("it stops");
    };
    tokio::task::spawn_blocking(run).await.expect("no panic");
}

#[test]
fn documents_stay_short_and_their_links_lead_somewhere() {
    for document in documents() {
        let markdown = text(&document);
        assert!(markdown.lines().count() <= LINES_MAX, "{document} is too long");
        let directory = root().join(&document);
        let directory = directory.parent().expect("a directory");
        for (at, start) in markdown.match_indices("](") {
            let link = markdown[at + start.len()..].split(')').next().expect("a part");
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            if file.contains("://") {
                continue;
            }
            let target = if file.is_empty() { root().join(&document) } else { directory.join(file) };
            assert!(target.exists(), "{document}: {link} leads nowhere");
            if !anchor.is_empty() {
                let heads = std::fs::read_to_string(&target).expect("text");
                let is_there = heads.lines().any(|line| line.starts_with('#') && anchor_of(line) == anchor);
                assert!(is_there, "{document}: {link} leads nowhere");
            }
        }
    }
}

#[test]
fn the_program_is_installed_with_the_dependencies_that_were_tested() {
    let mut count = 0;
    for document in documents() {
        for line in text(&document).lines().filter(|line| line.contains("cargo install")) {
            assert!(line.contains("cargo install --locked"), "{document}: {line}");
            count += 1;
        }
    }
    assert!(count > 2, "only {count} installations");
}

/// The anchor that GitHub gives a heading.
fn anchor_of(heading: &str) -> String {
    let plain = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
    plain.chars().filter(|next| next.is_alphanumeric() || ['-', '_'].contains(next)).collect()
}
