//! Failures of handlers: whose fault they are, and when to try again.

use std::error::Error as StdError;
use std::fmt;
use std::time::{Duration, SystemTime};

use super::handler::HandlerError;
use crate::error::{Error, ErrorKind};
use crate::message::Offset;

/// Longest error text that is stored, in bytes.
const TEXT_BYTES_MAX: usize = 4_000;

/// What statements raise to say that a message will never succeed.
const PERMANENT: &str = "PO013";
/// What PostgreSQL says of all statements behind one that failed.
const ABORTED: &str = "25P02";

/// An error that says when its message is to be tried again: never, or at a certain time. Any other error is tried again
/// after the consumer's backoff.
///
/// ```
/// use pgonce::{Failure, HandlerError};
///
/// fn check(amount: i64) -> Result<(), HandlerError> {
///     if amount < 0 {
///         return Err(Failure::permanent("an amount below zero").into());
///     }
///     Ok(())
/// }
/// # assert!(check(-1).is_err());
/// ```
#[derive(Debug)]
pub struct Failure {
    error: HandlerError,
    verdict: Verdict,
}

/// Longest wait that a failure may ask for: ten years.
const RETRY_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// When a message that failed is tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Verdict {
    /// After the consumer's backoff, unless it has been tried often enough.
    #[default]
    Retry,
    /// At this time, unless it has been tried often enough.
    RetryAt(SystemTime),
    /// After so long, unless it has been tried often enough.
    RetryAfter(Duration),
    /// Never: it becomes a dead letter at once.
    Permanent,
}

impl Verdict {
    /// When, or after which time, it says that the message is tried again.
    pub(super) fn retry(self) -> (Option<SystemTime>, Option<Duration>) {
        match self {
            // What the server cannot store would fail instead of the message.
            Self::RetryAt(time) => (Some(time.clamp(SystemTime::UNIX_EPOCH, SystemTime::now() + RETRY_MAX)), None),
            Self::RetryAfter(wait) => (None, Some(wait.min(RETRY_MAX))),
            Self::Retry | Self::Permanent => (None, None),
        }
    }
}

impl Failure {
    /// The message will never succeed: it becomes a dead letter at once. Statements say the same by the SQLSTATE `PO013`:
    /// `raise exception using errcode = 'PO013', message = …`.
    #[must_use]
    pub fn permanent(error: impl Into<HandlerError>) -> Self {
        Self { error: error.into(), verdict: Verdict::Permanent }
    }

    /// The message is tried again at this time, by the database's clock, and not before, unless it comes to wait behind an
    /// earlier one of its key: then as soon as that is settled. Ten years ahead at the most.
    #[must_use]
    pub fn retry_at(time: SystemTime, error: impl Into<HandlerError>) -> Self {
        Self { error: error.into(), verdict: Verdict::RetryAt(time) }
    }

    /// The message is tried again after this time, as [`retry_at`](Self::retry_at) has it.
    #[must_use]
    pub fn retry_after(wait: Duration, error: impl Into<HandlerError>) -> Self {
        Self { error: error.into(), verdict: Verdict::RetryAfter(wait) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl StdError for Failure {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.source()
    }
}

/// Why a batch, or a part of it, was not applied.
#[derive(Debug)]
pub(super) enum Trouble {
    /// No message is to blame: the connection, the server, another transaction, or the statement itself.
    Elsewhere(Error),
    /// A message is to blame; which one, where the handler says so.
    Message(Blame),
}

/// What a message is blamed for.
#[derive(Debug)]
pub(super) struct Blame {
    pub(super) culprit: Option<Offset>,
    pub(super) text: String,
    pub(super) verdict: Verdict,
}

impl<E: Into<Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Elsewhere(error.into())
    }
}

impl Trouble {
    /// Of what a handler answered.
    pub(super) fn of_handler(consumer: &str, culprit: Option<Offset>, error: HandlerError) -> Self {
        if let Some(kind) = kind_elsewhere(&*error) {
            let message = format!("handler of consumer {consumer:?} failed: {}", text_of(&*error));
            return Self::Elsewhere(Error::new(kind, message).with_source(error));
        }
        let text = text_of(&*error);
        let by_code = if has_code(&*error, PERMANENT) { Verdict::Permanent } else { Verdict::Retry };
        // Which message has aborted the transaction is not known: perhaps one before it, whose handler went on.
        let culprit = culprit.filter(|_| !has_code(&*error, ABORTED));
        let verdict = error.downcast::<Failure>().map_or(by_code, |failure| failure.verdict);
        Self::Message(Blame { culprit, text, verdict })
    }

