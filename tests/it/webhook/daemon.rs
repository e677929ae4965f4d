//! Webhooks that the daemon sends: set up by its configuration, over TLS, stopped and killed.

use std::process::Stdio;

use pgonce::Message;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::endpoint::Endpoint;
use super::{SECRET, message, publish, until_none_waits};
use crate::fixture::TestDatabase;
use crate::lease::TOPIC;
use crate::probe::{eventually, number, texts};
use crate::programs::{Running, outcome, pgonce};

const LAX: &str = "allow_http = true\nallow_private_addresses = true";

/// A configuration with one webhook, and its secret in a file.
struct Configured {
    directory: TempDir,
}

impl Configured {
    fn new(url: &str, settings: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let secret = directory.path().join("secret");
        std::fs::write(&secret, format!("{SECRET}\n")).expect("written");
        let text = format!(
            "[[topic]]\nname = '{TOPIC}'\npartitions = 1\n[[consumer]]\nname = 'c'\ntopic = '{TOPIC}'\nkind = 'webhook'\n\
             url = '{url}'\nsecret_file = '{}'\nbackoff_min_ms = 1\nbackoff_max_ms = 1\n{settings}\n",
            secret.display()
        );
        std::fs::write(directory.path().join("pgonce.toml"), text).expect("written");
        Self { directory }
    }

    fn start(&self, database: &TestDatabase, variables: &[(&str, &str)]) -> Running {
        let file = self.directory.path().join("pgonce.toml");
        let arguments = ["run", "--database-url", &database.url, "--config", file.to_str().expect("text")];
        let mut command = pgonce(&arguments);
        command.envs(variables.iter().copied()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut daemon = Running::start(&mut command);
        daemon.until_logged("running");
        daemon
    }
}

/// A daemon is at a message, whose request waits at a gate, when it is stopped or killed. Another one takes over.
async fn interrupted(signal: Signal) {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let endpoint = Endpoint::start().await;
    let configured = Configured::new(&endpoint.url(), &format!("{LAX}\nlease_ms = 1000"));
    let mut first = configured.start(&database, &[]);
    publish(&client, &[message("a1", "a", &json!(["gate"])), message("a2", "a", &json!([200]))]).await;
    eventually("it is called", async || (endpoint.calls().len() == 1).then_some(())).await;
    let longer = "select count(*) from pgonce.leases where leased_until > clock_timestamp() + interval '1 s'";
    assert_eq!(number(&client, longer).await, 0);
    kill_process(first.pid(), signal).expect("signalled");
    let second = configured.start(&database, &[]);
    eventually("another one calls", async || (endpoint.calls().len() == 2).then_some(())).await;
    endpoint.open_gate();
    until_none_waits(&client).await;
    let calls = endpoint.calls();
    let ids: Vec<&str> = calls.iter().map(|call| call.header("webhook-id")).collect();
    assert_eq!(ids, ["a1", "a1", "a2"]);
    let epochs: Vec<i64> = calls.iter().map(|call| call.header("pgonce-epoch").parse().expect("a number")).collect();
    assert!(epochs[0] < epochs[1] && epochs[1] == epochs[2], "{epochs:?}");
    assert_eq!(calls[0].body, calls[1].body);
    if signal == Signal::STOP {
        kill_process(first.pid(), Signal::CONT).expect("continued");
        eventually("it was refused", async || {
            (number(&client, "select fenced from pgonce.consumer_leases").await > 0).then_some(())
        })
        .await;
        first.finish();
    } else {
        first.end();
    }
    second.finish();
    assert_eq!(endpoint.calls().len(), 3);
    let counted = "select received || ' ' || failures from pgonce.consumer_lag";
    let counted = texts(&client, counted).await;
    assert!(counted[0].starts_with("2 "), "{counted:?}");
}

#[tokio::test]
async fn a_daemon_that_stalls_beyond_its_lease_sends_the_same_id_under_an_older_epoch() {
    interrupted(Signal::STOP).await;
}

#[tokio::test]
async fn what_a_killed_daemon_was_at_is_sent_again_under_a_newer_epoch() {
    interrupted(Signal::KILL).await;
}

#[tokio::test]
async fn a_certificate_is_checked_and_ssl_cert_file_names_who_is_trusted() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let (endpoint, authority) = Endpoint::start_with_tls().await;
    let (stranger, other_authority) = Endpoint::start_with_tls().await;
    drop(stranger);
    let url = format!("https://localhost:{}/hooks", endpoint.address.port());
    let configured = Configured::new(&url, "allow_private_addresses = true\nattempts_max = 1000");
    let [trusted, other] = [("trusted.pem", authority), ("other.pem", other_authority)].map(|(name, pem)| {
        let file = configured.directory.path().join(name);
        std::fs::write(&file, pem).expect("written");
        file.to_str().expect("text").to_owned()
    });
    let daemon = configured.start(&database, &[("SSL_CERT_FILE", &other)]);
    publish(&client, &[Message::raw("{}").expect("JSON").id("m")]).await;
    let why = eventually("it fails", async || texts(&client, "select error from pgonce.parked").await.pop()).await;
    assert!(why.starts_with("no answer from localhost: ") && why.contains("certificate"), "{why}");
    daemon.finish();
    assert!(endpoint.calls().is_empty(), "it was told to somebody that nobody knows");
    let daemon = configured.start(&database, &[("SSL_CERT_FILE", &trusted)]);
    until_none_waits(&client).await;
    daemon.finish();
    assert_eq!(endpoint.calls().len(), 1);
}

