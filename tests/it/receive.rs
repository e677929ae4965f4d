//! Receiving by SQL: what a statement around `receive` may do, and what is refused because an effect would be lost.

use pgonce::{Producer, Relay};
use tokio_postgres::Client;

use crate::fixture::TestDatabase;
use crate::probe::{create, number, numbered, pid_of, sqlstate, texts, until_blocked};

const TOPIC: &str = "t";
const RECEIVE_AND_ADD: &str = "update accounts a set amount = amount
    + (select count(*) from received r where r.key = a.account)";

/// Ten messages for each of two accounts, in the queue.
async fn two_accounts() -> (TestDatabase, Client) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, TOPIC, 1, "c").await;
    client
        .batch_execute(
            "create table accounts (account text primary key, amount bigint not null);
             insert into accounts values ('a', 0), ('b', 0)",
        )
        .await
        .expect("created");
    Producer::new(TOPIC).send_all(&client, &numbered(20, &["a", "b"])).await.expect("sent");
    Relay::topic(TOPIC).step(&database.database(1)).await.expect("relayed");
    (database, client)
}

/// Runs an effect that has to wait for another session's update of the same row, and answers its SQLSTATE, if any.
async fn effect_behind_an_update(database: &TestDatabase, client: &Client, effect: String) -> Option<String> {
    let consumer = database.connect().await;
    let pid = pid_of(&consumer).await;
    client
        .batch_execute("begin; update accounts set amount = amount + 100 where account = 'a'")
        .await
        .expect("updated");
    let effect = tokio::spawn(async move { consumer.batch_execute(&effect).await });
    until_blocked(client, pid).await;
    client.batch_execute("commit").await.expect("committed");
    let outcome = effect.await.expect("the effect does not panic");
    outcome.err().map(|error| error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()))
}

#[tokio::test]
async fn a_statement_that_runs_receive_twice_raises_and_applies_nothing() {
    let (database, client) = two_accounts().await;
    let effect = format!("with received as (select * from pgonce.receive('c')) {RECEIVE_AND_ADD}");
    assert_eq!(effect_behind_an_update(&database, &client, effect).await.as_deref(), Some("PO011"));
    let amounts = "select account || ' ' || amount from accounts order by account";
    assert_eq!(texts(&client, amounts).await, ["a 100", "b 0"]);
    assert_eq!(number(&client, "select lag from pgonce.consumer_lag").await, 20);

    let twice = "with x as materialized (select * from pgonce.receive('c', 5)),
                      y as materialized (select * from pgonce.receive('c', 5))
                 select * from x union all select * from y";
    assert_eq!(sqlstate(&client, twice).await, "PO011");
}

#[tokio::test]
async fn a_materialized_receive_is_applied_once_also_where_its_row_is_evaluated_again() {
    let (database, client) = two_accounts().await;
    let effect = format!("with received as materialized (select * from pgonce.receive('c')) {RECEIVE_AND_ADD}");
    assert_eq!(effect_behind_an_update(&database, &client, effect).await, None);
    let amounts = "select account || ' ' || amount from accounts order by account";
    assert_eq!(texts(&client, amounts).await, ["a 110", "b 10"]);
}

#[tokio::test]
async fn several_receives_of_a_transaction_go_on_where_the_one_before_ended() {
    let (_database, client) = two_accounts().await;
    client.batch_execute("begin").await.expect("begun");
    for expected in [8, 8, 4, 0] {
        assert_eq!(number(&client, "select count(*) from pgonce.receive('c', 8)").await, expected);
    }
    client.batch_execute("commit").await.expect("committed");
}

#[tokio::test]
async fn the_view_shows_the_newest_batch_of_the_transaction_only() {
    let (_database, client) = two_accounts().await;
    client.batch_execute("begin").await.expect("begun");
    for expected in [15, 5, 0] {
        assert_eq!(number(&client, "select pgonce.open_batch('c', 15)").await, expected);
        assert_eq!(number(&client, "select count(*) from pgonce.received").await, expected);
    }
    client.batch_execute("commit").await.expect("committed");
    assert_eq!(number(&client, "select count(*) from pgonce.received").await, 0);
}

#[tokio::test]
async fn a_snapshot_older_than_the_generations_that_are_kept_gets_a_serialization_failure() {
    let (database, client) = two_accounts().await;
    let other = database.connect().await;
    client.batch_execute("begin isolation level repeatable read; select 1 from pgonce.progress").await.expect("begun");
    assert_eq!(number(&other, "select count(*) from pgonce.receive('c', 5)").await, 5);
    other.batch_execute("delete from pgonce.progress where generation > 0").await.expect("deleted");
    assert_eq!(sqlstate(&client, "select * from pgonce.receive('c', 5)").await, "40001");
}
