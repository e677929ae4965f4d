//! The way to the server: a pool, a schema, and sessions that never go back to the pool in doubt.
//!
//! Invariant: a connection returns to the pool only through [`Session::give_back`], which is called after the work on it
//! ended well. After an error, or when a future is dropped half way, the connection is closed instead: the server rolls
//! back whatever was open, and nobody inherits a transaction.
//!
//! Statements go out as `query_typed`: one round trip, no named prepared statement, so a PgBouncer in transaction mode
//! may stand in between.
//!
//! Invariant: what pgonce does by itself is READ COMMITTED, whatever the database's default is. Each transaction says so
//! ([`Session::begin`], [`Session::run`]): a setting of the session would reach others by way of a PgBouncer.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{Hook, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use tokio::sync::Mutex;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, IsolationLevel, Row, Transaction};

use crate::connect::{self, Listener, Target};
use crate::error::{Error, ErrorKind};
use crate::schema::Schema;

/// How long to wait for a connection of the pool.
const POOL_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long to wait for two of them, the time to open them included.
const PAIR_WAIT_MAX: Duration = Duration::from_secs(60);

/// A database in which the schema of pgonce is, or will be, installed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Database {
    pool: Pool,
    schema: Schema,
    /// Held by whoever takes two connections: of several that have one each and wait for another, none might ever get it.
    pairing: Arc<Mutex<()>>,
    /// How to connect outside of the pool; unknown where the pool is the caller's.
    target: Option<Arc<Target>>,
}

impl Database {
    /// Uses a pool of yours. A [`Worker`](crate::Worker) on it cannot listen for notifications, and asks more often.
    #[must_use]
    pub fn new(pool: Pool, schema: Schema) -> Self {
        Self { pool, schema, pairing: Arc::default(), target: None }
    }

    /// Makes a pool of up to `connections_max` connections, which are opened when they are needed.
    ///
    /// The text is a URL (`postgresql://user@host:5432/database?sslmode=verify-full`) or keywords and values
    /// (`host=db user=app sslmode=verify-full`), and means what it means to libpq:
    ///
    /// * `host`, `hostaddr`, `port`: one or several, separated by commas. They are tried in their order (or by
    ///   `load_balance_hosts=random`), each for `connect_timeout` seconds, 10 if nothing is said. A host that begins with
    ///   a slash is the directory of a Unix socket, on which TLS is not used; without any it is that of this machine's
    ///   server. `target_session_attrs=read-write` passes over servers that are read-only.
    /// * `dbname`, `user`, `password`, `options`, `application_name` (`pgonce` if nothing is said).
    /// * `passfile`: where passwords are looked up, `~/.pgpass` if nothing is said. A file that others may read is not
    ///   used.
    /// * `sslmode`: `disable`, `prefer` (the default), `require`, `verify-ca` or `verify-full`. Only the last one is safe
    ///   against somebody in between; `prefer` may end up without TLS.
    /// * `sslrootcert`: the file with the certificates that the server's is verified by, or `system` for those that the
    ///   operating system trusts. `~/.postgresql/root.crt` counts if nothing is said and it is there; then, or where a
    ///   file is named, `require` verifies as `verify-ca` does.
    /// * `sslcert`, `sslkey`: certificate and key of the client, `~/.postgresql/postgresql.crt` and `.key` if nothing is
    ///   said and they are there. The key is not encrypted, and only its owner may read it.
    /// * `channel_binding`, `sslnegotiation`, `keepalives`, `keepalives_idle` (30 s if nothing is said),
    ///   `keepalives_interval`, `keepalives_count`, `tcp_user_timeout` (30,000 ms if nothing is said).
    ///
    /// Where the text leaves them out, `PGPASSWORD`, `PGPASSFILE`, `PGSSLMODE`, `PGSSLROOTCERT`, `PGSSLCERT`, `PGSSLKEY`,
    /// `PGTARGETSESSIONATTRS` and `PGAPPNAME` of the environment count; no other variable does. Any other parameter is an
    /// error. Unlike with libpq, the alternative names of a server's certificate have to hold its name (a common name is
    /// not enough), `prefer` does not send a password that was refused again without TLS, there are no revocation lists,
    /// and an `@` in a name or a password of the URL is written `%40`. Files are read here, once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the text cannot be read, has a parameter or a value that it cannot have, or names a file
    /// that cannot be used.
    pub fn connect(url: &str, schema: Schema, connections_max: usize) -> Result<Self, Error> {
        Self::of(Target::read(url)?, schema, connections_max)
    }

