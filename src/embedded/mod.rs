//! A private PostgreSQL server: for the demo, for `pgonce run --embedded`, and for tests.
//!
//! [`PrivateServer::start`] finds the server programs of this machine, makes a new data directory
//! below the temporary directory and starts a server that nobody else can reach: it listens on no
//! TCP port, and its Unix socket lies in a directory that only its owner (and root) may enter.
//! The superuser is called `pgonce` and needs no password; a database `pgonce` exists.
//!
//! PostgreSQL refuses to run as root. Started by root, the server, and everything else that
//! touches its data, therefore runs as `postgres` or, where there is no such user, as `nobody`.
//! Root itself writes and removes nothing in a directory that is theirs.
//!
//! # The end
//!
//! The server ends with the program, however the program ends. There are two lines of defence:
//!
//! 1. A *guardian*, a small shell process in a process group of its own, waits for the end of a
//!    pipe that the program holds open. The end comes by [`PrivateServer::stop`], by `Drop`, by a
//!    panic, or because the kernel closes the pipe of a killed program: it is the same path each
//!    time, so the one for disasters is also the one that every day tries. The guardian then
//!    stops the server and removes the directory. See `guardian.rs`.
//! 2. Program and guardian hold a lock on a file of the directory. Where both were killed, the
//!    lock is free, and the next start ends the server of such a directory and removes both.
//!    See `directory.rs`.
//!
//! Invariant: the guardian exists before the first file of the server does.
//! Invariant: a process is only ever signalled as a member of the guardian's process group, as
//! our own child, or after its command line was seen to name the directory in question.
//!
//! # Deliberately absent
//!
//! Durability: `fsync` is off, as the data are thrown away. (`synchronous_commit` keeps its
//! default, so that what a client sees of others is as on any server.) There is no download of
//! PostgreSQL, no choice of version other than by `PGONCE_POSTGRES_BIN`, and no Windows. There is
//! no async code either: every call blocks, so call from `spawn_blocking` in a runtime.

mod account;
mod binaries;
mod directory;
mod error;
mod guardian;
mod postmaster;

use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use self::error::{StartError, StopError};

use self::account::Account;
use self::binaries::Binaries;
use self::directory::ServerDirectory;
use self::guardian::Guardian;
use self::postmaster::Postmaster;

/// How long a start may take, from the empty directory to the first connection.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What a caller may ask of a private server.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Further server settings by name and value, such as `("wal_level", "logical")`. They win
    /// over the built-in ones. Leave `port` and `unix_socket_directories` alone:
    /// [`PrivateServer::url`] relies on them.
    pub settings: Vec<(String, String)>,
}

/// A running private server. Dropping it stops the server and removes its data.
#[derive(Debug)]
pub struct PrivateServer {
    postmaster: Postmaster,
    guardian: Guardian,
}

/// A server that outlives the program: what [`PrivateServer::keep`] leaves.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The directory with the data, the socket and the log.
    pub directory: PathBuf,
    /// For people: the shell commands that stop the server and remove the directory, a line each.
    pub instructions: String,
}

impl PrivateServer {
    /// Starts a new server and returns when it accepts connections; before, it removes the
    /// servers that killed programs left behind. Blocks, typically for one or two seconds and for
    /// at most 60 (and 20 more where a server left behind does not want to go).
    ///
    /// # Errors
    /// No usable server programs, no suitable temporary directory, no unprivileged user (as
    /// root), or a server that does not start; then with the last lines of its log.
    pub fn start(options: &Options) -> Result<Self, StartError> {
        let started = Instant::now();
        let account = Account::for_servers()?;
        let binaries = Binaries::find(&account)?;
        let parent = directory::parent(&account)?;
        directory::sweep(&parent, &account);
        let directory = ServerDirectory::create(&parent, &account)?;
        let guardian = Guardian::post(&account, directory.path(), directory.lock())
            .map_err(StartError::io(Path::new("/bin/sh")))?;
        let postmaster = Postmaster {
            directory,
            binaries,
            account,
            settings: options.settings.clone(),
            process_group: guardian.process_group(),
            process: None,
        };
        // From here on an early return drops the server, and so removes what there is of it.
        let mut server = Self { postmaster, guardian };
        let deadline = Instant::now() + START_LIMIT;
        server.postmaster.initialize(deadline)?;
        server.postmaster.launch(deadline)?;
        tracing::debug!(
            server.directory = %server.directory().display(),
            server.version = server.postmaster.binaries.version,
            elapsed_ms = started.elapsed().as_millis(),
            "private PostgreSQL server started"
        );
        Ok(server)
    }

