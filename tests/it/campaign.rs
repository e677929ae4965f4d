//! A campaign: messages that fail in every way, while processes, sessions and the server are killed at random, and
//! connections of the producer and of one process are cut at random messages. Nothing is lost, doubled or reordered, and
//! exactly what must die is dead.
//!
//! `PGONCE_TEST_MESSAGES` makes it longer, `PGONCE_TEST_SEED` brings one back; the moments of the kills stay random.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{
    Consumer, Database, Failure, Handler, HandlerError, Message, Producer, Received, Schema, Shutdown, TopicSettings,
    Worker, create_topic, migrate,
};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, NoTls, Transaction};

use crate::probe::{number, texts};
use crate::process::Random;
use crate::proxy::{Cut, Proxy, Towards};

const TOPIC: &str = "t";
const CONSUMER: &str = "c";
/// Names the database to the child.
const URL: &str = "PGONCE_TEST_CAMPAIGN_URL";
const MESSAGES: u64 = 3_000;
const KEYS: u64 = 60;
const CHUNK: u64 = 50;
/// Messages that kill their processes: each takes some twenty of them.
const ABORTS_MAX: usize = 2;
/// Messages of the protocol after which a connection is cut, at the most; one in two is.
const CUT_AFTER_MAX: u64 = 500;
/// Longest time without a message applied.
const STANDSTILL_MAX: Duration = Duration::from_secs(120);

#[derive(Serialize, Deserialize)]
struct Task {
    key: u64,
    nth: u64,
    fate: Fate,
}

/// What the handler does with it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Fate {
    Succeeds,
    /// Fails at its first two attempts.
    Recovers,
    Fails,
    FailsForGood,
    Panics,
    /// Leaves the transaction aborted, and fails.
    Divides,
    /// Kills its process.
    Aborts,
}

impl Fate {
    fn of(random: &mut Random, may_abort: bool) -> Self {
        match random.below(400) {
            0..=5 => Self::Recovers,
            6 => Self::Fails,
            7 => Self::FailsForGood,
            8 => Self::Panics,
            9 => Self::Divides,
            10 if may_abort => Self::Aborts,
            _ => Self::Succeeds,
        }
    }

    fn is_death(self) -> bool {
        !matches!(self, Self::Succeeds | Self::Recovers)
    }
}

/// All tasks that were sent, by their ids.
#[derive(Default)]
struct Tasks {
    fates: BTreeMap<String, Fate>,
    of_key: BTreeMap<u64, u64>,
    aborts: usize,
}

impl Tasks {
    fn next(&mut self, random: &mut Random) -> Message {
        let key = random.below(KEYS);
        let next = self.of_key.entry(key).or_default();
        let nth = *next;
        *next += 1;
        let fate = Fate::of(random, self.aborts < ABORTS_MAX);
        self.aborts += usize::from(fate == Fate::Aborts);
        let id = format!("{key} {nth}");
        self.fates.insert(id.clone(), fate);
        Message::json(&Task { key, nth, fate }).expect("JSON").key(key.to_string()).id(id)
    }

    fn ids(&self, is_death: bool) -> Vec<String> {
        self.fates.iter().filter(|(_, fate)| fate.is_death() == is_death).map(|(id, _)| id.clone()).collect()
    }

