//! `pgonce migrate`, also called `init`: create or upgrade the schema.

use std::io::Write;

use clap::Args;

use super::Outcome;
use super::connection::Connection;
use super::text::say;
use crate::{Migration, SCHEMA_VERSION, installed, migrate, migration_sql, planned_migration};

/// Create the schema of pgonce in a database, or upgrade it.
///
/// Does nothing where it is there in this program's version, so it may run at every start, and from many machines at once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    pgonce init --database-url postgresql://app@db/app --schema events\n  \
    pgonce migrate --database-url postgresql://app@db/app --dry-run\n  \
    pgonce migrate --print --from 1 | psql --single-transaction -v ON_ERROR_STOP=1 postgresql://app@db/app")]
pub(super) struct Migrate {
    #[command(flatten)]
    connection: Connection,
    /// Say what would be done, and change nothing.
    #[arg(long, conflicts_with = "print")]
    dry_run: bool,
    /// Print the SQL, for another tool to run in one transaction. Needs no database.
    #[arg(long)]
    print: bool,
    /// With --print: the version that is installed.
    #[arg(long, value_name = "VERSION", requires = "print", default_value_t = 0, hide_default_value = true,
        value_parser = clap::value_parser!(i32).range(0..=i64::from(SCHEMA_VERSION)))]
    from: i32,
}

impl Migrate {
    pub(super) async fn run(self) -> anyhow::Result<Outcome> {
        if self.print {
            let schema = self.connection.schema.unwrap_or_default();
            std::io::stdout().write_all(migration_sql(&schema, self.from).as_bytes())?;
            return Ok(Outcome::Done);
        }
        let database = self.connection.open(1)?;
        let schema = database.schema();
        let mut session = database.session().await?;
        let (migration, verbs) = if self.dry_run {
            (planned_migration(&*session, schema).await?, ["would create", "would replace", "would upgrade"])
        } else {
            (migrate(&mut session, schema).await?, ["created", "replaced", "upgraded"])
        };
        let there = installed(&*session, schema).await?.map_or(SCHEMA_VERSION, |there| there.version);
        session.give_back();
        let [create, replace, upgrade] = verbs;
        match migration {
            Migration::Created => say!("{create} schema {schema}, version {SCHEMA_VERSION}")?,
            Migration::Upgraded { from: SCHEMA_VERSION } => {
                say!("{replace} the functions and views of schema {schema}, version {SCHEMA_VERSION}")?;
            }
            Migration::Upgraded { from } => {
                say!("{upgrade} schema {schema} from version {from} to {SCHEMA_VERSION}")?;
            }
            Migration::Current => say!("schema {schema} has version {there} already")?,
        }
        Ok(Outcome::Done)
    }
}
