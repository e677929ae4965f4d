//! An endpoint for webhooks: a real HTTP server, which notes what it is sent, and answers as the message says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::Response;
use axum::serve::Listener;
use http_body_util::BodyExt;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// What a redirect leads to.
pub(crate) const ELSEWHERE: &str = "/elsewhere";
/// What the endpoint says beside its status.
pub(crate) const CONFIDENTIAL: &str = "confidential";

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Call {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("visible ASCII"))
    }
}

/// What is known of a message: how it was answered until now.
#[derive(Default)]
struct Known {
    calls: Vec<Call>,
    answered: BTreeMap<String, usize>,
}

/// The service. It ends with the test.
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    state: Served,
}

#[derive(Clone)]
struct Served {
    known: Arc<Mutex<Known>>,
    gate: watch::Sender<bool>,
}

impl Endpoint {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        Self::serve(listener, address)
    }

    /// The same with TLS, and the certificate of the authority to trust as PEM.
    pub(crate) async fn start_with_tls() -> (Self, String) {
        let mut authority = CertificateParams::new(Vec::new()).expect("no names");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("a key")).expect("signed");
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let certificate = certificate.signed_by(&key, &authority).expect("signed");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .expect("a certificate and its key");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        (Self::serve(Encrypted(listener, TlsAcceptor::from(Arc::new(config))), address), authority.pem())
    }

    fn serve<L: Listener>(listener: L, address: SocketAddr) -> Self
    where
        L::Addr: std::fmt::Debug,
    {
        let state = Served { known: Arc::default(), gate: watch::Sender::new(false) };
        let router = Router::new().fallback(answer).with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        Self { address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hooks?token=t", self.address)
    }

    /// The requests so far.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state.known.lock().expect("no panic").calls.clone()
    }

    /// The ids of the requests of a key, and their attempts.
    pub(crate) fn attempts_of(&self, key: &str) -> String {
        let calls = self.calls();
        let of_key = calls.iter().filter(|call| call.header("pgonce-key") == key);
        let attempts = of_key.map(|call| format!("{}:{}", call.header("webhook-id"), call.header("pgonce-attempt")));
        attempts.collect::<Vec<_>>().join(" ")
    }

    /// Lets the messages through that wait at the gate.
    pub(crate) fn open_gate(&self) {
        self.state.gate.send_replace(true);
    }
}

/// Answers with what stands in the payload's `answers`, one for each time that its id has come, the last one for all further
/// times: a status, or a status with `retry-after`, or a word. 200 without any.
async fn answer(State(state): State<Served>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let payload: Value = serde_json::from_slice(&body).expect("JSON");
    let call = Call { method, path: uri.to_string(), headers, body };
    let nth = {
        let mut known = state.known.lock().expect("no panic");
        let answered = known.answered.entry(call.header("webhook-id").to_owned()).or_default();
        let nth = *answered;
        *answered += 1;
        known.calls.push(call);
        nth
    };
    let answers = payload["answers"].as_array().cloned().unwrap_or_default();
    let answer = answers.get(nth).or(answers.last()).cloned().unwrap_or(Value::from(200));
    match answer.as_str() {
        Some("hang") => std::future::pending().await,
        Some("gate") => {
            state.gate.subscribe().wait_for(|is_open| *is_open).await.expect("the endpoint is there");
        }
        _ => {}
    }
    let status = answer["status"].as_u64().or(answer.as_u64()).unwrap_or(200);
    let status = StatusCode::from_u16(status.try_into().expect("small")).expect("a status");
    let mut response = Response::builder().status(status).header("location", ELSEWHERE);
    if let Some(wait) = answer["retry-after"].as_str() {
        response = response.header("retry-after", wait);
    }
    let body = match answer.as_str() {
        // Mapped, it does not know its length; and what it ends with never comes.
        Some("endless") => {
            Body::new(Body::from(CONFIDENTIAL).map_frame(std::convert::identity).with_trailers(std::future::pending()))
        }
        _ => Body::from(CONFIDENTIAL),
    };
    response.body(body).expect("a response")
}

/// A port behind TLS. A handshake that fails is the client's affair.
struct Encrypted(TcpListener, TlsAcceptor);

impl Listener for Encrypted {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, address)) = self.0.accept().await else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            if let Ok(stream) = self.1.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.0.local_addr()
    }
}
