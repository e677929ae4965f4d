//! Interleavings: the promises of pgonce under every order of the steps of two or three sessions.
//!
//! Each file in `tests/interleavings` is a specification (see `specification.rs`), and a test: all its permutations keep
//! every promise, and it finds a violation when one of its guards, a piece of the SQL on which a promise rests, is taken
//! out. The second keeps the first honest.

mod history;
mod oracle;
mod permutations;
mod runner;
mod session;
mod specification;

use std::path::{Path, PathBuf};

use self::runner::Bench;
use self::specification::Specification;

/// How often a specification may run without a guard until it finds a violation. What a relay knows of the transactions
/// that are open depends on all that goes on in the server, so now and then it is right by chance.
const ATTEMPTS_MAX: usize = 20;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interleavings")
}

fn read(name: &str) -> Specification {
    let text = std::fs::read_to_string(directory().join(name).with_extension("spec")).expect("the file can be read");
    Specification::parse(name, &text)
}

async fn run(name: &str) {
    let specification = read(name);
    assert!(!specification.guards.is_empty(), "{name} names no guard");
    let mut bench = Bench::new(&specification).await;
    let findings = bench.run_all("").await;
    if let Some(violation) = findings.violation {
        panic!("{name}: a promise is broken\n{violation}");
    }
    assert!(findings.run > 0, "{name}: none of {} permutations can happen", findings.infeasible);
    for guard in &specification.guards {
        let mut violation = None;
        for _ in 0..ATTEMPTS_MAX {
            violation = bench.run_without(guard).await.violation;
            if violation.is_some() {
                break;
            }
        }
        let violation = violation.unwrap_or_else(|| panic!("{name}: nothing is broken without {:?}", guard.name));
        println!("{violation}\n");
    }
}

macro_rules! specifications {
    ($($name:ident),+ $(,)?) => {
        /// What there is, by file name.
        const SPECIFICATIONS: &[&str] = &[$(stringify!($name)),+];

        mod keeps_every_promise_and_not_without_its_guards {
            $(#[tokio::test]
            async fn $name() {
                Box::pin(super::run(stringify!($name))).await;
            })+
        }
    };
}

specifications! {
    ack_and_acquire,
    ack_and_drop_consumer,
    ack_and_pause,
    ack_and_purge,
    ack_and_replay,
    acquire_and_acquire,
    bury_and_drop_consumer,
    bury_and_receive,
    bury_and_replay,
    cancel_and_duplicate,
    cancel_and_relay,
    cancel_repeatable_read,
    cancel_rolled_back,
    cancel_rolled_back_and_duplicate,
    checkpoint_and_ack,
    checkpoint_and_acquire,
    checkpoint_and_fail,
    checkpoint_and_purge,
    checkpoint_and_receive,
    checkpoint_and_relay,
    checkpoint_and_replay,
    checkpoint_and_retry,
    create_consumer,
    create_consumer_twice,
    delayed,
    drop_and_create_consumer,
    drop_consumer,
    drop_consumer_repeatable_read,
    duplicate_sets,
    duplicate_sets_repeatable_read,
    duplicate_sets_serializable,
    duplicates,
    duplicates_repeatable_read,
    duplicates_rolled_back,
    duplicates_serializable,
    fail_ahead,
    fail_and_drop_consumer,
    fail_and_pause,
    fail_block,
    fail_in_later_transaction,
    fail_in_own_transaction,
    fail_savepoint,
    fail_twice,
    foreign_delete,
    foreign_delete_rolled_back,
    foreign_lock_for_key_share,
    foreign_lock_for_no_key_update,
    foreign_lock_for_share,
    foreign_lock_for_update,
    foreign_update,
    foreign_update_rolled_back,
    hand_over,
    hand_over_and_drop_consumer,
    inbox,
    late_commit,
    late_commit_pair,
    long_open,
    long_open_rolled_back,
    nack_and_acquire,
    pause,
    producers_repeatable_read,
    producers_serializable,
    purge_parked,
    receive_rolled_back,
    receive_savepoint,
    relay_all_topics,
    relay_own_message,
    relay_rolled_back,
    relay_savepoint,
    relay_twice,
    replay_and_discard,
    replay_and_receive,
    replay_twice,
    restore_after_replay,
    restore_and_ack,
    restore_and_acquire,
    restore_and_fail,
    restore_and_receive,
    restore_and_relay,
    restore_and_replay,
    restore_and_replay_partitions,
    restore_and_retry,
    savepoints,
    small_relays,
    stale_receive,
    stale_receive_repeatable_read,
    stale_receive_serializable,
    two_partitions,
    two_receives,
    two_relays,
}

#[test]
fn every_file_is_run() {
    let mut files: Vec<String> = std::fs::read_dir(directory())
        .expect("the directory is there")
        .map(|entry| entry.expect("readable").path().file_stem().expect("a name").to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(files, SPECIFICATIONS);
}
