//! What travels: messages on their way in, received messages on their way out, and the names of their places.
//!
//! Nothing here talks to a server. A payload is kept as JSON text from the first moment: PostgreSQL parses it once, and
//! no intermediate tree is built.

use std::fmt;
use std::time::SystemTime;

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::error::{Error, ErrorKind};

/// Names a message for good: a second message with this id in a topic is a duplicate. 1 to 255 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(String);

impl MessageId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for MessageId {
    fn from(id: String) -> Self {
        Self(id)
    }
}

impl From<&str> for MessageId {
    fn from(id: &str) -> Self {
        Self(id.to_owned())
    }
}

/// Number of a partition of a topic, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition(pub i32);

/// Place of a message in its partition, from 1, without gaps. Never deduplicate on it: the [`MessageId`] is what stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Offset(pub i64);

/// A message for a topic.
///
/// It has its id from the moment it is made, so sending the same value again, after a lost answer for example, is
/// recognised as a duplicate.
///
/// ```
/// use pgonce::Message;
///
/// let message = Message::json(&serde_json::json!({ "order": 17 }))?.key("customer-3").id("order-17-placed");
/// assert_eq!(message.message_id().as_str(), "order-17-placed");
/// # Ok::<(), pgonce::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Message {
    pub(crate) id: MessageId,
    pub(crate) key: Option<String>,
    pub(crate) payload: String,
    pub(crate) headers: Map<String, Value>,
    pub(crate) deliver_at: Option<SystemTime>,
}

impl Message {
    /// A message whose payload is the JSON form of a value.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Payload`] if the value has no JSON form, or a string in it holds U+0000.
    pub fn json<T: Serialize + ?Sized>(payload: &T) -> Result<Self, Error> {
        let text = serde_json::to_string(payload).map_err(|error| {
            Error::new(ErrorKind::Payload, format!("payload has no JSON form: {error}")).with_source(error)
        })?;
        Self::from_json_text(text)
    }

    /// A message whose payload is JSON text.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Payload`] if it is not JSON, or holds `\u0000`.
    pub fn raw(payload: impl Into<String>) -> Result<Self, Error> {
        let parsed = RawValue::from_string(payload.into()).map_err(|error| {
            Error::new(ErrorKind::Payload, format!("payload is not JSON: {error}")).with_source(error)
        })?;
        Self::from_json_text(parsed.get().to_owned())
    }

    fn from_json_text(payload: String) -> Result<Self, Error> {
        if has_nul_escape(&payload) {
            return Err(Error::new(ErrorKind::Payload, "payload holds \\u0000")
                .with_hint("PostgreSQL cannot store the character U+0000 in text; remove it, or encode the content."));
        }
        Ok(Self {
            id: MessageId(Uuid::now_v7().to_string()),
            key: None,
            payload,
            headers: Map::new(),
            deliver_at: None,
        })
    }

    /// Gives it a key: messages of one key stay in order. 1 to 255 bytes.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Gives it an id of yours instead of a fresh UUIDv7. 1 to 255 bytes.
    #[must_use]
    pub fn id(mut self, id: impl Into<MessageId>) -> Self {
        self.id = id.into();
        self
    }

    /// Adds a header. All headers together may have 16 KiB.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Delays it: it takes its place behind its key's messages when this time has come, by the database's clock.
    #[must_use]
    pub fn deliver_at(mut self, time: SystemTime) -> Self {
        self.deliver_at = Some(time);
        self
    }

    /// Its id.
    #[must_use]
    pub fn message_id(&self) -> &MessageId {
        &self.id
    }

    /// The headers as JSON text, or nothing where there are none.
    pub(crate) fn headers_text(&self) -> Result<Option<String>, Error> {
        if self.headers.is_empty() {
            return Ok(None);
        }
        let text = Value::Object(self.headers.clone()).to_string();
        if has_nul_escape(&text) {
            return Err(Error::new(ErrorKind::Payload, "headers hold \\u0000")
                .with_hint("PostgreSQL cannot store the character U+0000 in text; remove it."));
        }
        Ok(Some(text))
    }

    /// Refuses U+0000 in id and key before it reaches the server, whose own error would not say where it was.
    pub(crate) fn check_names(&self) -> Result<(), Error> {
        let names = [("message id", Some(self.id.as_str())), ("key", self.key.as_deref())];
        for (what, name) in names {
            if name.is_some_and(|name| name.contains('\0')) {
                return Err(Error::new(ErrorKind::Payload, format!("{what} holds the character U+0000"))
                    .with_hint("PostgreSQL cannot store the character U+0000 in text; remove it."));
            }
        }
        Ok(())
    }
}

/// What became of a message that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Its id.
    pub message_id: MessageId,
    /// The topic had a message with this id already, and this one was refused.
    pub was_duplicate: bool,
}

/// A message as a consumer receives it.
#[derive(Clone, Debug)]
pub struct Received<T> {
    /// The partition in which it stands.
    pub partition: Partition,
    /// Its place there.
    pub offset: Offset,
    /// Its id: what a receiver outside of this database deduplicates on.
    pub message_id: MessageId,
    /// Its key.
    pub key: Option<String>,
    /// What it says.
    pub payload: T,
    /// Its headers.
    pub headers: Map<String, Value>,
    /// When it was enqueued, by the database's clock. Orders nothing.
    pub enqueued_at: SystemTime,
    /// How often it has been tried, this time included. Attempts that no message was to blame for do not count.
    pub attempt: u32,
}

/// Whether JSON text holds the escape `\u0000`: an odd number of backslashes before `u0000`.
fn has_nul_escape(json: &str) -> bool {
    let bytes = json.as_bytes();
    json.match_indices("u0000")
        .any(|(at, _)| bytes[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_nul_escape_is_refused_and_an_escaped_backslash_is_not() {
        for text in [r#""\u0000""#, r#"{"a":"x\\\u0000"}"#, r#"{"\u0000":1}"#] {
            assert_eq!(Message::raw(text).expect_err("refused").kind(), ErrorKind::Payload, "{text}");
        }
        for text in [r#""\\u0000""#, r#""u0000""#, r#""\u00001""#.replace("0000", "0001").as_str()] {
            Message::raw(text).expect("accepted");
        }
    }

    proptest! {
        #[test]
        fn a_string_is_refused_if_and_only_if_it_holds_nul(text in "[\\\\u0\u{0}\"a-c]{0,40}") {
            prop_assert_eq!(Message::json(&text).is_err(), text.contains('\0'));
        }
    }
}
