//! Rates: the numbers of a known course of events are exactly those, whoever writes them down, and cost little to keep.

use std::process::Stdio;
use std::time::Duration;

use pgonce::{
    BatchHandler, Consumer, Epoch, ExternalHandler, Handler, HandlerError, Producer, Received, Relay, Shutdown, Worker,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_postgres::{Client, Transaction};

use crate::fixture::TestDatabase;
use crate::probe::{create, eventually, number, numbered, sqlstate, texts};
use crate::programs::{Running, outcome, pgonce};

const SAMPLE: &str = "select pgonce.sample_rates()::integer::bigint";
const SAMPLES: &str = "select count(distinct sampled_at) from pgonce.samples";
/// Makes all samples older by so long.
const AGE: &str = "update pgonce.samples set sampled_at = sampled_at - interval '1 second' *";

/// A topic of one partition with a consumer of each kind, and an inbox.
async fn world() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, "t", 1, "c").await;
    let more = "select pgonce.create_consumer('mail', 't', kind => 'external'), pgonce.create_consumer('inbox')";
    client.batch_execute(more).await.expect("created");
    (database, client)
}

/// Five messages are sent, two of them twice. Of these the consumer applies two at once and one at its second attempt, knows
/// one before, and gives one up. Somebody without a lease acknowledges one, and the inbox gets one twice.
async fn course_of_events(client: &Client, round: i64) {
    let offset = |nth: i64| round * 5 + nth;
    for statement in [
        format!(
            "select pgonce.enqueue_many('t', array_agg('{{}}'::jsonb), array_agg(nth::text), array_agg('{round} ' || nth))
             from unnest('{{1, 2, 3, 4, 5, 1, 2}}'::integer[]) nth"
        ),
        "select pgonce.relay()".to_owned(),
        format!(
            "insert into pgonce.processed_ids (consumer_id, message_id)
             select consumer_id, '{round} 5' from pgonce.consumers where consumer = 'c'"
        ),
        format!("select pgonce.fail('c', 0, {}, 'not now', retry_at => '-infinity')", offset(1)),
        format!("select pgonce.fail('c', 0, {}, 'never', permanent => true)", offset(2)),
        "select count(*) from pgonce.receive('c')".to_owned(),
        "select count(*) from pgonce.receive('c')".to_owned(),
        format!("select pgonce.ack('mail', 0, 17, {0}, {0})", offset(1)),
        format!("select pgonce.process_once('inbox', '{round}')"),
        format!("select pgonce.process_once('inbox', '{round}')"),
    ] {
        client.batch_execute(&statement).await.expect("done");
    }
}

#[tokio::test]
async fn the_numbers_of_a_course_of_events_are_exactly_those() {
    let (_database, client) = world().await;
    course_of_events(&client, 0).await;
    assert_eq!(number(&client, SAMPLE).await, 1);
    client.batch_execute(&format!("{AGE} 120")).await.expect("two minutes later");
    course_of_events(&client, 1).await;
    course_of_events(&client, 2).await;

    // received, applied, duplicates, retries, dead letters, fenced
    let totals = "select concat_ws(' ', stage, name, received, applied, duplicates, retries, dead_letters, fenced)
                  from pgonce.rates order by stage desc, name";
    let expected = ["relay t 21 15 6", "consumer c 18 9 3 3 3", "consumer inbox 3", "consumer mail 0 0 0 0 0 3"];
    assert_eq!(texts(&client, totals).await, expected);
    let since = ["received", "applied", "duplicates", "retries", "dead_letters", "fenced"]
        .map(|count| format!("round(seconds / 60 * {count}_per_minute)"))
        .join(", ");
    let since = format!("select concat_ws(' ', stage, name, {since}) from pgonce.rates order by stage desc, name");
    let expected = ["relay t 14 10 4", "consumer c 12 6 2 2 2", "consumer inbox 2", "consumer mail 0 0 0 0 0 2"];
    assert_eq!(texts(&client, &since).await, expected);
    assert_eq!(number(&client, "select count(*) from pgonce.rates where seconds >= 120").await, 4);
    let lag = "select concat_ws(' ', name, lag, oldest_age > interval '0') from pgonce.rates order by stage desc, name";
    assert_eq!(texts(&client, lag).await, ["t", "c 0 f", "inbox 0 f", "mail 15 t"]);

    // And nothing is counted that there may be millions of.
    client.batch_execute("begin").await.expect("begun");
    let scans = "select coalesce(sum(seq_scan + idx_scan), 0)::bigint from pg_stat_xact_user_tables
                 where schemaname = 'pgonce' and relname in ('outbox', 'processed_ids', 'parked', 'dead_letters')";
    let before = number(&client, scans).await;
    assert_eq!(number(&client, "select count(*) from pgonce.rates").await, 4);
    client.batch_execute("select pgonce.sample_rates()").await.expect("sampled");
    assert_eq!(number(&client, scans).await, before);
    client.batch_execute("rollback").await.expect("rolled back");

    // The views that people know say the same.
    let known = "select concat_ws(' ', duplicates, sent) from pgonce.outbox_status
                 union all
                 select concat_ws(' ', consumer, received, duplicates, failures, dead) from pgonce.consumer_lag
                 where consumer in ('c', 'inbox')
                 order by 1";
    assert_eq!(texts(&client, known).await, ["6 15", "c 9 3 6 3", "inbox 3 3 0 0"]);
}

