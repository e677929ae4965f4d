//! Checkpoints that a worker takes by itself (`sql/routines/checkpoint.sql`).
//!
//! The database says when one is due, so any number of workers may ask. Whatever fails here is said and tried again, and
//! stops no stage.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::types::Type;

use crate::consume::{Consumer, Schedule};
use crate::database::Database;
use crate::error::Error;
use crate::shutdown::Shutdown;

/// Shortest time between two looks whether one is due.
const LOOK_MIN: Duration = Duration::from_secs(1);
/// Longest time.
const LOOK_MAX: Duration = Duration::from_secs(60);

/// The consumers of a worker that are saved by schedule.
pub(crate) struct Checkpoints(Vec<(Arc<Consumer>, Schedule)>);

impl Checkpoints {
    pub(crate) fn of<'a>(consumers: impl Iterator<Item = &'a Arc<Consumer>>) -> Self {
        Self(consumers.filter_map(|consumer| Some((Arc::clone(consumer), consumer.schedule()?))).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes what is due until it is asked to stop.
    pub(crate) async fn keep(self, database: Database, shutdown: Shutdown) {
        let shortest = self.0.iter().map(|(_, schedule)| schedule.every).min().unwrap_or(LOOK_MAX);
        let pause = (shortest / 10).clamp(LOOK_MIN, LOOK_MAX);
        let look = async {
            loop {
                for (consumer, schedule) in &self.0 {
                    match take_if_due(&database, consumer.name(), *schedule).await {
                        Ok(None) => {}
                        Ok(Some(checkpoint)) => tracing::info!(
                            consumer.name = consumer.name(),
                            checkpoint.name = checkpoint,
                            "took a checkpoint"
                        ),
                        Err(error) => tracing::warn!(
                            consumer.name = consumer.name(),
                            error.kind = ?error.kind(),
                            error.hint = error.hint(),
                            "took no checkpoint, all else goes on: {error}"
                        ),
                    }
                }
                tokio::time::sleep(pause).await;
            }
        };
        // One that is under way is not waited for: the server finishes it, or rolls it back.
        tokio::select! {
            () = shutdown.stopping() => {}
            () = look => {}
        }
    }
}

/// Takes a checkpoint if one is due; answers its name.
async fn take_if_due(database: &Database, consumer: &str, schedule: Schedule) -> Result<Option<String>, Error> {
    let session = database.session().await?;
    let statement = database.schema().sql(include_str!("../sql/statements/checkpoint_if_due.sql"));
    let every_ms = i64::try_from(schedule.every.as_millis()).unwrap_or(i64::MAX);
    let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
        [(&consumer, Type::TEXT), (&every_ms, Type::INT8), (&schedule.keep, Type::INT4)];
    let rows = session.run(&statement, &parameters).await?;
    session.give_back();
    Ok(rows.first().map(|row| row.try_get("checkpoint")).transpose()?)
}
