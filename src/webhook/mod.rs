//! Webhooks: the external handler that is built in. It sends each message as a POST, signed as
//! [Standard Webhooks](https://www.standardwebhooks.com) has it.
//!
//! Invariants: the payload goes out as it is stored, byte for byte, since it is what is signed. All attempts of a message
//! bear its id. What is connected to is an address that was checked, whatever the name of the endpoint resolves to by then.
//! Neither the URL's path, which may hold a secret, nor anything that the endpoint says but its status gets into an error or
//! a log.
//!
//! Deliberately absent: redirects and proxies, which would decide where messages go in our place; HTTP/2, since each
//! connection has one request at a time.

mod address;
mod answer;
mod signature;

use std::error::Error as StdError;
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use http::header::{CONTENT_TYPE, USER_AGENT};
use http::uri::Scheme;
use http::{Request, Uri};
use http_body_util::{BodyExt, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use rustls::RootCertStore;
use serde_json::value::RawValue;

use self::address::Resolver;
use self::signature::Signer;
use crate::connect::{system_certificates, verifying};
use crate::consume::{ExternalHandler, HandlerError};
use crate::error::{Error, ErrorKind};
use crate::lease::Epoch;
use crate::message::Received;

/// How long to find an address may take, and to connect to it, where nothing else is said.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection is kept for the next message. Some servers close theirs after 5 s, and one that is just being closed
/// costs an attempt.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// How much of an answer's body is read, only so that its connection can be used again.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// How long that may take.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// What a header of ours cannot hold as it is, and the sign that stands for it.
const KEY_ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');
/// The same for the id, and what separates it from the rest of what is signed.
const ID_ENCODED: &AsciiSet = &KEY_ENCODED.add(b'.');

/// What a [`Webhook`] may do, and how long it waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WebhookSettings {
    /// How long to find the address of the endpoint may take, and again to connect to it; 10 s. The whole request may take as
    /// long as a message may: [`message_timeout`](crate::Consumer::message_timeout).
    pub connect_timeout: Option<Duration>,
    /// Whether the endpoint may be without TLS.
    pub allow_http: bool,
    /// Whether the endpoint may have an address that is not public: one of a private network, of this machine, or of the
    /// cloud's own services.
    pub allow_private_addresses: bool,
}

/// Sends each message to an HTTP endpoint, as a POST with the headers and the signature of
/// [Standard Webhooks](https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md). At least
/// once: the endpoint deduplicates on the message id.
///
/// ```
/// use pgonce::{Consumer, Webhook, WebhookSettings};
///
/// # let secret = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
/// let webhook = Webhook::new("http://shop.internal:8080/hooks", secret, WebhookSettings {
///     allow_http: true,
///     allow_private_addresses: true,
///     ..WebhookSettings::default()
/// })?;
/// let consumer = Consumer::external("shop", webhook);
/// # drop(consumer);
/// # Ok::<(), pgonce::Error>(())
/// ```
///
/// | header | what it says |
/// |---|---|
/// | `webhook-id` | The message id, the same at each attempt: the idempotency key. |
/// | `webhook-timestamp` | When this attempt began, in seconds since 1970, by this machine's clock. |
/// | `webhook-signature` | `v1,` and the base64 form of the HMAC-SHA256 of `id.timestamp.body`, once for each secret. |
/// | `pgonce-attempt` | Its failed attempts, and this one; an attempt that a crash cut short is not always counted. |
/// | `pgonce-partition`, `pgonce-epoch` | Of two requests of a partition, the one with the higher [`Epoch`] is right. |
/// | `pgonce-key` | The message's key, if it has one. |
///
/// In an id or a key all but visible ASCII, and `%`, is percent-encoded; in an id also the full stop, which separates what is
/// signed. The body is the payload, `application/json`. Headers of the message are not sent.
///
/// A status from 200 to 299 is success. Any other from 400 to 499 is a [permanent](crate::Failure::permanent) failure, but
/// for 408, 425 and 429; these, all others (redirects, which are not followed, too), and no answer are tried again: after the
/// time of `Retry-After`, a day at the most, or after the consumer's backoff. An endpoint that is down for longer than a
/// message's attempts take gets its messages by a replay of the dead letters: give the consumer attempts and a backoff for
/// it ([`ConsumerSettings`](crate::ConsumerSettings)).
///
/// Certificates are checked by the authorities that the operating system trusts; `SSL_CERT_FILE` in the environment names a
/// file of others. Proxies that the environment names are not used.
pub struct Webhook {
    endpoint: Uri,
    signers: Vec<Signer>,
    client: Client<HttpsConnector<HttpConnector<Resolver>>, String>,
}

