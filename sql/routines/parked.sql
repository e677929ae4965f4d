-- Parked: the messages that wait to be tried again, those that wait behind them, and how they come back.
--
-- With park_key only the first parked message of a key is due; the others have no time. When it is taken or given up, the
-- next one becomes due. Batches of parked messages and of new ones take turns, where there are both.
--
-- Locks: none of its own; whoever calls has the offset lock of the partition.
-- Indexes: those of parked; the primary keys of queue and processed_ids; dead_letters_offset.

create or replace function pgonce.next_of_key(
  consumer_id integer, partition integer, key text, after_offset bigint,
  out "offset" bigint, out due_at timestamptz)
language plpgsql volatile
set enable_sort = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  -- In an order that only parked_key has: one look into it, whatever the statistics say.
  select p."offset", p.due_at into next_of_key."offset", next_of_key.due_at
  from pgonce.parked p
  where p.consumer_id = next_of_key.consumer_id and p.partition = next_of_key.partition
    and p.key >= next_of_key.key and p.key <= next_of_key.key and p.taken_by is null
    and p."offset" > after_offset
  order by p.key, p."offset"
  limit 1;
end $$;
comment on function pgonce.next_of_key is 'Internal: the first parked message of a key behind an offset, and when it is due.';

create or replace function pgonce.to_park(message pgonce.queue, consumer_id integer)
returns pgonce.parked
language plpgsql volatile
as $$
declare
  copy pgonce.parked;
begin
  copy."offset" := message."offset";
  copy.enqueued_at := message.enqueued_at;
  copy.parked_at := clock_timestamp();
  copy.consumer_id := to_park.consumer_id;
  copy.partition := message.partition;
  copy.attempts := 0;
  copy.bytes := message.bytes;
  copy.message_id := message.message_id;
  copy.key := message.key;
  copy.payload := message.payload;
  copy.headers := message.headers;
  copy.is_suspect := false;
  return copy;
end $$;
comment on function pgonce.to_park is 'Internal: the row of parked that a message in the queue would have.';

create or replace function pgonce.set_due(consumer_id integer, partition integer, "offset" bigint, due_at timestamptz)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  update pgonce.parked p
  set due_at = set_due.due_at
  where p.consumer_id = set_due.consumer_id and p.partition = set_due.partition and p."offset" = set_due."offset";
end $$;
comment on function pgonce.set_due is 'Internal: says when a parked message is due.';

create or replace function pgonce.release_next(consumer_id integer, partition integer, keys text[])
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  key text;
  first record;
begin
  foreach key in array keys loop
    select n.* into first from pgonce.next_of_key(consumer_id, partition, key, 0) n;
    if first."offset" is not null and first.due_at is null then
      perform pgonce.set_due(consumer_id, partition, first."offset", clock_timestamp());
    end if;
  end loop;
end $$;
comment on function pgonce.release_next is 'Internal: the first parked message of each of these keys is due, if it waited behind another one.';

create or replace function pgonce.hold_back(consumer_id integer, partition integer, keys text[])
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  current_key text;
  first bigint;
begin
  for current_key in select distinct unnest(keys) loop
    select n."offset" into first from pgonce.next_of_key(consumer_id, partition, current_key, 0) n;
    update pgonce.parked p
    set due_at = null
    where p.consumer_id = hold_back.consumer_id and p.partition = hold_back.partition
      and p.key = current_key and p.taken_by is null and p.due_at is not null and p."offset" > first;
  end loop;
end $$;
comment on function pgonce.hold_back is 'Internal: of each of these keys only the first parked message is due, the others wait behind it.';

create or replace function pgonce.has_something(reader pgonce.consumers, partition integer, next_offset bigint)
returns boolean
language plpgsql stable
as $$
#variable_conflict use_column
declare
  -- A function that changes from row to row would be no bound of an index.
  present constant timestamptz := clock_timestamp();
  lives constant boolean := pgonce.handler_lives(reader.consumer_id, partition);
