//! PgBouncer in transaction mode between everybody and the server.

use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Consumer, Database, Producer, Relay, Schema, Shutdown, Worker, migrate};
use tokio::task::JoinSet;
use tokio_postgres::NoTls;

use crate::doctor::{checks, report};
use crate::probe::{WAIT_MAX, create, eventually, number, word, word_counts};
use crate::programs::{Running, postgresql};

const TOPIC: &str = "words";
const CONSUMER: &str = "counter";
/// Connections that PgBouncer makes to the server; everybody together uses more.
const SERVER_CONNECTIONS: i64 = 2;

/// The program, also where the PATH of an ordinary user does not lead.
fn program() -> Option<PathBuf> {
    postgresql("pgbouncer").or_else(|| Some(PathBuf::from("/usr/sbin/pgbouncer")).filter(|path| path.is_file()))
}

/// Starts PgBouncer in front of a server, as the server's user, with its socket in a directory.
fn start(program: &Path, server: &Path, directory: &Path, pool_mode: &str) -> Running {
    let settings = format!(
        "[databases]
         pgonce = host={server} port=5432 user=pgonce
         [pgbouncer]
         listen_port = 6432
         unix_socket_dir = {directory}
         auth_type = any
         pool_mode = {pool_mode}
         default_pool_size = {SERVER_CONNECTIONS}
         ",
        server = server.display(),
        directory = directory.display(),
    );
    let file = directory.join("pgbouncer.ini");
    let settings: Vec<&str> = settings.lines().map(str::trim).collect();
    std::fs::write(&file, settings.join("\n")).expect("written");
    let owner = server.metadata().expect("it is there");
    let mut command = Command::new(program);
    command.arg(&file).current_dir(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    for path in [&*file, directory] {
        chown(path, Some(owner.uid()), Some(owner.gid())).expect("its owner's, or root's to give away");
    }
    Running::start(command.uid(owner.uid()).gid(owner.gid()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_through_pgbouncer_that_pools_transactions() {
    const PRODUCERS: usize = 4;
    const PER_PRODUCER: usize = 100;
    let Some(program) = program() else {
        eprintln!("SKIPPED: there is no pgbouncer on this machine; Debian has it in the package pgbouncer");
        return;
    };
    let start_server = || PrivateServer::start(&Options::default()).expect("a server starts");
    let server = tokio::task::spawn_blocking(start_server).await.expect("no panic");
    let directory = tempfile::tempdir().expect("a directory");
    let bouncer = start(&program, server.directory(), directory.path(), "transaction");
    let url = format!("postgresql:///pgonce?host={}&port=6432&user=pgonce", directory.path().display());
    let pool = Database::connect(&url, Schema::default(), 8).expect("a good URL");
    let mut session = eventually("PgBouncer lets us in", async || pool.session().await.ok()).await;
    migrate(&mut session, pool.schema()).await.expect("migrated");
    create(&session, TOPIC, 4, CONSUMER).await;
    session.give_back();

    let shutdown = Shutdown::new();
    let wish = shutdown.clone();
    let consumer = Consumer::word_count(CONSUMER).batch_messages(10);
    let worker = Worker::new(pool.clone()).relay(TOPIC).consumer_with(consumer, 4);
    let running = tokio::spawn(async move { worker.run(&wish).await });
    let mut producers = JoinSet::new();
    for producer in 0..PRODUCERS {
        let pool = Database::connect(&url, Schema::default(), 1).expect("a good URL");
        producers.spawn(async move {
            for nth in 0..PER_PRODUCER {
                let mut session = pool.session().await.expect("a session");
                let transaction = session.transaction().await.expect("begun");
                let message = word("once").id(format!("{producer} {nth}"));
                Producer::new(TOPIC).send(&transaction, &message).await.expect("sent");
                transaction.commit().await.expect("committed");
                session.give_back();
                Relay::topic(TOPIC).step(&pool).await.expect("a step of the relay");
            }
        });
    }
    producers.join_all().await;
    let (direct, connection) = tokio_postgres::connect(&server.url("pgonce"), NoTls).await.expect("it is running");
    tokio::spawn(connection);
    let total = i64::try_from(PRODUCERS * PER_PRODUCER).expect("a number");
    let counted = "select coalesce(sum(count), 0)::bigint from pgonce.word_counts";
    let mut by_hand = 0;
    let consumer = Consumer::word_count(CONSUMER).batch_messages(10);
    eventually("all is applied", async || {
        // A worker tries again what failed; here nothing may.
        Relay::topic(TOPIC).step(&pool).await.expect("a step of the relay");
        by_hand += consumer.step(&pool).await.expect("a step of the consumer").applied;
        (number(&direct, counted).await >= total).then_some(())
    })
    .await;
    let connections = "select count(*) from pg_stat_activity
                       where datname = 'pgonce' and backend_type = 'client backend' and pid <> pg_backend_pid()";
    assert!(number(&direct, connections).await <= SERVER_CONNECTIONS);
    shutdown.stop();
    let report =
        tokio::time::timeout(WAIT_MAX, running).await.expect("it ends").expect("no panic").expect("it stops well");
    assert_eq!(report.applied + by_hand, total.unsigned_abs());
    assert_eq!(word_counts(&direct, CONSUMER).await, [("once".to_owned(), total)].into());
    drop(bouncer);
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("the server stops");
}

#[tokio::test]
async fn the_doctor_notices_what_it_pools() {
    let Some(program) = program() else {
        eprintln!("SKIPPED: there is no pgbouncer on this machine; Debian has it in the package pgbouncer");
        return;
    };
    let start_server = || PrivateServer::start(&Options::default()).expect("a server starts");
    let server = tokio::task::spawn_blocking(start_server).await.expect("no panic");
    let database = Database::connect(&server.url("pgonce"), Schema::default(), 1).expect("a good URL");
    let mut session = database.session().await.expect("it is running");
    migrate(&mut session, database.schema()).await.expect("migrated");
    // What the doctor says of a private server in any case.
    let direct = ["fsync", "full-page-writes"];
    for (pool_mode, more) in [
        ("session", &[][..]),
        ("transaction", &["pooler-transactions"]),
        ("statement", &["pooler-statements", "unexamined"]),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let bouncer = start(&program, server.directory(), directory.path(), pool_mode);
        let url = format!("postgresql:///pgonce?host={}&port=6432&user=pgonce", directory.path().display());
        let pool = Database::connect(&url, Schema::default(), 1).expect("a good URL");
        eventually("PgBouncer lets us in", async || pool.session().await.ok()).await.give_back();
        pool.close();
        let (code, report) = report(&url);
        let expected = direct.iter().filter(|_| pool_mode != "statement").chain(more).copied().collect();
        assert_eq!(checks(&report), expected, "{pool_mode}\n{report:#}");
        assert_eq!(code, Some(1));
        drop(bouncer);
    }
    drop(session);
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("the server stops");
}
