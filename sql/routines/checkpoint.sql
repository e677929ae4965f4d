-- Checkpoint: one moment of a consumer, kept as rows.
--
-- All of it is read by one statement, so it is of one snapshot: what a transaction of the consumer has applied and how far
-- it has moved the offset are in it together, or both are not. Nothing is locked that a consumer needs. While
-- the snapshot is held, what the consumer replaces cannot be cleared away, so rows are stored many together: that takes half the
-- time of one by one, and a fortieth of the WAL.
-- Of an at_most_once consumer, what is with a handler in that moment counts as applied, as it does when its process dies.
--
-- Locks, in this order: the consumer's row FOR KEY SHARE (checkpoint_if_due: FOR NO KEY UPDATE SKIP LOCKED, for which a pause of
-- the consumer waits); the floors of the topic FOR SHARE, so that what the checkpoint needs is not deleted meanwhile; the
-- tables of state, ACCESS SHARE, so that their columns stay as they are.
-- Indexes: the primary keys of progress and of the tables that hold the state; parked, dead_letters and processed_ids by
-- their consumer.

create or replace function pgonce.checkpoint_row(reader pgonce.consumers, checkpoint text)
returns pgonce.checkpoints
language plpgsql stable
as $$
#variable_conflict use_column
declare
  found_row pgonce.checkpoints;
begin
  select c.* into found_row from pgonce.checkpoints c
  where c.consumer_id = reader.consumer_id and c.checkpoint = checkpoint_row.checkpoint;
  if not found then
    raise exception using errcode = 'PO015', message = format('checkpoint %L of consumer %L does not exist', checkpoint, reader.consumer),
      hint = 'See which there are: select * from pgonce.checkpoint_list.';
  end if;
  return found_row;
end $$;
comment on function pgonce.checkpoint_row is 'Internal: the checkpoint of that name, or PO015.';

create or replace function pgonce.is_moved_here(reader pgonce.consumers)
returns boolean
language plpgsql volatile
as $$
begin
  return exists (
    select from pgonce.consumer_partitions p
    cross join lateral pgonce.newest_progress(p.consumer_id, p.partition) newest
    where p.consumer_id = reader.consumer_id and newest.generation > 0
      and newest.writer = pg_current_xact_id_if_assigned());
end $$;
comment on function pgonce.is_moved_here is 'Internal: whether this transaction has received for a consumer, or set it back.';

create or replace function pgonce.take_checkpoint(reader pgonce.consumers, checkpoint text, is_scheduled boolean)
returns pgonce.checkpointed
language plpgsql volatile
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
#variable_conflict use_column
declare
  taken pgonce.checkpoints;
  state record;
  parts text[] := '{}';
  saved bigint;
