//! What a node reads and answers: a line of JSON each, as Maelstrom's nodes speak.
//!
//! Pure: no database, no I/O. JSON that is only passed on (an echo, a message) stays the text that it is, so its keys keep
//! their order and its numbers their digits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{Error, ErrorKind, Message};

/// Longest line that is read.
pub(super) const LINE_BYTES_MAX: usize = 16 << 20;
/// Deepest nesting of a line.
const DEPTH_MAX: usize = 128;
/// Longest id of an event, a message or a checkpoint.
const ID_BYTES_MAX: usize = 255;
/// Longest word: the index of `word_counts` takes no much longer one.
const WORD_BYTES_MAX: usize = 2_048;
/// Most messages of a poll.
const POLL_MAX: i32 = 1_000;

/// Longest text of an error.
const REFUSAL_CHARS_MAX: usize = 500;

/// Maelstrom's numbers of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Code {
    Timeout = 0,
    NotSupported = 10,
    TemporarilyUnavailable = 11,
    MalformedRequest = 12,
    Crash = 13,
    Abort = 14,
    KeyDoesNotExist = 20,
}

/// An answer that says what is wrong.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) code: Code,
    text: String,
}

/// A line that was read.
#[derive(Debug, Default)]
pub(super) struct Line {
    src: Option<String>,
    dest: Option<String>,
    msg_id: Option<i64>,
}

/// What a line asks for.
#[derive(Debug)]
pub(super) enum Request {
    Init { node_id: String },
    Echo(Box<RawValue>),
    Stored(Stored),
}

/// What a line asks of the database.
#[derive(Debug)]
pub(super) enum Stored {
    Process { event_id: String, word: String },
    Checkpoint(String),
    Restore(String),
    Commit,
    Rollback,
    Outputs,
    Send { id: String, message: Message, then: Then },
    Poll { max: i32 },
    Deliver(String),
}

/// What a sender wants to hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Whether it was a duplicate.
    Sent,
    /// That it is stored.
    Ack,
    /// Nothing: the acknowledgement is lost.
    AckLost,
}

/// The body of an answer, after its type and `in_reply_to`.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Answer {
    InitOk {},
    EchoOk { echo: Box<RawValue> },
    Processed { word: String, count: i64, was_duplicate: bool },
    CheckpointSaved { checkpoint_id: String },
    Restored { counts: BTreeMap<String, i64> },
    Committed { output_count: u64 },
    RolledBack { output_count: u64 },
    OutputsOk { outputs: Vec<Output> },
    Sent { message_id: String },
    DuplicateDetected { message_id: String, action: &'static str },
    Ack { message_id: String },
    AckLost { message_id: String, action: &'static str },
    Polled { messages: Vec<Box<RawValue>>, offset: i64 },
    Delivered { message_id: String, was_duplicate: bool },
    Error { code: u8, text: String },
}

/// What an event has put out.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Output {
    pub(super) event_id: String,
    pub(super) word: String,
    pub(super) count: i64,
}

/// The side of a conversation that answers: after `init` in envelopes.
#[derive(Debug)]
pub(super) struct Conversation {
    /// Whether the answers to envelopes are envelopes before that too.
    begins_in_envelopes: bool,
    node_id: Option<String>,
    next_msg_id: u64,
}

impl Refusal {
    /// The text may quote the line, and is cut.
    pub(super) fn new(code: Code, text: impl Into<String>) -> Self {
        let mut text: String = text.into();
        if let Some((end, _)) = text.char_indices().nth(REFUSAL_CHARS_MAX) {
            text.truncate(end);
        }
        Self { code, text }
    }

    fn malformed(text: impl Into<String>) -> Self {
        Self::new(Code::MalformedRequest, text)
    }

    /// Whether it is the request's own fault: others beside it may fare better.
    pub(super) fn is_of_request(&self) -> bool {
        matches!(self.code, Code::MalformedRequest)
    }

