//! Checkpoints under hard conditions: odd tables, foreign keys, others at work; and by the program.

use std::process::Stdio;
use std::time::SystemTime;

use pgonce::{Consumer, ErrorKind, Handler, HandlerError, Message, Producer, Received};
use serde_json::{Value, json};
use tokio_postgres::{Client, Transaction};

use crate::checkpoint::{STEP, drain, publish, world};
use crate::fixture::TestDatabase;
use crate::probe::{eventually, number, sqlstate, texts};
use crate::programs::{Running, outcome, pgonce};

/// A consumer with another state than its ledger, saved as it is.
async fn saved_with(tables: &str, prepare: &str) -> (TestDatabase, Client) {
    let (database, client) = world(0).await;
    client.batch_execute(prepare).await.expect("prepared");
    client.execute("select pgonce.set_state('c', $1::text::regclass[])", &[&tables]).await.expect("named");
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    (database, client)
}

#[tokio::test]
async fn columns_may_have_any_name() {
    let prepare = r#"
        create table odd (id int primary key, t text, "a, b" int, "r""ow" int, v int, key int);
        insert into odd values (1, 'x', 1, 1, 1, 1), (2, 'y', 2, 2, 2, 2)"#;
    let (_database, client) = saved_with("{odd}", prepare).await;
    let rows = "select (o.*)::text from odd o order by id";
    let before = texts(&client, rows).await;
    client.batch_execute("update odd set v = 9 where id = 1; delete from odd where id = 2").await.expect("changed");
    let changes = "select changed + removed from pgonce.checkpoint_difference('c', 'one') where name = 'public.odd'";
    assert_eq!(number(&client, changes).await, 2);
    client.batch_execute("select pgonce.restore('c', 'one')").await.expect("restored");
    assert_eq!(texts(&client, rows).await, before);
}

#[tokio::test]
async fn a_state_of_many_parts_comes_back() {
    let prepare = "
        create table large (id int primary key, note text not null);
        insert into large select n, sha256(n::text::bytea)::text from generate_series(1, 20000) n;
        insert into large values (0, repeat('x', 1000000))";
    let (_database, client) = saved_with("{large}", prepare).await;
    let parts = "select count(*) from pgonce.checkpoint_parts where relation = 'large'::regclass";
    assert!(number(&client, parts).await > 5);
    let held = "select row_count from pgonce.checkpoint_contents where name = 'large'";
    assert_eq!(number(&client, held).await, 20_001);
    let digest = "select md5(string_agg(id || note, ',' order by id)) from large";
    let before = texts(&client, digest).await;
    let change = "update large set note = 'y' where id % 3 = 0; delete from large where id % 100 = 1; insert into large values (-1, 'z')";
    client.batch_execute(change).await.expect("changed");
    let changes = "
        select concat_ws(' ', added, removed, changed)
        from pgonce.checkpoint_difference('c', 'one') where name = 'public.large'";
    assert_eq!(texts(&client, changes).await, ["1 200 6601"]);
    client.batch_execute("select pgonce.restore('c', 'one')").await.expect("restored");
    assert_eq!(texts(&client, digest).await, before);
}

#[tokio::test]
async fn state_tables_may_refer_to_each_other_where_that_can_be_deferred() {
    let prepare = "
        create table balances (account text primary key, balance int not null);
        create table entries (id int primary key, account text not null references balances deferrable, up int
                              references entries deferrable);
        insert into balances values ('a', 1), ('b', 2);
        insert into entries values (1, 'a', null), (2, 'b', 1)";
    let (_database, client) = saved_with("{entries,balances}", prepare).await;
    let change = "
        update balances set balance = 10;
        insert into balances values ('c', 3);
        insert into entries values (3, 'c', 2);
        delete from entries where id <> 3 and id <> 1 and id <> 2;
        update entries set account = 'c' where id = 1";
    client.batch_execute(change).await.expect("changed");
    client.batch_execute("select pgonce.restore('c', 'one')").await.expect("restored");
    let rows = "select (b.*)::text from balances b union all select (e.*)::text from entries e order by 1";
    assert_eq!(texts(&client, rows).await, ["(1,a,)", "(2,b,1)", "(a,1)", "(b,2)"]);
    let rigid = "
        create table parents (id int primary key);
        create table children (id int primary key, parent int references parents)";
    client.batch_execute(rigid).await.expect("created");
    assert_eq!(sqlstate(&client, "select pgonce.set_state('c', '{parents}')").await, "PO003");
}

