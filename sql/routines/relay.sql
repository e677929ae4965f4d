-- Relay: how messages get from the outbox into the queue.
--
-- Locks, in this order: the head lock of a partition, FOR NO KEY UPDATE SKIP LOCKED; then, in the same way, delayed outbox
-- rows that are due, and the rows that it claims (relay_claim.sql). It waits for no row, but for an instant where one is locked in the very moment in which it is being
-- marked. READ COMMITTED only: the claim must see all that was committed before the head lock was taken, so lock and claim
-- are separate statements, each with a snapshot of its own.
-- status stands in no index, so that marking a row SENT is a HOT update.
-- Whatever makes a row PENDING draws a new seq for it: the scan does not look below its bound (relay_bound.sql).

create or replace function pgonce.relay_is_due(topic_id integer, partition integer, drawn bigint)
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
    or drawn < head.floor
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
    for no key update skip locked
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
    raise warning '% messages of partition % are set aside: the queue holds messages with their ids already', marked, partition
      using hint = 'See what they are: select * from pgonce.set_aside.';
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
  topic_id integer, partition integer, max integer, max_bytes bigint, drawn bigint, is_first boolean,
  out moved bigint, out blocked bigint, out moved_bytes bigint)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  head pgonce.heads;
  before pgonce.heads;
  promoted integer;
  page record;
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
  if drawn < head.floor and pgonce.last_drawn() < head.floor then
    -- Not only has another relay come further since drawn was read: the sequence has fallen behind, as after a logical
    -- replication that does not carry it, and nothing below is certain.
    -- That is seen only until producers have drawn past the bound, so restore_sequence is to be called before they do.
    head := pgonce.without_bound(head);
  end if;

  promoted := pgonce.promote_due(topic_id, partition, max);
  page := pgonce.relay_page(topic_id, partition, max, max_bytes, head);
  if page.moved is not null then
    moved := page.moved;
  else
    page := pgonce.claim_around(topic_id, partition, max, max_bytes, head);
    if page.claimed > 0 then
      moved := pgonce.publish(topic_id, partition, head.next_offset, page.tids);
    end if;
    blocked := page.passed_over;
  end if;
  moved_bytes := page.bytes;

  head := pgonce.advance_bound(head, case when is_first then drawn end, moved, page.done_up_to, page.at);
  head.next_offset := head.next_offset + moved;
  head.moved := head.moved + moved;
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
comment on function pgonce.relay_partition is 'Internal: moves the next messages of one partition, if its head lock is free. drawn is the last seq that was drawn, is_first whether this transaction had no xid then.';

create or replace function pgonce.relay(
  topic text default null,
  partition integer default null,
  max integer default 1000,
  max_bytes bigint default 8388608)
returns setof pgonce.relayed
language plpgsql volatile security definer
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
  is_first boolean;
  target record;
  done record;
  answer pgonce.relayed;
  partitions integer;
  rest integer := max;
  rest_bytes bigint := max_bytes;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    perform pgonce.require_read_committed('relay');
  elsif max is null or max not between 1 and 10000 then
    raise exception using errcode = 'PO003', message = format('max of %s messages', max),
      hint = 'relay moves 1 to 10000 messages a call.';
  elsif max_bytes is null or max_bytes < 1 then
    raise exception using errcode = 'PO003', message = format('max_bytes of %s', max_bytes),
      hint = 'relay moves at least 1 byte a call, and at least one message.';
  elsif topic is null and partition is not null then
    raise exception using errcode = 'PO003', message = format('partition %s of no topic', partition),
      hint = 'Name the topic too.';
  elsif topic is not null then
    partitions := (pgonce.topic_row(topic)).partitions;
    if partition not between 0 and partitions - 1 then
      raise exception using errcode = 'PO003', message = format('partition %s of topic %L', partition, topic),
        hint = format('It has partitions 0 to %s.', partitions - 1);
    end if;
  end if;
  is_first := pg_current_xact_id_if_assigned() is null;
  drawn := pgonce.last_drawn();

  for target in
    select t.topic_id, t.topic, p.partition
    from pgonce.topics t
    join pgonce.partitions p using (topic_id)
    where not t.paused
      and (relay.topic is null or t.topic = relay.topic)
      and (relay.partition is null or p.partition = relay.partition)
      and (relay.partition is not null or pgonce.relay_is_due(p.topic_id, p.partition, drawn))
    order by random()
  loop
    done := pgonce.relay_partition(target.topic_id, target.partition, rest, rest_bytes, drawn, is_first);
    if done.moved > 0 or done.blocked > 0 then
      answer := (target.topic, target.partition, done.moved, done.blocked);
      return next answer;
    end if;
    rest := rest - done.moved;
    rest_bytes := rest_bytes - done.moved_bytes;
    exit when rest <= 0 or rest_bytes <= 0;
  end loop;
  if rest < max then
    perform pgonce.end_watch();
  end if;
end $$;
comment on function pgonce.relay is 'Moves up to max messages (and about max_bytes, at least one message) from the outbox to the queue, over all topics and partitions that are free, or over those named; delayed messages that are due come along. Answers a row for each partition in which it moved something or found something blocked. Errors: PO001, PO003, PO010 (READ COMMITTED only).';
