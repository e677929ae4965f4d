-- Fail: what becomes of a message whose attempt failed. It is parked until it is due again, or becomes a dead letter.
--
-- Either of two transactions may call it. One that has received the message, once it has rolled back its effect to a
-- savepoint behind `receive`: then fail takes the message out of what was received, and with it what may not overtake
-- it; the rest commits. Or any later one: the message was rolled back, and stands where it stood.
--
-- A parked message may stand ahead of the consumer's offset. `receive` leaves it out when it gets there, and parks what
-- must not overtake it, by the policy of the consumer:
--   park_key   later messages of its key are parked behind it, all others flow on;
--   block      nothing behind it is received;
--   skip       only the message itself waits.
-- Which of them is due is in parked.sql.
--
-- Locks: the offset lock of the partition, for which it waits. Indexes: the primary keys of parked, progress, queue and
-- processed_ids; parked_key.

create or replace function pgonce.next_attempt_at(reader pgonce.consumers, attempts integer)
returns timestamptz
language plpgsql volatile
as $$
declare
  longest constant interval :=
    least(reader.backoff_max_ms, reader.backoff_min_ms * 2.0 ^ least(attempts - 1, 40)) * interval '1 millisecond';
  grid constant interval := reader.backoff_min_ms / 2.0 * interval '1 millisecond';
begin
  -- Full jitter: anything between nothing and the exponential, so that what failed together does not come back together.
  -- But in steps: a batch for each message that is due would cost more than the messages.
  return least(
    date_bin(grid, clock_timestamp() + random() * longest + grid, timestamptz 'epoch'),
    clock_timestamp() + longest);
end $$;
comment on function pgonce.next_attempt_at is 'Internal: when a message is due again after so many failed attempts.';

create or replace function pgonce.give_up(message pgonce.parked, was_parked boolean)
returns void
language plpgsql volatile
as $$
begin
  insert into pgonce.dead_letters (
    "offset", enqueued_at, consumer_id, partition, attempts, bytes, message_id, key, error, payload, headers)
  values (
    message."offset", message.enqueued_at, message.consumer_id, message.partition, message.attempts, message.bytes,
    message.message_id, message.key, message.error, message.payload, message.headers);
  if was_parked then
    delete from pgonce.parked p
    where p.consumer_id = message.consumer_id and p.partition = message.partition and p."offset" = message."offset";
    perform pgonce.release_next(message.consumer_id, message.partition, array[message.key]);
  end if;
end $$;
comment on function pgonce.give_up is 'Internal: makes a message a dead letter; what waited behind it, if it was parked, goes on.';

create or replace function pgonce.count_failure(
  reader pgonce.consumers, partition integer, "offset" bigint, error text, permanent boolean, retry_at timestamptz,
  may_be_received boolean)
returns setof pgonce.failed
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  current pgonce.progress;
  is_own boolean;
  was_parked boolean;
  began bigint;
  waits boolean;
  behind bigint;
  queued pgonce.queue;
  message pgonce.parked;
  withdrawn_ids text[] := '{}';
  withdrawn_id text;
  withdrawn_offset bigint;
  answer pgonce.failed;
