//! Retries: what passes by itself (another transaction, a full or a read-only server, a session that was ended) is told
//! so, is tried again, and is charged to no message.

use pgonce::{Consumer, ErrorKind, Handler, HandlerError, Producer, Received, Relay, Remedy, Shutdown, Worker};
use serde_json::Value;
use tokio_postgres::{Client, Transaction};

use crate::books::assert_applied;
use crate::fixture::TestDatabase;
use crate::probe::{eventually, number, sqlstate, texts};
use crate::worker::{APPLIED, CONSUMER, INSERT, TOPIC, keyed, prepared};

/// What passes, and what it is told as. The last three are ends of a session for its silence.
const PASSING: [(&str, ErrorKind); 11] = [
    ("40001", ErrorKind::Contention),
    ("40P01", ErrorKind::Contention),
    ("55P03", ErrorKind::Contention),
    ("53300", ErrorKind::Unavailable),
    ("57P01", ErrorKind::Unavailable),
    ("57P02", ErrorKind::Unavailable),
    ("57P03", ErrorKind::Unavailable),
    ("25006", ErrorKind::Unavailable),
    ("57P05", ErrorKind::Unavailable),
    ("25P03", ErrorKind::Unavailable),
    ("25P04", ErrorKind::Unavailable),
];
/// An error at the first three rows that go into a table. Sequences count on where all is rolled back.
const FAULTS: &str = "
    create sequence faults_outbox;
    create sequence faults_queue;
    create sequence faults_applied;
    create function fault() returns trigger language plpgsql as $$
    begin
      if nextval(('public.faults_' || tg_table_name)::regclass) <= 3 then
        raise exception 'as the test says' using errcode = tg_argv[0];
      end if;
      return new;
    end $$;";
/// Errors that the tables have raised.
const RAISED: &str = "
    select sum(least(last_value, 3))::bigint from (
      select last_value from faults_outbox union all select last_value from faults_queue
      union all select last_value from faults_applied) f";

/// A topic whose tables, and that of the effects, raise an error for a while.
async fn faulty(code: &str) -> (TestDatabase, Client) {
    let (database, client) = prepared(1).await;
    client.batch_execute(FAULTS).await.expect("created");
    for table in ["pgonce.outbox", "pgonce.queue", "applied"] {
        let trigger =
            format!("create trigger fault before insert on {table} for each row execute function fault('{code}')");
        client.batch_execute(&trigger).await.expect("created");
    }
    (database, client)
}

struct Inserting;

impl Handler for Inserting {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Value>) -> Result<(), HandlerError> {
        tx.execute("insert into applied (key, nth) values ($1, 0)", &[&message.key]).await?;
        Ok(())
    }
}

#[tokio::test]
async fn what_passes_is_told_so_and_charged_to_no_message() {
    for (code, kind) in PASSING {
        let (database, client) = faulty(code).await;
        let pool = database.database(1);
        let consumers = [Consumer::each(CONSUMER, Inserting), Consumer::sql(CONSUMER, INSERT)];
        let (mut seen, mut nth) = (0, 0);
        // A server reports an error before it lets go of the locks: until then another step finds nothing to do.
        eventually("it is applied", async || {
            let session = pool.session().await.expect("a session");
            let sent = Producer::new(TOPIC).send(&*session, &keyed("k", 0)).await.map(|_| session.give_back());
            let relayed = Relay::topic(TOPIC).step(&pool).await.map(drop);
            let consumed = consumers[nth % 2].step(&pool).await.map(drop);
            nth += 1;
            for outcome in [sent, relayed, consumed] {
                if let Err(error) = outcome {
                    assert_eq!(error.kind(), kind, "{code}: {error}");
                    assert_eq!(kind.remedy(), Remedy::Retry);
                    seen += 1;
                }
            }
            (number(&client, APPLIED).await == 1).then_some(())
        })
        .await;
        assert_eq!(number(&client, RAISED).await, 9, "{code}");
        // Where another transaction is in the way, the relay looks further before it says so.
        assert!((7..=9).contains(&seen), "{code}: {seen}");
        let failures = "select failures from pgonce.consumer_lag where consumer = 'c'";
        assert_eq!(number(&client, failures).await, 0, "{code}");
    }
}

/// Runs a worker until all is applied, whatever disturbs it.
async fn work(database: &TestDatabase, client: &Client, messages: usize, disturb: impl AsyncFnOnce()) {
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let worker = Worker::new(database.database(4)).relay(TOPIC).consumer(Consumer::sql(CONSUMER, INSERT));
    let running = tokio::spawn(async move { worker.run(&stop).await });
    disturb().await;
    let due = i64::try_from(messages).expect("a number");
    eventually("all is applied", async || (number(client, APPLIED).await == due).then_some(())).await;
    shutdown.stop();
    running.await.expect("no panic").expect("it stops well");
    assert_applied(client, messages).await;
}

#[tokio::test]
async fn a_worker_gets_over_what_passes() {
    for code in ["40001", "53300", "57P01", "25006"] {
        let (database, client) = faulty(code).await;
        eventually("it is sent", async || Producer::new(TOPIC).send(&client, &keyed("k", 0)).await.ok()).await;
        work(&database, &client, 1, async || {}).await;
        assert_eq!(number(&client, RAISED).await, 9, "{code}");
    }
}

#[tokio::test]
async fn a_worker_gets_over_a_server_that_was_read_only() {
    let (database, client) = prepared(1).await;
    let name = texts(&client, "select current_database()::text").await.remove(0);
    let set =
        |is_read_only: &str| format!(r#"alter database "{name}" set default_transaction_read_only = {is_read_only}"#);
    let others = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                  where datname = current_database() and pid <> pg_backend_pid()";
    work(&database, &client, 2, async || {
        Producer::new(TOPIC).send(&client, &keyed("k", 0)).await.expect("sent");
        eventually("it works", async || (number(&client, APPLIED).await == 1).then_some(())).await;
        client.batch_execute(&set("on")).await.expect("set");
        number(&client, others).await;
        let pool = database.database(1);
        let session = pool.session().await.expect("a session");
        let error = Producer::new(TOPIC).send(&*session, &keyed("k", 1)).await.expect_err("it is read-only");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        // Sessions of this moment stay read-only: whoever goes on has opened another one. That of the test is older.
        Producer::new(TOPIC).send(&client, &keyed("k", 1)).await.expect("sent");
        eventually("the worker has connected to a read-only server", async || {
            let sessions = "select count(distinct application_name) from pg_stat_activity
                            where datname = current_database() and application_name in ('pgonce relay', 'pgonce c')";
            (number(&client, sessions).await == 2).then_some(())
        })
        .await;
        client.batch_execute(&set("off")).await.expect("set");
    })
    .await;
}

#[tokio::test]
async fn a_producer_on_a_transaction_that_was_aborted_is_told_so() {
    let (_database, mut client) = prepared(1).await;
    let transaction = client.transaction().await.expect("begun");
    transaction.batch_execute("select 1 / 0").await.expect_err("divided by zero");
    let error = Producer::new(TOPIC).send(&transaction, &keyed("k", 0)).await.expect_err("nothing can be sent");
    assert!(error.to_string().contains("aborted"), "{error}");
    // What the driver answers: whoever swallows the error of a statement does not hear that nothing was committed.
    transaction.commit().await.expect("rolled back in truth");
    assert_eq!(number(&client, "select count(*) from pgonce.outbox").await, 0);
    assert_eq!(sqlstate(&client, "savepoint outside").await, "25P01");
}
