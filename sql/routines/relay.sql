-- Relay: how messages get from the outbox into the queue.
--
-- Locks, in this order: the head lock of a partition, FOR NO KEY UPDATE SKIP LOCKED; then the outbox rows it claims, FOR
-- UPDATE SKIP LOCKED. It never waits for anybody. READ COMMITTED only: the claim must see all that was committed before
-- the head lock was taken, so lock and claim are separate statements, each with a snapshot of its own.
-- Index: outbox_in_order (topic_id, partition, seq), from a lower bound. status stands in no index, so that marking a
-- row SENT is a HOT update.
--
-- Order of a key. SKIP LOCKED passes over rows that somebody else holds (an operator, an ORM, a foreign key). Such a row
-- keeps back every later row of its key; all other keys flow on. Everything that decides this is read by one statement
-- in one snapshot, from the lower bound: a second page under a newer snapshot could show a later message of a key
-- whose first message has just become visible behind it.
--
-- The lower bound. A transaction may commit a low seq after higher ones were relayed, so there is no cursor. But a scan
-- from the start is slow, the more so while an old snapshot keeps dead entries. A bound is safe at seq c once every
-- transaction that drew a seq up to c has ended. A transaction has its xid before it draws (the column default and
-- enqueue see to that), and numbers are drawn in order (CACHE 1). So this function reads the last seq drawn, c, and
-- after that is given its own xid, r: whoever drew up to c has an xid below r. Once r has ended, a snapshot knows of
-- every xid below r whether it is still open: that makes (c, r) a candidate which the *next* call adopts. (The snapshot
-- of this call would not do: an open xid above its xmax is in none of its lists. That lost a message.) Transactions that
-- are still open at the adoption are listed in open_xids, each with a seq below all its rows: floor, since a
-- transaction that was not seen open at the adoption before has drawn nothing up to that one's candidate. When one of
-- them has ended, the scan that finds it so starts from there, and it is struck off. A row that a scan leaves behind
-- keeps the bound below it. Which bound holds is decided by the snapshot of the claiming statement itself: if it can
-- see a later message of a key, it also sees that the transaction before it has ended.
-- Whatever makes a row PENDING draws a new seq for it.

create or replace function pgonce.has_ended(xid xid8, at pg_snapshot)
returns boolean
language sql immutable parallel safe
-- An xid that the snapshot cannot know yet comes from another server, by way of a restored dump.
return pg_visible_in_snapshot(xid, at) or xid >= pg_snapshot_xmax(at);
comment on function pgonce.has_ended is 'Internal: whether a transaction that was once open has ended, as a snapshot sees it.';

create or replace function pgonce.scan_from(scanned bigint, open_xids xid8[], open_from bigint[], at pg_snapshot)
returns bigint
language sql immutable parallel safe
return case
  when open_xids = '{}' then scanned
  else least(scanned, (
    select min(o.start) from unnest(open_xids, open_from) o(xid, start) where pgonce.has_ended(o.xid, at)))
end;
comment on function pgonce.scan_from is 'Internal: the bound at or below which nothing PENDING is to be found in a snapshot.';

create or replace function pgonce.relay_is_due(topic_id integer, partition integer)
returns boolean
language plpgsql stable
as $$
#variable_conflict use_column
declare
  head pgonce.heads;
  low bigint;
begin
  select h.* into strict head from pgonce.heads h
  where h.topic_id = relay_is_due.topic_id and h.partition = relay_is_due.partition
  order by h.generation desc limit 1;
  low := pgonce.scan_from(head.scanned, head.open_xids, head.open_from, pg_current_snapshot());
  return head.candidate_seq is not null
    or low < head.scanned
    or exists (
      select from pgonce.outbox o
      where o.topic_id = relay_is_due.topic_id and o.partition = relay_is_due.partition
        and o.seq > low and o.status = 'PENDING')
    or exists (
      select from pgonce.outbox o
      where o.topic_id = relay_is_due.topic_id and o.partition = relay_is_due.partition
        and o.deliver_at <= clock_timestamp());
end $$;
comment on function pgonce.relay_is_due is 'Internal: whether relay has something to do in a partition. Reads only, so that an empty poll writes nothing.';

