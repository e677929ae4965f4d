//! Where a play happens: a private server or a database of the user's, a schema of its own in it, and a network to it that
//! can be cut. The play itself looks at the database without that network.
//!
//! Invariant: a schema of a play has a claim on it, an advisory lock, from before it is made until it is gone. A program that
//! is killed loses its claims with its connections, so a schema that can be claimed is nobody's, and the next play removes it.

use anyhow::{Context, bail};
use tokio_postgres::types::Type;
use tokio_postgres::{GenericClient, Transaction};
use uuid::Uuid;

use super::actor::{Part, Side};
use super::link::Link;
use super::player::Player;
use super::{LOOK_EVERY, actor, within};
use crate::embedded::{Options, PrivateServer};
use crate::{
    ConsumerSettings, Database, Error, Relay, Schema, Session, TopicSettings, create_consumer, create_topic, migrate,
};

/// Connections of the play itself; one holds its claim.
const CONNECTIONS: usize = 3;
/// What is in the inventory at the beginning.
pub(super) const STOCK: i32 = 10;

/// A place for plays.
pub(super) struct Stage {
    server: Option<PrivateServer>,
    database: Database,
    /// Its transaction holds the claim on the schema. (One of a session would not survive PgBouncer.)
    claim: Session,
    pub(super) link: Link,
}

/// What there is in the database.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    /// How often the order is in the queue.
    pub(super) copies: i64,
    /// Messages that the consumer is still to get.
    pub(super) due: i64,
    /// Messages that the consumer will not get.
    pub(super) dead: i64,
    /// What is left of the item.
    pub(super) stock: i32,
}

impl Stage {
    /// Takes the database of a URL, or starts a private server. Nothing is in it yet.
    pub(super) async fn open(url: Option<&str>) -> anyhow::Result<Self> {
        let schema = Schema::new(format!("pgonce_scenario_{}", Uuid::now_v7().simple()))?;
        let (server, url) = if let Some(url) = url {
            (None, url.to_owned())
        } else {
            let server = tokio::task::spawn_blocking(|| PrivateServer::start(&Options::default())).await??;
            let url = server.url("pgonce");
            (Some(server), url)
        };
        let link = Link::start(&url, schema.name()).await?;
        let database = Database::connect(&url, schema, CONNECTIONS)?;
        // Where nobody is let in, nothing needs to be removed.
        let claim = hold_claim(&database).await?;
        let by_link = Database::connect(link.url(), database.schema().clone(), 1)?;
        let refusal = "the processes of a play cannot connect: they do so without TLS, since its network reads what they say. Let \
            this role in without TLS, or play without --database-url, on a private server";
        by_link.session().await.context(refusal)?.give_back();
        if let Err(error) = within("what earlier plays left is gone", sweep(&database)).await {
            tracing::warn!("left to the next play: {error:#}");
        }
        Ok(Self { server, database, claim, link })
    }

    /// Makes what the plays of these sides need.
    pub(super) async fn set(&self, sides: &[Side]) -> anyhow::Result<()> {
        within("the schema of the play is there", async { Ok(self.create(sides).await?) }).await
    }

    async fn create(&self, sides: &[Side]) -> Result<(), Error> {
        let schema = self.schema();
        let mut session = self.database.session().await?;
        if sides.contains(&Side::Naive) {
            session.batch_execute(&schema.sql(include_str!("../../../sql/scenario/plain.sql"))).await?;
        } else {
            migrate(&mut session, schema).await?;
        }
        session.batch_execute(&schema.sql(include_str!("../../../sql/scenario/inventory.sql"))).await?;
        let insert = schema.sql(include_str!("../../../sql/scenario/insert_item.sql"));
        for side in sides {
            let name = side.name();
            session.query_typed(&insert, &[(&name, Type::TEXT), (&STOCK, Type::INT4)]).await?;
            if side.delivery().is_some() {
                let settings = TopicSettings { partitions: Some(1), ..TopicSettings::default() };
                create_topic(&*session, schema, name, settings).await?;
                create_consumer(&*session, schema, name, Some(name), ConsumerSettings::default()).await?;
            }
        }
        session.give_back();
        Ok(())
    }

    fn schema(&self) -> &Schema {
        self.database.schema()
    }

    /// Starts a process of the play, whose way to the server is the link.
    pub(super) fn start(&self, part: Part, side: Side) -> anyhow::Result<Player> {
        Player::start(part, side, self.link.url(), self.schema())
    }

    /// Sends the message of a play, without a fault.
    pub(super) async fn send(&self, side: Side) -> anyhow::Result<()> {
        within("the message is sent", async { Ok(actor::send(&self.database, side).await?) }).await?;
        Ok(())
    }

    /// Relays what was sent, and answers what there is.
    pub(super) async fn state(&self, side: Side) -> Result<State, Error> {
        let statement = if side.delivery().is_some() {
            let relay = Relay::topic(side.name());
            while relay.step(&self.database).await?.moved > 0 {}
            include_str!("../../../sql/scenario/state.sql")
        } else {
            include_str!("../../../sql/scenario/plain_state.sql")
        };
        let [(item, item_type), (order, order_type)] = side.subject();
        let session = self.database.session().await?;
        let row =
            session.query_typed_one(&self.schema().sql(statement), &[(&item, item_type), (&order, order_type)]).await?;
        session.give_back();
        Ok(State {
            copies: row.try_get("copies")?,
            due: row.try_get("due")?,
            dead: row.try_get("dead")?,
            stock: row.try_get("stock")?,
        })
    }

