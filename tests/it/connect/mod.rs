//! Connections as libpq has them: TLS, client certificates, the password file, several hosts, PgBouncer.

mod failure;
mod hosts;
mod impostor;
mod server;

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use pgonce::{Database, Error, ErrorKind, Schema};

use self::server::{NAME, PASSWORD, TlsServer, reach};
use crate::probe::{eventually, number};
use crate::programs::{Running, outcome, pgonce};

const ENCRYPTED: &str = "select count(*) from pg_stat_ssl where pid = pg_backend_pid() and ssl";

/// Whether a URL leads to a session with TLS.
async fn is_encrypted(url: &str) -> bool {
    let session = reach(url).await.unwrap_or_else(|error| panic!("{error:?}"));
    number(&session, ENCRYPTED).await == 1
}

/// Why a URL leads nowhere.
async fn refused(url: &str) -> Error {
    reach(url).await.err().unwrap_or_else(|| panic!("a session by {url}"))
}

/// The password, as it stands in a URL.
fn encoded_password() -> String {
    PASSWORD.replace(':', "%3A").replace('\\', "%5C").replace(' ', "%20")
}

#[track_caller]
fn assert_says(error: &Error, words: &[&str]) {
    let said = format!("{error} {}", error.hint().unwrap_or_default());
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
}

#[tokio::test]
async fn verify_full_wants_the_authority_and_the_name() {
    let server = TlsServer::get().await;
    let files = server.files("secured");
    let full = format!("sslmode=verify-full&sslrootcert={}", files.path("ca.crt"));
    for host in [NAME, "127.0.0.1"] {
        assert!(is_encrypted(&server.url("secured", host, &full)).await);
    }
    let error = refused(&server.url("secured", "localhost", &full)).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_says(&error, &["localhost", NAME, "subjectAltName", "verify-ca"]);
}

#[tokio::test]
async fn a_foreign_authority_is_refused_wherever_one_is_named() {
    let server = TlsServer::get().await;
    let files = server.files("secured");
    for mode in ["verify-full", "verify-ca", "require"] {
        let parameters = format!("sslmode={mode}&sslrootcert={}", files.path("foreign.crt"));
        let error = refused(&server.url("secured", NAME, &parameters)).await;
        assert_says(&error, &["UnknownIssuer", "sslrootcert"]);
    }
    // To verify in full is what the authorities of the operating system are for, and the default with them.
    refused(&server.url("secured", NAME, "sslrootcert=system")).await;
    let error = refused(&server.url("secured", NAME, "sslrootcert=system&sslmode=verify-ca")).await;
    assert_says(&error, &["sslmode=verify-full"]);
}

#[tokio::test]
async fn verify_ca_and_weaker_modes_do_not_look_at_the_name() {
    let server = TlsServer::get().await;
    let files = server.files("secured");
    for mode in ["verify-ca", "require", "prefer"] {
        let parameters = format!("sslmode={mode}&sslrootcert={}", files.path("ca.crt"));
        assert!(is_encrypted(&server.url("secured", "localhost", &parameters)).await, "{mode}");
    }
    for parameters in ["sslmode=require", "sslmode=prefer", ""] {
        assert!(is_encrypted(&server.url("secured", "localhost", parameters)).await, "{parameters}");
    }
}

#[tokio::test]
async fn a_server_that_wants_tls_refuses_others_and_says_why() {
    let server = TlsServer::get().await;
    let error = refused(&server.url("secured", "localhost", "sslmode=disable")).await;
    assert_says(&error, &["no encryption", "sslmode=require"]);
}

