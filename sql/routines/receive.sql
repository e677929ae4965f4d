-- Receive: how messages get from the queue to a consumer, inside the transaction of its effect.
--
-- Locks: the offset lock of a partition, FOR NO KEY UPDATE SKIP LOCKED. It never waits for anybody. COMMIT applies
-- offset, record and effect together, ROLLBACK undoes all three.
-- Indexes: the primary keys of queue (topic_id, partition, offset), progress and processed_ids. Every look at the queue is
-- in the order of the offsets, with sorting switched off: so no statistics can make another index look as good.
--
-- What failed before. Messages that are parked (parked.sql) come back through receive, in the order of their keys; a batch
-- has either these or new ones, in turns. They stay in `parked`, marked by the transaction that took them, until a later receive
-- removes them: so the view `received` can show them, and no payload is copied back. New messages that must not overtake
-- a parked one are parked behind it, and the offset moves past them.
--
-- A stale statement. In `with received as (select * from receive(...)) update ...` the snapshot of the whole statement is
-- older than the lock that receive takes. What the holder before committed in between is invisible to the update: its
-- effect would be computed from the state before, and silently lost, while the offset moves on. So receive is a STABLE
-- wrapper that reads the newest generations of progress in the caller's snapshot and hands them to a VOLATILE part,
-- which reads them again once it has the lock, and leaves alone a partition where they differ: no rows, and the next
-- statement sees it all. The wrapper has neither SECURITY DEFINER nor SET, with which it could not be inlined: the two
-- functions that it calls have both. Above READ COMMITTED both see the same; there the insert of the next generation gets 40001.
--
-- A statement that runs receive twice. Where an UPDATE has waited for another session's, PostgreSQL evaluates its row
-- again, with the subqueries in it: a `received` that is not MATERIALIZED would be received again, and what came first
-- would be lost. The second run meets a generation that this very transaction wrote and the statement has not seen, and
-- raises.

create or replace function pgonce.open_messages()
returns setof pgonce.received_message
language plpgsql stable security definer rows 1000
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers;
  open_partition constant integer := nullif(current_setting('pgonce_batch.partition', true), '');
  first_offset constant bigint := nullif(current_setting('pgonce_batch.first_offset', true), '');
  last_offset constant bigint := nullif(current_setting('pgonce_batch.last_offset', true), '');
begin
  select c.* into reader from pgonce.consumers c
  where c.consumer_id = nullif(current_setting('pgonce_batch.consumer_id', true), '')::integer;
  if current_setting('pgonce_batch.is_of_parked', true) = 'true' then
    return query
      select reader.consumer, k.partition, k."offset", k.message_id, k.key, k.payload, k.headers, k.enqueued_at, k.attempts + 1
      from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = open_partition
        and k."offset" between first_offset and last_offset
        and k.taken_by = pg_current_xact_id_if_assigned()
      order by k."offset";
  elsif current_setting('pgonce_batch.has_gaps', true) = 'false' then
    return query
      select reader.consumer, q.partition, q."offset", q.message_id, q.key, q.payload, q.headers, q.enqueued_at, 1
      from pgonce.queue q
      where q.topic_id = reader.topic_id and q.partition = open_partition
        and q."offset" between first_offset and last_offset
      order by q."offset";
  else
    return query
      select reader.consumer, q.partition, q."offset", q.message_id, q.key, q.payload, q.headers, q.enqueued_at, 1
      from pgonce.queue q
      where q.topic_id = reader.topic_id and q.partition = open_partition
        and q."offset" between first_offset and last_offset
        and exists (
          select from pgonce.processed_ids p
          where p.consumer_id = reader.consumer_id and p.message_id = q.message_id
            and p.partition = q.partition and p."offset" = q."offset")
      order by q."offset";
  end if;
end $$;
comment on function pgonce.open_messages is 'What the view received shows. A function, so that statements over it are planned quickly, and always in the same way.';

create or replace view pgonce.received as
select m.consumer, m.partition, m."offset", m.message_id, m.key, m.payload, m.headers, m.enqueued_at, m.attempt
from pgonce.open_messages() m
where (select current_setting('pgonce_batch.is_traced', true) is distinct from 'true') or nextval('pgonce.looks') > 0;
comment on view pgonce.received is 'The messages that open_batch received in this transaction: what the statements of an sql consumer read. Empty outside such a transaction.';

create or replace function pgonce.newest_progress(consumer_id integer, partition integer)
returns pgonce.progress
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  newest pgonce.progress;
begin
  select p.* into strict newest from pgonce.progress p
  where p.consumer_id = newest_progress.consumer_id and p.partition = newest_progress.partition
  order by p.generation desc limit 1;
  return newest;
