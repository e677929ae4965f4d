//! The checks: what each is about, what follows from a finding, and what helps. `docs/doctor.md` lists them in the same words.

use std::fmt::Display;

use serde::Serialize;

/// Whether a finding keeps the installation from its promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    Fault,
    Warning,
}

impl Severity {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Warning => "warning",
        }
    }
}

/// One thing that is examined.
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) severity: Severity,
    pub(super) consequence: &'static str,
    /// What helps, where the finding itself knows nothing more exact.
    pub(super) remedy: &'static str,
}

/// One thing that was found.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) severity: Severity,
    pub(super) subject: String,
    pub(super) consequence: &'static str,
    pub(super) remedy: String,
}

impl Finding {
    /// A finding of a check by its name; nothing where there is no such check.
    pub(super) fn of(name: &str, subject: impl Display, remedy: Option<String>) -> Option<Self> {
        let check = CHECKS.iter().find(|check| check.name == name)?;
        Some(Self {
            check: check.name,
            severity: check.severity,
            subject: subject.to_string(),
            consequence: check.consequence,
            remedy: remedy.unwrap_or_else(|| check.remedy.to_owned()),
        })
    }
}

const fn fault(name: &'static str, consequence: &'static str, remedy: &'static str) -> Check {
    Check { name, severity: Severity::Fault, consequence, remedy }
}

const fn warning(name: &'static str, consequence: &'static str, remedy: &'static str) -> Check {
    Check { name, severity: Severity::Warning, consequence, remedy }
}

