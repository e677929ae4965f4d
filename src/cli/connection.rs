//! Which database a command works on.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::Usage;
use crate::{Database, Error, Schema, Session, check_version};

/// The database, for commands that work on one of the user's.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Connection {
    /// The database, such as `postgresql://user@host:5432/app`.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    pub(super) database_url: Option<String>,
    /// A file that holds the URL of the database, for secrets that are mounted.
    #[arg(long, value_name = "FILE", env = "PGONCE_DATABASE_URL_FILE", conflicts_with = "database_url")]
    pub(super) database_url_file: Option<PathBuf>,
    /// Schema that holds the tables and functions of pgonce [default: pgonce].
    #[arg(long, value_name = "NAME", env = "PGONCE_SCHEMA", value_parser = parse_schema)]
    pub(super) schema: Option<Schema>,
}

/// What a command is about that looks at something.
#[derive(Debug, Args)]
pub(super) struct Reading {
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

/// One topic or consumer.
#[derive(Debug, Args)]
pub(super) struct Named {
    /// Its name.
    pub(super) name: String,
    #[command(flatten)]
    pub(super) connection: Connection,
}

/// One topic or consumer of which something is destroyed.
#[derive(Debug, Args)]
pub(super) struct Destroyed {
    #[command(flatten)]
    pub(super) named: Named,
    /// Do not ask.
    #[arg(long)]
    pub(super) yes: bool,
}

impl Named {
    /// Runs a statement of `sql/statements/` whose parameter is the name.
    pub(super) async fn apply(&self, statement: &str) -> anyhow::Result<Vec<Row>> {
        Ok(self.connection.installed().await?.rows(statement, &[(&self.name, Type::TEXT)]).await?)
    }
}

impl Connection {
    /// The URL of the database.
    pub(super) fn url(&self) -> anyhow::Result<String> {
        match (self.database_url.as_ref().filter(|url| !url.is_empty()), &self.database_url_file) {
            (Some(url), _) => Ok(url.clone()),
            (None, Some(file)) => read_url(file),
            (None, None) => Err(Usage("no database: give --database-url URL, or set DATABASE_URL".to_owned()).into()),
        }
    }

    /// Whether a database is given at all.
    pub(super) fn is_given(&self) -> bool {
        self.database_url.is_some() || self.database_url_file.is_some()
    }

    /// Opens a pool of up to `connections_max` connections.
    pub(super) fn open(&self, connections_max: usize) -> anyhow::Result<Database> {
        Ok(Database::connect(&self.url()?, self.schema.clone().unwrap_or_default(), connections_max)?)
    }

    /// Opens one connection to a database in which pgonce is installed.
    pub(super) async fn installed(&self) -> anyhow::Result<Installed> {
        let database = self.open(1)?;
        let session = database.session().await?;
        check_version(&*session, database.schema()).await?;
        Ok(Installed { database, session })
    }
}

/// One connection to a database in which pgonce is installed in a version that this program can work with.
pub(super) struct Installed {
    database: Database,
    pub(super) session: Session,
}

impl Installed {
    pub(super) fn schema(&self) -> &Schema {
        self.database.schema()
    }

    /// Runs a statement of `sql/statements/`.
    pub(super) async fn rows(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, Error> {
        Ok(self.session.run(&self.schema().sql(statement), parameters).await?)
    }
}

fn read_url(file: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the database URL from {}", file.display()))?;
    let url = text.trim();
    if url.is_empty() {
        return Err(Usage(format!("{} is empty: it should hold the URL of the database", file.display())).into());
    }
    Ok(url.to_owned())
}

pub(super) fn parse_schema(name: &str) -> Result<Schema, String> {
    Schema::new(name).map_err(|error| match error.hint() {
        Some(hint) => format!("{error}. {hint}"),
        None => error.to_string(),
    })
}
