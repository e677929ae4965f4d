//! A server that listens on a TCP port, with TLS and an authority of its own, and files for its clients.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::OnceLock;

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Database, Error, Schema, Session};
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::probe::eventually;

/// The name, beside 127.0.0.1, that the server's certificate is for.
pub(super) const NAME: &str = "db.example";
/// What the role `scrambled` is let in by.
pub(super) const PASSWORD: &str = "p:a\\ss'w rd";
/// Attempts to start on a port that was free a moment before.
const STARTS_MAX: usize = 5;

/// Who is let in, and how: by the name of the role.
const ACCESS: &str = "
local     all all                 trust
hostssl   all secured   127.0.0.1/32 trust
hostnossl all unsecured 127.0.0.1/32 trust
hostssl   all certified 127.0.0.1/32 cert
host      all scrambled 127.0.0.1/32 scram-sha-256
";

/// The server of this run. It is never dropped: its guardian stops it when the process ends.
static SERVER: OnceLock<TlsServer> = OnceLock::new();

pub(super) struct TlsServer {
    private: PrivateServer,
    port: u16,
    authority: Issuer<'static, KeyPair>,
    authority_pem: String,
}

impl TlsServer {
    /// The server, ready for its clients.
    pub(super) async fn get() -> &'static Self {
        let server =
            tokio::task::spawn_blocking(|| SERVER.get_or_init(Self::start)).await.expect("the server is there");
        let client = server.admin().await;
        eventually("it has TLS", async || {
            let row = client.query_one("select current_setting('ssl') = 'on'", &[]).await.expect("an answer");
            row.get::<_, bool>(0).then_some(())
        })
        .await;
        server
    }

    fn start() -> Self {
        let (authority, authority_pem) = authority("the authority of the tests");
        let (private, port) = listening();
        let data = private.directory().join("data");
        let mut params = CertificateParams::new([NAME.to_owned(), "127.0.0.1".to_owned()]).expect("names");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (certificate, key) = signed(&params, &authority);
        std::fs::write(data.join("pg_hba.conf"), ACCESS).expect("written");
        for (name, text) in
            [("server.crt", certificate.pem()), ("server.key", key.serialize_pem()), ("ca.crt", authority_pem.clone())]
        {
            write_private(&data.join(name), &text);
            let owner = data.metadata().expect("it is there");
            chown(data.join(name), Some(owner.uid()), Some(owner.gid())).expect("its owner's, or root's to give away");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let server = Self { private, port, authority, authority_pem };
        runtime.block_on(async {
            let admin = server.admin().await;
            let quoted = PASSWORD.replace('\'', "''");
            for statement in [
                "create role secured login in role pgonce",
                "create role unsecured login",
                "create role certified login",
                &format!("create role scrambled login password '{quoted}'"),
                "alter system set ssl_ca_file = 'ca.crt'",
                "alter system set ssl = on",
                "select pg_reload_conf()",
            ] {
                admin.batch_execute(statement).await.expect("a superuser may");
            }
        });
        server
    }

    /// A connection of the superuser, over the Unix socket.
    pub(super) async fn admin(&self) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.local_url(), NoTls).await.expect("it is running");
        tokio::spawn(connection);
        client
    }

    /// The superuser's way, over the Unix socket.
    pub(super) fn local_url(&self) -> String {
        format!("host={} port={} user=pgonce dbname=pgonce", self.private.directory().display(), self.port)
    }

    /// A role's way, over TCP, by some name of the server.
    pub(super) fn url(&self, role: &str, host: &str, parameters: &str) -> String {
        format!("postgresql://{role}@{host}:{}/pgonce?hostaddr=127.0.0.1&{parameters}", self.port)
    }

    /// The directory of its Unix socket.
    pub(super) fn directory(&self) -> &Path {
        self.private.directory()
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Files for clients: `ca.crt`, `foreign.crt`, and `ROLE.crt` with `ROLE.key`, of this authority and of a foreign one
    /// (`foreign-ROLE.crt`, `foreign-ROLE.key`).
    pub(super) fn files(&self, role: &str) -> Files {
        let directory = tempfile::tempdir().expect("a directory");
        let (foreign, foreign_pem) = authority("another authority");
        write_private(&directory.path().join("ca.crt"), &self.authority_pem);
        write_private(&directory.path().join("foreign.crt"), &foreign_pem);
        for (prefix, issuer) in [("", &self.authority), ("foreign-", &foreign)] {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, role);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            let (certificate, key) = signed(&params, issuer);
            write_private(&directory.path().join(format!("{prefix}{role}.crt")), &certificate.pem());
            write_private(&directory.path().join(format!("{prefix}{role}.key")), &key.serialize_pem());
        }
        Files(directory)
    }
}

/// Files of a client; removed when dropped.
pub(super) struct Files(TempDir);

impl Files {
    /// The path of a file, which need not exist.
    pub(super) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("text").to_owned()
    }

    /// Writes a file that only its owner may read.
    pub(super) fn write(&self, name: &str, text: &str) -> String {
        write_private(&self.0.path().join(name), text);
        self.path(name)
    }
}

/// A server that listens on a free TCP port.
fn listening() -> (PrivateServer, u16) {
    for _ in 0..STARTS_MAX {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("it is bound").port();
        drop(free);
        let settings = [("listen_addresses", "127.0.0.1"), ("port", &port.to_string())];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        if let Ok(private) = PrivateServer::start(&Options { settings }) {
            return (private, port);
        }
    }
    panic!("no server starts on a free port");
}

/// A session by a URL.
pub(super) async fn reach(url: &str) -> Result<Session, Error> {
    Database::connect(url, Schema::default(), 1)?.session().await
}

fn authority(name: &str) -> (Issuer<'static, KeyPair>, String) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().expect("a key");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    (Issuer::new(params, key), pem)
}

fn signed(params: &CertificateParams, issuer: &Issuer<'static, KeyPair>) -> (Certificate, KeyPair) {
    let key = KeyPair::generate().expect("a key");
    (params.signed_by(&key, issuer).expect("a certificate"), key)
}

fn write_private(path: &Path, text: &str) {
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("changed");
}