    /// Waits until the state is as it should be.
    pub(super) async fn until(
        &self,
        what: &str,
        side: Side,
        holds: impl Fn(&State) -> bool + Send + Sync,
    ) -> anyhow::Result<State> {
        let looking = async {
            loop {
                let state = self.state(side).await?;
                if holds(&state) {
                    return Ok(state);
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        within(what, looking).await
    }

    /// Waits until a process of the play waits for another one's transaction. Dropping the future is safe.
    pub(super) async fn until_one_waits(&self) -> anyhow::Result<()> {
        self.until_sessions("a process waits for the transaction of another one", |_, waiting| waiting > 0).await
    }

    /// Waits until the server has noticed that no process of the play is there any more, and has rolled back what it left.
    pub(super) async fn until_none_is_left(&self) -> anyhow::Result<()> {
        self.until_sessions("the server ends the sessions of a process that died", |sessions, _| sessions == 0).await
    }

    async fn until_sessions(&self, what: &str, holds: impl Fn(i64, i64) -> bool + Send + Sync) -> anyhow::Result<()> {
        let statement = include_str!("../../../sql/scenario/sessions.sql");
        let looking = async {
            loop {
                let session = self.database.session().await?;
                let row = session.query_typed_one(statement, &[(&self.schema().name(), Type::TEXT)]).await?;
                session.give_back();
                if holds(row.try_get("sessions")?, row.try_get("waiting")?) {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        within(what, looking).await
    }

    /// Removes all traces. Processes of the play must be gone.
    pub(super) async fn remove(self) -> anyhow::Result<()> {
        // With it end what connections it still holds, and the transactions on them.
        drop(self.link);
        if let Some(server) = self.server {
            self.database.close();
            tokio::task::spawn_blocking(move || server.stop()).await??;
            return Ok(());
        }
        let schema = self.database.schema();
        let dropping = async {
            let mut session = self.database.session().await?;
            let transaction = session.begin().await?;
            drop_schema(&transaction, schema).await?;
            transaction.commit().await?;
            session.give_back();
            Ok(())
        };
        let removed = within("the schema of the play is gone", dropping).await;
        drop(self.claim);
        removed.with_context(|| {
            format!("cannot remove the schema of the play; do it by hand: drop schema {schema} cascade")
        })
    }
}

/// Claims the schema of a play that is to be made, for as long as the session lives.
async fn hold_claim(database: &Database) -> anyhow::Result<Session> {
    let session = database.session().await?;
    session.batch_execute(include_str!("../../../sql/statements/begin.sql")).await?;
    session.query_typed(include_str!("../../../sql/scenario/keep_open.sql"), &[]).await?;
    if !claim(&*session, database.schema()).await? {
        bail!("somebody else plays in {}", database.schema());
    }
    Ok(session)
}

/// Whether the schema of a play was nobody's. It is claimed then until the transaction ends.
async fn claim<C: GenericClient>(client: &C, schema: &Schema) -> Result<bool, Error> {
    let statement = include_str!("../../../sql/scenario/claim.sql");
    Ok(client.query_typed_one(statement, &[(&schema.name(), Type::TEXT)]).await?.try_get("is_claimed")?)
}

/// Removes the schemas of plays whose programs were killed. What cannot be removed now is left to the next play.
async fn sweep(database: &Database) -> anyhow::Result<()> {
    let session = database.session().await?;
    let rows = session.query_typed(include_str!("../../../sql/scenario/abandoned.sql"), &[]).await?;
    session.give_back();
    for row in rows {
        let schema = Schema::new(row.try_get::<_, String>("schema")?)?;
        if let Err(error) = remove_unclaimed(database, &schema).await {
            tracing::warn!(schema.name = schema.name(), "left to the next play: {error}");
        }
    }
    Ok(())
}

async fn remove_unclaimed(database: &Database, schema: &Schema) -> Result<(), Error> {
    let mut session = database.session().await?;
    let transaction = session.begin().await?;
    transaction.query_typed(include_str!("../../../sql/scenario/limit_wait.sql"), &[]).await?;
    if claim(&transaction, schema).await? {
        drop_schema(&transaction, schema).await?;
    }
    transaction.commit().await?;
    session.give_back();
    Ok(())
}

/// Drops the schema of a play, where it is there. What its processes left is ended first.
async fn drop_schema(transaction: &Transaction<'_>, schema: &Schema) -> Result<(), Error> {
    let end_sessions = include_str!("../../../sql/scenario/end_sessions.sql");
    transaction.query_typed(end_sessions, &[(&schema.name(), Type::TEXT)]).await?;
    let exists = include_str!("../../../sql/statements/schema_exists.sql");
    if transaction.query_typed_one(exists, &[(&schema.name(), Type::TEXT)]).await?.try_get("schema_exists")? {
        transaction.batch_execute(&schema.sql(include_str!("../../../sql/demo/drop_schema.sql"))).await?;
    }
    Ok(())
}
