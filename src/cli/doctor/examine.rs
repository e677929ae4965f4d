//! What is asked of a database, and what its answers are held against.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row, Transaction};

use super::super::connection::Connection;
use super::super::text::count;
use super::checks::{CHECKS, Finding};
use super::routines::{Body, Expression, Manner, What, defined};
use crate::migrate::{ROUTINES, is_own};
use crate::{
    Database, Error, ErrorKind, Installed, SCHEMA_VERSION, SCHEMA_VERSION_MAX, Schema, check_version, installed,
};

/// Statements that answer rows `check`, `subject` and `remedy`, behind the checks that they make; the remedy may be null.
const STATEMENTS: &[(&str, &str)] = &[
    (
        "fsync, full-page-writes, synchronous-commit, isolation, read-only",
        include_str!("../../../sql/doctor/settings.sql"),
    ),
    ("asynchronous-replicas", include_str!("../../../sql/doctor/replicas.sql")),
    ("sequences, sequence-settings", include_str!("../../../sql/doctor/sequences.sql")),
    ("dead-owners", include_str!("../../../sql/doctor/owners.sql")),
    ("grants", include_str!("../../../sql/doctor/grants.sql")),
    ("triggers", include_str!("../../../sql/doctor/triggers.sql")),
    ("external-consumers, weaker-modes, unattended-consumers", include_str!("../../../sql/doctor/consumers.sql")),
    ("slow-handlers", include_str!("../../../sql/doctor/handlers.sql")),
    ("prepared-transactions", include_str!("../../../sql/doctor/prepared.sql")),
    (OF_WARNINGS, include_str!("../../../sql/doctor/vacuum.sql")),
];
/// The checks of these find warnings only.
const OF_WARNINGS: &str = "autovacuum, xmin-horizon";
/// Those that hold for tables of this program's version only.
const OF_THE_VERSION: &[(&str, &str)] = &[
    (
        "producer-, queue- and consumer-deduplication, constraints, indexes",
        include_str!("../../../sql/doctor/constraints.sql"),
    ),
    ("tables, unlogged-tables", include_str!("../../../sql/doctor/tables.sql")),
];
/// Findings of one check that are told.
const FINDINGS_MAX: usize = 100;
/// How far two clocks may be from each other.
const CLOCK_DISTANCE_MAX: Duration = Duration::from_secs(1);
/// How often two plans are compared that differ: what the planner knows of the tables may change in between.
const PLANS_MAX: usize = 3;

/// What was found so far, and of whom it is asked.
struct Examination<'a> {
    schema: &'a Schema,
    /// Role of the caller, quoted where that needs to be.
    role: String,
    /// Role that owns the schema.
    owner: String,
    /// Whether nobody should be given what that one may.
    owner_is_superuser: bool,
    findings: Vec<Finding>,
}

/// Who answers: its process, and its time.
struct Answer {
    pid: i32,
    role: String,
    owner: String,
    owner_is_superuser: bool,
    /// How far its clock is ahead of this machine's at the least, in seconds.
    ahead_seconds: f64,
}

