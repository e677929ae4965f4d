//! The acknowledgement is lost: the server has the message, the producer does not know, and sends it again.

use super::actor::{Line, Part, Side};
use super::link::Fault;
use super::stage::Stage;
use super::{Finding, Steps, reached};

pub(super) async fn play(stage: &Stage, side: Side, steps: &mut Steps) -> anyhow::Result<Finding> {
    let strike = stage.link.plan(Fault::AnswerLost, 1);
    let mut producer = stage.start(Part::Producer, side)?;
    producer.says(Line::Sending).await?;
    steps.seen("Producer: Sending message...")?;
    reached("the server answers the producer's COMMIT", &strike.happened).await?;
    stage.until("the message is in the queue", side, |state| state.copies == 1).await?;
    steps.seen("Queue: Message received")?;
    strike.cut.cancel();
    producer.says(Line::Unanswered).await?;
    steps.seen("Network: ACK lost!")?;
    steps.seen("Producer: No ACK received, retrying...")?;
    let was_duplicate = producer.is_answered().await?;
    steps.duplicate(was_duplicate, stage.state(side).await?.copies)?;
    steps.seen("Producer: ACK received")?;
    producer.end().await?;
    Ok(Finding::of_copies(stage.state(side).await?.copies))
}
