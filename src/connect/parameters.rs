//! What a URL, or a string of keywords and values, says about a connection, read as libpq reads it.
//!
//! Errors name a parameter and never quote a value: it may be a part of the password.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::iter::Peekable;
use std::str::{Chars, FromStr};

use percent_encoding::percent_decode_str;

use crate::error::{Error, ErrorKind};

const EXAMPLES: &str = "It looks like postgresql://user@host:5432/database, or host=... user=... dbname=....";
/// Where a parameter comes from that the text leaves out. What names a server or a database is not among them: which
/// database is worked on stands in one place.
const ENVIRONMENT: [(&str, &str); 8] = [
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("application_name", "PGAPPNAME"),
];
/// Longest name of a parameter that an error repeats.
const NAME_BYTES_MAX: usize = 40;

/// Parameters by their names. An empty value is as good as none.
pub(super) struct Parameters(BTreeMap<String, String>);

impl Parameters {
    /// Reads a text, and adds what the environment says where the text says nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the text is neither a URL nor keywords and values.
    pub(super) fn read(text: &str, environment: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let url = text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"));
        let mut read = match (url, text.split_once("://")) {
            (Some(rest), _) => of_url(rest)?,
            (None, Some((scheme, _))) if is_scheme(scheme) => {
                return Err(unreadable(&format!("its scheme is {scheme}, not postgresql")));
            }
            (None, _) => of_keywords(text)?,
        };
        read.retain(|_, value| !value.is_empty());
        for (name, variable) in ENVIRONMENT {
            if let Some(value) = environment(variable).filter(|value| !value.is_empty() && !read.contains_key(name)) {
                read.insert(name.to_owned(), value);
            }
        }
        Ok(Self(read))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Removes a parameter.
    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// Removes a parameter that is a list, whose members may be empty.
    pub(super) fn take_list(&mut self, name: &str) -> Vec<String> {
        self.take(name).map(|list| list.split(',').map(|member| member.trim().to_owned()).collect()).unwrap_or_default()
    }

    /// Removes a parameter that is something else than a text.
    pub(super) fn take_parsed<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, Error> {
        self.take(name).map(|value| value.parse().map_err(|_| invalid_value(name))).transpose()
    }

    /// Gives a parameter another name.
    pub(super) fn rename(&mut self, name: &str, other: &str) {
        if let Some(value) = self.take(name) {
            self.0.insert(other.to_owned(), value);
        }
    }

    /// What is left, as a configuration. The driver knows the parameters and their values.
    pub(super) fn into_config(self) -> Result<tokio_postgres::Config, Error> {
        let quoted = |(name, value): (&String, &String)| {
            format!("{name}='{}' ", value.replace('\\', r"\\").replace('\'', r"\'"))
        };
        self.0.iter().map(quoted).collect::<String>().parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Error::new(ErrorKind::Invalid, format!("the database URL cannot be used: {cause}"))
                .with_hint("Parameters are those of libpq that the documentation of Database::connect lists.")
        })
    }
}

/// The error for a value that its parameter cannot have.
pub(super) fn invalid_value(name: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("the database URL has a value for {name} that it cannot have"))
}

fn unreadable(what: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("the database URL cannot be read: {what}")).with_hint(EXAMPLES)
}

/// Keeps a parameter, of which the last one counts.
fn insert(read: &mut BTreeMap<String, String>, name: &str, value: impl Into<String>) -> Result<(), Error> {
    let is_name = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_name) {
        return Err(unreadable("where a parameter should be named stands something else"));
    }
    let value = value.into();
    if value.contains('\0') {
        return Err(unreadable(&format!("the value of {name} has a zero byte")));
    }
    read.insert(name.to_owned(), value);
    Ok(())
}

/// Whether that may be the scheme of a URL, and not a part of a password.
fn is_scheme(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= NAME_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+')
}

