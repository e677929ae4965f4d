-- The relay's claim: which PENDING rows of a partition go next. Called with the head lock.
--
-- Locks: the outbox rows that it claims, FOR NO KEY UPDATE SKIP LOCKED, as strong as marking them SENT needs. Without
-- these locks an old snapshot could claim a row again.
-- Index: outbox_in_order (topic_id, partition, seq), from the lower bound (relay_bound.sql).
--
-- Order of a key. SKIP LOCKED passes over rows that somebody else holds (an operator, an ORM, a foreign key). Such a row
-- keeps back every later row of its key; all other keys flow on. Everything that decides this is read by one statement
-- in one snapshot, from the lower bound: a second page under a newer snapshot could show a later message of a key
-- whose first message has just become visible behind it.

create or replace function pgonce.claim_page(
  topic_id integer, partition integer, max integer, head pgonce.heads,
  out tids tid[], out claimed bigint, out bytes bigint, out passed_over bigint, out done_up_to bigint, out at pg_snapshot)
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  with bound as materialized (
    select pgonce.scan_from(head.scanned, head.open_xids, head.open_from, pg_current_snapshot()) as low
  ),
  claimed as materialized (
    select array_agg(c.tid) as tids, count(*) as n, coalesce(sum(c.bytes), 0) as bytes,
           -- Where the limit was not reached, the scan has seen everything.
           case when count(*) < claim_page.max then 9223372036854775807 else max(c.seq) end as top
    from (
      select o.ctid as tid, o.seq, o.bytes
      from pgonce.outbox o
      where o.topic_id = claim_page.topic_id and o.partition = claim_page.partition
        and o.seq > (select b.low from bound b) and o.status = 'PENDING'
      order by o.seq
      limit claim_page.max
      for no key update skip locked) c
  ),
  pending as materialized (
    select count(*) as n
    from pgonce.outbox o
    where o.topic_id = claim_page.topic_id and o.partition = claim_page.partition
      and o.seq > (select b.low from bound b) and o.seq <= (select c.top from claimed c) and o.status = 'PENDING'
  )
  select c.tids, c.n, c.bytes, p.n - c.n, c.top, pg_current_snapshot()
  into strict tids, claimed, bytes, passed_over, done_up_to, at
  from claimed c, pending p;
end $$;
comment on function pgonce.claim_page is 'Internal: claims the next PENDING rows of a partition, and counts those among them that it had to pass over. Where there are any, claim_around decides what may go.';

create or replace function pgonce.claim_around(
  topic_id integer, partition integer, max integer, max_bytes bigint, head pgonce.heads,
  out tids tid[], out claimed bigint, out bytes bigint, out passed_over bigint, out done_up_to bigint, out at pg_snapshot)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  stuck_keys text[] := '{}';
  full_page boolean;
begin
  loop
    with bound as materialized (
      select pgonce.scan_from(head.scanned, head.open_xids, head.open_from, pg_current_snapshot()) as low
    ),
    claimed as materialized (
      select o.ctid as tid, o.seq, o.bytes, o.key
      from pgonce.outbox o
      where o.topic_id = claim_around.topic_id and o.partition = claim_around.partition
        and o.seq > (select b.low from bound b) and o.status = 'PENDING'
        and (o.key is null or o.key <> all (stuck_keys))
      order by o.seq
      limit claim_around.max
      for no key update skip locked
    ),
    reach as materialized (
      select case when count(*) < claim_around.max then 9223372036854775807 else max(c.seq) end as top from claimed c
    ),
    passed_over as materialized (
      select o.seq, o.key
      from pgonce.outbox o
      where o.topic_id = claim_around.topic_id and o.partition = claim_around.partition
        and o.seq > (select b.low from bound b) and o.seq <= (select r.top from reach r) and o.status = 'PENDING'
        and o.seq not in (select c.seq from claimed c)
    ),
    blocked_from as materialized (
      select p.key, min(p.seq) as seq from passed_over p where p.key is not null group by p.key
    ),
    held as materialized (
      select c.seq from claimed c join blocked_from b on b.key = c.key and b.seq < c.seq
    ),
    free as materialized (
      select c.tid, c.seq, sum(c.bytes) over in_order as bytes_with, sum(c.bytes) over in_order - c.bytes as bytes_before
      from claimed c
      where c.seq not in (select h.seq from held h)
      window in_order as (order by c.seq rows unbounded preceding)
    ),
    going as materialized (
      select array_agg(f.tid) as tids, count(*) as n, coalesce(max(f.bytes_with), 0) as bytes
      from free f
      where f.bytes_before < claim_around.max_bytes
    )
    select g.tids, g.n, g.bytes,
           (select count(*) from passed_over) + (select count(*) from held),
           least(
             (select r.top from reach r),
             (select min(p.seq) - 1 from passed_over p),
             (select min(h.seq) - 1 from held h),
             (select min(f.seq) - 1 from free f where f.bytes_before >= claim_around.max_bytes)),
           pg_current_snapshot(),
           (select count(*) from claimed) = claim_around.max,
           array(select b.key from blocked_from b)
    into strict tids, claimed, bytes, passed_over, done_up_to, at, full_page, stuck_keys
    from going g;
    -- A whole page that waits behind keys which are stuck: look again from the bound, past all that is known of these.
    exit when claimed > 0 or not full_page;
  end loop;
end $$;
comment on function pgonce.claim_around is 'Internal: claims what may go of a partition in which other sessions hold locks: no row of a key behind one that was passed over, and no more than max_bytes.';
