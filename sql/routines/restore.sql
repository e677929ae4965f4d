-- Restore: a consumer as it was at a checkpoint; and replay: its messages once more.
--
-- One transaction puts everything back together: offsets, what is recorded as processed, what was parked and given up, and
-- the rows of its state. What was processed after the checkpoint is no longer recorded, and comes again. Rows that are as they
-- were are not written.
--
-- Nobody who was at work before can write afterwards: the offset locks of all partitions wait for those who are (each batch
-- commits or rolls back), the generation of progress rises, so that a statement which began before receives nothing, and of an
-- external consumer the epoch of each partition. While a handler is at messages that were recorded first (at_most_once), it is
-- refused. Tables of state are locked against writers, which also keeps away whoever uses an inbox.
--
-- Locks, in this order: the consumer's row; the floors of the topic FOR SHARE; the offset locks of the consumer, ascending; the
-- checkpoint's row FOR KEY SHARE; EXCLUSIVE, by oid, the tables of state that are not shared, and of an inbox all.
-- READ COMMITTED only: it must see what they waited for.

create or replace function pgonce.lock_offsets(reader pgonce.consumers)
returns void
language plpgsql volatile
as $$
declare
  place integer;
begin
  -- An inbox has no partitions.
  perform from pgonce.consumers c where c.consumer_id = reader.consumer_id for no key update;
  if not found then
    -- Dropped while we waited: say so.
    perform pgonce.consumer_row(reader.consumer);
  end if;
  perform from pgonce.queue_floors f where f.topic_id = reader.topic_id order by f.partition for share;
  perform from pgonce.consumer_partitions p where p.consumer_id = reader.consumer_id order by p.partition for no key update;
  if pgonce.is_moved_here(reader) then
    raise exception using errcode = 'PO003', message = format('consumer %L is set back by a transaction of its own', reader.consumer),
      hint = 'This transaction has received, or set it back before: what it applies now would be applied once more. COMMIT first.';
  end if;
  for place in
    select o.partition from pgonce.consumer_offsets o
    where o.consumer_id = reader.consumer_id and o.handler is not null
    order by o.partition
  loop
    if not pgonce.end_handover(reader, place) then
      raise exception using errcode = '55P03',
        message = format('a handler is at messages of partition %s of consumer %L', place, reader.consumer),
        hint = 'They were recorded first, at most once. Try again when it is done, or pause the consumer and try again then.';
    end if;
  end loop;
end $$;
comment on function pgonce.lock_offsets is 'Internal: takes the offset locks of a consumer in all partitions, and sees to it that nothing is deleted from the queue.';

create or replace function pgonce.rewind(reader pgonce.consumers, counters pgonce.progress)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  current pgonce.progress := pgonce.newest_progress(reader.consumer_id, counters.partition);
begin
  -- Whoever has an older snapshot cannot take the lock afterwards.
  update pgonce.consumer_partitions p set partition = p.partition
  where p.consumer_id = reader.consumer_id and p.partition = counters.partition;
  counters.generation := current.generation;
  counters.was_parked := false;
  counters.handler := null;
  counters.handed_over := null;
  perform pgonce.append_progress(counters);
  -- Neither what is parked nor what became a dead letter was applied.
  delete from pgonce.processed_ids p
  where p.ctid = any (array(
    select known.ctid
    from (
      select q.message_id, q."offset" from pgonce.queue q
      where q.topic_id = reader.topic_id and q.partition = counters.partition and q."offset" >= counters.next_offset
      union
      select k.message_id, k."offset" from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = counters.partition
      union
      select d.message_id, d."offset" from pgonce.dead_letters d
      where d.consumer_id = reader.consumer_id and d.partition = counters.partition and d.state = 'dead') again
    -- One look-up an id, whatever the statistics say.
    cross join lateral (
      select r.ctid, r.partition, r."offset" from pgonce.processed_ids r
      where r.consumer_id = reader.consumer_id and r.message_id = again.message_id
      limit 1) known
    where known.partition = counters.partition and known."offset" = again."offset"));
  -- A checkpoint may also be further than the consumer is now.
  insert into pgonce.processed_ids ("offset", consumer_id, partition, message_id)
  select q."offset", reader.consumer_id, q.partition, q.message_id
  from pgonce.queue q
  where q.topic_id = reader.topic_id and q.partition = counters.partition
    and q."offset" >= current.next_offset and q."offset" < counters.next_offset
    and not exists (
      select from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = q.partition and k."offset" = q."offset")
    and not exists (
      select from pgonce.dead_letters d
      where d.consumer_id = reader.consumer_id and d.partition = q.partition and d."offset" = q."offset" and d.state <> 'replayed')
  on conflict do nothing;
  -- As good as passed; to delete the row would make others wait who raise one.
  update pgonce.suspicions s
  set until_offset = 0, messages = 1000, tried_by = null, tried_offset = null
  where s.consumer_id = reader.consumer_id and s.partition = counters.partition;
  update pgonce.leases l
  set epoch = l.epoch + 1, owner = null, leased_until = null, tried_offset = null, careful_until = 0, was_member = false
  where l.consumer_id = reader.consumer_id and l.partition = counters.partition;
