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
  coalesce((select sum(d.messages) from pgonce.duplicate_sends d where d.topic_id = t.topic_id), 0)::bigint as duplicates,
  (select count(*) from pgonce.set_aside s where s.topic_id = t.topic_id) as set_aside,
  coalesce(clock_timestamp() - min(o.oldest), interval '0') as oldest_pending_age,
  sum(o.touched)::bigint as touched
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
    count(*) filter (where x.xmax <> '0') as touched,
    min(x.enqueued_at) as oldest
  from pgonce.outbox x
  where x.topic_id = p.topic_id and x.partition = p.partition and x.status = 'PENDING'
    and x.seq > least(h.scanned, (select min(f) from unnest(h.open_from) f))) o
group by t.topic_id, t.topic, t.paused;
comment on view pgonce.outbox_status is 'Each topic''s outbox: messages that wait, were sent, were refused as duplicates or set aside, and the age of the oldest that waits. touched counts those on which another session holds a lock, or held one: while they are locked, they and the later ones of their keys wait.';

create or replace view pgonce.consumer_offsets as
select
  c.consumer,
  c.consumer_id,
  c.topic_id,
  cp.partition,
  g.next_offset,
  g.received,
  g.duplicates,
  g.failures,
  g.dead,
  g.generation,
  g.handler,
  g.handed_over
from pgonce.consumers c
join pgonce.consumer_partitions cp using (consumer_id)
cross join lateral (
  select p.* from pgonce.progress p
  where p.consumer_id = cp.consumer_id and p.partition = cp.partition
  order by p.generation desc
  limit 1) g;
comment on view pgonce.consumer_offsets is 'How far each consumer has come in each partition. handler is the transaction that the messages handed_over are with, of a consumer whose messages are recorded first.';

create or replace view pgonce.consumer_lag as
select
  c.consumer,
  t.topic,
  c.paused,
  coalesce(sum(h.next_offset - o.next_offset), 0)::bigint as lag,
  coalesce(clock_timestamp() - min(w.enqueued_at), interval '0') as oldest_age,
  coalesce(sum(o.received), (select count(*) from pgonce.processed_ids p where p.consumer_id = c.consumer_id))::bigint as received,
  coalesce(
    sum(o.duplicates), (select sum(d.messages) from pgonce.duplicate_receipts d where d.consumer_id = c.consumer_id), 0)::bigint as duplicates,
  case when c.consumer ~ '^[ -~]{1,62}$' then (
    select count(*) from pg_stat_activity a
    where a.datname = current_database() and right(a.application_name, length(c.consumer) + 1) = ' ' || c.consumer)
  end as sessions,
  coalesce(sum(o.failures), 0)::bigint as failures,
  (select count(*) from pgonce.parked k where k.consumer_id = c.consumer_id and k.taken_by is null) as parked,
  (select count(*) from pgonce.dead_letters d where d.consumer_id = c.consumer_id and d.state = 'dead')
    -- What a handler left behind that is gone: the next receive makes dead letters of it (handover.sql).
    + coalesce(sum(cardinality(o.handed_over)) filter (
      where o.handler <> all (array(select pg_snapshot_xip(pg_current_snapshot())))), 0)::bigint as dead,
  c.kind
from pgonce.consumers c
left join pgonce.topics t using (topic_id)
left join pgonce.consumer_offsets o on o.consumer_id = c.consumer_id
left join pgonce.partition_heads h on h.topic_id = o.topic_id and h.partition = o.partition
left join pgonce.queue w on w.topic_id = o.topic_id and w.partition = o.partition and w."offset" = o.next_offset
group by c.consumer_id, c.consumer, t.topic, c.paused, c.kind;
comment on view pgonce.consumer_lag is 'Each consumer''s lag: messages in the queue that it has not received, the age of the oldest of them, and how many it has received and refused as duplicates. sessions counts connections whose application_name ends in a space and its name, as those of the program and the library do; null where PostgreSQL cannot keep the name there (beyond 62 characters, or beyond ASCII). failures counts attempts that failed, parked and dead the messages that wait to be tried again, or behind one that does, and those that were given up. kind: transactional, or external for effects outside of this database. An inbox has no lag.';

create or replace view pgonce.blocked_keys as
select
  c.consumer,
  t.topic,
  k.partition,
  k.key,
  k.message_id,
  k."offset",
  k.attempts,
  k.due_at,
  clock_timestamp() - k.parked_at as age,
  k.error,
  (select count(*) from pgonce.parked b
   where b.consumer_id = k.consumer_id and b.partition = k.partition and b.key = k.key and b.taken_by is null
     and b."offset" > k."offset") as waiting
from pgonce.parked k
join pgonce.consumers c using (consumer_id)
join pgonce.topics t using (topic_id)
where k.taken_by is null and k.due_at is not null
order by k.parked_at;
comment on view pgonce.blocked_keys is 'Messages that are to be tried again, the oldest first: when, how often it failed and how, and how many messages of their keys wait behind them. With the policy block their whole partition waits.';

create or replace view pgonce.consumer_leases as
select
  c.consumer,
  l.partition,
  l.epoch,
  l.owner,
  l.leased_until,
  l.fenced,
  l.careful_until
from pgonce.leases l
join pgonce.consumers c using (consumer_id)
order by c.consumer, l.partition;
comment on view pgonce.consumer_leases is 'Who is at which partition of the external consumers, until when others leave it alone, and how many writes were refused because they came from an earlier owner.';

create or replace view pgonce.dead_letter_list as
select
  d.dead_letter_id,
  c.consumer,
  t.topic,
  d.partition,
  d."offset",
  d.message_id,
  d.key,
  d.attempts,
  d.error,
  d.failed_at,
  clock_timestamp() - d.failed_at as age,
  d.state,
  d.settled_at,
  d.settled_by,
  d.payload,
  d.headers
from pgonce.dead_letters d
join pgonce.consumers c using (consumer_id)
join pgonce.topics t using (topic_id)
order by d.dead_letter_id;
comment on view pgonce.dead_letter_list is 'Dead letters, with those that were replayed or discarded: state says which. To replay some: select pgonce.replay_dead_letters(array(select dead_letter_id from pgonce.dead_letter_list where ...)).';

create or replace view pgonce.horizon_holders as
select *
from (
  select 'session' as kind, a.pid::text as name, a.application_name, a.state,
         greatest(age(a.backend_xmin), age(a.backend_xid)) as transactions, clock_timestamp() - a.xact_start as age
  from pg_stat_activity a
  where a.pid <> pg_backend_pid() and (a.backend_xmin is not null or a.backend_xid is not null)
  union all
  select 'replication slot', r.slot_name::text, null, case when r.active then 'active' else 'inactive' end,
         greatest(age(r.xmin), age(r.catalog_xmin)), null
  from pg_replication_slots r
  where r.xmin is not null or r.catalog_xmin is not null
  union all
  select 'prepared transaction', x.gid, null, null, age(x.transaction), clock_timestamp() - x.prepared
  from pg_prepared_xacts x) holder
order by holder.transactions desc;
comment on view pgonce.horizon_holders is 'What keeps PostgreSQL from removing dead rows, the oldest first: sessions, replication slots and prepared transactions, with the number of transactions that have begun since. Of sessions of other roles only a member of pg_read_all_stats sees that they hold it.';
