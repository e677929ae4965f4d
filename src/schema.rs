//! The schema of pgonce in a database: its name, its version, and how it gets there.
//!
//! SQL is written in `sql/` with the schema name `pgonce`; a [`Schema`] puts the chosen name in its place, once, when a
//! text is loaded. Tables come from numbered migrations, which only ever grow at the end. Functions and views belong to
//! the program: they are replaced whole whenever their text differs from what is installed.
//!
//! Invariant: everything happens in one transaction, behind an advisory lock that is named after the schema. Of many
//! programs that start at once, one installs and the others find the work done.

use std::fmt;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient, IsolationLevel};

use crate::error::{Error, ErrorKind};

/// Tables, in the order in which they came. The version of a schema is the number of migrations it has seen.
const MIGRATIONS: &[&str] = &[include_str!("../sql/migrations/0001_tables.sql")];

/// Functions and views, in an order in which each finds what it needs.
const ROUTINES: &[&str] = &[
    include_str!("../sql/routines/topic.sql"),
    include_str!("../sql/routines/enqueue.sql"),
    include_str!("../sql/routines/relay_bound.sql"),
    include_str!("../sql/routines/relay_claim.sql"),
    include_str!("../sql/routines/relay.sql"),
    include_str!("../sql/routines/views.sql"),
    include_str!("../sql/routines/consumer.sql"),
    include_str!("../sql/routines/receive.sql"),
    include_str!("../sql/routines/inbox.sql"),
    include_str!("../sql/routines/watch.sql"),
    include_str!("../sql/routines/purge.sql"),
];

/// The version of the tables that this program works with.
pub const SCHEMA_VERSION: i32 = 1;
const _: () = assert!(MIGRATIONS.len() == SCHEMA_VERSION as usize, "one migration for each version");

/// Longest identifier that PostgreSQL keeps whole, in bytes.
const NAME_BYTES_MAX: usize = 63;

/// The name of the PostgreSQL schema that holds pgonce.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Schema(String);

impl Schema {
    /// Takes a name of letters, digits and underscores.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for any other name.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let starts_well = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
        let is_plain = name.chars().all(|next| next.is_ascii_alphanumeric() || next == '_');
        let is_taken = name.starts_with("pg_") || name == "information_schema";
        if starts_well && is_plain && name.len() <= NAME_BYTES_MAX && !is_taken {
            return Ok(Self(name));
        }
        Err(Error::new(ErrorKind::Invalid, format!("schema name {name:?}")).with_hint(format!(
            "A schema name has 1 to {NAME_BYTES_MAX} letters, digits and underscores, starts with neither a digit nor pg_, and is not PostgreSQL's information_schema."
        )))
    }

    /// The name as it was given, without quotes.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Puts the name, quoted, wherever a text from `sql/` says `pgonce`.
    pub(crate) fn sql(&self, text: &str) -> String {
        text.replace("pgonce.", &format!("\"{}\".", self.0)).replace("schema pgonce", &format!("schema \"{}\"", self.0))
    }
}