end $$;
comment on function pgonce.rewind is 'Internal: sets a consumer back in a partition, for whoever holds the offset lock and has put back what is parked and dead.';

create or replace function pgonce.restore_table(
  checkpoint_id bigint, relation regclass, condition text)
returns void
language plpgsql volatile
set enable_nestloop = off
-- The loop over `unnest` has no other way, and so counts as dear enough to be compiled, each time.
set jit = off
set row_security = off
set datestyle = 'ISO, YMD'
set intervalstyle = 'postgres'
set timezone = 'UTC'
set extra_float_digits = 3
set bytea_output = 'hex'
set lc_monetary = 'C'
set array_nulls = on
set xmloption = content
as $$
declare
  columns text;
  of_row text;
begin
  select string_agg(format('%I', a.attname), ', ' order by a.attnum),
         string_agg(format('(s.v).%I', a.attname), ', ' order by a.attnum)
  into columns, of_row
  from pg_attribute a
  where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attgenerated = '';
  execute format(
    $sql$
      delete from %1$s t
      where %2$s and not exists (
        select from pgonce.checkpoint_parts p
        cross join lateral unnest(p.rows) r(saved)
        where p.checkpoint_id = $1 and p.relation = %1$L::regclass and r.saved = (t.*)::text)
    $sql$, relation, condition)
  using checkpoint_id;
  -- `offset 0`: the text is read once, and not for each column.
  execute format(
    $sql$
      insert into %1$s (%3$s) overriding system value
      select %4$s
      from (
        select r.saved::%1$s as v from pgonce.checkpoint_parts p
        cross join lateral unnest(p.rows) r(saved)
        where p.checkpoint_id = $1 and p.relation = %1$L::regclass
          and not exists (select from %1$s t where %2$s and (t.*)::text = r.saved)
        offset 0) s
    $sql$, relation, condition, columns, of_row)
  using checkpoint_id;
end $$;
comment on function pgonce.restore_table is 'Internal: makes the rows of a table that belong to a consumer those of a checkpoint.';

create or replace function pgonce.check_restorable(reader pgonce.consumers, taken pgonce.checkpoints)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  fault text;
begin
  select string_agg(
    format('%s to %s of partition %s', s.next_offset, f.floor - 1, s.partition), ', ' order by s.partition) into fault
  from pgonce.checkpoint_offsets s
  join pgonce.queue_floors f on f.topic_id = reader.topic_id and f.partition = s.partition
  where s.checkpoint_id = taken.checkpoint_id and s.next_offset < f.floor;
  if fault is not null then
    raise exception using errcode = 'PO014',
      message = format('checkpoint %L of consumer %L needs messages that are gone: offsets %s', taken.checkpoint, reader.consumer, fault),
      hint = 'They were deleted from the queue after it was taken. It can be read by SQL (pgonce.checkpoint_rows), and not restored.';
  end if;
  select string_agg(format('%s', coalesce(t.relation, s.relation)), ', ') into fault
  from (select t.* from pgonce.checkpoint_tables t where t.checkpoint_id = taken.checkpoint_id) t
  full join pgonce.state_of(reader) s on s.relation = t.relation
  where t.columns is distinct from pgonce.signature(s.relation);
  if fault is not null then
    raise exception using errcode = 'PO006',
      message = format('checkpoint %L of consumer %L is of other tables: %s', taken.checkpoint, reader.consumer, fault),
      hint = 'Tables of its state were added, taken away or altered since then. Give them the columns that pgonce.checkpoint_tables shows, and name the same ones by set_state.';
  end if;
  -- They may have got triggers since they were named.
  perform pgonce.check_state_table(s.relation) from pgonce.state_tables s where s.consumer_id = reader.consumer_id;
end $$;
comment on function pgonce.check_restorable is 'Internal: raises PO014 where messages are gone that a restore needs, PO006 where its tables are others, PO003 where one can no longer be put back.';

create or replace function pgonce.restore(consumer text, checkpoint text)
returns setof pgonce.restored
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  taken pgonce.checkpoints := pgonce.checkpoint_row(reader, checkpoint);
  state record;
  saved record;
  counters pgonce.progress;
  answer pgonce.restored;
