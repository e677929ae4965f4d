-- Views for whoever wants to look: by psql, by a dashboard, by `pgonce status`. They take no locks.

create or replace view pgonce.partition_heads as
select
  t.topic,
  p.topic_id,
  p.partition,
  h.next_offset,
  coalesce((
    select q."offset" from pgonce.queue q
    where q.topic_id = p.topic_id and q.partition = p.partition
    order by q."offset" limit 1), h.next_offset) as earliest_offset,
  h.moved,
  h.scanned,
  h.generation
from pgonce.topics t
join pgonce.partitions p using (topic_id)
cross join lateral (
  select g.* from pgonce.heads g
  where g.topic_id = p.topic_id and g.partition = p.partition
  order by g.generation desc
  limit 1) h;
comment on view pgonce.partition_heads is 'How far each partition has been relayed.';

create or replace view pgonce.outbox_status as
select
  t.topic,
  t.paused,
  sum(o.scheduled)::bigint as scheduled,
  sum(o.pending)::bigint as pending,
  sum(h.moved)::bigint as sent,
  (select count(*) from pgonce.duplicate_sends d where d.topic_id = t.topic_id) as duplicates,
  (select count(*) from pgonce.set_aside s where s.topic_id = t.topic_id) as set_aside,
  coalesce(clock_timestamp() - min(o.oldest), interval '0') as oldest_pending_age
from pgonce.topics t
join pgonce.partitions p using (topic_id)
cross join lateral (
  select g.* from pgonce.heads g
  where g.topic_id = p.topic_id and g.partition = p.partition
  order by g.generation desc
  limit 1) h
cross join lateral (
  select
    (select count(*) from pgonce.outbox s
     where s.topic_id = p.topic_id and s.partition = p.partition and s.deliver_at is not null) as scheduled,
    count(*) as pending,
    min(x.enqueued_at) as oldest
  from pgonce.outbox x
  where x.topic_id = p.topic_id and x.partition = p.partition and x.status = 'PENDING'
    and x.seq > least(h.scanned, (select min(f) from unnest(h.open_from) f))) o
group by t.topic_id, t.topic, t.paused;
comment on view pgonce.outbox_status is 'Each topic''s outbox: messages that wait, were sent, were refused as duplicates or set aside, and the age of the oldest that waits.';

create or replace view pgonce.consumer_offsets as
select
  c.consumer,
  c.consumer_id,
  c.topic_id,
  cp.partition,
  g.next_offset,
  g.received,
  g.duplicates,
  g.generation
from pgonce.consumers c
join pgonce.consumer_partitions cp using (consumer_id)
cross join lateral (
  select p.* from pgonce.progress p
  where p.consumer_id = cp.consumer_id and p.partition = cp.partition
  order by p.generation desc
  limit 1) g;
comment on view pgonce.consumer_offsets is 'How far each consumer has come in each partition.';

create or replace view pgonce.consumer_lag as
select
  c.consumer,
  t.topic,
  c.paused,
  coalesce(sum(h.next_offset - o.next_offset), 0)::bigint as lag,
  coalesce(clock_timestamp() - min(w.enqueued_at), interval '0') as oldest_age,
  coalesce(sum(o.received), (select count(*) from pgonce.processed_ids p where p.consumer_id = c.consumer_id))::bigint as received,
  coalesce(sum(o.duplicates), (select count(*) from pgonce.duplicate_receipts d where d.consumer_id = c.consumer_id))::bigint as duplicates
from pgonce.consumers c
left join pgonce.topics t using (topic_id)
left join pgonce.consumer_offsets o on o.consumer_id = c.consumer_id
left join pgonce.partition_heads h on h.topic_id = o.topic_id and h.partition = o.partition
left join pgonce.queue w on w.topic_id = o.topic_id and w.partition = o.partition and w."offset" = o.next_offset
group by c.consumer_id, c.consumer, t.topic, c.paused;
comment on view pgonce.consumer_lag is 'Each consumer''s lag: messages in the queue that it has not received, the age of the oldest of them, and how many it has received and refused as duplicates. An inbox has no lag.';
