//! Killed: a process that dies at any step, in each mode.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pgonce::{Database, Delivery, Schema, Shutdown, Worker};

use super::{APPLIED, BATCH, DEAD, MESSAGES, World, consumer};
use crate::probe::{eventually, number, texts};

const MODES: [Delivery; 3] = [Delivery::ExactlyOnce, Delivery::AtLeastOnce, Delivery::AtMostOnce];
/// Say to the child what it is to do.
const URL: &str = "PGONCE_TEST_CHILD_URL";
const MODE: &str = "PGONCE_TEST_CHILD_DELIVERY";
const CALLS: &str = "PGONCE_TEST_CHILD_CALLS";
/// How many are settled.
const SETTLED: &str = "
    select (select count(distinct nth) from applied) + (select count(*) from pgonce.dead_letters) - (
      select count(*) from pgonce.consumer_partitions p
      cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) n where n.handler is not null)";

/// The process that dies: this test binary once more, with this test alone.
#[tokio::test]
#[ignore = "the child of the other tests"]
async fn child() {
    let (Ok(url), Ok(mode), Ok(calls)) = (std::env::var(URL), std::env::var(MODE), std::env::var(CALLS)) else {
        return;
    };
    let delivery = MODES.into_iter().find(|known| mode.ends_with(known.name())).expect("a mode");
    let consumer = consumer(Path::new(&calls), delivery, mode.starts_with("batch"));
    let database = Database::connect(&url, Schema::default(), 4).expect("a URL");
    let shutdown = Shutdown::on_signals(Duration::from_secs(10)).expect("signals");
    Worker::new(database).consumer(consumer).run(&shutdown).await.expect("it stops well");
}

fn start(world: &World, delivery: Delivery, is_batch: bool) -> Child {
    let kind = if is_batch { "batch" } else { "each" };
    Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", "--ignored", "delivery::killed::child"])
        .env(URL, &world.database.url)
        .env(MODE, format!("{kind} {}", delivery.name()))
        .env(CALLS, world.calls())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}

fn kill(mut child: Child) {
    child.kill().expect("killed");
    child.wait().expect("waited for");
}

/// Before and behind a statement of the handler, at the COMMIT of its effect, and at the COMMIT of the offset.
const GATES: [(i32, i32); 4] = [(1, 2), (2, 2), (3, 1), (3, 2)];

/// Kills a process at a gate, and lets another one go on. What the server was asked for before goes through, or not.
async fn killed_at(delivery: Delivery, gate: (i32, i32), goes_through: bool, is_batch: bool) -> World {
    let world = World::new(1, MESSAGES).await;
    let holder = world.close_gate(gate).await;
    let child = start(&world, delivery, is_batch);
    let waiting = world.until_waiting().await;
    kill(child);
    if !goes_through {
        world.client.execute("select pg_terminate_backend($1)", &[&waiting]).await.expect("terminated");
    }
    drop(holder);
    let child = start(&world, delivery, is_batch);
    let total = i64::try_from(MESSAGES.split(' ').count()).expect("few");
    eventually("all is settled", async || (number(&world.client, SETTLED).await == total).then_some(())).await;
    eventually("what follows is committed", async || {
        (number(&world.client, "select lag + parked from pgonce.consumer_lag where consumer = 'c'").await == 0)
            .then_some(())
    })
    .await;
    kill(child);
    world.assert_books().await;
    world
}

/// Kills at every gate, in both ways; `is_as_said` is given how often each message was applied, and which are dead.
async fn killed_everywhere(delivery: Delivery, is_as_said: impl Fn(&World, &BTreeMap<String, usize>, &[String])) {
    for (nth, gate) in GATES.into_iter().enumerate() {
        for goes_through in [true, false] {
            let is_batch = (nth % 2 == 0) == goes_through;
            println!("{delivery:?} killed at gate {gate:?}, goes through: {goes_through}, batch: {is_batch}");
            let world = killed_at(delivery, gate, goes_through, is_batch).await;
            let mut applied: BTreeMap<String, usize> = MESSAGES.split(' ').map(|id| (id.to_owned(), 0)).collect();
            for id in texts(&world.client, APPLIED).await {
                *applied.get_mut(&id).expect("it was sent") += 1;
            }
            is_as_said(&world, &applied, &texts(&world.client, DEAD).await);
            let reordered = "
                select key || nth from (
                  select key, nth, lag(nth) over (partition by key order by id) as before
                  from (select min(id) as id, key, nth from applied group by key, nth) a) a
                where nth < before";
            assert_eq!(texts(&world.client, reordered).await, [""; 0]);
        }
    }
}

