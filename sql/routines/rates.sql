-- Rates: how much happens in a minute, how much is refused, and how long handlers take.
--
-- The counters are where the verbs keep them: no row is written for this with a message or a batch. A rate needs two
-- readings, so one is written down now and then (sample_rates), by whichever worker comes first, and the view compares the
-- counters of this moment with the reading that is nearest to a minute old. Where nobody has written one down, a rate is
-- null. What handlers take only their workers know: each adds a row now and then, with the number of calls for each
-- length of time; numbers of any number of workers add up. All of it is forgotten after an hour.
--
-- Duplicates are counted by rows, of which there may be many. Those that are older than 10 minutes are added up into one,
-- so that counting them reads those of 10 minutes.
--
-- What would have to be counted row by row (what an inbox has processed, what waits for the relay) is in the views
-- consumer_lag and outbox_status, and not here.
--
-- Locks: of sample_rates, one that only it takes, and rows of duplicates that it finds free. It waits for nobody; only a drop
-- of a topic or an inbox may wait for it. What a dropped one leaves here goes within the hour, too: its id is not used again.
-- Indexes: the primary keys of heads, progress and samples; samples_sampled_at, handler_times_recorded_at,
-- duplicate_sends_topic, duplicate_receipts_consumer.

create or replace view pgonce.counters as
select
  'relay' as stage,
  t.topic_id as id,
  t.topic as name,
  sum(h.moved)::bigint as applied,
  coalesce((select sum(d.messages) from pgonce.duplicate_sends d where d.topic_id = t.topic_id), 0)::bigint as duplicates,
  null::bigint as retries,
  null::bigint as dead_letters,
  null::bigint as fenced
from pgonce.topics t
join pgonce.partition_heads h using (topic_id)
group by t.topic_id, t.topic
union all
select
  'consumer',
  c.consumer_id,
  c.consumer,
  sum(o.received)::bigint,
  coalesce(
    sum(o.duplicates),
    (select sum(d.messages) from pgonce.duplicate_receipts d where d.consumer_id = c.consumer_id),
    0)::bigint,
  sum(o.failures - o.dead)::bigint,
  sum(o.dead)::bigint,
  (select sum(l.fenced) from pgonce.leases l where l.consumer_id = c.consumer_id)::bigint
from pgonce.consumers c
left join pgonce.consumer_offsets o using (consumer_id)
group by c.consumer_id, c.consumer;
comment on view pgonce.counters is 'What has happened, ever, in each topic and each consumer: messages applied (by the relay: moved to the queue), duplicates refused, failed attempts that are followed by another one, messages that became dead letters, and writes that were refused under a lost lease. Of an inbox it has the duplicates only.';

create or replace view pgonce.handler_percentiles as
select
  b.consumer_id,
  max(b.total)::bigint as calls,
  min(b.ms) filter (where b.up_to >= 0.5 * b.total) as p50_ms,
  min(b.ms) filter (where b.up_to >= 0.99 * b.total) as p99_ms,
  min(b.limit_ms) as limit_ms,
  coalesce(min(b.ms) filter (where b.up_to >= 0.99 * b.total) > min(b.limit_ms) / 2.0, false) as nears_limit
from (
  select
    h.consumer_id,
    min(h.limit_ms) as limit_ms,
    -- A bucket holds what took up to so long (src/consume/handler_times.rs).
    (2.0 ^ (u.bucket / 4.0) / 1000)::float8 as ms,
    sum(sum(u.calls)) over (partition by h.consumer_id order by u.bucket) as up_to,
    sum(sum(u.calls)) over (partition by h.consumer_id) as total
  from pgonce.handler_times h
  cross join unnest(h.buckets, h.calls) u(bucket, calls)
  where h.recorded_at > clock_timestamp() - interval '5 minutes'
  group by h.consumer_id, u.bucket) b
group by b.consumer_id;
comment on view pgonce.handler_percentiles is 'What the handlers of each consumer took in the last 5 minutes: half of the calls up to p50_ms, 99 of 100 up to p99_ms (too high by up to a fifth), what one may take (the message timeout, or the lease, where that is shorter), and whether p99_ms is more than half of it.';

