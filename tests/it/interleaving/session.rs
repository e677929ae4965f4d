//! The connections of a specification, and what is under way on each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, SimpleQueryMessage, Statement};

use crate::fixture::TestDatabase;

/// Until a step has ended or waits for another session. Only a defect takes as long.
const STEP_TIME_MAX: Duration = Duration::from_secs(60);

/// Most steps have ended by then, and are spared the question whether they wait. Nothing hangs on it.
const GRACE: Duration = Duration::from_millis(2);

/// What a step came to.
pub(crate) struct Outcome {
    pub(crate) session: usize,
    pub(crate) answer: Result<String, Error>,
}

/// What there is to know after a while.
pub(crate) enum News {
    /// A step has ended.
    Ended(Outcome),
    /// Every step under way waits, directly or not, for a session that is idle.
    AllWait,
}

/// One connection a session, and one to watch them.
pub(crate) struct Sessions {
    connections: Vec<Connection>,
    watcher: Client,
    blockers: Statement,
    outcomes: UnboundedReceiver<Outcome>,
    report: UnboundedSender<Outcome>,
}

struct Connection {
    client: Arc<Client>,
    pid: i32,
    is_busy: bool,
}

impl Sessions {
    pub(crate) async fn open(database: &TestDatabase, number: usize) -> Self {
        let mut connections = Vec::new();
        for _ in 0..number {
            let client = database.connect().await;
            let pid = client.query_one("select pg_backend_pid()", &[]).await.expect("a pid").get(0);
            // Only a superuser may; others see deadlocks a second later.
            let _ = client.batch_execute("set deadlock_timeout = '5ms'").await;
            connections.push(Connection { client: Arc::new(client), pid, is_busy: false });
        }
        let watcher = database.connect().await;
        let blockers = watcher
            .prepare("select pid, pg_blocking_pids(pid) from unnest($1::integer[]) pid")
            .await
            .expect("prepared");
        let (report, outcomes) = unbounded_channel();
        Self { connections, watcher, blockers, outcomes, report }
    }

    /// Whether a step of that session is under way.
    pub(crate) fn is_busy(&self, session: usize) -> bool {
        self.connections[session].is_busy
    }

    /// Whether a step of any session is under way.
    pub(crate) fn any_busy(&self) -> bool {
        self.connections.iter().any(|connection| connection.is_busy)
    }

    /// Sends a statement and does not wait for its answer.
    pub(crate) fn send(&mut self, session: usize, sql: String) {
        let connection = &mut self.connections[session];
        assert!(!connection.is_busy, "one statement at a time");
        connection.is_busy = true;
        let (client, report) = (Arc::clone(&connection.client), self.report.clone());
        tokio::spawn(async move {
            let answer = client.simple_query(&sql).await.map(|messages| written(&messages));
            // Nobody listens any more after a failure.
            let _ = report.send(Outcome { session, answer });
        });
    }

    /// Ends whatever transaction an idle session has.
    pub(crate) async fn roll_back(&self, session: usize) {
        assert!(!self.is_busy(session), "idle");
        self.connections[session].client.batch_execute("rollback").await.expect("a rollback succeeds");
    }

    /// Waits until a step ends, or all that are under way wait for idle sessions. At least one is under way.
    pub(crate) async fn news(&mut self) -> News {
        let deadline = Instant::now() + STEP_TIME_MAX;
        loop {
            assert!(Instant::now() < deadline, "a step neither ended nor waits for another session");
            let busy: Vec<i32> = self.busy().map(|connection| connection.pid).collect();
            let parameters: [&(dyn ToSql + Sync); 1] = [&busy];
            let ask = async {
                tokio::time::sleep(GRACE).await;
                self.watcher.query(&self.blockers, &parameters).await.expect("blockers can be asked for")
            };
            // Either can be dropped: an outcome stays in the channel, and the watcher only looks.
            let rows = tokio::select! {
                biased;
                outcome = self.outcomes.recv() => {
                    let outcome = outcome.expect("this holds a sender");
                    self.connections[outcome.session].is_busy = false;
                    return News::Ended(outcome);
                }
                rows = ask => rows,
            };
            let blockers: Vec<(i32, Vec<i32>)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
            if self.all_wait(&blockers) {
                return News::AllWait;
            }
        }
    }

    fn busy(&self) -> impl Iterator<Item = &Connection> {
        self.connections.iter().filter(|connection| connection.is_busy)
    }

    /// Whether each busy session is blocked by an idle one, or by one that is. A short wait for a session that is at
    /// work is none, nor is a deadlock, which the server ends.
    fn all_wait(&self, blockers: &[(i32, Vec<i32>)]) -> bool {
        let idle = self.connections.iter().filter(|connection| !connection.is_busy);
        let mut waited_for: Vec<i32> = idle.map(|connection| connection.pid).collect();
        for _ in 0..blockers.len() {
            for (pid, by) in blockers {
                if by.iter().any(|blocker| waited_for.contains(blocker)) {
                    waited_for.push(*pid);
                }
            }
        }
        blockers.iter().all(|(pid, _)| waited_for.contains(pid))
    }
}

fn written(messages: &[SimpleQueryMessage]) -> String {
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            let columns: Vec<&str> = (0..row.len()).map(|column| row.get(column).unwrap_or("null")).collect();
            Some(format!("({})", columns.join(", ")))
        }
        _ => None,
    });
    let answer = rows.collect::<Vec<_>>().join(" ");
    if answer.is_empty() { "done".to_owned() } else { answer }
}
