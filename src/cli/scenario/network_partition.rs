//! The network splits while the producer's COMMIT is on its way: the producer sends again by another connection, and then
//! the first COMMIT arrives after all.

use super::actor::{Line, Part, Side};
use super::link::Fault;
use super::stage::Stage;
use super::{Finding, Steps, reached};

pub(super) async fn play(stage: &Stage, side: Side, steps: &mut Steps) -> anyhow::Result<Finding> {
    let strike = stage.link.plan(Fault::Held, 1);
    let mut producer = stage.start(Part::Producer, side)?;
    producer.says(Line::Sending).await?;
    steps.seen("Producer: Sending message...")?;
    reached("the producer's COMMIT is on its way", &strike.happened).await?;
    strike.cut.cancel();
    producer.says(Line::Unanswered).await?;
    steps.seen("Network: Partition, the producer is cut off while its COMMIT is on the way!")?;
    steps.seen("Producer: No ACK received, retrying on another connection...")?;
    // Dropping the one that is not first is safe: both only listen.
    let answer = tokio::select! {
        biased;
        was_duplicate = producer.is_answered() => Some(was_duplicate?),
        waits = stage.until_one_waits() => {
            waits?;
            None
        }
    };
    if answer.is_some() {
        stage.until("the message is in the queue", side, |state| state.copies == 1).await?;
        steps.seen("Queue: Message received")?;
        steps.seen("Producer: ACK received")?;
    } else {
        steps.seen("Queue: The same message is on its way, waiting for its transaction...")?;
    }
    strike.heal.cancel();
    reached("the server answers the first COMMIT", &strike.arrived).await?;
    steps.seen("Network: Partition healed, the first COMMIT arrives after all")?;
    let copies = stage.until("the message is in the queue", side, |state| state.copies > 0).await?.copies;
    if answer.is_none() {
        steps.seen("Queue: Message received")?;
        steps.duplicate(producer.is_answered().await?, stage.state(side).await?.copies)?;
        steps.seen("Producer: ACK received")?;
    } else {
        steps.duplicate(false, copies)?;
    }
    producer.end().await?;
    Ok(Finding::of_copies(stage.state(side).await?.copies))
}
