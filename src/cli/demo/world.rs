//! The database of the demo: a private server, or a schema of its own in a database of the user's.

use std::collections::BTreeMap;

use anyhow::bail;
use tokio_postgres::types::Type;

use super::{CONSUMER, TOPIC};
use crate::embedded::{Options, PrivateServer};
use crate::{
    ConsumerSettings, Database, Error, Migration, Schema, TopicSettings, create_consumer, create_topic, migrate,
};

/// Connections of the demo itself: two producers and one that looks.
const CONNECTIONS: usize = 3;

/// A database with pgonce and the business table in it.
pub(super) struct World {
    server: Option<PrivateServer>,
    url: String,
    database: Database,
}

/// What waits and what was received.
pub(super) struct Backlog {
    pub(super) pending: u64,
    pub(super) lag: u64,
    pub(super) received: u64,
}

impl World {
    pub(super) async fn create(url: Option<&str>) -> anyhow::Result<Self> {
        let (server, url, schema) = if let Some(url) = url {
            (None, url.to_owned(), Schema::new("pgonce_demo")?)
        } else {
            let server = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default())).await??;
            let url = server.url("pgonce");
            (Some(server), url, Schema::default())
        };
        let database = Database::connect(&url, schema, CONNECTIONS)?;
        let schema = database.schema();
        let mut session = database.session().await?;
        let statement = include_str!("../../../sql/statements/schema_exists.sql");
        let is_there =
            session.query_typed_one(statement, &[(&schema.name(), Type::TEXT)]).await?.try_get("schema_exists")?;
        if is_there || migrate(&mut session, schema).await? != Migration::Created {
            bail!("the database has a schema {schema} already; drop it first: drop schema {schema} cascade");
        }
        session.batch_execute(&schema.sql(include_str!("../../../sql/demo/documents.sql"))).await?;
        create_topic(&*session, schema, TOPIC, TopicSettings::default()).await?;
        create_consumer(&*session, schema, CONSUMER, Some(TOPIC), ConsumerSettings::default()).await?;
        session.give_back();
        Ok(Self { server, url, database })
    }

    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    pub(super) fn schema(&self) -> &Schema {
        self.database.schema()
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// The counts in the database.
    pub(super) async fn word_counts(&self, consumer: &str) -> Result<BTreeMap<String, u64>, Error> {
        let session = self.database.session().await?;
        let rows = session
            .query_typed(
                &self.schema().sql(include_str!("../../../sql/demo/word_counts.sql")),
                &[(&consumer, Type::TEXT)],
            )
            .await?;
        session.give_back();
        rows.iter().map(|row| Ok((row.try_get("word")?, row.try_get::<_, i64>("count")?.unsigned_abs()))).collect()
    }

    /// The number of business rows in the database.
    pub(super) async fn documents(&self) -> Result<u64, Error> {
        let session = self.database.session().await?;
        let statement = self.schema().sql(include_str!("../../../sql/demo/count_documents.sql"));
        let row = session.query_typed_one(&statement, &[]).await?;
        session.give_back();
        Ok(row.try_get::<_, i64>("documents")?.unsigned_abs())
    }

    /// Leaves the database up, and answers how to look around and how to get rid of it.
    pub(super) fn keep(self) -> anyhow::Result<String> {
        let Some(server) = self.server else {
            let schema = self.database.schema();
            return Ok(format!(
                "look around: schema {schema} of your database\nremove it:   drop schema {schema} cascade"
            ));
        };
        let psql = server.psql_command("pgonce");
        let kept = server.keep()?;
        Ok(format!("look around: {psql}\n{}", kept.instructions))
    }

    /// Removes all traces.
    pub(super) async fn remove(self) -> anyhow::Result<()> {
        if let Some(server) = self.server {
            self.database.close();
            tokio::task::spawn_blocking(move || server.stop()).await??;
            return Ok(());
        }
        let session = self.database.session().await?;
        session.batch_execute(&self.schema().sql(include_str!("../../../sql/demo/drop_schema.sql"))).await?;
        session.give_back();
        Ok(())
    }
}

/// Looks how far relays and consumers are.
pub(super) async fn backlog(database: &Database) -> Result<Backlog, Error> {
    let session = database.session().await?;
    let statement = database.schema().sql(include_str!("../../../sql/demo/backlog.sql"));
    let row = session.query_typed_one(&statement, &[]).await?;
    session.give_back();
    let number = |name| row.try_get::<_, i64>(name).map(i64::unsigned_abs);
    Ok(Backlog { pending: number("pending")?, lag: number("lag")?, received: number("received")? })
}
