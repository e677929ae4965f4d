//! Style as tests: imports point down, SQL lives in `sql/`, files stay short, and the sample configuration works.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::fixture::TestDatabase;
use crate::probe::number;
use crate::programs::{Running, pgonce};

/// Modules from the ground up. Each may import those before its own row; `crate::Name` is the public face of the crate,
/// which only the uppermost may use.
const FLOORS: &[&[&str]] = &[
    &["error"],
    &["message"],
    &["schema", "connect"],
    &["migrate"],
    &["database", "sql"],
    &["lease"],
    &["produce", "relay", "consume", "topic"],
    &["webhook"],
    &["shutdown"],
    &["watch", "member", "rates", "checkpoints"],
    &["worker"],
    &["embedded"],
    &["cli"],
];
/// Words with which a statement begins.
const STATEMENTS: &[&str] = &[
    "select",
    "insert",
    "update",
    "delete",
    "merge",
    "with",
    "values",
    "create",
    "alter",
    "drop",
    "truncate",
    "begin",
    "commit",
    "rollback",
    "savepoint",
    "set",
    "show",
    "lock",
    "listen",
    "notify",
    "call",
    "do",
    "grant",
    "copy",
];
/// Text that begins like a statement and is none; the first is said to the postgres program in single-user mode, when
/// there is no server yet.
const NO_STATEMENTS: &[&str] = &["create database pgonce\\n", "set aside"];
const LINES_MAX: usize = 500;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below a directory with an extension.
fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory").map(|entry| entry.expect("readable").path()) {
            if entry.is_dir() {
                directories.push(entry);
            } else if entry.extension().is_some_and(|found| found == extension) {
                found.push(entry);
            }
        }
    }
    assert!(!found.is_empty(), "no files in {directory}");
    found.sort();
    found
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).expect("readable text")
}

/// A Rust file without its comments and without its unit tests, and the string literals in it.
struct Source {
    path: PathBuf,
    code: String,
    literals: Vec<String>,
}

impl Source {
    fn read(path: PathBuf) -> Self {
        let whole = text(&path);
        let tested = whole.split("#[cfg(test)]").next().unwrap_or_default();
        let (mut code, mut literals) = (String::new(), Vec::new());
        let mut rest = tested;
        while let Some(next) = rest.chars().next() {
            let length = if rest.starts_with("//") {
                rest.find('\n').unwrap_or(rest.len())
            } else if let Some((literal, length)) = literal(rest) {
                literals.push(literal.to_owned());
                code.push_str(&rest[..length]);
                length
            } else if rest.starts_with("'\"'") || rest.starts_with("'\\''") {
                rest.find("',").or_else(|| rest.find("')")).map_or(3, |at| at + 1).min(4)
            } else {
                code.push(next);
                next.len_utf8()
            };
            rest = &rest[length..];
        }
        Self { path, code, literals }
    }

    fn all() -> Vec<Self> {
        files("src", "rs").into_iter().map(Self::read).collect()
    }

    fn name(&self) -> String {
        self.path.strip_prefix(root()).expect("below the root").display().to_string()
    }

    /// The module below `src` that it belongs to.
    fn module(&self) -> String {
        let below = self.path.strip_prefix(root().join("src")).expect("below src");
        below.components().next().map(|first| first.as_os_str().to_string_lossy().replace(".rs", "")).expect("a name")
    }

    /// What stands behind `crate::`, also in braces.
    fn imports(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for (at, path) in self.code.match_indices("crate::") {
            let rest = &self.code[at + path.len()..];
            if let Some(list) = rest.strip_prefix('{') {
                let list = list.split("};").next().expect("a part");
                let mut depth = 0;
                for item in list.split_inclusive([',', '{', '}']) {
                    if depth == 0 {
                        found.insert(word(item.trim()));
                    }
                    depth += item.matches('{').count();
                    depth -= item.matches('}').count().min(depth);
                }
            } else {
                found.insert(word(rest));
            }
        }
        found.remove("");
        found
    }
}

fn word(text: &str) -> String {
    text.chars().take_while(|next| next.is_alphanumeric() || *next == '_').collect()
}

/// The string literal with which a text begins, and how long it is with its quotes.
fn literal(text: &str) -> Option<(&str, usize)> {
    if let Some(raw) = text.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        let inner = raw[hashes..].strip_prefix('"')?;
        let end = inner.find(&format!("\"{}", "#".repeat(hashes)))?;
        return Some((&inner[..end], 1 + hashes + 1 + end + 1 + hashes));
    }
    let inner = text.strip_prefix('"')?;
    let mut escaped = false;
    let end = inner.find(|next| {
        let ends = next == '"' && !escaped;
        escaped = next == '\\' && !escaped;
        ends
    })?;
    Some((&inner[..end], end + 2))
}