/// All that is found.
pub(super) async fn examine(connection: &Connection) -> anyhow::Result<Vec<Finding>> {
    let database = connection.open(2)?;
    let schema = database.schema();
    let mut session = database.session().await?;
    if let Err(error) = check_version(&*session, schema).await {
        return Ok(vec![of_no_use(&mut session, schema, error).await?]);
    }
    let found = installed(&*session, schema).await?.context("the schema is gone")?;
    let first = ask_who(&session, schema).await?;
    let mut examination = Examination {
        schema,
        role: first.role.clone(),
        owner: first.owner.clone(),
        owner_is_superuser: first.owner_is_superuser,
        findings: Vec::new(),
    };
    let again = examination.examine_connections(&database, &session, &first).await?;
    if let Some(subject) = clock_distance(&[first.ahead_seconds, again.ahead_seconds]) {
        examination.add("clock", subject, None)?;
    }
    let begun = session.build_transaction().read_only(true).start().await;
    match begun {
        Ok(mut transaction) => {
            transaction.query_typed(include_str!("../../../sql/doctor/bounds.sql"), &[]).await?;
            examination.examine_installation(&mut transaction, &found).await?;
            transaction.rollback().await?;
        }
        Err(error) if pools_statements(&error) => {
            // Of the one that pools transactions it says that the promises hold.
            examination.findings.retain(|finding| finding.check != "pooler-transactions");
            examination.add("pooler-statements", "a pooler refuses transactions", None)?;
            let subject = "everything that is in the database: it is looked at in one transaction";
            examination.add(
                "unexamined",
                subject,
                Some("connect to the server itself, or change the pooler".to_owned()),
            )?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(examination.told())
}

/// The finding of a schema that this program cannot work with; an error that is another one stays one.
async fn of_no_use(session: &mut Client, schema: &Schema, error: Error) -> anyhow::Result<Finding> {
    let mut remedy = error.hint().map(str::to_owned);
    match error.kind() {
        ErrorKind::SchemaTooOld | ErrorKind::SchemaTooNew => {}
        ErrorKind::SchemaMissing => {
            let mut transaction = session.build_transaction().read_only(true).start().await?;
            transaction.query_typed(include_str!("../../../sql/doctor/bounds.sql"), &[]).await?;
            let others = ask(&mut transaction, &schema.sql(include_str!("../../../sql/doctor/schemas.sql"))).await?;
            transaction.rollback().await?;
            // A new installation knows no id of those that were processed in the old one.
            if let Some(other) = others.ok().as_deref().and_then(<[Row]>::first) {
                let other: &str = other.try_get("quoted")?;
                remedy = Some(format!(
                    "schema {other} is one of pgonce: if it is the one that is meant, name it by --schema, or rename it back: \
                     alter schema {other} rename to \"{schema}\"; only otherwise: pgonce init"
                ));
            }
        }
        _ => return Err(error.into()),
    }
    Finding::of("schema", &error, remedy).context("there is no check for schemas")
}

async fn ask_who(client: &Client, schema: &Schema) -> anyhow::Result<Answer> {
    let asked = SystemTime::now();
    let row = client.query_typed_one(&schema.sql(include_str!("../../../sql/doctor/session.sql")), &[]).await?;
    let answered = SystemTime::now();
    Ok(Answer {
        pid: row.try_get("pid")?,
        role: row.try_get("role")?,
        owner: row.try_get("owner")?,
        owner_is_superuser: row.try_get("owner_is_superuser")?,
        ahead_seconds: ahead(asked, row.try_get("seconds")?, answered),
    })
}

/// How far another clock is ahead at the least (behind, where negative) that showed so many seconds between two moments.
fn ahead(asked: SystemTime, shown: f64, answered: SystemTime) -> f64 {
    let seconds = |at: SystemTime| match at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => since.as_secs_f64(),
        Err(before) => -before.duration().as_secs_f64(),
    };
    let (earliest, latest) = (seconds(asked), seconds(answered).max(seconds(asked)));
    if shown > latest {
        shown - latest
    } else if shown < earliest {
        shown - earliest
    } else {
        0.0
    }
}

/// What there is to say of the distance of a clock, of which each number is a lower limit.
fn clock_distance(ahead_seconds: &[f64]) -> Option<String> {
    let ahead = ahead_seconds.iter().copied().max_by(|one, other| one.abs().total_cmp(&other.abs()))?;
    let direction = if ahead > 0.0 { "ahead of" } else { "behind" };
    (ahead.abs() > CLOCK_DISTANCE_MAX.as_secs_f64())
        .then(|| format!("the clock of the server is {:.1} s {direction} that of this machine", ahead.abs()))
}

/// Whether `PgBouncer` says that it pools statements.
fn pools_statements(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| error.message().contains("statement pooling"))
}

