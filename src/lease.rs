//! Leases: the right to be at a partition of an external consumer, for a time, and under an epoch.
//!
//! Invariant: each call is a transaction of its own, which has ended when the answer is there; none is open while a
//! handler is at work. Whether a lease is still in force only the database says: what comes with an earlier epoch is
//! refused there (`sql/routines/lease.sql`), and is no error here.

use std::time::{Duration, SystemTime};

use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use crate::database::Database;
use crate::error::{Error, ErrorKind};
use crate::message::{Offset, Partition};

/// How often a call is made again while another session is at the partition.
const TRIES_MAX: usize = 200;
/// How long to wait in between.
const TRY_EVERY: Duration = Duration::from_millis(10);
/// Most partitions that a topic, and so a member, can have.
const PARTITIONS_MAX: i32 = 1_024;

/// Number of an acquisition of a partition: it rises with each. Of two that act for one partition, the one with the higher
/// epoch is right; a receiver that keeps the highest it has seen can refuse the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub i64);

/// A partition that was acquired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) partition: Partition,
    pub(crate) epoch: Epoch,
}

/// What became of a call under a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome<T> {
    /// It was done, now or before.
    Done(T),
    /// Somebody else has acquired the partition; nothing was changed.
    Fenced,
}

/// Who holds leases of a consumer.
#[derive(Clone, Copy)]
pub(crate) struct Holder<'a> {
    pub(crate) database: &'a Database,
    pub(crate) consumer: &'a str,
    pub(crate) member: Uuid,
    pub(crate) lease_ms: i32,
}

type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

impl Holder<'_> {
    /// Takes what is free, up to its share.
    pub(crate) async fn acquire(&self) -> Result<Vec<Lease>, Error> {
        let parameters: &[Parameter<'_>] = &[
            (&self.consumer, Type::TEXT),
            (&self.member, Type::UUID),
            (&PARTITIONS_MAX, Type::INT4),
            (&self.lease_ms, Type::INT4),
        ];
        let rows = self.query(include_str!("../sql/statements/acquire.sql"), parameters).await?;
        let read = |row: &Row| {
            Ok(Lease { partition: Partition(row.try_get("partition")?), epoch: Epoch(row.try_get("epoch")?) })
        };
        rows.iter().map(read).collect()
    }

    /// The next messages; none where the lease is over, or another session is at the partition.
    pub(crate) async fn peek(&self, lease: Lease, messages_max: i32) -> Result<Vec<Row>, Error> {
        let parameters: &[Parameter<'_>] = &[
            (&self.consumer, Type::TEXT),
            (&lease.partition.0, Type::INT4),
            (&lease.epoch.0, Type::INT8),
            (&messages_max, Type::INT4),
        ];
        self.query(include_str!("../sql/statements/peek.sql"), parameters).await
    }

    /// Says that the effects from one offset to another are there.
    pub(crate) async fn ack(&self, lease: Lease, from: Offset, to: Offset) -> Result<Outcome<()>, Error> {
        let parameters: &[Parameter<'_>] = &[
            (&self.consumer, Type::TEXT),
            (&lease.partition.0, Type::INT4),
            (&lease.epoch.0, Type::INT8),
            (&from.0, Type::INT8),
            (&to.0, Type::INT8),
        ];
        self.insist(include_str!("../sql/statements/ack.sql"), parameters, |_| Ok(())).await
    }

    /// Counts a failure; answers what became of the message.
    pub(crate) async fn nack(
        &self,
        lease: Lease,
        offset: Offset,
        error: &str,
        is_permanent: bool,
        retry_at: Option<SystemTime>,
        retry_after: Option<Duration>,
    ) -> Result<Outcome<(String, Option<i32>)>, Error> {
        let parameters: &[Parameter<'_>] = &[
            (&self.consumer, Type::TEXT),
            (&lease.partition.0, Type::INT4),
            (&lease.epoch.0, Type::INT8),
            (&offset.0, Type::INT8),
            (&error, Type::TEXT),
            (&is_permanent, Type::BOOL),
            (&retry_at, Type::TIMESTAMPTZ),
            (&retry_after.map(|wait| wait.as_secs_f64()), Type::FLOAT8),
        ];
        let read = |row: &Row| Ok((row.try_get("outcome")?, row.try_get("attempts")?));
        self.insist(include_str!("../sql/statements/nack.sql"), parameters, read).await
    }

    /// Keeps a partition; answers whether it is one too many.
    pub(crate) async fn renew(&self, lease: Lease) -> Result<Outcome<bool>, Error> {
        let parameters: &[Parameter<'_>] = &[
            (&self.consumer, Type::TEXT),
            (&lease.partition.0, Type::INT4),
            (&lease.epoch.0, Type::INT8),
            (&self.lease_ms, Type::INT4),
        ];
        let read = |row: &Row| Ok(row.try_get("is_surplus")?);
        self.insist(include_str!("../sql/statements/renew.sql"), parameters, read).await
    }

    /// Gives a partition back.
    pub(crate) async fn release(&self, lease: Lease) -> Result<Outcome<()>, Error> {
        let parameters: &[Parameter<'_>] =
            &[(&self.consumer, Type::TEXT), (&lease.partition.0, Type::INT4), (&lease.epoch.0, Type::INT8)];
        self.insist(include_str!("../sql/statements/release.sql"), parameters, |_| Ok(())).await
    }

    async fn query(&self, statement: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>, Error> {
        let session = self.database.session().await?;
        let rows = session.run(&self.database.schema().sql(statement), parameters).await?;
        session.give_back();
        Ok(rows)
    }

    /// Calls again while another session is at the partition, as an operator's or one that acquires is for a moment.
    async fn insist<T>(
        &self,
        statement: &str,
        parameters: &[Parameter<'_>],
        read: impl Fn(&Row) -> Result<T, Error>,
    ) -> Result<Outcome<T>, Error> {
        for _ in 0..TRIES_MAX {
            let rows = self.query(statement, parameters).await?;
            let row = rows.first().ok_or_else(|| Error::new(ErrorKind::Defect, "a verb of leases answered nothing"))?;
            match row.try_get("outcome")? {
                "fenced" => return Ok(Outcome::Fenced),
                "busy" => tokio::time::sleep(TRY_EVERY).await,
                _ => return Ok(Outcome::Done(read(row)?)),
            }
        }
        let message = format!("another session is at a partition of consumer {:?} all the time", self.consumer);
        Err(Error::new(ErrorKind::Contention, message))
    }
}