#[test]
fn imports_point_down() {
    let floor_of = |module: &str| FLOORS.iter().position(|floor| floor.contains(&module));
    for source in Source::all() {
        let module = source.module();
        if ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let floor = floor_of(&module).unwrap_or_else(|| panic!("{module} has no floor"));
        for import in source.imports() {
            match floor_of(&import) {
                Some(below) => assert!(
                    below < floor || import == module,
                    "{} imports {import}, which is not below {module}",
                    source.name()
                ),
                None => assert!(floor + 1 == FLOORS.len(), "{} imports crate::{import}", source.name()),
            }
        }
    }
}

#[test]
fn sql_lives_in_sql() {
    for source in Source::all() {
        for literal in &source.literals {
            let first = word(literal.trim_start()).to_lowercase();
            let is_statement = STATEMENTS.contains(&first.as_str()) && literal.trim_start().contains(' ');
            assert!(
                !is_statement || NO_STATEMENTS.contains(&literal.as_str()),
                "{}: a statement belongs into sql/: {literal:?}",
                source.name()
            );
        }
    }
}

#[test]
fn every_sql_file_is_used() {
    let mut included = BTreeSet::new();
    for source in Source::all() {
        for (at, start) in source.code.match_indices("include_str!(\"") {
            let path = source.code[at + start.len()..].split('"').next().expect("a path");
            let path = source.path.parent().expect("a directory").join(path);
            included.insert(path.canonicalize().unwrap_or_else(|_| panic!("{} is missing", path.display())));
        }
    }
    for file in files("sql", "sql") {
        let file = file.canonicalize().expect("it exists");
        assert!(included.contains(&file), "nothing includes {}", file.display());
    }
}

/// A database may be in an encoding that has few other signs, and comments are sent along.
#[test]
fn sql_is_ascii() {
    for file in files("sql", "sql") {
        assert!(text(&file).is_ascii(), "{}", file.display());
    }
}

/// `Schema::sql` puts another name only where it stands like this.
#[test]
fn the_schema_is_named_in_one_of_two_ways() {
    for file in files("sql", "sql") {
        for line in text(&file).lines() {
            let code = line.split("--").next().unwrap_or_default();
            for (at, name) in code.match_indices("pgonce") {
                let (before, after) = (&code[..at], &code[at + name.len()..]);
                let is_quoted = before.matches('\'').count() % 2 == 1;
                let is_replaced = after.starts_with('.') || before.ends_with("schema ");
                assert!(is_quoted || is_replaced || after.starts_with('_'), "{}: {line}", file.display());
            }
        }
    }
}

#[test]
fn nothing_is_unwrapped() {
    for source in Source::all() {
        assert!(!source.code.contains(".unwrap()"), "{}: say why it holds: expect(\"…\")", source.name());
    }
}

#[test]
fn files_stay_short() {
    for file in files("src", "rs").into_iter().chain(files("sql", "sql")) {
        let lines = text(&file).lines().count();
        assert!(lines <= LINES_MAX, "{} has {lines} lines", file.display());
    }
}

#[test]
fn statements_name_their_columns() {
    let directories = ["sql/statements", "sql/demo", "sql/node", "sql/scenario"];
    for file in directories.into_iter().flat_map(|directory| files(directory, "sql")) {
        assert!(!text(&file).contains("select *"), "{} maps columns by position", file.display());
    }
}

#[tokio::test]
async fn the_sample_configuration_runs() {
    let sample = root().join("config/pgonce.toml");
    let whole = text(&sample);
    // What is commented out is an example, and has to be right as well.
    let is_setting =
        |line: &str| line.starts_with(|first: char| first.is_ascii_lowercase() || first == '[' || first == '"');
    let mut uncommented = String::new();
    let mut inside_text = false;
    for line in whole.lines() {
        let bare = line.strip_prefix('#').unwrap_or(line);
        if inside_text || is_setting(bare) {
            uncommented.push_str(bare);
            uncommented.push('\n');
            inside_text ^= bare.matches("\"\"\"").count() % 2 == 1;
        }
    }
    let directory = tempfile::tempdir().expect("a directory");
    let full = directory.path().join("full.toml");
    std::fs::write(&full, uncommented).expect("written");
    for file in [sample, full] {
        let database = TestDatabase::new().await;
        let file = file.to_str().expect("text");
        let arguments = ["run", "--database-url", &database.url, "--config", file];
        let mut command = pgonce(&arguments);
        command.env("SHOP_WEBHOOK_SECRET", "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD");
        let mut daemon = Running::start(command.stdout(Stdio::null()).stderr(Stdio::piped()));
        daemon.until_logged("running");
        daemon.finish();
        let client = database.connect().await;
        assert!(number(&client, "select count(*) from pgonce.topics").await > 0);
        assert!(number(&client, "select count(*) from pgonce.consumers").await > 0);
    }
}
