//! The doctor: what it finds where something was broken on purpose, and that it finds nothing else.

mod consumers;
mod roles;
mod schema;
mod server;

use std::collections::BTreeSet;

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Schema, migrate};
use serde_json::Value;
use tokio_postgres::{Client, NoTls};

use crate::probe::create;
use crate::programs::outcome;

pub(crate) const CAN: &str = "System can achieve exactly-once semantics";

/// What the doctor says of a database: its exit code, and its report.
pub(crate) fn report(url: &str) -> (Option<i32>, Value) {
    let output = outcome(&["doctor", "--json", "--database-url", url]);
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}\n{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), report)
}

pub(crate) fn findings(report: &Value) -> &[Value] {
    report["findings"].as_array().expect("a list")
}

/// The checks that found something.
pub(crate) fn checks(report: &Value) -> BTreeSet<&str> {
    findings(report).iter().map(|finding| finding["check"].as_str().expect("a name")).collect()
}

/// A server on which nothing is wrong, with the schema, a topic with messages, and a consumer that has received all.
struct Clinic {
    server: PrivateServer,
    client: Client,
}

impl Clinic {
    async fn open() -> Self {
        Self::open_with([
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("wal_level", "logical"),
            ("max_prepared_transactions", "4"),
        ])
        .await
    }

    async fn open_with<const N: usize>(settings: [(&str, &str); N]) -> Self {
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let start = || PrivateServer::start(&Options { settings }).expect("a server starts");
        let server = tokio::task::spawn_blocking(start).await.expect("no panic");
        let (mut client, connection) = tokio_postgres::connect(&server.url("pgonce"), NoTls).await.expect("connected");
        tokio::spawn(connection);
        // A role of this name would find the schema by itself.
        client
            .batch_execute("alter database pgonce set search_path = public; set search_path = public")
            .await
            .expect("set");
        migrate(&mut client, &Schema::default()).await.expect("installed");
        create(&client, "words", 1, "counter").await;
        create(&client, "letters", 1, "reader").await;
        let clinic = Self { server, client };
        clinic.run("select pgonce.enqueue('words', '1'), pgonce.enqueue('words', '2')").await;
        clinic.run("select pgonce.relay()").await;
        clinic.run("select pgonce.receive('counter')").await;
        clinic
    }

    fn url(&self) -> String {
        self.server.url("pgonce")
    }

    async fn run(&self, statements: &str) {
        if let Err(error) = self.client.batch_execute(statements).await {
            panic!("{statements}\n{error:?}");
        }
    }

    /// Checks that the doctor finds just this, and says whether it is a fault; the report.
    fn expect(&self, what: &str, expected: &[&str], is_fault: bool) -> Value {
        let (code, report) = report(&self.url());
        assert_eq!(checks(&report), expected.iter().copied().collect(), "{what}\n{report:#}");
        assert_eq!(code, Some(i32::from(is_fault)), "{what}");
        assert_eq!(report["can_achieve_exactly_once"], !is_fault, "{what}");
        report
    }

    /// Breaks something, and expects it to be found; then mends it by the remedies, or as is said here.
    async fn case(&self, break_it: &str, expected: &[&str], mend_it: Option<&str>) {
        self.run(break_it).await;
        let is_fault = !matches!(expected, [] | ["autovacuum" | "xmin-horizon"]);
        let report = self.expect(break_it, expected, is_fault);
        match mend_it {
            Some(statements) => self.run(statements).await,
            None => {
                for finding in findings(&report) {
                    self.run(finding["remedy"].as_str().expect("text")).await;
                }
            }
        }
    }

    async fn close(self) {
        drop(self.client);
        tokio::task::spawn_blocking(move || self.server.stop()).await.expect("no panic").expect("it stops");
    }
}