begin
  current := pgonce.newest_progress(reader.consumer_id, partition);
  is_own := may_be_received and current.writer is not distinct from pg_current_xact_id_if_assigned();
  if not is_own then
    -- An older snapshot would not show what became of the message before the lock was free.
    perform pgonce.require_read_committed('fail');
  end if;
  -- From here to current.next_offset this transaction has received.
  began := current.next_offset;
  if is_own then
    began := coalesce((
      select p.next_offset from pgonce.progress p
      where p.consumer_id = reader.consumer_id and p.partition = count_failure.partition and p.writer <> current.writer
      order by p.generation desc limit 1), 1);
  end if;

  select p.* into message from pgonce.parked p
  where p.consumer_id = reader.consumer_id and p.partition = count_failure.partition and p."offset" = count_failure."offset";
  was_parked := found;
  if was_parked then
    if message.taken_by is not null and message.taken_by is distinct from pg_current_xact_id_if_assigned() then
      answer := ('gone', null, null, '{}');
      return next answer;
      return;
    end if;
    if message.taken_by is not null then
      withdrawn_ids := array[message.message_id];
    end if;
  else
    select q.* into queued
    from pgonce.queue q
    where q.topic_id = reader.topic_id and q.partition = count_failure.partition and q."offset" = count_failure."offset"
      and q."offset" >= began
      and not exists (
        select from pgonce.dead_letters d
        where d.consumer_id = reader.consumer_id and d.partition = q.partition and d."offset" = q."offset")
      and (q."offset" >= current.next_offset
        or exists (
          select from pgonce.processed_ids r
          where r.consumer_id = reader.consumer_id and r.message_id = q.message_id
            and r.partition = q.partition and r."offset" = q."offset"));
    if not found then
      answer := ('gone', null, null, '{}');
      return next answer;
      return;
    end if;
    message := pgonce.to_park(queued, reader.consumer_id);
    if message."offset" < current.next_offset then
      withdrawn_ids := array[message.message_id];
    end if;
  end if;
  message.attempts := message.attempts + 1;
  message.error := left(coalesce(error, 'no error was given'), 4000);
  message.taken_by := null;

  if permanent or message.attempts >= reader.attempts_max then
    perform pgonce.give_up(message, was_parked);
    answer.outcome := 'dead';
  else
    message.due_at := coalesce(retry_at, pgonce.next_attempt_at(reader, message.attempts));
    if reader.failure_policy = 'park_key' then
      -- Only the first one of a key is due.
      select n."offset" < message."offset" into waits from pgonce.next_of_key(reader.consumer_id, partition, message.key, 0) n;
      message.due_at := case when waits then null else message.due_at end;
      select n."offset" into behind
      from pgonce.next_of_key(reader.consumer_id, partition, message.key, message."offset") n where n.due_at is not null;
      if found then
        perform pgonce.set_due(reader.consumer_id, partition, behind, null);
      end if;
    end if;
    insert into pgonce.parked as p values (message.*)
    on conflict (consumer_id, partition, "offset") do update
    set attempts = excluded.attempts, due_at = excluded.due_at, error = excluded.error, taken_by = null;
    answer.outcome := 'parked';
    if is_own and reader.failure_policy <> 'skip' then
      withdrawn_ids := withdrawn_ids || pgonce.withdraw_behind(reader, message, began, current.next_offset);
    end if;
  end if;

  answer.withdrawn := '{}';
  foreach withdrawn_id in array withdrawn_ids loop
    delete from pgonce.processed_ids r
    where r.consumer_id = reader.consumer_id and r.message_id = withdrawn_id
    returning r."offset" into withdrawn_offset;
    if found then
      answer.withdrawn := answer.withdrawn || withdrawn_offset;
    end if;
  end loop;
  if cardinality(answer.withdrawn) > 1 then
    answer.withdrawn := array(select w from unnest(answer.withdrawn) w order by w);
  end if;
  if is_own then
    update pgonce.progress p
    set received = p.received - cardinality(answer.withdrawn),
        failures = p.failures + 1,
        dead = p.dead + (answer.outcome = 'dead')::integer,
        next_offset = case
          when answer.outcome = 'parked' and reader.failure_policy = 'block' then least(p.next_offset, greatest(began, count_failure."offset" + 1))
          else p.next_offset
        end
    where p.consumer_id = reader.consumer_id and p.partition = count_failure.partition and p.generation = current.generation;
    -- The view received shows what is recorded, and no longer all that stands between two offsets.
    perform set_config('pgonce_batch.has_gaps', 'true', true);
  else
    current.failures := current.failures + 1;
    current.dead := current.dead + (answer.outcome = 'dead')::integer;
    current.was_parked := current.was_parked or was_parked;
    perform pgonce.append_progress(current);
  end if;
  answer.attempts := message.attempts;
  answer.due_at := message.due_at;
  return next answer;
end $$;
comment on function pgonce.count_failure is 'Internal: fail, for whoever holds the offset lock. Only a transaction that may have received the message withdraws it.';

create or replace function pgonce.fail(
  consumer text,
  partition integer,
  "offset" bigint,
  error text,
  permanent boolean default false,
  retry_at timestamptz default null)
returns setof pgonce.failed
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.transactional_row(consumer);
begin
  perform pgonce.lock_partition(reader, partition);
  return query select f.* from pgonce.count_failure(reader, partition, "offset", error, permanent, retry_at, true) f;
end $$;
comment on function pgonce.fail is 'Counts a failed attempt of a message and applies the failure policy of the consumer: the message is parked until a time that grows with each attempt (or retry_at), or, after attempts_max or if permanent, becomes a dead letter. Call it in the transaction that received the message, after a rollback of the effect to a savepoint behind receive, or in a later one. Waits for whoever is at the partition. Errors: PO002, PO003, PO007 (an inbox, or an external consumer), PO010 (READ COMMITTED only, unless this transaction has received).';

create or replace function pgonce.withdraw_behind(
  reader pgonce.consumers, message pgonce.parked, began bigint, next_offset bigint)
returns text[]
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  parked_again text[];
  received text[];
begin
  -- Parked ones that this transaction took: they go back, behind the message.
  with taken as (
    update pgonce.parked p
    set taken_by = null, due_at = case when reader.failure_policy = 'block' then p.due_at end
    where p.consumer_id = reader.consumer_id and p.partition = message.partition
      and p."offset" > message."offset" and p.taken_by = pg_current_xact_id()
      and (reader.failure_policy = 'block' or p.key = message.key)
    returning p.message_id
  )
  select coalesce(array_agg(t.message_id), '{}') into parked_again from taken t;
  -- New ones that it received: behind a key they are parked; where the partition waits they are received again.
  select coalesce(array_agg(q.message_id), '{}') into received
  from pgonce.queue q
  where q.topic_id = reader.topic_id and q.partition = message.partition
    and q."offset" > message."offset" and q."offset" >= began and q."offset" < next_offset
    and (reader.failure_policy = 'block' or q.key = message.key)
    and exists (
      select from pgonce.processed_ids r
      where r.consumer_id = reader.consumer_id and r.message_id = q.message_id
        and r.partition = q.partition and r."offset" = q."offset");
  if reader.failure_policy = 'park_key' and cardinality(received) > 0 then
    insert into pgonce.parked (
      "offset", enqueued_at, consumer_id, partition, attempts, bytes, message_id, key, payload, headers)
    select q."offset", q.enqueued_at, reader.consumer_id, q.partition, 0, q.bytes, q.message_id, q.key, q.payload, q.headers
    from pgonce.queue q
    where q.topic_id = reader.topic_id and q.message_id = any (received)
    -- Parked already, if this transaction has failed it, and then taken it again.
    on conflict do nothing;
  end if;
  return parked_again || received;
end $$;
comment on function pgonce.withdraw_behind is 'Internal: what this transaction has received and may not overtake a message that is now parked; answers the ids, whose records are to be deleted.';
