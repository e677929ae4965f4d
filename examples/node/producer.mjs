// Places orders. An order and the message about it exist together or not at all.
//
// Usage: node producer.mjs FIRST COUNT, with DATABASE_URL in the environment.

import pg from 'pg';

const ENQUEUE = `
  select was_duplicate
  from pgonce.enqueue('orders', $1, key => $2, message_id => $3)`;

/** Places an order, and answers whether it was new. Safe to repeat when in doubt. */
async function placeOrder(client, order) {
  await client.query('begin');
  try {
    await client.query("insert into orders (id, placed_by) values ($1, 'node') on conflict (id) do nothing", [order]);
    const { rows } = await client.query(ENQUEUE, [{ order }, `${order}`, `order-${order}-placed`]);
    await client.query('commit');
    return !rows[0].was_duplicate;
  } catch (error) {
    await client.query('rollback');
    throw error;
  }
}

const [first, count] = process.argv.slice(2).map(Number);
const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
try {
  let placed = 0;
  for (let order = first; order < first + count; order += 1) {
    if (await placeOrder(client, order)) placed += 1;
  }
  console.log(`${placed} orders placed, ${count - placed} known`);
} finally {
  await client.end();
}