/// The parameters of a URL, without its scheme.
fn of_url(rest: &str) -> Result<BTreeMap<String, String>, Error> {
    let mut read = BTreeMap::new();
    let mut rest = rest;
    if let Some(end) = rest.find(['@', '/']).filter(|&end| rest[end..].starts_with('@')) {
        let (user, password) = rest[..end].split_once(':').unwrap_or((&rest[..end], ""));
        insert(&mut read, "user", decoded(user, "user")?)?;
        insert(&mut read, "password", decoded(password, "password")?)?;
        rest = &rest[end + 1..];
    }
    let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
    if before.contains('@') {
        // libpq takes it for a part of a name. More likely the password goes on up to there, and no error must quote it.
        return Err(unreadable("there is an @ behind the user or the host").with_hint(
            "In a password, @ is written %40, : is %3A, / is %2F and # is %23, as is an @ in another name.",
        ));
    }
    let (authority, path) = before.split_once('/').unwrap_or((before, ""));
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for place in authority.split(',') {
        let (host, port) = host_and_port(place)?;
        hosts.push(decoded(host, "host")?);
        ports.push(decoded(port, "port")?);
    }
    insert(&mut read, "host", hosts.join(","))?;
    insert(&mut read, "port", ports.join(","))?;
    insert(&mut read, "dbname", decoded(path, "dbname")?)?;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let Some((name, value)) = parameter.split_once('=') else {
            return Err(unreadable("a parameter behind the question mark has no value"));
        };
        let name = decoded(name, "a name")?;
        insert(&mut read, &name, decoded(value, &name)?)?;
    }
    // A list of nothing but defaults, which `host` in the query may have more members than.
    if read.get("port").is_some_and(|ports| ports.bytes().all(|byte| byte == b',')) {
        read.remove("port");
    }
    Ok(read)
}

/// A host, which may be an IPv6 address in brackets, and a port, each of which may be empty.
fn host_and_port(place: &str) -> Result<(&str, &str), Error> {
    let Some(bracketed) = place.strip_prefix('[') else {
        return Ok(place.split_once(':').unwrap_or((place, "")));
    };
    let Some((host, port)) = bracketed.split_once(']') else {
        return Err(unreadable("the bracket around a host does not close"));
    };
    match port.strip_prefix(':') {
        Some(port) => Ok((host, port)),
        None if port.is_empty() => Ok((host, "")),
        None => Err(unreadable("what follows a host in brackets is no port")),
    }
}

fn decoded<'a>(text: &'a str, name: &str) -> Result<Cow<'a, str>, Error> {
    percent_decode_str(text).decode_utf8().map_err(|_| unreadable(&format!("the value of {name} is not UTF-8")))
}

/// The parameters of a string of keywords and values.
fn of_keywords(text: &str) -> Result<BTreeMap<String, String>, Error> {
    let mut read = BTreeMap::new();
    let mut rest = text.chars().peekable();
    loop {
        skip_blanks(&mut rest);
        let mut name = String::new();
        while let Some(next) = rest.next_if(|next| *next != '=' && !next.is_whitespace()) {
            name.push(next);
        }
        skip_blanks(&mut rest);
        match rest.next() {
            None if name.is_empty() => return Ok(read),
            Some('=') => insert(&mut read, &name, value(&mut rest)?)?,
            _ => return Err(unreadable("a parameter has no \"=\"")),
        }
    }
}

fn skip_blanks(rest: &mut Peekable<Chars<'_>>) {
    while rest.next_if(|next| next.is_whitespace()).is_some() {}
}

