//! TLS as libpq's `sslmode` has it, by rustls.
//!
//! | `sslmode` | TLS | what is checked of the server's certificate |
//! |---|---|---|
//! | `disable` | no | |
//! | `prefer` | where both sides can | as with `require`; where that fails, no TLS |
//! | `require` | yes | nothing; its chain, where there are root certificates |
//! | `verify-ca` | yes | its chain |
//! | `verify-full` | yes | its chain and its name |
//!
//! Invariant: whatever is not checked of a certificate, the server has to sign the handshake with its key; channel
//! binding hangs on that. Deliberately absent: revocation lists, keys that are encrypted, and the common name of a
//! certificate, which rustls does not take for the name of a server.

use std::error::Error as StdError;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::parameters::Parameters;
use crate::error::{Error, ErrorKind};

/// Largest file of certificates, or of a key, that is read.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// The protocol's name in the handshake, without which a server refuses `sslnegotiation=direct`.
const ALPN: &[u8] = b"postgresql";
/// What `sslrootcert` says for the authorities that the operating system trusts.
const SYSTEM: &str = "system";

/// How much TLS is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// What the parameters say about TLS; the files that they name are not read yet.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) mode: Mode,
    root_certificates: Option<String>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Mode {
    /// What the driver has to know of it.
    pub(super) fn negotiated(self) -> SslMode {
        match self {
            Self::Disable => SslMode::Disable,
            Self::Prefer => SslMode::Prefer,
            Self::Require | Self::VerifyCa | Self::VerifyFull => SslMode::Require,
        }
    }

    fn read(name: &str) -> Result<Self, Error> {
        Ok(match name {
            "disable" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => {
                return Err(Error::new(ErrorKind::Invalid, "the database URL has an sslmode that there is not")
                    .with_hint("It is one of disable, prefer, require, verify-ca and verify-full."));
            }
        })
    }
}

impl Settings {
    /// Takes the parameters that are about TLS. Files that they do not name are looked for where libpq does.
    pub(super) fn take(parameters: &mut Parameters) -> Result<Self, Error> {
        let given = parameters.take("sslmode").map(|name| Mode::read(&name)).transpose()?;
        let default = |name| super::home_file(&[".postgresql", name]).filter(|path| path.is_file());
        let root_certificates = parameters.take("sslrootcert");
        let is_system = root_certificates.as_deref() == Some(SYSTEM);
        let mode = given.unwrap_or(if is_system { Mode::VerifyFull } else { Mode::Prefer });
        if is_system && !matches!(mode, Mode::VerifyFull | Mode::Disable) {
            // Anybody can get a certificate of such an authority, for a name of their own.
            return Err(Error::new(ErrorKind::Invalid, "sslrootcert=system needs sslmode=verify-full"));
        }
        Ok(Self {
            mode,
            root_certificates: root_certificates
                .or_else(|| default("root.crt").and_then(|path| path.into_os_string().into_string().ok())),
            certificate: parameters.take("sslcert").map(PathBuf::from).or_else(|| default("postgresql.crt")),
            key: parameters.take("sslkey").map(PathBuf::from).or_else(|| default("postgresql.key")),
        })
    }

    /// Reads the files.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if a file cannot be read, holds something else, or lacks beside the others.
    pub(super) fn connector(&self) -> Result<MakeRustlsConnect, Error> {
        let provider = Arc::new(ring::default_provider());
        let roots = self.root_certificates.as_deref().map(root_certificates).transpose()?;
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::new(ErrorKind::Defect, format!("TLS cannot be set up: {error}")))?;
        let builder = match (self.mode, roots) {
            (Mode::VerifyFull, Some(roots)) => builder.with_root_certificates(roots),
            (Mode::VerifyFull | Mode::VerifyCa, None) => {
                return Err(Error::new(ErrorKind::Invalid, "there are no root certificates to verify the server's by")
                    .with_hint(
                        "sslrootcert names the file with them (or ~/.postgresql/root.crt is there); \
                         sslrootcert=system takes those of the operating system.",
                    ));
            }
            (_, roots) => {
                let verifier = Arc::new(AnyName { roots, provider });
                builder.dangerous().with_custom_certificate_verifier(verifier)
            }
        };
        let mut config = match &self.certificate {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let Some(key) = &self.key else {
                    return Err(unusable(path, "its key is not known").with_hint("sslkey names the file of the key."));
                };
                builder.with_client_auth_cert(certificates(path)?, private_key(key)?).map_err(|error| {
                    unusable(path, &error.to_string()).with_hint("sslcert and sslkey have to belong together.")
                })?
            }
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(MakeRustlsConnect::new(config))
    }
}