#[tokio::test]
async fn the_daemon_creates_an_external_consumer_and_refuses_one_of_another_kind() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    let endpoint = Endpoint::start().await;
    let configured = Configured::new(&endpoint.url(), LAX);
    let kind = "select kind from pgonce.consumers";
    configured.start(&database, &[]).finish();
    assert_eq!(texts(&client, kind).await, ["external"]);
    configured.start(&database, &[]).finish();
    let listed = outcome(&["consumer", "list", "--json", "--database-url", &database.url]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert_eq!(listed[0]["kind"], "external");

    client
        .batch_execute("select pgonce.drop_consumer('c'); select pgonce.create_consumer('c', 't')")
        .await
        .expect("anew");
    let file = configured.directory.path().join("pgonce.toml");
    let arguments = ["run", "--database-url", &database.url, "--config", file.to_str().expect("text")];
    let refused = outcome(&arguments);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("is transactional"), "{said}");
}

#[test]
fn what_is_wrong_about_a_secret_is_said_before_anything_begins_and_without_it() {
    let configured = Configured::new("https://shop.example/hooks", "secret_env = 'PGONCE_TEST_WEBHOOK_SECRET'");
    let directory = configured.directory.path();
    let file = directory.join("pgonce.toml");
    let said = |variable: &str| {
        let arguments =
            ["run", "--database-url", "postgresql://nobody.invalid/", "--config", file.to_str().expect("text")];
        let output = pgonce(&arguments).env("PGONCE_TEST_WEBHOOK_SECRET", variable).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(!said.contains("geheim") && said.contains("consumer \"c\""), "{said}");
        said
    };
    // The environment wins over the file, which is good.
    assert!(said("geheim").contains("does not begin with whsec_"));
    assert!(said("whsec_geheim!").contains("is not base64"));
    std::fs::write(directory.join("secret"), "whsec_geheim==").expect("written");
    assert!(said("").contains("secret 1 of a webhook"));
    std::fs::remove_file(directory.join("secret")).expect("removed");
    let missing = said("");
    assert!(missing.contains("secret_file: cannot read") && missing.contains("secret"), "{missing}");
    let text = std::fs::read_to_string(&file).expect("read");
    let without = text.lines().filter(|line| !line.starts_with("secret_file")).collect::<Vec<_>>().join("\n");
    std::fs::write(&file, &without).expect("written");
    assert!(said("").contains("no variable PGONCE_TEST_WEBHOOK_SECRET"));
    // Where somebody takes the one key for the other, the line is not quoted.
    std::fs::write(&file, format!("{without}\nsecret = 'whsec_geheim'")).expect("written");
    let arguments = ["run", "--config", file.to_str().expect("text")];
    let output = outcome(&arguments);
    let refused = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(refused.contains("unknown field `secret`") && !refused.contains("geheim"), "{refused}");
}
