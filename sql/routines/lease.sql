-- Lease: who may be at a partition of an external consumer, whose effects are outside of this database.
--
-- No transaction is open while the effect is under way, so no row lock keeps others away: a lease does, for a time, and an
-- epoch that rises at every acquisition. What comes with an earlier epoch is refused and counted ("fenced"); that is an
-- outcome, and no error. So a process that stalls beyond its lease, and goes on, changes nothing here. Time only says
-- when others may try: a lease whose time is over is still its owner's until somebody else has acquired it.
--
-- Peek hands messages out and records none of them; ack records them as processed and moves the offset; nack counts a
-- failure, as fail does. What peek leaves out (parked, dead, processed before) it leaves out for good: it passes over what
-- stands at the offset, and parks what must not overtake a parked message. So all that is between two offsets and left out
-- by ack was left out by peek, whatever happened in between.
--
-- An owner that left without a word may have died of a message. Whoever takes over gets messages one by one, each noted
-- in the lease, for as far as that owner may have come: the next one to take over charges the noted message.
--
-- Locks: the offset lock of the partition, SKIP LOCKED, before the row of leases. No verb waits for anybody.
-- Indexes: the primary keys of leases, progress, queue and processed_ids; parked_due, parked_key.

create or replace function pgonce.external_row(consumer text)
returns pgonce.consumers
language plpgsql stable
as $$
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
begin
  if reader.kind <> 'external' then
    raise exception using errcode = 'PO007', message = format('consumer %L is transactional', consumer),
      hint = 'Leases are for consumers that were created with the kind ''external''.';
  end if;
  return reader;
end $$;
comment on function pgonce.external_row is 'Internal: the external consumer of that name, or PO002, or PO007.';

create or replace function pgonce.check_lease_ms(lease_ms integer)
returns void
language plpgsql volatile
as $$
begin
  if lease_ms is null or lease_ms not between 1 and 86400000 then
    raise exception using errcode = 'PO003', message = format('a lease of %s milliseconds', lease_ms),
      hint = 'A lease lasts 1 to 86400000 milliseconds (a day); renew it.';
  end if;
end $$;
comment on function pgonce.check_lease_ms is 'Internal: raises PO003 where a lease cannot last so long.';

create or replace function pgonce.living_members(consumer text, member_id uuid)
returns uuid[]
language plpgsql volatile
as $$
begin
  return array(
    select living_members.member_id
    union
    select m.member_id from pgonce.members m where living_members.consumer = any (m.consumers) and pgonce.lives(m));
end $$;
comment on function pgonce.living_members is 'Internal: the processes that run a consumer and live, and that one.';

create or replace function pgonce.preferred_member(members uuid[], consumer_id integer, partition integer)
returns uuid
language plpgsql volatile
as $$
begin
  -- Rendezvous hashing (Thaler and Ravishankar, 1998): whoever comes or goes changes the preference for its own share only.
  return (
    select m from unnest(members) m
    order by hashtextextended(m || ' ' || partition, consumer_id) desc
    limit 1);
end $$;
comment on function pgonce.preferred_member is 'Internal: which of these processes is the first choice for a partition.';

create or replace function pgonce.fair_share(consumer_id integer, members uuid[])
returns integer
language plpgsql volatile
as $$
begin
  return (
    select ceil(count(*)::numeric / cardinality(members)) from pgonce.leases l
    where l.consumer_id = fair_share.consumer_id);
end $$;
comment on function pgonce.fair_share is 'Internal: how many partitions each of these processes may hold.';

create or replace function pgonce.is_free(lease pgonce.leases)
returns boolean
language plpgsql volatile
as $$
begin
  return lease.owner is null
    or lease.leased_until <= clock_timestamp()
    or (lease.was_member and not exists (
      select from pgonce.members m where m.member_id = lease.owner and pgonce.lives(m)));
end $$;
comment on function pgonce.is_free is 'Internal: whether a partition may be acquired: nobody has it, or its time is over, or its owner has died.';

create or replace function pgonce.enter_lease(reader pgonce.consumers, partition integer, epoch bigint, verb text)
returns text
language plpgsql volatile
as $$
declare
  lease pgonce.leases;
