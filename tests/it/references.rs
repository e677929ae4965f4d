//! The reference of SQL lists what there is, and nothing else; and no document names what is not there. (That of the
//! configuration is checked where the keys and flags are, in `src/cli/config/mod.rs`.)

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use crate::documents::{documents, root, text};
use crate::fixture::TestDatabase;
use crate::probe::texts;

/// Characters of which names are made.
const NAME: &str = "abcdefghijklmnopqrstuvwxyz_0123456789";

/// The rows of the tables of a Markdown text that begin with something in backquotes: their cells.
fn rows(markdown: &str) -> Vec<Vec<String>> {
    let is_row = |line: &&str| line.starts_with("| `");
    let cells = |line: &'_ str| -> Vec<String> {
        line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
    };
    markdown.lines().filter(is_row).map(cells).collect()
}

/// What stands between backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// A name at the beginning of a text.
fn name(text: &str) -> &str {
    let end = text.find(|next| !NAME.contains(next)).unwrap_or(text.len());
    &text[..end]
}

/// The part of a Markdown text below a heading, up to the next one.
fn section<'a>(markdown: &'a str, heading: &str) -> &'a str {
    let start = markdown.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no section {heading}"));
    let rest = &markdown[start + 4..];
    &rest[..rest.find("\n## ").unwrap_or(rest.len())]
}

/// What a query answers, a text and a list of texts a row.
async fn lists(client: &Client, query: &str) -> BTreeMap<String, Vec<String>> {
    let rows = client.query(query, &[]).await.expect("the query succeeds");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test]
async fn the_reference_lists_the_functions_as_they_are() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let functions = "from pg_proc p where p.pronamespace = 'pgonce'::regnamespace";
    let arguments =
        lists(&client, &format!("select p.proname::text, coalesce(p.proargnames, '{{}}') {functions}")).await;
    let results = lists(
        &client,
        &format!(
            "select p.proname::text, array(
               select a.attname::text from pg_type t join pg_attribute a on a.attrelid = t.typrelid
               where t.oid = p.prorettype and a.attnum > 0 and not a.attisdropped order by a.attnum)
             {functions}"
        ),
    )
    .await;
    let public = texts(
        &client,
        &format!("select p.proname::text {functions} and obj_description(p.oid, 'pg_proc') not like 'Internal:%'"),
    )
    .await;
    let reference = text("docs/sql.md");
    let mut listed = BTreeSet::new();
    for part in ["Producing", "Relaying", "Consuming", "Checkpoints", "Setting up", "Numbers"] {
        for row in rows(section(&reference, part)) {
            let (call, answer) = row[0].split_once('→').unwrap_or((&row[0], ""));
            for call in quoted(call) {
                let function = name(call);
                let known = arguments.get(function).unwrap_or_else(|| panic!("there is no function {function}"));
                if let Some(shown) = call[function.len()..].strip_prefix('(').and_then(|rest| rest.strip_suffix(')')) {
                    let shown: Vec<&str> = shown.split(", ").map(name).filter(|name| !name.is_empty()).collect();
                    assert_eq!(&shown, known, "arguments of {function}");
                }
                if let Some(shown) = quoted(answer).first() {
                    let shown: Vec<&str> = shown.split(", ").collect();
                    assert_eq!(&shown, &results[function], "result of {function}");
                }
                listed.insert(function.to_owned());
            }
        }
    }
    for function in public {
        assert!(listed.contains(&function), "docs/sql.md does not list {function}");
    }
}

#[tokio::test]
async fn the_reference_lists_views_and_tables_with_their_columns() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let reference = text("docs/sql.md");
    for (part, kind) in [("Views", "v"), ("Tables", "r")] {
        let there = lists(
            &client,
            &format!(
                "select c.relname::text, array(
                   select a.attname::text from pg_attribute a
                   where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped order by a.attnum)
                 from pg_class c where c.relnamespace = 'pgonce'::regnamespace and c.relkind = '{kind}'"
            ),
        )
        .await;
        let mut shown = BTreeMap::new();
        for row in rows(section(&reference, part)) {
            let columns = quoted(&row[1])[0].split(", ").map(str::to_owned).collect();
            shown.insert(quoted(&row[0])[0].to_owned(), columns);
        }
        assert_eq!(shown, there, "{part}");
    }
}

#[test]
fn the_reference_lists_the_errors_that_are_raised() {
    let mut raised = BTreeSet::new();
    for entry in std::fs::read_dir(root().join("sql/routines")).expect("a directory") {
        let routines = std::fs::read_to_string(entry.expect("readable").path()).expect("text");
        for (at, start) in routines.match_indices("errcode = '") {
            raised.insert(routines[at + start.len()..].split('\'').next().expect("a part").to_owned());
        }
    }
    // A condition by its name is raised to be caught within pgonce.
    raised.retain(|code| !code.contains('_'));
    assert!(raised.len() > 10, "{raised:?}");
    // PostgreSQL's own, for a grant that is missing.
    raised.insert("42501".to_owned());
    let reference = text("docs/sql.md");
    let shown: BTreeSet<String> =
        rows(section(&reference, "Errors")).iter().map(|row| quoted(&row[0])[0].to_owned()).collect();
    assert_eq!(shown, raised);
}

#[tokio::test]
async fn what_the_documents_name_is_there() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let there: BTreeSet<String> = texts(
        &client,
        "select relname::text from pg_class where relnamespace = 'pgonce'::regnamespace
         union select proname::text from pg_proc where pronamespace = 'pgonce'::regnamespace",
    )
    .await
    .into_iter()
    .collect();
    for document in documents() {
        let markdown = text(&document);
        for (at, start) in markdown.match_indices("pgonce.") {
            let named = name(&markdown[at + start.len()..]);
            let is_file = ["toml", "service", "log", "sql"].contains(&named) || named.is_empty();
            assert!(is_file || there.contains(named), "{document}: there is no pgonce.{named}");
        }
    }
}
