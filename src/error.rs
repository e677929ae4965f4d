//! What can go wrong, and what to do about it.
//!
//! Every failure is an [`Error`] with an [`ErrorKind`]; one match, [`ErrorKind::remedy`], says whether trying again can
//! help, whether an operator has to act, or whether the request itself must change. Messages name the value, the limit
//! and the way out; payloads and secrets are
//! in neither the messages nor the `Debug` form; [`source`](StdError::source) gives the server's own report.

use std::error::Error as StdError;
use std::fmt;

use tokio_postgres::error::SqlState;

/// A failure of pgonce.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What kind of failure it was. The SQLSTATE in brackets is what the SQL functions raise for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The topic does not exist (`PO001`).
    UnknownTopic,
    /// The consumer does not exist (`PO002`).
    UnknownConsumer,
    /// An argument makes no sense: a count out of bounds, a null, a schema name that cannot be one (`PO003`).
    Invalid,
    /// A payload, header, key or message id is beyond its bound (`PO004`).
    TooLarge,
    /// The topic exists with another number of partitions (`PO005`), or the consumer with another topic; or a checkpoint has
    /// that name already, or is of other tables (`PO006`).
    Conflict,
    /// The verb is for another kind of consumer: an inbox, one of a topic, or an external one (`PO007`).
    WrongConsumer,
    /// The topic still has consumers (`PO008`).
    InUse,
    /// Messages are missing from the queue (`PO009`).
    Hole,
    /// `relay`, `fail`, `bury`, `finish_handover`, `take_suspicion`, `sample_rates`, `purge_topic`, a `drop_…`, a replay, a
    /// discard, `checkpoint`, `restore` or a verb of leases outside READ COMMITTED (`PO010`).
    Isolation,
    /// One statement runs `receive` twice (`PO011`).
    ReceivedTwice,
    /// Rows were changed by hand, or pgonce is wrong (`PO012`).
    Defect,
    /// Messages that a restore or a replay needs are gone from the queue (`PO014`).
    Gone,
    /// The checkpoint does not exist (`PO015`).
    UnknownCheckpoint,
    /// The schema is not installed in this database.
    SchemaMissing,
    /// The schema is of an older version than this program.
    SchemaTooOld,
    /// The schema is of a newer version than this program.
    SchemaTooNew,
    /// The role has not been granted what it needs (`42501`).
    Denied,
    /// A payload is not the JSON that was expected, or holds `\u0000`, which PostgreSQL cannot store.
    Payload,
    /// A handler failed.
    Handler,
    /// Another transaction was in the way: a serialization failure or a deadlock.
    Contention,
    /// The server cannot be reached, is starting or stopping, or has no connection to give.
    Unavailable,
    /// Any other error of the database.
    Database,
}

/// What may help against an [`ErrorKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Remedy {
    /// The same again, a little later.
    Retry,
    /// Somebody has to change something outside of the program.
    Operator,
    /// The request itself has to change.
    Reject,
}

impl ErrorKind {
    /// What an SQLSTATE stands for.
    pub(crate) fn of_code(code: &SqlState) -> Self {
        match code.code() {
            "PO001" => Self::UnknownTopic,
            "PO002" => Self::UnknownConsumer,
            "PO003" => Self::Invalid,
            "PO004" => Self::TooLarge,
            "PO005" | "PO006" => Self::Conflict,
            "PO007" => Self::WrongConsumer,
            "PO008" => Self::InUse,
            "PO009" => Self::Hole,
            "PO010" => Self::Isolation,
            "PO011" => Self::ReceivedTwice,
            "PO012" => Self::Defect,
            "PO014" => Self::Gone,
            "PO015" => Self::UnknownCheckpoint,
            // serialization_failure, deadlock_detected, lock_not_available
            "40001" | "40P01" | "55P03" => Self::Contention,
            // invalid_schema_name, undefined_function
            "3F000" | "42883" => Self::SchemaMissing,
            // insufficient_privilege
            "42501" => Self::Denied,
            // too_many_connections, admin_shutdown, crash_shutdown, cannot_connect_now, idle_session_timeout,
            // idle_in_transaction_session_timeout, transaction_timeout, read_only_sql_transaction
            "53300" | "57P01" | "57P02" | "57P03" | "57P05" | "25P03" | "25P04" | "25006" => Self::Unavailable,
            // character_not_in_repertoire, numeric_value_out_of_range, invalid_text_representation, untranslatable_character
            "22021" | "22003" | "22P02" | "22P05" => Self::Payload,
            connection if connection.starts_with("08") => Self::Unavailable,
            _ => Self::Database,
        }
    }

    /// Says whether to retry, to call an operator or to reject the request.
    #[must_use]
    pub fn remedy(self) -> Remedy {
        match self {
            Self::Contention | Self::Unavailable | Self::Handler => Remedy::Retry,
            Self::UnknownTopic
            | Self::UnknownConsumer
            | Self::InUse
            | Self::Hole
            | Self::Defect
            | Self::Gone
            | Self::SchemaMissing
            | Self::SchemaTooOld
            | Self::SchemaTooNew
            | Self::Denied
            | Self::Database => Remedy::Operator,
            Self::Invalid
            | Self::TooLarge
            | Self::Conflict
            | Self::UnknownCheckpoint
            | Self::WrongConsumer
            | Self::Isolation
            | Self::ReceivedTwice
            | Self::Payload => Remedy::Reject,
        }
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), hint: None, source: None }))
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says before the message what was being done.
    pub(crate) fn within(mut self, what: &str) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// What kind of failure it was.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What to do about it, in a sentence, where there is something to say.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("hint", &self.0.hint)
            // Not the source: the server's report of an error quotes rows.
            .finish_non_exhaustive()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(reported) = error.as_db_error() else {
            // Without a report of the server it is the connection that failed, or a value that has another type.
            let kind = if error.is_closed() || error.source().is_some_and(<dyn StdError>::is::<std::io::Error>) {
                ErrorKind::Unavailable
            } else {
                ErrorKind::Database
            };
            let converted = Self::new(kind, error_chain(&error)).with_source(error);
            return match kind {
                ErrorKind::Unavailable => converted.with_hint("Is the server running, and does the URL name it?"),
                _ => converted,
            };
        };
        let kind = ErrorKind::of_code(reported.code());
        let hint = match kind {
            ErrorKind::SchemaMissing => Some("Install the schema of pgonce first: pgonce init.".to_owned()),
            _ if reported.code() == &SqlState::READ_ONLY_SQL_TRANSACTION => Some(
                "The server is read-only, a standby perhaps. Among several hosts, target_session_attrs=read-write finds \
                 the one that is not."
                    .to_owned(),
            ),
            ErrorKind::Denied if reported.hint().is_none() => {
                Some("The role lacks a right that it needs here: see Roles in the README.".to_owned())
            }
            _ => reported.hint().map(str::to_owned),
        };
        let mut converted = Self::new(kind, reported.message().to_owned()).with_source(error);
        converted.0.hint = hint;
        converted
    }
}

/// The message with those of its sources, for errors whose own message says little ("error connecting to server").
fn error_chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}
