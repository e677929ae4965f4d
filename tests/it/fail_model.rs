//! Random sequences of verbs against a model in memory: whatever fails, comes back, is given up or rolled back, nothing is
//! lost, doubled or, where the policy keeps an order, reordered, and every answer is the one that is expected.
//!
//! One session at a time; the specifications in `tests/interleavings` have several.

use std::collections::BTreeMap;
use std::env;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, RngSeed, TestRunner};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::fixture::TestDatabase;
use crate::probe::number;

/// How long each policy is tried.
const TRY_FOR: Duration = Duration::from_secs(6);
/// Begins with this number instead of another one each time: what a failure prints.
const SEED: &str = "PGONCE_TEST_SEED";
const ATTEMPTS_MAX: u32 = 3;
/// Rounds until nothing is left. Only a defect takes as many.
const ROUNDS_MAX: usize = 100;

#[derive(Clone, Debug)]
enum Verb {
    /// With one of a few keys, or none.
    Enqueue(Option<u8>),
    Relay,
    /// A transaction that receives, and fails some of it.
    Consume {
        receives: Vec<Receive>,
        is_rolled_back: bool,
    },
    /// In a transaction of its own: any message that ever was in the queue.
    Fail(usize, Failure),
    /// Any message that ever was in the queue.
    Bury(usize),
    MakeDue,
    Replay(usize),
    Discard(usize),
}

#[derive(Clone, Debug)]
struct Receive {
    max: i32,
    /// By `open_batch` and the view, or by rows.
    is_opened: bool,
    /// What fails when its turn comes, by its place in the batch.
    failing: BTreeMap<u8, Failure>,
    /// What fails although it was applied in this transaction.
    failing_late: Option<(usize, Failure)>,
}

#[derive(Clone, Copy, Debug)]
struct Failure {
    is_permanent: bool,
    is_due_at_once: bool,
}

fn failure() -> impl Strategy<Value = Failure> {
    (prop_oneof![4 => Just(false), 1 => Just(true)], any::<bool>())
        .prop_map(|(is_permanent, is_due_at_once)| Failure { is_permanent, is_due_at_once })
}

fn receive() -> impl Strategy<Value = Receive> {
    let failing = vec((0..6_u8, failure()), 0..3).prop_map(|failing| failing.into_iter().collect());
    let failing_late = prop_oneof![4 => Just(None), 1 => (any::<usize>(), failure()).prop_map(Some)];
    (1..6, any::<bool>(), failing, failing_late).prop_map(|(max, is_opened, failing, failing_late)| Receive {
        max,
        is_opened,
        failing,
        failing_late,
    })
}

fn verb() -> impl Strategy<Value = Verb> {
    let consume = (vec(receive(), 1..4), prop_oneof![5 => Just(false), 1 => Just(true)]);
    prop_oneof![
        6 => prop_oneof![1 => Just(None), 4 => (0..3_u8).prop_map(Some)].prop_map(Verb::Enqueue),
        3 => Just(Verb::Relay),
        6 => consume.prop_map(|(receives, is_rolled_back)| Verb::Consume { receives, is_rolled_back }),
        3 => (any::<usize>(), failure()).prop_map(|(nth, failure)| Verb::Fail(nth, failure)),
        1 => any::<usize>().prop_map(Verb::Bury),
        2 => Just(Verb::MakeDue),
        2 => any::<usize>().prop_map(Verb::Replay),
        1 => any::<usize>().prop_map(Verb::Discard),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    /// By the transaction that is open.
    Received,
    Applied,
    Dead,
    Discarded,
}

/// A message of the queue, at the offset that is its place from 1.
#[derive(Clone, Debug)]
struct Message {
    key: Option<u8>,
    state: State,
    attempts: u32,
}

/// What there should be.
#[derive(Clone, Debug, Default)]
struct Model {
    unsent: Vec<Option<u8>>,
    queue: Vec<Message>,
    failures: i64,
    dead: i64,
}

impl Model {
    fn count(&self, state: State) -> i64 {
        i64::try_from(self.offsets(state).len()).expect("few")
    }

    fn offsets(&self, state: State) -> Vec<i64> {
        (1..).zip(&self.queue).filter(|(_, message)| message.state == state).map(|(offset, _)| offset).collect()
    }

    fn at(&mut self, offset: i64) -> &mut Message {
        &mut self.queue[usize::try_from(offset - 1).expect("an offset")]
    }
}

/// A model, and the topic and consumer that are to be as it says.
struct World<'a> {
    client: &'a Client,
    policy: &'a str,
    name: String,
    model: Model,
}

