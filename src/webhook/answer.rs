//! Answers: what a status and `Retry-After` mean for a message.

use std::time::{Duration, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, StatusCode};

use crate::consume::{Failure, HandlerError};

/// Longest wait that an endpoint can ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(86_400);

/// Whether a message has been delivered; and if not, when to try again. Of what the endpoint said only the status is told.
pub(super) fn judge(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Result<(), HandlerError> {
    if status.is_success() {
        return Ok(());
    }
    let text = if status.is_redirection() {
        format!("the endpoint answered {status}, and redirects are not followed: the url has to be the final one")
    } else {
        format!("the endpoint answered {status}")
    };
    let is_of_the_moment =
        [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    if status.is_client_error() && !is_of_the_moment {
        return Err(Failure::permanent(text).into());
    }
    let asked =
        headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(|value| retry_after(value, now));
    Err(match asked {
        Some(wait) => Failure::retry_after(wait, text).into(),
        None => text.into(),
    })
}

/// How long `Retry-After` asks to wait, in seconds or as a date (RFC 9110, section 10.2.3). One that is not to come says as much
/// as none: the consumer's backoff counts then, without which all attempts would be gone in a moment.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let asked = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // What is too long for a number is too long a wait.
        Duration::from_secs(value.parse().unwrap_or(u64::MAX))
    } else {
        httpdate::parse_http_date(value).ok()?.duration_since(now).ok()?
    };
    (!asked.is_zero()).then_some(asked.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(784_111_777);

    fn wait(value: &str) -> Option<u64> {
        let now = SystemTime::UNIX_EPOCH + NOW;
        retry_after(value, now).map(|wait| wait.as_secs())
    }

    #[test]
    fn a_wait_is_read_in_seconds_or_as_a_date_and_lasts_a_day_at_the_most() {
        for (value, expected) in [
            ("1", Some(1)),
            (" 120 ", Some(120)),
            ("86401", Some(86_400)),
            ("99999999999999999999999", Some(86_400)),
            ("Sun, 06 Nov 1994 08:49:38 GMT", Some(1)),
            ("Sunday, 06-Nov-94 08:50:37 GMT", Some(60)),
            ("Sun Nov  6 08:49:38 1994", Some(1)),
            ("Sun, 06 Nov 2044 08:49:38 GMT", Some(86_400)),
        ] {
            assert_eq!(wait(value), expected, "{value}");
        }
        for value in ["0", "", "-1", "1.5", "soon", "Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:36 GMT"] {
            assert_eq!(wait(value), None, "{value}");
        }
    }
}
