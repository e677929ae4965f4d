-- Handover: how an at_most_once consumer records messages first, and lets its handler act afterwards.
--
-- There are two transactions. One receives, notes in the generation of progress that it appends what it has received and
-- whose it is now, and commits: no crash brings the messages back. The other one is the handler's. It was begun before, so that
-- its xid can be noted, and at its end appends a generation without the note (finish_handover). As long as it is in
-- progress nobody receives in that partition: so the order of a key holds although the offset lock is free. If it ends
-- without its COMMIT, the note stays, and whoever comes next buries the messages: they are not applied, they do not come again,
-- and the dead letters say so.
--
-- A process that dies needs no other trace than this, and a COMMIT whose answer was lost no question: the note is gone if
-- and only if the handler's transaction has committed (which the handler itself must not do).
--
-- Whether a transaction is in progress is read from the snapshot that shows its note. Its xid is lower than that of the one
-- which wrote the note, so once that has committed such a snapshot lists it, if it is in progress. An xid from another
-- server, in a restored dump, is hardly ever listed; where it is, the partition waits for the transaction that has it here.
--
-- Locks: the offset lock of the partition, for which they wait. Indexes: the primary keys of progress, parked, queue and
-- processed_ids.

create or replace function pgonce.handler_lives(consumer_id integer, partition integer)
returns boolean
language plpgsql stable
as $$
declare
  lives boolean;
begin
  -- Note and list in one snapshot: a transaction that ended in between would be taken for one that was rolled back.
  select exists (select from pg_snapshot_xip(pg_current_snapshot()) x where x = p.handler)
      or p.handler is not distinct from pg_current_xact_id_if_assigned()
      or p.writer is not distinct from pg_current_xact_id_if_assigned()
  into lives
  from pgonce.newest_progress(consumer_id, partition) p
  where p.handler is not null;
  return lives;
end $$;
comment on function pgonce.handler_lives is 'Internal: whether the handler that messages of a partition were handed over to is still at them; null where none were.';

create or replace function pgonce.withdraw_recorded(reader pgonce.consumers, partition integer, "offset" bigint)
returns pgonce.parked
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  queued pgonce.queue;
  message pgonce.parked;
begin
  select p.* into message from pgonce.parked p
  where p.consumer_id = reader.consumer_id and p.partition = withdraw_recorded.partition
    and p."offset" = withdraw_recorded."offset";
  if not found then
    select q.* into queued
    from pgonce.queue q
    where q.topic_id = reader.topic_id and q.partition = withdraw_recorded.partition
      and q."offset" = withdraw_recorded."offset";
    message := pgonce.to_park(queued, reader.consumer_id);
  end if;
  delete from pgonce.processed_ids r
  where r.consumer_id = reader.consumer_id and r.message_id = message.message_id
    and r.partition = withdraw_recorded.partition and r."offset" = withdraw_recorded."offset";
  if not found then
    return null;
  end if;
  message.taken_by := null;
  return message;
end $$;
comment on function pgonce.withdraw_recorded is 'Internal: deletes the record that a message was processed at that offset, and answers the message; null where it is not recorded there, or purged.';

create or replace function pgonce.withdraw_many(
  reader pgonce.consumers, current pgonce.progress, failed bigint[], errors text[], untried bigint[])
returns pgonce.progress
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  message pgonce.parked;
  keys text[] := '{}';
begin
  for i in 1 .. cardinality(failed) loop
    message := pgonce.withdraw_recorded(reader, current.partition, failed[i]);
    continue when message.message_id is null;
    message.attempts := message.attempts + 1;
    message.error := left(coalesce(errors[i], 'no error was given'), 4000);
    perform pgonce.give_up(message, true);
    current.received := current.received - 1;
    current.failures := current.failures + 1;
    current.dead := current.dead + 1;
  end loop;
  for i in 1 .. cardinality(untried) loop
    message := pgonce.withdraw_recorded(reader, current.partition, untried[i]);
    continue when message.message_id is null;
    message.due_at := clock_timestamp();
    insert into pgonce.parked as p values (message.*)
    on conflict (consumer_id, partition, "offset") do update set due_at = excluded.due_at, taken_by = null;
    current.received := current.received - 1;
    keys := keys || message.key;
  end loop;
  if reader.failure_policy = 'park_key' then
    perform pgonce.hold_back(reader.consumer_id, current.partition, keys);
  end if;
  -- The view received shows what is recorded, and no longer all that stands between two offsets.
  perform set_config('pgonce_batch.has_gaps', 'true', true);
  return current;
end $$;
comment on function pgonce.withdraw_many is 'Internal: of messages that are recorded as processed, makes those that failed dead letters, with their errors, and gives those back that were not tried, due at once; answers progress with the counters changed. For whoever holds the offset lock.';

create or replace function pgonce.end_handover(reader pgonce.consumers, partition integer)
returns boolean
language plpgsql volatile
as $$
declare
  current pgonce.progress;
  offsets bigint[];
