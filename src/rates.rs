//! Rates: what a worker writes down now and then, so that the view `rates` has something to compare with
//! (`sql/routines/rates.sql`).
//!
//! Only numbers depend on it: whatever fails here is said once and tried again, and stops no stage. Numbers of calls that
//! were taken and could not be written are lost.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::types::Type;
use tokio_util::sync::CancellationToken;

use crate::consume::Consumer;
use crate::database::Database;
use crate::error::{Error, ErrorKind};

/// How often it is written down.
const WRITE_EVERY: Duration = Duration::from_secs(10);
/// How long that may take.
const WRITE_MAX: Duration = Duration::from_secs(2);

/// The numbers of a worker's consumers.
pub(crate) struct Rates {
    consumers: Vec<Arc<Consumer>>,
    /// Those whose handlers take nearly as long as they may.
    slow: BTreeSet<String>,
    is_failing: bool,
}

impl Rates {
    pub(crate) fn new(consumers: Vec<Arc<Consumer>>) -> Self {
        Self { consumers, slow: BTreeSet::new(), is_failing: false }
    }

    /// Writes the numbers down until all else is over, and the last ones then.
    pub(crate) async fn keep(mut self, database: Database, is_over: CancellationToken) {
        loop {
            let is_last = is_over.is_cancelled();
            let outcome = tokio::time::timeout(WRITE_MAX, self.write(&database)).await;
            let outcome = outcome
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "no answer from the database in time")));
            match outcome {
                Ok(()) => self.is_failing = false,
                Err(error) if self.is_failing || is_last => {
                    tracing::debug!(error.kind = ?error.kind(), "rates are not written down: {error}");
                }
                Err(error) => {
                    self.is_failing = true;
                    tracing::warn!(
                        error.kind = ?error.kind(),
                        error.hint = error.hint(),
                        "rates are not written down, all else goes on: {error}"
                    );
                }
            }
            if is_last {
                return;
            }
            // Both arms only wait.
            tokio::select! {
                () = is_over.cancelled() => {}
                () = tokio::time::sleep(WRITE_EVERY) => {}
            }
        }
    }

    async fn write(&mut self, database: &Database) -> Result<(), Error> {
        let session = database.session().await?;
        let record = database.schema().sql(include_str!("../sql/statements/record_handler_times.sql"));
        for consumer in &self.consumers {
            let taken = consumer.take_handler_times();
            if taken.calls.is_empty() {
                continue;
            }
            let limit_ms = i64::try_from(consumer.handler_limit().as_millis()).unwrap_or(i64::MAX).max(1);
            let row = session
                .run_one(
                    &record,
                    &[
                        (&consumer.name(), Type::TEXT),
                        (&limit_ms, Type::INT8),
                        (&taken.buckets, Type::INT4_ARRAY),
                        (&taken.calls, Type::INT8_ARRAY),
                    ],
                )
                .await?;
            let nears_limit: bool = row.try_get("nears_limit")?;
            if !nears_limit {
                self.slow.remove(consumer.name());
            } else if self.slow.insert(consumer.name().to_owned()) {
                tracing::warn!(
                    consumer.name = consumer.name(),
                    handler.limit_ms = limit_ms,
                    "the handler takes more than half of what it may, in more than 1 of 100 calls: see the view rates"
                );
            }
        }
        session.run(&database.schema().sql(include_str!("../sql/statements/sample_rates.sql")), &[]).await?;
        session.give_back();
        Ok(())
    }
}