#[tokio::test]
async fn a_rate_is_since_the_sample_that_is_nearest_to_a_minute_old() {
    let (_database, client) = world().await;
    assert_eq!(number(&client, "select count(*) from pgonce.rates where seconds is null").await, 4);
    assert_eq!(number(&client, "select count(*) from pgonce.rates where applied_per_minute is null").await, 4);
    assert_eq!(number(&client, "select count(duplicates) from pgonce.rates").await, 4);
    // A consumer that is newer than the others is compared with what there is of it.
    let insert = "
        insert into pgonce.samples (sampled_at, stage, id, applied, duplicates)
        select clock_timestamp() - interval '1 second' * age, stage, id, 0, 0
        from pgonce.counters cross join unnest(case name when 'c' then '{-30, 3500}' else '{-3000, 0, 60, 3500}' end::integer[]) age";
    client.batch_execute(insert).await.expect("samples");
    let ages = "select name || ' ' || round(seconds / 600) || ' ' || (seconds >= 60) from pgonce.rates order by name";
    assert_eq!(texts(&client, ages).await, ["c 6 true", "inbox 0 true", "mail 0 true", "t 0 true"]);
}

#[tokio::test]
async fn of_many_workers_one_takes_a_sample_and_none_waits() {
    let (database, client) = world().await;
    let mut workers = JoinSet::new();
    for _ in 0..16 {
        let client = database.connect().await;
        workers.spawn(async move { number(&client, SAMPLE).await });
    }
    assert_eq!(workers.join_all().await.iter().sum::<i64>(), 1);
    assert_eq!(number(&client, SAMPLES).await, 1);
    client.batch_execute(&format!("{AGE} 10")).await.expect("10 seconds later");

    let mut slow = database.connect().await;
    let slow = slow.transaction().await.expect("begun");
    slow.batch_execute(SAMPLE).await.expect("sampled");
    client.batch_execute("set lock_timeout = '10s'").await.expect("a wait would fail");
    assert_eq!(number(&client, SAMPLE).await, 0);
    slow.rollback().await.expect("let go");
    assert_eq!(number(&client, SAMPLE).await, 1);
    assert_eq!(sqlstate(&client, "begin isolation level repeatable read; select pgonce.sample_rates()").await, "PO010");
}