end $$;
comment on function pgonce.newest_progress is 'Internal: the generation of a consumer''s progress that is in force.';

create or replace function pgonce.append_progress(changed pgonce.progress)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  -- Under the lock nobody else adds a generation. A caller above READ COMMITTED whose snapshot is too old for the
  -- newest one gets 40001 here.
  insert into pgonce.progress (
    consumer_id, partition, generation, next_offset, received, duplicates, failures, dead, was_parked, handler, handed_over)
  values (
    changed.consumer_id, changed.partition, changed.generation + 1, changed.next_offset, changed.received,
    changed.duplicates, changed.failures, changed.dead, changed.was_parked, changed.handler, changed.handed_over)
  on conflict do nothing;
  if not found then
    raise exception using errcode = 'PO012', message = 'a newer generation of progress than the newest',
      hint = 'Nothing was changed. Rows of progress are being changed by hand, or this is a defect: please report it.';
  end if;
  if changed.generation % 64 = 0 then
    -- Never the one that was in force when this transaction began: fail tells by it what the transaction has received.
    delete from pgonce.progress p
    where p.consumer_id = changed.consumer_id and p.partition = changed.partition
      and p.generation between changed.generation - 200 and changed.generation - 64
      and p.generation < (
        select o.generation from pgonce.progress o
        where o.consumer_id = changed.consumer_id and o.partition = changed.partition and o.writer <> pg_current_xact_id()
        order by o.generation desc limit 1);
  end if;
end $$;
comment on function pgonce.append_progress is 'Internal: the next generation of a consumer''s progress, from the one in force as the caller has changed it. Old ones are deleted in passing.';

create or replace function pgonce.seen_progress(consumer text, partition integer)
returns bigint[]
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
begin
  return array(
    select (pgonce.newest_progress(p.consumer_id, p.partition)).generation
    from pgonce.consumer_partitions p
    join pgonce.consumers c using (consumer_id)
    where c.consumer = seen_progress.consumer
      and (seen_progress.partition is null or p.partition = seen_progress.partition)
    order by p.partition);
end $$;
comment on function pgonce.seen_progress is 'Internal: the generations of progress that the calling statement sees, of one partition or of all in order.';

create or replace function pgonce.record_batch(
  reader pgonce.consumers, partition integer, first_offset bigint, last_offset bigint, known text[])
returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
  select q."offset", reader.consumer_id, q.partition, q.message_id
  from pgonce.queue q
  where q.topic_id = reader.topic_id and q.partition = record_batch.partition
    and q."offset" between first_offset and last_offset
    and (cardinality(known) = 0 or q.message_id <> all (known))
  order by q."offset";
end $$;
comment on function pgonce.record_batch is 'Internal: records a run of offsets as processed, without the ids in known.';

create or replace function pgonce.known_ids(
  reader pgonce.consumers, partition integer, first_offset bigint, last_offset bigint)
returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- One look-up an id, whatever the statistics say: `limit 1` keeps the planner from scanning all of processed_ids.
  return array(
    select p.message_id
    from pgonce.queue q
    cross join lateral (
      select k.message_id from pgonce.processed_ids k
      where k.consumer_id = reader.consumer_id and k.message_id = q.message_id
      limit 1) p
    where q.topic_id = reader.topic_id and q.partition = known_ids.partition
      and q."offset" between first_offset and last_offset
    order by q."offset");
end $$;
comment on function pgonce.known_ids is 'Internal: which ids in a run of offsets the consumer has processed before.';

create or replace function pgonce.receive_seen(
  consumer text, max integer, partition integer, max_bytes bigint, suspects boolean, seen bigint[])
returns setof pgonce.received_message
language plpgsql volatile rows 1000 security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set enable_sort = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers;
  target record;
  current pgonce.progress;
  changed pgonce.progress;
  batch record;
  waiting record;
  known text[];
  held text[];
  taken record;
