//! Producing the words of the demo, as an application would: a business row and its messages in one transaction. Some
//! transactions are rolled back and made again, and some documents are sent twice, as after an answer that was lost.

use serde::Serialize;

use super::TOPIC;
use super::texts::Document;
use crate::{Database, Error, Message, Producer};

/// Every so many documents, the first transaction is rolled back.
const ROLL_BACK_EVERY: usize = 7;
/// Every so many documents, the messages are sent a second time.
const SEND_TWICE_EVERY: usize = 10;
/// Producers at the same time.
const PRODUCERS: usize = 2;

#[derive(Serialize)]
struct Payload<'a> {
    word: &'a str,
}

/// What was produced.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Produced {
    /// Documents whose transaction committed.
    pub(super) documents: u64,
    /// Messages that were sent a second time.
    pub(super) duplicates_sent: u64,
    /// Messages of which `enqueue` said that it knew them.
    pub(super) duplicates_refused: u64,
}

/// Produces all documents.
pub(super) async fn produce(database: &Database, documents: &[Document]) -> Result<Produced, Error> {
    let share = documents.len().div_ceil(PRODUCERS);
    let (first, second) = documents.split_at(share.min(documents.len()));
    let (first, second) = tokio::try_join!(produce_share(database, first), produce_share(database, second))?;
    Ok(Produced {
        documents: first.documents + second.documents,
        duplicates_sent: first.duplicates_sent + second.duplicates_sent,
        duplicates_refused: first.duplicates_refused + second.duplicates_refused,
    })
}

async fn produce_share(database: &Database, documents: &[Document]) -> Result<Produced, Error> {
    let producer = Producer::in_schema(TOPIC, database.schema());
    let insert = database.schema().sql(include_str!("../../../sql/demo/insert_document.sql"));
    let mut total = Produced::default();
    let mut session = database.session().await?;
    for (nth, document) in (1..).zip(documents) {
        let messages = messages(document)?;
        let words = i32::try_from(messages.len()).expect("a document is short");
        for will_commit in [nth % ROLL_BACK_EVERY != 0, true] {
            let transaction = session.begin().await?;
            transaction.execute(&insert, &[&document.id, &words]).await?;
            let sent = producer.send_all(&transaction, &messages).await?;
            if will_commit {
                transaction.commit().await?;
                total.documents += 1;
                total.duplicates_refused += refused(&sent);
                break;
            }
            transaction.rollback().await?;
        }
        if nth % SEND_TWICE_EVERY == 0 {
            total.duplicates_sent += messages.len() as u64;
            let transaction = session.begin().await?;
            total.duplicates_refused += refused(&producer.send_all(&transaction, &messages).await?);
            transaction.commit().await?;
        }
    }
    session.give_back();
    Ok(total)
}

fn messages(document: &Document) -> Result<Vec<Message>, Error> {
    let numbered = (1_usize..).zip(&document.words);
    numbered
        .map(|(nth, word)| {
            Ok(Message::json(&Payload { word })?.key(word).id(format!("{}:{nth}", document.id).as_str()))
        })
        .collect()
}

fn refused(sent: &[crate::Sent]) -> u64 {
    sent.iter().filter(|sent| sent.was_duplicate).count() as u64
}