#[tokio::test]
async fn a_table_is_the_state_of_one_consumer_unless_its_key_begins_with_the_name() {
    let prepare = "
        create table shared (consumer text, id int, primary key (consumer, id));
        insert into shared values ('c', 1), ('another', 1)";
    let (_database, client) = saved_with("{shared}", prepare).await;
    client.batch_execute("select pgonce.set_state('another', '{shared}')").await.expect("shared");
    client.batch_execute("insert into shared values ('c', 2), ('another', 2)").await.expect("inserted");
    client.batch_execute("select pgonce.restore('c', 'one')").await.expect("restored");
    let rows = "select consumer || id from shared order by 1";
    assert_eq!(texts(&client, rows).await, ["another1", "another2", "c1"]);
    assert_eq!(
        sqlstate(&client, "select pgonce.set_state('another', '{ledger}'); select pgonce.set_state('c', '{ledger}')")
            .await,
        "PO003"
    );
}

#[tokio::test]
async fn a_table_that_is_altered_while_a_restore_waits_for_it_is_refused() {
    let (database, client) = world(5).await;
    drain(&client).await;
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    let owner = database.connect().await;
    let alter = "
        begin;
        create function ring() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger ring before insert on ledger for each row execute function ring()";
    owner.batch_execute(alter).await.expect("altered");
    // In a transaction the activity is read once.
    let onlooker = database.connect().await;
    let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%restore%' and datname = current_database()";
    let looks = async {
        eventually("the restore waits", async || (number(&onlooker, waiting).await > 0).then_some(())).await;
        owner.batch_execute("commit").await.expect("committed");
    };
    let (code, ()) = tokio::join!(sqlstate(&client, "select pgonce.restore('c', 'one')"), looks);
    assert_eq!(code, "PO003");
}

#[tokio::test]
async fn a_transaction_that_has_received_saves_and_restores_nothing() {
    let (_database, client) = world(30).await;
    number(&client, STEP).await;
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    for verb in ["checkpoint('c', 'two')", "restore('c', 'one')", "replay('c', reapply_effects => true)"] {
        client.batch_execute("begin; select pgonce.receive('c', 5)").await.expect("received");
        assert_eq!(sqlstate(&client, &format!("select pgonce.{verb}")).await, "PO003", "{verb}");
        client.batch_execute("rollback").await.expect("rolled back");
    }
}

#[tokio::test]
async fn an_old_snapshot_receives_nothing_after_a_restore_and_records_come_back_with_a_later_checkpoint() {
    let (database, client) = world(20).await;
    client.batch_execute("select pgonce.checkpoint('c', 'before')").await.expect("saved");
    let old = database.connect().await;
    old.batch_execute("begin isolation level repeatable read; select 1 from pgonce.queue limit 1")
        .await
        .expect("begun");
    drain(&client).await;
    client.batch_execute("select pgonce.checkpoint('c', 'after')").await.expect("saved");
    let recorded = "select count(*) from pgonce.processed_ids";
    for (checkpoint, records) in [("before", 0), ("after", 20)] {
        client.execute("select pgonce.restore('c', $1)", &[&checkpoint]).await.expect("restored");
        assert_eq!(number(&client, recorded).await, records, "{checkpoint}");
    }
    assert_eq!(sqlstate(&old, "select pgonce.receive('c', 5, 0)").await, "40001");
}