impl Default for Schema {
    fn default() -> Self {
        Self("pgonce".to_owned())
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What [`migrate`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migration {
    /// The schema was created.
    Created,
    /// The tables were brought from an older version, or the functions from another text, to those of this program.
    Upgraded {
        /// The version that was found.
        from: i32,
    },
    /// Nothing was to do.
    Current,
}

/// Creates or upgrades the schema in one transaction. Safe to call from many programs at once, and at every start: where
/// nothing is to do it only reads. It also lifts the sequence of the outbox where that fell behind, as on a logical replica
/// that was promoted: call it there before the first producer writes.
///
/// The role needs the right to create schemas in the database, or to own the schema if it is there already; no
/// superuser and no extension.
///
/// # Errors
///
/// [`ErrorKind::SchemaTooNew`] if the schema comes from a newer program; errors of the database.
pub async fn migrate(client: &mut Client, schema: &Schema) -> Result<Migration, Error> {
    let routines: Vec<String> = ROUTINES.iter().map(|text| schema.sql(text)).collect();
    let digest = digest_of(client, &routines.concat()).await?;
    if let Some(installed) = installed(client, schema).await? {
        refuse_newer(&installed)?;
        if installed.is_current(&digest) {
            client.query_typed(&schema.sql(include_str!("../sql/statements/restore_sequence.sql")), &[]).await?;
            return Ok(Migration::Current);
        }
    }

    let transaction = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
    transaction.batch_execute(include_str!("../sql/statements/migration_settings.sql")).await?;
    transaction
        .query_typed(include_str!("../sql/statements/migration_lock.sql"), &[(&schema.name(), Type::TEXT)])
        .await?;
    let found = installed(&transaction, schema).await?;
    if let Some(installed) = &found {
        refuse_newer(installed)?;
        if installed.is_current(&digest) {
            return Ok(Migration::Current);
        }
    } else {
        create_schema(&transaction, schema).await?;
    }
    for migration in &MIGRATIONS[found.as_ref().map_or(0, Installed::migrations_seen)..] {
        transaction.batch_execute(&schema.sql(migration)).await?;
    }
    for text in &routines {
        transaction.batch_execute(text).await?;
    }
    transaction
        .query_typed(
            &schema.sql(include_str!("../sql/statements/record_version.sql")),
            &[(&SCHEMA_VERSION, Type::INT4), (&env!("CARGO_PKG_VERSION"), Type::TEXT), (&digest, Type::TEXT)],
        )
        .await?;
    transaction.commit().await?;
    tracing::debug!(schema.name = schema.name(), schema.version = SCHEMA_VERSION, "installed the schema");
    Ok(match found {
        Some(installed) => Migration::Upgraded { from: installed.version },
        None => Migration::Created,
    })
}

/// Checks that the schema is there in the version of this program.
///
/// # Errors
///
/// [`ErrorKind::SchemaMissing`], [`ErrorKind::SchemaTooOld`] or [`ErrorKind::SchemaTooNew`], each with the command that
/// helps; errors of the database.
pub async fn check_version<C: GenericClient>(client: &C, schema: &Schema) -> Result<(), Error> {
    let Some(installed) = installed(client, schema).await? else {
        return Err(Error::new(
            ErrorKind::SchemaMissing,
            format!("this database has no schema {:?} of pgonce", schema.name()),
        )
        .with_hint("Install it with: pgonce init."));
    };
    refuse_newer(&installed)?;
    if installed.version < SCHEMA_VERSION {
        return Err(Error::new(
            ErrorKind::SchemaTooOld,
            format!("the schema has version {}, this program works with {SCHEMA_VERSION}", installed.version),
        )
        .with_hint("Upgrade it with: pgonce init."));
    }
    Ok(())
}

struct Installed {
    version: i32,
    program: String,
    digest: String,
}

impl Installed {
    fn is_current(&self, digest: &str) -> bool {
        self.version == SCHEMA_VERSION && self.digest == digest
    }

    /// How many of [`MIGRATIONS`] are behind it.
    fn migrations_seen(&self) -> usize {
        usize::try_from(self.version).unwrap_or(0).min(MIGRATIONS.len())
    }
}

fn refuse_newer(installed: &Installed) -> Result<(), Error> {
    if installed.version <= SCHEMA_VERSION {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::SchemaTooNew,
        format!(
            "the schema has version {} (of pgonce {}), this program works with {SCHEMA_VERSION}",
            installed.version, installed.program
        ),
    )
    .with_hint(format!("Use pgonce {} or later.", installed.program)))
}

async fn installed<C: GenericClient>(client: &C, schema: &Schema) -> Result<Option<Installed>, Error> {
    let is_there: bool = client
        .query_typed_one(include_str!("../sql/statements/versions_exist.sql"), &[(&schema.name(), Type::TEXT)])
        .await?
        .try_get("versions_exist")?;
    if !is_there {
        return Ok(None);
    }
    let row = client.query_typed_opt(&schema.sql(include_str!("../sql/statements/newest_version.sql")), &[]).await?;
    row.map(|row| {
        Ok(Installed {
            version: row.try_get("version")?,
            program: row.try_get("program")?,
            digest: row.try_get("routines_digest")?,
        })
    })
    .transpose()
}

async fn create_schema<C: GenericClient>(client: &C, schema: &Schema) -> Result<(), Error> {
    // A role that may not create schemas can be given an empty one: CREATE SCHEMA IF NOT EXISTS would refuse it.
    let is_there: bool = client
        .query_typed_one(include_str!("../sql/statements/schema_exists.sql"), &[(&schema.name(), Type::TEXT)])
        .await?
        .try_get("schema_exists")?;
    if !is_there {
        client.batch_execute(&schema.sql(include_str!("../sql/statements/create_schema.sql"))).await?;
    }
    Ok(())
}

async fn digest_of<C: GenericClient>(client: &C, text: &str) -> Result<String, Error> {
    let row = client.query_typed_one(include_str!("../sql/statements/digest.sql"), &[(&text, Type::TEXT)]).await?;
    Ok(row.try_get("digest")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_name_is_plain_or_refused() {
        for name in ["pgonce", "Events", "_x9", &"a".repeat(NAME_BYTES_MAX)] {
            Schema::new(name).expect("a good name");
        }
        for name in [
            "",
            "9a",
            "pg_x",
            "information_schema",
            "a b",
            "a\"b",
            "a.b",
            "a;drop",
            "ä",
            &"a".repeat(NAME_BYTES_MAX + 1),
        ] {
            assert_eq!(Schema::new(name).expect_err("refused").kind(), ErrorKind::Invalid, "{name}");
        }
    }

    #[test]
    fn the_name_is_put_in_quoted() {
        let schema = Schema::new("User").expect("a good name");
        assert_eq!(
            schema.sql("create schema pgonce; select 'pgonce_batch.x' from pgonce.queue"),
            "create schema \"User\"; select 'pgonce_batch.x' from \"User\".queue"
        );
    }
}