#[tokio::test]
async fn a_scenario_refuses_a_server_that_wants_tls_before_it_makes_anything() {
    let server = TlsServer::get().await;
    for (mode, code, words) in [
        ("verify-full&sslrootcert=system", 2, ["cannot do so with TLS", "sslmode=disable"]),
        ("require", 2, ["cannot do so with TLS", "sslmode=disable"]),
        ("prefer", 1, ["they do so without TLS", "no encryption"]),
    ] {
        let url = server.url("secured", "localhost", &format!("sslmode={mode}"));
        let output = outcome(&["scenario", "producer-retry", "--database-url", &url]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(code), &b""[..]), "{mode}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{mode}: {said}");
    }
    let made = "select count(*) from pg_namespace where nspname like 'pgonce%'";
    assert_eq!(number(&server.admin().await, made).await, 0);
}

#[tokio::test]
async fn prefer_goes_without_tls_where_the_server_wants_that() {
    let server = TlsServer::get().await;
    assert!(!is_encrypted(&server.url("unsecured", "localhost", "sslmode=prefer")).await);
    let error = refused(&server.url("unsecured", "localhost", "sslmode=require")).await;
    assert_says(&error, &["pg_hba.conf"]);
    let files = server.files("scrambled");
    let parameters = format!("sslmode=prefer&sslrootcert={}", files.path("foreign.crt"));
    assert!(!is_encrypted(&server.url(&format!("scrambled:{}", encoded_password()), NAME, &parameters)).await);
}

#[tokio::test]
async fn a_client_certificate_lets_in_where_it_is_wanted() {
    let server = TlsServer::get().await;
    let files = server.files("certified");
    let full = format!("sslmode=verify-full&sslrootcert={}", files.path("ca.crt"));
    let with = |certificate: &str, key: &str| {
        let parameters = format!("{full}&sslcert={}&sslkey={}", files.path(certificate), files.path(key));
        server.url("certified", NAME, &parameters)
    };
    assert!(is_encrypted(&with("certified.crt", "certified.key")).await);
    let error = refused(&server.url("certified", NAME, &full)).await;
    assert_says(&error, &["certificate", "sslcert", "sslkey"]);
    refused(&with("foreign-certified.crt", "foreign-certified.key")).await;
    let error = refused(&with("certified.crt", "foreign-certified.key")).await;
    assert_says(&error, &["certified.crt", "belong together"]);
}

