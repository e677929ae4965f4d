//! How the schema gets into a database, and from one version to the next.
//!
//! Tables come from numbered migrations, which only ever grow at the end. Functions and views belong to the program: they
//! are replaced whenever their text differs from what is installed, unless a newer program of the same schema version
//! has installed its own. What the pieces do is told in `sql/install/`.
//!
//! [`migration_sql`] is the text that [`migrate`] runs. So whoever prints it and has another tool run it gets the same schema.
//!
//! Invariant: everything happens in one transaction, behind an advisory lock that is named after the schema. Of many
//! programs that start at once, one installs and the others find the work done.

use semver::Version;
use sha2::{Digest, Sha256};
use tokio_postgres::{Client, GenericClient, IsolationLevel};

use crate::error::Error;
use crate::schema::{Installed, SCHEMA_VERSION, Schema, installed};

/// Tables, in the order in which they came. The version of a schema is the number of migrations it has seen.
const MIGRATIONS: &[&str] = &[concat!(
    include_str!("../sql/migrations/0001_tables.sql"),
    "\n",
    include_str!("../sql/migrations/0001_checkpoints.sql"),
    "\n",
    include_str!("../sql/migrations/0001_row_types.sql"),
)];
const _: () = assert!(MIGRATIONS.len() == SCHEMA_VERSION as usize, "one migration for each version");

/// Functions and views, in an order in which each finds what it needs. A name stands for one of them.
pub(crate) const ROUTINES: &[&str] = &[
    include_str!("../sql/routines/topic.sql"),
    include_str!("../sql/routines/enqueue.sql"),
    include_str!("../sql/routines/relay_bound.sql"),
    include_str!("../sql/routines/relay_claim.sql"),
    include_str!("../sql/routines/relay.sql"),
    include_str!("../sql/routines/views.sql"),
    include_str!("../sql/routines/consumer.sql"),
    include_str!("../sql/routines/parked.sql"),
    include_str!("../sql/routines/fail.sql"),
    include_str!("../sql/routines/handover.sql"),
    include_str!("../sql/routines/receive.sql"),
    include_str!("../sql/routines/apply.sql"),
    include_str!("../sql/routines/member.sql"),
    include_str!("../sql/routines/lease.sql"),
    include_str!("../sql/routines/suspicion.sql"),
    include_str!("../sql/routines/dead_letter.sql"),
    include_str!("../sql/routines/inbox.sql"),
    include_str!("../sql/routines/watch.sql"),
    include_str!("../sql/routines/purge.sql"),
    include_str!("../sql/routines/rates.sql"),
    include_str!("../sql/routines/state.sql"),
    include_str!("../sql/routines/checkpoint.sql"),
    include_str!("../sql/routines/restore.sql"),
    include_str!("../sql/routines/difference.sql"),
    include_str!("../sql/routines/emit.sql"),
    include_str!("../sql/routines/rights.sql"),
];

const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// What [`migrate`] did, or would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migration {
    /// The schema was created.
    Created,
    /// The tables were brought from an older version, or the functions from an older program, to those of this program.
    Upgraded {
        /// The version that was found.
        from: i32,
    },
    /// Nothing was to do: the schema is this program's, or a newer one that it works with.
    Current,
}

/// Creates or upgrades the schema in one transaction. Safe to call from many programs at once, and at every start: where
/// nothing is to do it only reads. It also lifts the sequence of the outbox where that fell behind, as on a logical replica
/// that was promoted: call it there before the first producer writes.
///
/// A schema of the next version, or of a newer program of this version, is left as it is: this program works with it.
///
/// To create it, the role needs the right to create schemas in the database, or to own the schema if it is there already;
/// to upgrade it, it is a member of the role that owns the tables. No superuser and no extension.
///
/// # Errors
///
/// [`SchemaTooNew`](crate::ErrorKind::SchemaTooNew) if the schema is more than one version ahead of this
/// program; errors of the database, among them an object of yours that depends on a function or view that has to be
/// dropped, by its name.
pub async fn migrate(client: &mut Client, schema: &Schema) -> Result<Migration, Error> {
    if planned_migration(client, schema).await? == Migration::Current {
        restore_sequence(client, schema).await?;
        return Ok(Migration::Current);
    }
    let transaction = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
    transaction.batch_execute(&opening(schema)).await?;
    // Looked at again under the lock.
    let migration = planned_migration(&transaction, schema).await?;
    let from = match migration {
        Migration::Created => 0,
        Migration::Upgraded { from } => from,
        Migration::Current => {
            restore_sequence(&transaction, schema).await?;
            transaction.commit().await?;
            return Ok(migration);
        }
    };
    transaction.batch_execute(&work(schema, from)).await?;
    transaction.commit().await?;
    tracing::debug!(schema.name = schema.name(), schema.version = SCHEMA_VERSION, "installed the schema");
    Ok(migration)
}

/// Lifts the sequence of the outbox where it fell behind. A role that may not do that is a worker's, whose schema is
/// looked after by somebody else.
async fn restore_sequence<C: GenericClient>(client: &C, schema: &Schema) -> Result<(), Error> {
    let statement = schema.sql(include_str!("../sql/statements/may_restore_sequence.sql"));
    if client.query_typed_one(&statement, &[]).await?.try_get("may")? {
        client.query_typed(&schema.sql(include_str!("../sql/statements/restore_sequence.sql")), &[]).await?;
    }
    Ok(())
}