    /// What the database said.
    pub(super) fn of(error: &Error) -> Self {
        let code = match error.kind() {
            ErrorKind::Invalid | ErrorKind::TooLarge | ErrorKind::Payload => Code::MalformedRequest,
            ErrorKind::UnknownCheckpoint => Code::KeyDoesNotExist,
            ErrorKind::Contention => Code::Abort,
            ErrorKind::Unavailable => Code::TemporarilyUnavailable,
            _ => Code::Crash,
        };
        Self::new(code, error.hint().map_or_else(|| error.to_string(), |hint| format!("{error}. {hint}")))
    }
}

impl Answer {
    fn kind(&self) -> &'static str {
        match self {
            Self::InitOk {} => "init_ok",
            Self::EchoOk { .. } => "echo_ok",
            Self::Processed { .. } => "processed",
            Self::CheckpointSaved { .. } => "checkpoint_saved",
            Self::Restored { .. } => "restored",
            Self::Committed { .. } => "committed",
            Self::RolledBack { .. } => "rolled_back",
            Self::OutputsOk { .. } => "outputs_ok",
            Self::Sent { .. } => "sent",
            Self::DuplicateDetected { .. } => "duplicate_detected",
            Self::Ack { .. } => "ack",
            Self::AckLost { .. } => "ack_lost",
            Self::Polled { .. } => "polled",
            Self::Delivered { .. } => "delivered",
            Self::Error { .. } => "error",
        }
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        Self::Error { code: refusal.code as u8, text: refusal.text }
    }
}

impl Conversation {
    pub(super) fn new(begins_in_envelopes: bool) -> Self {
        Self { begins_in_envelopes, node_id: None, next_msg_id: 0 }
    }

    /// Writes the answers to some lines, a line each. Those of the database are given, in their order.
    pub(super) fn write_all(
        &mut self,
        requests: &[(Line, Result<Request, Refusal>)],
        stored: Vec<Answer>,
    ) -> serde_json::Result<String> {
        let mut text = String::new();
        let mut stored = stored.into_iter();
        for (line, request) in requests {
            let answer = match request {
                Ok(Request::Init { node_id }) => {
                    self.node_id = Some(node_id.clone());
                    Answer::InitOk {}
                }
                Ok(Request::Echo(echo)) => Answer::EchoOk { echo: echo.clone() },
                Ok(Request::Stored(_)) => stored.next().expect("the database has answered each request"),
                Err(refusal) => refusal.clone().into(),
            };
            self.write(line, &answer, &mut text)?;
        }
        Ok(text)
    }

    /// Writes the answer to a line, with its end.
    fn write(&mut self, line: &Line, answer: &Answer, output: &mut String) -> serde_json::Result<()> {
        #[derive(Serialize)]
        struct Body<'a> {
            r#type: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            in_reply_to: Option<i64>,
            #[serde(flatten)]
            answer: &'a Answer,
            #[serde(skip_serializing_if = "Option::is_none")]
            msg_id: Option<u64>,
        }
        #[derive(Serialize)]
        struct Envelope<'a> {
            src: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            dest: Option<&'a str>,
            body: Body<'a>,
        }
        let mut body = Body { r#type: answer.kind(), in_reply_to: line.msg_id, answer, msg_id: None };
        let src = match (&self.node_id, line) {
            (Some(node_id), _) => Some(line.dest.as_ref().unwrap_or(node_id)),
            (None, Line { src: Some(_), dest, .. }) if self.begins_in_envelopes => dest.as_ref(),
            (None, _) => None,
        };
        if let Some(src) = src {
            body.msg_id = Some(self.next_msg_id);
            self.next_msg_id += 1;
            let text = serde_json::to_string(&Envelope { src, dest: line.src.as_deref(), body })?;
            space(&text, false, output);
        } else {
            space(&serde_json::to_string(&body)?, true, output);
        }
        output.push('\n');
        Ok(())
    }
}

/// Reads a line: whom to answer, and what it asks for or what is wrong with it.
pub(super) fn read(bytes: &[u8]) -> (Line, Result<Request, Refusal>) {
    let mut line = Line::default();
    let request = std::str::from_utf8(bytes)
        .map_err(|error| Refusal::malformed(format!("the line is not UTF-8 at byte {}", error.valid_up_to())))
        .and_then(|text| request(text, &mut line));
    (line, request)
}

