//! Failing: what becomes of a message that fails, or that fails with others.

use std::time::Duration;

use pgonce::{Delivery, ErrorKind, Message, Producer};

use super::{APPLIED, DEAD, PARKED, TOPIC, World, drain};
use crate::probe::{eventually, number, texts};

#[tokio::test]
async fn at_least_once_retries_what_fails_and_applies_all_else() {
    let fates = "a0 b1!fails a2 b3 c4!panics d5!hangs a6!swallows e7 a8 d9";
    for is_batch in [false, true] {
        let world = World::new(1, fates).await;
        let consumer = world.consumer(Delivery::AtLeastOnce, is_batch).message_timeout(Duration::from_millis(300));
        let all = drain(&world.database.database(2), &consumer).await;
        assert_eq!((all.applied, all.failed), (6, 4 * 3), "batch: {is_batch}");
        assert_eq!(world.joined(DEAD).await, "b1 c4 d5 a6");
        let applied = texts(&world.client, "select key || nth from applied order by nth").await.join(" ");
        assert_eq!(applied, "a0 a2 b3 e7 a8 d9");
        world.assert_books().await;
    }
}

#[tokio::test]
async fn at_most_once_tries_nothing_again_and_says_why_it_failed() {
    let world = World::new(1, "a0 b1!fails a2 b3 c4!panics d5!hangs a6!divides e7 a8 d9!sleeps").await;
    let consumer = world.consumer(Delivery::AtMostOnce, false).message_timeout(Duration::from_millis(300));
    let all = drain(&world.database.database(2), &consumer).await;
    assert_eq!((all.applied, all.failed), (5, 5));
    assert_eq!(world.joined(APPLIED).await, "a0 a2 b3 e7 a8");
    let dead = r#"select message_id || ' ' || attempts || ' ' || error from pgonce.dead_letters order by "offset""#;
    let dead = texts(&world.client, dead).await;
    assert_eq!(dead[..2], ["b1 1 it fails", "c4 1 the handler panicked"]);
    assert_eq!(dead[2..4], ["d5 1 it took longer than 300ms", "a6 1 division by zero (22012)"]);
    assert!(dead[4].starts_with("d9 1 "), "{dead:?}");
    assert!(world.called().values().all(|&times| times == 1));
    world.assert_books().await;

    // Where the operator says so, it is tried once more, and goes through the consumer as any other.
    world
        .client
        .batch_execute("update pgonce.dead_letters set payload = jsonb_set(payload, '{fate}', '\"\"')")
        .await
        .expect("mended");
    let replay =
        "select count(*) from pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letters))";
    assert_eq!(number(&world.client, replay).await, 5);
    let all = drain(&world.database.database(2), &consumer).await;
    assert_eq!((all.applied, all.failed), (5, 0));
    assert_eq!(world.joined(APPLIED).await, "a0 a2 b3 e7 a8 b1 c4 d5 a6 d9");
    world.assert_books().await;
}

#[tokio::test]
async fn a_batch_that_fails_at_most_once_is_dead_as_a_whole_but_what_could_not_be_read_by_itself() {
    let world = World::new(1, "a0 b1 a2!fails").await;
    let misfit = [Message::json(&"secret").expect("JSON").id("misfit").key("m")];
    Producer::new(TOPIC).send_all(&world.client, &misfit).await.expect("sent");
    world.publish("a4 b5 a6").await;
    let consumer = world.consumer(Delivery::AtMostOnce, true).batch_messages(3);
    let all = drain(&world.database.database(2), &consumer).await;
    assert_eq!((all.applied, all.failed), (3, 4));
    assert_eq!(world.joined(DEAD).await, "a0 b1 a2 misfit");
    assert_eq!(world.joined(APPLIED).await, "a4 b5 a6");
    world.assert_books().await;
}

#[tokio::test]
async fn what_no_message_is_to_blame_for_costs_one_of_them_and_the_rest_comes_again_in_order() {
    for (fate, is_kept) in [("misses", true), ("is_cut", false), ("commits", false)] {
        let world = World::new(1, &format!("a0 a1!{fate} a2 b3 a4")).await;
        let pool = world.database.database(2);
        let consumer = world.consumer(Delivery::AtMostOnce, false);
        let error = consumer.step(&pool).await.expect_err("it is no fault of the message");
        assert!(fate != "commits" || error.kind() == ErrorKind::Handler, "{error}");
        if is_kept {
            assert_eq!(world.joined(APPLIED).await, "a0", "{fate}");
            assert_eq!(world.joined(DEAD).await, "a1", "{fate}");
            assert_eq!(world.joined(PARKED).await, "a2 b3 a4", "{fate}");
            world.assert_books().await;
        }
        world.publish("a5 b6").await;
        eventually("what was left behind is settled", async || {
            consumer.step(&pool).await.expect("a step");
            (number(&world.client, "select lag + parked from pgonce.consumer_lag where consumer = 'c'").await == 0)
                .then_some(())
        })
        .await;
        let dead = world.joined(DEAD).await;
        let applied = texts(&world.client, APPLIED).await;
        if is_kept {
            assert_eq!((dead.as_str(), applied.join(" ").as_str()), ("a1", "a0 a2 b3 a4 a5 b6"), "{fate}");
        } else {
            // Nobody knows what the handler has seen.
            assert_eq!(dead, "a0 a1 a2 b3 a4", "{fate}");
            assert_eq!(applied[applied.len() - 2..], ["a5", "b6"], "{fate}");
        }
        assert!(world.called().values().all(|&times| times == 1), "{fate}");
        world.assert_books().await;
    }
}
