//! The promises, checked from the books after a permutation was drained. Nothing here knows the specification.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::history::{Commit, History};

/// What `test.state` answers.
#[derive(Debug, Deserialize)]
pub(crate) struct State {
    consumer_id: Option<i32>,
    /// Under leases a failure is also counted by whoever takes over from one that vanished.
    is_external: bool,
    ledger: Vec<Entry>,
    taken_back: Vec<String>,
    queue: Vec<Queued>,
    purged: Vec<Purged>,
    parked: Vec<String>,
    dead_letters: Vec<DeadLetter>,
    failed: Vec<Failure>,
    unsent: Vec<String>,
    sent: usize,
    set_aside: usize,
    duplicate_sends: usize,
    heads: Vec<Head>,
    progress: Vec<Progress>,
    processed: Vec<Processed>,
    totals: Vec<Total>,
    applied: Vec<Applied>,
    left_behind: usize,
    broken: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    position: i64,
    step: String,
    message_id: String,
    key: Option<String>,
    delayed: bool,
    was_duplicate: bool,
}

#[derive(Debug, Deserialize)]
struct Queued {
    partition: i32,
    offset: i64,
    message_id: String,
}

#[derive(Debug, Deserialize)]
struct Purged {
    #[serde(flatten)]
    message: Queued,
    was_applied: bool,
}

#[derive(Debug, Deserialize)]
struct DeadLetter {
    partition: i32,
    message_id: String,
    state: String,
}

#[derive(Debug, Deserialize)]
struct Failure {
    consumer_id: i32,
    partition: i32,
    outcome: String,
}

#[derive(Debug, Deserialize)]
struct Head {
    partition: i32,
    next_offset: i64,
    moved: i64,
}

#[derive(Debug, Deserialize)]
struct Progress {
    partition: i32,
    next_offset: i64,
    received: i64,
    duplicates: i64,
    failures: i64,
    dead: i64,
}

#[derive(Debug, Deserialize)]
struct Processed {
    partition: i32,
    offset: i64,
    message_id: String,
}

#[derive(Debug, Deserialize)]
struct Total {
    partition: i32,
    total: i64,
}

#[derive(Debug, Deserialize)]
struct Applied {
    consumer_id: i32,
    partition: i32,
    offset: i64,
    message_id: String,
    key: Option<String>,
}

/// When an enqueue happened, as the runner saw it.
#[derive(Clone, Copy)]
struct Sent {
    began: usize,
    transaction: Option<usize>,
    commit: Commit,
}

impl State {
    /// All that ever was in the queue.
    fn queued(&self) -> impl Iterator<Item = &Queued> {
        self.purged.iter().map(|purged| &purged.message).chain(&self.queue)
    }

    /// How often a message is to be applied, as far as that is known.
    fn times_due(&self, message: &Queued) -> usize {
        let is_given_up = |dead: &DeadLetter| dead.message_id == message.message_id && dead.state != "replayed";
        let purged = self.purged.iter().find(|purged| purged.message.message_id == message.message_id);
        match purged {
            Some(purged) => purged.was_applied.into(),
            None => (!self.dead_letters.iter().any(is_given_up)).into(),
        }
    }
}

/// The promises that are broken, in words; none if all hold.
pub(crate) fn broken_promises(state: &State, history: &History<'_>) -> Vec<String> {
    let mut broken = state.broken.clone();
    once_in(state, &mut broken);
    in_order(state, history, &mut broken);
    gapless(state, &mut broken);
    once_applied(state, &mut broken);
    counted(state, &mut broken);
    earlier_consumers(state, &mut broken);
    broken
}