begin
  reader := pgonce.transactional_row(consumer);
  if max is null or max not between 1 and 10000 then
    raise exception using errcode = 'PO003', message = format('max of %s messages', max),
      hint = 'receive takes 1 to 10000 messages a call.';
  elsif max_bytes is null or max_bytes < 1 then
    raise exception using errcode = 'PO003', message = format('max_bytes of %s', max_bytes),
      hint = 'receive takes at least 1 byte a call, and at least one message.';
  elsif partition is not null and cardinality(seen) = 0 then
    raise exception using errcode = 'PO003', message = format('partition %s of consumer %L', partition, consumer),
      hint = 'See which partitions it has: select * from pgonce.consumer_offsets.';
  elsif reader.paused then
    return;
  elsif pg_current_xact_id_if_assigned() is not null and exists (
    select from pgonce.consumer_partitions p
    cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) newest
    where p.consumer_id = reader.consumer_id
      and (receive_seen.partition is null or p.partition = receive_seen.partition)
      and newest.writer = pg_current_xact_id_if_assigned()
      and newest.generation is distinct from
          seen[case when receive_seen.partition is null then p.partition + 1 else 1 end]) then
    raise exception using errcode = 'PO011', message = format('receive runs twice in one statement for consumer %L', consumer),
      hint = 'Write: with received as materialized (select * from ...receive(...)); or use open_batch and the view received.';
  end if;

  for target in
    select p.partition, seen[case when receive_seen.partition is null then p.partition + 1 else 1 end] as generation
    from pgonce.consumer_partitions p
    cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) newest
    where p.consumer_id = reader.consumer_id
      and (receive_seen.partition is null or p.partition = receive_seen.partition)
      and pgonce.has_something(reader, p.partition, newest.next_offset)
    order by random()
  loop
    perform from pgonce.consumer_partitions p
    where p.consumer_id = reader.consumer_id and p.partition = target.partition
    for no key update skip locked;
    continue when not found;
    current := pgonce.newest_progress(reader.consumer_id, target.partition);
    continue when current.generation is distinct from target.generation;
    if current.handler is not null then
      continue when not pgonce.end_handover(reader, target.partition);
      current := pgonce.newest_progress(reader.consumer_id, target.partition);
    end if;
    -- Who does not want suspects leaves such a partition to take_suspicion, which names the partition.
    continue when not suspects and receive_seen.partition is null
      and pgonce.is_under_suspicion(reader, target.partition, current.next_offset);

    if exists (
      select from pgonce.parked k where k.consumer_id = reader.consumer_id and k.partition = target.partition) then
      -- Those that an earlier transaction took are processed: it has committed, or else they would not bear its mark.
      delete from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = target.partition
        and k.taken_by is not null and k.taken_by is distinct from pg_current_xact_id_if_assigned();
      select t.recorded, t.duplicates into strict taken
      from pgonce.take_parked(reader, current, max, max_bytes, suspects) t;
      if cardinality(taken.recorded) + taken.duplicates > 0 then
        current.received := current.received + cardinality(taken.recorded);
        current.duplicates := current.duplicates + taken.duplicates;
        current.was_parked := true;
        perform pgonce.append_progress(current);
        current := pgonce.newest_progress(reader.consumer_id, target.partition);
      end if;
      if cardinality(taken.recorded) > 0 then
        return query
          select reader.consumer, k.partition, k."offset", k.message_id, k.key, k.payload, k.headers, k.enqueued_at, k.attempts + 1
          from pgonce.parked k
          where k.consumer_id = reader.consumer_id and k.partition = target.partition
            and k.taken_by = pg_current_xact_id()
          order by k."offset";
        perform set_config('pgonce_batch.is_open', 'true', true), set_config('pgonce_batch.is_of_parked', 'true', true);
        return;
      end if;
    end if;

    -- How far the batch goes. Only where the bytes do not fit is it worth adding them up row by row.
    select count(*) as messages, coalesce(max(q."offset"), 0) as last, sum(q.bytes) as bytes
    into strict batch
    from (
      select q."offset", q.bytes
      from pgonce.queue q
      where q.topic_id = reader.topic_id and q.partition = target.partition and q."offset" >= current.next_offset
      order by q."offset"
      limit receive_seen.max) q;
    if batch.bytes > max_bytes then
      select count(*) as messages, max(q."offset") as last, sum(q.bytes) as bytes
      into strict batch
      from (
        select q."offset", q.bytes, sum(q.bytes) over in_order - q.bytes as bytes_before
        from pgonce.queue q
        where q.topic_id = reader.topic_id and q.partition = target.partition
          and q."offset" between current.next_offset and batch.last
        window in_order as (order by q."offset" rows unbounded preceding)) q
      where q.bytes_before < receive_seen.max_bytes;
    end if;
    continue when batch.messages = 0;
    if batch.last - current.next_offset + 1 <> batch.messages then
      raise exception using errcode = 'PO009',
        message = format('partition %s of consumer %L has a hole at or after offset %s', target.partition, consumer, current.next_offset),
        hint = 'Messages were deleted from the queue by hand. Restore them, or create the consumer anew.';
    end if;
    held := '{}';
    if exists (
      select from pgonce.parked k where k.consumer_id = reader.consumer_id and k.partition = target.partition)
      or exists (
      select from pgonce.dead_letters d
      where d.consumer_id = reader.consumer_id and d.partition = target.partition and d."offset" >= current.next_offset) then
      if reader.failure_policy = 'block' then
        select min(k."offset") as first into strict waiting
        from pgonce.parked k
        where k.consumer_id = reader.consumer_id and k.partition = target.partition and k.taken_by is null;
        continue when waiting.first < current.next_offset;
        batch.last := least(batch.last, waiting.first);
        batch.messages := batch.last - current.next_offset + 1;
      end if;
      held := pgonce.left_out(reader, target.partition, current.next_offset, batch.last);
    end if;
    changed := current;
    changed.next_offset := batch.last + 1;
    changed.was_parked := false;
    changed.received := current.received + batch.messages - cardinality(held);
    perform pgonce.append_progress(changed);
    -- Nor does anybody else add records of this consumer for ids of this topic, so a plain INSERT is enough, and the
    -- primary key finds the duplicates. They are rare: only then is each id looked up.
    known := '{}';
    begin
      perform pgonce.record_batch(reader, target.partition, current.next_offset, batch.last, held);
    exception when unique_violation then
      known := pgonce.known_ids(reader, target.partition, current.next_offset, batch.last);
      known := array(select k from unnest(known) k where k <> all (held));
      if cardinality(known) = 0 then
        raise exception using errcode = '40001', message = 'the snapshot is older than what the consumer has processed',
          hint = 'Run the transaction again.';
      end if;
      perform pgonce.record_batch(reader, target.partition, current.next_offset, batch.last, known || held);
      update pgonce.progress p
      set received = p.received - cardinality(known), duplicates = p.duplicates + cardinality(known)
      where p.consumer_id = reader.consumer_id and p.partition = target.partition and p.generation = current.generation + 1;
    end;
    return query
      select reader.consumer, q.partition, q."offset", q.message_id, q.key, q.payload, q.headers, q.enqueued_at, 1
      from pgonce.queue q
      where q.topic_id = reader.topic_id and q.partition = target.partition
        and q."offset" between current.next_offset and batch.last
        and (cardinality(held) + cardinality(known) = 0 or q.message_id <> all (known || held))
      order by q."offset";
    -- Gone with the transaction: how a worker sees that a handler has not ended it.
    perform set_config('pgonce_batch.is_open', 'true', true), set_config('pgonce_batch.is_of_parked', 'false', true);
    exit when cardinality(known) + cardinality(held) < batch.messages;
  end loop;