#[tokio::test]
async fn a_file_that_does_not_do_is_named_with_what_is_wrong() {
    let server = TlsServer::get().await;
    let files = server.files("certified");
    let not_pem = files.write("not.pem", "secret");
    let broken = files.write("broken.pem", "-----BEGIN CERTIFICATE-----\nsecret\n");
    let open_key = files.write("open.key", &std::fs::read_to_string(files.path("certified.key")).expect("a key"));
    std::fs::set_permissions(&open_key, std::fs::Permissions::from_mode(0o644)).expect("changed");
    let (missing, certificate) = (files.path("missing"), files.path("certified.crt"));
    for (parameters, words) in [
        (format!("sslmode=verify-ca&sslrootcert={missing}"), [&*missing, "No such file"]),
        (format!("sslmode=verify-ca&sslrootcert={not_pem}"), [&*not_pem, "no certificate"]),
        (format!("sslmode=verify-ca&sslrootcert={broken}"), [&*broken, "sslrootcert"]),
        (format!("sslcert={certificate}&sslkey={missing}"), [&*missing, "No such file"]),
        (format!("sslcert={certificate}&sslkey={not_pem}"), [&*not_pem, "BEGIN PRIVATE KEY"]),
        (format!("sslcert={certificate}&sslkey={open_key}"), [&*open_key, "chmod 0600"]),
    ] {
        let error = refused(&server.url("certified", NAME, &parameters)).await;
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_says(&error, &words);
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}

#[tokio::test]
async fn a_password_comes_from_the_file_and_is_bound_to_the_channel() {
    let server = TlsServer::get().await;
    let files = server.files("scrambled");
    let escaped = PASSWORD.replace('\\', r"\\").replace(':', r"\:");
    let line = |host: &str, password: &str| format!("{host}:{}:pgonce:scrambled:{password}\n", server.port());
    let good = files.write("good", &format!("{}{}", line("elsewhere", "wrong"), line("localhost", &escaped)));
    let bad = files.write("bad", &line("*", "wrong"));
    let parameters = |file: &str| format!("sslmode=require&channel_binding=require&passfile={file}");
    assert!(is_encrypted(&server.url("scrambled", "localhost", &parameters(&good))).await);
    // What stands in the URL goes before the file, but an empty password is none.
    assert!(is_encrypted(&server.url("scrambled:", "localhost", &parameters(&good))).await);
    let error = refused(&server.url("scrambled:wrong", "localhost", &parameters(&good))).await;
    assert_says(&error, &["password authentication failed"]);
    let error = refused(&server.url("scrambled", "localhost", &parameters(&bad))).await;
    assert_says(&error, &["password authentication failed"]);
    let role = format!("scrambled:{}", encoded_password());
    assert!(is_encrypted(&server.url(&role, "localhost", &parameters(&bad))).await);
}

#[tokio::test]
async fn the_program_runs_over_verify_full_and_refuses_a_wrong_name() {
    let server = TlsServer::get().await;
    let files = server.files("secured");
    let admin = server.admin().await;
    admin.batch_execute("grant create on database pgonce to secured").await.expect("granted");
    let full = format!("sslmode=verify-full&sslrootcert={}", files.path("ca.crt"));
    let (right, wrong) = (server.url("secured", NAME, &full), server.url("secured", "localhost", &full));
    let outcome = |arguments: Vec<String>| async move {
        let run =
            move || pgonce(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).output().expect("it starts");
        tokio::task::spawn_blocking(run).await.expect("no panic")
    };
    let with = |command: &str, url: &str| vec![command.to_owned(), "--database-url".to_owned(), url.to_owned()];
    for command in ["init", "status"] {
        let ended = outcome(with(command, &right)).await;
        assert!(ended.status.success(), "{command}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    let mut arguments = with("run", &wrong);
    arguments.extend(["--word-count".to_owned(), "counter=words".to_owned()]);
    let start = |arguments: &[String]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(pgonce(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()))
    };
    let mut daemon = start(&arguments);
    let refuse = move || {
        let status = daemon.end();
        daemon.until_logged("subjectAltName");
        status.code()
    };
    assert_eq!(tokio::task::spawn_blocking(refuse).await.expect("no panic"), Some(1));
    arguments[2] = right;
    let mut daemon = start(&arguments);
    let run = move || {
        daemon.until_logged("running");
        daemon
    };
    let daemon = tokio::task::spawn_blocking(run).await.expect("no panic");
    let encrypted = "select count(*) from pg_stat_ssl join pg_stat_activity using (pid)
                     where usename = 'secured' and application_name like 'pgonce%' and ssl";
    eventually("it is connected", async || (number(&admin, encrypted).await > 0).then_some(())).await;
    tokio::task::spawn_blocking(move || daemon.finish()).await.expect("no panic");
}

#[test]
fn neither_the_url_nor_its_password_is_in_an_error_or_a_debug_text() {
    for url in [
        "postgresql://user:secret@db:port/app",
        "postgresql://user:secret@db/app?sslmode=secret",
        "postgresql://user:secret@db/app?colour=secret",
        "postgresql://user:secret@db,db/app?hostaddr=secret",
        "postgresql://user:secret@db/app?connect_timeout=secret",
        "host=db password=secret sslmode=verify-full sslrootcert=/nowhere",
    ] {
        let error = Database::connect(url, Schema::default(), 1).expect_err(url);
        let mut said = format!("{error} {error:?}");
        let mut next = std::error::Error::source(&error);
        while let Some(source) = next {
            said = format!("{said} {source} {source:?}");
            next = source.source();
        }
        assert!(!said.contains("secret"), "{said}");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let database = Database::connect("postgresql://user:secret@db/app", Schema::default(), 1).expect("a good URL");
    assert!(!format!("{database:?}").contains("secret"));
}