begin
  if lives is not null then
    -- What a handler that is gone has left behind is something.
    return not lives;
  end if;
  -- One look into an index each, whatever the statistics say: `limit 1` cannot become a join, and outside of `exists`
  -- the order stays.
  perform from pgonce.parked k
  where k.consumer_id = reader.consumer_id and k.partition = has_something.partition
    and k.taken_by is null and k.due_at <= present
  order by k.due_at
  limit 1;
  if found then
    return true;
  elsif reader.failure_policy = 'block' and exists (
    select from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = has_something.partition
      and k.taken_by is null and k."offset" < next_offset) then
    return false;
  end if;
  perform from pgonce.queue q
  where q.topic_id = reader.topic_id and q.partition = has_something.partition and q."offset" >= next_offset
  order by q."offset"
  limit 1;
  return found;
end $$;
comment on function pgonce.has_something is 'Internal: whether a consumer may find something to receive in a partition, from that offset on or parked.';

create or replace function pgonce.is_turn_of_new(reader pgonce.consumers, current pgonce.progress)
returns boolean
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  -- With block nothing new is received while something is parked; and under suspicion it is foretold what comes next.
  if not current.was_parked or reader.failure_policy = 'block'
    or pgonce.is_under_suspicion(reader, current.partition, current.next_offset) then
    return false;
  end if;
  perform from pgonce.queue q
  where q.topic_id = reader.topic_id and q.partition = current.partition and q."offset" >= current.next_offset
  order by q."offset"
  limit 1;
  return found;
end $$;
comment on function pgonce.is_turn_of_new is 'Internal: whether the next batch is of new messages, since the last one was not: what fails again and again must not keep all else waiting.';

create or replace function pgonce.due_suspect(reader pgonce.consumers, partition integer, next_offset bigint)
returns bigint
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  present constant timestamptz := clock_timestamp();
begin
  return (
    select k."offset" from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = due_suspect.partition
      and k.is_suspect and k.taken_by is null and k.due_at <= present and k."offset" < due_suspect.next_offset
      and (reader.failure_policy <> 'block' or not exists (
        select from pgonce.parked f
        where f.consumer_id = reader.consumer_id and f.partition = k.partition and f.taken_by is null
          and f."offset" < k."offset"))
    order by k.due_at
    limit 1);
end $$;
comment on function pgonce.due_suspect is 'Internal: the parked message that a process has died of and that is due, the longest due first. It is handed out by itself, so that nothing else dies with it.';

create or replace function pgonce.take_parked(
  reader pgonce.consumers, current pgonce.progress, max integer, max_bytes bigint, suspects boolean,
  out recorded bigint[], out duplicates integer)
language plpgsql volatile
set enable_sort = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  present constant timestamptz := clock_timestamp();
  due record;
  behind record;
  first bigint;
  taken bigint[];
  keys text[];
  bytes bigint;
  place bigint;
  is_alone boolean;
