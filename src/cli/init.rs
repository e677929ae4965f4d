//! `pgonce init`: create or upgrade the schema.

use clap::Args;

use super::Outcome;
use super::connection::Connection;
use super::text::say;
use crate::{Migration, SCHEMA_VERSION, migrate};

/// Create the schema of pgonce in a database, or upgrade it.
///
/// Does nothing where it is there in this program's version, so it may run at every start, and from many machines at once.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce init --database-url postgresql://app@db/app --schema events")]
pub(super) struct Init {
    #[command(flatten)]
    connection: Connection,
}

impl Init {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let database = self.connection.open(1)?;
        let mut session = database.session().await?;
        let migration = migrate(&mut session, database.schema()).await?;
        session.give_back();
        let schema = database.schema();
        let said = match migration {
            Migration::Created => format!("created schema {schema}, version {SCHEMA_VERSION}"),
            Migration::Upgraded { from } => format!("upgraded schema {schema} from version {from} to {SCHEMA_VERSION}"),
            Migration::Current => format!("schema {schema} has version {SCHEMA_VERSION} already"),
        };
        say!("{said}")?;
        Ok(Outcome::Done)
    }
}