impl World<'_> {
    async fn run(&mut self, verbs: &[Verb]) {
        let create = format!(
            "select pgonce.create_topic('{0}', 1); select pgonce.create_consumer('{0}', '{0}', failure_policy => '{1}', attempts_max => {ATTEMPTS_MAX})",
            self.name, self.policy
        );
        self.execute(&create).await;
        for verb in verbs {
            self.play(verb).await;
            self.compare().await;
        }
        self.drain().await;
    }

    async fn play(&mut self, verb: &Verb) {
        match verb {
            Verb::Enqueue(key) => {
                let key_text = key.map_or_else(|| "null".to_owned(), |key| format!("'{key}'"));
                self.execute(&format!("select pgonce.enqueue('{}', '{{}}', key => {key_text})", self.name)).await;
                self.model.unsent.push(*key);
            }
            Verb::Relay => {
                self.execute(&format!("select pgonce.relay('{}')", self.name)).await;
                let sent = self.model.unsent.drain(..);
                self.model.queue.extend(sent.map(|key| Message { key, state: State::Waiting, attempts: 0 }));
            }
            Verb::Consume { receives, is_rolled_back } => self.consume(receives, *is_rolled_back).await,
            Verb::Fail(nth, failure) => {
                if !self.model.queue.is_empty() {
                    let offset = i64::try_from(nth % self.model.queue.len()).expect("few") + 1;
                    self.fail(offset, *failure).await;
                }
            }
            Verb::Bury(nth) => {
                if !self.model.queue.is_empty() {
                    self.bury(i64::try_from(nth % self.model.queue.len()).expect("few") + 1).await;
                }
            }
            Verb::MakeDue => self.make_due().await,
            Verb::Replay(nth) => self.settle("replay", *nth, State::Waiting).await,
            Verb::Discard(nth) => self.settle("discard", *nth, State::Discarded).await,
        }
    }

    async fn consume(&mut self, receives: &[Receive], is_rolled_back: bool) {
        let before = self.model.clone();
        self.execute("begin").await;
        for receive in receives {
            let offsets = self.receive(receive.max, receive.is_opened).await;
            for (nth, offset) in (0..).zip(offsets) {
                // What was withdrawn meanwhile has no turn.
                if self.model.at(offset).state == State::Received
                    && let Some(failure) = receive.failing.get(&nth)
                {
                    self.fail(offset, *failure).await;
                }
            }
            let held = self.model.offsets(State::Received);
            if let Some((nth, failure)) = receive.failing_late
                && !held.is_empty()
            {
                self.fail(held[nth % held.len()], failure).await;
            }
        }
        if is_rolled_back {
            self.execute("rollback").await;
            self.model = before;
        } else {
            self.execute("commit").await;
            for message in self.model.queue.iter_mut().filter(|message| message.state == State::Received) {
                message.state = State::Applied;
            }
        }
    }

    /// Each message that comes was neither applied nor given up, and overtakes nothing.
    async fn receive(&mut self, max: i32, is_opened: bool) -> Vec<i64> {
        let offsets: Vec<i64> = if is_opened {
            let opened = number(self.client, &format!("select pgonce.open_batch('{}', {max})", self.name)).await;
            let shown = self.offsets(r#"select "offset" from pgonce.received order by "offset""#).await;
            assert_eq!(i64::try_from(shown.len()), Ok(opened), "the view shows what was opened");
            shown
        } else {
            self.offsets(&format!(r#"select "offset" from pgonce.receive('{}', {max})"#, self.name)).await
        };
        for &offset in &offsets {
            let message = self.model.at(offset).clone();
            assert_eq!(message.state, State::Waiting, "{offset} is received");
            for earlier in self.model.offsets(State::Waiting).into_iter().filter(|&earlier| earlier < offset) {
                let is_of_key = message.key.is_some() && self.model.at(earlier).key == message.key;
                let overtakes = self.policy == "block" || (self.policy == "park_key" && is_of_key);
                assert!(!overtakes, "{offset} overtakes {earlier}");
            }
            self.model.at(offset).state = State::Received;
        }
        offsets
    }

    async fn fail(&mut self, offset: i64, failure: Failure) {
        let message = self.model.at(offset).clone();
        let is_dead = failure.is_permanent || message.attempts + 1 >= ATTEMPTS_MAX;
        let mut withdrawn = Vec::new();
        let outcome = match message.state {
            State::Applied | State::Dead | State::Discarded => "gone",
            State::Waiting | State::Received => {
                for received in self.model.offsets(State::Received) {
                    let is_of_key = message.key.is_some() && self.model.at(received).key == message.key;
                    let is_behind = received > offset
                        && !is_dead
                        && (self.policy == "block" || (self.policy == "park_key" && is_of_key));
                    if received == offset || is_behind {
                        withdrawn.push(received);
                        self.model.at(received).state = State::Waiting;
                    }
                }
                let failed = self.model.at(offset);
                failed.attempts += 1;
                failed.state = if is_dead { State::Dead } else { State::Waiting };
                self.model.failures += 1;
                self.model.dead += i64::from(is_dead);
                if is_dead { "dead" } else { "parked" }
            }
        };
        let retry_at = if failure.is_due_at_once { "-infinity" } else { "infinity" };
        let fail = format!(
            "select outcome, withdrawn from pgonce.fail('{}', 0, {offset}, 'as told', {}, '{retry_at}')",
            self.name, failure.is_permanent
        );
        let row = self.client.query_one(&fail, &[]).await.expect("fail answers");
        let answer: (String, Vec<i64>) = (row.get(0), row.get(1));
        assert_eq!(answer, (outcome.to_owned(), withdrawn), "fail of {offset}");
    }

    /// Only what was applied can be buried.
    async fn bury(&mut self, offset: i64) {
        let message = self.model.at(offset);
        let mut outcome = "gone";
        if message.state == State::Applied {
            message.state = State::Dead;
            (self.model.failures, self.model.dead, outcome) = (self.model.failures + 1, self.model.dead + 1, "dead");
        }
        let bury = format!("select outcome from pgonce.bury('{}', 0, {offset}, 'as told')", self.name);
        let row = self.client.query_one(&bury, &[]).await.expect("bury answers");
        assert_eq!(row.get::<_, String>(0), outcome, "bury of {offset}");
    }

    async fn settle(&mut self, how: &str, nth: usize, state: State) {
        let dead = self.model.offsets(State::Dead);
        if dead.is_empty() {
            return;
        }
        let offset = dead[nth % dead.len()];
        let settle = format!(
            r#"select count(*) filter (where was_settled) from pgonce.{how}_dead_letters(array(
                select dead_letter_id from pgonce.dead_letter_list where consumer = '{}' and "offset" = {offset}))"#,
            self.name
        );
        assert_eq!(number(self.client, &settle).await, 1, "{how} of {offset}");
        let message = self.model.at(offset);
        message.state = state;
        message.attempts = 0;
    }

    async fn make_due(&self) {
        self.execute("update pgonce.parked set due_at = clock_timestamp() where due_at is not null").await;
    }

    /// In the end each message was applied, or is given up.
    async fn drain(&mut self) {
        self.play(&Verb::Relay).await;
        let mut rounds = 0;
        while self.model.count(State::Waiting) > 0 {
            rounds += 1;
            assert!(rounds < ROUNDS_MAX, "never received: {:?}", self.model.offsets(State::Waiting));
            self.make_due().await;
            let receive = Receive { max: 4, is_opened: true, failing: BTreeMap::new(), failing_late: None };
            self.consume(&[receive], false).await;
        }
        self.compare().await;
    }

    /// The counters and the records are those of the model.
    async fn compare(&self) {
        let books = format!(
            r"select array[o.received, o.duplicates, o.failures, o.dead, l.dead, (
                select count(*) from pgonce.processed_ids p where p.consumer_id = o.consumer_id)]
            from pgonce.consumer_offsets o join pgonce.consumer_lag l using (consumer) where consumer = '{}'",
            self.name
        );
        let row = self.client.query_one(&books, &[]).await.expect("the books");
        let (model, books): (&Model, Vec<i64>) = (&self.model, row.get(0));
        let applied = model.count(State::Applied);
        assert_eq!(books, [applied, 0, model.failures, model.dead, model.count(State::Dead), applied]);
    }

    async fn execute(&self, statements: &str) {
        self.client.batch_execute(statements).await.expect("the statements succeed");
    }

    async fn offsets(&self, query: &str) -> Vec<i64> {
        let rows = self.client.query(query, &[]).await.expect("the query succeeds");
        rows.iter().map(|row| row.get(0)).collect()
    }
}