#[tokio::test]
async fn a_dead_letter_that_a_restore_brings_back_is_settled_under_its_lock_only() {
    let (database, client) = world(20).await;
    let fail = "select pgonce.fail('c', p, 1, 'bad', permanent => true) from generate_series(0, 1) p";
    client.batch_execute(fail).await.expect("given up");
    drain(&client).await;
    client.batch_execute("select pgonce.checkpoint('c', 'one')").await.expect("saved");
    let forget = "select pgonce.replay('c', partition => 0, reapply_effects => true)";
    client.batch_execute(forget).await.expect("forgotten");
    let settle =
        "select string_agg(was_settled::text, ' ' order by dead_letter_id) from pgonce.replay_dead_letters('{1,2}')";
    client.batch_execute("begin; select pgonce.restore('c', 'one')").await.expect("restored");
    let operator = database.connect().await;
    let looking = database.connect().await;
    let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%replay_dead%' and datname = current_database()";
    let ends = async {
        eventually("the operator waits", async || (number(&looking, waiting).await > 0).then_some(())).await;
        client.batch_execute("commit").await.expect("committed");
    };
    let (settled, ()) = tokio::join!(texts(&operator, settle), ends);
    assert_eq!(settled, ["false true"]);
    drain(&client).await;
    assert_eq!(texts(&operator, settle).await, ["true false"]);
    drain(&client).await;
    assert_eq!(number(&client, "select sum(amount)::bigint from ledger").await, 20);
}

/// Sends its payload on.
struct Forwarding(Producer);

impl Handler for Forwarding {
    type Payload = Value;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Value>) -> Result<(), HandlerError> {
        let follows = Message::json(&message.payload)?.key("k");
        let sent = self.0.emit(tx, "forwarder", &message, 1, &follows).await?;
        assert_eq!(sent.was_duplicate, message.payload["is_known"], "{sent:?}");
        let later = follows.deliver_at(SystemTime::now());
        assert_eq!(
            self.0.emit(tx, "forwarder", &message, 2, &later).await.expect_err("refused").kind(),
            ErrorKind::Invalid
        );
        match message.payload["nth"].as_i64() {
            Some(2) if message.attempt == 1 => Err("not this time".into()),
            _ => Ok(()),
        }
    }
}

#[tokio::test]
async fn what_a_handler_emits_is_there_once_and_only_where_its_effect_is() {
    let (database, client) = world(0).await;
    let create = "
        select pgonce.create_topic('further', 1);
        select pgonce.create_consumer('forwarder', 't', backoff_min_ms => 1, backoff_max_ms => 1, state => '{ledger}')";
    assert_eq!(sqlstate(&client, create).await, "PO003", "it is the state of c");
    client.batch_execute(&create.replace("{ledger}", "{}")).await.expect("created");
    let messages: Vec<_> = (1..=3)
        .map(|nth| Message::json(&json!({ "nth": nth, "is_known": false })).expect("JSON").key(nth.to_string()))
        .collect();
    publish(&client, &messages).await;
    let pool = database.database(1);
    let consumer = Consumer::each("forwarder", Forwarding(Producer::new("further")));
    eventually("all is applied", async || {
        consumer.step(&pool).await.expect("a step");
        (number(&client, "select sum(lag + parked)::bigint from pgonce.consumer_lag where consumer = 'forwarder'")
            .await
            == 0)
            .then_some(())
    })
    .await;
    let ids = "
        select o.message_id from pgonce.outbox o join pgonce.topics t using (topic_id) where t.topic = 'further'
        except all
        select pgonce.emitted_id('forwarder', q.message_id, 1) from pgonce.queue q";
    assert_eq!(texts(&client, ids).await, [""; 0]);
    let sent = "select count(*) from pgonce.outbox o join pgonce.topics t using (topic_id) where t.topic = 'further'";
    assert_eq!(number(&client, sent).await, 3);
    let again = "
        update pgonce.queue set payload = payload || '{\"is_known\": true}';
        select pgonce.replay('forwarder', reapply_effects => true)";
    client.batch_execute(again).await.expect("set back");
    eventually("all is applied once more", async || {
        consumer.step(&pool).await.expect("a step");
        (number(&client, "select sum(lag + parked)::bigint from pgonce.consumer_lag where consumer = 'forwarder'")
            .await
            == 0)
            .then_some(())
    })
    .await;
    assert_eq!(number(&client, sent).await, 3);
    assert_eq!(number(&client, "select count(*) from pgonce.dead_letters").await, 0);
}

/// Runs the program to its end; whether it did well, and what it printed.
fn said(database: &TestDatabase, arguments: &[&str]) -> (Option<i32>, String) {
    let output = outcome(&[arguments, &["--database-url", &database.url]].concat());
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.code(), String::from_utf8(text).expect("text"))
}