/// Promises 1, 2 and 6: what is in the queue is what was committed, once.
fn once_in(state: &State, broken: &mut Vec<String>) {
    let mut copies: BTreeMap<&str, i32> = BTreeMap::new();
    let ids = |entry: &Entry| entry.message_id.clone();
    let firsts: BTreeSet<String> = state.ledger.iter().filter(|entry| !entry.was_duplicate).map(ids).collect();
    for entry in &state.ledger {
        if !entry.was_duplicate {
            *copies.entry(&entry.message_id).or_default() += 1;
        } else if !firsts.contains(&entry.message_id) {
            broken.push(format!("once in: {} was told of a first {} that never was", entry.step, entry.message_id));
        }
    }
    for id in &state.taken_back {
        *copies.entry(id).or_default() -= 1;
    }
    for (id, &number) in &copies {
        if !(0..=1).contains(&number) {
            broken.push(format!("once in: {number} enqueues of {id} were told that they are the first"));
        }
        let queued = state.queued().filter(|message| message.message_id == *id).count();
        if i32::try_from(queued) != Ok(number) {
            broken.push(format!(
                "atomic, nothing skipped: {id} was committed {number} times, is in the queue {queued} times"
            ));
        }
    }
    for message in state.queued() {
        if !copies.contains_key(message.message_id.as_str()) {
            broken.push(format!("atomic: {} is in the queue, and was never committed", message.message_id));
        }
    }
    if !state.unsent.is_empty() || state.set_aside > 0 || state.sent != state.queued().count() {
        broken.push(format!(
            "nothing skipped: outbox rows {:?} are not SENT, {} are, {} are set aside",
            state.unsent, state.sent, state.set_aside
        ));
    }
    let refused = state.ledger.iter().filter(|entry| entry.was_duplicate).count();
    if refused != state.duplicate_sends {
        broken.push(format!("{refused} enqueues were refused, {} are counted", state.duplicate_sends));
    }
}

/// Promise 3: messages of one key stand in the order in which the relay could see them.
fn in_order(state: &State, history: &History<'_>, broken: &mut Vec<String>) {
    let mut sends: BTreeMap<&str, (&Entry, Sent)> = BTreeMap::new();
    for entry in state.ledger.iter().filter(|entry| !entry.was_duplicate) {
        match sent(entry, history) {
            // Where a message was taken back and sent again, the last one counts.
            Ok(sent) => drop(sends.insert(&entry.message_id, (entry, sent))),
            Err(why) => broken.push(why),
        }
    }
    let looks: Vec<_> = history.looks().collect();
    let places: BTreeMap<&str, &Queued> =
        state.queued().map(|message| (message.message_id.as_str(), message)).collect();
    for (first, (a, sent_a)) in &sends {
        for (second, (b, sent_b)) in &sends {
            let (Some(place_a), Some(place_b)) = (places.get(first), places.get(second)) else { continue };
            if a.key.is_none() || a.key != b.key || a.delayed || b.delayed || first == second {
                continue;
            }
            let why = if sent_a.commit.ended < sent_b.began {
                "was committed before the other was enqueued"
            } else if looks.iter().any(|look| {
                sent_a.commit.ended < look.began
                    && look.ended < sent_b.commit.began
                    && Some(look.transaction) != sent_b.transaction
            }) {
                "was seen by a relay before the other was committed"
            } else if sent_a.transaction == sent_b.transaction && a.position < b.position {
                "was enqueued before the other in the same transaction"
            } else {
                continue;
            };
            if place_a.partition != place_b.partition || place_a.offset > place_b.offset {
                broken.push(format!("in order: {first} {why}, {second}, and stands behind it"));
            }
        }
    }
}

fn sent(entry: &Entry, history: &History<'_>) -> Result<Sent, String> {
    let Some(ran) = history.ran(&entry.step) else {
        // Of the setup.
        return Ok(Sent { began: 0, transaction: None, commit: Commit { began: 0, ended: 0 } });
    };
    let transaction = &history.transactions[ran.transaction];
    let commit = transaction
        .commit
        .ok_or_else(|| format!("atomic: {} left a row, and its transaction did not commit", entry.step))?;
    Ok(Sent { began: ran.began, transaction: Some(ran.transaction), commit })
}

/// Offsets have no gaps, and the heads agree with them.
fn gapless(state: &State, broken: &mut Vec<String>) {
    for head in &state.heads {
        let offsets: Vec<i64> = state
            .queued()
            .filter(|message| message.partition == head.partition)
            .map(|message| message.offset)
            .collect();
        if !offsets.iter().copied().eq(1..head.next_offset) || head.moved != head.next_offset - 1 {
            broken.push(format!(
                "in order: partition {} has offsets {offsets:?}, its head is at {} after {} messages",
                head.partition, head.next_offset, head.moved
            ));
        }
    }
}

