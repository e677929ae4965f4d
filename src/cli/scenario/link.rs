//! The network between the processes of a play and the server. It can be cut.
//!
//! It knows where the messages of PostgreSQL's protocol end, passes them on, and lets a fault happen to the COMMIT that a play
//! is about. So no process of a play knows of the fault, and no clock decides when it happens.
//!
//! It listens on a Unix socket, in a directory that only its owner (and root) may enter: a private server asks nobody for a
//! password, and by a TCP port everybody on this machine could come to it. For the same reason as the server's own socket it
//! has no TLS.
//!
//! Invariant: the socket has its name only while somebody listens on it, or is gone. So a program that was killed is told by
//! its socket, which refuses connections, and the next play removes what it left.

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use rustix::process::geteuid;
use tempfile::TempDir;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, copy_buf, split};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::cli::Usage;
use crate::connect::Target;

/// Longest message that is passed on, in bytes: those of a play are short.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// The number in the socket's name.
const PORT: u16 = 5432;
/// What the names of the directories begin with.
const PREFIX: &str = "pgonce-scenario-";

/// A network, until it is dropped; its connections end then.
pub(super) struct Link {
    url: String,
    planned: Arc<Mutex<Option<Planned>>>,
    _accepting: AbortOnDropHandle<()>,
    _directory: TempDir,
}

/// What becomes of a COMMIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The server gets it, and its answer is lost.
    AnswerLost,
    /// It is held back. Should its sender die, nobody gets it.
    Held,
}

/// A fault that is to happen.
struct Planned {
    fault: Fault,
    /// Which COMMIT it happens to, from now on: 1 is the next.
    commit: usize,
    strike: Strike,
}

/// A fault as its play sees it.
#[derive(Clone, Default)]
pub(super) struct Strike {
    /// It has happened.
    pub(super) happened: CancellationToken,
    /// Asks to end the connection on the side of the process.
    pub(super) cut: CancellationToken,
    /// Asks to let the server have what was held back.
    pub(super) heal: CancellationToken,
    /// The server has answered what was held back.
    pub(super) arrived: CancellationToken,
}

/// Where the server is.
#[derive(Clone)]
enum Upstream {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// A connection, of whatever kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Link {
    /// A network to the server of a URL. `name` is what connections by it are called in `pg_stat_activity`.
    pub(super) async fn start(url: &str, name: &str) -> anyhow::Result<Self> {
        let target = Target::read(url)?;
        let config = target.first();
        if config.get_ssl_mode() == SslMode::Require {
            let message = "a scenario reads what its processes say to the server, and cannot do so with TLS: \
                give a URL with sslmode=disable or prefer, or none for a private server";
            return Err(Usage(message.to_owned()).into());
        }
        sweep(&std::env::temp_dir()).await;
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir()?;
        let socket = socket_in(directory.path());
        let listener = listen(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        let planned = Arc::default();
        let accepting = tokio::spawn(accept(listener, Upstream::of(config), Arc::clone(&planned)));
        let url = url_by(&directory, config, name);
        Ok(Self { url, planned, _accepting: AbortOnDropHandle::new(accepting), _directory: directory })
    }

    /// The same database and role, by this network: keywords and values.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Plans a fault for a COMMIT to come: 1 is the next. It replaces one that has not happened.
    pub(super) fn plan(&self, fault: Fault, commit: usize) -> Strike {
        let strike = Strike::default();
        *self.planned.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Planned { fault, commit, strike: strike.clone() });
        strike
    }
}

fn socket_in(directory: &Path) -> PathBuf {
    directory.join(format!(".s.PGSQL.{PORT}"))
}

/// Listens on a socket that gets its name when it can be connected to.
fn listen(socket: &Path) -> std::io::Result<UnixListener> {
    let unnamed = socket.with_file_name("new");
    let listener = UnixListener::bind(&unnamed)?;
    std::fs::rename(&unnamed, socket)?;
    Ok(listener)
}

/// Removes the directories of this user's whose programs were killed. What cannot be removed is left: it is in nobody's way.
async fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let is_own = entry.metadata().is_ok_and(|of| of.is_dir() && of.uid() == geteuid().as_raw());
        if is_own && entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            let socket = socket_in(&entry.path());
            let refused =
                UnixStream::connect(&socket).await.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
            if refused && std::fs::remove_file(&socket).is_ok() {
                let _ = std::fs::remove_dir(entry.path());
            }
        }
    }
}

