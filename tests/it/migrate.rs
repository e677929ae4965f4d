//! `pgonce migrate`: whatever tool runs the SQL that it prints gets what it would have installed itself.

use std::io::Write;
use std::process::{Command, Stdio};

use pgonce::{Migration, SCHEMA_VERSION, SCHEMA_VERSION_MAX, Schema, migrate, migration_sql};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{number, texts};
use crate::programs::{outcome, postgresql};

/// Everything in a schema, a line an object, with definition and comment; and the version that is recorded.
pub(crate) async fn description(client: &Client, schema: &str) -> Vec<String> {
    // Names are spelled out for as long as nothing is in the path.
    client.batch_execute("begin; set local search_path = pg_catalog").await.expect("a transaction");
    let lines = client.query(include_str!("description.sql"), &[&schema]).await.expect("described");
    let version = format!("select to_jsonb(v) - 'installed_at' from {schema:?}.schema_versions v order by version");
    let versions = client.query(&version, &[]).await.expect("versions");
    client.batch_execute("commit").await.expect("read");
    let mut lines: Vec<String> = lines.iter().map(|line| line.get(0)).collect();
    lines.extend(versions.iter().map(|row| row.get::<_, serde_json::Value>(0).to_string()));
    lines
}

fn said(arguments: &[&str]) -> String {
    let output = outcome(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

async fn installed(schema: &str) -> Vec<String> {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    migrate(&mut client, &Schema::new(schema).expect("a good name")).await.expect("installed");
    description(&client, schema).await
}

/// Runs statements in one transaction, as a person would.
fn psql(url: &str, statements: &str) -> Option<()> {
    let mut psql = Command::new(postgresql("psql")?)
        .args(["--no-psqlrc", "--quiet", "--single-transaction", "--set", "ON_ERROR_STOP=1", url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("psql can be started");
    psql.stdin.take().expect("it is piped").write_all(statements.as_bytes()).expect("psql reads");
    let output = psql.wait_with_output().expect("psql ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.stdout, output.stderr), (Vec::new(), Vec::new()), "it runs silently");
    Some(())
}

#[tokio::test]
async fn the_printed_sql_leaves_what_init_leaves() {
    for schema in ["pgonce", "Events"] {
        let expected = installed(schema).await;
        assert!(expected.len() > 150, "{} objects", expected.len());
        let printed = said(&["migrate", "--print", "--schema", schema]);

        let database = TestDatabase::empty().await;
        let mut client = database.connect().await;
        client.batch_execute(&printed).await.expect("it runs as one string");
        assert_eq!(description(&client, schema).await, expected);
        let name = Schema::new(schema).expect("a good name");
        assert_eq!(migrate(&mut client, &name).await.expect("there already"), Migration::Current);

        let database = TestDatabase::empty().await;
        if psql(&database.url, &printed).is_none() {
            println!("left out: there is no psql on this machine");
        } else {
            assert_eq!(description(&database.connect().await, schema).await, expected);
        }
    }
}

#[tokio::test]
async fn the_printed_sql_upgrades_what_is_there() {
    let expected = installed("pgonce").await;
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let older = "
        drop function pgonce.cancel;
        create function pgonce.cancel(topic text, message_id text) returns boolean return true;
        update pgonce.schema_versions set program = '0.0.1', routines_digest = 'another'";
    client.batch_execute(older).await.expect("changed");
    let printed = said(&["migrate", "--print", "--from", &SCHEMA_VERSION.to_string()]);
    client.batch_execute(&printed).await.expect("it runs as one string");
    assert_eq!(description(&client, "pgonce").await, expected);
}

#[tokio::test]
async fn the_printed_sql_refuses_a_version_that_it_is_not_for() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let next = format!("update pgonce.schema_versions set version = {SCHEMA_VERSION_MAX}");
    client.batch_execute(&next).await.expect("changed");
    let before = description(&client, "pgonce").await;
    let error = client.batch_execute(&migration_sql(&Schema::default(), SCHEMA_VERSION)).await.expect_err("refused");
    let error = error.as_db_error().expect("the server's");
    assert!(error.message().contains(&format!("has version {SCHEMA_VERSION_MAX}")), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains(&format!("--from {SCHEMA_VERSION_MAX}"))), "{error:?}");
    client.batch_execute(&migration_sql(&Schema::default(), 0)).await.expect_err("there already");
    assert_eq!(description(&client, "pgonce").await, before);
}

#[tokio::test]
async fn the_printed_sql_leaves_the_settings_of_its_transaction() {
    let database = TestDatabase::empty().await;
    let client = database.connect().await;
    let settings = "select concat_ws(' ', current_setting('search_path'), current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout'),
                      current_setting('client_min_messages'), current_setting('role'), current_user, session_user)";
    client
        .batch_execute(
            "create table history (version integer); begin; set local lock_timeout = '7s';
                        set local idle_in_transaction_session_timeout = '7min'",
        )
        .await
        .expect("as a tool does");
    let before = texts(&client, settings).await;
    for from in [0, SCHEMA_VERSION] {
        client.batch_execute(&migration_sql(&Schema::default(), from)).await.expect("installed");
        assert_eq!(texts(&client, settings).await, before);
        client.batch_execute("insert into history values (1)").await.expect("its own table is still found");
    }
    client.batch_execute("commit").await.expect("committed");
    // And nothing is left to the session.
    assert_eq!(texts(&client, "show lock_timeout").await, ["0"]);
    assert_eq!(texts(&client, "show search_path").await, ["public"]);
}

#[test]
fn the_printed_sql_has_nothing_that_a_tool_takes_for_its_own() {
    for from in [0, SCHEMA_VERSION] {
        let printed = migration_sql(&Schema::default(), from);
        // Flyway, Alembic's text(), templates.
        for mark in ["${", "{{", "}}"] {
            assert!(!printed.contains(mark), "{mark:?}");
        }
        for line in printed.lines() {
            let first = line.trim_start().to_lowercase();
            assert!(!first.starts_with('\\') && !first.starts_with("commit") && first != "begin;", "{line}");
            let binds = line.match_indices(':').any(|(at, _)| {
                let before = line[..at].chars().next_back();
                let after = line[at + 1..].chars().next();
                before.is_none_or(|before| before != ':' && !before.is_alphanumeric())
                    && after.is_some_and(|after| after.is_alphanumeric() || after == '\'' || after == '"')
            });
            assert!(!binds, "a parameter: {line}");
        }
    }
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_done_and_changes_nothing() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    let dry_run = ["migrate", "--dry-run", "--database-url", &database.url];
    let for_real = ["migrate", "--database-url", &database.url];
    assert_eq!(said(&dry_run), format!("would create schema pgonce, version {SCHEMA_VERSION}\n"));
    assert_eq!(number(&client, "select count(*) from pg_namespace where nspname = 'pgonce'").await, 0);
    migrate(&mut client, &Schema::default()).await.expect("installed");
    assert_eq!(said(&dry_run), format!("schema pgonce has version {SCHEMA_VERSION} already\n"));
    client
        .batch_execute("update pgonce.schema_versions set program = '0.0.1', routines_digest = 'another'")
        .await
        .expect("changed");
    let before = description(&client, "pgonce").await;
    let what = format!("the functions and views of schema pgonce, version {SCHEMA_VERSION}\n");
    assert_eq!(said(&dry_run), format!("would replace {what}"));
    assert_eq!(description(&client, "pgonce").await, before);
    assert_eq!(said(&for_real), format!("replaced {what}"));
    client
        .batch_execute(&format!("update pgonce.schema_versions set version = {SCHEMA_VERSION_MAX}"))
        .await
        .expect("changed");
    assert_eq!(said(&for_real), format!("schema pgonce has version {SCHEMA_VERSION_MAX} already\n"));
}

#[tokio::test]
async fn version_tells_of_the_program_and_of_the_database() {
    let program = env!("CARGO_PKG_VERSION");
    let own = format!("pgonce {program}: works with schema versions {SCHEMA_VERSION} and {SCHEMA_VERSION_MAX}\n");
    assert_eq!(said(&["version"]), own);
    let database = TestDatabase::new().await;
    let here = ["version", "--database-url", &database.url];
    assert_eq!(said(&here), format!("{own}schema pgonce: version {SCHEMA_VERSION}, installed by pgonce {program}\n"));
    let elsewhere = [&here[..], &["--schema", "elsewhere"]].concat();
    assert_eq!(said(&elsewhere), format!("{own}schema elsewhere: not installed\n"));

    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&said(&[arguments, &["--json"]].concat())).expect("JSON")
    };
    let mut expected = serde_json::json!({
        "program": program, "schema_version": SCHEMA_VERSION, "schema_version_max": SCHEMA_VERSION_MAX,
    });
    assert_eq!(json(&["version"]), expected);
    let versions = serde_json::json!({ "schema_version": SCHEMA_VERSION, "program": program });
    expected["database"] = serde_json::json!({ "schema": "pgonce", "installed": versions });
    assert_eq!(json(&here), expected);
    expected["database"] = serde_json::json!({ "schema": "elsewhere", "installed": null });
    assert_eq!(json(&elsewhere), expected);
}

#[test]
fn what_makes_no_sense_is_wrong_usage() {
    let beyond = (SCHEMA_VERSION + 1).to_string();
    for arguments in [
        &["migrate"][..],
        &["migrate", "--print", "--dry-run"],
        &["migrate", "--print", "--from", &beyond],
        &["migrate", "--print", "--schema", "a b"],
        &["migrate", "--from", "0", "--database-url", "postgresql://nowhere.invalid/app"],
    ] {
        let output = outcome(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
