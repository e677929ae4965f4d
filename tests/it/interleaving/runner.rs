//! Runs a specification: every permutation of its steps on the real server, in the manner of PostgreSQL's
//! isolationtester, and then the oracle.
//!
//! A step is sent, and the runner goes on when it has ended or is seen to wait for another session: it asks the server
//! which sessions block which, and assumes nothing about time. A permutation whose next step belongs to a session that
//! still waits cannot happen, and is given up. Each permutation has a topic and a consumer of its own.

use std::time::Instant;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::history::History;
use super::oracle::{State, broken_promises};
use super::permutations;
use super::session::{News, Sessions};
use super::specification::{Guard, Specification};
use crate::fixture::TestDatabase;

/// Of a specification with more, this many evenly spread ones are run.
const PERMUTATIONS_MAX: u64 = 600;
/// Rounds of relay and receive until nothing moves. Only a defect takes as many.
const DRAIN_ROUNDS_MAX: i32 = 50;

/// What was found.
pub(crate) struct Findings {
    pub(crate) run: usize,
    pub(crate) infeasible: usize,
    /// The first permutation that broke a promise, in words.
    pub(crate) violation: Option<String>,
}

enum Verdict {
    Kept,
    /// No permutation that begins with so many of these steps can happen.
    Infeasible(usize),
    Broken(String),
}

/// A database and connections for one specification.
pub(crate) struct Bench<'a> {
    specification: &'a Specification,
    client: Client,
    sessions: Sessions,
    /// Number of permutations so far: each has a topic and a consumer of its own.
    serial: u32,
    /// Dropped last.
    database: TestDatabase,
}

impl<'a> Bench<'a> {
    pub(crate) async fn new(specification: &'a Specification) -> Self {
        let database = TestDatabase::new().await;
        let client = database.connect().await;
        client.batch_execute(include_str!("helpers.sql")).await.expect("the helpers can be installed");
        let sessions = Sessions::open(&database, specification.sessions.len()).await;
        Self { specification, client, sessions, serial: 0, database }
    }

    /// Runs all permutations without a guard, until one breaks a promise, and puts the guard back.
    pub(crate) async fn run_without(&mut self, guard: &Guard) -> Findings {
        let routines = routines_of(guard);
        let places = routines.matches(&guard.text).count();
        assert_eq!(places, 1, "guard {:?}: how often {} says {:?}", guard.name, guard.file, guard.text);
        self.install(&routines.replace(&guard.text, &guard.replacement)).await;
        let findings = self.run_all(&format!(" without {:?}", guard.name)).await;
        // What was under way when a promise broke ends with its connection.
        self.sessions = Sessions::open(&self.database, self.specification.sessions.len()).await;
        self.install(&routines).await;
        findings
    }

    async fn install(&self, routines: &str) {
        let opening = include_str!("../../../sql/install/open.sql");
        self.client
            .batch_execute(&format!("begin; {opening} {routines}; commit"))
            .await
            .expect("routines without a guard are still valid");
    }

    /// Runs all permutations until one breaks a promise.
    pub(crate) async fn run_all(&mut self, how: &str) -> Findings {
        let started = Instant::now();
        let counts: Vec<usize> = self.specification.sessions.iter().map(|session| session.steps.len()).collect();
        let mut findings = Findings { run: 0, infeasible: 0, violation: None };
        let mut impossible: Option<Vec<usize>> = None;
        for order in permutations::spread(&counts, PERMUTATIONS_MAX) {
            if impossible.as_ref().is_some_and(|start| order.starts_with(start)) {
                findings.infeasible += 1;
                continue;
            }
            match self.run(&order).await {
                Verdict::Kept => findings.run += 1,
                Verdict::Infeasible(steps) => {
                    findings.infeasible += 1;
                    impossible = Some(order[..steps].to_vec());
                }
                Verdict::Broken(words) => {
                    findings.run += 1;
                    findings.violation = Some(words);
                    break;
                }
            }
        }
        let total = permutations::total(&counts);
        println!(
            "{}{how}: {} permutations of {total} run, {} cannot happen{}, in {} ms",
            self.specification.name,
            findings.run,
            findings.infeasible,
            if total > PERMUTATIONS_MAX { ", the others left out" } else { "" },
            started.elapsed().as_millis(),
        );
        findings
    }

    async fn run(&mut self, order: &[usize]) -> Verdict {
        self.serial += 1;
        let topic = format!("topic {}", self.serial);
        let consumer = format!("consumer {}", self.serial);
        let with_consumer = !self.specification.consumer_comes_later;
        self.client
            .execute(
                "select test.open($1, $2, $3, $4)",
                &[&topic, &consumer, &self.specification.partitions, &with_consumer],
            )
            .await
            .expect("a topic can be created");
        if let Some(setup) = &self.specification.setup {
            let setup = filled_in(setup, &topic, &consumer, "setup");
            self.client.batch_execute(&setup).await.expect("the setup succeeds");
        }

        let mut play = Play::new(self.specification, &mut self.sessions, &topic, &consumer);
        let played = play.run(order).await;
        let history = match played {
            Ok(None) => play.history,
            Ok(Some(steps)) => return Verdict::Infeasible(steps),
            Err(why) => return Verdict::Broken(format!("{}{why}", play.history)),
        };

        let call = filled_in("call test.drain(:topic, :consumer, :rounds)", &topic, &consumer, "drain")
            .replace(":rounds", &DRAIN_ROUNDS_MAX.to_string());
        let recreated = self
            .client
            .execute("select from pgonce.create_consumer($1, $2)", &[&consumer, &topic])
            .await
            .and(self.client.batch_execute(&call).await);
        if let Err(error) = recreated {
            return Verdict::Broken(format!("{history}the drain failed: {}", in_words(&error)));
        }
        let row =
            self.client.query_one("select test.state($1, $2)::text", &[&topic, &consumer]).await.expect("the state");
        let state: State = serde_json::from_str(row.get(0)).expect("the state is as it is read");
        let broken = broken_promises(&state, &history);
        if broken.is_empty() { Verdict::Kept } else { Verdict::Broken(format!("{history}{}", broken.join("\n"))) }
    }
}