begin
  perform pgonce.require_read_committed(verb);
  perform from pgonce.consumer_partitions p
  where p.consumer_id = reader.consumer_id and p.partition = enter_lease.partition
  for no key update skip locked;
  if not found then
    perform from pgonce.consumer_partitions p
    where p.consumer_id = reader.consumer_id and p.partition = enter_lease.partition;
    if not found then
      raise exception using errcode = 'PO003', message = format('partition %s of consumer %L', partition, reader.consumer),
        hint = 'See which partitions it has: select * from pgonce.consumer_offsets.';
    end if;
    return 'busy';
  end if;
  select l.* into strict lease from pgonce.leases l
  where l.consumer_id = reader.consumer_id and l.partition = enter_lease.partition;
  if lease.owner is null or lease.epoch is distinct from enter_lease.epoch then
    update pgonce.leases l set fenced = l.fenced + 1
    where l.consumer_id = reader.consumer_id and l.partition = enter_lease.partition;
    return 'fenced';
  end if;
  return 'held';
end $$;
comment on function pgonce.enter_lease is 'Internal: takes the offset lock, and says whether the epoch is in force: held, fenced (which it counts) or busy.';

create or replace function pgonce.advance(
  current pgonce.progress, next_offset bigint, received bigint, duplicates bigint)
returns void
language plpgsql volatile
as $$
begin
  -- A parked message moves no offset.
  current.was_parked := advance.next_offset = current.next_offset;
  current.next_offset := advance.next_offset;
  current.received := current.received + advance.received;
  current.duplicates := current.duplicates + advance.duplicates;
  perform pgonce.append_progress(current);
end $$;
comment on function pgonce.advance is 'Internal: the next generation of progress, so many messages further.';

create or replace function pgonce.acquire(consumer text, member_id uuid, max_partitions integer, lease_ms integer)
returns setof pgonce.acquired
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.external_row(consumer);
  members uuid[] := pgonce.living_members(consumer, member_id);
  wanted bigint;
  target integer;
  lease pgonce.leases;
  next_offset bigint;
  answer pgonce.acquired;
begin
  perform pgonce.require_read_committed('acquire');
  perform pgonce.check_lease_ms(lease_ms);
  if member_id is null or max_partitions is null or max_partitions not between 1 and 1024 then
    raise exception using errcode = 'PO003', message = format('member_id %s, max_partitions of %s', member_id, max_partitions),
      hint = 'A member has an id (gen_random_uuid() gives one), and holds 1 to 1024 partitions.';
  end if;
  wanted := least(max_partitions, pgonce.fair_share(reader.consumer_id, members)) - (
    select count(*) from pgonce.leases l
    where l.consumer_id = reader.consumer_id and l.owner = acquire.member_id and not pgonce.is_free(l));
  for target in
    select l.partition from pgonce.leases l
    where l.consumer_id = reader.consumer_id and pgonce.is_free(l)
    order by pgonce.preferred_member(members, l.consumer_id, l.partition) = acquire.member_id desc, random()
  loop
    exit when wanted <= 0;
    perform from pgonce.consumer_partitions p
    where p.consumer_id = reader.consumer_id and p.partition = target
    for no key update skip locked;
    continue when not found;
    -- Looked at again under the lock.
    select l.* into strict lease from pgonce.leases l where l.consumer_id = reader.consumer_id and l.partition = target;
    continue when not pgonce.is_free(lease);
    if lease.owner <> acquire.member_id then
      if lease.tried_offset is not null then
        perform pgonce.count_failure(
          reader, target, lease.tried_offset, 'whoever tried it died, or took longer than its lease', false, null, false);
        update pgonce.parked k
        set is_suspect = true
        where k.consumer_id = reader.consumer_id and k.partition = target and k."offset" = lease.tried_offset;
      end if;
      -- It was at something that was in the queue, and no batch is longer than 10,000.
      next_offset := (pgonce.newest_progress(reader.consumer_id, target)).next_offset;
      lease.careful_until := least(next_offset + 10000, (
        select q."offset" + 1 from pgonce.queue q
        where q.topic_id = reader.topic_id and q.partition = target
        order by q."offset" desc
        limit 1));
    end if;
    update pgonce.leases l
    set epoch = l.epoch + 1,
        owner = acquire.member_id,
        leased_until = clock_timestamp() + lease_ms * interval '1 millisecond',
        was_member = exists (select from pgonce.members m where m.member_id = acquire.member_id),
        careful_until = coalesce(lease.careful_until, 0),
        tried_offset = null
    where l.consumer_id = reader.consumer_id and l.partition = target
    returning l.partition, l.epoch into strict answer;
    return next answer;
    wanted := wanted - 1;
  end loop;
