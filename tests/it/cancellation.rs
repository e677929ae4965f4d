//! Cancellation: a future of the library may be dropped at any await, and nothing is lost, doubled or handed on.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use pgonce::{Consumer, Database, Handler, HandlerError, Message, Producer, Received, Relay};
use tokio_postgres::Transaction;

use crate::probe::{drain, eventually, idle_in_transaction, number, texts};
use crate::worker::{APPLIED, CONSUMER, INSERT, OUT_OF_ORDER, TOPIC, keyed, prepared};

/// A future that is dropped after so many polls.
struct Dropped<F> {
    future: Pin<Box<F>>,
    polls_left: usize,
}

/// Runs a future for so many polls at the most; nothing if that was not enough.
fn polled<F: Future>(polls: usize, future: F) -> Dropped<F> {
    Dropped { future: Box::pin(future), polls_left: polls }
}

impl<F: Future> Future for Dropped<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls_left == 0 {
            return Poll::Ready(None);
        }
        self.polls_left -= 1;
        match self.future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if self.polls_left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Sends messages in a transaction on a connection of the pool, as an application would.
async fn send_in_transaction(pool: &Database, messages: &[Message]) {
    let mut session = pool.session().await.expect("a session");
    let transaction = session.transaction().await.expect("begun");
    Producer::new(TOPIC).send(&transaction, &messages[0]).await.expect("sent");
    Producer::new(TOPIC).send_all(&transaction, &messages[1..]).await.expect("sent");
    transaction.commit().await.expect("committed");
    session.give_back();
}

struct Inserting;

impl Handler for Inserting {
    type Payload = BTreeMap<String, i32>;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Self::Payload>) -> Result<(), HandlerError> {
        let insert = "insert into applied (key, nth) values ($1, $2)";
        tx.execute(insert, &[&message.key, &message.payload["nth"]]).await?;
        Ok(())
    }
}

#[tokio::test]
async fn a_future_that_is_dropped_loses_and_doubles_nothing_and_leaves_no_transaction() {
    const ROUNDS: usize = 120;
    const POLLS_MAX: usize = 13;
    let (database, client) = prepared(1).await;
    let pool = database.database(2);
    let relay = Relay::topic(TOPIC).batch_messages(2);
    let consumers = [Consumer::each(CONSUMER, Inserting), Consumer::sql(CONSUMER, INSERT)].map(|c| c.batch_messages(2));
    let (mut dropped, mut finished) = (0, 0);
    let mut note = |has_finished: bool| *(if has_finished { &mut finished } else { &mut dropped }) += 1;
    for round in 0..ROUNDS {
        let messages: Vec<Message> = (0..3).map(|nth| keyed("k", round * 3 + nth)).collect();
        // Whether a dropped COMMIT took effect cannot be told: sending the same again is the answer.
        let mut polls = 1 + round % POLLS_MAX;
        loop {
            let has_sent = polled(polls, send_in_transaction(&pool, &messages)).await.is_some();
            note(has_sent);
            if has_sent {
                break;
            }
            polls += 1;
        }
        for polls in [1 + round % POLLS_MAX, 1 + round * 7 % POLLS_MAX] {
            note(polled(polls, relay.step(&pool)).await.inspect(|step| assert!(step.is_ok())).is_some());
            let consumer = &consumers[round % 2];
            note(polled(polls, consumer.step(&pool)).await.inspect(|step| assert!(step.is_ok())).is_some());
        }
    }
    assert!(dropped > ROUNDS && finished > ROUNDS, "{dropped} dropped, {finished} finished");
    drain(&pool, &relay, &consumers[1]).await.expect("drained");
    assert_eq!(number(&client, APPLIED).await, 3 * i64::try_from(ROUNDS).expect("a number"));
    assert_eq!(texts(&client, OUT_OF_ORDER).await, [""; 0]);
    eventually("no transaction is open", async || (idle_in_transaction(&client).await == 0).then_some(())).await;
}

#[tokio::test]
async fn a_session_that_was_dropped_in_a_transaction_is_not_handed_on() {
    let (database, client) = prepared(1).await;
    let pool = database.database(1);
    for _ in 0..5 {
        let session = pool.session().await.expect("a session");
        session.batch_execute("begin; select pg_current_xact_id()").await.expect("begun");
        drop(session);
        let next = pool.session().await.expect("a session");
        let has_xid = number(&next, "select count(pg_current_xact_id_if_assigned())").await;
        assert_eq!(has_xid, 0, "a transaction was inherited");
        next.give_back();
    }
    eventually("no transaction is open", async || (idle_in_transaction(&client).await == 0).then_some(())).await;
}