create or replace function pgonce.promote_due(topic_id integer, partition integer, max integer)
returns integer
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  promoted integer;
begin
  if not exists (select from pgonce.outbox o
                 where o.topic_id = promote_due.topic_id and o.partition = promote_due.partition
                   and o.deliver_at <= clock_timestamp()) then
    return 0;
  end if;
  with due as materialized (
    select o.ctid as tid, o.deliver_at, o.seq
    from pgonce.outbox o
    where o.topic_id = promote_due.topic_id and o.partition = promote_due.partition
      and o.deliver_at <= clock_timestamp()
    order by o.deliver_at, o.seq
    limit promote_due.max
    for update skip locked
  ),
  numbered as materialized (
    select d.tid, nextval('pgonce.outbox_seq') as seq from (select * from due order by deliver_at, seq) d
  )
  update pgonce.outbox o
  set status = 'PENDING', deliver_at = null, seq = n.seq
  from numbered n
  where o.ctid = n.tid and o.ctid = any (array(select d.tid from due d));
  get diagnostics promoted = row_count;
  return promoted;
end $$;
comment on function pgonce.promote_due is 'Internal: makes delayed messages that are due PENDING, behind all that is PENDING now. Call it with the head lock.';

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

create or replace function pgonce.publish(
  topic_id integer, partition integer, first_offset bigint, tids tid[])
returns bigint
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  violated text;
  published bigint;
  marked bigint;
  aside bigint := 0;
begin
  loop
    begin
      insert into pgonce.queue ("offset", enqueued_at, topic_id, partition, bytes, message_id, key, payload, headers)
      select first_offset - 1 + row_number() over (order by o.seq), o.enqueued_at, o.topic_id, o.partition, o.bytes,
             o.message_id, o.key, o.payload, o.headers
      from pgonce.outbox o
      where o.ctid = any (tids);
      get diagnostics published = row_count;
      exit;
    exception when unique_violation then
      get stacked diagnostics violated = constraint_name;
      if violated <> 'queue_message_id_key' then
        raise;
      end if;
    end;
    with known as (
      select o.ctid as tid from pgonce.outbox o
      where o.ctid = any (tids)
        and exists (select from pgonce.queue q where q.topic_id = o.topic_id and q.message_id = o.message_id)
    ),
    marked as (
      update pgonce.outbox o set status = 'SENT' where o.ctid = any (array(select k.tid from known k)) returning o.*
    ),
    put as (
      insert into pgonce.set_aside (topic_id, partition, seq, message_id, key, payload, headers, reason)
      select m.topic_id, m.partition, m.seq, m.message_id, m.key, m.payload, m.headers, 'the queue holds a message with this id already'
      from marked m
    )
    select count(*), array(select t from unnest(tids) t except select k.tid from known k)
    into strict marked, tids from known;
    if marked = 0 then
      raise exception using errcode = 'PO012', message = 'a message cannot be published and is not in the queue',
        hint = 'Nothing was changed. This is a defect: please report it.';
    end if;
    aside := aside + marked;
  end loop;

  update pgonce.outbox o set status = 'SENT' where o.ctid = any (tids);
  get diagnostics marked = row_count;
  if marked <> published or published <> cardinality(tids) then
    raise exception using errcode = 'PO012',
      message = format('%s messages claimed, %s published, %s marked SENT', cardinality(tids), published, marked),
      hint = 'Nothing was changed. Outbox rows are being changed by hand, or this is a defect: please report it.';
  end if;
  return published;
end $$;
comment on function pgonce.publish is 'Internal: appends claimed rows to the queue in the order of their seq and marks them SENT. A row whose id stands in the queue already is set aside, with its reason, and the rest goes through.';

create or replace function pgonce.relay_partition(
  topic_id integer, partition integer, max integer, max_bytes bigint, drawn bigint,
  out moved bigint, out blocked bigint, out moved_bytes bigint)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  head pgonce.heads;
  before pgonce.heads;
  page record;
  adopts boolean;
