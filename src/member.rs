//! Membership: a worker with consumers says once a second that it lives, and bids farewell when it ends.
//!
//! Of one that dies without a farewell, by a handler that aborts or is killed for its memory, others (or itself, started
//! anew) learn so, and go on carefully where it may have died of a message (`sql/routines/member.sql`).

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::database::Database;
use crate::error::Error;

/// How often a member says that it lives.
pub(crate) const BEAT_EVERY: Duration = Duration::from_secs(1);

/// A worker, as other workers see it.
#[derive(Debug)]
pub(crate) struct Member {
    id: Uuid,
    consumers: Vec<String>,
    suspected: Mutex<BTreeSet<String>>,
    has_joined: watch::Sender<bool>,
}

impl Member {
    pub(crate) fn new(consumers: Vec<String>) -> Self {
        Self { id: Uuid::now_v7(), consumers, suspected: Mutex::default(), has_joined: watch::Sender::new(false) }
    }

    /// Whether there is anything to die of.
    pub(crate) fn has_consumers(&self) -> bool {
        !self.consumers.is_empty()
    }

    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// Says once that it lives, and hears of which consumers a process may have died.
    ///
    /// # Errors
    ///
    /// Errors of the database.
    pub(crate) async fn beat(&self, database: &Database) -> Result<(), Error> {
        let session = database.session().await?;
        let statement = database.schema().sql(include_str!("../sql/statements/beat.sql"));
        let rows = session.run(&statement, &[(&self.id, Type::UUID), (&self.consumers, Type::TEXT_ARRAY)]).await?;
        session.give_back();
        let suspected = rows.iter().map(|row| row.try_get("consumer")).collect::<Result<_, _>>()?;
        *self.suspected.lock().unwrap_or_else(PoisonError::into_inner) = suspected;
        self.has_joined.send_replace(true);
        Ok(())
    }

    /// Waits until it was said once that it lives: before that, nobody would notice that it died.
    pub(crate) async fn joined(&self) {
        // The sender lives as long as `self`.
        let _ = self.has_joined.subscribe().wait_for(|has_joined| *has_joined).await;
    }

    /// Whether a process may have died of a message of this consumer.
    pub(crate) fn suspects(&self, consumer: &str) -> bool {
        self.suspected.lock().unwrap_or_else(PoisonError::into_inner).contains(consumer)
    }

    /// Bids farewell.
    ///
    /// # Errors
    ///
    /// Errors of the database.
    pub(crate) async fn leave(&self, database: &Database) -> Result<(), Error> {
        let session = database.session().await?;
        let statement = database.schema().sql(include_str!("../sql/statements/leave.sql"));
        session.run(&statement, &[(&self.id, Type::UUID)]).await?;
        session.give_back();
        Ok(())
    }
}