end $$;
comment on function pgonce.acquire is 'Takes up to max_partitions partitions of an external consumer for lease_ms milliseconds, with those that the member holds already: those that nobody has, whose time is over, or whose owner has died (leave, or no beat for 5 s). Where other members live that run the consumer (beat), it holds no more than its share. Commit it; renew each in time. Never waits. Errors: PO002, PO003, PO007 (not an external consumer), PO010 (READ COMMITTED only).';

create or replace function pgonce.peek(
  consumer text,
  partition integer,
  epoch bigint,
  max integer default 100,
  max_bytes bigint default 8388608)
returns setof pgonce.peeked
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.external_row(consumer);
  present constant timestamptz := clock_timestamp();
  current pgonce.progress;
  careful_until bigint;
  has_suspect boolean;
  is_turn_of_new boolean;
  batch record;
  waiting bigint;
  known text[];
  held text[];
  first bigint;
  message pgonce.peeked;
begin
  if max is null or max not between 1 and 10000 or max_bytes is null or max_bytes < 1 then
    raise exception using errcode = 'PO003', message = format('max of %s messages, max_bytes of %s', max, max_bytes),
      hint = 'peek takes 1 to 10000 messages and at least 1 byte a call, and at least one message.';
  elsif pgonce.enter_lease(reader, partition, epoch, 'peek') <> 'held' or reader.paused then
    return;
  end if;
  current := pgonce.newest_progress(reader.consumer_id, partition);
  select l.careful_until into strict careful_until from pgonce.leases l
  where l.consumer_id = reader.consumer_id and l.partition = peek.partition;
  has_suspect := pgonce.due_suspect(reader, partition, current.next_offset) is not null;
  if has_suspect or current.next_offset < careful_until then
    max := 1;
  end if;
  is_turn_of_new := pgonce.is_turn_of_new(reader, current);

  for message in
    select b.partition, b."offset", b.message_id, b.key, b.payload, b.headers, b.enqueued_at, b.attempts + 1, true
    from (
      select k.*, sum(k.bytes) over (order by k.due_at, k."offset" rows unbounded preceding) - k.bytes as bytes_before
      from (
        select k.* from pgonce.parked k
        where k.consumer_id = reader.consumer_id and k.partition = peek.partition
          and k.taken_by is null and k.due_at <= present and k."offset" < current.next_offset
          and k.is_suspect = has_suspect
          and (has_suspect or not is_turn_of_new)
          and (reader.failure_policy <> 'block' or not exists (
            select from pgonce.parked f
            where f.consumer_id = reader.consumer_id and f.partition = k.partition and f.taken_by is null
              and f."offset" < k."offset"))
        order by k.due_at, k."offset"
        limit peek.max) k) b
    where b.bytes_before < peek.max_bytes
    order by b.due_at, b."offset"
  loop
    return next message;
  end loop;
  if message."offset" is null then
    select count(*) as messages, coalesce(max(b."offset"), 0) as last
    into strict batch
    from (
      select q."offset", sum(q.bytes) over (order by q."offset" rows unbounded preceding) - q.bytes as bytes_before
      from (
        select q."offset", q.bytes from pgonce.queue q
        where q.topic_id = reader.topic_id and q.partition = peek.partition and q."offset" >= current.next_offset
        order by q."offset"
        limit peek.max) q) b
    where b.bytes_before < peek.max_bytes;
    if batch.messages = 0 then
      return;
    elsif batch.last - current.next_offset + 1 <> batch.messages then
      raise exception using errcode = 'PO009',
        message = format(
          'partition %s of consumer %L has a hole at or after offset %s', partition, consumer, current.next_offset),
        hint = 'Messages were deleted from the queue by hand. Restore them, or create the consumer anew.';
    end if;
    if reader.failure_policy = 'block' then
      select min(k."offset") into strict waiting from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = peek.partition and k.taken_by is null;
      if waiting < current.next_offset then
        return;
      end if;
      batch.last := least(batch.last, waiting);
    end if;
    held := pgonce.left_out(reader, partition, current.next_offset, batch.last);
    known := pgonce.known_ids(reader, partition, current.next_offset, batch.last);
    select min(q."offset") into strict first from pgonce.queue q
    where q.topic_id = reader.topic_id and q.partition = peek.partition
      and q."offset" between current.next_offset and batch.last and q.message_id <> all (held || known);
    first := coalesce(first, batch.last + 1);
    if first > current.next_offset then
      perform pgonce.advance(current, first, 0, (
        select count(*) from pgonce.queue q
        where q.topic_id = reader.topic_id and q.partition = peek.partition
          and q."offset" between current.next_offset and first - 1
          and q.message_id = any (known) and q.message_id <> all (held)));
    end if;
    for message in
      select q.partition, q."offset", q.message_id, q.key, q.payload, q.headers, q.enqueued_at, 1, false
      from pgonce.queue q
      where q.topic_id = reader.topic_id and q.partition = peek.partition
        and q."offset" between first and batch.last and q.message_id <> all (held || known)
      order by q."offset"
    loop
      return next message;
    end loop;
  end if;
  if message."offset" is not null and (has_suspect or current.next_offset < careful_until) then
    update pgonce.leases l set tried_offset = message."offset"
    where l.consumer_id = reader.consumer_id and l.partition = peek.partition;
  end if;