create or replace function pgonce.current_rates()
returns setof pgonce.rate
language sql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
  with counted as (
    select k.*, k.applied + k.duplicates + coalesce(k.retries + k.dead_letters, 0) as received
    from pgonce.counters k
  ),
  since as (
    select
      k.*,
      s.seconds,
      60 * (k.applied - s.applied) / s.seconds as applied_per_minute,
      60 * (k.duplicates - s.duplicates) / s.seconds as duplicates_per_minute,
      60 * (k.retries - s.retries) / s.seconds as retries_per_minute,
      60 * (k.dead_letters - s.dead_letters) / s.seconds as dead_letters_per_minute,
      60 * (k.fenced - s.fenced) / s.seconds as fenced_per_minute
    from counted k
    left join lateral (
      select a.*
      from (
        select r.*, extract(epoch from clock_timestamp() - r.sampled_at)::float8 as seconds
        from pgonce.samples r
        where r.stage = k.stage and r.id = k.id) a
      -- After a restore the counters are those of the checkpoint.
      where a.seconds > 0
        and (a.applied > k.applied or a.duplicates > k.duplicates or a.retries > k.retries
          or a.dead_letters > k.dead_letters) is not true
      order by abs(a.seconds - 60)
      limit 1) s on true
  )
  select
    k.stage,
    k.name,
    k.seconds,
    k.received,
    k.applied,
    k.duplicates,
    k.retries,
    k.dead_letters,
    k.fenced,
    k.applied_per_minute + k.duplicates_per_minute + coalesce(k.retries_per_minute + k.dead_letters_per_minute, 0),
    k.applied_per_minute,
    k.duplicates_per_minute,
    k.retries_per_minute,
    k.dead_letters_per_minute,
    k.fenced_per_minute,
    l.lag,
    l.oldest_age,
    p.p50_ms,
    p.p99_ms,
    p.limit_ms,
    coalesce(p.nears_limit, false)
  from since k
  left join pgonce.consumer_lag l on k.stage = 'consumer' and l.consumer = k.name
  left join pgonce.handler_percentiles p on k.stage = 'consumer' and p.consumer_id = k.id
$$;
comment on function pgonce.current_rates is 'What the view rates shows; whoever reads the view needs it. A function, so that it is planned in the same way whatever the statistics say, and never compiled.';

create or replace view pgonce.rates as
select
  r.stage, r.name, r.seconds, r.received, r.applied, r.duplicates, r.retries, r.dead_letters, r.fenced,
  r.received_per_minute, r.applied_per_minute, r.duplicates_per_minute, r.retries_per_minute, r.dead_letters_per_minute,
  r.fenced_per_minute, r.lag, r.oldest_age, r.handler_p50_ms, r.handler_p99_ms, r.handler_limit_ms, r.handler_nears_limit
from pgonce.current_rates() r;
comment on view pgonce.rates is 'The numbers of each topic (stage relay) and each consumer: totals since it was created, and per minute over the last so many seconds, about 60 where workers run; null where nobody has called sample_rates. received counts all that came, a message once for each attempt. handler_p50_ms and handler_p99_ms are of the last 5 minutes; handler_nears_limit where 99 of 100 calls take up to more than half of what one may.';

create or replace function pgonce.add_up_duplicates(before timestamptz)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  target integer;
  -- To lock a row is to write it: too few are not worth it.
  enough bigint;
  old tid[];