/// The refusal of a line that was not kept.
pub(super) fn too_long() -> Refusal {
    Refusal::malformed(format!("the line is longer than {LINE_BYTES_MAX} bytes: send less in one"))
}

fn request(text: &str, line: &mut Line) -> Result<Request, Refusal> {
    #[derive(Deserialize)]
    struct Outer<'a> {
        #[serde(borrow)]
        src: Option<&'a RawValue>,
        #[serde(borrow)]
        dest: Option<&'a RawValue>,
        #[serde(borrow)]
        body: Option<&'a RawValue>,
        #[serde(borrow)]
        r#type: Option<&'a RawValue>,
    }
    if text.trim().is_empty() {
        return Err(Refusal::malformed("the line is empty"));
    }
    if depth(text) > DEPTH_MAX {
        return Err(Refusal::malformed(format!("the line is nested deeper than {DEPTH_MAX}")));
    }
    let outer: Outer = object("the line", text)?;
    match outer {
        Outer { r#type: Some(_), .. } => request_of(text, line),
        Outer { src, dest, body: Some(body), .. } => {
            let request = request_of(body.get(), line);
            line.src = src.map(|src| value("src", src)).transpose()?;
            line.dest = dest.map(|dest| value("dest", dest)).transpose()?;
            request
        }
        _ => Err(Refusal::malformed("the line has neither a body nor a type")),
    }
}

fn request_of(body: &str, line: &mut Line) -> Result<Request, Refusal> {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(borrow)]
        r#type: Option<&'a RawValue>,
        #[serde(borrow)]
        msg_id: Option<&'a RawValue>,
    }
    let head: Head = object("the body", body)?;
    line.msg_id = head.msg_id.map(|msg_id| value("msg_id", msg_id)).transpose()?;
    let kind: String = value("type", head.r#type.ok_or_else(|| Refusal::malformed("the body has no type"))?)?;
    match kind.as_str() {
        "init" => {
            #[derive(Deserialize)]
            struct Init {
                node_id: String,
            }
            let Init { node_id } = object(&kind, body)?;
            Ok(Request::Init { node_id })
        }
        "echo" => {
            #[derive(Deserialize)]
            struct Echo {
                echo: Box<RawValue>,
            }
            let Echo { echo } = object(&kind, body)?;
            Ok(Request::Echo(echo))
        }
        _ => stored(&kind, body).map(Request::Stored),
    }
}

fn stored(kind: &str, body: &str) -> Result<Stored, Refusal> {
    #[derive(Deserialize)]
    struct Process {
        event_id: String,
        word: String,
    }
    #[derive(Deserialize)]
    struct Checkpoint {
        checkpoint_id: String,
    }
    #[derive(Deserialize)]
    struct Send<'a> {
        #[serde(borrow)]
        message: &'a RawValue,
        #[serde(default)]
        ack_lost: bool,
    }
    #[derive(Deserialize)]
    struct Poll {
        max: Option<i64>,
    }
    let checkpoint = || -> Result<String, Refusal> {
        let Checkpoint { checkpoint_id } = object(kind, body)?;
        check("checkpoint_id", &checkpoint_id, 1, ID_BYTES_MAX)?;
        Ok(checkpoint_id)
    };
    Ok(match kind {
        "process" => {
            let Process { event_id, word } = object(kind, body)?;
            check("event_id", &event_id, 1, ID_BYTES_MAX)?;
            check("word", &word, 0, WORD_BYTES_MAX)?;
            Stored::Process { event_id, word }
        }
        "checkpoint" => Stored::Checkpoint(checkpoint()?),
        "restore" => Stored::Restore(checkpoint()?),
        "commit" => Stored::Commit,
        "rollback" => Stored::Rollback,
        "outputs" => Stored::Outputs,
        "send" | "send_with_ack" => {
            let Send { message, ack_lost } = object(kind, body)?;
            let then = match (kind, ack_lost) {
                ("send", _) => Then::Sent,
                (_, false) => Then::Ack,
                (_, true) => Then::AckLost,
            };
            let id = message_id(message)?;
            let message = Message::raw(message.get()).map_err(|error| Refusal::of(&error))?.id(id.as_str());
            Stored::Send { id, message, then }
        }
        "poll" => {
            let Poll { max } = object(kind, body)?;
            let max = max.unwrap_or(100);
            let most = i32::try_from(max).ok().filter(|max| (1..=POLL_MAX).contains(max));
            let most = most.ok_or_else(|| Refusal::malformed(format!("max of {max}: it is 1 to {POLL_MAX}")))?;
            Stored::Poll { max: most }
        }
        "deliver" => {
            let Send { message, .. } = object(kind, body)?;
            Stored::Deliver(message_id(message)?)
        }
        _ => {
            let kind: String = kind.chars().take(50).collect();
            return Err(Refusal::new(Code::NotSupported, format!("type {kind:?} is not supported")));
        }
    })
}

