//! Specification files: sessions, their ordered steps, and the guards whose loss must be seen.
//!
//! ```text
//! # A comment.
//! partitions 2                      one where nothing is said
//! consumer later                    a step creates it; otherwise it is there from the start
//! never 40P01                       not even where the runner would put up with it
//! guard "name" in relay.sql replace "…" with "…"
//! setup { sql }
//! session producer
//!   step begin { begin }
//!   step send { select * from test.send(:topic, :step, 'a1', 'a') }
//!   step look may fail PO002 { … }
//! ```
//!
//! In quotes, `\n`, `\"` and `\\` mean what they mean in Rust. In SQL, `:topic`, `:consumer` and `:step` are literals,
//! `:apply_behind_gate` and `:apply` are `apply.sql` with and without a wait in front of `receive`.

use std::iter::Peekable;
use std::str::Chars;

/// What one file says.
#[derive(Debug, Default)]
pub(crate) struct Specification {
    pub(crate) name: String,
    pub(crate) partitions: i32,
    pub(crate) consumer_comes_later: bool,
    /// SQLSTATEs that no step may get.
    pub(crate) never: Vec<String>,
    pub(crate) guards: Vec<Guard>,
    pub(crate) setup: Option<String>,
    pub(crate) sessions: Vec<Session>,
}

/// A text of a routine without which the promises do not hold.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    pub(crate) name: String,
    /// Name of the file in `sql/routines`.
    pub(crate) file: String,
    pub(crate) text: String,
    pub(crate) replacement: String,
}

/// One connection and what it does, in this order.
#[derive(Debug, Default)]
pub(crate) struct Session {
    pub(crate) steps: Vec<Step>,
}

/// One statement.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) name: String,
    pub(crate) sql: String,
    pub(crate) may_fail: Vec<String>,
}

/// What a step does to its session's transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Begin { above_read_committed: bool },
    Commit,
    Rollback,
    Other,
}

impl Step {
    pub(crate) fn kind(&self) -> Kind {
        let text = self.sql.to_ascii_lowercase();
        if text.starts_with("begin") {
            let above_read_committed = text.contains("repeatable read") || text.contains("serializable");
            Kind::Begin { above_read_committed }
        } else if text.starts_with("commit") {
            Kind::Commit
        } else if text.starts_with("rollback") && !text.starts_with("rollback to") {
            Kind::Rollback
        } else {
            Kind::Other
        }
    }

    /// Whether it is a call of a verb that never waits for anybody.
    pub(crate) fn never_waits(&self) -> bool {
        !self.sql.contains(":apply_behind_gate") && (self.relays() || self.sql.contains("apply") || self.uses_a_lease())
    }

    fn uses_a_lease(&self) -> bool {
        ["test.acquire", "test.peek", "test.ack", "test.nack"].iter().any(|name| self.sql.contains(name))
    }

    /// Whether it calls the relay.
    pub(crate) fn relays(&self) -> bool {
        self.sql.contains("pgonce.relay(")
    }

    /// Whether the call of the relay looks at everything that is PENDING.
    pub(crate) fn relays_all(&self) -> bool {
        self.sql.contains("pgonce.relay(:topic)") || self.sql.contains("pgonce.relay()")
    }

    /// Whether it takes locks that a relay passes over.
    pub(crate) fn holds_from_relay(&self) -> bool {
        ["pgonce.relay(", "pgonce.outbox", "pgonce.partitions", "test.cancel", "test.remove"]
            .iter()
            .any(|name| self.sql.contains(name))
    }
}

impl Specification {
    /// Reads a file. Panics with the place where it is not understood.
    pub(crate) fn parse(name: &str, text: &str) -> Self {
        let mut specification = Self { name: name.to_owned(), partitions: 1, ..Self::default() };
        let mut reader = Reader { name, rest: text.chars().peekable(), line: 1 };
        while let Some(word) = reader.word() {
            match word.as_str() {
                "partitions" => specification.partitions = reader.needed("a number").parse().expect("a number"),
                "consumer" => {
                    reader.expect("later");
                    specification.consumer_comes_later = true;
                }
                "never" => specification.never.push(reader.needed("an SQLSTATE")),
                "guard" => specification.guards.push(reader.guard()),
                "setup" => specification.setup = Some(reader.block()),
                "session" => {
                    reader.needed("a name");
                    specification.sessions.push(Session::default());
                }
                "step" => {
                    let step = reader.step();
                    let session = specification.sessions.last_mut();
                    session.unwrap_or_else(|| reader.fail("a step without a session")).steps.push(step);
                }
                other => reader.fail(&format!("{other:?} is no setting")),
            }
        }
        specification.check();
        specification
    }