/// The text of the file that a guard is in.
fn routines_of(guard: &Guard) -> String {
    let path = format!("{}/sql/routines/{}", env!("CARGO_MANIFEST_DIR"), guard.file);
    std::fs::read_to_string(&path).expect("a guard names a file in sql/routines")
}

/// One permutation under way.
struct Play<'a> {
    specification: &'a Specification,
    sessions: &'a mut Sessions,
    topic: &'a str,
    consumer: &'a str,
    history: History<'a>,
    /// For each session, the step that is under way.
    under_way: Vec<Option<usize>>,
    /// Sessions whose transaction failed: what they still had to do is left out.
    void: Vec<bool>,
}

impl<'a> Play<'a> {
    fn new(specification: &'a Specification, sessions: &'a mut Sessions, topic: &'a str, consumer: &'a str) -> Self {
        let number = specification.sessions.len();
        Self {
            specification,
            sessions,
            topic,
            consumer,
            history: History::default(),
            under_way: vec![None; number],
            void: vec![false; number],
        }
    }

    /// Runs the steps in this order. Answers how many it took to see that the order cannot happen, if so.
    async fn run(&mut self, order: &[usize]) -> Result<Option<usize>, String> {
        let mut next = vec![0; self.void.len()];
        for (nth, &session) in order.iter().enumerate() {
            let step = &self.specification.sessions[session].steps[next[session]];
            next[session] += 1;
            if self.void[session] {
                continue;
            }
            if self.sessions.is_busy(session) {
                // Whatever comes of it is of no interest.
                let _ = self.close().await;
                return Ok(Some(nth + 1));
            }
            self.under_way[session] = Some(self.history.begin(session, step));
            self.sessions.send(session, filled_in(&step.sql, self.topic, self.consumer, &step.name));
            self.settle().await?;
        }
        self.close().await?;
        Ok(None)
    }

    /// Goes on until every step has ended or waits for an idle session.
    async fn settle(&mut self) -> Result<(), String> {
        let mut verdict = Ok(());
        while self.sessions.any_busy() {
            match self.sessions.news().await {
                News::Ended(outcome) => {
                    let index = self.under_way[outcome.session].take().expect("a step was under way");
                    match outcome.answer {
                        Ok(answer) => self.history.end(index, answer),
                        Err(error) => {
                            self.sessions.roll_back(outcome.session).await;
                            self.void[outcome.session] = true;
                            let tolerated = self.tolerates(index, error.code());
                            self.history.fail(index, in_words(&error));
                            if !tolerated {
                                verdict = Err(format!("unexpected: {}", in_words(&error)));
                            }
                        }
                    }
                }
                News::AllWait => {
                    for index in self.under_way.iter().flatten() {
                        self.history.wait(*index);
                        if self.history.steps[*index].step.never_waits() {
                            verdict = Err("a verb that never waits has to wait for another session".to_owned());
                        }
                    }
                    break;
                }
            }
        }
        verdict
    }

    /// Rolls back what is open, until nothing is under way.
    async fn close(&mut self) -> Result<(), String> {
        let mut verdict = Ok(());
        loop {
            for session in 0..self.void.len() {
                if !self.sessions.is_busy(session) && self.history.open(session).is_some() {
                    self.sessions.roll_back(session).await;
                    self.history.roll_back(session);
                }
            }
            if !self.sessions.any_busy() {
                return verdict;
            }
            verdict = verdict.and(self.settle().await);
        }
    }

    fn tolerates(&self, index: usize, code: Option<&SqlState>) -> bool {
        let ran = &self.history.steps[index];
        let Some(code) = code else { return false };
        if self.specification.never.iter().any(|never| never == code.code()) {
            return false;
        }
        let above_read_committed = self.history.transactions[ran.transaction].above_read_committed;
        (*code == SqlState::T_R_SERIALIZATION_FAILURE && above_read_committed)
            || *code == SqlState::T_R_DEADLOCK_DETECTED
            || ran.step.may_fail.iter().any(|may| may == code.code())
    }
}

fn in_words(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => format!("{} {}", error.code().code(), error.message()),
        None => error.to_string(),
    }
}

/// Puts the values into a text of a specification.
fn filled_in(text: &str, topic: &str, consumer: &str, step: &str) -> String {
    let apply = include_str!("apply.sql");
    text.replace(
        ":apply_behind_gate",
        &apply.replace(
            ":received",
            "(select test.pass_gate(:consumer) as max offset 0) gate cross join lateral pgonce.receive(:consumer, gate.max)",
        ),
    )
    .replace(":apply", &apply.replace(":received", "pgonce.receive(:consumer, 2)"))
    .replace(":topic", &format!("'{topic}'"))
    .replace(":consumer", &format!("'{consumer}'"))
    .replace(":step", &format!("'{step}'"))
}