#[tokio::test]
async fn what_is_old_is_forgotten_but_no_duplicate() {
    let (database, client) = world().await;
    course_of_events(&client, 0).await;
    let old = "
        insert into pgonce.samples (sampled_at, stage, id, duplicates)
        select clock_timestamp() - interval '1 minute' * m, 'relay', 1, 0 from generate_series(-10, 600) m where m not in (0, 60);
        insert into pgonce.handler_times (recorded_at, consumer_id, limit_ms, buckets, calls)
        select clock_timestamp() - interval '1 minute' * m, 1, 1, '{1}', '{1}' from generate_series(-10, 600) m where m <> 60;
        insert into pgonce.duplicate_sends (topic_id, message_id, sent_at)
        select topic_id, 'a', clock_timestamp() - interval '1 minute' * m from pgonce.topics cross join generate_series(5, 5000) m
        where m <> 10;
        insert into pgonce.duplicate_receipts (consumer_id, message_id, received_at)
        select consumer_id, 'a', clock_timestamp() - interval '1 minute' * m from pgonce.consumers cross join generate_series(5, 5000) m
        where consumer = 'inbox' and m <> 10";
    client.batch_execute(old).await.expect("old rows");
    let mut late = database.connect().await;
    let late = late.transaction().await.expect("begun");
    let insert = "insert into pgonce.duplicate_sends (topic_id, message_id, sent_at) values (1, 'late', clock_timestamp() - interval '2 hours')";
    late.batch_execute(insert).await.expect("not committed");
    // Whoever drops the inbox holds its rows: they wait for another time, and the others do not.
    let mut dropping = database.connect().await;
    let dropping = dropping.transaction().await.expect("begun");
    dropping.batch_execute("select pgonce.drop_consumer('inbox')").await.expect("not committed");
    client.batch_execute("set lock_timeout = '10s'").await.expect("a wait would fail");
    assert_eq!(number(&client, SAMPLE).await, 1);
    dropping.rollback().await.expect("it stays");

    let rows = |table: &str| format!("select count(*) from pgonce.{table}");
    assert_eq!(
        number(&client, "select count(distinct sampled_at) from pgonce.samples where sampled_at > clock_timestamp()")
            .await,
        0
    );
    assert_eq!(number(&client, SAMPLES).await, 59 + 1);
    assert_eq!(number(&client, &rows("handler_times")).await, 60);
    let duplicates = "select duplicates::text from pgonce.rates where name in ('t', 'inbox') order by name";
    assert_eq!(number(&client, &rows("duplicate_sends")).await, 2 + 5 + 1);
    assert_eq!(number(&client, &rows("duplicate_receipts")).await, 1 + 4995);
    assert_eq!(texts(&client, duplicates).await, ["4996", "4997"]);
    late.commit().await.expect("late");
    client.batch_execute(&format!("{AGE} 10")).await.expect("later");
    assert_eq!(number(&client, SAMPLE).await, 1);
    assert_eq!(number(&client, &rows("duplicate_receipts")).await, 1 + 5 + 1);
    // Not worth a row of its own yet.
    assert_eq!(number(&client, &rows("duplicate_sends")).await, 2 + 5 + 1 + 1);
    assert_eq!(texts(&client, duplicates).await, ["4996", "4998"]);
}

#[tokio::test]
async fn percentiles_are_those_of_all_processes_together() {
    let (_database, client) = world().await;
    let record = |limit_ms: i64, buckets: &str, calls: &str| {
        format!("select pgonce.record_handler_times('c', {limit_ms}, '{buckets}', '{calls}')::integer::bigint")
    };
    // Of long ago, and of another consumer.
    let others = "
        insert into pgonce.handler_times (recorded_at, consumer_id, limit_ms, buckets, calls)
        select clock_timestamp() - interval '301 seconds', consumer_id, 1, '{120}', '{1000}' from pgonce.consumers where consumer = 'c';
        select pgonce.record_handler_times('mail', 1, '{120}', '{1000}')";
    client.batch_execute(others).await.expect("recorded");
    // 2 ^ 10 µs and 2 ^ 20 µs.
    assert_eq!(number(&client, &record(30_000, "{40, 80}", "{60, 1}")).await, 0);
    assert_eq!(number(&client, &record(30_000, "{40}", "{39}")).await, 0);
    let percentiles = "select concat_ws(' ', handler_p50_ms, handler_p99_ms, handler_limit_ms, handler_nears_limit)
                       from pgonce.rates where name = 'c'";
    assert_eq!(texts(&client, percentiles).await, ["1.024 1.024 30000 f"]);
    // Two of 101 are more than one of 100.
    assert_eq!(number(&client, &record(30_000, "{80}", "{1}")).await, 0);
    assert_eq!(texts(&client, percentiles).await, ["1.024 1048.576 30000 f"]);
    assert_eq!(number(&client, &record(2_098, "{80}", "{1}")).await, 0, "half of it is more than 1048.576");
    assert_eq!(number(&client, &record(2_097, "{0}", "{1000}")).await, 0);
    assert_eq!(texts(&client, percentiles).await, ["0.001 1.024 2097 f"], "the shortest limit counts");
    assert_eq!(number(&client, &record(30_000, "{80}", "{1000}")).await, 1);
    assert_eq!(texts(&client, percentiles).await, ["1.024 1048.576 2097 t"]);

    for (limit_ms, buckets, calls) in [
        (0, "{0}", "{1}"),
        (1, "{}", "{}"),
        (1, "{0, 1}", "{1}"),
        (1, "{152}", "{1}"),
        (1, "{-1}", "{1}"),
        (1, "{0}", "{0}"),
        (1, "{0}", "{null}"),
        (1, "{0}", "{1000000000001}"),
    ] {
        assert_eq!(sqlstate(&client, &record(limit_ms, buckets, calls)).await, "PO003", "{buckets} {calls}");
    }
    assert_eq!(sqlstate(&client, "select pgonce.record_handler_times('nobody', 1, '{0}', '{1}')").await, "PO002");
}

