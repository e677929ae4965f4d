-- Enqueue: how a message enters the outbox, inside the producer's own transaction.
--
-- Locks: no row of pgonce. A second enqueue of an id waits for the transaction of the first to end (the unique index
-- sees to that), then is told that it is a duplicate, or takes its place where the first was rolled back; above READ
-- COMMITTED it may get 40001 instead. The first message's row is neither locked nor changed: that would make the relay
-- pass it over, and every later message of its key with it.
-- Index: the primary key of outbox, (topic_id, message_id).

create or replace function pgonce.partition_of(key text, partitions integer)
returns integer
language sql stable strict parallel safe
-- bigint is signed, the hash is not: flipping the top bit takes 2^63 away, and the rest of the arithmetic adds it again.
return mod(
  mod(('x' || substr(encode(sha256(convert_to(key, 'UTF8')), 'hex'), 1, 16))::bit(64)::bigint # (-9223372036854775808)::bigint, partitions)
    + partitions + mod(9223372036854775807, partitions) + 1,
  partitions)::integer;
comment on function pgonce.partition_of is 'The partition that a key belongs to: the first 8 bytes of the SHA-256 of its UTF-8 bytes, unsigned big-endian, modulo the number of partitions.';

create or replace function pgonce.new_message_id()
returns text
language sql volatile parallel safe
-- RFC 9562: 48 bits of Unix milliseconds, then the version, then random bits. Made from a version 4 by setting the two
-- bits in which 7 differs from 4.
return encode(
  set_bit(
    set_bit(
      overlay(
        uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
        from 1 for 6),
      52, 1),
    53, 1),
  'hex')::uuid::text;
comment on function pgonce.new_message_id is 'A fresh UUIDv7 as text.';

create or replace function pgonce.text_size(document jsonb)
returns integer
-- Stable, though nothing that it reads changes: the planner would work out an immutable one, whether it is needed or not.
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return octet_length(document::text);
exception when program_limit_exceeded then
  return 2147483647;
end $$;
comment on function pgonce.text_size is 'Internal: size in bytes as text; 2147483647 where that is more than PostgreSQL can hold, 1 GB.';

create or replace function pgonce.binary_size(document jsonb)
returns integer
language sql stable
return case
  when pg_column_compression(document) is null then pg_column_size(document)
  else pgonce.text_size(document)
end;
comment on function pgonce.binary_size is 'Internal: size in bytes before compression. A value that comes compressed from another table is measured as text.';

-- Everybody reads a payload as text, and PostgreSQL writes numbers digit by digit: 16 bytes, as 1e131071, become up to
-- 147459. So what has more than 32 KiB is measured as text too, and what has less cannot get near to 512 MiB.
create or replace function pgonce.message_fault(
  payload_bytes_max integer, payload jsonb, key text, message_id text, headers jsonb, deliver_at timestamptz)
returns text
language sql stable
return case
  when payload is null then 'payload is null'
  when pgonce.binary_size(payload) > 32768 and pgonce.text_size(payload) > 536870912 then 'payload is too long as text'
  when pgonce.binary_size(payload) > payload_bytes_max then 'payload is too large'
  when octet_length(key) not between 1 and 255 then 'key is out of bounds'
  when octet_length(message_id) not between 1 and 255 then 'message id is out of bounds'
  when jsonb_typeof(headers) <> 'object' then 'headers are no object'
  when pgonce.binary_size(headers) > 16384 then 'headers are too large'
  when not isfinite(deliver_at) then 'deliver_at is infinite'
end;
comment on function pgonce.message_fault is 'Internal: what is wrong with a message, null where nothing is. Simple enough to be inlined; refuse_message says it in full.';

create or replace function pgonce.refuse_message(
  fault text, which text, topic text, payload_bytes_max integer,
  payload jsonb, key text, message_id text, headers jsonb, deliver_at timestamptz)
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  case fault
    when 'payload is null' then
      raise exception using errcode = 'PO003', message = 'payload is null' || which,
        hint = 'A message without content has the payload ''{}'' or ''null''::jsonb.';
    when 'payload is too long as text' then
      raise exception using errcode = 'PO004',
        message = format('payload of more than 536870912 bytes (512 MiB) as text%s', which),
        hint = 'Nobody could read it: numbers are written digit by digit, 1e100000 with 100001 of them. Send such ones as strings.';
    when 'payload is too large' then
      raise exception using errcode = 'PO004',
        message = format('payload of %s bytes%s, topic %L takes %s', pgonce.binary_size(payload), which, topic, payload_bytes_max),
        hint = 'Send a reference to the content, or raise the limit with create_topic(..., payload_bytes_max => ...).';
    when 'key is out of bounds' then
      raise exception using errcode = 'PO004', message = format('key of %s bytes%s', octet_length(key), which),
        hint = 'A key has 1 to 255 bytes; null where order does not matter.';
    when 'message id is out of bounds' then
      raise exception using errcode = 'PO004', message = format('message id of %s bytes%s', octet_length(message_id), which),
        hint = 'A message id has 1 to 255 bytes; null to have one made.';
    when 'headers are no object' then
      raise exception using errcode = 'PO003', message = format('headers are a JSON %s%s', jsonb_typeof(headers), which),
        hint = 'Headers are a JSON object, or null.';
    when 'headers are too large' then
      raise exception using errcode = 'PO004', message = format('headers of %s bytes%s', pgonce.binary_size(headers), which),
        hint = 'Headers have 16384 bytes (16 KiB) at the most; put content into the payload.';
    when 'deliver_at is infinite' then
      raise exception using errcode = 'PO003', message = format('deliver_at of %s%s', deliver_at, which),
        hint = 'Give a point in time, or null to deliver at once.';
  end case;
end $$;
comment on function pgonce.refuse_message is 'Internal: raises PO003 or PO004 for a fault; which names the message in a set.';

create or replace function pgonce.enqueue(
  topic text,
  payload jsonb,
  key text default null,
  message_id text default null,
  headers jsonb default null,
  deliver_at timestamptz default null)
returns setof pgonce.enqueued
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  target pgonce.topics;
  answer pgonce.enqueued;
  fault text;
begin
  select t.* into target from pgonce.topics t where t.topic = enqueue.topic;
  if not found then
    perform pgonce.topic_row(topic);
  end if;
  fault := pgonce.message_fault(target.payload_bytes_max, payload, key, message_id, headers, deliver_at);
  if fault is not null then
    perform pgonce.refuse_message(fault, '', topic, target.payload_bytes_max, payload, key, message_id, headers, deliver_at);
  end if;
  answer.message_id := coalesce(message_id, pgonce.new_message_id());

  insert into pgonce.outbox (topic_id, partition, bytes, status, deliver_at, message_id, key, payload, headers)
  select target.topic_id, pgonce.partition_of(coalesce(enqueue.key, answer.message_id), target.partitions),
         pgonce.binary_size(enqueue.payload) + coalesce(pgonce.binary_size(enqueue.headers), 0),
         case when d.at is null then 'PENDING' else 'SCHEDULED' end, d.at,
         answer.message_id, enqueue.key, enqueue.payload, enqueue.headers
  from (select case when enqueue.deliver_at > clock_timestamp() then enqueue.deliver_at end as at) d
  on conflict do nothing;
  answer.was_duplicate := not found;
  if answer.was_duplicate then
    insert into pgonce.duplicate_sends (topic_id, message_id) values (target.topic_id, answer.message_id);
  elsif pgonce.is_watched() then
    perform pg_notify('pgonce.watch', '');
  end if;
  return next answer;
end $$;
comment on function pgonce.enqueue is 'Puts a message into the outbox, in the caller''s transaction. A time in the future delays it. Errors: PO001, PO003, PO004.';

create or replace function pgonce.enqueue_many(
  topic text,
  payloads jsonb[],
  keys text[] default null,
  message_ids text[] default null,
  headers jsonb[] default null,
  deliver_at timestamptz[] default null)
returns setof pgonce.enqueued_item
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  target pgonce.topics;
  size integer := coalesce(cardinality(payloads), 0);
begin
  target := pgonce.topic_row(topic);
  if size > 10000 then
    raise exception using errcode = 'PO003', message = format('%s messages in one call', size),
      hint = 'enqueue_many takes 10000 at the most; call it several times in your transaction.';
  elsif size <> any (array[coalesce(cardinality(keys), size), coalesce(cardinality(message_ids), size),
                           coalesce(cardinality(headers), size), coalesce(cardinality(deliver_at), size)]) then
    raise exception using errcode = 'PO003', message = 'arrays of different lengths',
      hint = 'keys, message_ids, headers and deliver_at are null, or have one element for each payload.';
  end if;
  perform pgonce.refuse_message(m.fault, format(' (message %s)', m.nth), topic, target.payload_bytes_max,
                                m.payload, m.key, m.message_id, m.headers, m.at)
  from (
    select u.*, pgonce.message_fault(target.payload_bytes_max, u.payload, u.key, u.message_id, u.headers, u.at) as fault
    from unnest(payloads, keys, message_ids, headers, deliver_at)
      with ordinality u(payload, key, message_id, headers, at, nth)
  ) m
  where m.fault is not null;

  -- The numbers are drawn in input order, the rows are inserted in the order of their ids: two transactions that
  -- share ids would deadlock otherwise. The xid comes before the first number.
  perform pg_current_xact_id();
  return query
    with given as materialized (
      select m.nth, nextval('pgonce.outbox_seq') as seq, m.payload, m.key,
             coalesce(m.message_id, pgonce.new_message_id()) as message_id, m.headers,
             case when m.at > clock_timestamp() then m.at end as at
      from unnest(payloads, keys, message_ids, headers, enqueue_many.deliver_at)
        with ordinality m(payload, key, message_id, headers, at, nth)
    ),
    inserted as (
      insert into pgonce.outbox as o (seq, topic_id, partition, bytes, status, deliver_at, message_id, key, payload, headers)
      select g.seq, target.topic_id, pgonce.partition_of(coalesce(g.key, g.message_id), target.partitions),
             pgonce.binary_size(g.payload) + coalesce(pgonce.binary_size(g.headers), 0),
             case when g.at is null then 'PENDING' else 'SCHEDULED' end, g.at,
             g.message_id, g.key, g.payload, g.headers
      from given g
      order by g.message_id collate "C", g.seq
      on conflict do nothing
      returning o.seq
    ),
    refused as (
      insert into pgonce.duplicate_sends (topic_id, message_id)
      select target.topic_id, g.message_id from given g where g.seq not in (select i.seq from inserted i)
    )
    select g.nth::integer, g.message_id, g.seq not in (select i.seq from inserted i)
    from given g
    order by g.nth;
  if pgonce.is_watched() then
    perform pg_notify('pgonce.watch', '');
  end if;
end $$;
comment on function pgonce.enqueue_many is 'Puts up to 10000 messages into the outbox in one statement: relayed in the order of the arrays, answered in that order. Arrays are null or have one element for each payload. Errors: PO001, PO003, PO004.';

create or replace function pgonce.cancel(topic text, message_id text)
returns setof pgonce.cancelled
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  target pgonce.topics;
begin
  target := pgonce.topic_row(topic);
  delete from pgonce.outbox o
  where o.topic_id = target.topic_id and o.message_id = cancel.message_id and o.status in ('SCHEDULED', 'PENDING');
  return query select cancel.message_id, found;
end $$;
comment on function pgonce.cancel is 'Takes a message back while it has not been sent; its id is free again. Waits for a relay that is at it. Errors: PO001.';
