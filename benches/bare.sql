-- The same writes as relay and the word count make, with no lock, claim, order or deduplication: on pgonce's own tables,
-- and, for the relay, on an outbox as it is usually laid out, with full pages and a partial index on what is PENDING.

create table bench.outbox (like pgonce.outbox including defaults including constraints);
alter table bench.outbox add primary key (topic_id, message_id);
create index on bench.outbox (topic_id, partition, seq) where status = 'PENDING';

create function bench.relay_usual(of_topic integer, max integer) returns bigint language plpgsql as $$
declare
  top bigint;
  moved bigint;
  newest bigint;
begin
  select h.generation into strict newest
  from pgonce.heads h where h.topic_id = of_topic and h.partition = 0 order by h.generation desc limit 1;
  select o.seq into top
  from bench.outbox o where o.topic_id = of_topic and o.partition = 0 and o.status = 'PENDING'
  order by o.seq offset relay_usual.max - 1 limit 1;
  insert into pgonce.queue ("offset", enqueued_at, topic_id, partition, bytes, message_id, key, payload, headers)
  select o.seq, o.enqueued_at, o.topic_id, o.partition, o.bytes, o.message_id, o.key, o.payload, o.headers
  from bench.outbox o where o.topic_id = of_topic and o.partition = 0 and o.status = 'PENDING' and o.seq <= top;
  get diagnostics moved = row_count;
  update bench.outbox o set status = 'SENT'
  where o.topic_id = of_topic and o.partition = 0 and o.status = 'PENDING' and o.seq <= top;
  insert into pgonce.heads (topic_id, partition, generation, next_offset, scanned, floor, open_xids, open_from, moved)
  values (of_topic, 0, newest + 1, top + 1, top, top, '{}', '{}', 0);
  return moved;
end $$;

create function bench.relay_bare(of_topic integer, max integer) returns bigint language plpgsql as $$
declare
  low bigint;
  top bigint;
  moved bigint;
  newest bigint;
begin
  select h.scanned, h.generation into strict low, newest
  from pgonce.heads h where h.topic_id = of_topic and h.partition = 0 order by h.generation desc limit 1;
  select o.seq into top
  from pgonce.outbox o where o.topic_id = of_topic and o.partition = 0 and o.seq > low
  order by o.seq offset relay_bare.max - 1 limit 1;
  insert into pgonce.queue ("offset", enqueued_at, topic_id, partition, bytes, message_id, key, payload, headers)
  select o.seq, o.enqueued_at, o.topic_id, o.partition, o.bytes, o.message_id, o.key, o.payload, o.headers
  from pgonce.outbox o where o.topic_id = of_topic and o.partition = 0 and o.seq > low and o.seq <= top;
  get diagnostics moved = row_count;
  update pgonce.outbox o set status = 'SENT'
  where o.topic_id = of_topic and o.partition = 0 and o.seq > low and o.seq <= top;
  insert into pgonce.heads (topic_id, partition, generation, next_offset, scanned, floor, open_xids, open_from, moved)
  values (of_topic, 0, newest + 1, top + 1, top, top, '{}', '{}', 0);
  return moved;
end $$;

create function bench.count_bare(of_topic integer, of_consumer integer, max integer) returns bigint language plpgsql as $$
declare
  low bigint;
  top bigint;
  counted bigint;
  newest bigint;
begin
  select p.next_offset - 1, p.generation into strict low, newest
  from pgonce.progress p where p.consumer_id = of_consumer and p.partition = 0 order by p.generation desc limit 1;
  select max(q."offset"), count(*) into top, counted
  from (select q."offset" from pgonce.queue q
        where q.topic_id = of_topic and q.partition = 0 and q."offset" > low
        order by q."offset" limit count_bare.max) q;
  with received as materialized (
    select q.* from pgonce.queue q
    where q.topic_id = of_topic and q.partition = 0 and q."offset" > low and q."offset" <= top
  ),
  recorded as (
    insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
    select r."offset", of_consumer, r.partition, r.message_id from received r
  )
  insert into pgonce.word_counts as total (consumer, word, count)
  select 'bare', r.payload ->> 'word', count(*)
  from received r
  group by 2
  order by 2
  on conflict (consumer, word) do update set count = total.count + excluded.count;
  insert into pgonce.progress (consumer_id, partition, generation, next_offset, received, duplicates)
  values (of_consumer, 0, newest + 1, top + 1, 0, 0);
  return counted;
end $$;