/// Takes as long as it may.
struct Hanging;

impl Handler for Hanging {
    type Payload = Value;

    async fn handle(&self, _: &Transaction<'_>, _: Received<Value>) -> Result<(), HandlerError> {
        std::future::pending().await
    }
}

impl ExternalHandler for Hanging {
    type Payload = Value;

    async fn handle(&self, _: Received<Value>, _: Epoch) -> Result<(), HandlerError> {
        std::future::pending().await
    }
}

/// Takes no time.
struct Quick;

impl BatchHandler for Quick {
    type Payload = Value;

    async fn handle(&self, _: &Transaction<'_>, _: Vec<Received<Value>>) -> Result<(), HandlerError> {
        Ok(())
    }
}

impl ExternalHandler for Quick {
    type Payload = Value;

    async fn handle(&self, _: Received<Value>, _: Epoch) -> Result<(), HandlerError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_worker_writes_down_what_its_handlers_take_and_a_sample() {
    let (database, client) = world().await;
    let more = "select pgonce.create_consumer('b', 't'), pgonce.create_consumer('s', 't'),
                       pgonce.create_consumer('leased', 't', kind => 'external')";
    client.batch_execute(more).await.expect("created");
    Producer::new("t").send_all(&client, &numbered(3, &[])).await.expect("sent");
    let brief = Duration::from_millis(50);
    let shutdown = Shutdown::new();
    let worker = Worker::new(database.database(2))
        .relay(Relay::all())
        .consumer(Consumer::each("c", Hanging).message_timeout(brief))
        .consumer(Consumer::external("mail", Hanging).message_timeout(brief).lease(Duration::from_secs(3)))
        .consumer(Consumer::batch("b", Quick))
        .consumer(Consumer::external("leased", Quick).lease(Duration::from_secs(20)))
        .consumer(Consumer::sql("s", "select from received"));
    let stop = shutdown.clone();
    let worker = tokio::spawn(async move { worker.run(&stop).await });
    let handled = "select count(*) from pgonce.counters where name in ('c', 'mail', 'b', 's', 'leased') and applied + retries >= 3";
    eventually("all is handled", async || (number(&client, handled).await == 5).then_some(())).await;
    shutdown.stop();
    worker.await.expect("no panic").expect("it stops well");

    let limits = "select concat_ws(' ', name, handler_limit_ms, handler_nears_limit) from pgonce.rates
                  where handler_p50_ms > 0 order by name";
    let measured = texts(&client, limits).await;
    assert!(["c 50 t", "mail 50 t"].iter().all(|name| measured.contains(&(*name).to_owned())), "{measured:?}");
    assert!(
        ["b 30000", "leased 20000", "s 30000"].iter().all(|name| measured.iter().any(|one| one.starts_with(name))),
        "{measured:?}"
    );
    let calls = "select calls from pgonce.handler_percentiles join pgonce.consumers using (consumer_id) where consumer = 'leased'";
    assert_eq!(number(&client, calls).await, 3);
    assert!(number(&client, "select count(*) from pgonce.rates where seconds is not null").await > 0);
}

#[tokio::test]
async fn a_handler_that_takes_nearly_as_long_as_it_may_is_told_of_in_the_log_and_by_status() {
    let (database, client) = world().await;
    Producer::new("t").send_all(&client, &numbered(1, &[])).await.expect("sent");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("pgonce.toml");
    let config = "
        [[topic]]
        name = 't'
        [[consumer]]
        name = 'c'
        topic = 't'
        kind = 'sql'
        statements = 'select pg_sleep(60) from received'
        message_timeout_ms = 20";
    std::fs::write(&file, config).expect("written");
    let arguments = ["run", "--database-url", &database.url, "--config", file.to_str().expect("text")];
    let mut daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()));
    eventually("it has failed", async || {
        (number(&client, "select retries from pgonce.counters where name = 'c'").await > 0).then_some(())
    })
    .await;
    daemon.terminate();
    daemon.until_logged("takes more than half of what it may");
    assert!(daemon.end().success());
    let output = outcome(&["status", "--database-url", &database.url]);
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(
        text.contains("the handler of consumer c takes up to ") && text.contains("more than half of the 20 ms"),
        "{text}"
    );
}

