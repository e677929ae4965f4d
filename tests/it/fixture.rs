//! The one place for fixtures: a server, and databases on it.
//!
//! There is one server a run: the one that `PGONCE_TEST_DATABASE_URL` names; else one in a container, where
//! `PGONCE_TEST_IMAGE` names an image and a Docker engine answers; else a private one. The last two end with the
//! process. `DATABASE_URL` is never looked at, because people keep a real one there. Each test makes a [`TestDatabase`]
//! of its own, so tests run in parallel and see nothing of each other (apart from transaction ids, which a server has
//! in common).

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Database, Schema, migrate};
use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

use crate::docker::Container;

/// The server of this run. It is never dropped: its guardian, or its container's owner, ends it when the process ends.
static SERVER: OnceCell<Server> = OnceCell::const_new();
/// Name of a database in which the schema is installed and to which nobody is connected.
static TEMPLATE: OnceCell<String> = OnceCell::const_new();

struct Server {
    url: String,
    _container: Option<Container>,
    _private: Option<PrivateServer>,
}

/// A database of one test, with the schema installed. It is dropped with this value, whoever is still connected.
#[derive(Debug)]
pub(crate) struct TestDatabase {
    name: String,
    /// For whatever connects by itself.
    pub(crate) url: String,
}

impl TestDatabase {
    /// Makes a new database as a copy of the template.
    pub(crate) async fn new() -> Self {
        let server = server_url().await;
        let template = TEMPLATE.get_or_init(|| make_template(server)).await;
        let name = unique_name();
        let (admin, _) = connect(server).await;
        create_database(&admin, &name, &format!(r#"template "{template}""#)).await;
        let url = url_of(server, &name);
        Self { name, url }
    }

    /// Opens a connection of its own.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.url).await.0
    }

    /// Makes a new database without the schema.
    pub(crate) async fn empty() -> Self {
        let server = server_url().await;
        let name = unique_name();
        let (admin, _) = connect(server).await;
        create_database(&admin, &name, "").await;
        let url = url_of(server, &name);
        Self { name, url }
    }

    /// Opens a pool of up to `connections` connections.
    pub(crate) fn database(&self, connections: usize) -> Database {
        Database::connect(&self.url, Schema::default(), connections).expect("the URL of a test database is valid")
    }
}

impl Drop for TestDatabase {
    /// Best effort: a private server goes away as a whole, and on another one a database that is left over harms no one.
    fn drop(&mut self) {
        let drop_database = format!(r#"drop database if exists "{}" with (force)"#, self.name);
        let Some(server) = SERVER.get() else { return };
        // A thread with a runtime of its own: the runtime of the test may be at its end, and its thread must not block.
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (admin, _) = connect(&server.url).await;
                admin.batch_execute(&drop_database).await.map_err(std::io::Error::other)
            })
        });
        if !matches!(dropped.join(), Ok(Ok(()))) {
            eprintln!("database {} could not be dropped", self.name);
        }
    }
}

async fn server_url() -> &'static str {
    &SERVER.get_or_init(start_server).await.url
}

async fn start_server() -> Server {
    if let Ok(url) = std::env::var("PGONCE_TEST_DATABASE_URL") {
        return Server { url, _container: None, _private: None };
    }
    if let Some(container) = Container::start().await {
        return Server { url: container.url.clone(), _container: Some(container), _private: None };
    }
    let private = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default()));
    let private = private.await.expect("no panic").expect("a private PostgreSQL server starts");
    Server { url: private.url("pgonce"), _container: None, _private: Some(private) }
}

/// Makes a database whose sessions do not find the schema of pgonce by themselves: a role of that name would.
async fn create_database(admin: &Client, name: &str, options: &str) {
    let create = format!(r#"create database "{name}" {options}"#);
    admin.batch_execute(&create).await.expect("the role may create databases");
    let settings = format!(r#"alter database "{name}" set search_path = public"#);
    admin.batch_execute(&settings).await.expect("the role owns the database");
}

async fn make_template(server: &str) -> String {
    let name = unique_name();
    let (admin, _) = connect(server).await;
    admin.batch_execute(&format!(r#"create database "{name}""#)).await.expect("the role may create databases");
    let (mut client, connection) = connect(&url_of(server, &name)).await;
    migrate(&mut client, &Schema::default()).await.expect("the schema can be installed");
    drop(client);
    connection.await.expect("the connection ends with its client");
    name
}

async fn connect(url: &str) -> (Client, tokio::task::JoinHandle<()>) {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("the server accepts connections");
    let task = tokio::spawn(async move {
        // A test that ends, or a database that is dropped, cuts connections.
        let _ = connection.await;
    });
    (client, task)
}

fn unique_name() -> String {
    format!("pgonce_test_{}", Uuid::now_v7().simple())
}

/// The URL of another database of the same server.
fn url_of(server: &str, database: &str) -> String {
    let Some((scheme, rest)) = server.split_once("://") else {
        // Keywords and values: the last one counts.
        return format!("{server} dbname={database}");
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let authority = path.split('/').next().unwrap_or("");
    let question_mark = if query.is_empty() { "" } else { "?" };
    format!("{scheme}://{authority}/{database}{question_mark}{query}")
}

#[test]
fn another_database_of_a_server_is_named_in_its_url() {
    for (server, other) in [
        ("postgresql://me@db:5432/mine?sslmode=disable", "postgresql://me@db:5432/x?sslmode=disable"),
        ("postgres://db", "postgres://db/x"),
        ("postgresql:///pgonce?host=/tmp/a&port=5432", "postgresql:///x?host=/tmp/a&port=5432"),
        ("host=db dbname=mine", "host=db dbname=mine dbname=x"),
    ] {
        assert_eq!(url_of(server, "x"), other);
    }
}
