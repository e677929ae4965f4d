//! What is said where there is no connection: to which server and database, why, and what helps.

use std::io::{Read, Write};
use std::net::TcpListener;

use super::server::{NAME, PASSWORD, TlsServer};
use super::{assert_says, encoded_password, refused};
use crate::programs::outcome;

/// Somebody who gives each of some clients the same answer to whatever it says first, and hangs up; its port.
fn stranger(answer: &'static [u8], clients: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    std::thread::spawn(move || {
        for _ in 0..clients {
            let (mut stream, _) = listener.accept().expect("a client comes");
            let mut request = [0; 64];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer);
        }
    });
    port
}

#[tokio::test]
async fn a_password_that_is_wrong_or_missing_is_said_with_the_place_and_the_ways_to_give_it() {
    let server = TlsServer::get().await;
    let place = format!("database \"pgonce\" at localhost:{}", server.port());
    for (role, why) in [("scrambled:wrong", "password authentication failed"), ("scrambled", "password missing")] {
        let error = refused(&server.url(role, "localhost", "sslmode=require&passfile=/nowhere")).await;
        assert_says(&error, &[&*place, why, "PGPASSWORD", "~/.pgpass", "--database-url-file"]);
        let said = format!("{error} {error:?}");
        assert!(!said.contains("wrong") && !said.contains(PASSWORD), "{said}");
    }
    let wrong = server.url("scrambled:wrong", "localhost", "sslmode=require");
    let run = move || outcome(&["status", "--database-url", &wrong]);
    let output = tokio::task::spawn_blocking(run).await.expect("no panic");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&place) && said.contains("PGPASSWORD"), "{said}");
}

#[tokio::test]
async fn a_database_or_a_role_that_is_not_there_is_told_from_a_refusal() {
    let server = TlsServer::get().await;
    let local = server.local_url();
    let error = refused(&format!("{local} dbname=nowhere")).await;
    assert_says(&error, &[".s.PGSQL.", "database \"nowhere\"", "createdb"]);
    let error = refused(&format!("{local} user=nobody")).await;
    assert_says(&error, &["role \"nobody\" does not exist", "create the role"]);
    let role = format!("scrambled:{}", encoded_password());
    let error = refused(&server.url("unsecured", NAME, "sslmode=require")).await;
    assert_says(&error, &["pg_hba.conf"]);
    let error = refused(&server.url(&role, NAME, "sslmode=disable").replace("/pgonce?", "/nowhere?")).await;
    assert_says(&error, &["createdb"]);
}

#[tokio::test]
async fn a_server_without_tls_is_told_from_one_that_is_none() {
    let port = stranger(b"N", 1);
    let error = refused(&format!("postgresql://user@127.0.0.1:{port}/app?sslmode=require")).await;
    assert_says(&error, &["does not support TLS", "Turn on ssl", "sslmode=prefer"]);
    for answer in [b"" as &[u8], b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n"] {
        for mode in ["disable", "prefer"] {
            let port = stranger(answer, 1);
            let error = refused(&format!("postgresql://user@127.0.0.1:{port}/app?sslmode={mode}")).await;
            assert_says(&error, &[&format!("at 127.0.0.1:{port}"), "it may not be PostgreSQL"]);
        }
    }
}

#[tokio::test]
async fn a_host_that_nobody_knows_is_said_with_what_a_password_may_have_done() {
    let error = refused("postgresql://user:secret@no..such..host/app").await;
    assert_says(&error, &["no..such..host:5432", "%40"]);
    let error = refused("host=127.0.0.1,127.0.0.1 port=1,2 user=user password=secret").await;
    assert_says(&error, &["database \"user\" at 127.0.0.1:1, 127.0.0.1:2", "Is the server running"]);
}