    fn check(&self) {
        let mut names: Vec<&str> =
            self.sessions.iter().flat_map(|session| &session.steps).map(|step| step.name.as_str()).collect();
        let steps = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), steps, "{}: each step has a name of its own", self.name);
        assert!((2..=3).contains(&self.sessions.len()), "{}: two or three sessions", self.name);
    }
}

struct Reader<'a> {
    name: &'a str,
    rest: Peekable<Chars<'a>>,
    line: usize,
}

impl Reader<'_> {
    fn fail(&self, why: &str) -> ! {
        panic!("{}.spec, line {}: {why}", self.name, self.line)
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += usize::from(next == Some('\n'));
        next
    }

    fn skip_blanks(&mut self) {
        while let Some(&next) = self.rest.peek() {
            if next == '#' {
                while self.next().is_some_and(|passed| passed != '\n') {}
            } else if next.is_whitespace() {
                self.next();
            } else {
                return;
            }
        }
    }

    fn word(&mut self) -> Option<String> {
        self.skip_blanks();
        let mut word = String::new();
        while let Some(&next) = self.rest.peek() {
            if next.is_whitespace() || next == '{' {
                break;
            }
            word.push(next);
            self.next();
        }
        (!word.is_empty()).then_some(word)
    }

    fn needed(&mut self, what: &str) -> String {
        self.word().unwrap_or_else(|| self.fail(&format!("expected {what}")))
    }

    fn expect(&mut self, word: &str) {
        let found = self.needed(word);
        if found != word {
            self.fail(&format!("expected {word:?}, found {found:?}"));
        }
    }

    fn quoted(&mut self) -> String {
        self.skip_blanks();
        if self.next() != Some('"') {
            self.fail("expected a text in quotes");
        }
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return text,
                Some('\\') => match self.next() {
                    Some('n') => text.push('\n'),
                    Some(escaped @ ('"' | '\\')) => text.push(escaped),
                    _ => self.fail("an unknown escape"),
                },
                Some(plain) => text.push(plain),
                None => self.fail("a text without its end"),
            }
        }
    }

    /// SQL in braces, which may hold braces in pairs.
    fn block(&mut self) -> String {
        self.skip_blanks();
        if self.next() != Some('{') {
            self.fail("expected SQL in braces");
        }
        let mut text = String::new();
        let mut depth = 1;
        loop {
            let next = self.next().unwrap_or_else(|| self.fail("a brace without its end"));
            match next {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return text.trim().to_owned();
            }
            text.push(next);
        }
    }

    fn guard(&mut self) -> Guard {
        let name = self.quoted();
        self.expect("in");
        let file = self.needed("a file");
        self.expect("replace");
        let text = self.quoted();
        self.expect("with");
        Guard { name, file, text, replacement: self.quoted() }
    }

    fn step(&mut self) -> Step {
        let name = self.needed("a name");
        let mut may_fail = Vec::new();
        while let Some(word) = self.word() {
            if word != "may" {
                self.fail("expected \"may fail\" or SQL in braces");
            }
            self.expect("fail");
            may_fail.push(self.needed("an SQLSTATE"));
        }
        Step { name, sql: self.block(), may_fail }
    }
}

#[test]
fn a_specification_is_read_as_it_is_written() {
    let text = r#"
        # comment
        guard "g" in relay.sql replace "a\nb" with "\"c\""
        setup { select '{}' }
        session one
          step begin { begin isolation level repeatable read }
          step look may fail PO002 { select * from pgonce.relay(:topic) }
        session two
          step end { commit }
    "#;
    let read = Specification::parse("sample", text);
    assert_eq!((read.guards[0].text.as_str(), read.guards[0].replacement.as_str()), ("a\nb", "\"c\""));
    assert_eq!(read.setup.as_deref(), Some("select '{}'"));
    let steps: Vec<&Step> = read.sessions.iter().flat_map(|session| &session.steps).collect();
    assert_eq!(steps[0].kind(), Kind::Begin { above_read_committed: true });
    assert_eq!((steps[1].may_fail[0].as_str(), steps[1].relays_all()), ("PO002", true));
    assert_eq!(steps[2].kind(), Kind::Commit);
}
