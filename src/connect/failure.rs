//! Why there is no connection: what was said, by whom, and what to do about it.
//!
//! Where the driver has no code for what happened, its words are looked at; tests hold them.

use std::error::Error as StdError;

use deadpool_postgres::{PoolError, TimeoutType};
use tokio_postgres::Error as DriverError;
use tokio_postgres::error::{DbError, SqlState};

use super::{Target, tls};
use crate::error::{Error, ErrorKind};

/// What PostgreSQL calls the place where it looks up the role of a new session. A refusal by `pg_hba.conf` has the same code,
/// and the words of both are translated.
const ROLE_LOOKUP: &str = "InitializeSessionUserId";
/// How the driver says that a conversation has begun and did not get far.
const BROKEN_OFF: [&str; 4] = [
    "connection closed",
    "error communicating with the server",
    "error parsing response from server",
    "unexpected message from server",
];
/// What helps where the password is missing or wrong.
const PASSWORD: &str =
    "Give the right password in PGPASSWORD, in ~/.pgpass, or in a file that holds the URL (--database-url-file).";

/// Why the pool has no connection to a target, where that is known, and what to do about it.
pub(crate) fn failed(error: PoolError, target: Option<&Target>) -> Error {
    let error = match error {
        PoolError::Backend(error) => {
            let hint = hint(&error);
            let converted = Error::from(error);
            match hint {
                Some(hint) => converted.with_hint(hint),
                None => converted,
            }
        }
        PoolError::Timeout(TimeoutType::Create) => Error::new(ErrorKind::Unavailable, "no server answered in time")
            .with_hint("Is the server running, and does the URL name it? connect_timeout is the time for each host."),
        PoolError::Timeout(TimeoutType::Wait) => {
            return Error::new(
                ErrorKind::Unavailable,
                "all connections of the pool are in use, and none came back in time",
            );
        }
        other => return Error::new(ErrorKind::Unavailable, format!("no connection from the pool: {other}")),
    };
    match target {
        Some(target) => error.within(&format!("cannot connect to {target}")),
        None => error,
    }
}

fn hint(error: &DriverError) -> Option<&'static str> {
    if let Some(failure) = tls::failure(error) {
        return Some(tls::hint(failure));
    }
    error.as_db_error().map_or_else(|| hint_without_report(error), hint_to_report)
}

/// What helps where the server says why.
fn hint_to_report(report: &DbError) -> Option<&'static str> {
    match *report.code() {
        SqlState::INVALID_PASSWORD => Some(PASSWORD),
        SqlState::INVALID_CATALOG_NAME => {
            Some("Correct the name of the database in the URL, or create it with createdb.")
        }
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION if report.routine() == Some(ROLE_LOOKUP) => {
            Some("Correct the name of the user in the URL, or create the role, with the right to log in.")
        }
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION => Some(
            "The server's pg_hba.conf does not let this user in from here in this way. Where it asks for TLS, \
             sslmode=require uses it; where it asks for a certificate, sslcert and sslkey name it.",
        ),
        _ => None,
    }
}

/// What helps where the network says why, or nobody.
fn hint_without_report(error: &DriverError) -> Option<&'static str> {
    let said = error.source().map(ToString::to_string).unwrap_or_default();
    if said == "password missing" {
        return Some(PASSWORD);
    } else if said == "server does not support TLS" {
        return Some("Turn on ssl in the server, or take sslmode=prefer, which goes without TLS where there is none.");
    } else if said.starts_with("failed to lookup address information") {
        return Some(
            "Is the host spelled right? In a password of a URL, @ is written %40, : is %3A, / is %2F and # is %23.",
        );
    }
    BROKEN_OFF
        .contains(&&*error.to_string())
        .then_some("Something answers there, but it may not be PostgreSQL: does the URL name the server's port?")
}