/// All checks, in the order in which they are told.
pub(super) const CHECKS: &[Check] = &[
    fault(
        "schema",
        "This program cannot work with the database, and nothing else was examined.",
        "Install or upgrade the schema: pgonce migrate.",
    ),
    fault(
        "unexamined",
        "Whether something is in the way there is not known.",
        "Run the doctor as the owner of the schema, or as a member of that role.",
    ),
    fault(
        "version",
        "Functions and views are of another program, and are not held against those of this one.",
        "Run the doctor of the program that installed them, or install those of this one: pgonce migrate.",
    ),
    fault(
        "producer-deduplication",
        "The same message id makes two messages in the outbox.",
        "Put the constraint back; delete the later of two rows with one id first.",
    ),
    fault(
        "queue-deduplication",
        "The same message, or the same offset, can stand in the queue twice.",
        "Put the constraint back; look first which of two rows consumers have received.",
    ),
    fault(
        "consumer-deduplication",
        "A consumer applies a message twice, or two writers move its offset.",
        "Put the constraint back; look first which effects were applied twice.",
    ),
    fault(
        "constraints",
        "Rows that must not be can be written, and functions meet what they do not expect.",
        "Put the constraint back.",
    ),
    fault(
        "indexes",
        "Functions that look up by it become slow, and what it keeps unique is so no longer.",
        "Put the index back.",
    ),
    fault(
        "tables",
        "Functions fail, or write what they must not.",
        "Restore the table from a backup: its rows are part of the promises.",
    ),
    fault(
        "unlogged-tables",
        "A crash of the server empties the table, and replicas do not have it.",
        "Run: alter table … set logged.",
    ),
    fault(
        "routines",
        "A verb fails, or does something else than its contract says.",
        "Install functions and views anew: pgonce migrate --print --from 1 | psql --single-transaction -v ON_ERROR_STOP=1 URL.",
    ),
    fault(
        "triggers",
        "What the trigger holds together no longer is: a foreign key, or what it does for an effect.",
        "Enable the trigger, and look at the rows that were written meanwhile.",
    ),
    fault(
        "fsync",
        "A crash of the machine can lose or tear what was committed: messages, offsets and effects.",
        "Switch fsync on.",
    ),
    fault(
        "full-page-writes",
        "A crash of the machine can leave pages that are half old and half new.",
        "Switch full_page_writes on, unless the file system never tears a page.",
    ),
    fault(
        "synchronous-commit",
        "A crash can lose commits that were reported: a producer believes in messages that are gone, and an effect outside \
         of the database comes again.",
        "Switch synchronous_commit on.",
    ),
    fault(
        "isolation",
        "Transactions that do not choose their isolation fail: relay and the verbs that take locks are for READ COMMITTED only.",
        "Reset default_transaction_isolation where it was set.",
    ),
    fault("read-only", "Nothing can be enqueued, relayed or received here.", "Connect to a server that takes writes."),
    fault(
        "asynchronous-replicas",
        "A failover to it loses the last commits that were reported, with their messages and offsets.",
        "Name it in synchronous_standby_names, or never fail over to it.",
    ),
    fault(
        "sequences",
        "Numbers come again that were used: inserts fail, and what is enqueued with them may be overlooked by the relay.",
        "Lift the sequence before the first producer writes: pgonce migrate does it for the outbox.",
    ),
    fault(
        "sequence-settings",
        "The relay needs numbers to be drawn in the order in which they are given: it may overlook messages.",
        "Put the settings of the sequence back.",
    ),
    fault(
        "dead-owners",
        "Nobody goes on with what it had in hand until a worker has noticed, which then goes on carefully and slowly.",
        "Start a worker of these consumers: it buries the dead within seconds.",
    ),
    fault(
        "grants",
        "The first call that the role may not make fails, and a worker stops there.",
        "Give it what the README lists under Roles.",
    ),
    fault(
        "pooler-statements",
        "Nothing works that needs a transaction, and everything does: effect, record and offset are not one.",
        "Let the pooler pool transactions or sessions: pool_mode = transaction.",
    ),
    fault(
        "orphaned-schemas",
        "No program works on it: what waits in its outbox and queue stays there.",
        "Look whether somebody still needs it, and drop it if nobody does.",
    ),
    fault(
        "weaker-modes",
        "A process that dies loses the effects of the messages at hand (at_most_once), or they are applied again (at_least_once).",
        "Run the consumer with the delivery mode exactly_once, or accept it knowingly.",
    ),
    fault(
        "external-consumers",
        "Its effect is outside of this database, and happens at least once.",
        "Let the receiver deduplicate by message id, or apply the effect in this database.",
    ),
    fault(
        "slow-handlers",
        "A slow call outlives its time: it is cut off and repeated, and an external effect is made by two at once.",
        "Make the handler faster, or allow more time: message_timeout_ms, and the lease of an external consumer.",
    ),
    fault(
        "unattended-consumers",
        "Its messages wait, and nothing that it has not received can be removed.",
        "Run the consumer, or delete it.",
    ),
    fault(
        "prepared-transactions",
        "It holds the lower bound of the relay, its locks, and dead rows; what it enqueued waits.",
        "End it: by commit prepared, or rollback prepared.",
    ),
    warning(
        "pooler-transactions",
        "The promises hold. Notifications do not come through it, so programs ask more often, and a process that died is \
         noticed by its silence only.",
        "Let programs connect to the server itself, or let the pooler pool sessions, where that matters.",
    ),
    warning(
        "unexamined-warnings",
        "Whether something is in the way of speed there is not known.",
        "Run the doctor as the owner of the schema, or as a member of that role.",
    ),
    warning(
        "clock",
        "No promise hangs on it, but times in logs and times of delivery are another machine's.",
        "Synchronize the clocks of both machines.",
    ),
    warning(
        "autovacuum",
        "Dead rows and old transaction ids are not removed: everything becomes slow, and the server stops in the end.",
        "Switch autovacuum on.",
    ),
    warning(
        "xmin-horizon",
        "Dead rows cannot be removed as long as it lasts, so tables grow and scans become slower.",
        "End the transaction, or drop the replication slot.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_lists_the_checks() {
        let document = include_str!("../../../docs/doctor.md");
        // Other tables have other numbers of columns.
        let listed = document.lines().filter(|line| line.starts_with("| `") && line.matches(" | ").count() == 3);
        let own = CHECKS.iter().map(|check| {
            let remedy = check.remedy.replace('|', "\\|");
            format!("| `{}` | {} | {} | {remedy} |", check.name, check.severity.word(), check.consequence)
        });
        assert_eq!(listed.collect::<Vec<_>>(), own.collect::<Vec<_>>());
    }
}