fn message_id(message: &RawValue) -> Result<String, Refusal> {
    #[derive(Deserialize)]
    struct Identified {
        id: String,
    }
    let Identified { id } = object("the message", message.get())?;
    check("the message's id", &id, 1, ID_BYTES_MAX)?;
    Ok(id)
}

/// An object and nothing else: serde would take an array for a struct as well.
fn object<'a, T: Deserialize<'a>>(what: &str, text: &'a str) -> Result<T, Refusal> {
    if !text.trim_start().starts_with('{') {
        return Err(Refusal::malformed(format!("{what} is not a JSON object")));
    }
    serde_json::from_str(text).map_err(|error| Refusal::malformed(format!("{what}: {error}")))
}

fn value<'a, T: Deserialize<'a>>(what: &str, raw: &'a RawValue) -> Result<T, Refusal> {
    serde_json::from_str(raw.get()).map_err(|error| Refusal::malformed(format!("{what}: {error}")))
}

fn check(what: &str, text: &str, bytes_min: usize, bytes_max: usize) -> Result<(), Refusal> {
    if text.contains('\0') {
        return Err(Refusal::malformed(format!("{what} holds \\u0000, which PostgreSQL cannot store")));
    }
    if (bytes_min..=bytes_max).contains(&text.len()) {
        return Ok(());
    }
    Err(Refusal::malformed(format!("{what} of {} bytes: it has {bytes_min} to {bytes_max}", text.len())))
}

/// How deep a JSON text is nested, without recursion.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    for part in parts(text) {
        if let Part::Sign(sign) = part {
            match sign {
                '[' | '{' => depth += 1,
                ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            deepest = deepest.max(depth);
        }
    }
    deepest
}

/// Writes a JSON text without white space, or with a space behind each comma and colon.
fn space(text: &str, is_wide: bool, output: &mut String) {
    for part in parts(text) {
        match part {
            Part::Text(text) => output.push_str(text),
            Part::Sign(sign) if sign.is_ascii_whitespace() => {}
            Part::Sign(sign) => {
                output.push(sign);
                if is_wide && matches!(sign, ',' | ':') {
                    output.push(' ');
                }
            }
        }
    }
}

/// A string with its quotes or a literal; or one character of punctuation or white space.
enum Part<'a> {
    Text(&'a str),
    Sign(char),
}

fn parts(text: &str) -> impl Iterator<Item = Part<'_>> {
    const SIGNS: [char; 10] = ['[', ']', '{', '}', ',', ':', ' ', '\n', '\r', '\t'];
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let length = if first == '"' {
            string_length(rest)
        } else if SIGNS.contains(&first) {
            1
        } else {
            rest.find(|next| next == '"' || SIGNS.contains(&next)).unwrap_or(rest.len())
        };
        let part = &rest[..length];
        rest = &rest[length..];
        Some(if SIGNS.contains(&first) { Part::Sign(first) } else { Part::Text(part) })
    })
}

/// How long the string is with which a text begins.
fn string_length(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let ends = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        ends
    });
    end.map_or(text.len(), |end| end + 2)
}
