-- Purge: a topic without its messages.
--
-- Locks, in this order: the topic's row, so that no consumer is created meanwhile, which would start at what is deleted here;
-- the floors of the topic; its head locks; the offset locks of all its consumers, ascending. So it waits for relays and consumers that
-- are at work there, and none starts behind it. READ COMMITTED only, as for a drop.

create or replace function pgonce.purge_topic(topic text)
returns setof pgonce.purged
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  target pgonce.topics;
  place record;
  current pgonce.progress;
  answer pgonce.purged;
begin
  perform pgonce.require_read_committed('purge_topic');
  target := pgonce.topic_row(topic);
  perform from pgonce.topics t where t.topic_id = target.topic_id for update;
  if not found then
    -- Somebody else has just dropped it.
    return;
  end if;
  perform from pgonce.queue_floors f where f.topic_id = target.topic_id order by f.partition for no key update;
  perform from pgonce.partitions p where p.topic_id = target.topic_id order by p.partition for no key update;
  perform from pgonce.consumer_partitions cp
  where cp.consumer_id in (select c.consumer_id from pgonce.consumers c where c.topic_id = target.topic_id)
  order by cp.consumer_id, cp.partition
  for no key update;
  delete from pgonce.outbox o where o.topic_id = target.topic_id and o.status in ('PENDING', 'SCHEDULED');
  get diagnostics answer.unsent = row_count;
  delete from pgonce.queue q where q.topic_id = target.topic_id;
  get diagnostics answer.queued = row_count;
  update pgonce.queue_floors f
  set floor = h.next_offset
  from pgonce.partition_heads h
  where f.topic_id = target.topic_id and h.topic_id = f.topic_id and h.partition = f.partition;
  delete from pgonce.parked k
  where k.consumer_id in (select c.consumer_id from pgonce.consumers c where c.topic_id = target.topic_id);
  for place in
    select o.consumer_id, o.partition, h.next_offset
    from pgonce.consumer_offsets o
    join pgonce.partition_heads h using (topic_id, partition)
    where o.topic_id = target.topic_id
  loop
    current := pgonce.newest_progress(place.consumer_id, place.partition);
    current.next_offset := place.next_offset;
    current.was_parked := false;
    perform pgonce.append_progress(current);
  end loop;
  answer.topic := target.topic;
  return next answer;
end $$;
comment on function pgonce.purge_topic is 'Deletes all messages of a topic, sent, unsent and parked, and takes its consumers past them; offsets go on from where they were. Ids of messages that were sent stay known as duplicates. A message of a transaction that is still open is not purged. Answers how many were deleted from outbox and queue. Errors: PO001, PO010 (READ COMMITTED only).';