#[tokio::test]
async fn status_shows_the_rates() {
    let (database, client) = world().await;
    let status = |arguments: &[&str]| {
        let output = outcome(&[&["status", "--database-url", &database.url], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    course_of_events(&client, 0).await;
    let cells = |text: &str, stage: &str, name: &str| -> Vec<String> {
        let mut rows = text.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        rows.find(|row| row.len() > 8 && row[..2] == [stage, name]).unwrap_or_else(|| panic!("{text}"))
    };
    let text = status(&[]);
    assert_eq!(cells(&text, "relay", "t"), ["relay", "t", "-", "-", "-", "-", "-", "-", "-", "-", "-"], "{text}");

    // Watching it is enough to have rates, and one sample is.
    let arguments = ["status", "--watch", "--json", "--database-url", &database.url];
    let watch = Running::start(pgonce(&arguments).stdout(Stdio::null()));
    eventually("a sample", async || (number(&client, SAMPLES).await == 1).then_some(())).await;
    watch.finish();
    client.batch_execute(&format!("{AGE} 120000000")).await.expect("years later");
    course_of_events(&client, 1).await;
    client
        .batch_execute("select pgonce.record_handler_times('c', 30000, '{40, 80}', '{98, 2}')")
        .await
        .expect("recorded");
    let text = status(&[]);
    let per_minute = cells(&text, "consumer", "c");
    assert_eq!(per_minute[..8], ["consumer", "c", "0.0", "0.0", "0.0", "0.0", "0.0", "-"], "{text}");
    assert!(text.contains("1.02 ms") && text.contains("1049 ms"), "{text}");
    let report: Value = serde_json::from_str(&status(&["--json"])).expect("JSON");
    let rates = report["rates"].as_array().expect("a list");
    let named = |name: &str| rates.iter().find(|rate| rate["name"] == name).expect("a row");
    let counts = |name: &str| {
        ["received", "applied", "duplicates", "retries", "dead_letters", "fenced"]
            .map(|count| named(name)[count].clone())
    };
    assert_eq!(counts("t"), [json!(14), json!(10), json!(4), Value::Null, Value::Null, Value::Null]);
    assert_eq!(counts("c"), [json!(12), json!(6), json!(2), json!(2), json!(2), Value::Null]);
    assert_eq!(counts("mail"), [json!(0), json!(0), json!(0), json!(0), json!(0), json!(2)]);
    assert_eq!(counts("inbox"), [Value::Null, Value::Null, json!(2), Value::Null, Value::Null, Value::Null]);
    let seconds = named("c")["seconds"].as_f64().expect("a number");
    let applied = named("c")["applied_per_minute"].as_f64().expect("a number");
    assert!((applied * seconds / 60.0 - 3.0).abs() < 1e-6, "{report}");
    assert_eq!(
        ["handler_p50_ms", "handler_p99_ms", "handler_limit_ms", "handler_nears_limit"]
            .map(|key| named("c")[key].clone()),
        [json!(1.024), json!(1048.576), json!(30000), json!(false)]
    );
}
