//! Books: what the database says of a consumer when nothing is left to do, however often it was disturbed.

use tokio_postgres::Client;

use crate::probe::{eventually, idle_in_transaction, number, texts};
use crate::worker::{APPLIED, OUT_OF_ORDER};

/// What has become of each message of the topic, and of its copies.
const BOOKS: &str = "
    select concat_ws(' ',
      (select count(*) from pgonce.outbox where status = 'SENT'), 'sent,',
      (select count(*) from pgonce.outbox where status <> 'SENT') + (select count(*) from pgonce.set_aside), 'not,',
      (select count(*) from pgonce.queue), 'queued,',
      (select sum(high) from (select max(\"offset\") as high from pgonce.queue group by partition) q), 'offsets,',
      (select count(*) from pgonce.processed_ids), 'recorded,',
      l.received, 'received,', l.duplicates, 'twice,', l.lag + l.parked + l.dead, 'left')
    from pgonce.consumer_lag l
    where l.consumer = 'c'";
/// Rows that are locks, and that nobody holds.
const FREE: &str = "
    with consumers as materialized (select from pgonce.consumer_partitions for no key update skip locked),
         relays as materialized (select from pgonce.partitions for no key update skip locked)
    select (select count(*) from consumers) + (select count(*) from relays)";

/// Each of so many messages, and nothing else, was relayed, recorded once and received once; the offsets have no gaps; and
/// nothing is held.
pub(crate) async fn assert_balanced(client: &Client, messages: usize) {
    let due = format!(
        "{messages} sent, 0 not, {messages} queued, {messages} offsets, {messages} recorded, {messages} received, 0 twice, 0 left"
    );
    assert_eq!(texts(client, BOOKS).await, [due]);
    assert_nothing_is_held(client).await;
}

/// What was disturbed holds nothing any more.
pub(crate) async fn assert_nothing_is_held(client: &Client) {
    let locks = "select (select count(*) from pgonce.consumer_partitions) + (select count(*) from pgonce.partitions)";
    let locks = number(client, locks).await;
    eventually("no partition stays locked", async || (number(client, FREE).await == locks).then_some(())).await;
    eventually("no transaction is open", async || (idle_in_transaction(client).await == 0).then_some(())).await;
}

/// And each was applied once, in the order of its key.
pub(crate) async fn assert_applied(client: &Client, messages: usize) {
    assert_eq!(number(client, APPLIED).await, i64::try_from(messages).expect("a number"));
    assert_eq!(texts(client, OUT_OF_ORDER).await, [""; 0]);
    assert_balanced(client, messages).await;
}
