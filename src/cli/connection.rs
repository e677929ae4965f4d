//! Which database a command works on.

use clap::Args;

use crate::{Database, Error, Schema};

/// Where pgonce is installed.
#[derive(Clone, Debug, Args)]
pub(super) struct SchemaArg {
    /// Schema that holds the tables and functions of pgonce.
    #[arg(long, value_name = "NAME", default_value = "pgonce", value_parser = parse_schema)]
    pub(super) schema: Schema,
}

/// The database, for commands that work on one of the user's.
#[derive(Clone, Debug, Args)]
pub(super) struct Connection {
    /// The database, such as `postgresql://user@host:5432/app`.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    pub(super) database_url: String,
    #[command(flatten)]
    pub(super) schema: SchemaArg,
}

impl Connection {
    /// Opens a pool of up to `connections_max` connections.
    pub(super) fn open(&self, connections_max: usize) -> Result<Database, Error> {
        Database::connect(&self.database_url, self.schema.schema.clone(), connections_max)
    }
}

fn parse_schema(name: &str) -> Result<Schema, String> {
    Schema::new(name).map_err(|error| match error.hint() {
        Some(hint) => format!("{error}. {hint}"),
        None => error.to_string(),
    })
}