begin
  if checkpoint is null or octet_length(checkpoint) not between 1 and 255 then
    raise exception using errcode = 'PO003',
      message = format('checkpoint name of %s bytes', coalesce(octet_length(checkpoint)::text, 'null')),
      hint = 'A checkpoint has a name of 1 to 255 bytes.';
  end if;
  if pgonce.is_moved_here(reader) then
    raise exception using errcode = 'PO003', message = format('a checkpoint of consumer %L in a transaction of its own', reader.consumer),
      hint = 'This transaction has received, and its effect may not be there yet. COMMIT first.';
  end if;
  perform from pgonce.consumers c where c.consumer_id = reader.consumer_id for key share;
  if not found then
    -- Dropped while we waited: say so.
    perform pgonce.consumer_row(reader.consumer);
  end if;
  perform from pgonce.queue_floors f where f.topic_id = reader.topic_id order by f.partition for share;
  insert into pgonce.checkpoints (consumer_id, checkpoint, is_scheduled)
  values (reader.consumer_id, take_checkpoint.checkpoint, take_checkpoint.is_scheduled)
  on conflict (consumer_id, checkpoint) do nothing
  returning * into taken;
  if not found then
    raise exception using errcode = 'PO006', message = format('checkpoint %L of consumer %L exists', checkpoint, reader.consumer),
      hint = 'Give another name, or delete it first: select * from pgonce.delete_checkpoint(consumer, checkpoint).';
  end if;
  for state in select s.relation from pgonce.state_tables s where s.consumer_id = reader.consumer_id loop
    perform pgonce.check_state_table(state.relation);
    -- Its columns stay as they are.
    execute format('lock table %s in access share mode', state.relation);
  end loop;
  for state in select s.* from pgonce.state_of(reader) s loop
    insert into pgonce.checkpoint_tables (checkpoint_id, relation, columns)
    values (taken.checkpoint_id, state.relation, pgonce.signature(state.relation));
    -- In parts of 256 kB and a row, whatever the rows are.
    parts := parts || format(
      $sql$
        select $1, %1$L::regclass, array_agg(s.saved)
        from (
          select r.saved, sum(octet_length(r.saved)) over (rows unbounded preceding) / 262144 as nth
          from (select (t.*)::text as saved from %1$s t where %2$s offset 0) r) s
        group by s.nth
      $sql$,
      state.relation, state.condition);
  end loop;
  -- One statement: one snapshot.
  execute format(
    $sql$
      with offsets as (
        insert into pgonce.checkpoint_offsets (checkpoint_id, partition, next_offset, received, duplicates, failures, dead)
        select $1, o.partition, o.next_offset, o.received, o.duplicates, o.failures, o.dead
        from pgonce.consumer_offsets o
        where o.consumer_id = $2),
      parts as (
        insert into pgonce.checkpoint_parts (checkpoint_id, relation, rows)
        %s
        returning cardinality(rows) as length)
      select coalesce(sum(p.length), 0) from parts p
    $sql$,
    array_to_string(parts, ' union all '))
  into saved
  using taken.checkpoint_id, reader.consumer_id;
  update pgonce.checkpoints c set row_count = saved where c.checkpoint_id = taken.checkpoint_id;
  return (taken.checkpoint, taken.taken_at, saved);
end $$;
comment on function pgonce.take_checkpoint is 'Internal: checkpoint, for whoever has looked the consumer up.';

create or replace function pgonce.checkpoint(consumer text, checkpoint text)
returns setof pgonce.checkpointed
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
begin
  perform pgonce.require_read_committed('checkpoint');
  return next pgonce.take_checkpoint(reader, checkpoint, false);
end $$;
comment on function pgonce.checkpoint is 'Saves a consumer as it is in this moment: its offsets, what it has parked and given up, for an inbox what it has processed, and its state (set_state). Stops nobody; a purge of the topic waits for it, and so does ALTER TABLE. Errors: PO002, PO003 (also in a transaction that has received), PO006 (there is one of that name), PO010 (READ COMMITTED only).';

create or replace function pgonce.delete_checkpoint(consumer text, checkpoint text)
returns setof pgonce.checkpointed
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  deleted pgonce.checkpoints := pgonce.checkpoint_row(reader, checkpoint);
  answer pgonce.checkpointed := (deleted.checkpoint, deleted.taken_at, deleted.row_count);
begin
  delete from pgonce.checkpoints c where c.checkpoint_id = deleted.checkpoint_id;
  if not found then
    -- Somebody else has just deleted it.
    return;
  end if;
  perform pgonce.forget_checkpoint(deleted.checkpoint_id);
  return next answer;
end $$;
comment on function pgonce.delete_checkpoint is 'Deletes a checkpoint, and answers what it was. Waits for a restore of it. Errors: PO002, PO015 (there is none of that name).';

create or replace function pgonce.forget_checkpoint(checkpoint_id bigint)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  delete from pgonce.checkpoint_offsets o where o.checkpoint_id = forget_checkpoint.checkpoint_id;
  delete from pgonce.checkpoint_tables t where t.checkpoint_id = forget_checkpoint.checkpoint_id;
  delete from pgonce.checkpoint_parts p where p.checkpoint_id = forget_checkpoint.checkpoint_id;
end $$;
comment on function pgonce.forget_checkpoint is 'Internal: deletes what belongs to a checkpoint whose row is deleted.';

