-- Topics: create_topic, drop_topic, pause_topic, resume_topic.
--
-- Locks: create and drop lock the topic's row; drop then takes the head locks, so that it waits for a relay that is at
-- work there and no relay starts behind it. A producer that looked the topic up before the drop may still commit after
-- it: its row belongs to a topic_id that is never used again, and no relay and no view will show it.

create or replace function pgonce.topic_row(topic text)
returns pgonce.topics
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  found_row pgonce.topics;
begin
  select t.* into found_row from pgonce.topics t where t.topic = topic_row.topic;
  if not found then
    raise exception using errcode = 'PO001', message = format('topic %L does not exist', topic_row.topic),
      hint = 'Create it with: select * from pgonce.create_topic(...), or see what there is: select * from pgonce.topics.';
  end if;
  return found_row;
end $$;
comment on function pgonce.topic_row is 'Internal: the topic of that name, or PO001.';

create or replace function pgonce.require_read_committed(verb text)
returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception using errcode = 'PO010', message = format('%s in a %s transaction', verb, current_setting('transaction_isolation')),
      hint = format('Call %s in a READ COMMITTED transaction: it must see what was committed before it took its lock.', verb);
  end if;
end $$;
comment on function pgonce.require_read_committed is 'Internal: raises PO010 where the snapshot may be older than the locks that a verb takes.';

create or replace function pgonce.create_topic(
  topic text,
  partitions integer default null,
  payload_bytes_max integer default null)
returns setof pgonce.topics
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  existing pgonce.topics;
  created boolean;
begin
  if topic is null or octet_length(topic) not between 1 and 255 then
    raise exception using errcode = 'PO003',
      message = format('topic name of %s bytes', coalesce(octet_length(topic)::text, 'null')),
      hint = 'A topic has a name of 1 to 255 bytes.';
  elsif partitions not between 1 and 1024 then
    raise exception using errcode = 'PO003', message = format('%s partitions', partitions),
      hint = 'A topic has 1 to 1024 partitions; 8 where nothing is said.';
  elsif payload_bytes_max not between 1 and 67108864 then
    raise exception using errcode = 'PO003', message = format('payload_bytes_max of %s', payload_bytes_max),
      hint = 'A payload may be limited to 1 to 67108864 bytes (64 MiB); 1048576 (1 MiB) where nothing is said.';
  end if;

  loop
    insert into pgonce.topics as t (topic, partitions, payload_bytes_max)
    values (create_topic.topic, coalesce(create_topic.partitions, 8), coalesce(create_topic.payload_bytes_max, 1048576))
    on conflict (topic) do nothing
    returning t.* into existing;
    created := found;
    exit when created;
    -- Not there although it was in the way: it has just been dropped.
    select t.* into existing from pgonce.topics t where t.topic = create_topic.topic for no key update;
    exit when found;
  end loop;
  if created then
    insert into pgonce.partitions (topic_id, partition)
    select existing.topic_id, p from generate_series(0, existing.partitions - 1) p;
    insert into pgonce.queue_floors (topic_id, partition)
    select existing.topic_id, p from generate_series(0, existing.partitions - 1) p;
    insert into pgonce.heads (topic_id, partition, generation, next_offset, scanned, floor, open_xids, open_from, moved)
    select existing.topic_id, p, 0, 1, 0, 0, '{}', '{}', 0 from generate_series(0, existing.partitions - 1) p;
    return next existing;
    return;
  end if;

  if create_topic.partitions <> existing.partitions then
    raise exception using errcode = 'PO005',
      message = format('topic %L has %s partitions, not %s', topic, existing.partitions, create_topic.partitions),
      hint = 'The number of partitions decides where a key belongs and cannot change. Create another topic.';
  end if;
  if create_topic.payload_bytes_max <> existing.payload_bytes_max then
    update pgonce.topics t set payload_bytes_max = create_topic.payload_bytes_max
    where t.topic_id = existing.topic_id returning t.* into existing;
  end if;
  return next existing;
end $$;
comment on function pgonce.create_topic is 'Creates the topic, or checks that it is as said. Settings that are left out are 8 partitions and 1 MiB for a new topic, and as they are for an old one. Errors: PO003, PO005 (another number of partitions).';

create or replace function pgonce.drop_topic(topic text)
returns setof pgonce.topics
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  dropped pgonce.topics;
  readers text;
begin
  perform pgonce.require_read_committed('drop_topic');
  dropped := pgonce.topic_row(topic);
  perform from pgonce.topics t where t.topic_id = dropped.topic_id for update;
  if not found then
    -- Somebody else has just dropped it.
    return;
  end if;
  select string_agg(quote_literal(c.consumer), ', ' order by c.consumer) into readers
  from pgonce.consumers c where c.topic_id = dropped.topic_id;
  if readers is not null then
    raise exception using errcode = 'PO008', message = format('topic %L is read by %s', topic, readers),
      hint = 'Drop these consumers first: select * from pgonce.drop_consumer(...).';
  end if;
  perform from pgonce.partitions p where p.topic_id = dropped.topic_id order by p.partition for update;
  delete from pgonce.partitions p where p.topic_id = dropped.topic_id;
  delete from pgonce.heads h where h.topic_id = dropped.topic_id;
  delete from pgonce.queue_floors f where f.topic_id = dropped.topic_id;
  delete from pgonce.outbox o where o.topic_id = dropped.topic_id;
  delete from pgonce.queue q where q.topic_id = dropped.topic_id;
  delete from pgonce.duplicate_sends d where d.topic_id = dropped.topic_id;
  delete from pgonce.set_aside s where s.topic_id = dropped.topic_id;
  delete from pgonce.topics t where t.topic_id = dropped.topic_id;
  return next dropped;
end $$;
comment on function pgonce.drop_topic is 'Drops the topic with all its messages, sent and unsent. Answers the row that it dropped. Errors: PO001, PO008 (a consumer reads it), PO010 (READ COMMITTED only).';

create or replace function pgonce.pause_topic(topic text)
returns setof pgonce.topics
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgonce.topic_row(topic);
  return query update pgonce.topics t set paused = true where t.topic = pause_topic.topic returning t.*;
end $$;
comment on function pgonce.pause_topic is 'The relay leaves the topic alone from its next call on. Errors: PO001.';

create or replace function pgonce.resume_topic(topic text)
returns setof pgonce.topics
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgonce.topic_row(topic);
  return query update pgonce.topics t set paused = false where t.topic = resume_topic.topic returning t.*;
end $$;
comment on function pgonce.resume_topic is 'Ends a pause. Errors: PO001.';
