//! Calls of handlers: bounded in time, and with a panic taken for a failure.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use super::failure::Trouble;
use super::handler::HandlerError;
use crate::message::Offset;

/// A future on the heap, for handlers of different kinds behind one interface.
pub(super) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Runs a handler for as long as a message may take. A panic of it is a failure like any other.
pub(super) async fn bounded(
    consumer: &str,
    message_timeout: Duration,
    culprit: Option<Offset>,
    handling: impl Future<Output = Result<(), HandlerError>> + Send,
) -> Result<(), Trouble> {
    let mut handling = pin!(handling);
    let caught = poll_fn(|context| {
        // Whatever the handler left half done is rolled back to the savepoint, and its own state is its own affair.
        match catch_unwind(AssertUnwindSafe(|| handling.as_mut().poll(context))) {
            Ok(poll) => poll,
            Err(_) => Poll::Ready(Err("the handler panicked".into())),
        }
    });
    // A statement that is under way when the handler is dropped ends by itself: the session's statement_timeout is the same.
    match tokio::time::timeout(message_timeout, caught).await {
        Ok(outcome) => outcome.map_err(|error| Trouble::of_handler(consumer, culprit, error)),
        Err(_) => Err(Trouble::timeout(culprit, message_timeout)),
    }
}
