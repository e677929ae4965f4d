-- Consumers: create_consumer, drop_consumer, pause_consumer, resume_consumer, set_delivery.
--
-- Locks: create locks the topic's row FOR KEY SHARE, so that the topic cannot be dropped meanwhile; drop takes the
-- consumer's row and then its offset locks in ascending order, so that it waits for a worker that is at a batch. pause,
-- resume and set_delivery take the consumer's row; the last one waits for nobody.

create or replace function pgonce.consumer_row(consumer text)
returns pgonce.consumers
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  found_row pgonce.consumers;
begin
  select c.* into found_row from pgonce.consumers c where c.consumer = consumer_row.consumer;
  if not found then
    raise exception using errcode = 'PO002', message = format('consumer %L does not exist', consumer_row.consumer),
      hint = 'Create it with: select * from pgonce.create_consumer(...), or see what there is: select * from pgonce.consumers.';
  end if;
  return found_row;
end $$;
comment on function pgonce.consumer_row is 'Internal: the consumer of that name, or PO002.';

create or replace function pgonce.transactional_row(consumer text)
returns pgonce.consumers
language plpgsql stable
as $$
declare
  reader pgonce.consumers := pgonce.consumer_row(consumer);
begin
  if reader.topic_id is null then
    raise exception using errcode = 'PO007', message = format('consumer %L is an inbox: it reads no topic', consumer),
      hint = 'Use process_once for it, or create a consumer with a topic.';
  elsif reader.kind = 'external' then
    raise exception using errcode = 'PO007', message = format('consumer %L is external', consumer),
      hint = 'Its effects are outside of this database: use acquire, peek, ack and nack for it.';
  end if;
  return reader;
end $$;
comment on function pgonce.transactional_row is 'Internal: the consumer of that name, which reads a topic and has its effects here, or PO002, or PO007.';

create or replace function pgonce.lock_partition(reader pgonce.consumers, partition integer)
returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
  perform from pgonce.consumer_partitions p
  where p.consumer_id = reader.consumer_id and p.partition = lock_partition.partition
  for no key update;
  if not found then
    -- Dropped while we waited: say so.
    perform pgonce.consumer_row(reader.consumer);
    raise exception using errcode = 'PO003', message = format('partition %s of consumer %L', partition, reader.consumer),
      hint = 'See which partitions it has: select * from pgonce.consumer_offsets.';
  end if;
end $$;
comment on function pgonce.lock_partition is 'Internal: takes the offset lock of a partition, for which it waits, or PO002 or PO003 where there is none.';

create or replace function pgonce.create_consumer(
  consumer text,
  topic text default null,
  start_at text default 'earliest',
  failure_policy text default null,
  attempts_max integer default null,
  backoff_min_ms integer default null,
  backoff_max_ms integer default null,
  kind text default null,
  state regclass[] default null)
returns setof pgonce.consumers
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reads pgonce.topics;
  existing pgonce.consumers;
  created boolean;