impl Examination<'_> {
    fn add(&mut self, check: &str, subject: impl std::fmt::Display, remedy: Option<String>) -> anyhow::Result<()> {
        let finding = Finding::of(check, subject, remedy).with_context(|| format!("there is no check {check:?}"))?;
        self.findings.push(finding);
        Ok(())
    }

    /// Two sessions of one backend, or one of two, are a pooler's. Answers what the session said when it was asked again.
    async fn examine_connections(
        &mut self,
        database: &Database,
        session: &Client,
        first: &Answer,
    ) -> anyhow::Result<Answer> {
        let other = match database.session().await {
            Ok(other) => {
                let answer = ask_who(&other, self.schema).await?;
                other.give_back();
                Some(answer)
            }
            Err(error) => {
                let subject = format!("pooler-transactions: a second connection could not be opened: {error}");
                self.add("unexamined", subject, Some("leave room for a connection more".to_owned()))?;
                None
            }
        };
        let again = ask_who(session, self.schema).await?;
        if again.pid != first.pid || other.is_some_and(|other| other.pid == again.pid) {
            self.add("pooler-transactions", "a pooler gives each transaction a connection of its own", None)?;
        }
        Ok(again)
    }

    async fn examine_installation(
        &mut self,
        transaction: &mut Transaction<'_>,
        found: &Installed,
    ) -> anyhow::Result<()> {
        if is_own(found, self.schema) {
            self.examine_routines(transaction).await?;
        } else {
            let subject =
                format!("the schema has version {}, and its functions are of pgonce {}", found.version, found.program);
            self.add("version", subject, None)?;
        }
        if found.version == SCHEMA_VERSION {
            self.examine_by(transaction, OF_THE_VERSION).await?;
        }
        self.examine_by(transaction, STATEMENTS).await?;
        self.examine_schemas(transaction).await
    }

    async fn examine_by(
        &mut self,
        transaction: &mut Transaction<'_>,
        statements: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        for (what, statement) in statements {
            match ask(transaction, &self.schema.sql(statement)).await? {
                Ok(rows) => {
                    for row in rows {
                        self.add(row.try_get("check")?, row.try_get::<_, &str>("subject")?, row.try_get("remedy")?)?;
                    }
                }
                Err(refused) => self.add_unexamined(what, &refused)?,
            }
        }
        Ok(())
    }

    /// Holds functions and views against the text of this program.
    async fn examine_routines(&mut self, transaction: &mut Transaction<'_>) -> anyhow::Result<()> {
        let statement = self.schema.sql(include_str!("../../../sql/doctor/routines.sql"));
        let rows = match ask(transaction, &statement).await? {
            Ok(rows) => rows,
            Err(refused) => return self.add_unexamined("routines", &refused),
        };
        let mut there: BTreeMap<_, Vec<&Row>> = BTreeMap::new();
        for row in &rows {
            let key = (row.try_get::<_, &str>("kind")?, row.try_get::<_, &str>("name")?);
            there.entry(key).or_default().push(row);
        }
        let mut unseen = Vec::new();
        for routine in ROUTINES.iter().flat_map(|text| defined(text, self.schema)) {
            let (name, kind) =
                (routine.name, if matches!(routine.what, What::View { .. }) { "view" } else { "function" });
            let row = match there.get(&(kind, name)).map(Vec::as_slice) {
                Some([row]) => row,
                Some([_, ..]) => {
                    self.add("routines", format!("{kind} {name} is there with other arguments too"), None)?;
                    continue;
                }
                Some([]) | None => {
                    self.add("routines", format!("{kind} {name} is missing"), None)?;
                    continue;
                }
            };
            let outcome = match routine.what {
                What::Function { manner, .. } if manner != Manner::found(row)? => Ok(true),
                What::Function { body: Body::Kept(text), .. } => Ok(row.try_get::<_, &str>("body")? != text),
                What::Function { body: Body::Inlined { arguments, expression }, .. } => {
                    self.plans_differ(transaction, inlined_plans(name, &arguments, &expression)).await?
                }
                What::View { query } => {
                    let sources = [format!("pgonce.{name}"), format!("({query})")];
                    let statement = include_str!("../../../sql/doctor/view_plan.sql");
                    self.plans_differ(transaction, sources.map(|source| statement.replace("$1", &source))).await?
                }
            };
            let is_altered = match outcome {
                Ok(is_altered) => is_altered,
                Err(refused) => {
                    unseen.push((name, refused));
                    continue;
                }
            };
            if is_altered {
                self.add("routines", format!("{kind} {name} is not as this program installs it"), None)?;
            }
        }
        // Most often a role may see none of the tables below them: that is one finding.
        if let Some((name, refused)) = unseen.first() {
            self.add_unexamined(
                &format!("routines: {}, such as {name}", count(unseen.len() as u64, "routine")),
                refused,
            )?;
        }
        Ok(())
    }

    /// Whether what is there, and what this program installs, are planned differently.
    async fn plans_differ(
        &self,
        transaction: &mut Transaction<'_>,
        statements: [String; 2],
    ) -> anyhow::Result<Result<bool, Refused>> {
        for _ in 0..PLANS_MAX {
            let mut plans = Vec::new();
            for statement in &statements {
                match ask(transaction, &self.schema.sql(statement)).await? {
                    Ok(rows) => plans.push(plan(&rows)?),
                    Err(refused) => return Ok(Err(refused)),
                }
            }
            if plans[0] == plans[1] {
                return Ok(Ok(false));
            }
        }
        Ok(Ok(true))
    }

    /// Other schemas of pgonce that nobody can work with.
    async fn examine_schemas(&mut self, transaction: &mut Transaction<'_>) -> anyhow::Result<()> {
        let statement = self.schema.sql(include_str!("../../../sql/doctor/schemas.sql"));
        let rows = match ask(transaction, &statement).await? {
            Ok(rows) => rows,
            Err(refused) => return self.add_unexamined("orphaned-schemas", &refused),
        };
        for row in rows {
            let (name, quoted): (&str, &str) = (row.try_get("name")?, row.try_get("quoted")?);
            if row.try_get("is_left")? {
                let remedy = format!("unless a demo or a scenario is running: drop schema {quoted} cascade");
                self.add("orphaned-schemas", format!("schema {quoted} is one of a demo or a scenario"), Some(remedy))?;
                continue;
            }
            let Ok(other) = Schema::new(name) else {
                self.add("orphaned-schemas", format!("no program takes the name of schema {quoted}"), None)?;
                continue;
            };
            // Another's, whom this role has no business with.
            if !row.try_get::<_, bool>("may_read")? {
                continue;
            }
            let newest = other.sql(include_str!("../../../sql/statements/newest_version.sql"));
            let version = match ask(transaction, &newest).await? {
                Ok(versions) => versions.first().map(|row| row.try_get::<_, i32>("version")).transpose()?,
                Err(refused) => {
                    self.add_unexamined(&format!("orphaned-schemas: schema {name}"), &refused)?;
                    continue;
                }
            };
            match version {
                Some(SCHEMA_VERSION..=SCHEMA_VERSION_MAX) => {}
                Some(version) => {
                    let subject = format!("schema {name} has version {version}, which this program does not work with");
                    self.add("orphaned-schemas", subject, None)?;
                }
                None => self.add("orphaned-schemas", format!("schema {name} has no version"), None)?,
            }
        }
        Ok(())
    }

    fn add_unexamined(&mut self, what: &str, refused: &Refused) -> anyhow::Result<()> {
        let remedy = if refused.code == SqlState::INSUFFICIENT_PRIVILEGE && self.role == self.owner {
            Some("give the owner of the schema back what belongs to another role".to_owned())
        } else if refused.code == SqlState::INSUFFICIENT_PRIVILEGE && self.owner_is_superuser {
            Some(format!("run the doctor as {}", self.owner))
        } else if refused.code == SqlState::INSUFFICIENT_PRIVILEGE {
            Some(format!("run the doctor as {}, or: grant {} to {}", self.owner, self.owner, self.role))
        } else if refused.code == SqlState::QUERY_CANCELED || refused.code == SqlState::LOCK_NOT_AVAILABLE {
            Some("run the doctor again when the server has less to do".to_owned())
        } else {
            Some("mend first what else was found, and run the doctor again".to_owned())
        };
        let check = if what == OF_WARNINGS { "unexamined-warnings" } else { "unexamined" };
        self.add(check, format!("{what}: {}", refused.message), remedy)
    }

    /// The findings in the order of the checks, and no more of one than somebody reads.
    fn told(self) -> Vec<Finding> {
        let mut told = self.findings;
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        told.retain(|finding| {
            let number = numbers.entry(finding.check).or_default();
            *number += 1;
            *number <= FINDINGS_MAX
        });
        let left_out = numbers.into_iter().filter(|(_, number)| *number > FINDINGS_MAX);
        let more =
            left_out.filter_map(|(check, number)| Finding::of(check, format!("{} more", number - FINDINGS_MAX), None));
        told.extend(more);
        told.sort_by_key(|finding| CHECKS.iter().position(|check| check.name == finding.check));
        told
    }
}