create or replace function pgonce.checkpoint_if_due(consumer text, every interval, keep integer)
returns setof pgonce.checkpointed
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  old record;
begin
  perform pgonce.require_read_committed('checkpoint_if_due');
  if every is null or every < interval '1 second' or keep is null or keep not between 1 and 1000 then
    raise exception using errcode = 'PO003', message = format('every %s, keep %s', every, keep),
      hint = 'A checkpoint is taken every second at the most, and 1 to 1000 of them are kept.';
  end if;
  -- One at a time, of all workers of this consumer.
  perform from pgonce.consumers c where c.consumer_id = reader.consumer_id for no key update skip locked;
  if not found or exists (
    select from pgonce.checkpoints c
    where c.consumer_id = reader.consumer_id and c.is_scheduled and c.taken_at > clock_timestamp() - every) then
    return;
  end if;
  return next pgonce.take_checkpoint(
    reader, to_char(clock_timestamp() at time zone 'UTC', '"scheduled" YYYY-MM-DD HH24:MI:SS.US'), true);
  for old in
    delete from pgonce.checkpoints c
    where c.checkpoint_id in (
      select o.checkpoint_id from pgonce.checkpoints o
      where o.consumer_id = reader.consumer_id and o.is_scheduled
      order by o.checkpoint_id desc
      offset keep
      for update skip locked)
    returning c.checkpoint_id
  loop
    perform pgonce.forget_checkpoint(old.checkpoint_id);
  end loop;
end $$;
comment on function pgonce.checkpoint_if_due is 'Takes a checkpoint of a consumer if the last one that was taken in this way is older than that, and deletes those of them that are too many. For workers, any number of which may call it. Errors: PO002, PO003, PO010 (READ COMMITTED only).';

create or replace view pgonce.checkpoint_list as
select
  r.consumer,
  c.checkpoint,
  c.taken_at,
  c.taken_by,
  c.is_scheduled,
  c.row_count,
  coalesce(o.messages, 0)::bigint as messages,
  coalesce(o.gone, 0)::bigint as gone
from pgonce.checkpoints c
join pgonce.consumers r using (consumer_id)
left join lateral (
  select sum(greatest(now.next_offset - s.next_offset, 0)) as messages, sum(greatest(f.floor - s.next_offset, 0)) as gone
  from pgonce.checkpoint_offsets s
  join pgonce.queue_floors f on f.topic_id = r.topic_id and f.partition = s.partition
  join pgonce.consumer_offsets now on now.consumer_id = c.consumer_id and now.partition = s.partition
  where s.checkpoint_id = c.checkpoint_id) o on true;
comment on view pgonce.checkpoint_list is 'The checkpoints of each consumer. messages: how many were received since then, which come again after a restore; gone: how many of them are no longer in the queue, so that it cannot be restored.';

create or replace view pgonce.checkpoint_contents as
select
  r.consumer,
  c.checkpoint,
  'partition' as part,
  s.partition::text as name,
  s.next_offset,
  greatest(o.next_offset - s.next_offset, 0) as messages,
  greatest(f.floor - s.next_offset, 0) as gone,
  null::bigint as row_count
from pgonce.checkpoints c
join pgonce.consumers r using (consumer_id)
join pgonce.checkpoint_offsets s using (checkpoint_id)
join pgonce.consumer_offsets o on o.consumer_id = c.consumer_id and o.partition = s.partition
join pgonce.queue_floors f on f.topic_id = r.topic_id and f.partition = s.partition
union all
select
  r.consumer,
  c.checkpoint,
  'table',
  t.relation::text,
  null,
  null,
  null,
  coalesce((
    select sum(cardinality(p.rows)) from pgonce.checkpoint_parts p
    where p.checkpoint_id = t.checkpoint_id and p.relation = t.relation), 0)::bigint
from pgonce.checkpoints c
join pgonce.consumers r using (consumer_id)
join pgonce.checkpoint_tables t using (checkpoint_id);
comment on view pgonce.checkpoint_contents is 'What each checkpoint holds: for each partition the offset to go on from, how many messages come again and how many of them are gone; for each table the number of rows.';

create or replace view pgonce.checkpoint_rows as
select r.consumer, c.checkpoint, p.relation, s.saved
from pgonce.checkpoints c
join pgonce.consumers r using (consumer_id)
join pgonce.checkpoint_parts p using (checkpoint_id)
cross join lateral unnest(p.rows) s(saved);
comment on view pgonce.checkpoint_rows is 'The rows that checkpoints hold, of each table, as text that reads back as a row: (saved::my_table).*.';