fn url_by(directory: &TempDir, config: &Config, name: &str) -> String {
    let directory = directory.path().display().to_string();
    let password = config.get_password().map(|password| String::from_utf8_lossy(password).into_owned());
    let mut url = format!("port={PORT} sslmode=disable");
    for (keyword, value) in [
        ("host", Some(&*directory)),
        ("user", config.get_user()),
        ("dbname", config.get_dbname()),
        ("password", password.as_deref()),
        ("options", config.get_options()),
        ("application_name", Some(name)),
    ] {
        if let Some(value) = value {
            // Writing to a String cannot fail.
            let _ = write!(url, " {keyword}='{}'", value.replace('\\', r"\\").replace('\'', r"\'"));
        }
    }
    url
}

impl Upstream {
    fn of(config: &Config) -> Self {
        let port = config.get_ports().first().copied().unwrap_or(PORT);
        match (config.get_hostaddrs().first(), config.get_hosts().first()) {
            (Some(address), _) => Self::Tcp(address.to_string(), port),
            (None, Some(Host::Unix(directory))) => Self::Unix(directory.join(format!(".s.PGSQL.{port}"))),
            (None, Some(Host::Tcp(host))) => Self::Tcp(host.clone(), port),
            (None, None) => Self::Tcp("localhost".to_owned(), port),
        }
    }

    async fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(host, port) => Box::new(TcpStream::connect((host.as_str(), *port)).await?),
            Self::Unix(socket) => Box::new(UnixStream::connect(socket).await?),
        })
    }
}

