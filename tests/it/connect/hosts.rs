//! Several hosts, of which some are dead, silent or read-only; and a server that becomes read-only under a worker.

use std::net::TcpListener;

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Consumer, Database, ErrorKind, Producer, Schema, Shutdown, Worker, migrate};
use tokio_postgres::{Client, NoTls};

use super::is_encrypted;
use super::server::{NAME, TlsServer, reach};
use crate::probe::{WAIT_MAX, create, eventually, number, pid_of, word, word_counts};

const TOPIC: &str = "words";
const CONSUMER: &str = "counter";

async fn start(settings: &[(&str, &str)]) -> PrivateServer {
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let start = || PrivateServer::start(&Options { settings }).expect("a server starts");
    tokio::task::spawn_blocking(start).await.expect("no panic")
}

async fn stop(server: PrivateServer) {
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("the server stops");
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the server accepts connections");
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn a_host_that_is_dead_or_silent_does_not_keep_the_next_from_being_tried() {
    let server = TlsServer::get().await;
    // Nobody listens at the first one any more; the second accepts connections, by the kernel, and says nothing.
    let dead = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("it is bound").port();
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let silent_port = silent.local_addr().expect("it is bound").port();
    let url = format!(
        "postgresql://secured@{NAME}:{dead},silent.example:{silent_port},{NAME}:{}/pgonce\
         ?hostaddr=127.0.0.1,127.0.0.1,127.0.0.1&connect_timeout=1&sslmode=require",
        server.port(),
    );
    assert!(is_encrypted(&url).await);
    assert!(is_encrypted(&format!("{url}&load_balance_hosts=random")).await);
    let nobody = format!("postgresql://127.0.0.1:{dead},127.0.0.1:{silent_port}/pgonce?connect_timeout=1");
    let error = reach(&nobody).await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn there_is_no_tls_on_a_unix_socket_whatever_is_asked_for() {
    let server = TlsServer::get().await;
    let local = server.local_url();
    assert!(!is_encrypted(&format!("{local} sslmode=verify-full sslrootcert=/nowhere/ca.crt")).await);
    let files = server.files("secured");
    let both = format!(
        "host=/nowhere,{NAME} hostaddr=,127.0.0.1 port={} user=secured dbname=pgonce sslmode=verify-full sslrootcert={}",
        server.port(),
        files.path("ca.crt"),
    );
    assert!(is_encrypted(&both).await);
}

#[tokio::test]
async fn a_read_only_host_is_passed_over_by_who_wants_to_write() {
    let writable = TlsServer::get().await;
    let read_only = start(&[("default_transaction_read_only", "on")]).await;
    let both = format!(
        "host={},{} port=5432,{} user=pgonce dbname=pgonce",
        read_only.directory().display(),
        writable.directory().display(),
        writable.port(),
    );
    let port = "select current_setting('port')::bigint";
    let session = reach(&format!("{both} target_session_attrs=read-write")).await.expect("one is writable");
    assert_eq!(number(&session, port).await, i64::from(writable.port()));
    let session = reach(&both).await.expect("both let us in");
    assert_eq!(number(&session, port).await, 5432);
    let alone = format!("{}&target_session_attrs=read-write", read_only.url("pgonce"));
    let error = reach(&alone).await.expect_err("it is read-only");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("does not allow writes"), "{error}");
    drop(session);
    stop(read_only).await;
}

async fn set_read_only(admin: &Client, value: &str) {
    let alter = format!("alter system set default_transaction_read_only = {value}");
    for statement in [&*alter, "select pg_reload_conf()"] {
        admin.batch_execute(statement).await.expect("a superuser may");
    }
    eventually("the sessions know it", async || {
        let row = admin.query_one("select current_setting('default_transaction_read_only')", &[]).await.expect("a row");
        (row.get::<_, &str>(0) == value).then_some(())
    })
    .await;
}

/// Writes a message although the server is read-only for everybody who does not say otherwise.
async fn send(admin: &mut Client, nth: usize) {
    let transaction = admin.build_transaction().read_only(false).start().await.expect("begun");
    Producer::new(TOPIC).send(&transaction, &word("once").id(format!("w{nth}"))).await.expect("sent");
    transaction.commit().await.expect("committed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_becomes_read_only_is_tried_again_until_it_is_writable() {
    const WORDS: usize = 40;
    let server = start(&[]).await;
    let url = format!("{}&application_name=worker", server.url("pgonce"));
    let pool = Database::connect(&url, Schema::default(), 4).expect("a good URL");
    let mut admin = connect(&server.url("pgonce")).await;
    migrate(&mut admin, pool.schema()).await.expect("migrated");
    create(&admin, TOPIC, 2, CONSUMER).await;

    set_read_only(&admin, "on").await;
    let (error, met) = eventually("the server refuses", async || {
        let session = pool.session().await.expect("a session");
        let pid = pid_of(&session).await;
        match Producer::new(TOPIC).send(&*session, &word("refused")).await {
            Ok(_) => {
                session.give_back();
                None
            }
            Err(error) => Some((error, pid)),
        }
    })
    .await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.hint().is_some_and(|hint| hint.contains("target_session_attrs")), "{error:?}");
    let session = pool.session().await.expect("a session");
    assert_ne!(pid_of(&session).await, met, "a session that met the error is thrown away");
    session.give_back();
    set_read_only(&admin, "off").await;

    let shutdown = Shutdown::new();
    let wish = shutdown.clone();
    let worker = Worker::new(pool).relay(TOPIC).consumer(Consumer::word_count(CONSUMER));
    let running = tokio::spawn(async move { worker.run(&wish).await });
    let counted = "select coalesce(sum(count), 0)::bigint from pgonce.word_counts";
    for nth in 0..WORDS / 2 {
        send(&mut admin, nth).await;
    }
    let half = i64::try_from(WORDS / 2).expect("a number");
    eventually("the worker is at it", async || (number(&admin, counted).await >= half).then_some(())).await;
    set_read_only(&admin, "on").await;
    for nth in WORDS / 2..WORDS {
        send(&mut admin, nth).await;
    }
    let later = "select count(*) from pg_stat_activity
                 where application_name like 'worker%' and backend_start > pg_conf_load_time()";
    eventually("a stage has thrown its session away", async || (number(&admin, later).await > 0).then_some(())).await;
    assert!(!running.is_finished(), "the worker goes on");
    assert_eq!(number(&admin, counted).await, half);
    set_read_only(&admin, "off").await;
    let all = i64::try_from(WORDS).expect("a number");
    eventually("all is applied", async || (number(&admin, counted).await >= all).then_some(())).await;
    shutdown.stop();
    let report =
        tokio::time::timeout(WAIT_MAX, running).await.expect("it ends").expect("no panic").expect("it stops well");
    assert_eq!(report.applied, WORDS as u64);
    assert_eq!(word_counts(&admin, CONSUMER).await, [("once".to_owned(), all)].into());
    drop(admin);
    stop(server).await;
}