    /// What became of them is what was to become of them.
    async fn judge(&self, client: &Client, seed: u64) {
        let applied = texts(
            client,
            r#"select text from (select key || ' ' || nth as text from applied) a order by text collate "C""#,
        )
        .await;
        let due = self.ids(false);
        let missing: Vec<_> = due.iter().filter(|id| applied.binary_search(id).is_err()).take(3).collect();
        for id in missing {
            let given_up =
                format!("select attempts || ': ' || error from pgonce.dead_letters where message_id = '{id}'");
            println!("not applied: {id}, with dead letters {:?}", texts(client, &given_up).await);
        }
        assert!(applied == due, "seed {seed}: lost or doubled: {} applied of {}", applied.len(), due.len());
        let dead = texts(client, "select message_id from pgonce.dead_letters order by 1").await;
        assert_eq!(dead, self.ids(true), "seed {seed}: dead");
        let reordered = "
            select key || ' ' || nth from (
              select key, nth, lag(nth) over (partition by key order by id) as before from applied) a
            where nth < before";
        assert_eq!(texts(client, reordered).await, [""; 0], "seed {seed}: reordered");
        let received = number(client, "select received from pgonce.consumer_lag").await;
        assert_eq!(received, i64::try_from(applied.len()).expect("small"), "seed {seed}");
        let failures = number(client, "select failures from pgonce.consumer_lag").await;
        println!(
            "{} messages, {} applied, 0 lost, 0 doubled, 0 reordered; {} dead, {failures} attempts failed",
            self.fates.len(),
            applied.len(),
            dead.len()
        );
    }
}

struct Fated;

impl Handler for Fated {
    type Payload = Task;

    async fn handle(&self, tx: &Transaction<'_>, message: Received<Task>) -> Result<(), HandlerError> {
        let task = message.payload;
        let number = |number: u64| i64::try_from(number).expect("small");
        let insert = "insert into applied (key, nth) values ($1, $2)";
        tx.execute(insert, &[&number(task.key), &number(task.nth)]).await?;
        match task.fate {
            Fate::Recovers if message.attempt <= 2 => Err("not yet".into()),
            Fate::Succeeds | Fate::Recovers => Ok(()),
            Fate::Fails => Err("as it must".into()),
            Fate::FailsForGood => Err(Failure::permanent("for good").into()),
            Fate::Panics => panic!("as it must"),
            Fate::Divides => Ok(tx.batch_execute("select 1 / 0").await?),
            Fate::Aborts => std::process::abort(),
        }
    }
}

/// The process that is killed: this test binary once more, with this test alone.
#[tokio::test]
#[ignore = "the child of the campaign"]
async fn child() {
    let Ok(url) = std::env::var(URL) else { return };
    let database = Database::connect(&url, Schema::default(), 8).expect("a URL");
    let consumer = Consumer::each(CONSUMER, Fated).batch_messages(100);
    let shutdown = Shutdown::on_signals(Duration::from_secs(10)).expect("signals");
    Worker::new(database).relay(TOPIC).consumer(consumer).run(&shutdown).await.expect("it stops well");
}

fn start(url: &str) -> Child {
    Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", "--ignored", "campaign::child"])
        .env(URL, url)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts")
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("not 0");
    // It may have ended by itself.
    let _ = kill_process(pid, signal);
}

