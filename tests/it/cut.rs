//! Cuts: the connection is lost at any message of the protocol, either way, and the work is made again. Nothing is lost,
//! doubled or reordered, and nothing stays behind in the server.

use std::io::Write;
use std::process::Stdio;

use pgonce::{Consumer, Database, Error, Remedy, Schema, Shutdown, Worker};
use serde_json::json;

use crate::books::assert_applied;
use crate::probe::{eventually, number};
use crate::programs::pgonce;
use crate::proxy::{Cut, Proxy, Towards};
use crate::work::{ROUND, Work, World};
use crate::worker::{CONSUMER, INSERT, TOPIC};

/// Messages of the protocol that a unit of work may have. Only a defect has as many.
const CUTS_MAX: usize = 500;

/// Runs a unit of work through a proxy that cuts a connection at each message in turn, both ways, until one goes through.
/// It is the first whose startup packet has a certain text in it; whoever opens another one goes on. `prepare` comes before each, `judge` after it. There are at least so many cuts towards the server, and towards the client.
async fn cut_everywhere(
    what: &str,
    startup_has: &'static str,
    at_least: [usize; 2],
    mut world: World,
    prepare: impl AsyncFn(&mut World),
    work: impl AsyncFn(&World, &Proxy) -> Result<(), String>,
    judge: impl AsyncFn(&mut World),
) {
    let mut cuts = [0; 2];
    for (cuts, towards) in cuts.iter_mut().zip([Towards::Server, Towards::Client]) {
        loop {
            prepare(&mut world).await;
            let mut cut = Some(Cut { towards, after: *cuts });
            let rule = move |startup: &[u8]| {
                let is_meant = startup.windows(startup_has.len()).any(|part| part == startup_has.as_bytes());
                if is_meant { cut.take() } else { None }
            };
            let proxy = Proxy::start(&world.database.url, rule).await;
            let outcome = work(&world, &proxy).await;
            let was_cut = proxy.cuts() > 0;
            assert!(was_cut || outcome.is_ok(), "{what}, {cuts} towards {towards:?}: {outcome:?}");
            // What was passed on before the cut arrives while the proxy is there.
            judge(&mut world).await;
            drop(proxy);
            if !was_cut {
                break;
            }
            *cuts += 1;
            assert!(*cuts < CUTS_MAX, "there is no end to {what}");
        }
    }
    println!("{what}: cut at {} messages to the server, and {} to the client", cuts[0], cuts[1]);
    assert!(cuts[0] >= at_least[0] && cuts[1] >= at_least[1], "{what}: {cuts:?}");
}

/// What it says, and that trying again may help.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn passing(error: Error) -> String {
    assert_eq!(error.kind().remedy(), Remedy::Retry, "{error:?}");
    error.to_string()
}

/// Cuts a unit of work everywhere. It says of each that trying again may help.
async fn cut(work: Work, at_least: [usize; 2]) {
    let run = async |world: &World, proxy: &Proxy| {
        let database = Database::connect(&proxy.url, Schema::default(), 1).expect("the URL of a proxy is valid");
        work.run(world, &database).await.map_err(passing)
    };
    let judge = async |world: &mut World| work.judge(world).await;
    let prepare = async |world: &mut World| work.prepare(world).await;
    cut_everywhere(&format!("{work:?}"), "pgonce", at_least, work.world().await, prepare, run, judge).await;
}

#[tokio::test]
async fn a_producer_may_lose_its_connection_at_any_message() {
    cut(Work::Producer, [9, 25]).await;
}

#[tokio::test]
async fn a_relay_may_lose_its_connection_at_any_message() {
    cut(Work::Relay, [6, 20]).await;
}

#[tokio::test]
async fn a_consumer_of_single_messages_may_lose_its_connection_at_any_message() {
    cut(Work::Each { may_fail: false }, [35, 60]).await;
}

#[tokio::test]
async fn a_consumer_of_single_messages_that_fails_may_lose_its_connection_at_any_message() {
    cut(Work::Each { may_fail: true }, [50, 90]).await;
}

