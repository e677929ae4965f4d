// Writes an invoice for each order, exactly once, until SIGTERM or Ctrl-C.
//
// Receiving and the effect are one statement, and so one transaction; the payloads never leave the server. Any number of
// these may run. One that is killed, or loses its connection, leaves nothing half done: start it again.
//
// Usage: node consumer.mjs, with DATABASE_URL in the environment.

import { setTimeout as pause } from 'node:timers/promises';
import pg from 'pg';

// Every row that receive returns counts as applied: no filter, and no join that drops rows.
const APPLY = `
  with received as materialized (select * from pgonce.receive('invoices-node', max => 100))
  insert into invoices (consumer, order_id)
  select consumer, (payload ->> 'order')::bigint
  from received`;
// How long to wait where there was nothing to do.
const PAUSE_MS = 100;

const stop = new AbortController();
for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => stop.abort());

const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
try {
  let applied = 0;
  while (!stop.signal.aborted) {
    const { rowCount } = await client.query(APPLY);
    applied += rowCount;
    // A stop ends the pause early.
    if (rowCount === 0) await pause(PAUSE_MS, undefined, { signal: stop.signal }).catch(() => {});
  }
  console.log(`${applied} invoices written`);
} finally {
  await client.end();
}