begin
  if consumer is null or octet_length(consumer) not between 1 and 255 then
    raise exception using errcode = 'PO003',
      message = format('consumer name of %s bytes', coalesce(octet_length(consumer)::text, 'null')),
      hint = 'A consumer has a name of 1 to 255 bytes.';
  elsif start_at is null or start_at not in ('earliest', 'latest') then
    raise exception using errcode = 'PO003', message = format('start_at of %L', start_at),
      hint = 'A consumer starts at ''earliest'' or at ''latest''.';
  elsif kind not in ('transactional', 'external') then
    raise exception using errcode = 'PO003', message = format('kind of %L', kind),
      hint = 'It is ''transactional'' or ''external''.';
  elsif kind = 'external' and topic is null then
    raise exception using errcode = 'PO003', message = format('external consumer %L without a topic', consumer),
      hint = 'Leases are for the partitions of a topic: name it.';
  elsif failure_policy not in ('park_key', 'block', 'skip') then
    raise exception using errcode = 'PO003', message = format('failure_policy of %L', failure_policy),
      hint = 'It is ''park_key'', ''block'' or ''skip''.';
  elsif attempts_max not between 1 and 1000 then
    raise exception using errcode = 'PO003', message = format('attempts_max of %s', attempts_max),
      hint = '1 to 1000 attempts are possible.';
  elsif backoff_min_ms not between 1 and 86400000 or backoff_max_ms not between 1 and 86400000 then
    raise exception using errcode = 'PO003',
      message = format('backoff_min_ms of %s, backoff_max_ms of %s', backoff_min_ms, backoff_max_ms),
      hint = 'A backoff lasts 1 to 86400000 milliseconds (a day).';
  elsif state is not null and not has_function_privilege(
    -- This function has the rights of the owner, and is for more roles than set_state is.
    coalesce(nullif(current_setting('role'), 'none'), session_user::text), 'pgonce.set_state(text, regclass[])', 'execute') then
    raise exception using errcode = '42501', message = format('permission denied to name the state of consumer %L', consumer),
      hint = 'Who may call set_state may do so.';
  elsif backoff_min_ms > backoff_max_ms then
    raise exception using errcode = 'PO003',
      message = format('backoff_min_ms of %s above backoff_max_ms of %s', backoff_min_ms, backoff_max_ms),
      hint = 'The wait grows from the first to the second.';
  end if;
  if topic is not null then
    reads := pgonce.topic_row(topic);
    perform from pgonce.topics t where t.topic_id = reads.topic_id for key share;
    if not found then
      -- Dropped while we waited: say so.
      reads := pgonce.topic_row(topic);
    end if;
  end if;

  loop
    insert into pgonce.consumers as c (consumer, topic_id, kind, failure_policy, attempts_max, backoff_min_ms, backoff_max_ms)
    values (create_consumer.consumer, reads.topic_id, coalesce(create_consumer.kind, 'transactional'),
            coalesce(create_consumer.failure_policy, 'park_key'), coalesce(create_consumer.attempts_max, 10),
            least(coalesce(create_consumer.backoff_min_ms, 500), create_consumer.backoff_max_ms),
            greatest(coalesce(create_consumer.backoff_max_ms, 30000), create_consumer.backoff_min_ms))
    on conflict (consumer) do nothing
    returning c.* into existing;
    created := found;
    exit when created;
    -- Not there although it was in the way: it has just been dropped.
    select c.* into existing from pgonce.consumers c where c.consumer = create_consumer.consumer;
    exit when found;
  end loop;
  if created then
    insert into pgonce.consumer_partitions (consumer_id, partition)
    select existing.consumer_id, p.partition from pgonce.partitions p where p.topic_id = reads.topic_id;
    -- What it starts at is not deleted before it is there.
    perform from pgonce.queue_floors f where f.topic_id = reads.topic_id order by f.partition for share;
    insert into pgonce.progress (consumer_id, partition, generation, next_offset, received, duplicates)
    select existing.consumer_id, h.partition, 0,
           case when create_consumer.start_at = 'latest' then h.next_offset else h.earliest_offset end, 0, 0
    from pgonce.partition_heads h where h.topic_id = reads.topic_id;
    if existing.kind = 'external' then
      insert into pgonce.leases (consumer_id, partition)
      select existing.consumer_id, p.partition from pgonce.partitions p where p.topic_id = reads.topic_id;
    end if;
    if state is not null then
      perform pgonce.set_state(consumer, state);
    end if;
    return next existing;
    return;
  end if;

  if existing.topic_id is distinct from reads.topic_id then
    raise exception using errcode = 'PO006',
      message = format('consumer %L reads %s', consumer,
        coalesce((select format('topic %L', t.topic) from pgonce.topics t where t.topic_id = existing.topic_id), 'no topic')),
      hint = 'A consumer is bound to its topic. Give another name, or drop this one first.';
  elsif kind <> existing.kind then
    raise exception using errcode = 'PO006', message = format('consumer %L is %s', consumer, existing.kind),
      hint = 'A kind cannot change. Give another name, or drop this one first.';
  elsif failure_policy <> existing.failure_policy then
    raise exception using errcode = 'PO006',
      message = format('consumer %L has the failure policy %s', consumer, existing.failure_policy),
      hint = 'A failure policy cannot change. Give another name, or drop this one first.';
  elsif state is not null then
    perform pgonce.set_state(consumer, state);
  end if;
  -- What is not said stays. Of the two waits one may push the other.
  return query
    with wanted as (
      select coalesce(create_consumer.attempts_max, existing.attempts_max) as attempts_max,
             least(coalesce(create_consumer.backoff_min_ms, existing.backoff_min_ms), create_consumer.backoff_max_ms) as min_ms,
             greatest(coalesce(create_consumer.backoff_max_ms, existing.backoff_max_ms), create_consumer.backoff_min_ms) as max_ms
    ),
    changed as (
      update pgonce.consumers c
      set attempts_max = w.attempts_max, backoff_min_ms = w.min_ms, backoff_max_ms = w.max_ms
      from wanted w
      where c.consumer_id = existing.consumer_id
        and (c.attempts_max, c.backoff_min_ms, c.backoff_max_ms) is distinct from (w.attempts_max, w.min_ms, w.max_ms)
      returning c.*
    )
    select * from changed
    union all
    select existing.* where not exists (select from changed);