/// Promises 4 and 6: the consumer's effects are those of every message in the queue, once, in order. Only what was given
/// up is not applied, and what came back from the dead letters has no place in the order.
fn once_applied(state: &State, broken: &mut Vec<String>) {
    let applied: Vec<&Applied> =
        state.applied.iter().filter(|effect| Some(effect.consumer_id) == state.consumer_id).collect();
    if !state.parked.is_empty() {
        broken.push(format!("nothing skipped: {:?} are still parked", state.parked));
    }
    for message in state.queued() {
        let times = applied.iter().filter(|effect| effect.message_id == message.message_id).count();
        let times_due = state.times_due(message);
        if times != times_due {
            broken.push(format!("once applied: {} was applied {times} times, not {times_due}", message.message_id));
        }
    }
    let mut last: BTreeMap<&str, i64> = BTreeMap::new();
    for effect in
        applied.iter().filter(|effect| !state.dead_letters.iter().any(|dead| dead.message_id == effect.message_id))
    {
        let Some(key) = &effect.key else { continue };
        if last.insert(key, effect.offset).is_some_and(|before| before > effect.offset) {
            broken.push(format!("in order: key {key:?} was applied in another order than it has"));
        }
    }
    let places = |effects: &[&Applied]| -> BTreeSet<(i32, i64, String)> {
        effects.iter().map(|effect| (effect.partition, effect.offset, effect.message_id.clone())).collect()
    };
    let recorded: BTreeSet<(i32, i64, String)> =
        state.processed.iter().map(|record| (record.partition, record.offset, record.message_id.clone())).collect();
    if recorded != places(&applied) {
        broken
            .push(format!("once applied: recorded as processed are {recorded:?}, applied were {:?}", places(&applied)));
    }
    if state.left_behind > 0 {
        broken.push(format!("once applied: {} rows of consumers that were dropped", state.left_behind));
    }
}

/// The counters agree with what there is.
fn counted(state: &State, broken: &mut Vec<String>) {
    for head in &state.heads {
        let Some(progress) = state.progress.iter().find(|progress| progress.partition == head.partition) else {
            broken.push(format!("once applied: the consumer has no partition {}", head.partition));
            continue;
        };
        let is_own = |effect: &&Applied| Some(effect.consumer_id) == state.consumer_id;
        let here = state.applied.iter().filter(is_own).filter(|effect| effect.partition == head.partition);
        let messages = number(here);
        let of_own = |failure: &&Failure| {
            Some(failure.consumer_id) == state.consumer_id
                && failure.partition == head.partition
                && failure.outcome != "gone"
        };
        let failures = state.failed.iter().filter(of_own);
        let dead = number(failures.clone().filter(|failure| failure.outcome == "dead"));
        let letters = number(state.dead_letters.iter().filter(|dead| dead.partition == head.partition));
        let are_counted = state.is_external || progress.failures == number(failures);
        if !are_counted || progress.dead != dead || dead != letters {
            broken.push(format!("{progress:?} of {:?}, with {letters} dead letters", state.failed));
        }
        let total = state.totals.iter().find(|total| total.partition == head.partition).map_or(0, |total| total.total);
        if total != messages {
            broken.push(format!("once applied: partition {} adds up to {total} of {messages}", head.partition));
        }
        if progress.next_offset != head.next_offset || progress.received != messages || progress.duplicates != 0 {
            broken.push(format!("once applied: {progress:?} of {messages} messages up to {}", head.next_offset));
        }
    }
}

fn number<T>(of: impl Iterator<Item = T>) -> i64 {
    i64::try_from(of.count()).expect("few")
}

/// A consumer that was dropped had applied each message at most once, and without gaps unless something failed.
fn earlier_consumers(state: &State, broken: &mut Vec<String>) {
    let mut last: BTreeMap<(i32, i32), i64> = BTreeMap::new();
    let mut places = BTreeSet::new();
    for effect in &state.applied {
        let before = last.insert((effect.consumer_id, effect.partition), effect.offset).unwrap_or(0);
        let is_first = places.insert((effect.consumer_id, effect.partition, effect.offset));
        let flows_on = state.failed.iter().any(|failure| failure.consumer_id == effect.consumer_id);
        let has_gap = before + 1 != effect.offset && !flows_on && state.purged.is_empty();
        if !is_first || has_gap {
            broken.push(format!("once applied: offset {} was applied after {before}", effect.offset));
        }
    }
}
