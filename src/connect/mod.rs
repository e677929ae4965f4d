//! From a URL to connections, as libpq has them: TLS, Unix sockets, the password file, several hosts.
//!
//! The driver speaks the protocol, checks `target_session_attrs` and goes through the addresses of a name. What it lacks
//! is here: `sslmode` beyond `require` and the certificates for it, a password from a file, and hosts that differ in
//! these. So a [`Target`] holds a configuration for each host and tries one after the other; the first that lets us in
//! is taken.
//!
//! Invariant: a host that does not answer does not keep the next one from being tried. Each has its `connect_timeout`,
//! which its addresses share; the last one has what is left of the time that the pool allows.
//! Invariant: neither the URL nor a value of it stands in an error or in the log, but for hosts, ports and the database.
//!
//! Files are read once, by [`Target::read`].

mod failure;
mod parameters;
mod password_file;
mod tls;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use deadpool_postgres::{Connect, PoolError, TimeoutType};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_postgres::config::{Config, LoadBalanceHosts, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::TlsStream;
use tokio_postgres::{AsyncMessage, Client, Connection, Error as DriverError, NoTls, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

pub(crate) use self::failure::failed;
use self::parameters::{Parameters, invalid_value};
use self::password_file::Login;
use self::tls::Settings;
#[cfg(feature = "webhook")]
pub(crate) use self::tls::{system_certificates, verifying};
use crate::error::{Error, ErrorKind};

/// How long a host may take to let us in, where the URL says nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may be silent before the kernel asks whether the other side still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// How long sent data may stay unacknowledged before the connection counts as lost.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// Hosts that a URL may have.
const HOSTS_MAX: usize = 32;
const PORT: u16 = 5432;
/// Longest `application_name` that PostgreSQL keeps whole, in bytes.
const APPLICATION_NAME_BYTES_MAX: usize = 63;
/// Where servers have their Unix sockets: Debian's and Red Hat's place, and that of PostgreSQL itself.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// What a connection of the pool is: a client, and the task that serves it.
type Connected = (Client, JoinHandle<()>);

/// What rings at a notification, where anybody listens.
type Bell<'a> = Option<&'a mpsc::Sender<()>>;

/// Where to connect to, and how.
#[derive(Clone)]
pub(crate) struct Target {
    hosts: Vec<Host>,
    /// None where no host may be reached by it.
    tls: Option<MakeRustlsConnect>,
    /// What the hosts have in common.
    common: Config,
    connect_timeout: Duration,
}

#[derive(Clone)]
struct Host {
    name: String,
    port: u16,
    config: Config,
}

impl Target {
    /// Reads a URL, or keywords and values, and the files that they name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the text cannot be read, has a parameter that nobody knows or a value that makes no
    /// sense, or if a file cannot be used.
    pub(crate) fn read(text: &str) -> Result<Self, Error> {
        Self::of(Parameters::read(text, |variable| std::env::var(variable).ok())?)
    }

    fn of(mut parameters: Parameters) -> Result<Self, Error> {
        let names = parameters.take_list("host");
        let addresses = parameters.take_list("hostaddr");
        let ports = parameters.take_list("port");
        let password = parameters.take("password");
        let passfile = parameters.take("passfile").map(PathBuf::from).or_else(|| home_file(&[".pgpass"]));
        let settings = Settings::take(&mut parameters)?;
        let common = common(parameters)?;
        let mut hosts = places(&names, &addresses, &ports)?
            .into_iter()
            .map(|(name, address, port)| host(&common, &settings, name, address, port))
            .collect::<Vec<_>>();
        match (password, passfile) {
            (Some(password), _) => hosts.iter_mut().for_each(|host| {
                host.config.password(&password);
            }),
            (None, Some(passfile)) => look_up_passwords(&mut hosts, &password_file::read(&passfile)?),
            (None, None) => {}
        }
        let is_tls_wanted = hosts.iter().any(|host| host.config.get_ssl_mode() != SslMode::Disable);
        // Files that are of no use are not read.
        let tls = is_tls_wanted.then(|| settings.connector()).transpose()?;
        let connect_timeout = common.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
        Ok(Self { hosts, tls, common, connect_timeout })
    }

    /// What the pool shows of it: neither hosts nor a password.
    pub(crate) fn config(&self) -> Config {
        self.common.clone()
    }

    /// How to connect to the first host, for whoever passes on what others say to it.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn first(&self) -> &Config {
        &self.hosts.first().expect("there is at least one host").config
    }

    /// How long it takes at the most to find that no host lets us in.
    pub(crate) fn wait_max(&self) -> Duration {
        self.connect_timeout.saturating_mul(u32::try_from(self.hosts.len()).unwrap_or(u32::MAX))
    }

    /// The same, with the name of a stage in `application_name`.
    pub(crate) fn for_stage(&self, stage: &str) -> Self {
        let mut target = self.clone();
        let program = self.common.get_application_name().unwrap_or_default();
        // PostgreSQL cuts the end of what is too long, and the stage stands there.
        let mut room = APPLICATION_NAME_BYTES_MAX.saturating_sub(stage.len() + 1).min(program.len());
        while !program.is_char_boundary(room) {
            room -= 1;
        }
        let name = format!("{} {stage}", &program[..room]);
        for host in &mut target.hosts {
            host.config.application_name(&name);
        }
        target.common.application_name(name);
        target
    }

    /// Opens a connection that hears notifications.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] if no server can be reached.
    pub(crate) async fn listener(&self) -> Result<Listener, Error> {
        let (ring, notifications) = mpsc::channel(1);
        let (client, task) = tokio::time::timeout(self.wait_max(), self.connect_to_any(Some(&ring)))
            .await
            .map_err(|_| failed(PoolError::Timeout(TimeoutType::Create), Some(self)))?
            .map_err(|error| failed(PoolError::Backend(error), Some(self)))?;
        Ok(Listener { client, notifications, _task: AbortOnDropHandle::new(task) })
    }

    async fn connect_to_any(&self, bell: Bell<'_>) -> Result<Connected, DriverError> {
        let mut hosts: Vec<&Host> = self.hosts.iter().collect();
        if self.common.get_load_balance_hosts() == LoadBalanceHosts::Random {
            // Each hasher of the standard library has keys of its own.
            hosts.sort_by_cached_key(|_| RandomState::new().hash_one(()));
        }
        let last = hosts.pop().expect("there is at least one host");
        for host in hosts {
            let why = match tokio::time::timeout(self.connect_timeout, self.connect_to(host, bell)).await {
                Ok(Ok(connected)) => return Ok(connected),
                Ok(Err(error)) => Error::from(error).to_string(),
                Err(_) => format!("no answer within {} s", self.connect_timeout.as_secs()),
            };
            tracing::warn!(server.host = host.name, server.port = host.port, "trying the next host: {why}");
        }
        self.connect_to(last, bell).await
    }

    async fn connect_to(&self, host: &Host, bell: Bell<'_>) -> Result<Connected, DriverError> {
        let mut config = host.config.clone();
        config.connect_timeout(self.connect_timeout / host.addresses().await);
        match open(&config, self.tls.as_ref(), bell).await {
            Err(error) if config.get_ssl_mode() == SslMode::Prefer && is_against_tls(&error) => {
                tracing::debug!(server.host = host.name, "connecting without TLS: {error}");
                open(config.ssl_mode(SslMode::Disable), self.tls.as_ref(), bell).await
            }
            outcome => outcome,
        }
    }
}

impl std::fmt::Display for Target {
    /// The database, and the hosts where it may be.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let database = self.common.get_dbname().or(self.common.get_user()).unwrap_or_default();
        write!(f, "database {database:?} at ")?;
        for (nth, Host { name, port, .. }) in self.hosts.iter().enumerate() {
            let comma = if nth == 0 { "" } else { ", " };
            if is_socket(name) {
                write!(f, "{comma}{name}/.s.PGSQL.{port}")?;
            } else {
                write!(f, "{comma}{name}:{port}")?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Target {
    /// The hosts, and nothing that might be a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hosts = self.hosts.iter().map(|host| format!("{}:{}", host.name, host.port));
        f.debug_struct("Target").field("hosts", &hosts.collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

impl Connect for Target {
    fn connect(&self, _: &Config) -> Pin<Box<dyn Future<Output = Result<Connected, DriverError>> + Send + '_>> {
        Box::pin(self.connect_to_any(None))
    }
}

impl Host {
    /// How many addresses its name has. A name that is not known is for the driver to report.
    async fn addresses(&self) -> u32 {
        if !self.config.get_hostaddrs().is_empty() || is_socket(&self.name) {
            return 1;
        }
        let found = tokio::net::lookup_host((&*self.name, self.port)).await;
        found.map_or(1, |addresses| u32::try_from(addresses.count()).unwrap_or(u32::MAX)).max(1)
    }
}

/// A connection of its own that hears notifications. It closes when dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    client: Client,
    notifications: mpsc::Receiver<()>,
    _task: AbortOnDropHandle<()>,
}

impl Listener {
    /// For the LISTEN.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Waits for the next notification.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] when the connection has ended.
    pub(crate) async fn notification(&mut self) -> Result<(), Error> {
        let closed = || Error::new(ErrorKind::Unavailable, "the connection that listens was closed");
        self.notifications.recv().await.ok_or_else(closed)
    }
}

async fn open(config: &Config, tls: Option<&MakeRustlsConnect>, bell: Bell<'_>) -> Result<Connected, DriverError> {
    match tls {
        Some(tls) => config.connect(tls.clone()).await.map(|connected| serve(connected, bell)),
        None => config.connect(NoTls).await.map(|connected| serve(connected, bell)),
    }
}

/// Serves a connection until it ends, and rings at each notification.
fn serve<T>((client, mut connection): (Client, Connection<Socket, T>), bell: Bell<'_>) -> Connected
where
    T: TlsStream + Unpin + Send + 'static,
{
    let bell = bell.cloned();
    let task = tokio::spawn(async move {
        while let Some(message) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            match (message, &bell) {
                (Ok(AsyncMessage::Notification(_)), Some(bell)) => {
                    // Where one waits already, a second says nothing more.
                    let _ = bell.try_send(());
                }
                (Ok(_), _) => {}
                (Err(error), _) => {
                    // Whoever works on it is told as well.
                    tracing::debug!("a connection broke: {error}");
                    return;
                }
            }
        }
    });
    (client, task)
}

/// Whether it may be different without TLS. A password that was refused is not: it is not sent again in the clear.
fn is_against_tls(error: &DriverError) -> bool {
    error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) || tls::failure(error).is_some()
}

/// What all hosts have in common: the parameters that the driver knows, and defaults for some.
fn common(mut parameters: Parameters) -> Result<Config, Error> {
    parameters.rename("keepalives_count", "keepalives_retries");
    // libpq counts milliseconds, the driver seconds.
    let tcp_user_timeout: Option<u64> = parameters.take_parsed("tcp_user_timeout")?;
    let is_idle_given = parameters.has("keepalives_idle");
    let mut config = parameters.into_config()?;
    if config.get_application_name().is_none() {
        config.application_name("pgonce");
    }
    if config.get_user().is_none() {
        let user = whoami::username().map_err(|error| {
            Error::new(ErrorKind::Invalid, "the database URL names no user, and the operating system none either")
                .with_source(error)
        })?;
        config.user(user);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if !is_idle_given {
        config.keepalives_idle(KEEPALIVE_IDLE);
    }
    config.tcp_user_timeout(tcp_user_timeout.map_or(TCP_USER_TIMEOUT, Duration::from_millis));
    Ok(config)
}

/// Hosts with their addresses, where they are given, and ports. There is at least one.
fn places(
    names: &[String],
    addresses: &[String],
    ports: &[String],
) -> Result<Vec<(String, Option<IpAddr>, u16)>, Error> {
    let count = names.len().max(addresses.len()).max(1);
    let counts = [("host", names.len()), ("hostaddr", addresses.len()), ("port", ports.len())];
    for (name, given) in counts {
        let is_one_for_all = name == "port" && given == 1;
        if given != 0 && given != count && !is_one_for_all {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("the database URL has {count} hosts and {given} times {name}"),
            ));
        }
    }
    if count > HOSTS_MAX {
        return Err(Error::new(ErrorKind::Invalid, format!("the database URL has {count} hosts, over {HOSTS_MAX}")));
    }
    let given = |list: &[String], nth: usize| list.get(nth).filter(|member| !member.is_empty()).cloned();
    let mut places = Vec::with_capacity(count);
    for nth in 0..count {
        let port = given(ports, if ports.len() == 1 { 0 } else { nth });
        let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| invalid_value("port")))?;
        let address = given(addresses, nth);
        let name = given(names, nth).or_else(|| address.clone()).unwrap_or_else(|| local_host(port));
        let address = address.map(|address| address.parse().map_err(|_| invalid_value("hostaddr"))).transpose()?;
        places.push((name, address, port));
    }
    Ok(places)
}