#[tokio::test]
async fn exactly_once_applies_each_message_once_wherever_a_process_is_killed() {
    killed_everywhere(Delivery::ExactlyOnce, |_, applied, dead| {
        assert!(applied.values().all(|&times| times == 1), "{applied:?}");
        assert!(dead.is_empty(), "{dead:?}");
    })
    .await;
}

#[tokio::test]
async fn at_least_once_repeats_a_batch_at_the_most_wherever_a_process_is_killed() {
    killed_everywhere(Delivery::AtLeastOnce, |_, applied, dead| {
        let repeated = applied.values().filter(|&&times| times == 2).count();
        assert!(applied.values().all(|times| (1..=2).contains(times)), "{applied:?}");
        assert!(repeated <= usize::try_from(BATCH).expect("few"), "{applied:?}");
        assert!(dead.is_empty(), "{dead:?}");
    })
    .await;
}

#[tokio::test]
async fn at_most_once_hands_no_message_out_twice_wherever_a_process_is_killed() {
    killed_everywhere(Delivery::AtMostOnce, |world, applied, dead| {
        let called = world.called();
        assert!(called.values().all(|&times| times == 1), "{called:?}");
        assert!(dead.len() <= usize::try_from(BATCH).expect("few"), "{dead:?}");
        // What was not applied says so, and nothing else does.
        let lost: Vec<&String> = applied.iter().filter(|&(_, &times)| times == 0).map(|(id, _)| id).collect();
        assert!(applied.values().all(|&times| times <= 1), "{applied:?}");
        assert_eq!(lost.len(), dead.len(), "{applied:?}, dead: {dead:?}");
        assert!(lost.iter().all(|id| dead.contains(id)), "{applied:?}, dead: {dead:?}");
    })
    .await;
}

#[tokio::test]
async fn a_batch_is_repeated_where_it_was_committed_and_not_recorded() {
    let world = killed_at(Delivery::AtLeastOnce, (3, 2), false, false).await;
    let repeated = "select count(*) from (select from applied group by nth having count(*) = 2) r";
    assert_eq!(number(&world.client, repeated).await, i64::from(BATCH));
}

/// Until all is applied or dead, with a child that is started again whenever it has died; answers how often it died.
async fn until_settled(world: &World, delivery: Delivery, total: i64) -> usize {
    let mut child = start(world, delivery, false);
    let mut deaths = 0;
    eventually("all is settled", async || {
        if child.try_wait().expect("a child").is_some() {
            deaths += 1;
            child = start(world, delivery, false);
        }
        (number(&world.client, SETTLED).await == total).then_some(())
    })
    .await;
    kill(child);
    deaths
}

#[tokio::test]
async fn a_message_that_aborts_takes_what_was_at_hand_along_at_most_once_and_then_nothing_more() {
    let world = World::new(1, "a0 b1 a2!aborts b3 a4 b5 a6!aborts b7 a8!aborts b9").await;
    assert_eq!(until_settled(&world, Delivery::AtMostOnce, 10).await, 3);
    assert_eq!(world.joined(DEAD).await, "a0 b1 a2 b3 a4 a6 a8");
    assert_eq!(world.joined(APPLIED).await, "b5 b7 b9");
    let error = "select distinct error from pgonce.dead_letters";
    assert_eq!(
        texts(&world.client, error).await,
        ["its handler did not come to an end: the process died, or its connection"]
    );
    assert!(world.called().values().all(|&times| times == 1));
    world.assert_books().await;
}

#[tokio::test]
async fn a_message_that_aborts_is_found_at_least_once_too() {
    let world = World::new(1, "a0 b1 a2!aborts b3 a4 b5").await;
    let deaths = until_settled(&world, Delivery::AtLeastOnce, 6).await;
    assert!((3..30).contains(&deaths), "{deaths}");
    assert_eq!(world.joined(DEAD).await, "a2");
    assert_eq!(number(&world.client, "select count(distinct nth) from applied").await, 5);
    world.assert_books().await;
}