async fn connect(url: &str) -> Client {
    loop {
        // Until the server is back.
        if let Ok((client, connection)) = tokio_postgres::connect(url, NoTls).await {
            tokio::spawn(connection);
            return client;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends a chunk, again and again until its answer arrives: its ids make that harmless.
async fn send(url: &str, client: &mut Client, chunk: &[Message]) {
    while Producer::new(TOPIC).send_all(&*client, chunk).await.is_err() {
        *client = connect(url).await;
    }
}

/// A proxy that cuts some connections, wherever the seed says.
async fn cutting(url: &str, seed: u64) -> Proxy {
    let mut random = Random(seed.rotate_left(32) | 1);
    let rule = move |_: &[u8]| {
        let towards = if random.below(2) == 0 { Towards::Server } else { Towards::Client };
        let after = usize::try_from(random.below(CUT_AFTER_MAX)).expect("small");
        (random.below(2) == 0).then_some(Cut { towards, after })
    };
    Proxy::start(url, rule).await
}

async fn prepare(url: &str) {
    let mut client = connect(url).await;
    migrate(&mut client, &Schema::default()).await.expect("migrated");
    let settings = TopicSettings { partitions: Some(4), ..TopicSettings::default() };
    create_topic(&client, &Schema::default(), TOPIC, settings).await.expect("created");
    let create = "
        select pgonce.create_consumer('c', 't', attempts_max => 4, backoff_min_ms => 1, backoff_max_ms => 50);
        create table applied (id bigint generated always as identity, key bigint not null, nth bigint not null)";
    client.batch_execute(create).await.expect("created");
}

/// One thing that goes wrong.
async fn disturb(random: &mut Random, url: &str, children: &mut [Child; 2]) -> bool {
    let victim = usize::try_from(random.below(2)).expect("small");
    match random.below(6) {
        0 | 1 => signal(&children[victim], Signal::KILL),
        2 => {
            signal(&children[victim], Signal::STOP);
            tokio::time::sleep(Duration::from_millis(random.below(300))).await;
            signal(&children[victim], Signal::CONT);
        }
        3 => signal(&children[victim], Signal::TERM),
        4 => {
            let terminate = "
                select pg_terminate_backend(pid) from pg_stat_activity
                where pid <> pg_backend_pid() and application_name like 'pgonce%'
                order by random() limit 3";
            // The server may be on its way down.
            let _ = connect(url).await.batch_execute(terminate).await;
        }
        _ => return random.below(4) == 0,
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_all_faults_nothing_is_lost_doubled_or_reordered() {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let messages = variable("PGONCE_TEST_MESSAGES").unwrap_or(MESSAGES);
    let seed = variable("PGONCE_TEST_SEED").unwrap_or_else(|| RandomState::new().hash_one(0)) | 1;
    println!("PGONCE_TEST_SEED={seed} PGONCE_TEST_MESSAGES={messages}");
    let mut random = Random(seed);
    let mut server =
        tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default()).expect("a server starts"))
            .await
            .expect("no panic");
    let url = server.url("pgonce");
    prepare(&url).await;
    let proxy = cutting(&url, seed).await;
    let urls = [proxy.url.clone(), url.clone()];
    let mut children = [start(&urls[0]), start(&urls[1])];

    let mut tasks = Tasks::default();
    let (mut deaths, mut sent) = (0_u32, 0);
    let mut client = connect(&proxy.url).await;
    // It pins the xmin horizon, until the server is restarted.
    let old = connect(&url).await;
    old.batch_execute("begin isolation level repeatable read; select count(*) from pgonce.queue").await.expect("begun");
    let (mut last, mut since) = (-1, std::time::Instant::now());
    loop {
        if sent < messages {
            let chunk: Vec<Message> = (0..CHUNK).map(|_| tasks.next(&mut random)).collect();
            send(&proxy.url, &mut client, &chunk).await;
            sent += CHUNK;
        } else {
            let done = "select count(*) + (select count(*) from pgonce.dead_letters) from applied";
            let Ok(row) = client.query_one(done, &[]).await else {
                client = connect(&url).await;
                continue;
            };
            let done: i64 = row.get(0);
            if done >= i64::try_from(sent).expect("small") {
                break;
            }
            if done != last {
                (last, since) = (done, std::time::Instant::now());
            }
            assert!(since.elapsed() < STANDSTILL_MAX, "seed {seed}: it stands still at {done} of {sent}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if random.below(if sent < messages { 4 } else { 40 }) == 0 && disturb(&mut random, &url, &mut children).await {
            server = tokio::task::spawn_blocking(move || {
                server.restart_hard().expect("it starts again");
                server
            })
            .await
            .expect("no panic");
        }
        for (child, url) in children.iter_mut().zip(&urls) {
            if child.try_wait().expect("a child").is_some() {
                deaths += 1;
                *child = start(url);
            }
        }
    }
    for child in &mut children {
        child.kill().expect("killed");
        child.wait().expect("waited for");
    }

    tasks.judge(&connect(&url).await, seed).await;
    println!("{deaths} processes died, {} connections were cut", proxy.cuts());
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("the server stops");
}