end $$;
comment on function pgonce.receive_seen is 'Internal: receive, told which generations of progress the calling statement has seen.';

create or replace function pgonce.receive(
  consumer text,
  max integer default 1000,
  partition integer default null,
  max_bytes bigint default 8388608,
  suspects boolean default true)
returns setof pgonce.received_message
language sql stable rows 1000
begin atomic
  select r.consumer, r.partition, r."offset", r.message_id, r.key, r.payload, r.headers, r.enqueued_at, r.attempt
  from pgonce.receive_seen(
    receive.consumer, receive.max, receive.partition, receive.max_bytes, receive.suspects,
    pgonce.seen_progress(receive.consumer, receive.partition)) r;
end;
comment on function pgonce.receive is 'The next messages of a consumer: up to max of one partition (and about max_bytes, at least one message), in the order of their offsets, or those that failed before and are due again, in turns (attempt says how often they have been tried, this time included); one that a process has died of comes by itself, or, unless suspects, not at all; recorded as processed, and the offset moved on, in the caller''s transaction. Every row that it returns counts as applied. No rows: nothing to do, or all of a batch was processed before or waits behind what is parked, or somebody else is at it, or a newer state than the statement sees; ask again. Errors: PO002, PO003, PO007 (an inbox, or an external consumer), PO009 (a hole), PO011 (twice in one statement).';

create or replace function pgonce.open_batch(
  consumer text,
  max integer default 1000,
  partition integer default null,
  max_bytes bigint default 8388608,
  suspects boolean default true)
returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  batch record;
begin
  select count(*) as messages, min(r.partition) as partition, min(r."offset") as first, max(r."offset") as last
  into strict batch
  from pgonce.receive(consumer, max, partition, max_bytes, suspects) r;
  -- Also where it is empty: the batch of a call before must not be seen again.
  perform set_config('pgonce_batch.consumer_id', (pgonce.consumer_row(consumer)).consumer_id::text, true),
          set_config('pgonce_batch.partition', coalesce(batch.partition::text, ''), true),
          set_config('pgonce_batch.first_offset', coalesce(batch.first::text, ''), true),
          set_config('pgonce_batch.last_offset', coalesce(batch.last::text, ''), true),
          set_config('pgonce_batch.has_gaps', coalesce((batch.messages <> batch.last - batch.first + 1)::text, ''), true);
  return batch.messages;
end $$;
comment on function pgonce.open_batch is 'receive without handing the messages out: until the end of the transaction, the view received shows them. Answers their number.';
