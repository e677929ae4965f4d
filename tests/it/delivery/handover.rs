//! Handing over: what is between record and effect, and who may touch it.

use pgonce::{Consumed, Consumer, Delivery};

use super::{APPLIED, CONSUMER, DEAD, World, drain};
use crate::probe::{number, sqlstate, texts};

#[tokio::test]
async fn nobody_receives_in_a_partition_while_a_handler_is_at_what_was_handed_over() {
    let world = World::new(1, "a0 a1 a2 a3 a4 a5 a6").await;
    let holder = world.close_gate((1, 1)).await;
    let pool = world.database.database(4);
    let consumer = world.consumer(Delivery::AtMostOnce, false);
    let (first, ()) = tokio::join!(consumer.step(&pool), async {
        world.until_waiting().await;
        let others = [
            world.consumer(Delivery::AtMostOnce, false),
            world.consumer(Delivery::AtLeastOnce, true),
            world.consumer(Delivery::ExactlyOnce, false),
            Consumer::sql(CONSUMER, "insert into applied (key, nth) select key, 100 from received"),
        ];
        for other in others {
            assert_eq!(other.step(&pool).await.expect("a step"), Consumed::default());
        }
        let looks = [
            "select count(*) from pgonce.watch('{}', array['c'], 1)",
            "select count(*) from pgonce.receive('c', partition => 0)",
            "select count(*) from pgonce.bury('c', 0, 1, 'x') where outcome = 'dead'",
            "select count(*) from pgonce.fail('c', 0, 1, 'x') where outcome <> 'gone'",
        ];
        for look in looks {
            assert_eq!(number(&world.client, look).await, 0, "{look}");
        }
        drop(holder);
    });
    assert_eq!(first.expect("applied").applied, 5);
    assert_eq!(number(&world.client, "select count(*) from pgonce.watch('{}', array['c'], 1)").await, 1);
    drain(&pool, &consumer).await;
    assert_eq!(world.joined(APPLIED).await, "a0 a1 a2 a3 a4 a5 a6");
    world.assert_books().await;
}

#[tokio::test]
async fn a_handover_from_a_restored_dump_is_nobodys() {
    let world = World::new(1, "a0 a1 a2").await;
    // As another server left it that was much further.
    let left = "begin; select pgonce.receive('c', 2);
        update pgonce.progress set handler = '999999999999', handed_over = '{1,2}' where next_offset = 3; commit";
    world.client.batch_execute(left).await.expect("left");
    let consumer = world.consumer(Delivery::AtMostOnce, false);
    assert_eq!(drain(&world.database.database(2), &consumer).await.applied, 1);
    assert_eq!(world.joined(DEAD).await, "a0 a1");
    world.assert_books().await;
}

#[tokio::test]
async fn bury_gives_up_what_is_recorded_as_processed_and_nothing_else() {
    let world = World::new(1, "a0 a1 a2 b3 a4").await;
    let client = &world.client;
    let outcome = async |offset: i64| {
        texts(client, &format!("select outcome from pgonce.bury('c', 0, {offset}, 'lost')")).await.join(" ")
    };
    client.batch_execute("select pgonce.receive('c', 3)").await.expect("received");
    assert_eq!(outcome(2).await, "dead");
    assert_eq!(outcome(2).await, "gone");
    assert_eq!(outcome(4).await, "gone", "not received");
    assert_eq!(outcome(99).await, "gone", "not there");
    assert_eq!(texts(client, "select message_id || attempts || error from pgonce.dead_letters").await, ["a11lost"]);
    world.assert_books().await;

    let replay = "select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    client.batch_execute(replay).await.expect("replayed");
    assert_eq!(outcome(2).await, "gone", "it waits");
    assert_eq!(texts(client, "select message_id from pgonce.receive('c', 1)").await, ["a1"]);
    assert_eq!(outcome(2).await, "dead", "it had come by the parked ones");
    world.assert_books().await;

    // Both at once, in the transaction that received it, and where all was purged.
    client.batch_execute("begin; select pgonce.receive('c', 1)").await.expect("received");
    assert_eq!(outcome(4).await, "dead");
    client.batch_execute("commit; select pgonce.purge_topic('t')").await.expect("purged");
    assert_eq!(outcome(1).await, "gone", "there is nothing left to keep");
    for (call, state) in [
        ("select pgonce.bury('nobody', 0, 1, 'x')", "PO002"),
        ("select pgonce.bury('c', 7, 1, 'x')", "PO003"),
        ("select pgonce.create_consumer('i'); select pgonce.bury('i', 0, 1, 'x')", "PO007"),
        ("begin isolation level repeatable read; select pgonce.bury('c', 0, 1, 'x')", "PO010"),
    ] {
        assert_eq!(sqlstate(client, call).await, state, "{call}");
        client.batch_execute("rollback").await.expect("rolled back");
    }
}