/// Says what [`migrate`] would do. Only reads.
///
/// # Errors
///
/// [`SchemaTooNew`](crate::ErrorKind::SchemaTooNew), as [`migrate`]; errors of the database.
pub async fn planned_migration<C: GenericClient>(client: &C, schema: &Schema) -> Result<Migration, Error> {
    let Some(found) = installed(client, schema).await? else {
        return Ok(Migration::Created);
    };
    found.refuse_newer()?;
    let is_current = found.version > SCHEMA_VERSION
        || is_own(&found, schema)
        || found.version == SCHEMA_VERSION && is_of_newer_program(&found);
    Ok(if is_current { Migration::Current } else { Migration::Upgraded { from: found.version } })
}

/// The statements that bring a schema from a version (0: from nothing) to this program's, for any tool that runs SQL.
///
/// They belong into one transaction, which the tool opens and commits, and may be sent as a single string. They leave
/// what [`migrate`] leaves, and the transaction's settings as they were. They refuse a schema of another version than `from`,
/// but replace the functions of whatever program installed it.
#[must_use]
pub fn migration_sql(schema: &Schema, from: i32) -> String {
    format!(
        "-- pgonce {PROGRAM}: schema {schema}, from version {from} to {SCHEMA_VERSION}. To be run in one transaction.\n\n{}{}",
        opening(schema),
        work(schema, from)
    )
}

fn opening(schema: &Schema) -> String {
    schema.sql(include_str!("../sql/install/open.sql"))
}

fn work(schema: &Schema, from: i32) -> String {
    let version = SCHEMA_VERSION.to_string();
    let routines = routines(schema);
    let names = literal(&format!("{{{}}}", routine_names().collect::<Vec<_>>().join(",")));
    let from = from.clamp(0, SCHEMA_VERSION);
    let seen = usize::try_from(from).expect("it is no less than 0");

    let mut text = if seen == 0 {
        schema.sql(include_str!("../sql/install/create_schema.sql"))
    } else {
        with_values(&schema.sql(include_str!("../sql/install/expect_version.sql")), &[&from.to_string()])
    };
    for migration in &MIGRATIONS[seen..] {
        text.push_str(&schema.sql(migration));
    }
    if seen == 0 {
        text.push_str(&routines);
    } else {
        let replace = schema.sql(include_str!("../sql/install/replace_routines.sql"));
        text.push_str(&with_values(&replace, &[&format!("$routines$\n{routines}$routines$"), &names]));
    }
    text.push_str(&with_values(
        &schema.sql(include_str!("../sql/install/record_version.sql")),
        &[&version, &literal(PROGRAM), &literal(&digest(&routines)), &names],
    ));
    text.push_str(&schema.sql(include_str!("../sql/install/restore_sequence.sql")));
    text.push_str(&schema.sql(include_str!("../sql/install/close.sql")));
    text
}

fn routines(schema: &Schema) -> String {
    ROUTINES.iter().map(|text| schema.sql(text)).collect()
}

fn routine_names() -> impl Iterator<Item = &'static str> {
    ROUTINES.iter().flat_map(|text| text.lines()).filter_map(|line| {
        let (what, named) = line.split_once(" pgonce.")?;
        let is_definition = what.starts_with("create") && (what.ends_with("function") || what.ends_with("view"));
        named.split(['(', ' ']).next().filter(|_| is_definition)
    })
}

/// Whether what is installed is what this program installs.
pub(crate) fn is_own(found: &Installed, schema: &Schema) -> bool {
    found.version == SCHEMA_VERSION && found.digest == digest(&routines(schema))
}

fn digest(text: &str) -> String {
    Sha256::digest(text).iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"))
}

/// Whether a program has installed it that is newer than this one. One that says nothing sensible is older.
fn is_of_newer_program(found: &Installed) -> bool {
    match (Version::parse(&found.program), Version::parse(PROGRAM)) {
        (Ok(found), Ok(own)) => found > own,
        _ => false,
    }
}

/// Puts values in the place of `$1`, `$2`, …: a text of many statements takes no parameters. Nothing of it comes from a user.
fn with_values(text: &str, values: &[&str]) -> String {
    let mut parts = text.split('$');
    let mut written = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let number = part.get(..1).and_then(|digit| digit.parse::<usize>().ok());
        if let Some(value) = number.and_then(|number| values.get(number.checked_sub(1)?)) {
            written.push_str(value);
            written.push_str(&part[1..]);
        } else {
            written.push('$');
            written.push_str(part);
        }
    }
    written
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn values_take_the_place_of_their_numbers() {
        assert_eq!(with_values("do $$ $2, $1 $x$ $3 $$", &["$2", "b"]), "do $$ b, $2 $x$ $3 $$");
    }

    #[test]
    fn a_name_stands_for_one_routine_and_their_text_can_be_quoted() {
        let names: Vec<_> = routine_names().collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        let text = routines(&Schema::default());
        assert!(!text.contains("$routines$"));
        for name in names {
            // Without arguments, so that an overload which an older program left is found.
            let comment = format!(r#"comment on {{}} "pgonce".{name} is"#);
            assert!(["function", "view"].iter().any(|kind| text.contains(&comment.replace("{}", kind))), "{name}");
        }
    }

    #[test]
    fn programs_are_compared_as_versions() {
        let found = |program: &str| Installed { version: 1, program: program.to_owned(), digest: String::new() };
        for (program, is_newer) in [("99.0.0", true), ("0.0.9", false), (PROGRAM, false), ("none", false)] {
            assert_eq!(is_of_newer_program(&found(program)), is_newer, "{program}");
        }
    }
}
