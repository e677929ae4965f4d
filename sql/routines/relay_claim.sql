-- The relay's claim: which PENDING rows of a partition go next. Called with the head lock.
--
-- Mostly nobody else has touched them. Then one statement does it all (relay_page): the UPDATE that marks them SENT is
-- the claim, and what it returns goes into the queue. It takes a row's lock as it comes to it and looks at its status
-- again in the newest version, which makes an old snapshot harmless and a message that was cancelled meanwhile stay
-- cancelled. A row that was touched shows it by its xmax, at the look at the page and again as the UPDATE comes to it;
-- where there is one, rows are claimed with SKIP LOCKED and published by a second statement (claim_around).
--
-- Locks: the outbox rows that it claims. relay_page waits for a row's lock only where that was taken in the instant between
-- the look at its xmax and the UPDATE's own lock, and for 10 ms at the most; claim_around, FOR NO KEY UPDATE SKIP LOCKED,
-- as strong as marking them SENT needs, never waits. docs/adr/0003 says why there are two.
-- Index: outbox_in_order (topic_id, partition, seq), from the lower bound (relay_bound.sql).
--
-- Order of a key. SKIP LOCKED passes over rows that somebody else holds (an operator, an ORM, a foreign key). Such a row
-- keeps back every later row of its key; all other keys flow on. Everything that decides this is read by one statement
-- in one snapshot, from the lower bound: a second page under a newer snapshot could show a later message of a key
-- whose first message has just become visible behind it.

create or replace function pgonce.refuse_touched()
returns boolean
language plpgsql volatile
as $$
begin
  raise exception using errcode = 'lock_not_available', message = 'another session has touched a row of the page';
end $$;
comment on function pgonce.refuse_touched is 'Internal: ends relay_page at a row that another session touched after the look at the page. Raises, because a row that is only left out would be overtaken by the next of its key.';

create or replace function pgonce.relay_page(
  topic_id integer, partition integer, max integer, max_bytes bigint, head pgonce.heads,
  out moved bigint, out bytes bigint, out done_up_to bigint, out at pg_snapshot)
language plpgsql volatile
set lock_timeout = '10ms'
as $$
#variable_conflict use_column
begin
  with bound as materialized (
    select pgonce.scan_from(head.scanned, head.open_xids, head.open_from, pg_current_snapshot()) as low
  ),
  page as materialized (
    select count(*) as n, max(p.seq) as last_seq, sum(p.bytes) as bytes,
           not bool_or(p.is_touched) and sum(p.bytes) <= relay_page.max_bytes as is_free
    from (
      select o.seq, o.bytes, o.xmax <> '0' as is_touched
      from pgonce.outbox o
      where o.topic_id = relay_page.topic_id and o.partition = relay_page.partition
        and o.seq > (select b.low from bound b) and o.status = 'PENDING'
      order by o.seq
      limit relay_page.max) p
  ),
  marked as (
    update pgonce.outbox o set status = 'SENT'
    where o.topic_id = relay_page.topic_id and o.partition = relay_page.partition
      and o.seq > (select b.low from bound b) and o.seq <= (select p.last_seq from page p where p.is_free)
      and case when o.status <> 'PENDING' then false when o.xmax = '0' then true else pgonce.refuse_touched() end
    returning o.*
  ),
  published as (
    insert into pgonce.queue ("offset", enqueued_at, topic_id, partition, bytes, message_id, key, payload, headers)
    select head.next_offset - 1 + row_number() over (order by m.seq), m.enqueued_at, m.topic_id, m.partition, m.bytes,
           m.message_id, m.key, m.payload, m.headers
    from marked m
  )
  select case when p.n = 0 or p.is_free then 0 end, coalesce(p.bytes, 0),
         -- Where the limit was not reached, the scan has seen everything.
         case when p.n < relay_page.max then 9223372036854775807 else p.last_seq end,
         pg_current_snapshot()
  into strict moved, bytes, done_up_to, at
  from page p;
  if moved = 0 then
    -- The end of the queue tells how many they were; to count them as they are inserted costs a twentieth of the rate.
    select q."offset" - head.next_offset + 1 into moved
    from pgonce.queue q
    where q.topic_id = relay_page.topic_id and q.partition = relay_page.partition and q."offset" >= head.next_offset
    order by q."offset" desc
    limit 1;
    moved := coalesce(moved, 0);
  end if;
exception when lock_not_available or deadlock_detected or unique_violation then
  moved := null;
end $$;
comment on function pgonce.relay_page is 'Internal: marks the next PENDING rows of a partition SENT and appends them to the queue, in one statement. moved is null, and nothing done, where another session has touched one of them, where they are more than max_bytes, or where the queue holds one already: claim_around and publish take those rows from there.';

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
