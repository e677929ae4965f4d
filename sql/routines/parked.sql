-- Parked: the messages that wait to be tried again, those that wait behind them, and how they come back.
--
-- With park_key only the first parked message of a key is due; the others have no time. When it is taken or given up, the
-- next one becomes due.
--
-- Locks: none of its own; whoever calls has the offset lock of the partition.
-- Indexes: those of parked; the primary keys of queue and processed_ids; dead_letters_offset.

create or replace function pgonce.release_next(consumer_id integer, partition integer, keys text[])
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  update pgonce.parked p
  set due_at = clock_timestamp()
  from unnest(keys) k(key)
  cross join lateral (
    select n."offset", n.due_at from pgonce.parked n
    where n.consumer_id = release_next.consumer_id and n.partition = release_next.partition
      and n.key = k.key and n.taken_by is null
    order by n."offset"
    limit 1) first
  where p.consumer_id = release_next.consumer_id and p.partition = release_next.partition
    and p."offset" = first."offset" and first.due_at is null;
end $$;
comment on function pgonce.release_next is 'Internal: the first parked message of each of these keys is due, if it waited behind another one.';

create or replace function pgonce.hold_back(consumer_id integer, partition integer, keys text[])
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  update pgonce.parked p
  set due_at = null
  where p.consumer_id = hold_back.consumer_id and p.partition = hold_back.partition
    and p.key = any (keys) and p.taken_by is null and p.due_at is not null
    and exists (
      select from pgonce.parked f
      where f.consumer_id = p.consumer_id and f.partition = p.partition and f.key = p.key and f.taken_by is null
        and f."offset" < p."offset");
end $$;
comment on function pgonce.hold_back is 'Internal: of each of these keys only the first parked message is due, the others wait behind it.';

create or replace function pgonce.has_something(reader pgonce.consumers, partition integer, next_offset bigint)
returns boolean
language plpgsql stable
as $$
#variable_conflict use_column
begin
  -- One look into an index each, whatever the statistics say: `limit 1` cannot become a join, and outside of `exists`
  -- the order stays.
  perform from pgonce.parked k
  where k.consumer_id = reader.consumer_id and k.partition = has_something.partition
    and k.taken_by is null and k.due_at <= clock_timestamp()
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

create or replace function pgonce.take_parked(
  reader pgonce.consumers, partition integer, next_offset bigint, max integer, max_bytes bigint, suspects boolean,
  out recorded bigint[], out duplicates integer)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  taken bigint[];
  keys text[];
  is_alone boolean;
begin
  recorded := '{}';
  duplicates := 0;
  if exists (
    select from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition
      and k.taken_by = pg_current_xact_id_if_assigned()) then
    -- Once a transaction: the view received tells what it takes by its mark alone.
    return;
  end if;
  -- One that a process has died of comes by itself, so that nothing else dies with it.
  is_alone := suspects and exists (
    select from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition
      and k.is_suspect and k.taken_by is null and k."offset" < take_parked.next_offset and k.due_at <= clock_timestamp());
  if is_alone then
    max := 1;
  end if;
  loop
    -- Those that are due and the first of their keys, the longest due first, each with what waits behind it.
    select array_agg(b."offset" order by b."offset"), array_agg(distinct b.key)
    into taken, keys
    from (
      select l."offset", l.key, sum(l.bytes) over in_turn - l.bytes as bytes_before
      from (
        select d.due_at, d."offset" as first_offset, l."offset", l.key, l.bytes
        from (
          select k.due_at, k."offset", k.key
          from pgonce.parked k
          where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition
            and k.taken_by is null and k.due_at <= clock_timestamp() and k."offset" < take_parked.next_offset
            and k.is_suspect = is_alone
            and (reader.failure_policy = 'skip' or not exists (
              select from pgonce.parked f
              where f.consumer_id = reader.consumer_id and f.partition = k.partition and f.taken_by is null
                and (f.key = k.key or reader.failure_policy = 'block') and f."offset" < k."offset"))
          order by k.due_at, k."offset"
          limit take_parked.max) d
        cross join lateral (
          select k."offset", k.key, k.bytes
          from pgonce.parked k
          where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition and k."offset" = d."offset"
          union all
          (select k."offset", k.key, k.bytes
           from pgonce.parked k
           where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition and k.taken_by is null
             and k.key = d.key and k."offset" > d."offset" and k."offset" < take_parked.next_offset
             and k.due_at is null
             and not exists (
               select from pgonce.parked s
               where s.consumer_id = k.consumer_id and s.partition = k.partition and s.is_suspect and s.taken_by is null
                 and s.key = k.key and s."offset" between d."offset" + 1 and k."offset")
           order by k."offset"
           limit take_parked.max)) l
        order by d.due_at, d."offset", l."offset"
        limit take_parked.max) l
      window in_turn as (order by l.due_at, l.first_offset, l."offset" rows unbounded preceding)) b
    where b.bytes_before < take_parked.max_bytes;
    exit when taken is null;
    update pgonce.parked k
    set taken_by = pg_current_xact_id()
    where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition and k."offset" = any (taken);
    with recorded as (
      insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
      select k."offset", k.consumer_id, k.partition, k.message_id
      from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition and k."offset" = any (taken)
      order by k."offset"
      on conflict do nothing
      returning "offset"
    )
    select coalesce(array_agg(r."offset" order by r."offset"), '{}') into recorded from recorded r;
    -- An id that was processed before in another place is left out, as everywhere. Nothing may find it marked as taken: it
    -- would be shown, or its record, which tells of that other place, be withdrawn.
    delete from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = take_parked.partition and k."offset" = any (taken)
      and k."offset" <> all (recorded);
    perform pgonce.release_next(reader.consumer_id, partition, keys);
    duplicates := duplicates + cardinality(taken) - cardinality(recorded);
    exit when cardinality(recorded) > 0;
  end loop;
end $$;
comment on function pgonce.take_parked is 'Internal: takes parked messages that are due, once a transaction, and records them as processed; answers their offsets, and how many were processed before in another place.';

create or replace function pgonce.left_out(
  reader pgonce.consumers, partition integer, first_offset bigint, last_offset bigint)
returns text[]
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  if reader.failure_policy = 'park_key' then
    insert into pgonce.parked (
      "offset", enqueued_at, consumer_id, partition, attempts, bytes, message_id, key, payload, headers)
    select q."offset", q.enqueued_at, reader.consumer_id, q.partition, 0, q.bytes, q.message_id, q.key, q.payload, q.headers
    from pgonce.queue q
    where q.topic_id = reader.topic_id and q.partition = left_out.partition
      and q."offset" between first_offset and last_offset
      and exists (
        select from pgonce.parked k
        where k.consumer_id = reader.consumer_id and k.partition = left_out.partition and k.taken_by is null
          and k.key = q.key and k."offset" < q."offset")
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