/// The statements that show what a function is inlined into, and what it would be.
fn inlined_plans(name: &str, arguments: &[(&str, &str)], expression: &Expression) -> [String; 2] {
    let list = |argument: &dyn Fn(&str, &str) -> String| {
        arguments.iter().map(|(name, of_type)| argument(name, of_type)).collect::<Vec<_>>().join(", ")
    };
    let columns = list(&|name, of_type| format!("null::{of_type} as \"{name}\""));
    let call = format!("pgonce.{name}({})", list(&|argument, _| format!("{name}.\"{argument}\"")));
    let sources = match expression {
        Expression::Value(value) => [call, (*value).to_owned()],
        Expression::Rows(query) => [format!("* from {call}"), format!("* from ({query}) as query")],
    };
    let statement = include_str!("../../../sql/doctor/inlined_plan.sql");
    sources.map(|source| statement.replace("$1", name).replace("$2", &columns).replace("$3", &source))
}

/// The lines of a plan, less the number of its statement, which servers add that count statements (`pg_stat_statements`).
fn plan(rows: &[Row]) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut lines = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, _>>()?;
    lines.retain(|line| !line.starts_with("Query Identifier: "));
    Ok(lines)
}

/// Why the server did not answer.
struct Refused {
    code: SqlState,
    message: String,
}

