-- Suspicion: how a message is found that kills its process.
--
-- Before a range of messages is tried, that is written down and committed (take_suspicion); it is taken back
-- (clear_suspicion) in the transaction that applies them, or in one of its own where that has failed. Who finds it still
-- standing, and the process that wrote it dead, knows that the range kills: nothing behind it is suspected any more, and it
-- is halved. Once it has been passed all the same, whoever died of it was killed from outside, and the suspicion is over.
-- A range of one is charged with an attempt, and its message is tried by itself from then on; after its last attempt it is a
-- dead letter. Messages that were at hand when a process was killed from outside succeed when they are tried again, and
-- nothing is charged to them but in a range of one.
--
-- Locks: the offset lock of the partition, SKIP LOCKED: who does not get it leaves everything as it is, as somebody else is
-- at the messages. Only beat (member.sql) goes without: what it raises makes others careful, and nothing wrong. Indexes: the primary keys of suspicions and members, parked_suspect.

create or replace function pgonce.next_to_receive(reader pgonce.consumers, partition integer, next_offset bigint)
returns bigint
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  return coalesce(
    (select k."offset" from pgonce.parked k
     where k.consumer_id = reader.consumer_id and k.partition = next_to_receive.partition
       and k.taken_by is null and k.due_at <= clock_timestamp() and not k.is_suspect and k."offset" < next_offset
     order by case when reader.failure_policy <> 'block' then k.due_at end, k."offset"
     limit 1),
    next_offset);
end $$;
comment on function pgonce.next_to_receive is 'Internal: the message that receive would hand out first.';

create or replace function pgonce.is_under_suspicion(reader pgonce.consumers, partition integer, next_offset bigint)
returns boolean
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  return exists (
    select from pgonce.suspicions s
    where s.consumer_id = reader.consumer_id and s.partition = is_under_suspicion.partition
      and (s.until_offset > next_offset or s.tried_by is not null));
end $$;
comment on function pgonce.is_under_suspicion is 'Internal: whether the next messages of a partition are to be tried in ranges.';

create or replace function pgonce.clear_suspicion(consumer text, partition integer)
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  next_offset bigint;
begin
  perform from pgonce.consumer_partitions p
  where p.consumer_id = reader.consumer_id and p.partition = clear_suspicion.partition
  for no key update skip locked;
  if not found then
    return;
  end if;
  next_offset := (pgonce.newest_progress(reader.consumer_id, partition)).next_offset;
  update pgonce.suspicions s
  set tried_by = null, tried_offset = null
  where s.consumer_id = reader.consumer_id and s.partition = clear_suspicion.partition;
  -- Where there is nothing more to receive, it is as good as passed: what killed the process is not there.
  delete from pgonce.suspicions s
  where s.consumer_id = reader.consumer_id and s.partition = clear_suspicion.partition
    and (s.until_offset <= next_offset or not pgonce.has_something(reader, partition, next_offset))
    and pgonce.handler_lives(s.consumer_id, s.partition) is not true
    and not exists (
      select from pgonce.parked k
      where k.consumer_id = s.consumer_id and k.partition = s.partition and k.is_suspect and k.taken_by is null);
end $$;
comment on function pgonce.clear_suspicion is 'Takes back what take_suspicion has written down: in the transaction that has received and applied it, or, where that failed and the process lives, in one of its own. Nothing died of it. Errors: PO002.';

create or replace function pgonce.take_suspicion(consumer text, member_id uuid)
returns setof pgonce.suspect_range
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
  suspicion pgonce.suspicions;
  next_offset bigint;
  suspect bigint;
  answer pgonce.suspect_range;
begin
  perform pgonce.require_read_committed('take_suspicion');
  for suspicion in
    select s.* from pgonce.suspicions s where s.consumer_id = reader.consumer_id order by random()
  loop
    perform from pgonce.consumer_partitions p
    where p.consumer_id = reader.consumer_id and p.partition = suspicion.partition
    for no key update skip locked;
    continue when not found or pgonce.handler_lives(reader.consumer_id, suspicion.partition);
    -- Looked at again under the lock.
    select s.* into suspicion from pgonce.suspicions s
    where s.consumer_id = reader.consumer_id and s.partition = suspicion.partition;
    continue when not found;
    next_offset := (pgonce.newest_progress(reader.consumer_id, suspicion.partition)).next_offset;
    if suspicion.tried_by <> take_suspicion.member_id then
      -- Alive, and between its two transactions. That may look otherwise for a moment: the connection by which it says
      -- that it lives may be lost. (Behind a pooler the session of a dead one stays, so this counts for a moment only.)
      continue when exists (
          select from pgonce.members m where m.member_id = suspicion.tried_by and pgonce.lives(m))
        or (suspicion.tried_at > clock_timestamp() - interval '5 seconds'
          and exists (select from pg_stat_activity a where a.pid = suspicion.tried_pid and a.datname = current_database()));
      if suspicion.tried_offset is null then
        -- Parked messages were tried first, if any were due.
        if pgonce.next_to_receive(reader, suspicion.partition, next_offset) = next_offset then
          suspicion.until_offset := least(suspicion.until_offset, next_offset + suspicion.messages);
        end if;
        suspicion.messages := greatest(suspicion.messages / 2, 1);
      else
        perform pgonce.fail(consumer, suspicion.partition, suspicion.tried_offset, 'the process that tried it died');
        update pgonce.parked k
        set is_suspect = true
        where k.consumer_id = reader.consumer_id and k.partition = suspicion.partition and k."offset" = suspicion.tried_offset;
        suspicion.messages := 1000;
      end if;
    end if;
    suspect := pgonce.due_suspect(reader, suspicion.partition, next_offset);
    answer := (suspicion.partition, case when suspect is null then suspicion.messages else 1 end, suspect is not null);
    update pgonce.suspicions s
    set messages = suspicion.messages,
        until_offset = suspicion.until_offset,
        tried_by = take_suspicion.member_id,
        tried_at = clock_timestamp(),
        tried_pid = pg_backend_pid(),
        tried_offset = case
          when suspect is not null then suspect
          when suspicion.messages = 1 then pgonce.next_to_receive(reader, suspicion.partition, next_offset)
        end
    where s.consumer_id = reader.consumer_id and s.partition = suspicion.partition;
    if suspect is null and (suspicion.until_offset <= next_offset
      or not pgonce.has_something(reader, suspicion.partition, next_offset)) then
      -- Nothing to try, now or at all.
      perform pgonce.clear_suspicion(consumer, suspicion.partition);
      continue;
    end if;
    return next answer;
    return;
  end loop;
end $$;
comment on function pgonce.take_suspicion is 'Writes down what a process tries next of a consumer under suspicion, and charges the message that a process before it has died of. Commit it, then receive so many messages of that partition (suspects => is_suspect), apply them and call clear_suspicion in one transaction. No rows: nothing to try, or others are at it. Errors: PO002, PO010 (READ COMMITTED only).';