end $$;
comment on function pgonce.create_consumer is 'Creates the consumer, or checks that it is as said. It starts at the earliest message that is kept (''latest'': at the next one that the relay publishes); start_at matters only when it is created. After attempts_max failed attempts (10) a message becomes a dead letter; between two of them it waits up to backoff_min_ms (500), doubled each time, up to backoff_max_ms (30000); these can change later. What else waits is its failure_policy: park_key (the later ones of its key, the default), block (the partition), skip (nothing); it cannot change. Without a topic it is an inbox for process_once. With the kind external its effects are outside of this database, and it uses acquire, peek, ack and nack in the place of receive; it cannot change either. state names the tables that hold its effects, as set_state does, for whoever may call that (42501); null leaves them as they are. Errors: PO001, PO003, PO006 (bound to another topic, of another kind, or with another policy).';

create or replace function pgonce.drop_consumer(consumer text)
returns setof pgonce.consumers
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  dropped pgonce.consumers;
begin
  perform pgonce.require_read_committed('drop_consumer');
  dropped := pgonce.consumer_row(consumer);
  perform from pgonce.consumers c where c.consumer_id = dropped.consumer_id for update;
  if not found then
    -- Somebody else has just dropped it.
    return;
  end if;
  perform from pgonce.consumer_partitions p where p.consumer_id = dropped.consumer_id order by p.partition for update;
  delete from pgonce.consumer_partitions p where p.consumer_id = dropped.consumer_id;
  delete from pgonce.progress p where p.consumer_id = dropped.consumer_id;
  delete from pgonce.leases l where l.consumer_id = dropped.consumer_id;
  delete from pgonce.processed_ids p where p.consumer_id = dropped.consumer_id;
  delete from pgonce.suspicions s where s.consumer_id = dropped.consumer_id;
  delete from pgonce.parked p where p.consumer_id = dropped.consumer_id;
  delete from pgonce.dead_letters d where d.consumer_id = dropped.consumer_id;
  delete from pgonce.duplicate_receipts d where d.consumer_id = dropped.consumer_id;
  delete from pgonce.word_counts w where w.consumer = dropped.consumer;
  delete from pgonce.state_tables s where s.consumer_id = dropped.consumer_id;
  perform pgonce.forget_checkpoint(c.checkpoint_id) from pgonce.checkpoints c where c.consumer_id = dropped.consumer_id;
  delete from pgonce.checkpoints c where c.consumer_id = dropped.consumer_id;
  delete from pgonce.consumers c where c.consumer_id = dropped.consumer_id;
  return next dropped;
end $$;
comment on function pgonce.drop_consumer is 'Drops the consumer with its offsets, its record of what it has processed, its parked messages and dead letters, its checkpoints, and its word counts; its effects in tables of yours stay. Answers the row that it dropped. Errors: PO002, PO010 (READ COMMITTED only).';

create or replace function pgonce.pause_consumer(consumer text)
returns setof pgonce.consumers
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgonce.consumer_row(consumer);
  return query update pgonce.consumers c set paused = true where c.consumer = pause_consumer.consumer returning c.*;
end $$;
comment on function pgonce.pause_consumer is 'receive and peek return nothing from their next call on. Errors: PO002.';

create or replace function pgonce.resume_consumer(consumer text)
returns setof pgonce.consumers
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgonce.consumer_row(consumer);
  return query update pgonce.consumers c set paused = false where c.consumer = resume_consumer.consumer returning c.*;
end $$;
comment on function pgonce.resume_consumer is 'Ends a pause. Errors: PO002.';

create or replace function pgonce.set_delivery(consumer text, delivery text)
returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  reader pgonce.consumers := pgonce.transactional_row(consumer);
begin
  if delivery is null or delivery not in ('exactly_once', 'at_least_once', 'at_most_once') then
    raise exception using errcode = 'PO003', message = format('delivery %L of consumer %L', delivery, consumer),
      hint = 'It is exactly_once, at_least_once or at_most_once.';
  elsif reader.delivery = set_delivery.delivery then
    return true;
  end if;
  -- Whoever runs it says so on its way to the next messages, and is not to be held up.
  perform from pgonce.consumers c where c.consumer_id = reader.consumer_id for no key update skip locked;
  if not found then
    return false;
  end if;
  update pgonce.consumers c set delivery = set_delivery.delivery where c.consumer_id = reader.consumer_id;
  return true;
end $$;
comment on function pgonce.set_delivery is 'Writes down how often the effect of a message happens where a process dies: exactly_once, where one transaction holds receive and effect, at_least_once, where the effect commits first, or at_most_once, where receive does. Changes nothing but what consumers.delivery says, which the doctor reads. False where the consumer''s row is locked: say it again. Errors: PO002, PO003, PO007 (an inbox, or external).';