begin
  moved := 0;
  blocked := 0;
  moved_bytes := 0;
  perform from pgonce.partitions p
  where p.topic_id = relay_partition.topic_id and p.partition = relay_partition.partition
  for no key update skip locked;
  if not found then
    return;
  end if;
  select h.* into strict head from pgonce.heads h
  where h.topic_id = relay_partition.topic_id and h.partition = relay_partition.partition
  order by h.generation desc limit 1;
  before := head;
  if drawn < head.floor then
    -- The sequence has fallen behind, as after a logical replication that does not carry it: nothing below is certain.
    head.scanned := 0;
    head.floor := 0;
    head.open_xids := '{}';
    head.open_from := '{}';
    head.candidate_seq := null;
    head.candidate_xid := null;
  end if;

  perform pgonce.promote_due(topic_id, partition, max);
  page := pgonce.claim_page(topic_id, partition, max, head);
  if page.passed_over > 0 or page.bytes > max_bytes then
    page := pgonce.claim_around(topic_id, partition, max, max_bytes, head);
  end if;
  if page.claimed > 0 then
    moved := pgonce.publish(topic_id, partition, head.next_offset, page.tids);
  end if;
  blocked := page.passed_over;
  moved_bytes := page.bytes;

  -- The lower bound for the next call, by the snapshot of the statement that claimed.
  adopts := coalesce(head.candidate_xid < pg_snapshot_xmax(page.at), false);
  select coalesce(array_agg(o.xid order by o.xid), '{}'), coalesce(array_agg(o.start order by o.xid), '{}')
  into head.open_xids, head.open_from
  from (
    select k.xid, k.start from unnest(head.open_xids, head.open_from) k(xid, start)
    where not pgonce.has_ended(k.xid, page.at)
    union all
    select x, head.floor from pg_snapshot_xip(page.at) x
    where adopts and x < head.candidate_xid and x <> all (head.open_xids)
  ) o(xid, start);
  if adopts then
    head.floor := head.candidate_seq;
  end if;
  head.scanned := least(case when adopts then head.floor else head.scanned end, page.done_up_to);
  head.next_offset := head.next_offset + moved;
  head.moved := head.moved + moved;
  if head.candidate_xid is distinct from pg_current_xact_id() then
    head.candidate_seq := case when moved > 0 then drawn end;
    head.candidate_xid := case when head.candidate_seq is not null then pg_current_xact_id() end;
  end if;
  if head is distinct from before then
    head.generation := head.generation + 1;
    insert into pgonce.heads select head.*;
    if head.generation % 64 = 0 then
      delete from pgonce.heads h
      where h.topic_id = relay_partition.topic_id and h.partition = relay_partition.partition
        and h.generation between head.generation - 200 and head.generation - 64;
    end if;
  end if;
end $$;
comment on function pgonce.relay_partition is 'Internal: moves the next messages of one partition, if its head lock is free. drawn is the last seq that had been drawn before this transaction had an xid, or null.';

create or replace function pgonce.relay(
  topic text default null,
  partition integer default null,
  max integer default 1000,
  max_bytes bigint default 8388608)
returns setof pgonce.relayed
language plpgsql volatile
-- The functions that it calls inherit these: names are found in pg_catalog only, and plans do not hang on statistics.
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  drawn bigint;
  target record;
  done record;
  answer pgonce.relayed;
  rest integer := max;
  rest_bytes bigint := max_bytes;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception using errcode = 'PO010', message = format('relay in a %s transaction', current_setting('transaction_isolation')),
      hint = 'Call relay in a READ COMMITTED transaction: it must see what was committed before it took its lock.';
  elsif max is null or max not between 1 and 10000 then
    raise exception using errcode = 'PO003', message = format('max of %s messages', max),
      hint = 'relay moves 1 to 10000 messages a call.';
  elsif max_bytes is null or max_bytes < 1 then
    raise exception using errcode = 'PO003', message = format('max_bytes of %s', max_bytes),
      hint = 'relay moves at least 1 byte a call, and at least one message.';
  elsif topic is null and partition is not null then
    raise exception using errcode = 'PO003', message = format('partition %s of no topic', partition),
      hint = 'Name the topic too.';
  elsif topic is not null and partition not between 0 and (pgonce.topic_row(topic)).partitions - 1 then
    raise exception using errcode = 'PO003', message = format('partition %s of topic %L', partition, topic),
      hint = format('It has partitions 0 to %s.', (pgonce.topic_row(topic)).partitions - 1);
  end if;
  if pg_current_xact_id_if_assigned() is null then
    select case when s.is_called then s.last_value else s.last_value - 1 end into strict drawn from pgonce.outbox_seq s;
  end if;

  for target in
    select t.topic_id, t.topic, p.partition
    from pgonce.topics t
    join pgonce.partitions p using (topic_id)
    where not t.paused
      and (relay.topic is null or t.topic = relay.topic)
      and (relay.partition is null or p.partition = relay.partition)
      and (relay.partition is not null or pgonce.relay_is_due(p.topic_id, p.partition))
    order by random()
  loop
    done := pgonce.relay_partition(target.topic_id, target.partition, rest, rest_bytes, drawn);
    if done.moved > 0 or done.blocked > 0 then
      answer := (target.topic, target.partition, done.moved, done.blocked);
      return next answer;
    end if;
    rest := rest - done.moved;
    rest_bytes := rest_bytes - done.moved_bytes;
    exit when rest <= 0 or rest_bytes <= 0;
  end loop;
end $$;
comment on function pgonce.relay is 'Moves up to max messages (and about max_bytes, at least one message) from the outbox to the queue, over all topics and partitions that are free, or over those named; delayed messages that are due come along. Answers a row for each partition in which it moved something or found something blocked. Errors: PO001, PO003, PO010 (READ COMMITTED only).';
