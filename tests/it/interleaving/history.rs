//! What happened in one permutation, by a logical clock: when each step began and ended, what it answered, and which
//! transactions committed.

use std::fmt::{self, Write as _};

use super::specification::{Kind, Step};

/// A moment: how many steps had begun or ended before.
pub(crate) type Moment = usize;

/// One run of a step.
#[derive(Debug)]
pub(crate) struct Ran<'a> {
    pub(crate) step: &'a Step,
    pub(crate) transaction: usize,
    pub(crate) began: Moment,
    pub(crate) ended: Option<Moment>,
    has_waited: bool,
    answer: String,
}

/// One transaction of a session, explicit or of a single statement.
#[derive(Debug)]
pub(crate) struct Transaction {
    pub(crate) session: usize,
    pub(crate) ended: Option<Moment>,
    pub(crate) commit: Option<Commit>,
    pub(crate) above_read_committed: bool,
    is_explicit: bool,
}

/// Between these moments a transaction became visible to others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Commit {
    pub(crate) began: Moment,
    pub(crate) ended: Moment,
}

/// A relay saw all that was committed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    /// It saw what this one had enqueued, too.
    pub(crate) transaction: usize,
    pub(crate) began: Moment,
    pub(crate) ended: Moment,
}

/// The steps so far, in the order in which they began.
#[derive(Debug, Default)]
pub(crate) struct History<'a> {
    pub(crate) steps: Vec<Ran<'a>>,
    pub(crate) transactions: Vec<Transaction>,
    clock: Moment,
}

impl<'a> History<'a> {
    /// Notes that a step begins, in the open transaction of its session or in a new one.
    pub(crate) fn begin(&mut self, session: usize, step: &'a Step) -> usize {
        let began = self.tick();
        let transaction = self.open(session).unwrap_or_else(|| {
            let above_read_committed = matches!(step.kind(), Kind::Begin { above_read_committed: true });
            let is_explicit = matches!(step.kind(), Kind::Begin { .. });
            self.transactions.push(Transaction {
                session,
                ended: None,
                commit: None,
                above_read_committed,
                is_explicit,
            });
            self.transactions.len() - 1
        });
        self.steps.push(Ran {
            step,
            transaction,
            began,
            ended: None,
            has_waited: false,
            answer: "no answer".to_owned(),
        });
        self.steps.len() - 1
    }

    /// Notes that a step waits for another session.
    pub(crate) fn wait(&mut self, index: usize) {
        self.steps[index].has_waited = true;
    }

    /// Notes that a step has ended well.
    pub(crate) fn end(&mut self, index: usize, answer: String) {
        let ended = self.tick();
        let ran = &mut self.steps[index];
        ran.ended = Some(ended);
        ran.answer = answer;
        let transaction = &mut self.transactions[ran.transaction];
        let commits = ran.step.kind() == Kind::Commit || !transaction.is_explicit;
        if commits {
            transaction.commit = Some(Commit { began: ran.began, ended });
        }
        if commits || ran.step.kind() == Kind::Rollback {
            transaction.ended = Some(ended);
        }
    }

    /// Notes that a step has failed, and with it its transaction.
    pub(crate) fn fail(&mut self, index: usize, answer: String) {
        let ended = self.tick();
        let ran = &mut self.steps[index];
        ran.ended = Some(ended);
        ran.answer = answer;
        self.transactions[ran.transaction].ended = Some(ended);
    }

    /// Notes that a session was rolled back by the runner.
    pub(crate) fn roll_back(&mut self, session: usize) {
        let ended = self.tick();
        if let Some(open) = self.open(session) {
            self.transactions[open].ended = Some(ended);
        }
    }

    /// The open transaction of a session.
    pub(crate) fn open(&self, session: usize) -> Option<usize> {
        self.transactions.iter().rposition(|transaction| transaction.session == session && transaction.ended.is_none())
    }

    /// The run of the step of that name.
    pub(crate) fn ran(&self, step: &str) -> Option<&Ran<'a>> {
        self.steps.iter().find(|ran| ran.step.name == step)
    }

    /// The relay steps that looked at all there was and of which the work stands: nobody else held locks which they
    /// pass over.
    pub(crate) fn looks(&self) -> impl Iterator<Item = Look> {
        self.steps.iter().filter_map(|look| {
            let ended = look.ended.filter(|_| look.step.relays_all())?;
            self.transactions[look.transaction].commit?;
            let is_alone = self.steps.iter().all(|other| {
                let holder = &self.transactions[other.transaction];
                other.transaction == look.transaction
                    || !other.step.holds_from_relay()
                    || other.began > ended
                    || holder.ended.is_some_and(|gone| gone < look.began)
            });
            let look = Look { transaction: look.transaction, began: look.began, ended };
            (is_alone && !self.is_taken_back(look.transaction, ended)).then_some(look)
        })
    }

    /// Whether a transaction went back to a savepoint after that.
    fn is_taken_back(&self, transaction: usize, since: Moment) -> bool {
        self.steps
            .iter()
            .any(|ran| ran.transaction == transaction && ran.began > since && ran.step.sql.starts_with("rollback to"))
    }

    fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }
}

impl fmt::Display for History<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ran in &self.steps {
            let waited = if ran.has_waited { " (had to wait)" } else { "" };
            writeln!(f, "  {}: {}{waited}", ran.step.name, ran.answer)?;
        }
        f.write_char('\n')
    }
}
