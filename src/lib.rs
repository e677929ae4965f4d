#![doc = include_str!("../README.md")]

mod error;
mod message;

mod checkpoints;
mod connect;
mod database;
mod migrate;
mod schema;
pub mod sql;

mod lease;

mod consume;
mod produce;
mod relay;
mod topic;

#[cfg(feature = "webhook")]
mod webhook;

mod member;
mod rates;
mod shutdown;
mod watch;
mod worker;

#[cfg(all(unix, feature = "cli"))]
pub mod cli;
#[cfg(all(unix, feature = "embedded"))]
pub mod embedded;

pub use deadpool_postgres;
pub use tokio_postgres;

pub use consume::{BatchHandler, Consumed, Consumer, Delivery, ExternalHandler, Failure, Handler, HandlerError};
pub use database::{Database, Session};
pub use error::{Error, ErrorKind, Remedy};
pub use lease::Epoch;
pub use message::{Message, MessageId, Offset, Partition, Received, Sent};
pub use migrate::{Migration, migrate, migration_sql, planned_migration};
pub use produce::Producer;
pub use relay::{Relay, Relayed};
pub use schema::{Installed, SCHEMA_VERSION, SCHEMA_VERSION_MAX, Schema, check_version, installed};
pub use shutdown::Shutdown;
pub use topic::{
    ConsumerKind, ConsumerSettings, FailurePolicy, StartAt, TopicSettings, create_consumer, create_topic, process_once,
    set_state,
};
#[cfg(feature = "webhook")]
pub use webhook::{Webhook, WebhookSettings};
pub use worker::{Report, Worker};

/// The Rust of the guide is compiled with the tests of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../docs/getting-started-rust.md")]
struct GettingStarted;
