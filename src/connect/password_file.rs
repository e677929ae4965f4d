//! The password file of libpq: lines of `host:port:database:user:password`, of which the first that fits counts.

use std::fs::{File, Metadata};
use std::io::{ErrorKind as IoErrorKind, Read};
use std::path::Path;

use crate::error::{Error, ErrorKind};

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Whom a password is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Login<'a> {
    /// The name or the address as it stands in the URL; `localhost` for the usual Unix socket.
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// Reads a password file. One that is not there says nothing, and neither does one that others than its owner may read,
/// or that is no plain file; these two are warned of.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if the file cannot be read, is larger than 1 MiB, or is not UTF-8.
pub(super) fn read(path: &Path) -> Result<String, Error> {
    let failed = |why: String| {
        Error::new(ErrorKind::Invalid, format!("the password file {} cannot be used: {why}", path.display()))
            .with_hint("It has lines of host:port:database:user:password. The parameter passfile names another one.")
    };
    // Opening what is no plain file could wait for ever.
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            tracing::warn!(file = %path.display(), "the password file is no plain file and is not read");
            return Ok(String::new());
        }
        Ok(metadata) if others_may_read(&metadata) => {
            tracing::warn!(
                file = %path.display(),
                "others may read the password file, so it is not used; chmod 0600 makes it private"
            );
            return Ok(String::new());
        }
        Ok(_) => {}
        Err(error) if matches!(error.kind(), IoErrorKind::NotFound | IoErrorKind::NotADirectory) => {
            return Ok(String::new());
        }
        Err(error) => return Err(failed(error.to_string())),
    }
    let mut text = String::new();
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let length = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    if length as u64 > FILE_BYTES_MAX {
        return Err(failed("it is larger than 1 MiB".to_owned()));
    }
    Ok(text)
}

#[cfg(unix)]
fn others_may_read(metadata: &Metadata) -> bool {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o077 != 0
}

/// Elsewhere the directory of a user is private.
#[cfg(not(unix))]
fn others_may_read(_: &Metadata) -> bool {
    false
}

/// The password of the first line that fits.
pub(super) fn find(text: &str, login: Login<'_>) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line;
        let port = login.port.to_string();
        for wanted in [login.host, &port, login.database, login.user] {
            let (field, behind) = field(rest)?;
            if field != wanted && !rest.starts_with("*:") {
                return None;
            }
            rest = behind;
        }
        Some(unescaped(rest))
    })
}

/// The field up to the next colon, and what is behind it.
fn field(line: &str) -> Option<(String, &str)> {
    let mut is_escaped = false;
    let end = line.find(|next| {
        let is_end = next == ':' && !is_escaped;
        is_escaped = next == '\\' && !is_escaped;
        is_end
    })?;
    Some((unescaped(&line[..end]), &line[end + 1..]))
}

/// Takes away the backslashes, each of which keeps what follows it from meaning anything.
fn unescaped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        plain.push(if next == '\\' { rest.next().unwrap_or(next) } else { next });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::{Login, find, read};

    const DB: Login<'_> = Login { host: "db", port: 5432, database: "app", user: "me" };

    #[test]
    fn the_first_line_that_fits_counts() {
        let text = "# db:5432:app:me:comment\n\ndb:5433:app:me:port\ndb:5432:app:you:user\nbroken\n\
                    *:*:app:me:first\r\n*:*:*:*:second\n";
        assert_eq!(find(text, DB).as_deref(), Some("first"));
        assert_eq!(find(text, Login { user: "her", ..DB }).as_deref(), Some("second"));
        assert_eq!(find("db:5432:app:me:", DB).as_deref(), Some(""));
        assert_eq!(find("db:5432:app:other:x", DB), None);
    }

    #[test]
    fn a_backslash_keeps_a_colon_in_its_field() {
        let v6 = Login { host: "::1", user: "m*", ..DB };
        assert_eq!(find(r"\:\:1:5432:app:m*:a\:b\\c", v6).as_deref(), Some(r"a:b\c"));
        assert_eq!(find(r"db:5432:app:\*:x", DB), None);
        assert_eq!(find("db:5432:app:me:a:b", DB).as_deref(), Some("a:b"));
    }

    #[cfg(all(unix, feature = "embedded"))]
    #[test]
    fn a_file_that_others_may_read_is_not_used() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("pgpass");
        assert_eq!(read(&file).expect("none is no error"), "");
        std::fs::write(&file, "*:*:*:*:x").expect("written");
        for (mode, expected) in [(0o600, "*:*:*:*:x"), (0o640, ""), (0o604, "")] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("changed");
            assert_eq!(read(&file).expect("no error"), expected, "{mode:o}");
        }
        assert_eq!(read(directory.path()).expect("no error"), "");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("changed");
        std::fs::write(&file, [0xff]).expect("written");
        let error = read(&file).expect_err("not a text");
        assert!(error.to_string().contains(file.to_str().expect("text")), "{error}");
    }
}
