//! Places orders through sqlx. An order and the message about it exist together or not at all.
//!
//! Usage: `pgonce-examples FIRST COUNT`, with `DATABASE_URL` in the environment.

use anyhow::Context;
use pgonce::sql;
use serde_json::json;
use sqlx::{PgPool, Row};

/// Places an order, and answers whether it was new. Safe to repeat when in doubt.
async fn place_order(pool: &PgPool, order: i64) -> sqlx::Result<bool> {
    let mut transaction = pool.begin().await?;
    sqlx::query("insert into orders (id, placed_by) values ($1, 'sqlx') on conflict (id) do nothing")
        .bind(order)
        .execute(&mut *transaction)
        .await?;
    let sent = sqlx::query(sql::ENQUEUE)
        .bind("orders")
        .bind(json!({ "order": order }))
        .bind(order.to_string())
        .bind(format!("order-{order}-placed"))
        .bind(None::<serde_json::Value>) // headers
        .bind(None::<String>) // deliver_at: at once
        .fetch_one(&mut *transaction)
        .await?;
    let was_duplicate: bool = sent.try_get("was_duplicate")?;
    // Without this it is all rolled back.
    transaction.commit().await?;
    Ok(!was_duplicate)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |name| -> anyhow::Result<i64> {
        let argument = arguments.next().with_context(|| format!("{name} is missing: give FIRST and COUNT"))?;
        argument.parse().with_context(|| format!("{name} is no number"))
    };
    let (first, count) = (number("FIRST")?, number("COUNT")?);
    let url = std::env::var("DATABASE_URL").context("DATABASE_URL is not set")?;
    let pool = PgPool::connect(&url).await?;
    let mut placed = 0;
    for order in first..first + count {
        placed += i64::from(place_order(&pool, order).await?);
    }
    println!("{placed} orders placed, {} known", count - placed);
    Ok(())
}

#[cfg(test)]
mod tests;