#[tokio::test]
async fn a_handover_is_refused_where_nobody_could_tell_whose_it_is_and_is_on_the_disk() {
    let world = World::new(1, "a0 a1").await;
    let client = &world.client;
    for call in [
        "select pgonce.hand_over('c', 0, '{1}', '3')",
        "begin; select pgonce.receive('c'); select pgonce.hand_over('c', 0, '{1}', pg_current_xact_id())",
        "begin; select pgonce.receive('c'); select pgonce.hand_over('c', 0, '{1}', null)",
        "begin; select pgonce.receive('c'); select pgonce.hand_over('c', 0, '{}', '3')",
        "begin; select pgonce.receive('c'); select pgonce.hand_over('c', 1, '{1}', '3')",
        "begin; select pgonce.receive('c', 1); select pgonce.hand_over('c', 0, '{1}', '3'), pgonce.hand_over('c', 0, '{2}', '3')",
    ] {
        assert_eq!(sqlstate(client, call).await, "PO003", "{call}");
        client.batch_execute("rollback").await.expect("rolled back");
    }
    for (setting, becomes) in [("off", "local"), ("on", "on"), ("remote_write", "remote_write")] {
        let hand_over = format!(
            "begin; set local synchronous_commit = {setting}; select pgonce.receive('c');
             select pgonce.hand_over('c', 0, '{{1,2}}', '3')"
        );
        client.batch_execute(&hand_over).await.expect("handed over");
        assert_eq!(texts(client, "show synchronous_commit").await, [becomes]);
        client.batch_execute("rollback").await.expect("rolled back");
    }
    assert_eq!(texts(client, "select pgonce.finish_handover('c', 0)::text").await, ["false"], "it has none");
}

#[tokio::test]
async fn what_was_handed_over_is_not_taken_for_left_behind_by_the_transaction_that_did_it() {
    let world = World::new(1, "a0 a1").await;
    let handler = world.database.connect().await;
    let handler_id = "select pg_current_xact_id()::text";
    handler.batch_execute("begin").await.expect("begun");
    let handler_id = texts(&handler, handler_id).await.remove(0);
    let hand_over = format!(
        "begin; select pgonce.receive('c', 1); select pgonce.hand_over('c', 0, '{{1}}', '{handler_id}');
         select pgonce.receive('c'); commit"
    );
    world.client.batch_execute(&hand_over).await.expect("handed over");
    assert_eq!(texts(&handler, "select pgonce.finish_handover('c', 0)::text").await, ["true"]);
    handler.batch_execute("commit").await.expect("committed");
    assert_eq!(world.joined(DEAD).await, "");
    assert_eq!(number(&world.client, "select count(*) from pgonce.receive('c')").await, 1);
}

#[tokio::test]
async fn what_a_handler_left_behind_is_told_of_before_anybody_receives() {
    let world = World::new(1, "a0 a1").await;
    // The transaction 3 was over before there was a database.
    let hand_over = "begin; select pgonce.receive('c'); select pgonce.hand_over('c', 0, '{1,2}', '3'); commit";
    world.client.batch_execute(hand_over).await.expect("handed over");
    let lag = "select dead from pgonce.consumer_lag where consumer = 'c'";
    assert_eq!((number(&world.client, lag).await, world.joined(DEAD).await.as_str()), (2, ""));
    assert_eq!(number(&world.client, "select count(*) from pgonce.receive('c')").await, 0);
    assert_eq!((number(&world.client, lag).await, world.joined(DEAD).await.as_str()), (2, "a0 a1"));
}

#[tokio::test]
async fn a_purge_takes_nothing_from_a_handler_but_the_dead_letters_that_it_would_leave() {
    let world = World::new(1, "a0 a1!fails a2").await;
    let holder = world.close_gate((1, 0)).await;
    let pool = world.database.database(2);
    let consumer = world.consumer(Delivery::AtMostOnce, false);
    let (step, ()) = tokio::join!(consumer.step(&pool), async {
        world.until_waiting().await;
        world.client.batch_execute("select pgonce.purge_topic('t')").await.expect("purged");
        drop(holder);
    });
    assert_eq!(step.expect("applied"), Consumed { applied: 2, failed: 1 });
    // There is nothing left to keep of the one that failed.
    assert_eq!((world.joined(APPLIED).await.as_str(), world.joined(DEAD).await.as_str()), ("a0 a2", ""));
    world.publish("a3").await;
    assert_eq!(drain(&pool, &consumer).await.applied, 1);
    world.assert_books().await;
}
