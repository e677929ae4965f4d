//! On a private server: the transaction is all or nothing, and a repetition is told.

use pgonce::embedded::{Options, PrivateServer};
use pgonce::{Database, Schema, migrate};
use sqlx::PgPool;

use super::place_order;

/// A server with the shop's tables, and a way in.
async fn shop() -> (PrivateServer, PgPool) {
    let start = || PrivateServer::start(&Options::default()).expect("a server starts");
    let server = tokio::task::spawn_blocking(start).await.expect("no panic");
    let url = server.url("pgonce");
    let database = Database::connect(&url, Schema::default(), 1).expect("a good URL");
    let mut session = database.session().await.expect("connected");
    migrate(&mut session, database.schema()).await.expect("installed");
    let pool = PgPool::connect(&url).await.expect("connected");
    sqlx::raw_sql(include_str!("../../shop.sql")).execute(&pool).await.expect("created");
    (server, pool)
}

async fn count(pool: &PgPool, rows: &'static str) -> i64 {
    sqlx::query_scalar(rows).fetch_one(pool).await.expect("counted")
}

#[tokio::test]
async fn an_order_and_its_message_commit_together_and_a_repetition_is_told() {
    let (server, pool) = shop().await;
    assert!(place_order(&pool, 1).await.expect("placed"));
    assert!(!place_order(&pool, 1).await.expect("known"), "it was placed before");
    assert_eq!(count(&pool, "select count(*) from orders").await, 1);
    assert_eq!(count(&pool, "select count(*) from pgonce.outbox where message_id = 'order-1-placed'").await, 1);
    assert_eq!(count(&pool, "select duplicates from pgonce.outbox_status").await, 1);
    pool.close().await;
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("it stops");
}

#[tokio::test]
async fn what_cannot_be_enqueued_leaves_no_order_and_what_is_rolled_back_no_message() {
    let (server, pool) = shop().await;
    let lower = "select topic from pgonce.create_topic('orders', payload_bytes_max => 1)";
    sqlx::raw_sql(lower).execute(&pool).await.expect("no payload fits any more");
    place_order(&pool, 1).await.expect_err("the message is refused");
    let raise = "select topic from pgonce.create_topic('orders', payload_bytes_max => 1000)";
    sqlx::raw_sql(raise).execute(&pool).await.expect("they fit again");
    assert_eq!(count(&pool, "select count(*) from orders").await, 0);

    let commit_fails = "
        create function refuse() returns trigger language plpgsql as $$ begin raise 'refused'; end $$;
        create constraint trigger refusing after insert on orders deferrable initially deferred
        for each row execute function refuse()";
    sqlx::raw_sql(commit_fails).execute(&pool).await.expect("created");
    place_order(&pool, 2).await.expect_err("the commit fails");
    assert_eq!(count(&pool, "select count(*) from orders").await, 0);
    assert_eq!(count(&pool, "select count(*) from pgonce.outbox").await, 0);
    pool.close().await;
    tokio::task::spawn_blocking(move || server.stop()).await.expect("no panic").expect("it stops");
}
