//! What is wrong with consumers, and whoever runs them.

use std::process::Stdio;

use pgonce::{Consumer, Database, Delivery, Handler, HandlerError, Received, Schema};
use serde_json::Value;
use tokio_postgres::{NoTls, Transaction};

use super::{Clinic, checks, findings, report};
use crate::fixture::TestDatabase;
use crate::probe::{eventually, number};
use crate::programs::{Running, pgonce};

#[tokio::test]
async fn consumers_that_promise_less_or_stand_still_are_found() {
    let clinic = Clinic::open().await;
    let gone = "00000000-0000-0000-0000-000000000001";
    clinic
        .case(
            "select pgonce.create_consumer('mail', 'words', kind => 'external', start_at => 'latest')",
            &["external-consumers"],
            Some("select pgonce.drop_consumer('mail')"),
        )
        .await;
    clinic
        .case(
            &format!(
                "select pgonce.create_consumer('mail', 'words', kind => 'external', start_at => 'latest');
                 update pgonce.leases set owner = '{gone}', leased_until = now() + interval '1 hour', was_member = true"
            ),
            &["dead-owners", "external-consumers"],
            Some("select pgonce.drop_consumer('mail')"),
        )
        .await;
    for (break_it, expected, mend_it) in [
        (
            // As a dump has it that was restored at once: the process is of another server.
            &*format!("insert into pgonce.members (member_id, pid, consumers) values ('{gone}', 0, '{{counter}}')"),
            &["dead-owners"][..],
            "delete from pgonce.members",
        ),
        (
            &*format!(
                "insert into pgonce.suspicions (consumer_id, partition, until_offset, messages, tried_by)
                 select consumer_id, 0, 1, 1, '{gone}' from pgonce.consumers where consumer = 'counter'"
            ),
            &["dead-owners"],
            "delete from pgonce.suspicions",
        ),
        (
            "insert into pgonce.progress (consumer_id, partition, generation, next_offset, received, duplicates, handler, handed_over)
             select consumer_id, partition, 1000, next_offset, received, duplicates, pg_current_xact_id(), '{1}'
             from pgonce.consumer_offsets where consumer = 'counter'",
            &["dead-owners", "weaker-modes"],
            "delete from pgonce.progress where generation = 1000",
        ),
        // 2 ^ (66 / 4) microseconds are 93 ms.
        (
            "select pgonce.record_handler_times('counter', 100, '{20, 66}', '{1, 9}')",
            &["slow-handlers"],
            "delete from pgonce.handler_times",
        ),
        (
            "select pgonce.enqueue('words', '3'); commit; select pgonce.relay()",
            &["unattended-consumers"],
            "select pgonce.receive('counter')",
        ),
    ] {
        clinic.case(break_it, expected, Some(mend_it)).await;
    }
    // A dump that was restored beside its original: the process is there, and works on another database.
    let (elsewhere, connection) =
        tokio_postgres::connect(&clinic.server.url("postgres"), NoTls).await.expect("connected");
    tokio::spawn(connection);
    let pid = elsewhere.query_one("select pg_backend_pid()", &[]).await.expect("a number").get::<_, i32>(0);
    let beats =
        format!("insert into pgonce.members (member_id, pid, consumers) values ('{gone}', {pid}, '{{counter}}')");
    clinic.case(&beats, &["dead-owners"], Some("delete from pgonce.members")).await;
    // Of many, no more are told than somebody reads.
    clinic.run("insert into pgonce.members select gen_random_uuid(), 0, '{}' from generate_series(1, 105)").await;
    let many = clinic.expect("many are dead", &["dead-owners"], true);
    assert_eq!(findings(&many).len(), 101);
    assert_eq!(findings(&many)[100]["subject"], "5 more");
    clinic.run("delete from pgonce.members").await;
    clinic.expect("all is mended", &[], false);
    clinic.close().await;
}

struct Nothing;

impl Handler for Nothing {
    type Payload = Value;

    async fn handle(&self, _: &Transaction<'_>, _: Received<Value>) -> Result<(), HandlerError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_weaker_mode_is_found_also_when_nobody_runs_the_consumer_any_more() {
    let clinic = Clinic::open().await;
    for (delivery, finding) in [
        (Delivery::AtLeastOnce, Some("consumer counter is at_least_once")),
        (Delivery::AtMostOnce, Some("consumer counter is at_most_once")),
        (Delivery::ExactlyOnce, None),
    ] {
        let database = Database::connect(&clinic.url(), Schema::default(), 2).expect("a database");
        Consumer::each("counter", Nothing).delivery(delivery).step(&database).await.expect("a step");
        database.close();
        let checks: &[&str] = finding.map_or(&[], |_| &["weaker-modes"]);
        let report = clinic.expect(delivery.name(), checks, finding.is_some());
        assert_eq!(findings(&report).first().and_then(|found| found["subject"].as_str()), finding);
    }
    clinic.close().await;
}

#[tokio::test]
async fn a_worker_that_was_killed_is_a_dead_owner_until_another_one_runs() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let start = || {
        let arguments = ["run", "--database-url", &database.url, "--word-count", "counter=words"];
        Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()))
    };
    let finds_dead = || checks(&report(&database.url).1).contains("dead-owners");
    let members = async || number(&client, "select count(*) from pgonce.members").await;
    let mut worker = start();
    eventually("it is a member", async || (members().await == 1).then_some(())).await;
    worker.kill();
    eventually("its connection is gone", async || finds_dead().then_some(())).await;
    assert_eq!(report(&database.url).0, Some(1));
    let worker = start();
    eventually("the dead one is buried", async || (!finds_dead()).then_some(())).await;
    worker.finish();
}

#[tokio::test]
async fn nothing_is_wrong_while_a_worker_runs_whatever_the_search_path_is() {
    let clinic = Clinic::open().await;
    let url = clinic.url();
    let arguments = ["run", "--database-url", &url, "--word-count", "counter=words"];
    let worker = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()));
    eventually("it is a member", async || {
        (number(&clinic.client, "select count(*) from pgonce.members").await == 1).then_some(())
    })
    .await;
    clinic.run(include_str!("../hostile.sql")).await;
    clinic.run("alter database pgonce set search_path = evil, pg_catalog").await;
    clinic.run("select pgonce.enqueue('words', '{\"word\": \"a\"}') from pg_catalog.generate_series(1, 1000)").await;
    clinic.expect("a worker runs", &[], false);
    worker.finish();
    clinic.close().await;
}