    fn of(target: Target, schema: Schema, connections_max: usize) -> Result<Self, Error> {
        let create_timeout = target.wait_max();
        let config = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(target.config(), target.clone(), config);
        let pool = Pool::builder(manager)
            .max_size(connections_max)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(POOL_WAIT_MAX))
            .create_timeout(Some(create_timeout))
            .post_create(Hook::sync_fn(|_, _| {
                tracing::debug!("connected to the database");
                Ok(())
            }))
            .build()
            .map_err(|error| {
                Error::new(ErrorKind::Invalid, format!("no pool of {connections_max} connections: {error}"))
            })?;
        Ok(Self { pool, schema, pairing: Arc::default(), target: Some(Arc::new(target)) })
    }

    /// The same database, for one stage: with a pool of its own, whose connections say in `application_name` what they are
    /// for. A pool of the caller's is shared.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if there can be no such pool.
    pub(crate) fn for_stage(&self, name: &str, connections_max: usize) -> Result<Self, Error> {
        match &self.target {
            Some(target) => Self::of(target.for_stage(name), self.schema.clone(), connections_max),
            None => Ok(self.clone()),
        }
    }

    /// Opens a connection for notifications, where this database was opened by [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] if the server cannot be reached.
    pub(crate) async fn listener(&self) -> Result<Option<Listener>, Error> {
        match &self.target {
            Some(target) => target.listener().await.map(Some),
            None => Ok(None),
        }
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
    /// [`ErrorKind::Unavailable`] if none is free within 10 s, or no host can be reached in its `connect_timeout`.
    /// [`ErrorKind::Database`] if the server does not let us in.
    pub async fn session(&self) -> Result<Session, Error> {
        let connection = self.pool.get().await.map_err(|error| connect::failed(error, self.target.as_deref()))?;
        Ok(Session { connection: Some(connection) })
    }

    /// Takes two connections, for a unit of work that needs both.
    ///
    /// # Errors
    ///
    /// Those of [`session`](Self::session); [`ErrorKind::Invalid`] where the pool has only one.
    pub(crate) async fn session_pair(&self) -> Result<(Session, Session), Error> {
        let connections_max = self.pool.status().max_size;
        if connections_max < 2 {
            return Err(Error::new(ErrorKind::Invalid, format!("a pool of {connections_max} connections"))
                .with_hint("A delivery mode with two transactions needs two connections for each step at a time."));
        }
        let pair = async {
            let _alone = self.pairing.lock().await;
            Ok((self.session().await?, self.session().await?))
        };
        tokio::time::timeout(PAIR_WAIT_MAX, pair).await.unwrap_or_else(|_elapsed| {
            let message = format!("no two connections were free within {} s", PAIR_WAIT_MAX.as_secs());
            Err(Error::new(ErrorKind::Unavailable, message))
        })
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

    /// Begins a transaction.
    pub(crate) async fn begin(&mut self) -> Result<Transaction<'_>, tokio_postgres::Error> {
        self.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await
    }

    /// Runs a statement in a transaction of its own, which has committed when the rows are there. It is one round trip:
    /// BEGIN, statement and COMMIT go out one behind the other. Where the statement fails, the COMMIT rolls back; where this
    /// process is stopped before it, the server ends the session after 30 s.
    pub(crate) async fn run(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let ((), rows, ()) = tokio::try_join!(
            biased;
            self.batch_execute(include_str!("../sql/statements/begin.sql")),
            self.query_typed(statement, parameters),
            self.batch_execute(include_str!("../sql/statements/commit.sql")),
        )?;
        Ok(rows)
    }

    /// The same for a statement that answers one row.
    pub(crate) async fn run_one(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Row, Error> {
        let mut rows = self.run(statement, parameters).await?;
        rows.pop().ok_or_else(|| Error::new(ErrorKind::Defect, "a statement that answers one row answered none"))
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