/// A value, in quotes or up to the next blank; a backslash takes the meaning from what follows it.
fn value(rest: &mut Peekable<Chars<'_>>) -> Result<String, Error> {
    skip_blanks(rest);
    let is_quoted = rest.next_if_eq(&'\'').is_some();
    let mut value = String::new();
    loop {
        match rest.next() {
            None if is_quoted => return Err(unreadable("a quote does not close")),
            None => return Ok(value),
            Some('\'') if is_quoted => return Ok(value),
            Some(blank) if !is_quoted && blank.is_whitespace() => return Ok(value),
            Some('\\') => value.extend(rest.next()),
            Some(next) => value.push(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Parameters;

    fn read(text: &str) -> Vec<(String, String)> {
        Parameters::read(text, |_| None).expect("it can be read").0.into_iter().collect()
    }

    fn assert_reads(text: &str, expected: &[(&str, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(read(text), expected, "{text}");
    }

    #[test]
    fn a_url_is_read_as_libpq_reads_it() {
        assert_reads("postgresql://", &[]);
        assert_reads("postgres://db/app", &[("dbname", "app"), ("host", "db")]);
        assert_reads(
            "postgresql://us%40er:p%2Fa%3Ass?@[::1]:6432/d%20b?sslmode=verify-full&application_name=a%26b",
            &[
                ("application_name", "a&b"),
                ("dbname", "d b"),
                ("host", "::1"),
                ("password", "p/a:ss?"),
                ("port", "6432"),
                ("sslmode", "verify-full"),
                ("user", "us@er"),
            ],
        );
        assert_reads("postgresql://user:@db", &[("host", "db"), ("user", "user")]);
        assert_reads("postgresql://a:1,b,[fe80::1]:3", &[("host", "a,b,fe80::1"), ("port", "1,,3")]);
        assert_reads("postgresql://%2Ftmp%2Fa/x", &[("dbname", "x"), ("host", "/tmp/a")]);
        assert_reads(
            "postgresql:///x?host=/tmp/a,b&port=1,2",
            &[("dbname", "x"), ("host", "/tmp/a,b"), ("port", "1,2")],
        );
        assert_reads("postgresql://a,b/?options=-c%20x%3Dy@z", &[("host", "a,b"), ("options", "-c x=y@z")]);
    }

    #[test]
    fn keywords_and_values_are_read_as_libpq_reads_them() {
        assert_reads("", &[]);
        assert_reads(" host = db  port=1 ", &[("host", "db"), ("port", "1")]);
        assert_reads(r"password='it\'s \\' user=a\ b", &[("password", r"it's \"), ("user", "a b")]);
        assert_reads("password='' user=a dbname=", &[("user", "a")]);
        assert_reads("dbname=a dbname=b", &[("dbname", "b")]);
    }

    #[test]
    fn the_environment_counts_where_the_text_says_nothing() {
        let environment = |name: &str| match name {
            "PGPASSWORD" => Some("from outside".to_owned()),
            "PGSSLMODE" => Some("verify-full".to_owned()),
            "PGSSLCERT" => Some(String::new()),
            "PGHOST" => Some("elsewhere".to_owned()),
            _ => None,
        };
        let mut read = Parameters::read("sslmode=disable password=''", environment).expect("it can be read");
        assert_eq!(read.take("password").as_deref(), Some("from outside"));
        assert_eq!(read.take("sslmode").as_deref(), Some("disable"));
        assert!(read.0.is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_refused_without_being_repeated() {
        for text in [
            "secret",
            "host=db secret",
            "host='secret",
            "=secret",
            "Secret=1",
            "postgresql://[secret",
            "postgresql://[::1]secret",
            "postgresql://u:secret%ff@db",
            "postgresql://u:secret%00@db",
            "postgresql://u:se@cret@db/app",
            "postgresql://u:12/secret@db/app",
            "postgresql://u:12@a,34@secret/app",
            "postgresql://db?secret",
            "postgresql://db?se%20cret=1",
        ] {
            let Err(error) = Parameters::read(text, |_| None) else { panic!("{text} can be read") };
            let said = format!("{error} {error:?}");
            assert!(!said.to_lowercase().contains("cret"), "{said}");
        }
    }

    #[test]
    fn another_scheme_and_a_password_that_is_not_encoded_are_said() {
        for (text, word) in [
            ("mysql://user:secret@db/app", "its scheme is mysql, not postgresql"),
            ("postgresql://u:se@cret@db/app", "there is an @"),
        ] {
            let Err(error) = Parameters::read(text, |_| None) else { panic!("{text} can be read") };
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_parameter_that_nobody_knows_is_named() {
        for text in ["host=db password=secret colour=red", "postgresql://u:secret@db?colour=red"] {
            let read = Parameters::read(text, |_| None).expect("it can be read");
            let error = read.into_config().expect_err("nobody knows it");
            let said = format!("{error} {error:?}");
            assert!(said.contains("colour") && !said.contains("secret"), "{said}");
        }
    }
}
