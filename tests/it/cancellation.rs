//! Cancellation: a future of the library may be dropped at any await, and nothing is lost, doubled or handed on.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use pgonce::{
    ConsumerSettings, Database, Error, Schema, TopicSettings, check_version, create_consumer, create_topic, installed,
    migrate, planned_migration,
};

use crate::books::assert_nothing_is_held;
use crate::fixture::TestDatabase;
use crate::probe::{eventually, idle_in_transaction, number, sqlstate};
use crate::work::{Work, World};

/// Polls that a future may take. Only a defect takes as many.
const POLLS_MAX: usize = 1_000;

/// A future that is dropped after so many polls.
pub(crate) struct Dropped<F> {
    future: Pin<Box<F>>,
    polls_left: usize,
}

/// Runs a future for so many polls at the most; nothing if that was not enough.
pub(crate) fn polled<F: Future>(polls: usize, future: F) -> Dropped<F> {
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

/// The one connection of a pool is there again, and outside of any transaction.
async fn assert_not_handed_on(pool: &Database) {
    let session = pool.session().await.expect("a session");
    assert_eq!(sqlstate(&session, "savepoint inside").await, "25P01", "a transaction was handed on");
    session.give_back();
}

/// Drops a unit of work at each of its polls in turn, until one goes through. There are at least so many.
async fn drop_everywhere(work: Work, at_least: usize) {
    let mut world = work.world().await;
    let mut polls = 1;
    loop {
        work.prepare(&mut world).await;
        // It begins with a connection that is still to be made.
        let pool = world.database.database(1);
        let outcome = polled(polls, work.run(&world, &pool)).await;
        assert_not_handed_on(&pool).await;
        work.judge(&mut world).await;
        if let Some(outcome) = outcome {
            outcome.expect("it goes through");
            break;
        }
        polls += 1;
        assert!(polls < POLLS_MAX, "there is no end to {work:?}");
    }
    println!("{work:?}: dropped at {} polls", polls - 1);
    assert!(polls > at_least, "{work:?}: {polls}");
}

#[tokio::test]
async fn a_producer_a_relay_and_an_inbox_may_be_dropped_at_any_poll() {
    drop_everywhere(Work::Producer, 5).await;
    drop_everywhere(Work::Relay, 2).await;
    drop_everywhere(Work::Inbox, 4).await;
}

#[tokio::test]
async fn a_consumer_may_be_dropped_at_any_poll() {
    drop_everywhere(Work::Each { may_fail: false }, 8).await;
    drop_everywhere(Work::Sql { may_fail: false }, 5).await;
    drop_everywhere(Work::WordCount, 5).await;
}

#[tokio::test]
async fn a_consumer_that_fails_may_be_dropped_at_any_poll() {
    drop_everywhere(Work::Each { may_fail: true }, 15).await;
    drop_everywhere(Work::Batch, 18).await;
    drop_everywhere(Work::Sql { may_fail: true }, 10).await;
}

#[tokio::test]
async fn an_external_consumer_may_be_dropped_at_any_poll() {
    drop_everywhere(Work::External, 5).await;
}

#[tokio::test]
async fn a_worker_may_be_dropped_at_any_poll() {
    drop_everywhere(Work::Worker, 5).await;
}

/// Creates a topic with a consumer, after it has looked whether they can be created.
async fn create(pool: &Database, name: &str) -> Result<(), Error> {
    let session = pool.session().await?;
    check_version(&*session, pool.schema()).await?;
    create_topic(&*session, pool.schema(), name, TopicSettings::default()).await?;
    create_consumer(&*session, pool.schema(), name, Some(name), ConsumerSettings::default()).await?;
    session.give_back();
    Ok(())
}

#[tokio::test]
async fn what_creates_topics_and_consumers_may_be_dropped_at_any_poll() {
    let world = World::new().await;
    let created = "select count(*) from pgonce.consumer_partitions join pgonce.consumers using (consumer_id)
                   where consumer like 'n%'";
    for polls in 1..POLLS_MAX {
        let name = format!("n{polls}");
        let pool = world.database.database(1);
        let outcome = polled(polls, create(&pool, &name)).await;
        assert_not_handed_on(&pool).await;
        create(&world.direct, &name).await.expect("created, or there already");
        assert_eq!(number(&world.client, created).await, 8 * i64::try_from(polls).expect("a number"));
        assert_nothing_is_held(&world.client).await;
        if let Some(outcome) = outcome {
            return outcome.expect("it goes through");
        }
    }
    panic!("there is no end to it");
}

async fn install(pool: &Database) -> Result<(), Error> {
    let mut session = pool.session().await?;
    planned_migration(&*session, pool.schema()).await?;
    migrate(&mut session, pool.schema()).await?;
    installed(&*session, pool.schema()).await?.expect("it is there");
    session.give_back();
    Ok(())
}

#[tokio::test]
async fn an_installation_may_be_dropped_at_any_poll() {
    let database = TestDatabase::empty().await;
    let client = database.connect().await;
    let pool = database.database(1);
    for polls in 1..POLLS_MAX {
        let outcome = polled(polls, install(&pool)).await;
        assert_not_handed_on(&pool).await;
        install(&pool).await.expect("installed, or there already");
        check_version(&client, &Schema::default()).await.expect("it is whole");
        eventually("no transaction is open", async || (idle_in_transaction(&client).await == 0).then_some(())).await;
        if let Some(outcome) = outcome {
            return outcome.expect("it goes through");
        }
        client.batch_execute("drop schema pgonce cascade").await.expect("dropped");
    }
    panic!("there is no end to it");
}

#[tokio::test]
async fn a_session_that_was_dropped_in_a_transaction_is_not_handed_on() {
    let database = TestDatabase::empty().await;
    let client = database.connect().await;
    let pool = database.database(1);
    for _ in 0..5 {
        let session = pool.session().await.expect("a session");
        session.batch_execute("begin; select pg_current_xact_id()").await.expect("begun");
        drop(session);
        assert_not_handed_on(&pool).await;
    }
    eventually("no transaction is open", async || (idle_in_transaction(&client).await == 0).then_some(())).await;
}
