//! What is wrong with the server, or behind it.

use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use super::{Clinic, checks, report};
use crate::probe::{eventually, number};
use crate::programs::{Running, postgresql};

#[tokio::test]
async fn what_is_set_wrongly_at_the_server_is_found() {
    // Of a private server fsync and full_page_writes are off.
    let clinic = Clinic::open_with([("synchronous_commit", "off"), ("autovacuum", "off")]).await;
    clinic.expect("settings", &["autovacuum", "fsync", "full-page-writes", "synchronous-commit"], true);
    clinic.close().await;
    let clinic = Clinic::open().await;
    for break_it in [
        "alter database pgonce set synchronous_commit = off",
        "alter role pgonce set synchronous_commit = off",
        "create role clerk; alter role clerk in database pgonce set synchronous_commit to off",
        "alter role all set synchronous_commit = off",
    ] {
        clinic.case(break_it, &["synchronous-commit"], None).await;
    }
    for (break_it, expected) in [
        ("alter database pgonce set default_transaction_read_only = on", "read-only"),
        ("alter role pgonce set default_transaction_read_only = on", "read-only"),
        ("alter database pgonce set default_transaction_isolation = 'repeatable read'", "isolation"),
        (
            "grant usage on schema pgonce to clerk; grant execute on function pgonce.enqueue to clerk; alter role clerk set default_transaction_isolation = serializable",
            "isolation",
        ),
    ] {
        clinic.case(break_it, &[expected], None).await;
    }
    clinic.run("create role analyst; alter role analyst set default_transaction_read_only = on").await;
    for (break_it, expected, mend_it) in [
        (
            "alter role pgonce set session_replication_role = replica",
            "triggers",
            "alter role pgonce reset session_replication_role",
        ),
        (
            "select pg_create_logical_replication_slot('forgotten', 'pgoutput')",
            "xmin-horizon",
            "select pg_drop_replication_slot('forgotten')",
        ),
        (
            "begin; select pg_current_xact_id(); prepare transaction 'forgotten'",
            "prepared-transactions",
            "rollback prepared 'forgotten'",
        ),
    ] {
        clinic.case(break_it, &[expected], Some(mend_it)).await;
    }
    clinic.expect("all is mended", &[], false);
    clinic.close().await;
}

#[tokio::test]
async fn how_a_server_plans_and_writes_texts_does_not_matter() {
    let clinic = Clinic::open().await;
    for setting in [
        // As pg_stat_statements has it.
        "compute_query_id = on",
        "quote_all_identifiers = on",
        "standard_conforming_strings = off",
        "enable_seqscan = off",
        "enable_hashjoin = off",
        "join_collapse_limit = 1",
        "jit_above_cost = 0",
        "debug_parallel_query = on",
    ] {
        let (name, _) = setting.split_once(' ').expect("a name and a value");
        let is_known = format!("select count(*) from pg_settings where name = '{name}'");
        if number(&clinic.client, &is_known).await == 1 {
            clinic
                .case(&format!("alter database pgonce set {setting}"), &[], Some("alter database pgonce reset all"))
                .await;
            clinic.run("alter database pgonce set search_path = public").await;
        }
    }
    clinic.close().await;
}

#[tokio::test]
async fn a_replica_is_a_fault_of_its_primary_and_no_place_to_work_at() {
    let clinic = Clinic::open().await;
    let gone = "insert into pgonce.members (member_id, pid, consumers) values (gen_random_uuid(), 0, '{counter}')";
    clinic.run(gone).await;
    // As the server's user, whom a directory of root's does not let in.
    let owner = clinic.server.directory().metadata().expect("it is there");
    let directory = tempfile::tempdir().expect("a directory");
    chown(directory.path(), Some(owner.uid()), Some(owner.gid())).expect("its owner's, or root's to give away");
    let data = directory.path().join("data");
    let program = |name: &str| {
        let mut command = Command::new(postgresql(name).expect("it comes with the server"));
        command.uid(owner.uid()).gid(owner.gid()).current_dir(directory.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).arg("-D").arg(&data);
        command
    };
    let mut copy = program("pg_basebackup");
    let copied =
        copy.args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--dbname", &clinic.url()]).status();
    assert!(copied.expect("it can be started").success());
    let mut serve = program("postgres");
    serve.args([
        "-c",
        "listen_addresses=",
        "-p",
        "6543",
        "-c",
        "wal_level=logical",
        "-c",
        "max_prepared_transactions=4",
    ]);
    serve.args(["-c", "max_connections=200", "-k"]).arg(directory.path());
    let standby = Running::start(&mut serve);
    let streaming = "select count(*) from pg_stat_replication where state = 'streaming'";
    eventually("it streams", async || (number(&clinic.client, streaming).await == 1).then_some(())).await;
    clinic.expect("the primary", &["asynchronous-replicas", "dead-owners"], true);
    // Nobody that runs is here.
    let url = format!("postgresql:///pgonce?host={}&port=6543&user=pgonce", directory.path().display());
    let (code, found) = report(&url);
    let expected = ["read-only", "unexamined"].into();
    assert_eq!((code, checks(&found)), (Some(1), expected), "{found:#}");
    standby.finish();
    clinic.close().await;
}