begin
  perform pgonce.require_read_committed('restore');
  perform pgonce.lock_offsets(reader);
  perform from pgonce.checkpoints c where c.checkpoint_id = taken.checkpoint_id for key share;
  if not found then
    -- Deleted while we waited: say so.
    taken := pgonce.checkpoint_row(reader, checkpoint);
  end if;
  -- Of a shared table its rows are safe by the offset locks; an inbox has none.
  for state in
    select s.relation from pgonce.state_of(reader) s
    where reader.topic_id is null and s.relation <> all (array['pgonce.parked', 'pgonce.dead_letters', 'pgonce.processed_ids']::regclass[])
      and (s.relation <> 'pgonce.word_counts'::regclass
        or exists (select from pgonce.word_counts w where w.consumer = reader.consumer))
    union
    select s.relation from pgonce.state_of(reader) s where s.condition = 'true'
    order by relation
  loop
    execute format('lock table %s in exclusive mode', state.relation);
  end loop;
  perform pgonce.check_restorable(reader, taken);
  set constraints all deferred;
  -- Those that were taken are processed.
  delete from pgonce.parked k where k.consumer_id = reader.consumer_id and k.taken_by is not null;
  for state in select s.* from pgonce.state_of(reader) s loop
    perform pgonce.restore_table(taken.checkpoint_id, state.relation, state.condition);
  end loop;
  for saved in
    select s.*, o.next_offset as came_to
    from pgonce.checkpoint_offsets s
    join pgonce.consumer_offsets o on o.consumer_id = reader.consumer_id and o.partition = s.partition
    where s.checkpoint_id = taken.checkpoint_id
    order by s.partition
  loop
    counters.consumer_id := reader.consumer_id;
    counters.partition := saved.partition;
    counters.next_offset := saved.next_offset;
    counters.received := saved.received;
    counters.duplicates := saved.duplicates;
    counters.failures := saved.failures;
    counters.dead := saved.dead;
    perform pgonce.rewind(reader, counters);
    answer := (saved.partition, saved.next_offset, greatest(saved.came_to - saved.next_offset, 0));
    return next answer;
  end loop;
end $$;
comment on function pgonce.restore is 'Makes a consumer what it was at a checkpoint, in one transaction; what it has processed since comes again. Running workers go on from there. Messages that it has sent stay. Waits for whoever is at its partitions, and for writers of its state tables. Answers where each partition goes on; nothing for an inbox. Errors: PO002, PO003 (in a transaction that has received; a table that cannot be put back), PO006 (its tables are others now), PO010 (READ COMMITTED only), PO014 (messages that it needs are gone), PO015 (no such checkpoint), 55P03 (a handler is at messages that were recorded first).';

create or replace function pgonce.replay(
  consumer text, from_offset bigint default null, partition integer default null, reapply_effects boolean default false)
returns setof pgonce.restored
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  place record;
  counters pgonce.progress;
  answer pgonce.restored;
begin
  perform pgonce.require_read_committed('replay');
  if reader.topic_id is null then
    raise exception using errcode = 'PO007', message = format('consumer %L is an inbox', consumer),
      hint = 'Only what is in a topic can come again: its senders have to send it.';
  elsif from_offset < 1 then
    raise exception using errcode = 'PO003', message = format('from_offset of %s', from_offset),
      hint = 'Offsets begin at 1; null is the earliest that is kept.';
  elsif reapply_effects then
    perform pgonce.lock_offsets(reader);
  end if;
  for place in
    select o.partition, o.next_offset, f.floor, coalesce(replay.from_offset, f.floor) as wanted
    from pgonce.consumer_offsets o
    join pgonce.queue_floors f on f.topic_id = o.topic_id and f.partition = o.partition
    where o.consumer_id = reader.consumer_id and (replay.partition is null or o.partition = replay.partition)
    order by o.partition
  loop
    if place.wanted < place.floor then
      raise exception using errcode = 'PO014',
        message = format('offsets %s to %s of partition %s are gone', place.wanted, place.floor - 1, place.partition),
        hint = 'Without from_offset it begins at the earliest that is kept.';
    end if;
    answer := (place.partition, least(place.wanted, place.next_offset), greatest(place.next_offset - place.wanted, 0));
    if reapply_effects and answer.messages > 0 then
      delete from pgonce.parked k
      where k.consumer_id = reader.consumer_id and k.partition = place.partition
        and (k."offset" >= answer.next_offset or k.taken_by is not null);
      delete from pgonce.dead_letters d
      where d.consumer_id = reader.consumer_id and d.partition = place.partition and d."offset" >= answer.next_offset;
      counters := pgonce.newest_progress(reader.consumer_id, place.partition);
      counters.next_offset := answer.next_offset;
      perform pgonce.rewind(reader, counters);
    end if;
    return next answer;
  end loop;
  if not found then
    raise exception using errcode = 'PO003', message = format('partition %s of consumer %L', partition, consumer),
      hint = 'See which partitions it has: select * from pgonce.consumer_offsets.';
  end if;
end $$;
comment on function pgonce.replay is 'Gives a consumer messages again that it has processed, from an offset on (null: the earliest that is kept), of one partition or all, so that their effects happen once more: what became of them is forgotten, parked messages and dead letters included. Only with reapply_effects; without it answers what it would do. Waits for whoever is at its partitions. Errors: PO002, PO003 (also in a transaction that has received), PO007 (an inbox), PO010 (READ COMMITTED only), PO014 (these messages are gone), 55P03 (a handler is at messages that were recorded first).';
