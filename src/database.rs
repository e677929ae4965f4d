//! The way to the server: a pool, a schema, and sessions that never go back to the pool in doubt.
//!
//! Invariant: a connection returns to the pool only through [`Session::give_back`], which is called after the work on it
//! ended well. After an error, or when a future is dropped half way, the connection is closed instead: the server rolls
//! back whatever was open, and nobody inherits a transaction.
//!
//! Statements go out as `query_typed`: one round trip, no named prepared statement, so a PgBouncer in transaction mode
//! may stand in between.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use deadpool_postgres::{Hook, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use tokio_postgres::{Client, Config, NoTls};

use crate::error::{Error, ErrorKind};
use crate::schema::Schema;

/// How long to wait for a connection of the pool, and for a new one to open.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long a connection may be silent before the kernel asks whether the other side still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// How long sent data may stay unacknowledged before the connection counts as lost.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// A database in which the schema of pgonce is, or will be, installed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Database {
    pool: Pool,
    schema: Schema,
}

impl Database {
    /// Uses a pool of yours.
    #[must_use]
    pub fn new(pool: Pool, schema: Schema) -> Self {
        Self { pool, schema }
    }

    /// Opens a pool of up to `connections_max` connections, without TLS. Connections are made when they are needed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the URL cannot be read.
    pub fn connect(url: &str, schema: Schema, connections_max: usize) -> Result<Self, Error> {
        let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
            Error::new(ErrorKind::Invalid, "the database URL cannot be read")
                .with_hint("It looks like postgresql://user@host:5432/database, or host=... user=... dbname=....")
                .with_source(error)
        })?;
        if config.get_application_name().is_none() {
            config.application_name("pgonce");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_WAIT_MAX);
        }
        config.keepalives_idle(KEEPALIVE_IDLE);
        config.tcp_user_timeout(TCP_USER_TIMEOUT);
        let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let pool = Pool::builder(manager)
            .max_size(connections_max)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(CONNECT_WAIT_MAX))
            .create_timeout(Some(CONNECT_WAIT_MAX))
            .post_create(Hook::sync_fn(|_, _| {
                tracing::debug!("connected to the database");
                Ok(())
            }))
            .build()
            .map_err(|error| {
                Error::new(ErrorKind::Invalid, format!("no pool of {connections_max} connections: {error}"))
            })?;
        Ok(Self { pool, schema })
    }

    /// The schema that pgonce has in this database.
    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Closes the idle connections, and every other one when its work is done. No session can be had any more.
    pub fn close(&self) {
        self.pool.close();
    }

    /// Takes a connection. It is closed when dropped, unless it is given back.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] if there is none within 10 s, or the server cannot be reached.
    pub async fn session(&self) -> Result<Session, Error> {
        Ok(Session { connection: Some(self.pool.get().await?) })
    }
}

/// A connection for one unit of work.
#[derive(Debug)]
pub struct Session {
    connection: Option<Object>,
}

impl Session {
    /// Returns the connection to the pool: its work ended well, and no transaction is open on it.
    pub fn give_back(mut self) {
        drop(self.connection.take());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(Object::take(connection));
        }
    }
}

impl Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        self.connection.as_ref().expect("the connection is there until the session ends")
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Client {
        self.connection.as_mut().expect("the connection is there until the session ends")
    }
}