#[tokio::test]
async fn a_consumer_of_batches_that_fails_may_lose_its_connection_at_any_message() {
    cut(Work::Batch, [50, 90]).await;
}

#[tokio::test]
async fn a_consumer_in_sql_may_lose_its_connection_at_any_message() {
    cut(Work::Sql { may_fail: false }, [18, 38]).await;
}

#[tokio::test]
async fn a_consumer_in_sql_that_fails_may_lose_its_connection_at_any_message() {
    cut(Work::Sql { may_fail: true }, [28, 55]).await;
}

#[tokio::test]
async fn the_word_count_may_lose_its_connection_at_any_message() {
    cut(Work::WordCount, [18, 38]).await;
}

#[tokio::test]
async fn an_external_consumer_may_lose_its_connection_at_any_message() {
    cut(Work::External, [20, 40]).await;
}

#[tokio::test]
async fn an_inbox_may_lose_its_connection_at_any_message() {
    cut(Work::Inbox, [13, 30]).await;
}

#[tokio::test]
async fn a_step_under_suspicion_may_lose_its_connection_at_any_message() {
    const SUSPECT: &str = "
        insert into pgonce.suspicions (consumer_id, partition, until_offset, messages)
        select consumer_id, partition, next_offset + 10000, 1000 from pgonce.consumer_offsets
        on conflict do nothing";
    let consumer = Work::Sql { may_fail: false };
    let prepare = async |world: &mut World| {
        consumer.prepare(world).await;
        world.client.batch_execute(SUSPECT).await.expect("under suspicion");
    };
    let work = async |world: &World, proxy: &Proxy| {
        let database = Database::connect(&proxy.url, Schema::default(), 1).expect("the URL of a proxy is valid");
        let shutdown = Shutdown::new();
        let worker = Worker::new(database).consumer_with(Consumer::sql(CONSUMER, INSERT), 1);
        let stop = async {
            eventually("it is applied, or cut", async || (world.is_settled().await || proxy.cuts() > 0).then_some(()))
                .await;
            shutdown.stop();
        };
        let (outcome, ()) = tokio::join!(worker.run(&shutdown), stop);
        if proxy.cuts() == 0 {
            let left = "select count(*) from pgonce.suspicions";
            assert_eq!(number(&world.client, left).await, 0, "it was not made under suspicion");
        }
        outcome.map(drop).map_err(passing)
    };
    let judge = async |world: &mut World| consumer.judge(world).await;
    let world = consumer.world().await;
    // That of the stage, by its application_name.
    cut_everywhere("a step under suspicion", "pgonce c\0", [25, 50], world, prepare, work, judge).await;
}

/// Runs `pgonce enqueue` with as many lines as a round has messages; what it says where it fails.
async fn enqueue(url: &str, rounds: usize) -> Result<(), String> {
    let lines: String = (rounds * ROUND - ROUND..rounds * ROUND)
        .map(|nth| json!({ "payload": { "nth": nth }, "key": "k" }).to_string() + "\n")
        .collect();
    let mut command = pgonce(&["enqueue", TOPIC, "--database-url", url, "--source", &rounds.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let running = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().expect("started");
        let mut input = child.stdin.take().expect("piped");
        // It may end before it has read all.
        let _ = input.write_all(lines.as_bytes());
        drop(input);
        child.wait_with_output().expect("it ends")
    });
    let output = running.await.expect("no panic");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[tokio::test]
async fn the_command_that_enqueues_may_lose_its_connection_at_any_message_and_is_run_again() {
    let world = World::new().await;
    let consumer = Consumer::sql(CONSUMER, INSERT);
    let work = async |world: &World, proxy: &Proxy| enqueue(&proxy.url, world.rounds).await;
    let judge = async |world: &mut World| {
        enqueue(&world.database.url, world.rounds).await.expect("run again");
        world.settle(async |direct| consumer.step(direct).await).await;
        assert_applied(&world.client, world.sent()).await;
    };
    cut_everywhere("pgonce enqueue", "pgonce", [22, 45], world, async |world| world.rounds += 1, work, judge).await;
}