impl Webhook {
    /// A webhook to that URL. Secrets are those of Standard Webhooks (`whsec_…`), separated by blanks or line breaks: each
    /// message is signed with all of them, so that one can be replaced by another while both are known.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid): a URL that is not `https`, that names a user, or an address that is not public, unless
    /// the settings allow it; something that is no secret; or no authorities to check certificates by.
    pub fn new(url: &str, secrets: &str, settings: WebhookSettings) -> Result<Self, Error> {
        let endpoint = settings.endpoint(url)?;
        let signers = signature::signers(secrets)?;
        let connect_timeout = settings.connect_timeout.unwrap_or(CONNECT_TIMEOUT);
        let resolver = Resolver { longest: connect_timeout, allow_private_addresses: settings.allow_private_addresses };
        let mut connector = HttpConnector::new_with_resolver(resolver);
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect_timeout));
        let has_tls = endpoint.scheme() == Some(&Scheme::HTTPS);
        // Without TLS nobody has to be trusted, and there need not be a store of certificates.
        let roots = if has_tls { system_certificates()? } else { RootCertStore::empty() };
        let tls = HttpsConnectorBuilder::new().with_tls_config(verifying(roots)?);
        let tls = if has_tls { tls.https_only() } else { tls.https_or_http() };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .build(tls.enable_http1().wrap_connector(connector));
        Ok(Self { endpoint, signers, client })
    }

    fn request(
        &self,
        message: Received<Box<RawValue>>,
        epoch: Epoch,
        now: SystemTime,
    ) -> http::Result<Request<String>> {
        let id = utf8_percent_encode(message.message_id.as_str(), ID_ENCODED).to_string();
        let timestamp = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let body = String::from(Box::<str>::from(message.payload));
        let mut request = Request::post(self.endpoint.clone())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("pgonce/", env!("CARGO_PKG_VERSION")))
            .header("webhook-signature", signature::signatures(&self.signers, &id, timestamp, &body))
            .header("webhook-id", id)
            .header("webhook-timestamp", timestamp)
            .header("pgonce-attempt", message.attempt)
            .header("pgonce-partition", message.partition.0)
            .header("pgonce-epoch", epoch.0);
        if let Some(key) = &message.key {
            request = request.header("pgonce-key", utf8_percent_encode(key, KEY_ENCODED).to_string());
        }
        request.body(body)
    }
}

impl ExternalHandler for Webhook {
    type Payload = Box<RawValue>;

    async fn handle(&self, message: Received<Box<RawValue>>, epoch: Epoch) -> Result<(), HandlerError> {
        let request = self.request(message, epoch, SystemTime::now())?;
        let answered = self.client.request(request).await;
        let (head, body) = answered.map_err(|error| self.no_answer(error))?.into_parts();
        // Read so that the connection can be used again; what comes late is of no interest, and ends with the connection.
        tokio::spawn(tokio::time::timeout(ANSWER_MAX, Limited::new(body, ANSWER_BYTES_MAX).collect()));
        answer::judge(head.status, &head.headers, SystemTime::now())
    }
}

impl Webhook {
    fn no_answer(&self, error: hyper_util::client::legacy::Error) -> NoAnswer {
        NoAnswer { host: self.endpoint.host().unwrap_or_default().to_owned(), error }
    }
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the secrets nor the path, which may be one.
        f.debug_struct("Webhook").field("host", &self.endpoint.host()).finish_non_exhaustive()
    }
}