async fn accept(listener: UnixListener, upstream: Upstream, planned: Arc<Mutex<Option<Planned>>>) {
    let mut connections = JoinSet::new();
    // Where it cannot accept any more, whoever waits for a connection says so.
    while let Ok((process, _)) = listener.accept().await {
        let (upstream, planned) = (upstream.clone(), Arc::clone(&planned));
        connections.spawn(async move {
            // Where there is no server, nobody answers.
            let Ok(server) = upstream.connect().await else { return };
            // Either side may be gone at any moment, and there is nobody to tell.
            let _ = carry(process, server, &planned).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Passes messages on both ways, until a side has ended or the fault happens.
async fn carry(process: UnixStream, server: Box<dyn Stream>, planned: &Mutex<Option<Planned>>) -> std::io::Result<()> {
    let (from_process, mut to_process) = split(process);
    let (from_server, mut to_server) = split(server);
    let (mut from_process, mut from_server) = (BufReader::new(from_process), BufReader::new(from_server));
    let towards_server = async {
        // The first message has no type.
        let mut type_bytes = 0;
        loop {
            let message = next(&mut from_process, type_bytes).await?;
            type_bytes = 1;
            if is_commit(&message)
                && let Some((fault, strike)) = due(planned)
            {
                return std::io::Result::Ok((fault, strike, message));
            }
            to_server.write_all(&message).await?;
        }
    };
    // Whichever way ends first ends both. Before a COMMIT all is answered, so nothing is under way that could be dropped.
    let (fault, strike, commit) = tokio::select! {
        fault = towards_server => fault?,
        ended = copy_buf(&mut from_server, &mut to_process) => return ended.map(drop),
    };
    match fault {
        Fault::AnswerLost => {
            to_server.write_all(&commit).await?;
            until_answered(&mut from_server).await?;
            strike.happened.cancel();
            until_gone(&mut from_process, &strike).await;
        }
        Fault::Held => {
            strike.happened.cancel();
            if until_gone(&mut from_process, &strike).await {
                drop((from_process, to_process));
                strike.heal.cancelled().await;
                to_server.write_all(&commit).await?;
                until_answered(&mut from_server).await?;
                strike.arrived.cancel();
            }
        }
    }
    Ok(())
}

/// Counts a COMMIT, and answers what is to happen to it.
fn due(planned: &Mutex<Option<Planned>>) -> Option<(Fault, Strike)> {
    let mut planned = planned.lock().unwrap_or_else(PoisonError::into_inner);
    let next = planned.as_mut()?;
    next.commit = next.commit.saturating_sub(1);
    if next.commit > 0 {
        return None;
    }
    planned.take().map(|due| (due.fault, due.strike))
}

/// Waits until the connection is to be cut, or its process has ended it. Answers whether it was the former.
async fn until_gone<R: AsyncBufRead + Unpin>(from_process: &mut R, strike: &Strike) -> bool {
    // Both arms only wait: whatever the process still says, nobody is to hear it.
    tokio::select! {
        biased;
        () = strike.cut.cancelled() => true,
        _ = next(from_process, 1) => false,
    }
}

/// Reads what the server answers, to the end of it.
async fn until_answered<R: AsyncBufRead + Unpin>(from_server: &mut R) -> std::io::Result<()> {
    // ReadyForQuery.
    while next(from_server, 1).await?.first() != Some(&b'Z') {}
    Ok(())
}

/// Whether a message is the COMMIT of a transaction, as the driver sends it: a simple query. A statement that is a
/// transaction by itself ends in small letters (`sql/statements/commit.sql`), and counts for nothing in a play.
fn is_commit(message: &[u8]) -> bool {
    message.first() == Some(&b'Q') && message.get(5..) == Some(b"COMMIT\0")
}

/// The next message with its length, and its type where it has one.
async fn next<R: AsyncBufRead + Unpin>(from: &mut R, type_bytes: usize) -> std::io::Result<Vec<u8>> {
    let mut whole = vec![0; type_bytes];
    from.read_exact(&mut whole).await?;
    let length = from.read_u32().await?;
    whole.extend(length.to_be_bytes());
    let rest = usize::try_from(length).ok().and_then(|length| length.checked_sub(4));
    let Some(rest) = rest.filter(|rest| *rest <= MESSAGE_BYTES_MAX) else {
        return Err(std::io::Error::other(format!("a message of {length} bytes, over {MESSAGE_BYTES_MAX}")));
    };
    let start = whole.len();
    whole.resize(start + rest, 0);
    from.read_exact(&mut whole[start..]).await?;
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_told_from_all_else() {
        assert!(is_commit(b"Q\0\0\0\x0bCOMMIT\0"));
        for other in [
            b"Q\0\0\0\x0aBEGIN\0" as &[u8],
            b"Q\0\0\0\x0bcommit\0",
            b"P\0\0\0\x0bCOMMIT\0",
            b"Q\0\0\0\x0bCOMMITS",
            b"Q",
            b"",
        ] {
            assert!(!is_commit(other), "{other:?}");
        }
    }

    #[test]
    fn a_fault_happens_to_the_commit_it_was_planned_for_and_to_no_other() {
        let planned = Mutex::new(Some(Planned { fault: Fault::Held, commit: 2, strike: Strike::default() }));
        let faults: Vec<_> = (0..3).map(|_| due(&planned).map(|(fault, _)| fault)).collect();
        assert_eq!(faults, [None, Some(Fault::Held), None]);
    }

    #[test]
    fn what_a_url_says_is_said_by_the_link_too() {
        let directory = tempfile::tempdir().expect("a directory");
        let given: Config = r"host=db user='o\'hara' dbname='a b' password='\\ \''".parse().expect("well formed");
        let config: Config = url_by(&directory, &given, "a play").parse().expect("well formed");
        assert_eq!(config.get_user(), Some("o'hara"));
        assert_eq!(config.get_dbname(), Some("a b"));
        assert_eq!(config.get_password(), Some(br"\ '" as &[u8]));
        assert_eq!(config.get_application_name(), Some("a play"));
        assert_eq!(config.get_hosts(), [Host::Unix(directory.path().to_owned())]);
    }

    #[tokio::test]
    async fn a_message_is_read_to_its_end_and_no_longer_than_it_may_be() {
        let mut stream = BufReader::new(b"Z\0\0\0\x05ID\0\0\0\x04X\xff\xff\xff\xff" as &[u8]);
        assert_eq!(next(&mut stream, 1).await.expect("whole"), b"Z\0\0\0\x05I");
        assert_eq!(next(&mut stream, 1).await.expect("whole"), b"D\0\0\0\x04");
        next(&mut stream, 1).await.expect_err("too long");
        next(&mut BufReader::new(b"Z\0\0\0\x03" as &[u8]), 1).await.expect_err("shorter than its length");
    }
}
