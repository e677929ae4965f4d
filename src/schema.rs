//! The schema of pgonce in a database: its name, and whether its version is one that this program works with.
//!
//! SQL is written in `sql/` with the schema name `pgonce`; a [`Schema`] puts the chosen name in its place, once, when a
//! text is loaded.
//!
//! Invariant: a program of version N works with the schemas of versions N and N + 1, and with no other. So an upgrade goes
//! in two steps: first the schema, while programs of the version before still serve it, then the programs.

use std::fmt;

use tokio_postgres::GenericClient;
use tokio_postgres::types::Type;

use crate::error::{Error, ErrorKind};

/// The version of the schema that this program installs.
pub const SCHEMA_VERSION: i32 = 1;

/// The newest version of the schema that this program works with. A function keeps its name, arguments and result for one
/// version after the one in which they were to change, so programs go on while the next version is being rolled out.
pub const SCHEMA_VERSION_MAX: i32 = SCHEMA_VERSION + 1;

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

/// Checks that the schema is there in a version that this program works with: [`SCHEMA_VERSION`] or, while programs are being
/// replaced by newer ones, [`SCHEMA_VERSION_MAX`].
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
    installed.refuse_newer()?;
    if installed.version < SCHEMA_VERSION {
        return Err(Error::new(
            ErrorKind::SchemaTooOld,
            format!(
                "the schema has version {}, this program works with {SCHEMA_VERSION} and {SCHEMA_VERSION_MAX}",
                installed.version
            ),
        )
        .with_hint("Upgrade it with: pgonce migrate."));
    }
    Ok(())
}

/// What is installed in a schema.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Installed {
    /// The version of the schema.
    pub version: i32,
    /// The version of the program that installed it, or replaced its functions last.
    pub program: String,
    /// What its functions and views are, as a digest.
    pub(crate) digest: String,
}

impl Installed {
    /// Refuses a version beyond [`SCHEMA_VERSION_MAX`].
    pub(crate) fn refuse_newer(&self) -> Result<(), Error> {
        if self.version <= SCHEMA_VERSION_MAX {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::SchemaTooNew,
            format!(
                "the schema has version {} (of pgonce {}), this program works with {SCHEMA_VERSION} and {SCHEMA_VERSION_MAX}",
                self.version, self.program
            ),
        )
        .with_hint(format!("Use pgonce {} or later.", self.program)))
    }
}

/// Reads what is installed; nothing where the schema is not there.
///
/// # Errors
///
/// [`ErrorKind::SchemaMissing`] where the schema is there and does not say its version; errors of the database.
pub async fn installed<C: GenericClient>(client: &C, schema: &Schema) -> Result<Option<Installed>, Error> {
    let found = client
        .query_typed_one(include_str!("../sql/statements/versions_exist.sql"), &[(&schema.name(), Type::TEXT)])
        .await?;
    if !found.try_get::<_, bool>("versions_exist")? {
        return Ok(None);
    }
    let role: &str = found.try_get("role")?;
    // What a role without any right meets first, and PostgreSQL does not say whose right is missing.
    let row = client
        .query_typed_opt(&schema.sql(include_str!("../sql/statements/newest_version.sql")), &[])
        .await
        .map_err(|error| Error::from(error).within(&format!("role {role:?}")))?;
    let row = row.ok_or_else(|| {
        Error::new(ErrorKind::SchemaMissing, format!("the schema {:?} does not say its version", schema.name()))
            .with_hint(
                "Its table schema_versions is empty. Restore that from a backup; nothing can be installed meanwhile.",
            )
    })?;
    Ok(Some(Installed {
        version: row.try_get("version")?,
        program: row.try_get("program")?,
        digest: row.try_get("routines_digest")?,
    }))
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