impl WebhookSettings {
    /// What is called, or why it must not be. The errors do not quote the URL: it may hold a secret.
    pub(crate) fn endpoint(&self, url: &str) -> Result<Uri, Error> {
        let refused = |why: &str, hint: &str| {
            Err(Error::new(ErrorKind::Invalid, format!("a webhook's url {why}")).with_hint(hint))
        };
        let Ok(uri) = url.parse::<Uri>() else {
            return refused(
                "cannot be read",
                "It is like https://shop.example/hooks, in ASCII: xn--… for other names, %… elsewhere.",
            );
        };
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") if self.allow_http => {}
            Some("http") => {
                return refused(
                    "begins with http://, and what is sent could be read on its way",
                    "Write https://, or set allow_http = true where the network is trusted.",
                );
            }
            Some(other) => return refused(&format!("begins with {other}://"), "It begins with https://."),
            None => return refused("begins with no scheme", "It begins with https://."),
        }
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return refused(
                "holds a user or a password",
                "Remove what stands in front of the @: the signature says who is calling.",
            );
        }
        let host = uri.host().unwrap_or_default();
        // What is no port would be taken for none, and something else be called.
        let behind = uri.authority().map_or("", |authority| authority.as_str().strip_prefix(host).unwrap_or_default());
        if !behind.is_empty() && uri.port_u16().is_none_or(|port| port == 0) {
            return refused(
                "has no port behind its colon",
                "A port is a number from 1 to 65535; without one it is 443.",
            );
        }
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        match address {
            Ok(address) if !self.allow_private_addresses && !address::is_public(address) => refused(
                &format!("has the address {address}, which is not public"),
                "Where the endpoint is one of yours, set allow_private_addresses = true.",
            ),
            _ => Ok(uri),
        }
    }
}

/// The endpoint said nothing.
#[derive(Debug)]
struct NoAnswer {
    host: String,
    error: hyper_util::client::legacy::Error,
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no answer from {}", self.host)
    }
}

impl StdError for NoAnswer {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // Its own text says nothing more.
        self.error.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_not_to_be_called_is_refused_and_not_quoted() {
        let lax = WebhookSettings { allow_http: true, allow_private_addresses: true, ..WebhookSettings::default() };
        for (url, reason) in [
            ("https://shop.example/a b/geheim", "cannot be read"),
            ("https:///geheim", "cannot be read"),
            ("https://sh\u{f6}p.example/geheim", "cannot be read"),
            ("ftp://shop.example/geheim", "begins with ftp://"),
            ("file:///geheim", "cannot be read"),
            ("/geheim", "no scheme"),
            ("shop.example", "no scheme"),
            ("https://me:geheim@shop.example/", "a user or a password"),
            ("https://geheim@shop.example/", "a user or a password"),
        ] {
            for settings in [WebhookSettings::default(), lax] {
                let error = settings.endpoint(url).expect_err("refused");
                assert_eq!(error.kind(), ErrorKind::Invalid);
                assert!(error.to_string().contains(reason) && error.hint().is_some(), "{url}: {error}");
                assert!(!format!("{error} {error:?}").contains("geheim"), "{error:?}");
            }
        }
        for (url, reason) in [
            ("http://shop.example/", "http://"),
            ("https://127.0.0.1/", "127.0.0.1, which is not public"),
            ("https://[::1]:8443/", "::1, which is not public"),
            ("https://[::ffff:8.8.8.8]/", "not public"),
            ("https://169.254.169.254/latest", "not public"),
        ] {
            let error = WebhookSettings::default().endpoint(url).expect_err("refused");
            assert!(error.to_string().contains(reason), "{url}: {error}");
            lax.endpoint(url).expect("allowed");
        }
        for url in [
            "https://shop.example",
            "HTTPS://shop.example:8443/hooks?token=a",
            "https://8.8.8.8/",
            "https://[2606:4700::1]/",
        ] {
            WebhookSettings::default().endpoint(url).expect("allowed");
        }
    }
}