begin
  if pgonce.handler_lives(reader.consumer_id, partition) then
    return false;
  end if;
  current := pgonce.newest_progress(reader.consumer_id, partition);
  offsets := current.handed_over;
  current.handler := null;
  current.handed_over := null;
  perform pgonce.append_progress(pgonce.withdraw_many(
    reader, current, offsets,
    array_fill('its handler did not come to an end: the process died, or its connection'::text, array[cardinality(offsets)]),
    '{}'));
  return true;
end $$;
comment on function pgonce.end_handover is 'Internal: buries what was handed over to a handler that is gone; false where it is still at it. For whoever holds the offset lock and has seen that something was handed over.';

create or replace function pgonce.hand_over(consumer text, partition integer, offsets bigint[], handler xid8)
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.transactional_row(consumer);
  current pgonce.progress;
begin
  select n.* into current
  from pgonce.consumer_partitions p
  cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) n
  where p.consumer_id = reader.consumer_id and p.partition = hand_over.partition;
  if current.writer is distinct from pg_current_xact_id() or current.handler is not null then
    raise exception using errcode = 'PO003', message = format('partition %s of consumer %L', partition, consumer),
      hint = 'hand_over is for a transaction that has received there, once.';
  elsif handler is null or handler >= pg_current_xact_id() then
    raise exception using errcode = 'PO003', message = format('handler transaction %s', coalesce(handler::text, 'null')),
      hint = 'Begin the transaction of the handler first, and ask there for pg_current_xact_id(), before the other one receives.';
  elsif coalesce(cardinality(offsets), 0) not between 1 and 10000 then
    raise exception using errcode = 'PO003', message = format('%s offsets', coalesce(cardinality(offsets), 0)),
      hint = 'hand_over takes the offsets of the 1 to 10000 messages that this transaction has received.';
  end if;
  update pgonce.progress p
  set handler = hand_over.handler, handed_over = hand_over.offsets
  where p.consumer_id = current.consumer_id and p.partition = current.partition and p.generation = current.generation;
  if current_setting('synchronous_commit') = 'off' then
    -- The handler may act outside: a crash of the server must not bring the messages back.
    perform set_config('synchronous_commit', 'local', true);
  end if;
end $$;
comment on function pgonce.hand_over is 'At most once: notes that messages which this transaction has received go to a handler, whose transaction is open already and has that xid. COMMIT, then let the handler act there, with finish_handover as its last statement. Until that transaction ends nobody receives in the partition; what it leaves without its COMMIT becomes dead letters. Errors: PO002, PO003, PO007 (an inbox, or an external consumer).';

create or replace function pgonce.finish_handover(
  consumer text, partition integer, failed bigint[] default '{}', errors text[] default '{}', untried bigint[] default '{}')
returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.transactional_row(consumer);
  current pgonce.progress;
begin
  perform pgonce.require_read_committed('finish_handover');
  perform pgonce.lock_partition(reader, partition);
  current := pgonce.newest_progress(reader.consumer_id, partition);
  if current.handler is null or current.handler is distinct from pg_current_xact_id_if_assigned() then
    return false;
  end if;
  current.handler := null;
  current.handed_over := null;
  perform pgonce.append_progress(pgonce.withdraw_many(
    reader, current, coalesce(failed, '{}'), coalesce(errors, '{}'), coalesce(untried, '{}')));
  return true;
end $$;
comment on function pgonce.finish_handover is 'At most once, the last statement of the handler''s transaction: what failed becomes dead letters, each with its error, what was not tried comes again, and all else that was handed over is applied if this commits. False: nothing was handed over to this transaction, so roll it back. Waits for whoever is at the partition. Errors: PO002, PO003, PO007 (an inbox, or an external consumer), PO010 (READ COMMITTED only).';

create or replace function pgonce.bury(consumer text, partition integer, "offset" bigint, error text)
returns setof pgonce.buried
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.transactional_row(consumer);
  answer pgonce.buried := row('gone');
  current pgonce.progress;
  changed pgonce.progress;
begin
  perform pgonce.require_read_committed('bury');
  perform pgonce.lock_partition(reader, partition);
  current := pgonce.newest_progress(reader.consumer_id, partition);
  -- What was handed over is the handler's, or for whoever receives next.
  if "offset" = any (current.handed_over) is not true then
    changed := pgonce.withdraw_many(reader, current, array["offset"], array[error], '{}');
    if changed.dead > current.dead then
      perform pgonce.append_progress(changed);
      answer.outcome := 'dead';
    end if;
  end if;
  return next answer;
end $$;
comment on function pgonce.bury is 'For a consumer that receives, commits, and acts afterwards: its effect failed, so the message, which is recorded as processed, becomes a dead letter, and a replay takes it through the consumer again. Answers dead; gone: it is not recorded at that offset, or a handler that it was handed over to is at it. Waits for whoever is at the partition. Errors: PO002, PO003, PO007 (an inbox, or an external consumer), PO010 (READ COMMITTED only).';
