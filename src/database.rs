//! The way to the server: a pool, a schema, and sessions that never go back to the pool in doubt.
//!
//! Invariant: a connection returns to the pool only through [`Session::give_back`], which is called after the work on it
//! ended well. After an error, or when a future is dropped half way, the connection is closed instead: the server rolls
//! back whatever was open, and nobody inherits a transaction.
//!
//! Statements go out as `query_typed`: one round trip, no named prepared statement, so a PgBouncer in transaction mode
//! may stand in between.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Hook, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls};
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Error, ErrorKind};
use crate::schema::Schema;

/// How long to wait for a connection of the pool, and for a new one to open.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long a connection may be silent before the kernel asks whether the other side still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// How long sent data may stay unacknowledged before the connection counts as lost.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest `application_name` that PostgreSQL keeps whole, in bytes.
const APPLICATION_NAME_BYTES_MAX: usize = 63;

/// A database in which the schema of pgonce is, or will be, installed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Database {
    pool: Pool,
    schema: Schema,
    /// How to connect outside of the pool; unknown where the pool is the caller's.
    config: Option<Arc<Config>>,
}

impl Database {
    /// Uses a pool of yours. A [`Worker`](crate::Worker) on it cannot listen for notifications, and asks more often.
    #[must_use]
    pub fn new(pool: Pool, schema: Schema) -> Self {
        Self { pool, schema, config: None }
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
        Ok(Self { pool: pool_of(config.clone(), connections_max)?, schema, config: Some(Arc::new(config)) })
    }

    /// The same database, for one stage: with a pool of its own, whose connections say in `application_name` what they are
    /// for. A pool of the caller's is shared.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if there can be no such pool.
    pub(crate) fn for_stage(&self, name: &str, connections_max: usize) -> Result<Self, Error> {
        let Some(config) = &self.config else {
            return Ok(self.clone());
        };
        let mut config = Config::clone(config);
        config.application_name(stage_name(config.get_application_name().unwrap_or_default(), name));
        Ok(Self {
            pool: pool_of(config.clone(), connections_max)?,
            schema: self.schema.clone(),
            config: Some(Arc::new(config)),
        })
    }

    /// Opens a connection for notifications, where this database was opened by [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] if the server cannot be reached.
    pub(crate) async fn listener(&self) -> Result<Option<Listener>, Error> {
        let Some(config) = &self.config else {
            return Ok(None);
        };
        let (client, mut connection) = config.connect(NoTls).await?;
        let (ring, notifications) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                if matches!(message, AsyncMessage::Notification(_)) {
                    // Where one waits already, a second says nothing more.
                    let _ = ring.try_send(());
                }
            }
        });
        Ok(Some(Listener { client, notifications, _task: AbortOnDropHandle::new(task) }))
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

fn pool_of(config: Config, connections_max: usize) -> Result<Pool, Error> {
    let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
    Pool::builder(manager)
        .max_size(connections_max)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(CONNECT_WAIT_MAX))
        .create_timeout(Some(CONNECT_WAIT_MAX))
        .post_create(Hook::sync_fn(|_, _| {
            tracing::debug!("connected to the database");
            Ok(())
        }))
        .build()
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("no pool of {connections_max} connections: {error}")))
}

/// `application_name` of a stage's connections: what PostgreSQL keeps of it, cut between two characters.
fn stage_name(program: &str, stage: &str) -> String {
    let mut name = format!("{program} {stage}");
    while name.len() > APPLICATION_NAME_BYTES_MAX {
        name.pop();
    }
    name
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