fn host(common: &Config, settings: &Settings, name: String, address: Option<IpAddr>, port: u16) -> Host {
    let mut config = common.clone();
    config.host(&name).port(port);
    if let Some(address) = address {
        config.hostaddr(address);
    }
    // There is no TLS on a Unix socket, whatever is asked for.
    let is_local = is_socket(&name) && address.is_none();
    config.ssl_mode(if is_local { SslMode::Disable } else { settings.mode.negotiated() });
    Host { name, port, config }
}

fn look_up_passwords(hosts: &mut [Host], text: &str) {
    for host in hosts {
        let user = host.config.get_user().unwrap_or_default();
        let database = host.config.get_dbname().unwrap_or(user);
        let name = if SOCKET_DIRECTORIES.contains(&&*host.name) { "localhost" } else { &host.name };
        let found = password_file::find(text, Login { host: name, port: host.port, database, user });
        if let Some(found) = found.filter(|found| !found.is_empty()) {
            host.config.password(found);
        }
    }
}

/// The host where none is named: a directory with the socket of a server, or where it would be.
fn local_host(port: u16) -> String {
    if cfg!(not(unix)) {
        return "localhost".to_owned();
    }
    let has_socket = |directory: &&str| Path::new(directory).join(format!(".s.PGSQL.{port}")).exists();
    SOCKET_DIRECTORIES.into_iter().find(has_socket).unwrap_or(SOCKET_DIRECTORIES[0]).to_owned()
}

fn is_socket(host: &str) -> bool {
    cfg!(unix) && host.starts_with('/')
}

/// A file below the home directory of the user.
fn home_file(path: &[&str]) -> Option<PathBuf> {
    let home = std::env::home_dir().filter(|home| home.is_absolute())?;
    Some(path.iter().fold(home, |directory, name| directory.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_stage_is_what_is_kept_of_a_long_application_name() {
        let target = Target::read(&format!("postgresql://db?application_name={}", "\u{e9}".repeat(40))).expect("a URL");
        let stage = "counter".repeat(4);
        let named = target.for_stage(&stage);
        let name = named.hosts[0].config.get_application_name().expect("a name");
        assert!(name.len() <= APPLICATION_NAME_BYTES_MAX && name.ends_with(&format!(" {stage}")), "{name}");
        assert!(target.for_stage(&"c".repeat(300)).common.get_application_name().is_some());
    }
}