    /// The URL of a database of this server, for `tokio-postgres` and for libpq alike. The
    /// database need not exist; `pgonce` does.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        url(self.directory(), database)
    }

    /// The directory with the data, the socket and the log (`log`).
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.postmaster.directory.path()
    }

    /// A shell command that opens `database` in `psql`, quoted, to copy and paste.
    #[must_use]
    pub fn psql_command(&self, database: &str) -> String {
        format!("psql {}", shell_quoted(&self.url(database)))
    }

    /// Stops the server as a crash would (no checkpoint, every connection cut) and starts it on
    /// the same data, through crash recovery. URLs stay valid. Blocks until connections are
    /// accepted again, for at most 60 seconds.
    ///
    /// # Errors
    /// The server does not end, or does not start again. One may try again.
    pub fn restart_hard(&mut self) -> Result<(), StartError> {
        let deadline = Instant::now() + START_LIMIT;
        self.postmaster.crash().map_err(StartError::io(self.directory()))?;
        self.postmaster.launch(deadline)
    }

    /// Stops the server (a fast shutdown; after ten seconds an immediate one) and removes its
    /// directory. Blocks, typically for a fifth of a second.
    ///
    /// # Errors
    /// The server still runs, or something of the directory is still there.
    pub fn stop(mut self) -> Result<(), StopError> {
        self.end()
    }

    /// Lets the server run on after the program has ended, until someone follows the
    /// instructions that are returned, or the machine goes down.
    ///
    /// # Errors
    /// The guardian could not be called off; the server is then stopped and removed.
    pub fn keep(mut self) -> Result<Kept, StopError> {
        self.guardian.call_off().map_err(|source| self.stop_error(source))?;
        let directory = self.directory().to_owned();
        let quoted = shell_quoted(&directory.to_string_lossy());
        Ok(Kept {
            instructions: format!(
                "stop it:    kill -INT $(head -n 1 {quoted}/data/postmaster.pid)\n\
                 remove it:  rm -rf {quoted}"
            ),
            directory,
        })
    }

    fn end(&mut self) -> Result<(), StopError> {
        let outcome = self.guardian.end();
        if let Some(mut process) = self.postmaster.process.take() {
            // It has ended unless the guardian failed; in either case it wants to be reaped.
            if outcome.is_err() {
                let _ = process.kill();
            }
            let _ = process.wait();
        }
        outcome.map_err(|source| self.stop_error(source))
    }

    fn stop_error(&self, source: io::Error) -> StopError {
        StopError { directory: self.directory().to_owned(), source }
    }
}

impl Drop for PrivateServer {
    /// As [`PrivateServer::stop`], but silent. Nothing happens after `stop` or `keep`.
    fn drop(&mut self) {
        if self.guardian.on_duty() {
            let _ = self.end();
        }
    }
}

fn url(directory: &Path, database: &str) -> String {
    format!(
        "postgresql:///{}?host={}&port={}&user=pgonce",
        percent_encoded(database.as_bytes()),
        percent_encoded(directory.as_os_str().as_bytes()),
        directory::PORT,
    )
}

/// Slashes stay, as they mean nothing in a query and in the path only end at the `?`.
fn percent_encoded(bytes: &[u8]) -> String {
    let mut encoded = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{shell_quoted, url};

    #[test]
    fn a_url_encodes_what_a_url_may_not_contain() {
        assert_eq!(
            url(Path::new("/tmp/a b&c"), "ümlaut?%"),
            "postgresql:///%C3%BCmlaut%3F%25?host=/tmp/a%20b%26c&port=5432&user=pgonce"
        );
    }

    #[test]
    fn a_quote_survives_the_shell() {
        assert_eq!(shell_quoted("it's"), r"'it'\''s'");
    }
}