#[tokio::test]
async fn the_commands_save_compare_restore_and_replay() {
    let (database, client) = world(30).await;
    let left = 30 - number(&client, STEP).await;
    let well = |arguments: &[&str]| {
        let (code, text) = said(&database, arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {text}");
        text
    };
    let rows = number(&client, "select count(*) from ledger").await;
    let saved = well(&["checkpoint", "save", "c", "one", "--state", "ledger"]);
    assert!(saved.starts_with(&format!("saved checkpoint one of consumer c: {rows} row")), "{saved}");
    drain(&client).await;
    let list = well(&["checkpoint", "list", "c"]);
    assert!(list.contains("one") && list.contains(&left.to_string()), "{list}");
    let shown = well(&["checkpoint", "show", "c", "one"]);
    assert!(shown.contains("NEXT OFFSET") && shown.contains("ledger"), "{shown}");
    let changes = well(&["checkpoint", "diff", "c", "one", "--json"]);
    let changes: serde_json::Value = serde_json::from_str(&changes).expect("JSON");
    let messages: i64 =
        changes.as_array().expect("a list").iter().filter_map(|change| change["messages"].as_i64()).sum();
    assert_eq!(messages, left);
    for (arguments, code, reason) in [
        (&["checkpoint", "save", "c", "one"][..], 1, "exists"),
        (&["checkpoint", "show", "c", "two"], 1, "pgonce checkpoint list"),
        (&["checkpoint", "restore", "c", "two", "--yes"], 1, "does not exist"),
        (&["checkpoint", "restore", "c", "one"], 2, "--yes"),
        (&["checkpoint", "delete", "c", "one"], 2, "--yes"),
        (&["replay", "c", "--from", "soon"], 2, "earliest"),
        (&["replay", "c", "--from", "earliest", "--reapply-effects"], 2, "--yes"),
    ] {
        let (got, text) = said(&database, arguments);
        assert!(got == Some(code) && text.contains(reason), "{arguments:?}: {got:?} {text}");
    }
    let restored = well(&["checkpoint", "restore", "c", "one", "--yes"]);
    assert!(restored.ends_with("restored consumer c to checkpoint one\n"), "{restored}");
    assert_eq!(number(&client, "select sum(lag)::bigint from pgonce.consumer_lag where consumer = 'c'").await, left);
    drain(&client).await;
    assert!(well(&["replay", "c", "--from", "earliest"]).contains("nothing was done"));
    let again = well(&["replay", "c", "--from", "earliest", "--reapply-effects", "--yes"]);
    assert!(again.ends_with("30 messages of consumer c come again\n"), "{again}");
    assert_eq!(well(&["checkpoint", "delete", "c", "one", "--yes"]), "deleted checkpoint one of consumer c\n");
    assert_eq!(number(&client, "select count(*) from pgonce.checkpoint_parts").await, 0);
}

#[tokio::test]
async fn a_daemon_takes_checkpoints_by_itself_and_keeps_some() {
    let (database, client) = world(5).await;
    let directory = tempfile::tempdir().expect("a directory");
    let config = directory.path().join("pgonce.toml");
    let stages = toml::toml! {
        topic = [{ name = "t", partitions = 2 }]
        consumer = [{ name = "c", topic = "t", kind = "sql", state = ["ledger"], checkpoint_every_ms = 1000,
                      checkpoints_kept = 1, statements = "select count(*) from received" }]
    };
    std::fs::write(&config, stages.to_string()).expect("written");
    client.batch_execute("select pgonce.set_state('c', '{}')").await.expect("set");
    let arguments = ["run", "--database-url", &database.url, "--config", config.to_str().expect("text")];
    let daemon = Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::null()));
    let newest = "select coalesce(max(checkpoint_id), 0) from pgonce.checkpoints where is_scheduled";
    eventually("it has taken a second one", async || (number(&client, newest).await >= 2).then_some(())).await;
    daemon.finish();
    assert_eq!(number(&client, "select count(*) from pgonce.checkpoints").await, 1);
    let tables = "select count(*) from pgonce.checkpoint_tables where relation = 'ledger'::regclass";
    assert_eq!(number(&client, tables).await, 1);
}
