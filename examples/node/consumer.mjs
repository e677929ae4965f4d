// Writes an invoice for each order, exactly once, until SIGTERM or Ctrl-C.
//
// Receiving and the effect are one transaction. A message that fails is rolled back to a savepoint and tried again later; the
// others are applied. Any number of these may run. One that is killed, or loses its connection, leaves nothing half done:
// start it again.
//
// Usage: node consumer.mjs, with DATABASE_URL in the environment.

import { setTimeout as pause } from 'node:timers/promises';
import pg from 'pg';

// Every row that receive returns counts as applied, unless fail takes it back.
const RECEIVE = `select partition, "offset", payload from pgonce.receive('invoices-node', max => 100)`;
const APPLY = `insert into invoices (consumer, order_id) values ('invoices-node', $1)`;
const FAIL = `select withdrawn from pgonce.fail('invoices-node', $1, $2, $3)`;
// What a message is to blame for: its data, or a constraint. Anything else, such as a lost connection, ends the program, and
// the batch comes again.
const isFault = (error) => /^2[23]/.test(error.code);
// How long to wait where there was nothing to do.
const PAUSE_MS = 100;

const stop = new AbortController();
for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => stop.abort());

const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();

// Answers how many messages it received, and how many of these it applied.
async function applyBatch() {
  await client.query('begin');
  const { rows: messages } = await client.query(RECEIVE);
  // What failed, and what may not overtake it. An offset is a bigint, which pg hands out as a string.
  const withdrawn = new Set();
  for (const { partition, offset, payload } of messages) {
    if (withdrawn.has(offset)) continue;
    await client.query('savepoint message');
    try {
      await client.query(APPLY, [payload.order]);
    } catch (error) {
      if (!isFault(error)) throw error;
      await client.query('rollback to savepoint message');
      const { rows } = await client.query(FAIL, [partition, offset, error.message]);
      for (const offset of rows[0].withdrawn) withdrawn.add(offset);
    }
    await client.query('release savepoint message');
  }
  await client.query('commit');
  return { received: messages.length, applied: messages.length - withdrawn.size };
}

try {
  let applied = 0;
  while (!stop.signal.aborted) {
    const batch = await applyBatch();
    applied += batch.applied;
    // A stop ends the pause early.
    if (batch.received === 0) await pause(PAUSE_MS, undefined, { signal: stop.signal }).catch(() => {});
  }
  console.log(`${applied} invoices written`);
} finally {
  await client.end();
}
