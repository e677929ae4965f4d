//! Somebody in between who shows a certificate without having its key.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ServerConfig, ServerConnection, SupportedProtocolVersion};

use super::{assert_says, refused};

/// How a client asks for TLS: the length of the message, and its code.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Shows the certificate of one key and signs with another one.
fn tls(version: &'static SupportedProtocolVersion) -> ServerConfig {
    let shown = KeyPair::generate().expect("a key");
    let certificate = CertificateParams::new(["db.example".to_owned()]).expect("names").self_signed(&shown);
    let own = KeyPair::generate().expect("a key").serialize_der();
    let provider = Arc::new(default_provider());
    let own = provider.key_provider.load_private_key(PrivateKeyDer::Pkcs8(own.into())).expect("a good key");
    let pair = CertifiedKey::new(vec![certificate.expect("a certificate").der().clone()], own);
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("it is supported")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(pair)))
}

/// Answers one client, as far as it goes along.
fn deceive(mut stream: TcpStream, config: ServerConfig) {
    let mut request = [0; SSL_REQUEST.len()];
    stream.read_exact(&mut request).expect("the client asks for TLS");
    assert_eq!(request, SSL_REQUEST);
    stream.write_all(b"S").expect("the client listens");
    let mut connection = ServerConnection::new(Arc::new(config)).expect("a good configuration");
    while connection.is_handshaking() && connection.complete_io(&mut stream).is_ok() {}
}

#[tokio::test]
async fn who_does_not_have_the_key_of_the_certificate_is_refused_also_where_it_is_not_verified() {
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let impostor = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client comes");
            deceive(stream, tls(version));
        });
        let error = refused(&format!("postgresql://user:secret@127.0.0.1:{port}/app?sslmode=require")).await;
        assert_says(&error, &["BadSignature"]);
        impostor.join().expect("it did not panic");
    }
}
