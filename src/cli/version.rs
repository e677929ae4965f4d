//! `pgonce version`: this program, the schema that it works with, and what is installed.

use clap::Args;
use serde::Serialize;

use super::Outcome;
use super::connection::Connection;
use super::text::{print_json, say};
use crate::{SCHEMA_VERSION, SCHEMA_VERSION_MAX, installed};

/// Show the versions of this program and of the schema that it works with, and what a database has installed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pgonce version --database-url postgresql://app@db/app --json")]
pub(super) struct Version {
    #[command(flatten)]
    connection: Connection,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    program: &'static str,
    schema_version: i32,
    schema_version_max: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    database: Option<Found>,
}

#[derive(Debug, Serialize)]
struct Found {
    schema: String,
    installed: Option<Versions>,
}

#[derive(Debug, Serialize)]
struct Versions {
    schema_version: i32,
    program: String,
}

impl Version {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        let report = Report {
            program: env!("CARGO_PKG_VERSION"),
            schema_version: SCHEMA_VERSION,
            schema_version_max: SCHEMA_VERSION_MAX,
            database: if self.connection.is_given() { Some(self.find().await?) } else { None },
        };
        if self.json {
            print_json(&report)?;
        } else {
            report.print()?;
        }
        Ok(Outcome::Done)
    }

    async fn find(&self) -> anyhow::Result<Found> {
        let database = self.connection.open(1)?;
        let session = database.session().await?;
        let schema = database.schema();
        let installed = installed(&*session, schema).await?;
        session.give_back();
        let versions = |found: crate::Installed| Versions { schema_version: found.version, program: found.program };
        Ok(Found { schema: schema.name().to_owned(), installed: installed.map(versions) })
    }
}

impl Report {
    fn print(&self) -> std::io::Result<()> {
        say!("pgonce {}: works with schema versions {SCHEMA_VERSION} and {SCHEMA_VERSION_MAX}", self.program)?;
        let Some(Found { schema, installed }) = &self.database else {
            return Ok(());
        };
        match installed {
            Some(Versions { schema_version, program }) => {
                say!("schema {schema}: version {schema_version}, installed by pgonce {program}")
            }
            None => say!("schema {schema}: not installed"),
        }
    }
}
