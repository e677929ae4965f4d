//! A proxy that knows where the messages of PostgreSQL's protocol end, and cuts a connection between two of them.
//!
//! What was passed on before a cut arrives, and nothing after it: both sides read to the end of what they were sent, and
//! then find the connection closed. Towards the client a message is held back that the server has sent already: the server
//! has acted, and nobody hears of it. Towards the server it is cut at once: the server acts while the client knows already
//! that the connection is lost.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf, copy, sink, split,
};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_postgres::Config;
use tokio_postgres::config::Host;
use tokio_util::task::AbortOnDropHandle;

/// Longest message that is passed on, in bytes.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Which way messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Towards {
    Server,
    Client,
}

/// That a connection is cut after so many messages that went one way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub(crate) towards: Towards,
    pub(crate) after: usize,
}

/// A proxy, until it is dropped; its connections end then.
#[derive(Debug)]
pub(crate) struct Proxy {
    /// For whatever connects through it: keywords and values.
    pub(crate) url: String,
    cuts: Arc<AtomicUsize>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// A proxy in front of the server of a URL. `rule` says for each connection, by its startup packet, where it is cut.
    pub(crate) async fn start(url: &str, rule: impl FnMut(&[u8]) -> Option<Cut> + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let config: Config = url.parse().expect("the URL of a test database is valid");
        let cuts = Arc::new(AtomicUsize::new(0));
        let accepting = tokio::spawn(accept(listener, Upstream::of(&config), rule, Arc::clone(&cuts)));
        let url = url_of(&config, port);
        Self { url, cuts, _accepting: AbortOnDropHandle::new(accepting) }
    }

    /// How many connections were cut.
    pub(crate) fn cuts(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }
}

/// The same database and role, by way of a port of this machine.
fn url_of(config: &Config, port: u16) -> String {
    let mut url = format!("host=127.0.0.1 port={port} sslmode=disable");
    let password = config.get_password().map(|password| String::from_utf8_lossy(password).into_owned());
    for (keyword, value) in
        [("user", config.get_user()), ("dbname", config.get_dbname()), ("password", password.as_deref())]
    {
        if let Some(value) = value {
            write!(url, " {keyword}='{}'", value.replace('\\', r"\\").replace('\'', r"\'")).expect("a string grows");
        }
    }
    url
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

type Reader = BufReader<ReadHalf<Box<dyn Stream>>>;
type Writer = WriteHalf<Box<dyn Stream>>;

impl Upstream {
    fn of(config: &Config) -> Self {
        let port = config.get_ports().first().copied().unwrap_or(5432);
        match config.get_hosts().first().expect("it names a host") {
            Host::Tcp(host) => Self::Tcp(host.clone(), port),
            Host::Unix(directory) => Self::Unix(directory.join(format!(".s.PGSQL.{port}"))),
        }
    }

    async fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(host, port) => Box::new(TcpStream::connect((host.as_str(), *port)).await?),
            Self::Unix(socket) => Box::new(UnixStream::connect(socket).await?),
        })
    }
}

async fn accept(
    listener: TcpListener,
    upstream: Upstream,
    mut rule: impl FnMut(&[u8]) -> Option<Cut>,
    cuts: Arc<AtomicUsize>,
) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.expect("it is bound");
        client.set_nodelay(true).expect("a TCP connection");
        let (read, write) = split(Box::new(client) as Box<dyn Stream>);
        let mut read = BufReader::new(read);
        // Read here, so that the rule sees connections one after the other.
        let Some(startup) = message(&mut read, 0).await else { continue };
        let cut = rule(&startup);
        let (upstream, cuts) = (upstream.clone(), Arc::clone(&cuts));
        connections.spawn(async move {
            // Where there is no server, nobody answers.
            let Ok(server) = upstream.connect().await else { return };
            pass((read, write), server, &startup, cut, &cuts).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// That the connection is to be cut now.
struct CutNow;

/// Passes messages on both ways, until a side has ended or it is time to cut.
async fn pass(client: (Reader, Writer), server: Box<dyn Stream>, startup: &[u8], cut: Option<Cut>, cuts: &AtomicUsize) {
    let (mut from_client, mut to_client) = client;
    let (from_server, mut to_server) = split(server);
    let mut from_server = BufReader::new(from_server);
    let after = |towards| cut.filter(|cut| cut.towards == towards).map(|cut| cut.after);
    let towards_server = async {
        let limit = after(Towards::Server);
        let mut passed = 0;
        let mut next = Some(startup.to_vec());
        while limit.is_none_or(|limit| passed < limit) {
            let whole = match next.take() {
                Some(startup) => startup,
                None => match message(&mut from_client, 1).await {
                    Some(whole) => whole,
                    None => return Ok(()),
                },
            };
            if to_server.write_all(&whole).await.is_err() {
                return Ok(());
            }
            passed += 1;
        }
        Err(CutNow)
    };
    let towards_client = async {
        let limit = after(Towards::Client);
        let mut passed = 0;
        while let Some(whole) = message(&mut from_server, 1).await {
            if limit == Some(passed) {
                return Err(CutNow);
            }
            if to_client.write_all(&whole).await.is_err() {
                break;
            }
            passed += 1;
        }
        Ok(())
    };
    // Whichever way ends first ends both: the other side sees the connection closed.
    let is_cut = tokio::select! {
        ended = towards_server => ended.is_err(),
        ended = towards_client => ended.is_err(),
    };
    if is_cut {
        cuts.fetch_add(1, Ordering::SeqCst);
    }
    // Either side may be gone. Whatever it still sends is read, so that nothing is reset that was passed on before.
    let _ = tokio::join!(to_server.shutdown(), to_client.shutdown());
    let (mut nowhere, mut neither) = (sink(), sink());
    let _ = tokio::join!(copy(&mut from_server, &mut nowhere), copy(&mut from_client, &mut neither));
}

/// The next message with its length, and its type where it has one (all but the first of a client have); none at the end.
async fn message(from: &mut Reader, type_bytes: usize) -> Option<Vec<u8>> {
    let mut whole = vec![0; type_bytes + 4];
    from.read_exact(&mut whole).await.ok()?;
    let length = u32::from_be_bytes(whole[type_bytes..].try_into().expect("four bytes"));
    let rest = usize::try_from(length).expect("it fits").checked_sub(4).filter(|rest| *rest <= MESSAGE_BYTES_MAX)?;
    let start = whole.len();
    whole.resize(start + rest, 0);
    from.read_exact(&mut whole[start..]).await.ok()?;
    Some(whole)
}
