//! The verbs as statements for other clients: parameters and columns are as `pgonce::sql` documents them.

use pgonce::{Schema, migrate, sql};
use tokio_postgres::types::Type;

use crate::fixture::TestDatabase;
use crate::probe::{create, number};

#[tokio::test]
async fn each_statement_has_the_parameters_and_the_columns_that_are_documented() {
    let database = TestDatabase::empty().await;
    let mut client = database.connect().await;
    let events = Schema::new("events").expect("a good name");
    migrate(&mut client, &Schema::default()).await.expect("installed");
    migrate(&mut client, &events).await.expect("installed");
    for (statement, parameters, columns) in [
        (sql::ENQUEUE, "text jsonb text text jsonb timestamptz", "message_id text, was_duplicate bool"),
        (sql::ENQUEUE_MANY, "text _jsonb _text _text _jsonb _timestamptz", "message_id text, was_duplicate bool"),
        (sql::EMIT, "text jsonb text text int4 text jsonb", "message_id text, was_duplicate bool"),
        (sql::CANCEL, "text text", "message_id text, was_cancelled bool"),
        (sql::RELAY, "text int4", "moved int8, blocked int8"),
        (
            sql::RECEIVE,
            "text int4",
            "partition int4, offset int8, message_id text, key text, payload jsonb, headers jsonb, enqueued_at timestamptz, attempt int4",
        ),
        (sql::PROCESS_ONCE, "text text", "message_id text, was_duplicate bool"),
    ] {
        for statement in [statement.to_owned(), sql::in_schema(statement, &events)] {
            let prepared = client.prepare(&statement).await.expect("the server takes it");
            let takes: Vec<_> = prepared.params().iter().map(Type::name).collect();
            assert_eq!(takes.join(" "), parameters, "{statement}");
            let answers: Vec<_> = prepared
                .columns()
                .iter()
                .map(|column| format!("{} {}", column.name(), column.type_().name()))
                .collect();
            assert_eq!(answers.join(", "), columns, "{statement}");
        }
    }
}

#[tokio::test]
async fn a_message_can_be_enqueued_with_nothing_but_texts() {
    let database = TestDatabase::new().await;
    let client = database.connect().await;
    create(&client, "t", 1, "c").await;
    let enqueue = client.prepare_typed(sql::ENQUEUE, &[const { Type::TEXT }; 6]).await.expect("texts are taken");
    let (payload, headers, soon) = (r#"{"says": 1}"#, r#"{"by": "text"}"#, "2100-01-01 00:00:00+00");
    let row = client.query_one(&enqueue, &[&"t", &payload, &"k", &"first", &headers, &soon]).await.expect("sent");
    assert!(!row.get::<_, bool>("was_duplicate"));
    let arrays = [Type::TEXT, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY];
    let enqueue_many = client.prepare_typed(sql::ENQUEUE_MANY, &arrays).await.expect("texts are taken");
    let none: Option<Vec<&str>> = None;
    let rows = client
        .query(&enqueue_many, &[&"t", &vec![payload; 2], &none, &vec!["first", "second"], &none, &vec![soon; 2]])
        .await
        .expect("sent");
    assert_eq!(rows.iter().map(|row| row.get::<_, bool>("was_duplicate")).collect::<Vec<_>>(), [true, false]);
    assert_eq!(number(&client, "select count(*) from pgonce.outbox where status = 'SCHEDULED'").await, 2);
}