begin
  for target in select t.topic_id from pgonce.topics t loop
    select count(*) into strict enough
    from (
      select from pgonce.duplicate_sends d
      where d.topic_id = target and d.sent_at < before
      order by d.sent_at
      limit 1000) d;
    continue when enough < 1000;
    old := array(
      select d.ctid from pgonce.duplicate_sends d
      where d.topic_id = target and d.sent_at < before
      order by d.sent_at
      limit 50000
      for update skip locked);
    continue when cardinality(old) < 1000;
    with added_up as (delete from pgonce.duplicate_sends d where d.ctid = any (old) returning d.sent_at, d.messages)
    insert into pgonce.duplicate_sends (topic_id, sent_at, messages)
    select target, max(a.sent_at), sum(a.messages) from added_up a;
  end loop;
  for target in select c.consumer_id from pgonce.consumers c where c.topic_id is null loop
    select count(*) into strict enough
    from (
      select from pgonce.duplicate_receipts d
      where d.consumer_id = target and d.received_at < before
      order by d.received_at
      limit 1000) d;
    continue when enough < 1000;
    old := array(
      select d.ctid from pgonce.duplicate_receipts d
      where d.consumer_id = target and d.received_at < before
      order by d.received_at
      limit 50000
      for update skip locked);
    continue when cardinality(old) < 1000;
    with added_up as (delete from pgonce.duplicate_receipts d where d.ctid = any (old) returning d.received_at, d.messages)
    insert into pgonce.duplicate_receipts (consumer_id, received_at, messages)
    select target, max(a.received_at), sum(a.messages) from added_up a;
  end loop;
end $$;
comment on function pgonce.add_up_duplicates is 'Internal: puts a row with their number in the place of a thousand rows of duplicates or more, up to fifty thousand of each topic and inbox.';

create or replace function pgonce.sample_rates()
returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  at constant timestamptz := clock_timestamp();
begin
  perform pgonce.require_read_committed('sample_rates');
  -- Whoever comes second leaves it to the first, however long its transaction is.
  if not pg_try_advisory_xact_lock(hashtextextended('pgonce.sample_rates', 0)) then
    return false;
  end if;
  -- Looked at under the lock, with a snapshot of its own.
  if exists (
    select from pgonce.samples s where s.sampled_at > at - interval '10 seconds' and s.sampled_at <= at) then
    return false;
  end if;
  delete from pgonce.samples s where s.sampled_at < at - interval '1 hour' or s.sampled_at > clock_timestamp();
  delete from pgonce.handler_times h where h.recorded_at < at - interval '1 hour' or h.recorded_at > clock_timestamp();
  perform pgonce.add_up_duplicates(at - interval '10 minutes');
  insert into pgonce.samples (sampled_at, stage, id, applied, duplicates, retries, dead_letters, fenced)
  select at, k.stage, k.id, k.applied, k.duplicates, k.retries, k.dead_letters, k.fenced
  from pgonce.counters k;
  return true;
end $$;
comment on function pgonce.sample_rates is 'Writes down the counters of this moment, for the view rates to compare with, unless somebody has done so in the last 10 seconds, or is about to; answers whether it did. Forgets what is older than an hour, and adds up rows of duplicates that are older than 10 minutes. A worker calls it; where none runs, whoever likes. Commit it at once. Never waits. Errors: PO010 (READ COMMITTED only).';

create or replace function pgonce.record_handler_times(
  consumer text, limit_ms bigint, buckets integer[], calls bigint[])
returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
begin
  if limit_ms is null or limit_ms < 1 or buckets is null or calls is null
    or cardinality(buckets) not between 1 and 152 or cardinality(calls) <> cardinality(buckets)
    or exists (
      select from unnest(buckets, calls) u(bucket, calls)
      where (u.bucket between 0 and 151) is not true or (u.calls between 1 and 1000000000000) is not true) then
    raise exception using errcode = 'PO003', message = format('handler times of consumer %L', consumer),
      hint = 'They are a limit of at least 1 ms, and up to 152 buckets, each from 0 to 151, with the calls of each.';
  end if;
  insert into pgonce.handler_times (consumer_id, limit_ms, buckets, calls)
  values (reader.consumer_id, record_handler_times.limit_ms, record_handler_times.buckets, record_handler_times.calls);
  return (select p.nears_limit from pgonce.handler_percentiles p where p.consumer_id = reader.consumer_id);
end $$;
comment on function pgonce.record_handler_times is 'Adds to the numbers of handler_percentiles: so many more calls in each bucket, where bucket b has those that took up to 2 ^ (b / 4) microseconds, and what a call may take. A worker calls it every few seconds. Answers whether 99 of 100 calls of the consumer take up to more than half of what one may. Errors: PO002, PO003.';