/// Asks, so that a refusal leaves the transaction as it was.
async fn ask(transaction: &mut Transaction<'_>, statement: &str) -> anyhow::Result<Result<Vec<Row>, Refused>> {
    let asking = transaction.transaction().await?;
    match asking.query_typed(statement, &[]).await {
        Ok(rows) => {
            asking.commit().await?;
            Ok(Ok(rows))
        }
        Err(error) => {
            let Some(refusal) = error.as_db_error() else { return Err(Error::from(error).into()) };
            let refused = Refused { code: refusal.code().clone(), message: refusal.message().to_owned() };
            // Where the connection is gone as well, this says so.
            asking.rollback().await?;
            Ok(Err(refused))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_only_judged_beyond_the_time_that_the_answer_took() {
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for (asked, shown, answered, ahead_by) in [
            (100, 100.5, 101, 0.0),
            (100, 105.0, 103, 2.0),
            (100, 90.0, 103, -10.0),
            // This machine's clock was set back in between.
            (100, 90.0, 80, -10.0),
        ] {
            assert!((ahead(at(asked), shown, at(answered)) - ahead_by).abs() < 1e-6, "{asked} {shown} {answered}");
        }
    }

    #[test]
    fn a_clock_may_be_a_second_off() {
        for (ahead, said) in [
            ([0.0, 0.0], None),
            ([0.2, 1.0], None),
            ([-0.9, -1.0], None),
            ([0.5, 1.5], Some("1.5 s ahead of")),
            ([-7200.0, -7199.9], Some("7200.0 s behind")),
        ] {
            let found = clock_distance(&ahead);
            assert_eq!(found.is_some(), said.is_some(), "{ahead:?}");
            assert!(said.is_none_or(|said| found.is_some_and(|found| found.contains(said))), "{ahead:?}");
        }
    }
}