end $$;
comment on function pgonce.peek is 'The next messages of a partition that was acquired, up to max (and about max_bytes, at least one message): those that failed before and are due, or new ones in the order of their offsets, in turns. They stay until ack or nack, and come again to whoever peeks. Commit it before the effect begins. No rows: nothing to do, or the partition was acquired by somebody else, or another session is at it. Errors: PO002, PO003, PO007 (not an external consumer), PO009 (a hole), PO010 (READ COMMITTED only).';

create or replace function pgonce.ack(
  consumer text, partition integer, epoch bigint, from_offset bigint, to_offset bigint)
returns setof pgonce.acked
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.external_row(consumer);
  current pgonce.progress;
  answer pgonce.acked;
  parked pgonce.parked;
  messages bigint;
  known text[];
  held text[];
begin
  if from_offset is null or to_offset is null or to_offset - from_offset not between 0 and 9999 then
    raise exception using errcode = 'PO003', message = format('offsets %s to %s', from_offset, to_offset),
      hint = 'ack takes the first and the last of 1 to 10000 messages that peek has answered.';
  end if;
  answer.outcome := pgonce.enter_lease(reader, partition, epoch, 'ack');
  if answer.outcome <> 'held' then
    return next answer;
    return;
  end if;
  current := pgonce.newest_progress(reader.consumer_id, partition);
  answer := ('gone', current.next_offset);
  if from_offset = to_offset and from_offset < current.next_offset then
    -- Also where it waits behind another of its key: a replay may have put that in front of it since it was handed out.
    delete from pgonce.parked k
    where k.consumer_id = reader.consumer_id and k.partition = ack.partition and k."offset" = from_offset
      and k.taken_by is null
    returning k.* into parked;
    if found then
      perform pgonce.release_next(reader.consumer_id, partition, array[parked.key]);
      insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
      values (parked."offset", reader.consumer_id, ack.partition, parked.message_id)
      on conflict do nothing;
      perform pgonce.advance(current, current.next_offset, found::integer, (not found)::integer);
      answer.outcome := 'acked';
    end if;
  elsif from_offset = current.next_offset then
    select count(*) into strict messages from pgonce.queue q
    where q.topic_id = reader.topic_id and q.partition = ack.partition and q."offset" between from_offset and to_offset;
    if messages <> to_offset - from_offset + 1 then
      raise exception using errcode = 'PO003', message = format('offsets %s to %s', from_offset, to_offset),
        hint = 'There are no such messages in the queue: peek cannot have answered them.';
    end if;
    -- What was left out when they were handed out is parked, dead, or known. What began to wait since then was handed out.
    held := array(
      select k.message_id from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = ack.partition
        and k."offset" between from_offset and to_offset
      union
      select d.message_id from pgonce.dead_letters d
      where d.consumer_id = reader.consumer_id and d.partition = ack.partition
        and d."offset" between from_offset and to_offset);
    known := pgonce.known_ids(reader, partition, from_offset, to_offset);
    known := array(select k from unnest(known) k where k <> all (held));
    perform pgonce.record_batch(reader, partition, from_offset, to_offset, held || known);
    perform pgonce.advance(
      current, to_offset + 1, messages - cardinality(held) - cardinality(known), cardinality(known));
    answer := ('acked', to_offset + 1);
  end if;
  update pgonce.leases l set tried_offset = null
  where l.consumer_id = reader.consumer_id and l.partition = ack.partition
    and l.tried_offset between from_offset and to_offset;
  return next answer;