begin
  recorded := '{}';
  duplicates := 0;
  perform from pgonce.parked k
  where k.consumer_id = reader.consumer_id and k.partition = current.partition
    and k.taken_by = pg_current_xact_id_if_assigned();
  if found then
    -- Once a transaction: the view received tells what it takes by its mark alone.
    return;
  end if;
  is_alone := suspects and pgonce.due_suspect(reader, current.partition, current.next_offset) is not null;
  if is_alone then
    max := 1;
  elsif pgonce.is_turn_of_new(reader, current) then
    return;
  end if;
  loop
    taken := '{}';
    keys := '{}';
    bytes := 0;
    if reader.failure_policy = 'block' then
      select min(k."offset") into first from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = current.partition and k.taken_by is null;
    end if;
    -- Those that are due and the first of their keys, the longest due first, each with what waits behind it.
    for due in
      select k."offset", k.key, k.bytes
      from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = current.partition
        and k.taken_by is null and k.due_at <= present and k."offset" < current.next_offset
        and k.is_suspect = is_alone
      order by k.due_at, k."offset"
    loop
      exit when cardinality(taken) >= max or bytes >= max_bytes;
      if reader.failure_policy = 'park_key' then
        select n."offset" into first from pgonce.next_of_key(reader.consumer_id, current.partition, due.key, 0) n;
      end if;
      continue when first < due."offset";
      taken := taken || due."offset";
      keys := keys || due.key;
      bytes := bytes + due.bytes;
      for behind in
        select k."offset", k.bytes, k.is_suspect
        from pgonce.parked k
        where k.consumer_id = reader.consumer_id and k.partition = current.partition and k.taken_by is null
          and k.key >= due.key and k.key <= due.key
          and k."offset" > due."offset" and k."offset" < current.next_offset and k.due_at is null
        order by k.key, k."offset"
        limit take_parked.max
      loop
        exit when behind.is_suspect or cardinality(taken) >= max or bytes >= max_bytes;
        taken := taken || behind."offset";
        bytes := bytes + behind.bytes;
      end loop;
    end loop;
    exit when cardinality(taken) = 0;
    foreach place in array taken loop
      update pgonce.parked k
      set taken_by = pg_current_xact_id()
      where k.consumer_id = reader.consumer_id and k.partition = current.partition and k."offset" = place;
    end loop;
    with recorded as (
      insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
      select k."offset", k.consumer_id, k.partition, k.message_id
      from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = current.partition
        and k.taken_by = pg_current_xact_id()
      order by k."offset"
      on conflict do nothing
      returning "offset"
    )
    select coalesce(array_agg(r."offset" order by r."offset"), '{}') into recorded from recorded r;
    if cardinality(recorded) < cardinality(taken) then
      -- An id that was processed before in another place is left out, as everywhere. Nothing may find it marked as taken:
      -- it would be shown, or its record, which tells of that other place, be withdrawn.
      delete from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = current.partition
        and k.taken_by = pg_current_xact_id() and k."offset" <> all (recorded);
    end if;
    perform pgonce.release_next(reader.consumer_id, current.partition, keys);
    duplicates := duplicates + cardinality(taken) - cardinality(recorded);
    exit when cardinality(recorded) > 0;
  end loop;
end $$;
comment on function pgonce.take_parked is 'Internal: takes parked messages that are due, once a transaction, and records them as processed; answers their offsets, and how many were processed before in another place.';

create or replace function pgonce.left_out(
  reader pgonce.consumers, partition integer, first_offset bigint, last_offset bigint)
returns text[]
language plpgsql volatile
set enable_sort = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  if reader.failure_policy = 'park_key' then
    insert into pgonce.parked (
      "offset", enqueued_at, consumer_id, partition, attempts, bytes, message_id, key, payload, headers)
    select q."offset", q.enqueued_at, reader.consumer_id, q.partition, 0, q.bytes, q.message_id, q.key, q.payload, q.headers
    from pgonce.queue q
    -- As next_of_key has it.
    cross join lateral (
      select k."offset" from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = left_out.partition
        and k.key >= q.key and k.key <= q.key and k.taken_by is null
      order by k.key, k."offset"
      limit 1) first
    where q.topic_id = reader.topic_id and q.partition = left_out.partition
      and q."offset" between first_offset and last_offset
      and first."offset" < q."offset"
      and not exists (
        select from pgonce.dead_letters d
        where d.consumer_id = reader.consumer_id and d.partition = left_out.partition and d."offset" = q."offset")
    on conflict do nothing;
  end if;
  return array(
    select k.message_id from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = left_out.partition
      and k."offset" between first_offset and last_offset
    union
    select d.message_id from pgonce.dead_letters d
    where d.consumer_id = reader.consumer_id and d.partition = left_out.partition
      and d."offset" between first_offset and last_offset);
end $$;
comment on function pgonce.left_out is 'Internal: parks the messages of a run of offsets that must not overtake a parked one, and answers the ids of those that are parked or dead.';