fn try_policy(policy: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let database = runtime.block_on(TestDatabase::new());
    let client = runtime.block_on(database.connect());
    let first = env::var(SEED).map_or_else(|_| Uuid::now_v7().as_u64_pair().1, |seed| seed.parse().expect("a number"));
    let deadline = Instant::now() + TRY_FOR;
    let mut tried = 0;
    let mut worlds = 0;
    while Instant::now() < deadline {
        let seed = first.wrapping_add(tried);
        let config = Config {
            cases: 1,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            max_shrink_iters: 300,
            max_shrink_time: 20_000,
            ..Config::default()
        };
        let names = std::cell::Cell::new(worlds);
        let outcome = TestRunner::new(config).run(&vec(verb(), 1..60), |verbs| {
            names.set(names.get() + 1);
            runtime.block_on(async {
                // What an attempt before left behind when it failed.
                client.batch_execute("rollback").await.expect("rolled back");
                let name = format!("w{}", names.get());
                World { client: &client, policy, name, model: Model::default() }.run(&verbs).await;
            });
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("{policy}, {SEED}={seed}: {error}");
        }
        worlds = names.get();
        tried += 1;
    }
    println!("{policy}: {tried} sequences from {SEED}={first}");
    assert!(tried > 0, "at least one");
}

#[test]
fn park_key_keeps_to_the_model() {
    try_policy("park_key");
}

#[test]
fn block_keeps_to_the_model() {
    try_policy("block");
}

#[test]
fn skip_keeps_to_the_model() {
    try_policy("skip");
}