end $$;
comment on function pgonce.ack is 'Says that the effects of messages that peek answered are there: all of them from the first new one (from_offset) to to_offset, or a single one that was parked (from_offset = to_offset). Records them as processed and moves the offset. Answers acked; gone: it was done before, and nothing was changed; fenced: somebody else has acquired the partition, and nothing was changed; busy: call it again. Never waits. Errors: PO002, PO003, PO007 (not an external consumer), PO010 (READ COMMITTED only).';

create or replace function pgonce.nack(
  consumer text,
  partition integer,
  epoch bigint,
  "offset" bigint,
  error text,
  permanent boolean default false,
  retry_at timestamptz default null)
returns setof pgonce.nacked
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.external_row(consumer);
  answer pgonce.nacked;
begin
  answer.outcome := pgonce.enter_lease(reader, partition, epoch, 'nack');
  if answer.outcome = 'held' then
    select f.outcome, f.attempts, f.due_at into strict answer
    from pgonce.count_failure(reader, partition, "offset", error, permanent, retry_at, false) f;
    update pgonce.leases l set tried_offset = null
    where l.consumer_id = reader.consumer_id and l.partition = nack.partition and l.tried_offset = nack."offset";
  end if;
  return next answer;
end $$;
comment on function pgonce.nack is 'Counts a failed attempt of a message that peek answered, and applies the failure policy of the consumer, as fail does: parked or dead; gone: it is settled; fenced: somebody else has acquired the partition, and nothing was changed; busy: call it again. First acknowledge what came before it; then peek again, since what must not overtake it was perhaps handed out with it. Never waits. Errors: PO002, PO003, PO007 (not an external consumer), PO010 (READ COMMITTED only).';

create or replace function pgonce.renew(consumer text, partition integer, epoch bigint, lease_ms integer)
returns setof pgonce.renewed
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.external_row(consumer);
  holder uuid;
  members uuid[];
  answer pgonce.renewed;
begin
  perform pgonce.check_lease_ms(lease_ms);
  answer.outcome := pgonce.enter_lease(reader, partition, epoch, 'renew');
  if answer.outcome = 'held' then
    update pgonce.leases l
    set leased_until = clock_timestamp() + lease_ms * interval '1 millisecond',
        was_member = exists (select from pgonce.members m where m.member_id = l.owner)
    where l.consumer_id = reader.consumer_id and l.partition = renew.partition
    returning l.owner into strict holder;
    members := pgonce.living_members(consumer, holder);
    answer := ('renewed', (
      select h.place > pgonce.fair_share(reader.consumer_id, members)
      from (
        select l.partition, row_number() over (
          order by pgonce.preferred_member(members, l.consumer_id, l.partition) = l.owner desc, l.partition) as place
        from pgonce.leases l
        where l.consumer_id = reader.consumer_id and l.owner = holder) h
      where h.partition = renew.partition));
  end if;
  return next answer;
end $$;
comment on function pgonce.renew is 'Keeps a partition for lease_ms milliseconds from now, also where the time was over and nobody else has acquired it. Answers renewed, and is_surplus where others live that have a right to it: release it after the messages at hand; fenced: somebody else has acquired it; busy: call it again. Never waits. Errors: PO002, PO003, PO007 (not an external consumer), PO010 (READ COMMITTED only).';

create or replace function pgonce.release(consumer text, partition integer, epoch bigint)
returns setof pgonce.released
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.external_row(consumer);
  answer pgonce.released;
begin
  answer.outcome := pgonce.enter_lease(reader, partition, epoch, 'release');
  if answer.outcome = 'held' then
    update pgonce.leases l
    set owner = null, leased_until = null, tried_offset = null
    where l.consumer_id = reader.consumer_id and l.partition = release.partition;
    answer.outcome := 'released';
  end if;
  return next answer;
end $$;
comment on function pgonce.release is 'Gives a partition back: others may acquire it at once. Answers released, fenced (somebody else has acquired it) or busy (call it again). Never waits. Errors: PO002, PO003, PO007 (not an external consumer), PO010 (READ COMMITTED only).';
