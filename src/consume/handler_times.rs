//! How long handlers take: the number of calls for each length of time, in memory until the worker writes it down
//! (`sql/routines/rates.sql`).
//!
//! A bucket is a quarter of an octave: its calls took up to 2^(1/4) times as long as those of the one before, so a
//! percentile is too high by a fifth at the most, from microseconds to days, and numbers of any number of processes add up.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Buckets from 1 µs to 2.7 days; what takes longer is in the last one.
const BUCKETS: usize = 152;
/// Buckets in which the time doubles.
const PER_OCTAVE: f64 = 4.0;

/// The calls of a consumer's handler since they were last taken.
pub(crate) struct HandlerTimes {
    calls: [AtomicU64; BUCKETS],
}

/// Numbers of calls that were taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// The buckets in which there are any.
    pub(crate) buckets: Vec<i32>,
    /// How many.
    pub(crate) calls: Vec<i64>,
}

impl HandlerTimes {
    pub(super) fn new() -> Self {
        Self { calls: [const { AtomicU64::new(0) }; BUCKETS] }
    }

    /// Counts what a call takes, however it ends; one that is dropped is not counted.
    pub(super) async fn measure<T>(&self, call: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let outcome = call.await;
        self.add(began.elapsed());
        outcome
    }

    fn add(&self, took: Duration) {
        self.calls[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes what was counted.
    pub(super) fn take(&self) -> Taken {
        let mut taken = Taken::default();
        for (bucket, calls) in (0..).zip(&self.calls) {
            let calls = calls.swap(0, Ordering::Relaxed);
            if calls > 0 {
                taken.buckets.push(bucket);
                taken.calls.push(i64::try_from(calls).unwrap_or(i64::MAX));
            }
        }
        taken
    }
}

/// The first bucket that holds so long a time: up to 2^(bucket / 4) µs.
fn bucket(took: Duration) -> usize {
    let micros = (took.as_secs_f64() * 1e6).max(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is 0 or more, and below 300")]
    let bucket = (micros.log2() * PER_OCTAVE).ceil() as usize;
    bucket.min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_takes_up_to_its_bound() {
        for (took, expected) in [
            (Duration::ZERO, 0),
            (Duration::from_micros(1), 0),
            (Duration::from_micros(2), 4),
            (Duration::from_micros(1_024), 40),
            (Duration::from_nanos(1_024_001), 41),
            (Duration::from_micros(1 << 20), 80),
            (Duration::from_secs(30), 100),
            (Duration::MAX, BUCKETS - 1),
        ] {
            assert_eq!(bucket(took), expected, "{took:?}");
        }
    }

    #[test]
    fn what_was_taken_is_not_taken_again() {
        let times = HandlerTimes::new();
        for micros in [1, 2, 2] {
            times.add(Duration::from_micros(micros));
        }
        assert_eq!(times.take(), Taken { buckets: vec![0, 4], calls: vec![1, 2] });
        assert_eq!(times.take(), Taken::default());
    }
}