    /// Of a message that took longer than it may.
    pub(super) fn timeout(culprit: Option<Offset>, longest: Duration) -> Self {
        Self::Message(Blame { culprit, text: format!("it took longer than {longest:?}"), verdict: Verdict::Retry })
    }
}

/// The error with its causes, as PostgreSQL can store it.
fn text_of(error: &(dyn StdError + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<Error>() && error.source().is_some() {
            // It says what its source says.
            next = error.source();
            continue;
        }
        let part = match error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::as_db_error) {
            // The driver's own text for what the server reports says nothing ("db error").
            Some(reported) => format!("{} ({})", reported.message(), reported.code().code()),
            None => error.to_string(),
        };
        if !text.contains(&part) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&part);
        }
        next = if error.is::<tokio_postgres::Error>() { None } else { error.source() };
    }
    text.retain(|character| character != '\0');
    while text.len() > TEXT_BYTES_MAX {
        text.pop();
    }
    text
}

/// The kind of an error that no message is to blame for.
fn kind_elsewhere(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<tokio_postgres::Error>() {
            return match error.code() {
                Some(code) if is_elsewhere(code.code()) => match ErrorKind::of_code(code) {
                    kind @ (ErrorKind::Contention | ErrorKind::Unavailable) => Some(kind),
                    _ => Some(ErrorKind::Handler),
                },
                None if error.is_closed() => Some(ErrorKind::Unavailable),
                _ => None,
            };
        }
        if let Some(error) = error.downcast_ref::<Error>()
            && matches!(error.kind(), ErrorKind::Contention | ErrorKind::Unavailable)
        {
            return Some(error.kind());
        }
        next = error.source();
    }
    None
}

/// Whether the database reported it with this SQLSTATE, whatever the handler has wrapped it in.
fn has_code(error: &(dyn StdError + 'static), code: &str) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let reported = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::code);
        if reported.is_some_and(|reported| reported.code() == code) {
            return true;
        }
        next = error.source();
    }
    false
}

/// SQLSTATEs for which no message is to blame, much as `try_statements` has them: the connection, the server, another
/// transaction; a statement that no message can make right, or a right that is missing.
fn is_elsewhere(code: &str) -> bool {
    matches!(code, "40001" | "40P01" | "55P03" | "25006" | "25P03" | "25P04" | "57P01" | "57P02" | "57P03" | "57P05")
        || ["08", "0A", "2D", "3D", "3F", "42", "53", "58", "F0", "XX"].iter().any(|class| code.starts_with(class))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Caused(&'static str, Option<Box<Caused>>);

    impl fmt::Display for Caused {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl StdError for Caused {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn an_error_is_stored_with_its_causes_and_without_what_cannot_be_stored() {
        let error = Caused("no mail\0", Some(Box::new(Caused("no route", None))));
        assert_eq!(text_of(&error), "no mail: no route");
        let endless = std::io::Error::other("\u{e9}".repeat(10_000));
        assert_eq!(text_of(&endless).len(), TEXT_BYTES_MAX);
    }

    #[test]
    fn an_error_says_whether_a_message_is_to_blame_and_when_to_try_again() {
        let blame = |error: HandlerError| match Trouble::of_handler("c", None, error) {
            Trouble::Message(blame) => blame.verdict,
            Trouble::Elsewhere(error) => panic!("{error}"),
        };
        assert_eq!(blame("bad".into()), Verdict::Retry);
        assert_eq!(blame(Failure::permanent("bad").into()), Verdict::Permanent);
        let time = SystemTime::UNIX_EPOCH;
        assert_eq!(blame(Failure::retry_at(time, "later").into()), Verdict::RetryAt(time));
        let lost = Error::new(ErrorKind::Unavailable, "lost");
        assert!(matches!(Trouble::of_handler("c", None, lost.into()), Trouble::Elsewhere(_)));
        assert!(is_elsewhere("42P01") && is_elsewhere("57P01") && !is_elsewhere("57014") && !is_elsewhere("22012"));
    }
}
