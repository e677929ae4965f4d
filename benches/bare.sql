-- The same writes as relay and the word count make, with no lock, claim, order or deduplication: on copies of pgonce's
-- tables, so that no stage finds the indexes of another in its way; and, for the relay, on an outbox as it is usually laid
-- out, with full pages and a partial index on what is PENDING.

create schema bare;
create table bare.outbox (like pgonce.outbox including all) with (fillfactor = 47);
create table bare.queue (like pgonce.queue including all);
create table bare.heads (like pgonce.heads including all);
create table bare.processed_ids (like pgonce.processed_ids including all);
create table bare.progress (like pgonce.progress including all);
create table bare.word_counts (like pgonce.word_counts including all);

create schema usual;
create table usual.outbox (like pgonce.outbox including defaults including constraints);
alter table usual.outbox add primary key (topic_id, message_id);
create index on usual.outbox (topic_id, partition, seq) where status = 'PENDING';
create table usual.queue (like pgonce.queue including all);
create table usual.heads (like pgonce.heads including all);

create function bare.relay(of_topic integer, max integer) returns bigint language plpgsql as $$
declare
  low bigint;
  top bigint;
  moved bigint;
  newest bigint;
begin
  select h.scanned, h.generation into strict low, newest
  from bare.heads h where h.topic_id = of_topic and h.partition = 0 order by h.generation desc limit 1;
  select o.seq into top
  from bare.outbox o where o.topic_id = of_topic and o.partition = 0 and o.seq > low
  order by o.seq offset relay.max - 1 limit 1;
  insert into bare.queue ("offset", enqueued_at, topic_id, partition, bytes, message_id, key, payload, headers)
  select o.seq, o.enqueued_at, o.topic_id, o.partition, o.bytes, o.message_id, o.key, o.payload, o.headers
  from bare.outbox o where o.topic_id = of_topic and o.partition = 0 and o.seq > low and o.seq <= top;
  get diagnostics moved = row_count;
  update bare.outbox o set status = 'SENT'
  where o.topic_id = of_topic and o.partition = 0 and o.seq > low and o.seq <= top;
  insert into bare.heads (topic_id, partition, generation, next_offset, scanned, floor, open_xids, open_from, moved)
  values (of_topic, 0, newest + 1, top + 1, top, top, '{}', '{}', 0);
  return moved;
end $$;

create function usual.relay(of_topic integer, max integer) returns bigint language plpgsql as $$
declare
  top bigint;
  moved bigint;
  newest bigint;
begin
  select h.generation into strict newest
  from usual.heads h where h.topic_id = of_topic and h.partition = 0 order by h.generation desc limit 1;
  select o.seq into top
  from usual.outbox o where o.topic_id = of_topic and o.partition = 0 and o.status = 'PENDING'
  order by o.seq offset relay.max - 1 limit 1;
  insert into usual.queue ("offset", enqueued_at, topic_id, partition, bytes, message_id, key, payload, headers)
  select o.seq, o.enqueued_at, o.topic_id, o.partition, o.bytes, o.message_id, o.key, o.payload, o.headers
  from usual.outbox o where o.topic_id = of_topic and o.partition = 0 and o.status = 'PENDING' and o.seq <= top;
  get diagnostics moved = row_count;
  update usual.outbox o set status = 'SENT'
  where o.topic_id = of_topic and o.partition = 0 and o.status = 'PENDING' and o.seq <= top;
  insert into usual.heads (topic_id, partition, generation, next_offset, scanned, floor, open_xids, open_from, moved)
  values (of_topic, 0, newest + 1, top + 1, top, top, '{}', '{}', 0);
  return moved;
end $$;

create function bare.count(of_topic integer, of_consumer integer, max integer) returns bigint language plpgsql as $$
declare
  low bigint;
  top bigint;
  counted bigint;
  newest bigint;
begin
  select p.next_offset - 1, p.generation into strict low, newest
  from bare.progress p where p.consumer_id = of_consumer and p.partition = 0 order by p.generation desc limit 1;
  select max(q."offset"), count(*) into top, counted
  from (select q."offset" from bare.queue q
        where q.topic_id = of_topic and q.partition = 0 and q."offset" > low
        order by q."offset" limit count.max) q;
  with received as materialized (
    select q.* from bare.queue q
    where q.topic_id = of_topic and q.partition = 0 and q."offset" > low and q."offset" <= top
  ),
  recorded as (
    insert into bare.processed_ids ("offset", consumer_id, partition, message_id)
    select r."offset", of_consumer, r.partition, r.message_id from received r
  )
  insert into bare.word_counts as total (consumer, word, count)
  select 'bare', r.payload ->> 'word', count(*)
  from received r
  group by 2
  order by 2
  on conflict (consumer, word) do update set count = total.count + excluded.count;
  insert into bare.progress (consumer_id, partition, generation, next_offset, received, duplicates)
  values (of_consumer, 0, newest + 1, top + 1, 0, 0);
  return counted;
end $$;
