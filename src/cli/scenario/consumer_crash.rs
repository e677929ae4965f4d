//! The consumer is killed before its last COMMIT, which is what acknowledges: with a plain table, and in each of the delivery
//! modes.

use anyhow::bail;

use super::actor::{Line, Part, Side};
use super::link::Fault;
use super::stage::{STOCK, Stage};
use super::{Finding, Steps, reached};

pub(super) async fn play(stage: &Stage, side: Side, steps: &mut Steps) -> anyhow::Result<Finding> {
    stage.send(side).await?;
    stage.until("the message is in the queue", side, |state| state.copies == 1 && state.due == 1).await?;
    steps.seen("Queue: Message received")?;
    crash(stage, side, steps).await?;
    consume_again(stage, side, steps).await?;
    let left = stage.state(side).await?;
    if left.due > 0 {
        bail!("the message is still in the queue, {} times: what would become of it is not known", left.due);
    }
    Ok(Finding::of_decrements(STOCK - left.stock))
}

/// How many transactions a message takes.
fn transactions(side: Side) -> usize {
    match side {
        Side::ExactlyOnce => 1,
        Side::Naive | Side::AtMostOnce | Side::AtLeastOnce => 2,
    }
}

async fn crash(stage: &Stage, side: Side, steps: &mut Steps) -> anyhow::Result<()> {
    let strike = stage.link.plan(Fault::Held, transactions(side));
    let mut consumer = stage.start(Part::Consumer, side)?;
    consumer.says(Line::Processing).await?;
    steps.seen("Consumer: Processing message...")?;
    consumer.decrements().await?;
    steps.seen("Consumer: Inventory decremented")?;
    reached("the consumer's last COMMIT is on its way", &strike.happened).await?;
    consumer.kill().await?;
    stage.until_none_is_left().await?;
    let left = stage.state(side).await?;
    steps.seen(if left.due > 0 { "Consumer: CRASH before ACK!" } else { "Consumer: CRASH after ACK!" })?;
    if left.stock == STOCK {
        steps.seen("Database: The decrement had not committed, and is rolled back")?;
    }
    steps.seen(if left.due > 0 {
        "Queue: No ACK, redelivering message..."
    } else {
        "Queue: ACK was received, no redelivery"
    })?;
    Ok(())
}

async fn consume_again(stage: &Stage, side: Side, steps: &mut Steps) -> anyhow::Result<()> {
    let mut consumer = stage.start(Part::Consumer, side)?;
    // Dropping the one that is not first is safe: both only listen.
    tokio::select! {
        biased;
        got = consumer.says(Line::Processing) => got?,
        dead = stage.until("the message is a dead letter", side, |state| state.dead > 0) => {
            let is_lost = dead?.stock == STOCK;
            steps.seen(if is_lost { "Queue: Message is a dead letter, its effect is lost!" } else { "Queue: Message is a dead letter" })?;
            return consumer.end().await;
        }
    }
    steps.seen("Consumer: Processing message...")?;
    let stock = consumer.decrements().await?;
    let is_again = stock < STOCK - 1;
    steps.seen(if is_again { "Consumer: Inventory decremented again!" } else { "Consumer: Inventory decremented" })?;
    consumer.says(Line::Acknowledged).await?;
    steps.seen("Queue: ACK received")?;
    consumer.end().await
}