/// The error of the TLS library that a failure comes from.
pub(super) fn failure(error: &tokio_postgres::Error) -> Option<&rustls::Error> {
    let mut next: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(cause) = next {
        if let Some(failure) = cause.downcast_ref() {
            return Some(failure);
        }
        // An I/O error does not count what it holds among its sources.
        let held = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = held.map(|held| held as &(dyn StdError + 'static)).or_else(|| cause.source());
    }
    None
}

/// What to do about such an error.
pub(super) fn hint(failure: &rustls::Error) -> &'static str {
    use CertificateError::{NotValidForName, NotValidForNameContext, UnknownIssuer};
    match failure {
        rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. }) => {
            "The server's certificate is for another name. Connect by one of its alternative names (subjectAltName), \
             or check less with sslmode=verify-ca."
        }
        rustls::Error::InvalidCertificate(UnknownIssuer) => {
            "sslrootcert has to name the certificate of the authority that signed the server's."
        }
        rustls::Error::InvalidCertificate(_) => {
            "The server needs another certificate: a valid one, which an authority signed that is not itself."
        }
        rustls::Error::AlertReceived(_) => {
            "The server refused. If it wants a certificate, sslcert and sslkey name it and its key."
        }
        _ => "Client and server have to have a version of TLS and a cipher in common; TLS 1.2 is the oldest.",
    }
}

/// Checks the chain of a certificate where there are roots, and never its name.
#[derive(Debug)]
struct AnyName {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn root_certificates(place: &str) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    if place == SYSTEM {
        return system_certificates();
    }
    let path = Path::new(place);
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(path, &error.to_string()))?;
    }
    Ok(roots)
}

/// Those of the authorities that the operating system trusts.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if there are none.
pub(crate) fn system_certificates() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(|| "it is empty".to_owned(), ToString::to_string);
        let message = format!("the operating system's store of certificates cannot be used: {why}");
        return Err(Error::new(ErrorKind::Invalid, message).with_hint(
            "Install it (on Debian: ca-certificates), or name a file: in SSL_CERT_FILE, or, for the database, in sslrootcert.",
        ));
    }
    Ok(roots)
}

/// TLS with servers whose certificates are for their names, and signed by one of these authorities.
#[cfg(feature = "webhook")]
pub(crate) fn verifying(roots: RootCertStore) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::new(ErrorKind::Defect, format!("TLS cannot be set up: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The certificates of a file, of which there is at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match found {
        Ok(found) if found.is_empty() => Err(unusable(path, "it holds no certificate")
            .with_hint("It has to hold PEM: -----BEGIN CERTIFICATE-----, and so on.")),
        Ok(found) => Ok(found),
        Err(error) => Err(unusable(path, &error.to_string())),
    }
}

/// The key of a file, which must not be for everybody to read.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let text = read(path)?;
    check_privacy(path)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        unusable(path, &error.to_string())
            .with_hint("It has to hold a key as PEM, unencrypted: -----BEGIN PRIVATE KEY-----, and so on.")
    })
}

/// The owner's alone, or root's with a group that may read it, as libpq demands.
#[cfg(unix)]
fn check_privacy(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::MetadataExt;

    let metadata = std::fs::metadata(path).map_err(|error| unusable(path, &error.to_string()))?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.is_file() && metadata.mode() & forbidden != 0 {
        return Err(unusable(path, "others may read this key").with_hint("chmod 0600 makes it private."));
    }
    Ok(())
}

/// Elsewhere the directory of a user is private.
#[cfg(not(unix))]
fn check_privacy(_: &Path) -> Result<(), Error> {
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |error: std::io::Error| unusable(path, &error.to_string());
    let mut bytes = Vec::new();
    let length = File::open(path).map_err(failed)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if length as u64 > FILE_BYTES_MAX {
        return Err(unusable(path, "it is larger than 4 MiB"));
    }
    Ok(bytes)
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("{} cannot be used for TLS: {why}", path.display()))
        .with_hint("sslrootcert, sslcert and sslkey name files for TLS; sslmode=disable does without.")
}
